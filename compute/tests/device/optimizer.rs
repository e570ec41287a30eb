//! APOLLO and AdamW on factors against f64 implementations that form the gradient.

use crate::machine::{Machine, on_every_device};
use crate::random::{DTYPES, Random, assert_close, wide};
use crate::reference;
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Compressed, Cpu, Device, Dtype, Factors, Limiter, Moments,
    NORM_FACTOR, NORM_NEXT, NORM_PREVIOUS, NORM_SLOTS, NORM_UPDATE, ScaleType, Stream, Write,
};
use std::sync::Arc;

on_every_device! {
    the_factored_step_equals_the_step_on_the_formed_gradient,
    the_limiter_divides_growth_and_remembers_no_less_than_its_floor,
    adamw_on_factors_is_adamw_on_the_formed_gradient,
    adamw_on_rows_touches_the_rows_and_slots_that_it_names,
    a_step_on_16_bit_weights_is_right_on_average,
    an_overflow_shows_in_the_norm_of_the_update,
}

#[test]
fn factors_rounded_to_bf16_move_weights_in_bf16_as_exact_ones_do() {
    let mut r = Random::new("pairs");
    let cpus =
        [Cpu::without_pairs, Cpu::with_portable_pairs].map(|with| Arc::new(with(Cpu::new(2).expect("two threads"))));
    for case in cases().into_iter().filter(|case| case.m * case.n > 1000) {
        let Case { m, n, rank, t, scale_type } = case;
        let (channels, d, seed) = (m.max(n), m.min(n), r.next());
        let start: Vec<f32> = (0..m * n).map(|_| (r.below(128) as f32 - 64.0) / 64.0).collect();
        let (x, dy) = (r.normals(t * n), r.normals(t * m));
        // Steps in bf16, and steps of weights in f32, which are never rounded.
        let [exact, rounded, unrounded] = [(0, Dtype::BF16), (1, Dtype::BF16), (1, Dtype::F32)].map(|(cpu, dtype)| {
            let device = &cpus[cpu];
            let w = device.weight(dtype, m, n, &start);
            let mut p = device.zeros(rank * d);
            device.normal_projection(&mut p, rank, d, Stream::projection(seed, 0, d));
            let (mut s, mut norms) = (device.poisoned(channels), device.zeros(NORM_SLOTS));
            let [mut exp_avg, mut exp_avg_sq] = [(); 2].map(|()| device.stored(Dtype::F32, rank * channels));
            let (x, dy) = (device.upload(&x), device.upload(&dy));
            let f = Factors { x: &x, dy: &dy, t, m, n };
            let c = Compressed { projection: &p, rank, scale_type, moments: MOMENTS, weight: dtype };
            let (exp_avg, exp_avg_sq) = (&mut exp_avg, &mut exp_avg_sq);
            let prepare = ApolloPrepare {
                s: &mut s,
                at: 0,
                exp_avg: &*exp_avg,
                exp_avg_sq: &*exp_avg_sq,
                factors: f,
                compressed: c,
            };
            device.run(|| device.apollo_prepare(&mut norms, &mut [prepare]));
            // A move of a few neighbours.
            let norm = device.download(&norms)[NORM_UPDATE];
            device.write(&mut norms, NORM_FACTOR, &[1.0 / norm]);
            let step = 0.02 * ((m * n) as f32).sqrt();
            let write = Write { step, decay: 0.0, stream: Stream::rounding(seed, 1, 0) };
            let commit = ApolloCommit { w: &w, s: &s, at: 0, exp_avg, exp_avg_sq, factors: f, compressed: c, write };
            device.run(|| device.apollo_commit(&mut norms, &mut [commit]));
            let moved =
                device.weight_values(&w).iter().zip(&start).map(|(w, w0)| *w as f64 - *w0 as f64).collect::<Vec<_>>();
            (wide(&device.download_stored(exp_avg)), moved)
        });
        // Both factors and both halves of R are rounded to 2^-9 of themselves; small ranks and t average little of that.
        let [of_r, of_w] =
            [distance(&exact.0, &rounded.0) / norm(&exact.0), distance(&exact.1, &rounded.1) / norm(&exact.1)];
        println!("{case:?}: R {of_r:.1e}, move {of_w:.1e}");
        assert!(of_r > 0.0 && of_r <= 2f64.powi(-8), "{case:?}: exp_avg is off by {of_r}");
        // Where the value moves across a random number the element moves to the other neighbour.
        assert!(of_w <= 0.1, "{case:?}: the move is off by {of_w}");
        let mean = |x: &[f64], y: &[f64]| reference::dot(x, y) / reference::dot(y, y);
        let share = mean(&rounded.1, &unrounded.1);
        assert!((share - 1.0).abs() <= 0.02, "{case:?}: moved {share} of what it should");
        assert!(unrounded.0 != rounded.0, "{case:?}: weights in f32 had their factors rounded");
    }
}

