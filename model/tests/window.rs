//! The window against its definition: full gradients by finite differences, shared contexts by running them again.

mod common;

use anyhow::{Context, Result};
use common::{Machine, cases, examples, gradients, load, relative, weight};
use compute::{Collector, Device, Dtype, Sink};
use model::{Example, Extent, Model, Timings};
use std::sync::Arc;

on_every_device!(
    a_context_in_pieces_is_the_context,
    a_full_window_has_the_gradient_of_the_whole_example,
    a_shared_context_gives_what_running_it_again_gives,
    windows_one_after_the_other_give_what_each_gives_alone,
    an_embedding_that_is_no_number_hurts_only_who_uses_it,
);

/// Loss of the example on weights moved by `step` along the gradient.
fn moved_loss<D: Machine>(
    device: &Arc<D>,
    model: &Model<D>,
    example: &Example,
    gradients: &[Vec<f32>],
    step: f32,
) -> f64 {
    let weight = |(w, g): (&D::Weight, &Vec<f32>)| {
        let values: Vec<f32> = device.weight_values(w).iter().zip(g).map(|(w, g)| w + step * g).collect();
        let (rows, cols) = device.shape(w);
        weight(device, Dtype::F32, rows, cols, &values)
    };
    let weights = model.weights().iter().zip(gradients).map(weight).collect();
    let moved = Model::new(device.clone(), model.config().clone(), weights, model.positions());
    let mut cache = moved.cache(moved.positions());
    let report = device.run(|| moved.loss(&mut cache, example));
    report.loss_sum / report.tokens as f64
}

/// The slope of the loss along its own full gradient G is ‖G‖²; along a frozen one it is not that gradient's.
/// In pieces of any length: of less than a convolution sees, too.
fn a_context_in_pieces_is_the_context<D: Machine>() -> Result<()> {
    let device = D::open();
    let ids: Vec<u32> = (0..13).map(|i| (i * 31 + 7) % 90).collect();
    for dir in cases() {
        let model = load(&device, &dir, Dtype::F32)?;
        let logits = |pieces: &[usize]| {
            let (mut cache, mut rest) = (model.cache(64), &ids[..]);
            for &piece in pieces {
                device.run(|| model.prefill(&mut cache, &rest[..piece]));
                rest = &rest[piece..];
            }
            device.run(|| model.next_logits(&mut cache, rest))
        };
        let whole = logits(&[]);
        for pieces in [&[12][..], &[1; 12], &[1, 2, 1, 5], &[6, 1, 1]] {
            let error = relative(&logits(pieces), &whole);
            // The last token alone is summed in another order than among others.
            assert!(error < 1e-4, "{} in {pieces:?}: {error:.1e}", dir.display());
        }
    }
    Ok(())
}

fn a_full_window_has_the_gradient_of_the_whole_example<D: Machine>() -> Result<()> {
    let device = D::open();
    for dir in cases() {
        let model = load(&device, &dir, Dtype::F32)?;
        // Where a step chooses other experts, the loss jumps.
        if model.config().decoder.experts.is_some() {
            continue;
        }
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

fn a_shared_context_gives_what_running_it_again_gives<D: Machine>() -> Result<()> {
    let device = D::open();
    for dir in cases() {
        let model = load(&device, &dir, Dtype::F32)?;
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

/// Holds every event until the end, as an optimizer does whose step has several windows.
struct Held<D: Device>(Vec<Event<D>>);

/// Hands one event to a collector.
type Event<D> = Box<dyn Fn(&mut Collector<D>) + Send>;

impl<D: Device> Sink<D> for Held<D> {
    fn linear(&mut self, tensor: usize, x: &Arc<D::Buffer>, dy: &Arc<D::Buffer>, t: usize) {
        let (x, dy) = (x.clone(), dy.clone());
        self.0.push(Box::new(move |collector| collector.linear(tensor, &x, &dy, t)));
    }
    fn rows(&mut self, tensor: usize, ids: &[u32], dx: &Arc<D::Buffer>) {
        let (ids, dx) = (ids.to_vec(), dx.clone());
        self.0.push(Box::new(move |collector| collector.rows(tensor, &ids, &dx)));
    }
    fn dense(&mut self, tensor: usize, g: &Arc<D::Buffer>) {
        let g = g.clone();
        self.0.push(Box::new(move |collector| collector.dense(tensor, &g)));
    }
    fn wants(&self, _: usize) -> bool {
        true
    }
}

/// Of one length and of several, also while the gradients of the one before are still held: a GPU replays what it
/// recorded for the first.
fn windows_one_after_the_other_give_what_each_gives_alone<D: Machine>() -> Result<()> {
    let device = D::open();
    let dir = &cases()[0];
    let model = load(&device, dir, Dtype::F32)?;
    let ids = |seed: u32| (0..48).map(|i| (i * 29 + seed * 13 + 5) % 90).collect::<Vec<u32>>();
    let spans = [vec![30..40], vec![12..15], vec![35..36], vec![20..29], vec![10..20, 30..35, 40..48], vec![20..36]];
    let mut cache = model.cache(64);
    for (seed, spans) in spans.into_iter().enumerate() {
        let example = Example::new(ids(seed as u32), spans)?;
        let (alone, want) = gradients(&device, &model, &example, Extent::Frozen);
        let mut held = Held(Vec::new());
        cache.clear();
        let (scale, timings) = (1.0 / example.tokens() as f32, &mut Timings::default());
        let report = device.run(|| model.train(&mut cache, &example, Extent::Frozen, scale, &mut held, timings));
        let mut collector = Collector::new(device.clone(), &model.shapes());
        held.0.iter().for_each(|event| event(&mut collector));
        let error = relative(&[report.loss()], &[alone.loss()]);
        assert!(error < 1e-5 && report.tokens == alone.tokens, "example {seed}: {report:?} instead of {alone:?}");
        for ((tensor, got), want) in model.tensors().iter().zip(&collector.gradients).zip(&want) {
            let mut values = vec![0.0; want.len()];
            device.read(got, 0, &mut values);
            let error = relative(&values, want);
            // What is not recorded is not padded either, and sums in another order.
            assert!(error < 1e-5, "example {seed}, {}: {error:.1e}", tensor.name);
        }
    }
    Ok(())
}

/// Nor does padding use it: a window that a GPU pads holds no token that is not in the example.
fn an_embedding_that_is_no_number_hurts_only_who_uses_it<D: Machine>() -> Result<()> {
    let device = D::open();
    let untied = |dir: &&std::path::PathBuf| dir.ends_with("qwen3_untied_yarn");
    let cases = cases();
    let dir = cases.iter().find(untied).context("an untied model")?;
    let model = load(&device, dir, Dtype::F32)?;
    let embedding = model.tensors().iter().position(|t| t.name == "model.embed_tokens.weight").context("tensor")?;
    let row = vec![f32::NAN; device.shape(&model.weights()[embedding]).1];
    device.write_weight(&model.weights()[embedding], 0, &compute::narrow(Dtype::F32, &row));
    let ids: Vec<u32> = (1..30).collect();
    let loss = |ids: Vec<u32>| -> Result<f32> {
        let example = Example::new(ids, vec![20..29])?;
        let (report, gradients) = gradients(&device, &model, &example, Extent::Frozen);
        assert_eq!(report.loss().is_finite(), gradients.iter().flatten().all(|g| g.is_finite()));
        Ok(report.loss())
    };
    assert!(loss(ids.clone())?.is_finite());
    let mut with_it = ids;
    with_it[21] = 0;
    assert!(!loss(with_it)?.is_finite(), "the test must tell");
    Ok(())
}
