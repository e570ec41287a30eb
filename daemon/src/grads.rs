//! `apollod grads`: loss and full gradients of examples, to compare with another implementation.

use crate::backend::{Backend, DeviceChoice, OnDevice};
use crate::examples;
use crate::reading::reading;
use crate::weights;
use anyhow::{Context, Result, bail};
use compute::Collector;
use model::{Config, Example, Extent, Model, Timings};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Prints the losses as JSON and writes the f32 gradient of each example i as `{i}.{hf name}`.
pub fn run(device: &DeviceChoice, threads: usize, grads: Grads) -> Result<()> {
    device.run(threads, grads)
}

/// What `apollod grads` is told.
pub struct Grads<'a> {
    /// Model directory.
    pub model: &'a Path,
    /// Examples, one JSON object a line.
    pub examples: &'a Path,
    /// The file to write.
    pub out: &'a Path,
    /// Compute with weights in f32 whatever the files hold.
    pub widen: bool,
}

impl OnDevice for Grads<'_> {
    type Output = Result<()>;

    fn on<D: Backend>(self, device: Arc<D>) -> Result<()> {
        let Grads { model, examples, out, widen } = self;
        write(device, model, examples, out, widen)
    }
}

fn write<D: Backend>(device: Arc<D>, model_dir: &Path, examples: &Path, out: &Path, widen: bool) -> Result<()> {
    if out.symlink_metadata().is_ok() {
        bail!("{} exists already; name another file or remove it", out.display());
    }
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
        bail!("--out {}: there is no folder {}", out.display(), folder.display());
    }
    let config = Config::read(model_dir)?;
    let examples = examples::read(model_dir, config.max_position_embeddings, examples)?;
    let examples: Vec<Example> = examples.into_iter().map(|(_, example)| example).collect();
    let longest = examples.iter().map(|e| e.ids().len()).max().unwrap_or(1);
    let weights = reading(model_dir, || weights::load(&device, model_dir, &config, widen))?;
    let model = Model::new(device.clone(), config.clone(), weights, longest);
    let mut cache = model.cache(longest);
    let (mut reports, mut raw) = (Vec::new(), HashMap::new());
    for (i, example) in examples.iter().enumerate() {
        model.check(example).with_context(|| format!("example {i}"))?;
        let mut collector = Collector::new(device.clone(), &model.shapes());
        let scale = 1.0 / example.tokens() as f32;
        let report = device
            .run(|| model.train(&mut cache, example, Extent::Frozen, scale, &mut collector, &mut Timings::default()));
        reports.push(json!({"loss": report.loss(), "tokens": report.tokens}));
        for (tensor, gradient) in model.tensors().iter().zip(collector.gradients) {
            let mut values = vec![0.0; device.len(&gradient)];
            device.read(&gradient, 0, &mut values);
            let bytes = compute::narrow(compute::Dtype::F32, &values);
            raw.insert(format!("{i}.{}", tensor.name), (tensor.shape.clone(), bytes));
        }
    }
    let views = raw.iter().map(|(name, (shape, bytes))| {
        Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes).context("a gradient has its tensor's shape")?))
    });
    let views: HashMap<&String, TensorView> = views.collect::<Result<_>>()?;
    safetensors::serialize_to_file(views, None, out).with_context(|| format!("cannot write {}", out.display()))?;
    println!("{}", json!({"examples": reports}));
    Ok(())
}
