//! Cross entropy: large vocabularies, extreme logits, and rows of padding.

use crate::machine::{Machine, on_every_device};
use crate::random::{F32, Random, assert_close, wide};
use crate::reference;
use compute::NO_TARGET;
use std::sync::Arc;

on_every_device! {
    cross_entropy_agrees_with_the_definition_for_large_vocabularies,
    the_gradient_of_cross_entropy_agrees_with_finite_differences,
    extreme_logits_give_finite_losses_and_gradients,
    a_logit_that_is_not_a_number_gives_a_loss_that_is_not_one,
    a_row_without_target_has_no_loss_and_no_gradient,
}

/// (losses, gradients) of the device, losses poisoned before.
fn run<D: Machine>(device: &Arc<D>, logits: &[f32], targets: &[u32], v: usize, scale: f32) -> (Vec<f32>, Vec<f32>) {
    let (mut losses, mut gradients) = (device.poisoned(targets.len()), device.upload(logits));
    device.cross_entropy(&mut losses, &mut gradients, &device.ids(targets), v, &device.upload(&[scale]));
    (device.download(&losses), device.download(&gradients))
}

fn cross_entropy_agrees_with_the_definition_for_large_vocabularies<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("cross_entropy");
    for (t, v, size) in [(1, 1, 1.0), (3, 2, 1.0), (5, 1023, 10.0), (4, 1025, 0.01), (3, 151_936, 3.0)] {
        let logits: Vec<f32> = (0..t * v).map(|_| size * r.normal()).collect();
        let targets = r.ids(t, v);
        let scale = 0.37;
        let (losses, gradients) = run(device, &logits, &targets, v, scale);
        let logits = wide(&logits);
        for (i, &target) in targets.iter().enumerate() {
            let (loss, mut softmax) = reference::cross_entropy(&logits[i * v..][..v], target as usize);
            // 1e-6: the rounding of a loss around 10.
            assert!((losses[i] as f64 - loss).abs() < 1e-6 * (1.0 + loss), "({t},{v}): {} want {loss}", losses[i]);
            softmax[target as usize] -= 1.0;
            let want: Vec<f64> = softmax.iter().map(|p| scale as f64 * p).collect();
            assert_close(&gradients[i * v..][..v], &want, F32, &format!("({t},{v}) row {i}"));
            let sum: f64 = wide(&gradients[i * v..][..v]).iter().sum();
            assert!(sum.abs() < 1e-6, "({t},{v}): a row of gradients sums to {sum}, not to 0");
        }
    }
}

fn the_gradient_of_cross_entropy_agrees_with_finite_differences<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("cross_entropy differences");
    let (t, v) = (3, 29);
    let (logits, targets) = (r.normals(t * v), r.ids(t, v));
    let (_, gradients) = run(device, &logits, &targets, v, 1.0 / t as f32);
    let mean = |x: &[f64]| -> f64 {
        (0..t).map(|i| reference::cross_entropy(&x[i * v..][..v], targets[i] as usize).0).sum::<f64>() / t as f64
    };
    let all: Vec<usize> = (0..t * v).collect();
    assert_close(&gradients, &reference::gradient(&wide(&logits), &all, mean), F32, "mean of the losses");
}

fn extreme_logits_give_finite_losses_and_gradients<D: Machine>(device: &Arc<D>) {
    let v = 2000;
    let mut r = Random::new("extreme");
    let base = r.normals(v);
    // One logit far above: target there, target elsewhere; all far above; one at minus infinity.
    for (index, value, target) in [(7, 1e4, 7), (7, 1e4, 8), (7, 3e38, 8), (9, f32::NEG_INFINITY, 3), (1, -3e38, 2)] {
        let mut logits = base.clone();
        logits[index] = value;
        let (losses, gradients) = run(device, &logits, &[target], v, 1.0);
        let (loss, mut softmax) = reference::cross_entropy(&wide(&logits), target as usize);
        softmax[target as usize] -= 1.0;
        assert!((losses[0] as f64 / loss.max(1e-6) - 1.0).abs() < 1e-5 || (losses[0] as f64 - loss).abs() < 1e-6);
        assert_close(&gradients, &softmax, F32, &format!("logit {index} = {value}, target {target}"));
    }
    let shifted: Vec<f32> = base.iter().map(|v| v + 4096.0).collect();
    let (losses, _) = run(device, &shifted, &[5], v, 1.0);
    let (want, _) = reference::cross_entropy(&wide(&shifted), 5);
    // 5e-4: half the distance of two f32 near 4096.
    assert!((losses[0] as f64 - want).abs() < 5e-4, "{} want {want}", losses[0]);
    // A stretch of a large row that is minus infinity throughout.
    let mut masked = r.normals(40_000);
    masked[..30_000].fill(f32::NEG_INFINITY);
    let (losses, gradients) = run(device, &masked, &[35_000], 40_000, 1.0);
    let (loss, mut softmax) = reference::cross_entropy(&wide(&masked), 35_000);
    softmax[35_000] -= 1.0;
    assert!((losses[0] as f64 - loss).abs() < 1e-6 * (1.0 + loss), "{} want {loss}", losses[0]);
    assert_close(&gradients, &softmax, F32, "masked stretch");
}

fn a_logit_that_is_not_a_number_gives_a_loss_that_is_not_one<D: Machine>(device: &Arc<D>) {
    let mut logits = vec![0.5; 30_000];
    for at in [2500, 29_999] {
        let before = logits[at];
        logits[at] = f32::NAN;
        assert!(run(device, &logits, &[3], 30_000, 1.0).0[0].is_nan());
        logits[at] = f32::INFINITY;
        assert!(!run(device, &logits, &[3], 30_000, 1.0).0[0].is_finite());
        logits[at] = before;
    }
}

fn a_row_without_target_has_no_loss_and_no_gradient<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("padding");
    for v in [7, 20_001] {
        let mut logits = r.normals(4 * v);
        // Whatever padding computed.
        logits[v + 1] = f32::NAN;
        logits[3 * v] = f32::INFINITY;
        let targets = [2, NO_TARGET, 5, NO_TARGET];
        let (losses, gradients) = run(device, &logits, &targets, v, 0.5);
        let alone = run(device, &[&logits[..v], &logits[2 * v..3 * v]].concat(), &[2, 5], v, 0.5);
        assert_eq!(losses, [alone.0[0], 0.0, alone.0[1], 0.0]);
        let zeros = vec![0.0; v];
        assert!(gradients == [&alone.1[..v], &zeros, &alone.1[v..], &zeros].concat(), "{v}");
    }
}
