//! `apollod doctor`: proves the kernels on the operator's own weights.
//!
//! One layer of each kind, and norm and head over a slice of the vocabulary, run on random inputs
//! through the kernels and through candle's autograd. One layer is in memory at a time.

use crate::backend::{Backend, DeviceChoice, OnDevice};
use crate::weights::ModelFiles;
use anyhow::{Result, bail};
use model::oracle::{Difference, Precision, Probe, compare_head, compare_layer};
use model::{Config, Model};
use std::path::Path;
use std::sync::Arc;

/// Rows of embedding and head that are looked at.
const VOCABULARY: usize = 2048;
/// Parameters of a layer up to which the reference computes in f64; 16 bytes each with its gradient.
const WIDE_MAX: usize = 50_000_000;

/// Prints one line per check; fails if any is off.
pub fn run(device: &DeviceChoice, threads: usize, model_dir: &Path) -> Result<()> {
    device.run(threads, Checks { model_dir })
}

struct Checks<'a> {
    model_dir: &'a Path,
}

impl OnDevice for Checks<'_> {
    type Output = Result<()>;

    fn on<D: Backend>(self, device: Arc<D>) -> Result<()> {
        check(device, self.model_dir)
    }
}

fn check<D: Backend>(device: Arc<D>, model_dir: &Path) -> Result<()> {
    let config = Config::read(model_dir)?;
    let files = ModelFiles::open(model_dir, &config)?;
    let decoder = &config.decoder;
    println!("model    {}, {} layers, hidden {}", decoder.family, decoder.layers, decoder.hidden);
    println!("device   {}", device.describe());
    let (mut failed, mut seen) = (0, Vec::new());
    for (layer, window) in config.windows.iter().enumerate() {
        let kind: String = match window {
            _ if decoder.is_delta_net(layer) => "Gated DeltaNet".into(),
            None => "full attention".into(),
            Some(window) => format!("sliding window {window}"),
        };
        let kind = match decoder.experts_of(layer) {
            Some(experts) => format!("{kind}, {} experts", experts.count),
            None => kind,
        };
        if seen.contains(&kind) {
            continue;
        }
        let model = one_layer(&device, &config, &files, layer)?;
        let tolerance = tolerance(&model);
        let probe = Probe { context: 48, window: 16, seed: 1, precision: precision(&model) };
        if seen.is_empty() {
            failed += report(tolerance, "norm and head", &device.run(|| compare_head(&model, probe))?);
        }
        failed +=
            report(tolerance, &format!("layer {layer} ({kind})"), &device.run(|| compare_layer(&model, 0, probe))?);
        seen.push(kind);
    }
    if failed > 0 {
        bail!("{failed} results differ from the reference by more than they may: do not train with this build");
    }
    println!("ok       kernels agree with candle's autograd");
    Ok(())
}

/// A model of layer `layer` alone, with a slice of embedding and head.
fn one_layer<D: Backend>(device: &Arc<D>, config: &Config, files: &ModelFiles, layer: usize) -> Result<Model<D>> {
    let mut small = config.clone();
    (small.decoder.layers, small.windows) = (1, vec![config.windows[layer]]);
    small.decoder.vocab = config.decoder.vocab.min(VOCABULARY);
    if let Some(delta) = &mut small.decoder.delta_net {
        delta.layers = vec![config.decoder.is_delta_net(layer)];
    }
    if let Some(experts) = &mut small.decoder.experts {
        experts.layers = vec![config.decoder.experts_of(layer).is_some()];
    }
    let weight = |t: weight_map::HfTensor| {
        let name = t.name.replace(".layers.0.", &format!(".layers.{layer}."));
        files.weight(device, &name, weight_map::matrix_shape(&t.shape).0, false)
    };
    let weights = small.decoder.tensors().into_iter().map(weight).collect::<Result<Vec<_>>>()?;
    Ok(Model::new(device.clone(), small, weights, 64))
}

/// How far results may be from the reference. f32 sums over up to some ten thousand terms, everywhere; the products of a
/// device may round their operands to the type of the weights besides.
fn tolerance<D: Backend>(model: &Model<D>) -> f64 {
    let of = |weight| D::tolerance(model.device().dtype(weight));
    model.weights().iter().map(of).fold(0.0, f64::max)
}

fn precision<D: Backend>(model: &Model<D>) -> Precision {
    let parameters: usize = model.shapes().iter().map(|(m, n)| m * n).sum();
    if parameters <= WIDE_MAX { Precision::F64 } else { Precision::F32 }
}

fn report(tolerance: f64, what: &str, differences: &[Difference]) -> usize {
    let worst = differences.iter().max_by(|a, b| a.relative.total_cmp(&b.relative));
    let failed = differences.iter().filter(|d| d.relative.is_nan() || d.relative > tolerance).count();
    let verdict = if failed == 0 { "ok      " } else { "DIFFERS " };
    if let Some(worst) = worst {
        println!(
            "{verdict} {what}: {} results, worst {:.1e} ({}), {tolerance:.0e} allowed",
            differences.len(),
            worst.relative,
            worst.what
        );
    }
    failed
}
