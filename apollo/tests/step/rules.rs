//! How far and where a step moves weights: lr, warm-up, decay, conventions, Mini, tied embeddings.

use crate::common::{
    EMBED, FROZEN, HEAD, NORM, Random, Rig, TALL, TIED, WIDE, distance, linear, one_matrix, settings, tensor, tensors,
};
use apollo::{Convention, Gates, Outcome, Rule, ScaleType, Settings, TensorKind, Written};
use compute::{Dtype, Sink};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Moves are read from f32 weights of size 1 that move about 1e-2: three digits and a half.
const READ: f64 = 1e-3;

fn first_moves(settings: Settings) -> Vec<f64> {
    let mut r = Random::new("moves");
    let mut rig = Rig::new(tensors(), settings, Dtype::F32);
    let g = rig.gradients(&mut r, 3);
    rig.apply(&g)
}

#[track_caller]
fn assert_ratio(a: &[f64], b: &[f64], ratio: f64, which: &[usize]) {
    for &i in which {
        assert!((a[i] / b[i] / ratio - 1.0).abs() < READ, "tensor {i}: {} over {}, want {ratio}", a[i], b[i]);
    }
}

const TRAINED: [usize; 6] = [TALL, WIDE, NORM, HEAD, EMBED, TIED];

#[test]
fn every_trained_tensor_moves_and_a_frozen_one_does_not() {
    let moved = first_moves(settings());
    TRAINED.into_iter().for_each(|i| assert!(moved[i] > 0.0, "tensor {i}"));
    assert_eq!(moved[FROZEN], 0.0);
}

#[test]
fn lr_and_the_weight_of_an_example_scale_every_move() {
    let (moved, doubled) = (first_moves(settings()), first_moves(Settings { lr: 2e-2, ..settings() }));
    assert_ratio(&doubled, &moved, 2.0, &TRAINED);
    let mut r = Random::new("moves");
    let mut rig = Rig::new(tensors(), settings(), Dtype::F32);
    let (g, before) = (rig.gradients(&mut r, 3), rig.values());
    let Outcome::Applied(report) = rig.step_with(&g, 1.0, 0.5, &Gates::default()) else { panic!("skipped") };
    assert!((report.lr - 0.5e-2).abs() < 1e-9 && report.step == 1, "{report:?}");
    let halved: Vec<f64> = rig.values().iter().zip(&before).map(|(a, b)| distance(a, b)).collect();
    assert_ratio(&halved, &moved, 0.5, &TRAINED);
}

/// What an expert needs that few tokens choose: Adam's correction of moments that have seen little.
#[test]
fn the_first_gradient_of_a_tensor_moves_it_as_in_the_first_step_however_late_it_comes() {
    let late = |tensor: usize| {
        let mut r = Random::new("late");
        // One projection, so that both steps have the same.
        let mut rig = Rig::new(tensors(), Settings { update_proj_gap: 100, ..settings() }, Dtype::F32);
        for _ in 0..9 {
            let mut g = rig.optimizer.gradients();
            g.linear(HEAD, &Arc::new(r.normals(48)), &Arc::new(r.normals(60)), 2);
            rig.apply(&g);
        }
        let mut r = Random::new("moves");
        let all = rig.gradients(&mut r, 3);
        let moved = rig.apply(&all)[tensor];
        // A restart does not forget how many there were.
        let mut again = Rig::new(tensors(), Settings { update_proj_gap: 100, ..settings() }, Dtype::F32);
        again.optimizer.load(&mut &rig.saved()[..]).expect("what was saved can be loaded");
        let g = rig.gradients(&mut r, 3);
        assert_ratio(&again.apply(&g), &rig.apply(&g), 1.0, &[tensor]);
        moved
    };
    let first = first_moves(Settings { update_proj_gap: 100, ..settings() });
    for tensor in [TALL, WIDE, NORM, TIED] {
        assert_ratio(&[late(tensor)], &[first[tensor]], 1.0, &[0]);
    }
}

#[test]
fn warm_up_raises_lr_linearly_over_its_steps() {
    let warm = Settings { warmup_steps: 4, ..settings() };
    assert_ratio(&first_moves(warm.clone()), &first_moves(settings()), 0.25, &TRAINED);
    let mut r = Random::new("warm-up");
    let mut rig = Rig::new(tensors(), warm, Dtype::F32);
    for want in [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] {
        let g = rig.gradients(&mut r, 2);
        let Outcome::Applied(report) = rig.step(&g) else { panic!("skipped") };
        assert!((report.lr / 1e-2 - want).abs() < 1e-6, "step {}: lr {}, want {want} of it", report.step, report.lr);
    }
}

