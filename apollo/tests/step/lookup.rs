//! An untied embedding: lazy AdamW on the rows that were touched, under a cap.

use crate::common::{Random, Rig, header, settings, tensor};
use apollo::{Outcome, Rule, Settings, TensorKind};
use compute::{Dtype, Sink};
use std::collections::BTreeMap;
use std::sync::Arc;

const ROWS: usize = 12;
const N: usize = 5;

fn rig(slots: usize) -> Rig {
    let tensors = vec![tensor("embed", ROWS, N, TensorKind::Lookup, Rule::AdamW)];
    let mut rig = Rig::new(tensors.clone(), settings(), Dtype::F32);
    rig.optimizer =
        apollo::Optimizer::new(rig.device.clone(), tensors, settings()).with_lookup_bytes(slots * 8 * N + 3);
    rig
}

/// Textbook AdamW of one row: moments and the number of gradients that it has had.
#[derive(Default, Clone)]
struct Adam {
    m: [f64; N],
    v: [f64; N],
    t: i32,
}

impl Adam {
    fn step(&mut self, w: &mut [f64], g: &[f64], k: &Settings) {
        self.t += 1;
        let (b1, b2, lr, eps) = (k.beta1 as f64, k.beta2 as f64, k.lr as f64, k.eps as f64);
        let (left1, left2) = (1.0 - b1.powi(self.t), 1.0 - b2.powi(self.t));
        for i in 0..N {
            self.m[i] = b1 * self.m[i] + (1.0 - b1) * g[i];
            self.v[i] = b2 * self.v[i] + (1.0 - b2) * g[i] * g[i];
            w[i] -= lr * (self.m[i] / left1) / ((self.v[i] / left2).sqrt() + eps / left2.sqrt());
        }
    }
}

/// Follows a rig row by row in f64.
struct Direct {
    w: Vec<f64>,
    adam: BTreeMap<u32, Adam>,
}

impl Direct {
    fn new(rig: &Rig) -> Direct {
        Direct { w: rig.values()[0].iter().map(|&v| v as f64).collect(), adam: BTreeMap::new() }
    }

    /// One step with random gradients of these ids, on both; the rows in the saved state.
    fn step(&mut self, rig: &mut Rig, r: &mut Random, ids: &[u32], forgotten: &[u32]) -> Vec<u32> {
        self.adam.retain(|row, _| !forgotten.contains(row));
        let dx = r.normals(ids.len() * N);
        let mut sums: BTreeMap<u32, [f64; N]> = BTreeMap::new();
        for (&id, dx) in ids.iter().zip(dx.chunks(N)) {
            let sum = sums.entry(id).or_default();
            sum.iter_mut().zip(dx).for_each(|(s, &d)| *s += d as f64);
        }
        for (id, g) in sums {
            let w = &mut self.w[id as usize * N..][..N];
            self.adam.entry(id).or_default().step(w, &g, &settings());
        }
        let mut gradients = rig.optimizer.gradients();
        gradients.rows(0, ids, &Arc::new(dx));
        assert!(matches!(rig.step(&gradients), Outcome::Applied(_)));
        for (i, (&got, &want)) in rig.values()[0].iter().zip(&self.w).enumerate() {
            // Weights of size 1 to 4 in f32, a few roundings deep.
            assert!((got as f64 - want).abs() < 2e-6, "row {}: {got}, want {want}", i / N);
        }
        let saved = &header(&rig.saved())["tensors"][0]["lookup"];
        let mut rows: Vec<u32> = saved.as_object().expect("a map").keys().map(|k| k.parse().expect("a row")).collect();
        rows.sort_unstable();
        rows
    }
}

#[test]
fn touched_rows_follow_adamw_with_their_own_count_and_others_stay() {
    let mut r = Random::new("lookup");
    let mut rig = rig(ROWS);
    let mut direct = Direct::new(&rig);
    for ids in [&[3, 3, 7][..], &[7], &[11, 0, 7, 11], &[3], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], &[3, 5]] {
        direct.step(&mut rig, &mut r, ids, &[]);
    }
    assert_eq!(rig.optimizer.state_bytes(), ROWS * 8 * N);
}

#[test]
fn over_its_cap_a_lookup_forgets_the_row_unused_for_longest() {
    let mut r = Random::new("eviction");
    let mut rig = rig(3);
    let mut d = Direct::new(&rig);
    assert_eq!(d.step(&mut rig, &mut r, &[1], &[]), [1]);
    assert_eq!(d.step(&mut rig, &mut r, &[2], &[]), [1, 2]);
    assert_eq!(d.step(&mut rig, &mut r, &[3], &[]), [1, 2, 3]);
    assert_eq!(d.step(&mut rig, &mut r, &[1, 4], &[2]), [1, 3, 4]);
    // Row 3 is the oldest, but this very step uses it: rows 1 and 4 are next, the lower goes.
    assert_eq!(d.step(&mut rig, &mut r, &[0, 3], &[1]), [0, 3, 4]);
    // A row that comes back starts anew, in a slot whose moments were somebody else's.
    assert_eq!(d.step(&mut rig, &mut r, &[2], &[4]), [0, 2, 3]);
    assert_eq!(rig.optimizer.state_bytes(), 3 * 8 * N, "more than the cap");
}

#[test]
fn a_step_with_more_rows_than_the_cap_trains_them_all() {
    let mut r = Random::new("more rows");
    let mut rig = rig(2);
    let mut d = Direct::new(&rig);
    assert_eq!(d.step(&mut rig, &mut r, &[9, 8], &[]), [8, 9]);
    assert_eq!(d.step(&mut rig, &mut r, &[1, 2, 3, 9, 4], &[8]), [1, 2, 3, 4, 9]);
    assert_eq!(d.step(&mut rig, &mut r, &[5, 4], &[1]), [2, 3, 4, 5, 9]);
}

#[test]
fn random_steps_under_a_cap_never_hand_one_slot_to_two_rows() {
    let mut r = Random::new("slots");
    let mut rig = rig(4);
    for _ in 0..200 {
        let ids: Vec<u32> = (0..1 + r.below(6)).map(|_| r.below(ROWS) as u32).collect();
        let mut g = rig.optimizer.gradients();
        g.rows(0, &ids, &Arc::new(r.normals(ids.len() * N)));
        assert!(matches!(rig.step(&g), Outcome::Applied(_)));
        let header = header(&rig.saved());
        let lookup = header["tensors"][0]["lookup"].as_object().expect("a map");
        let mut slots: Vec<u64> = lookup.values().map(|s| s["slot"].as_u64().expect("a slot")).collect();
        slots.sort_unstable();
        assert!(slots.iter().enumerate().all(|(i, &s)| s == i as u64), "{slots:?}");
        let now = header["steps"].as_u64();
        assert!(ids.iter().all(|id| lookup[&id.to_string()]["last_step"].as_u64() == now), "{ids:?} {lookup:?}");
    }
}
