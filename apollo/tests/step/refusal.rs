//! A step that is refused changes no weight, no moment, no norm and no counter, and says why.

use crate::common::{EMBED, FROZEN, HEAD, NORM, Random, Rig, TALL, TIED, WIDE, settings, tensors};
use apollo::{Gates, Gradients, Outcome, Settings, Skip};
use compute::cpu::Buffer;
use compute::{Cpu, Dtype, Sink};
use std::sync::Arc;

fn rig(dtype: Dtype) -> Rig {
    Rig::new(tensors(), settings(), dtype)
}

/// Steps taken before the refused one, so that there are moments and norms to lose.
fn warm(rig: &mut Rig, r: &mut Random) {
    for _ in 0..4 {
        let g = rig.gradients(r, 3);
        rig.apply(&g);
    }
}

/// `values` with element `at` replaced.
fn with(mut values: Buffer, at: usize, value: f32) -> Arc<Buffer> {
    values[at] = value;
    Arc::new(values)
}

/// Gradients that carry one bad event beside good ones, by name.
fn bad_gradients(rig: &Rig, r: &mut Random) -> Vec<(String, Gradients<Cpu>)> {
    let mut all = Vec::new();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (tensor, m, n) in [(TALL, 80, 24), (WIDE, 24, 80), (HEAD, 30, 24), (TIED, 30, 24), (FROZEN, 5, 24)] {
            let mut g = rig.gradients(r, 2);
            g.linear(tensor, &with(r.normals(2 * n), 2 * n - 1, bad), &Arc::new(r.normals(2 * m)), 2);
            all.push((format!("{bad} in x of {tensor}"), g));
            let mut g = rig.gradients(r, 2);
            g.linear(tensor, &Arc::new(r.normals(2 * n)), &with(r.normals(2 * m), 0, bad), 2);
            all.push((format!("{bad} in dy of {tensor}"), g));
        }
        for tensor in [EMBED, TIED] {
            let mut g = rig.gradients(r, 2);
            g.rows(tensor, &[3, 29], &with(r.normals(48), 30, bad));
            all.push((format!("{bad} in rows of {tensor}"), g));
        }
        let mut g = rig.gradients(r, 2);
        g.dense(NORM, &with(r.normals(24), 23, bad));
        all.push((format!("{bad} in a vector"), g));
    }
    all
}

/// Finite gradients whose products, sums or squares are not.
fn overflowing_gradients(rig: &Rig, r: &mut Random) -> Vec<(String, Gradients<Cpu>)> {
    let mut all = Vec::new();
    // An infinite product (1e25·1e25), and a finite one with an infinite square (1e11·1e11); few
    // rows, where the norm comes from Gram matrices, and so many that G is formed.
    for size in [1e25f32, 1e11] {
        for t in [2, 50] {
            for (tensor, m, n) in [(TALL, 80, 24), (WIDE, 24, 80), (HEAD, 30, 24), (TIED, 30, 24)] {
                let mut g = rig.gradients(r, 2);
                g.linear(tensor, &with(r.normals(t * n), 7, size), &with(r.normals(t * m), 5, size), t);
                all.push((format!("{size:e} over {t} rows of {tensor}"), g));
            }
        }
    }
    for (name, size, times) in [("sum", 3e38f32, 2), ("square", 1e25, 1)] {
        let mut g = rig.gradients(r, 2);
        (0..times).for_each(|_| g.dense(NORM, &with(vec![0.0; 24].into(), 4, size)));
        all.push((format!("{name} of a vector"), g));
        let mut g = rig.gradients(r, 2);
        (0..times).for_each(|_| g.rows(EMBED, &[9], &with(vec![0.0; 24].into(), 4, size)));
        all.push((format!("{name} of a row"), g));
    }
    all
}

#[track_caller]
fn assert_refused(rig: &mut Rig, name: &str, g: &Gradients<Cpu>) {
    let before = rig.snapshot();
    let outcome = rig.step(g);
    assert!(matches!(outcome, Outcome::Skipped(Skip::NotFinite { values: 1.. })), "{name}: {outcome:?}");
    assert!(before == rig.snapshot(), "{name}: refused, but something changed");
}

#[test]
fn a_factor_that_is_not_finite_changes_nothing() {
    let mut r = Random::new("not finite");
    for dtype in [Dtype::F32, Dtype::BF16] {
        let mut rig = rig(dtype);
        warm(&mut rig, &mut r);
        for (name, g) in bad_gradients(&rig, &mut r) {
            assert_refused(&mut rig, &name, &g);
        }
    }
}

#[test]
fn finite_factors_that_overflow_change_nothing() {
    let mut r = Random::new("overflow");
    for dtype in [Dtype::F32, Dtype::BF16] {
        let mut rig = rig(dtype);
        warm(&mut rig, &mut r);
        for (name, g) in overflowing_gradients(&rig, &mut r) {
            assert_refused(&mut rig, &name, &g);
        }
    }
}

#[test]
fn the_number_of_bad_values_is_reported() {
    let mut rig = rig(Dtype::F32);
    let mut g = rig.optimizer.gradients();
    let mut x = vec![1.0; 48];
    (x[0], x[47]) = (f32::NAN, f32::INFINITY);
    // A third one beyond the two rows that count, as a padded buffer may hold.
    x.push(f32::NAN);
    g.linear(TALL, &Arc::new(x.into()), &Arc::new(vec![1.0; 160].into()), 2);
    let outcome = rig.step(&g);
    assert_eq!(outcome, Outcome::Skipped(Skip::NotFinite { values: 2 }));
    let Outcome::Skipped(skip) = outcome else { unreachable!() };
    assert_eq!(skip.to_string(), "loss or gradient is not finite (2 values)");
}

