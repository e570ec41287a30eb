//! The layers against candle's autograd in f64, on the models under `goldens/`.

mod common;

use anyhow::Result;
use common::{cases, load};
use compute::{Cpu, Device};
use model::Config;
use model::oracle::{Difference, Precision, Probe, compare_head, compare_layer};
use std::sync::Arc;

/// The kernels sum in f32: observed differences are below 1e-6.
const TOLERANCE: f64 = 1e-5;

fn check(name: &str, differences: Vec<Difference>) {
    for d in differences {
        // With one key per query the softmax is constant: the gradient of q and k is rounding alone.
        assert!(d.relative < TOLERANCE, "{name}: {} differs by {:.1e}", d.what, d.relative);
    }
}

#[test]
fn every_layer_agrees_with_autograd() -> Result<()> {
    let device = Arc::new(Cpu::new(2)?);
    for dir in cases() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = load(&device, &dir, Config::read(&dir)?)?;
        for (seed, (context, window)) in [(0, 5), (19, 1), (11, 7), (3, 70)].into_iter().enumerate() {
            let probe = Probe { context, window, seed: seed as u64, precision: Precision::F64 };
            for layer in 0..model.config().decoder.layers {
                let name = format!("{name} layer {layer}, {probe:?}");
                check(&name, device.run(|| compare_layer(&model, layer, probe))?);
            }
            check(&format!("{name} head, {probe:?}"), device.run(|| compare_head(&model, probe))?);
        }
    }
    Ok(())
}