#[test]
fn weight_decay_multiplies_the_moved_weights() {
    let after = |weight_decay: f32| {
        let mut r = Random::new("decay");
        let mut rig = Rig::new(tensors(), Settings { weight_decay, ..settings() }, Dtype::F32);
        let mut g = rig.gradients(&mut r, 3);
        g.rows(EMBED, &[2], &Arc::new(r.normals(24)));
        let before = rig.values();
        rig.apply(&g);
        (before, rig.values())
    };
    let ((before, plain), (_, decayed)) = (after(0.0), after(3.0));
    let keep = 1.0 - 1e-2f32 * 3.0;
    for i in TRAINED {
        for (row, (plain, decayed)) in plain[i].chunks(24).zip(decayed[i].chunks(24)).enumerate() {
            // A lookup decays the rows that it touches.
            let touched = i != EMBED || plain != &before[i][row * 24..][..24];
            for (&p, &d) in plain.iter().zip(decayed) {
                let want = if touched { p * keep } else { p };
                assert!((d - want).abs() <= 1e-6 * (1.0 + want.abs()), "tensor {i} row {row}: {d}, want {want}");
            }
        }
    }
    assert_eq!(before[FROZEN], decayed[FROZEN]);
}

#[test]
fn the_first_step_of_adamw_has_the_size_of_lr() {
    // With bias correction m/sqrt(v) of a first gradient is its sign.
    let mut r = Random::new("adam");
    let mut rig = Rig::new(tensors(), settings(), Dtype::F32);
    let before = rig.values();
    let g = rig.gradients(&mut r, 3);
    rig.apply(&g);
    for i in [NORM, HEAD] {
        let mut moved: Vec<f32> = rig.values()[i].iter().zip(&before[i]).map(|(a, b)| (a - b).abs() / 1e-2).collect();
        moved.sort_by(f32::total_cmp);
        // eps takes something off where a gradient nearly cancels.
        let (median, most) = (moved[moved.len() / 2], moved[moved.len() - 1]);
        assert!(median > 0.999 && most < 1.001, "tensor {i}: median {median}, most {most} of lr");
    }
}

#[test]
fn the_papers_alpha_is_sqrt_scale_d_over_r_and_the_packages_sqrt_scale() {
    let of = |convention: Convention, scale: f32, rank: usize| Settings { convention, scale, rank, ..settings() };
    let package = |scale: f32, rank: usize| first_moves(of(Convention::ApolloTorch, scale, rank));
    let paper = |scale: f32, rank: usize| first_moves(of(Convention::Paper, scale, rank));
    let matrices = [TALL, WIDE, TIED];
    // d = 24, r = 4; all three matrices have the same smaller side.
    assert_ratio(&paper(1.0, 4), &package(1.0, 4), 6f64.sqrt(), &matrices);
    assert_ratio(&package(9.0, 4), &package(1.0, 4), 3.0, &matrices);
    assert_ratio(&paper(9.0, 4), &paper(1.0, 4), 3.0, &matrices);
    // A rank beyond the matrix is the full one: nothing to undo.
    assert_ratio(&paper(1.0, 100), &package(1.0, 100), 1.0, &matrices);
    // Neither touches what AdamW trains.
    assert_ratio(&paper(9.0, 4), &package(1.0, 4), 1.0, &[NORM, HEAD, EMBED]);
    assert_eq!(of(Convention::Paper, 2.0, 4).alpha(24, 4), 12f64.sqrt());
}

#[test]
fn a_first_mini_step_is_the_gradient_scaled_as_a_whole() {
    // Rank 1, tensor scaling, scale 128. First step: N is the sign of R (eps is negligible here), so ‖N‖ with
    // bias correction is sqrt(C), and W moves by lr·sqrt(128)·sqrt(C)/‖R‖ · G.
    let (m, n, t) = (48, 20, 3);
    let settings = Settings {
        rank: 1,
        scale: 128.0,
        scale_type: ScaleType::Tensor,
        convention: Convention::ApolloTorch,
        lr: 1e-3,
        eps: 1e-12,
        ..settings()
    };
    let mut r = Random::new("mini");
    let mut rig = one_matrix(m, n, settings.clone());
    let p = r.normals(n);
    let given = p.clone();
    let optimizer = apollo::Optimizer::new(rig.device.clone(), rig.optimizer.tensors().to_vec(), settings);
    rig.optimizer = optimizer.with_projections(Box::new(move |_, _, _| given.to_vec()));
    let (x, dy, before) = (r.normals(t * n), r.normals(t * m), rig.values().remove(0));
    let g = linear(&rig, x.clone(), dy.clone(), t);
    rig.apply(&g);
    let g = |i: usize, j: usize| (0..t).map(|k| dy[k * m + i] as f64 * x[k * n + j] as f64).sum::<f64>();
    let norm_r = (0..m).map(|i| (0..n).map(|j| g(i, j) * p[j] as f64).sum::<f64>().powi(2)).sum::<f64>().sqrt();
    let factor = 1e-3 * 128f64.sqrt() * (m as f64).sqrt() / norm_r;
    for (k, (a, b)) in rig.values()[0].iter().zip(&before).enumerate() {
        let want = -factor * g(k / n, k % n);
        assert!(((a - b) as f64 - want).abs() < 1e-6 + READ * want.abs(), "{k}: moved {}, want {want}", a - b);
    }
    assert_eq!(rig.optimizer.state_bytes(), 8 * m);
}