const MOMENTS: Moments = Moments { beta1: 0.9, beta2: 0.99, eps: 1e-6 };

/// APOLLO, arXiv:2412.05270, Algorithm 1, on a gradient that is formed.
struct Direct {
    m: Vec<f64>,
    v: Vec<f64>,
    previous: f64,
}

/// What one direct step computes.
struct DirectStep {
    s: Vec<f64>,
    /// ‖U‖ before the limiter.
    norm: f64,
    /// U after it.
    update: Vec<f64>,
}

impl Direct {
    /// R, moments, N and s per channel; then U = G·s and the limiter with its floor.
    fn step(&mut self, g: &[f64], p: &[f64], case: &Case, limiter: &Limiter) -> DirectStep {
        let (m, n, rank) = (case.m, case.n, case.rank);
        let (channels, d) = (m.max(n), m.min(n));
        // Element of G by channel and projected dimension.
        let at = |c: usize, k: usize| if m >= n { g[c * n + k] } else { g[k * n + c] };
        let (mut squares_n, mut squares_r) = (vec![0.0; channels], vec![0.0; channels]);
        for c in 0..channels {
            for j in 0..rank {
                let r: f64 = (0..d).map(|k| p[j * d + k] * at(c, k)).sum();
                let (mo, v) = (&mut self.m[c * rank + j], &mut self.v[c * rank + j]);
                let (b1, b2) = (MOMENTS.beta1 as f64, MOMENTS.beta2 as f64);
                *mo = b1 * *mo + (1.0 - b1) * r;
                *v = b2 * *v + (1.0 - b2) * r * r;
                squares_n[c] += (*mo / (v.sqrt() + MOMENTS.eps as f64)).powi(2);
                squares_r[c] += r * r;
            }
        }
        let ratio = |n: f64, r: f64| n.sqrt() / (r.sqrt() + 1e-8);
        let s: Vec<f64> = match case.scale_type {
            ScaleType::Channel => squares_n.iter().zip(&squares_r).map(|(&n, &r)| ratio(n, r)).collect(),
            ScaleType::Tensor => vec![ratio(squares_n.iter().sum(), squares_r.iter().sum()); channels],
        };
        let mut update: Vec<f64> = (0..m * n).map(|i| g[i] * s[if m >= n { i / n } else { i % n }]).collect();
        let norm = reference::dot(&update, &update).sqrt();
        let mut growth = 1.0;
        if let (Some(limit), true) = (limiter.growth, self.previous > 0.0) {
            growth = (norm / (self.previous + 1e-8)).max(limit as f64) / limit as f64;
        }
        update.iter_mut().for_each(|u| *u /= growth);
        self.previous = (norm / growth).max(limiter.floor as f64 * limiter.expected as f64);
        DirectStep { s, norm, update }
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    m: usize,
    n: usize,
    rank: usize,
    t: usize,
    scale_type: ScaleType,
}

impl Case {
    /// Whether the device takes ‖U‖ from Gram matrices (see `update_norm`), so that the list below
    /// is seen to hold both kinds.
    fn uses_gram(&self) -> bool {
        2 * self.t * (self.m + self.n) <= self.m * self.n
    }
}

/// Tall, wide and square; small and large t; more channels than a block of 256 and than the 4096
/// columns of a Gram block; rows longer than a block of G; rank 1 and full rank.
fn cases() -> Vec<Case> {
    let shapes = [
        (37, 19, 5, 2),
        (19, 37, 5, 2),
        (24, 24, 6, 3),
        (40, 40, 8, 90),
        (1, 9, 1, 3),
        (9, 1, 1, 3),
        (1, 1, 1, 1),
        (600, 30, 16, 4),
        (30, 600, 16, 4),
        (600, 30, 30, 33),
        (30, 600, 1, 33),
        (4200, 9, 3, 2),
        (9, 4200, 3, 2),
        (3, 70_000, 2, 1),
        (70_000, 3, 2, 2),
    ];
    // Channel scaling at rank 1 divides by a single value, which cancels to nothing in one channel
    // of hundreds: no tolerance holds there. Rank 1 is for tensor scaling (Mini).
    let each = |(m, n, rank, t): (usize, usize, usize, usize)| {
        let channel_rank = rank.max(5).min(m.min(n));
        let channel = Case { m, n, rank: channel_rank, t, scale_type: ScaleType::Channel };
        [channel, Case { m, n, rank, t, scale_type: ScaleType::Tensor }]
    };
    shapes.into_iter().flat_map(each).collect()
}

fn the_factored_step_equals_the_step_on_the_formed_gradient<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("apollo");
    let grams = cases().iter().filter(|c| c.uses_gram()).count();
    assert!(grams >= 8 && cases().len() - grams >= 8, "{grams} Gram cases: both branches must be covered");
    for case in cases() {
        device.run(|| follow(device, &case, &mut r));
    }
}

