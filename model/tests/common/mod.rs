//! Loads the models and examples beside the tests.

// Each test program uses its own part of this.
#![allow(dead_code)]

use anyhow::{Context, Result, ensure};
use compute::{Collector, Cpu, Device, Dtype, cpu::Weight};
use model::{Config, Example, Extent, Model, Report, Timings};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// f32 values of a tensor.
pub fn values(file: &SafeTensors, name: &str) -> Result<Vec<f32>> {
    let view = file.tensor(name).with_context(|| format!("no tensor {name}"))?;
    ensure!(view.dtype() == safetensors::Dtype::F32, "{name} is {:?}", view.dtype());
    Ok(view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// A model directory in f32, in memory of its own.
pub fn load(device: &Arc<Cpu>, dir: &Path, config: Config) -> Result<Model<Cpu>> {
    let bytes = std::fs::read(dir.join("model.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let weights = config.decoder.tensors().into_iter().map(|t| {
        let (rows, cols) = if t.shape.len() == 1 { (1, t.shape[0]) } else { (t.shape[0], t.shape[1]) };
        Ok(Weight::from_values(Dtype::F32, rows, cols, &values(&file, &t.name)?))
    });
    let weights = weights.collect::<Result<Vec<_>>>()?;
    Ok(Model::new(device.clone(), config, weights, 256))
}

/// Loss report and gradients of one example.
pub fn gradients(device: &Arc<Cpu>, model: &Model<Cpu>, example: &Example, extent: Extent) -> (Report, Vec<Vec<f32>>) {
    let mut collector = Collector::new(device.clone(), &model.shapes());
    let mut cache = model.cache(model.positions());
    let scale = 1.0 / example.tokens() as f32;
    let timings = &mut Timings::default();
    let report = device.run(|| model.train(&mut cache, example, extent, scale, &mut collector, timings));
    (report, collector.gradients)
}

/// Directories under tests/goldens.
pub fn cases() -> Vec<PathBuf> {
    // Asked for when it runs: the program may have been carried to another machine.
    let root = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let root = Path::new(&root).join("tests/goldens");
    let entries = std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().path());
    let mut dirs: Vec<PathBuf> = entries.filter(|p| p.join("config.json").exists()).collect();
    dirs.sort();
    assert!(dirs.len() >= 7, "goldens are missing in {}", root.display());
    dirs
}

/// The examples of a case.
pub fn examples(dir: &Path) -> Result<Vec<Example>> {
    let text = std::fs::read_to_string(dir.join("examples.jsonl"))?;
    let example = |line: &str| -> Result<Example> {
        let json: serde_json::Value = serde_json::from_str(line)?;
        let ids = |key: &str| -> Result<Vec<u32>> { Ok(serde_json::from_value(json[key].clone())?) };
        let (mut context, decision) = (ids("context_ids")?, ids("decision_ids")?);
        let start = context.len();
        context.extend(decision);
        let end = context.len();
        Ok(Example::new(context, vec![start..end])?)
    };
    text.lines().map(example).collect()
}

/// ‖a - b‖ / ‖b‖.
pub fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut a.iter().zip(b).map(|(a, b)| *a as f64 - *b as f64));
    let size = norm(&mut b.iter().map(|b| *b as f64));
    if distance == 0.0 { 0.0 } else { distance / size }
}