#[test]
fn moments_take_eight_bytes_per_rank_and_channel() {
    let rig = Rig::new(tensors(), settings(), Dtype::F32);
    let (apollo, adamw) = (4 * (80 + 80 + 30), 24 + 30 * 24);
    assert_eq!(rig.optimizer.state_bytes(), 8 * (apollo + adamw), "an untouched lookup has none");
}

/// G of head factors and input rows, as one linear event: x = 1 (n,n), dy = Gᵀ.
fn as_identity(g: &[f32], m: usize, n: usize) -> (Vec<f32>, Vec<f32>) {
    let identity = (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect();
    (identity, (0..n * m).map(|i| g[i % m * n + i / m]).collect())
}

#[test]
fn a_tied_embedding_trains_on_the_sum_of_its_head_and_its_input_rows() {
    let (m, n) = (37, 11);
    let mut r = Random::new("tied");
    for rule in [Rule::Apollo, Rule::AdamW] {
        let rig = || Rig::new(vec![tensor("w", m, n, TensorKind::Matrix, rule)], settings(), Dtype::F32);
        let (mut tied, mut formed) = (rig(), rig());
        for step in 0..6 {
            let mut events = tied.optimizer.gradients();
            let mut g = vec![0f32; m * n];
            // Two windows of one step, each with head factors and input rows; a token comes twice.
            for t in [3, 2] {
                let (x, dy, dx) = (r.normals(t * n), r.normals(t * m), r.normals(4 * n));
                let ids = [5, r.below(m) as u32, 5, 36];
                for k in 0..t {
                    (0..m * n).for_each(|i| g[i] += dy[k * m + i / n] * x[k * n + i % n]);
                }
                for (k, &id) in ids.iter().enumerate() {
                    (0..n).for_each(|c| g[id as usize * n + c] += dx[k * n + c]);
                }
                events.linear(0, &Arc::new(x), &Arc::new(dy), t);
                events.rows(0, &ids, &Arc::new(dx));
            }
            let before = formed.values().remove(0);
            tied.apply(&events);
            let (x, dy) = as_identity(&g, m, n);
            let events = linear(&formed, x, dy, n);
            let moved = formed.apply(&events)[0];
            let error = distance(&tied.values()[0], &formed.values()[0]);
            // Both are f32; Adam takes the sign of elements that nearly cancel.
            assert!(error < READ * moved, "{rule:?} step {step}: {error} of {moved}");
            formed.set(0, &before);
            tied.set(0, &before);
        }
    }
}

#[test]
fn the_projection_is_renewed_every_update_proj_gap_steps() {
    let after = |update_proj_gap: u64, steps: usize| {
        let mut r = Random::new("refresh");
        let mut rig = Rig::new(tensors(), Settings { update_proj_gap, ..settings() }, Dtype::F32);
        for _ in 0..steps {
            let g = rig.gradients(&mut r, 3);
            rig.apply(&g);
        }
        rig.values()
    };
    let (three, never) = (after(3, 3), after(1000, 3));
    assert!(three == never, "renewed within the gap");
    let (three, never) = (after(3, 4), after(1000, 4));
    for i in [TALL, WIDE, TIED] {
        assert!(three[i] != never[i], "tensor {i} kept its projection");
    }
    [NORM, HEAD, EMBED].into_iter().for_each(|i| assert_eq!(three[i], never[i], "tensor {i} has no projection"));
}

#[test]
fn nothing_moves_that_is_not_said_to_be_written() {
    let mut r = Random::new("written");
    let mut rig = Rig::new(tensors(), settings(), Dtype::F32);
    for _ in 0..3 {
        let before = rig.values();
        // Two steps of all tensors add up.
        for t in [2, 3] {
            let g = rig.gradients(&mut r, t);
            rig.apply(&g);
        }
        let written = rig.optimizer.written();
        for (i, (old, new)) in before.iter().zip(&rig.values()).enumerate() {
            let cols = rig.optimizer.tensors()[i].cols;
            let moved = (0..old.len()).filter(|&at| old[at] != new[at]).map(|at| (at / cols) as u32).collect();
            match &written[i] {
                Written::Rows(rows) => assert_eq!(*rows, moved, "tensor {i}"),
                Written::Nothing => assert_eq!(moved, BTreeSet::new(), "tensor {i}"),
                Written::Everything => {}
            }
        }
        let everything = |i: usize| written[i] == Written::Everything;
        assert!([TALL, WIDE, NORM, HEAD, TIED].into_iter().all(everything), "{written:?}");
        assert!(matches!(&written[EMBED], Written::Rows(rows) if (1..=5).contains(&rows.len())), "{written:?}");
        assert_eq!(written[FROZEN], Written::Nothing);
        rig.optimizer.forget_written();
        assert!(rig.optimizer.written().iter().all(|written| *written == Written::Nothing));
    }
    let mut g = rig.optimizer.gradients();
    g.dense(NORM, &Arc::new(r.normals(24)));
    rig.apply(&g);
    let all = rig.optimizer.written().iter().enumerate();
    all.for_each(|(i, written)| assert_eq!(*written == Written::Everything, i == NORM, "tensor {i}: {written:?}"));
}
