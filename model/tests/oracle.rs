//! The layers against candle's autograd in f64, on the models under `goldens/`.

mod common;

use anyhow::Result;
use common::{Machine, cases, load};
use compute::Dtype;
use model::oracle::{Difference, Precision, Probe, compare_head, compare_layer};

/// The kernels sum in f32: observed differences are below 1e-6.
const TOLERANCE: f64 = 1e-5;
/// A Gated DeltaNet normalises its output over each head, however small it is: where queries and keys are nearly orthogonal,
/// rounding is magnified. Observed: 2e-5.
const RECURRENT: f64 = 1e-4;

fn check(name: &str, tolerance: f64, differences: Vec<Difference>) {
    for d in differences {
        // With one key per query the softmax is constant: the gradient of q and k is rounding alone.
        assert!(d.relative < tolerance, "{name}: {} differs by {:.1e}", d.what, d.relative);
    }
}

on_every_device!(every_layer_agrees_with_autograd);

fn every_layer_agrees_with_autograd<D: Machine>() -> Result<()> {
    let device = D::open();
    for dir in cases() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = load(&device, &dir, Dtype::F32)?;
        for (seed, (context, window)) in [(0, 5), (19, 1), (11, 7), (3, 70)].into_iter().enumerate() {
            let probe = Probe { context, window, seed: seed as u64, precision: Precision::F64 };
            for layer in 0..model.config().decoder.layers {
                let name = format!("{name} layer {layer}, {probe:?}");
                let tolerance = if model.config().decoder.is_delta_net(layer) { RECURRENT } else { TOLERANCE };
                check(&name, tolerance, device.run(|| compare_layer(&model, layer, probe))?);
            }
            check(&format!("{name} head, {probe:?}"), TOLERANCE, device.run(|| compare_head(&model, probe))?);
        }
    }
    Ok(())
}