#[test]
fn a_loss_or_an_example_weight_that_is_not_finite_changes_nothing() {
    let mut r = Random::new("loss");
    let mut rig = rig(Dtype::BF16);
    warm(&mut rig, &mut r);
    let g = rig.gradients(&mut r, 3);
    let before = rig.snapshot();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (loss, scale) in [(bad, 1.0), (1.0, bad)] {
            let outcome = rig.step_with(&g, loss, scale, &Gates::default());
            assert_eq!(outcome, Outcome::Skipped(Skip::NotFinite { values: 1 }), "loss {loss} weight {scale}");
            assert!(before == rig.snapshot(), "loss {loss} weight {scale}");
        }
    }
}

#[test]
fn gates_refuse_losses_and_update_norms_outside_their_bounds() {
    let mut r = Random::new("gates");
    let mut rig = rig(Dtype::BF16);
    warm(&mut rig, &mut r);
    let g = rig.gradients(&mut r, 3);
    let before = rig.snapshot();
    let gates = |set: fn(&mut Gates)| {
        let mut gates = Gates::default();
        set(&mut gates);
        gates
    };
    let refused = [
        (0.5, gates(|g| g.loss_min = Some(0.6)), Skip::Loss { loss: 0.5, bound: 0.6 }),
        (9.0, gates(|g| g.loss_max = Some(8.5)), Skip::Loss { loss: 9.0, bound: 8.5 }),
    ];
    for (loss, gates, want) in refused {
        assert_eq!(rig.step_with(&g, loss, 1.0, &gates), Outcome::Skipped(want));
        assert!(before == rig.snapshot());
    }
    for gates in [gates(|g| g.update_norm_min = Some(50.0)), gates(|g| g.update_norm_max = Some(0.01))] {
        let Outcome::Skipped(Skip::UpdateNorm { norm, .. }) = rig.step_with(&g, 1.0, 1.0, &gates) else {
            panic!("{gates:?} let an update of ordinary size pass");
        };
        assert!((0.1..10.0).contains(&norm), "{norm}: about 1 is expected of an ordinary update");
        assert!(before == rig.snapshot(), "{gates:?}");
    }
    let all =
        Gates { loss_min: Some(0.5), loss_max: Some(1.5), update_norm_min: Some(0.1), update_norm_max: Some(10.0) };
    assert!(matches!(rig.step_with(&g, 1.0, 1.0, &all), Outcome::Applied(_)));
    assert!(before != rig.snapshot());
}

#[test]
fn a_refused_step_leaves_no_trace_in_the_steps_after_it() {
    let mut r = Random::new("trace");
    let (mut disturbed, mut plain) = (rig(Dtype::BF16), rig(Dtype::BF16));
    let gates = Gates { update_norm_max: Some(0.01), ..Gates::default() };
    for _ in 0..7 {
        let other = disturbed.gradients(&mut r, 5);
        assert!(matches!(disturbed.step_with(&other, 1.0, 1.0, &gates), Outcome::Skipped(_)));
        for (name, g) in bad_gradients(&disturbed, &mut r).iter().take(3) {
            assert_refused(&mut disturbed, name, g);
        }
        let g = plain.gradients(&mut r, 3);
        plain.apply(&g);
        disturbed.apply(&g);
    }
    assert!(disturbed.snapshot() == plain.snapshot());
}

#[test]
fn a_step_without_gradients_is_reported_as_empty() {
    let mut rig = rig(Dtype::F32);
    let mut g = rig.optimizer.gradients();
    let before = rig.snapshot();
    assert_eq!(rig.step(&g), Outcome::Skipped(Skip::Empty));
    assert!(!g.wants(FROZEN) && g.wants(TALL) && g.wants(EMBED));
    g.linear(FROZEN, &Arc::new(vec![1.0; 24].into()), &Arc::new(vec![1.0; 5].into()), 1);
    assert_eq!(rig.step(&g), Outcome::Skipped(Skip::Empty));
    assert!(before == rig.snapshot());
}

#[test]
fn tensors_without_a_gradient_stay_as_they_are() {
    let mut r = Random::new("partial");
    let mut rig = rig(Dtype::BF16);
    warm(&mut rig, &mut r);
    let mut g = rig.optimizer.gradients();
    g.linear(WIDE, &Arc::new(r.normals(160)), &Arc::new(r.normals(48)), 2);
    let moved = rig.apply(&g);
    for (i, moved) in moved.into_iter().enumerate() {
        assert_eq!(moved > 0.0, i == WIDE, "tensor {i} moved {moved}");
    }
}

#[test]
#[should_panic(expected = "weight of wide")]
fn a_weight_of_another_shape_is_noticed_before_anything_is_written() {
    let mut rig = Rig::new(tensors(), Settings::default(), Dtype::F32);
    rig.weights[WIDE] = compute::cpu::Weight::zeros(Dtype::F32, 80, 24);
    let g = rig.gradients(&mut Random::new("shape"), 2);
    rig.step(&g);
}
