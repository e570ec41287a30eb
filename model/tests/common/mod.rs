//! Loads the models and examples beside the tests.

// Each test program uses its own part of this.
#![allow(dead_code)]

use anyhow::{Context, Result, ensure};
use compute::cuda::DeviceName;
use compute::{Collector, Cpu, Cuda, Device, Dtype, cpu, cuda, narrow};
use model::{Cache, Config, Example, Extent, Model, Report, Timings};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// A backend under test.
pub trait Machine: Device {
    /// Opens it; CUDA is the simulated driver, or the machine's with APOLLOD_TEST_DRIVER=real.
    fn open() -> Arc<Self>;
    /// A weight in memory of its own, zeroed.
    fn weight(device: &Arc<Self>, dtype: Dtype, rows: usize, cols: usize) -> Self::Weight;
}

impl Machine for Cpu {
    fn open() -> Arc<Cpu> {
        Arc::new(Cpu::new(2).expect("two threads"))
    }
    fn weight(_: &Arc<Cpu>, dtype: Dtype, rows: usize, cols: usize) -> cpu::Weight {
        cpu::Weight::zeros(dtype, rows, cols)
    }
}

impl Machine for Cuda {
    fn open() -> Arc<Cuda> {
        // One stays open, so that a GPU's context is not made anew for each test.
        static FIRST: OnceLock<Arc<Cuda>> = OnceLock::new();
        let open = || Arc::new(Cuda::open(&DeviceName::Ordinal(0)).expect("a device"));
        simulated_driver::load_blas();
        FIRST.get_or_init(open);
        open()
    }
    fn weight(device: &Arc<Cuda>, dtype: Dtype, rows: usize, cols: usize) -> cuda::Weight {
        cuda::Weight::zeros(device, dtype, rows, cols)
    }
}

/// Makes a test of `body::<D>` for every backend.
#[macro_export]
macro_rules! on_every_device {
    ($($body:ident),* $(,)?) => {
        mod cpu {
            $(#[test]
            fn $body() -> anyhow::Result<()> {
                super::$body::<compute::Cpu>()
            })*
        }
        mod cuda {
            $(#[test]
            fn $body() -> anyhow::Result<()> {
                super::$body::<compute::Cuda>()
            })*
        }
    };
}

/// A weight of these values, rounded to the nearest of its type.
pub fn weight<D: Machine>(device: &Arc<D>, dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> D::Weight {
    let weight = D::weight(device, dtype, rows, cols);
    device.write_weight(&weight, 0, &narrow(dtype, values));
    weight
}

/// f32 values of a tensor.
pub fn values(file: &SafeTensors, name: &str) -> Result<Vec<f32>> {
    let view = file.tensor(name).with_context(|| format!("no tensor {name}"))?;
    ensure!(view.dtype() == safetensors::Dtype::F32, "{name} is {:?}", view.dtype());
    Ok(view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// A model directory in memory of its own, rounded to the nearest of `dtype`.
pub fn load<D: Machine>(device: &Arc<D>, dir: &Path, dtype: Dtype) -> Result<Model<D>> {
    let config = Config::read(dir)?;
    let bytes = std::fs::read(dir.join("model.safetensors"))?;
    let file = SafeTensors::deserialize(&bytes)?;
    let weights = config.decoder.tensors().into_iter().map(|t| {
        let (rows, cols) = weight_map::matrix_shape(&t.shape);
        Ok(weight(device, dtype, rows, cols, &values(&file, &t.name)?))
    });
    let weights = weights.collect::<Result<Vec<_>>>()?;
    Ok(Model::new(device.clone(), config, weights, 256))
}

/// Loss report and gradients of one example.
pub fn gradients<D: Machine>(
    device: &Arc<D>,
    model: &Model<D>,
    example: &Example,
    extent: Extent,
) -> (Report, Vec<Vec<f32>>) {
    gradients_in(device, model, example, extent, model.cache(model.positions()))
}

/// With the keys and values of the context in this cache.
pub fn gradients_in<D: Machine>(
    device: &Arc<D>,
    model: &Model<D>,
    example: &Example,
    extent: Extent,
    mut cache: Cache<D>,
) -> (Report, Vec<Vec<f32>>) {
    let mut collector = Collector::new(device.clone(), &model.shapes());
    let scale = 1.0 / example.tokens() as f32;
    let timings = &mut Timings::default();
    let report = device.run(|| model.train(&mut cache, example, extent, scale, &mut collector, timings));
    let read = |gradient: &D::Buffer| {
        let mut values = vec![0.0; device.len(gradient)];
        device.read(gradient, 0, &mut values);
        values
    };
    (report, collector.gradients.iter().map(read).collect())
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
