//! The window against its definition: full gradients by finite differences, shared contexts by running them again.

mod common;

use anyhow::Result;
use common::{cases, examples, gradients, load, relative};
use compute::{Cpu, Device, Dtype, cpu::Weight};
use model::{Config, Example, Extent, Model};
use std::sync::Arc;

/// Loss of the example on weights moved by `step` along the gradient.
fn moved_loss(device: &Arc<Cpu>, model: &Model<Cpu>, example: &Example, gradients: &[Vec<f32>], step: f32) -> f64 {
    let weight = |(w, g): (&Weight, &Vec<f32>)| {
        let values: Vec<f32> = w.values().iter().zip(g).map(|(w, g)| w + step * g).collect();
        Weight::from_values(Dtype::F32, w.rows(), w.cols(), &values)
    };
    let weights = model.weights().iter().zip(gradients).map(weight).collect();
    let moved = Model::new(device.clone(), model.config().clone(), weights, model.positions());
    let mut cache = moved.cache(moved.positions());
    let report = device.run(|| moved.loss(&mut cache, example));
    report.loss_sum / report.tokens as f64
}

/// The slope of the loss along its own full gradient G is ‖G‖²; along a frozen one it is not that gradient's.
#[test]
fn a_full_window_has_the_gradient_of_the_whole_example() -> Result<()> {
    let device = Arc::new(Cpu::new(2)?);
    for dir in cases() {
        let model = load(&device, &dir, Config::read(&dir)?)?;
        let example = &examples(&dir)?[0];
        let slope_error = |extent: Extent| {
            let (_, g) = gradients(&device, &model, example, extent);
            let square: f64 = g.iter().flatten().map(|v| (*v as f64).powi(2)).sum();
            // The loss changes by about 1e-2: far above its f32 noise, and curvature cancels in the difference.
            let step = (5e-3 / square) as f32;
            let change =
                moved_loss(&device, &model, example, &g, step) - moved_loss(&device, &model, example, &g, -step);
            (change / (2.0 * step as f64 * square) - 1.0).abs()
        };
        let (full, frozen) = (slope_error(Extent::Full), slope_error(Extent::Frozen));
        println!("{}: slope off by {full:.1e} (full), {frozen:.1e} (frozen)", dir.display());
        assert!(full < 2e-2, "{}: {full}", dir.display());
        assert!(frozen > 5.0 * full, "{}: the test cannot tell full from frozen", dir.display());
    }
    Ok(())
}

#[test]
fn a_shared_context_gives_what_running_it_again_gives() -> Result<()> {
    let device = Arc::new(Cpu::new(2)?);
    for dir in cases() {
        let model = load(&device, &dir, Config::read(&dir)?)?;
        let ids: Vec<u32> = (0..40).map(|i| (i * 31 + 7) % 90).collect();
        let mut other = ids.clone();
        other[20..].reverse();
        let mut cache = model.cache(64);
        for (ids, span) in [(&ids, 30..40), (&ids, 12..15), (&other, 25..35), (&ids, 1..4), (&ids, 35..36)] {
            let example = Example::new(ids.clone(), vec![span])?;
            let again = device.run(|| model.loss(&mut cache, &example));
            let fresh = device.run(|| model.loss(&mut model.cache(64), &example));
            let error = relative(&[again.loss()], &[fresh.loss()]);
            assert!(error < 1e-5, "{}: {again:?} instead of {fresh:?}", dir.display());
        }
    }
    Ok(())
}