fn norm(x: &[f64]) -> f64 {
    reference::dot(x, x).sqrt()
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    norm(&x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<_>>())
}

/// Five steps, gradients of very different sizes; every quantity after every step.
fn follow<D: Machine>(device: &Arc<D>, case: &Case, r: &mut Random) {
    let Case { m, n, rank, t, scale_type } = *case;
    let (channels, d) = (m.max(n), m.min(n));
    let limiter = Limiter { growth: Some(1.01), floor: 0.2, expected: ((rank * channels) as f32).sqrt() };
    let (w, mut w64) = r.weight(device, Dtype::F32, m, n, 1.0);
    let mut p = device.zeros(rank * d);
    device.normal_projection(&mut p, rank, d, Stream::projection(r.next(), 0, d));
    let mut direct = Direct { m: vec![0.0; rank * channels], v: vec![0.0; rank * channels], previous: 0.0 };
    // The norms of this tensor lie behind those of another, which must stay.
    let (mut norms, at) = (device.upload(&[3.0; 2 * NORM_SLOTS]), NORM_SLOTS);
    device.write(&mut norms, at + NORM_PREVIOUS, &[0.0]);
    let [mut exp_avg, mut exp_avg_sq] = [(); 2].map(|()| device.stored(Dtype::F32, rank * channels));
    let (step, decay) = (0.05f32, 0.003f32);
    for (i, size) in [1.0f32, 30.0, 0.01, 5.0, 5.0].into_iter().enumerate() {
        let what = format!("{case:?} step {i}");
        let x = r.normals(t * n);
        let dy: Vec<f32> = (0..t * m).map(|_| size * r.normal()).collect();
        let (x_buffer, dy_buffer) = (device.upload(&x), device.upload(&dy));
        let f = Factors { x: &x_buffer, dy: &dy_buffer, t, m, n };
        let c = Compressed { projection: &p, rank, scale_type, moments: MOMENTS, weight: Dtype::F32 };
        let mut s = device.poisoned(channels);
        let state = (device.download_stored(&exp_avg), device.download_stored(&exp_avg_sq), device.weight_values(&w));
        device.apollo_prepare(
            &mut norms,
            &mut [ApolloPrepare {
                s: &mut s,
                at,
                exp_avg: &exp_avg,
                exp_avg_sq: &exp_avg_sq,
                factors: f,
                compressed: c,
            }],
        );
        device.limit(&mut norms, &[(at, limiter)]);
        let after = (device.download_stored(&exp_avg), device.download_stored(&exp_avg_sq), device.weight_values(&w));
        assert!(state == after, "{what}: prepare wrote");
        let (values, slots) = (device.download(&s), device.download(&norms));

        let previous = direct.previous;
        let want =
            direct.step(&reference::outer(&wide(&dy), &wide(&x), t, m, n), &wide(&device.download(&p)), case, &limiter);
        let used = if scale_type == ScaleType::Tensor { 1 } else { channels };
        // 1e-4 of the whole, here and for the distance moved: s divides by the norm of a channel's r
        // values and N by each of them, sums of d·t terms of which a few cancel to nothing.
        let error = distance(&wide(&values[..used]), &want.s[..used]);
        assert!(error <= 1e-4 * norm(&want.s[..used]), "{what}: s is off by {error}");
        let near = |slot: usize, want: f64, name: &str| {
            let got = slots[at + slot] as f64;
            assert!((got - want).abs() <= 3e-5 * want, "{what} {name}: {got} want {want}");
        };
        near(NORM_PREVIOUS, previous, "stored norm before");
        near(NORM_UPDATE, want.norm, "‖U‖");
        near(NORM_NEXT, direct.previous, "stored norm after");

        let write = Write { step, decay, stream: Stream::rounding(1, i as u64, 0) };
        device.apollo_commit(
            &mut norms,
            &mut [ApolloCommit {
                w: &w,
                s: &s,
                at,
                exp_avg: &mut exp_avg,
                exp_avg_sq: &mut exp_avg_sq,
                factors: f,
                compressed: c,
                write,
            }],
        );
        let slots = device.download(&norms);
        assert_eq!(slots[at + NORM_PREVIOUS], slots[at + NORM_NEXT], "{what}: stored norm");
        assert_eq!(slots[..at], [3.0; NORM_SLOTS], "{what}: another tensor's norms");
        assert_close(&device.download_stored(&exp_avg), &direct.m, 3e-5, &format!("{what} exp_avg"));
        assert_close(&device.download_stored(&exp_avg_sq), &direct.v, 3e-5, &format!("{what} exp_avg_sq"));
        let before = w64.clone();
        w64.iter_mut().zip(&want.update).for_each(|(w, u)| *w = (*w - step as f64 * u) * (1.0 - decay as f64));
        let (moved, error) = (distance(&w64, &before), distance(&wide(&device.weight_values(&w)), &w64));
        // Weights of size 1 are themselves rounded to 2^-24 of their size, twice a step.
        let rounding = 2f64.powi(-23) * ((m * n) as f64).sqrt();
        assert!(error <= 1e-4 * moved + rounding, "{what}: off by {error} of {moved} moved");
        // The next step starts from what f32 holds.
        w64 = wide(&device.weight_values(&w));
    }
}

fn the_limiter_divides_growth_and_remembers_no_less_than_its_floor<D: Machine>(device: &Arc<D>) {
    let limit = |previous: f32, update: f32, growth: Option<f32>, floor: f32| {
        let mut norms = device.upload(&[previous, update, f32::NAN, f32::NAN]);
        device.limit(&mut norms, &[(0, Limiter { growth, floor, expected: 10.0 })]);
        let norms = device.download(&norms);
        (norms[NORM_FACTOR], norms[NORM_NEXT])
    };
    let close = |got: (f32, f32), want: (f32, f32)| {
        assert!((got.0 / want.0 - 1.0).abs() < 1e-6 && (got.1 / want.1 - 1.0).abs() < 1e-6, "{got:?} want {want:?}");
    };
    close(limit(0.0, 7.0, Some(1.01), 0.0), (1.0, 7.0));
    close(limit(2.0, 8.0, Some(1.01), 0.0), (2.02 / 8.0, 2.02));
    close(limit(2.0, 2.01, Some(1.01), 0.0), (1.0, 2.01));
    close(limit(2.0, 0.5, Some(1.01), 0.0), (1.0, 0.5));
    close(limit(2.0, 0.5, Some(1.01), 0.5), (1.0, 5.0));
    close(limit(2.0, 8.0, None, 0.0), (1.0, 8.0));
    close(limit(2.0, 0.0, Some(1.01), 0.5), (1.0, 2.0));
}

/// AdamW as textbooks write it: m̂ = m/(1-b1^t), v̂ = v/(1-b2^t), w -= lr·m̂/(sqrt v̂ + eps'), then
/// decay. The device adds eps to sqrt v before the correction, as the Hugging Face optimizer does;
/// that is eps' = eps/sqrt(1-b2^t).
struct Adam {
    m: f64,
    v: f64,
    t: i32,
}

impl Adam {
    fn step(&mut self, w: f64, g: f64, lr: f64, decay: f64) -> f64 {
        let (b1, b2) = (MOMENTS.beta1 as f64, MOMENTS.beta2 as f64);
        self.t += 1;
        self.m = b1 * self.m + (1.0 - b1) * g;
        self.v = b2 * self.v + (1.0 - b2) * g * g;
        let (left1, left2) = (1.0 - b1.powi(self.t), 1.0 - b2.powi(self.t));
        let eps = MOMENTS.eps as f64 / left2.sqrt();
        (w - lr * (self.m / left1) / ((self.v / left2).sqrt() + eps)) * (1.0 - decay)
    }
}

fn corrected(lr: f64, t: i32) -> f32 {
    (lr * (1.0 - (MOMENTS.beta2 as f64).powi(t)).sqrt() / (1.0 - (MOMENTS.beta1 as f64).powi(t))) as f32
}

fn adamw_on_factors_is_adamw_on_the_formed_gradient<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("adamw_factors");
    for (m, n, t) in [(1, 1, 1), (13, 7, 3), (7, 13, 20), (300, 33, 2), (3, 700, 5)] {
        let (w, mut w64) = r.weight(device, Dtype::F32, m, n, 0.1);
        let [mut a, mut b] = [(); 2].map(|()| device.stored(Dtype::F32, m * n));
        let mut adam: Vec<Adam> = (0..m * n).map(|_| Adam { m: 0.0, v: 0.0, t: 0 }).collect();
        for i in 1..=4 {
            let (x, dy) = (r.normals(t * n), r.normals(t * m));
            let (x_buffer, dy_buffer) = (device.upload(&x), device.upload(&dy));
            let f = Factors { x: &x_buffer, dy: &dy_buffer, t, m, n };
            let write = Write { step: corrected(0.01, i), decay: 0.002, stream: Stream::rounding(1, 1, 1) };
            device.run(|| device.adamw_factors(&w, &mut a, &mut b, &f, MOMENTS, write));
            let g = reference::outer(&wide(&dy), &wide(&x), t, m, n);
            for ((w, g), adam) in w64.iter_mut().zip(g).zip(&mut adam) {
                *w = adam.step(*w, g, 0.01, 0.002);
            }
            // 1e-4: an element of G that nearly cancels keeps fewer digits, and Adam takes its sign.
            assert_close(&device.weight_values(&w), &w64, 1e-4, &format!("({m},{n}) step {i}"));
            assert_close(&device.download_stored(&a), &adam.iter().map(|a| a.m).collect::<Vec<_>>(), 1e-5, "exp_avg");
            assert_close(
                &device.download_stored(&b),
                &adam.iter().map(|a| a.v).collect::<Vec<_>>(),
                1e-5,
                "exp_avg_sq",
            );
        }
    }
}

fn adamw_on_rows_touches_the_rows_and_slots_that_it_names<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("adamw_rows");
    let (rows, n) = (9, 21);
    let (w, mut w64) = r.weight(device, Dtype::F32, rows, n, 0.1);
    let [mut a, mut b] = [(); 2].map(|()| device.stored(Dtype::F32, 3 * n));
    // Row 7 has slot 0, row 2 has slot 2; slot 1 belongs to nobody. Row 2 is one gradient behind.
    let mut adam: Vec<Vec<Adam>> = (0..2).map(|_| (0..n).map(|_| Adam { m: 0.0, v: 0.0, t: 0 }).collect()).collect();
    for i in 1..=3 {
        let named: &[(u32, u32, usize, i32)] = if i == 1 { &[(7, 0, 0, 1)] } else { &[(7, 0, 0, i), (2, 2, 1, i - 1)] };
        let g = r.normals(named.len() * n);
        let g_buffer = device.upload(&g);
        let list: Vec<AdamRow> =
            named.iter().map(|&(row, slot, _, t)| AdamRow { row, slot, step: corrected(0.01, t) }).collect();
        let write = Write { step: f32::NAN, decay: 0.002, stream: Stream::rounding(1, 1, 1) };
        device.adamw_rows(
            &mut [AdamwRows { w: &w, rows: &list, g: &g_buffer, exp_avg: &mut a, exp_avg_sq: &mut b, write }],
            MOMENTS,
        );
        for (k, &(row, _, which, _)) in named.iter().enumerate() {
            for c in 0..n {
                let w = &mut w64[row as usize * n + c];
                *w = adam[which][c].step(*w, g[k * n + c] as f64, 0.01, 0.002);
            }
        }
        assert_close(&device.weight_values(&w), &w64, 1e-5, &format!("step {i}"));
    }
    let moments = |f: &dyn Fn(&Adam) -> f64| {
        let mut all: Vec<f64> = adam[0].iter().map(f).collect();
        all.extend(vec![0.0; n]);
        all.extend(adam[1].iter().map(f));
        all
    };
    assert_close(&device.download_stored(&a), &moments(&|a| a.m), 1e-5, "exp_avg");
    assert_close(&device.download_stored(&b), &moments(&|a| a.v), 1e-5, "exp_avg_sq");
}

fn a_step_on_16_bit_weights_is_right_on_average<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("stochastic");
    // Both the kernel for rows of whole groups of 128 and the one for any.
    for (m, n) in [(24, 40), (8, 128)] {
        let (t, rank, runs) = (3, 4, 100);
        let [x, dy, p] = [t * n, t * m, rank * m].map(|len| device.upload(&r.normals(len)));
        for dtype in DTYPES {
            // Weights between 1 and 2, all with the same distance of neighbours.
            let start: Vec<f32> = (0..m * n).map(|_| 1.25 + r.below(64) as f32 / 128.0).collect();
            let apply = |dtype: Dtype, seed: u64| {
                let w = device.weight(dtype, m, n, &start);
                let f = Factors { x: &x, dy: &dy, t, m, n };
                let c = Compressed {
                    projection: &p,
                    rank,
                    scale_type: ScaleType::Channel,
                    moments: MOMENTS,
                    weight: dtype,
                };
                let (mut s, mut norms) = (device.zeros(n), device.zeros(NORM_SLOTS));
                let [mut a, mut b] = [(); 2].map(|()| device.stored(Dtype::F32, rank * n));
                let write = Write { step: 1e-3, decay: 1e-4, stream: Stream::rounding(seed, 1, 0) };
                device.apollo_prepare(
                    &mut norms,
                    &mut [ApolloPrepare { s: &mut s, at: 0, exp_avg: &a, exp_avg_sq: &b, factors: f, compressed: c }],
                );
                device.write(&mut norms, NORM_FACTOR, &[1.0]);
                device.apollo_commit(
                    &mut norms,
                    &mut [ApolloCommit {
                        w: &w,
                        s: &s,
                        at: 0,
                        exp_avg: &mut a,
                        exp_avg_sq: &mut b,
                        factors: f,
                        compressed: c,
                        write,
                    }],
                );
                wide(&device.weight_values(&w))
            };
            let exact = apply(Dtype::F32, 0);
            let moved = exact.iter().zip(&start).map(|(a, &b)| (a - b as f64).abs()).sum::<f64>() / (m * n) as f64;
            let mut mean = vec![0.0; m * n];
            device.run(|| {
                for seed in 0..runs {
                    let after = apply(dtype, seed);
                    mean.iter_mut().zip(after).for_each(|(m, w)| *m += w / runs as f64);
                }
            });
            let ulp = match dtype {
                Dtype::F32 => continue,
                Dtype::F16 => 2f64.powi(-10),
                Dtype::BF16 => 2f64.powi(-7),
            };
            assert!(moved < ulp, "the step must be smaller than the grid for this to show anything");
            // One draw lies between two neighbours: standard deviation at most ulp/2, of the mean over
            // the seeds ulp/2/sqrt(runs). Six of those for the worst of 960 elements, five for their sum.
            let errors: Vec<f64> = mean.iter().zip(&exact).map(|(a, b)| a - b).collect();
            let sigma = 0.5 * ulp / (runs as f64).sqrt();
            let worst = errors.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            assert!(worst <= 6.0 * sigma, "{dtype}: an element is off by {:.1} sigma", worst / sigma);
            let sum = errors.iter().sum::<f64>().abs() / (m * n) as f64;
            let sigma = sigma / ((m * n) as f64).sqrt();
            assert!(sum <= 5.0 * sigma, "{dtype}: the mean is off by {:.1} sigma", sum / sigma);
        }
    }
}

fn an_overflow_shows_in_the_norm_of_the_update<D: Machine>(device: &Arc<D>) {
    // Finite factors: 1e25² is infinite; 1e11·1e11 is not, but its square is. Both ways to the norm.
    for (size, m, n, t) in [(1e25f32, 40, 40, 2), (1e25, 40, 40, 90), (1e11, 40, 40, 2), (1e11, 40, 40, 90)] {
        for scale_type in [ScaleType::Channel, ScaleType::Tensor] {
            let (mut x, mut dy) = (vec![0.1f32; t * n], vec![0.1f32; t * m]);
            (x[3], dy[5]) = (size, size);
            let (x, dy) = (device.upload(&x), device.upload(&dy));
            let f = Factors { x: &x, dy: &dy, t, m, n };
            let rank = 2;
            let mut p = device.zeros(rank * n);
            device.normal_projection(&mut p, rank, n, Stream::projection(1, 0, n));
            let c = Compressed { projection: &p, rank, scale_type, moments: MOMENTS, weight: Dtype::F32 };
            let (mut s, mut norms) = (device.zeros(m), device.zeros(NORM_SLOTS));
            device.apollo_prepare(
                &mut norms,
                &mut [ApolloPrepare {
                    s: &mut s,
                    at: 0,
                    exp_avg: &device.stored(Dtype::F32, rank * m),
                    exp_avg_sq: &device.stored(Dtype::F32, rank * m),
                    factors: f,
                    compressed: c,
                }],
            );
            let norm = device.download(&norms)[NORM_UPDATE];
            assert!(!norm.is_finite(), "{size:e} t {t} {scale_type:?}: ‖U‖ = {norm} hides an overflow");
        }
    }
}
