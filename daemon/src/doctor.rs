//! `apollod doctor`: proves the kernels on the operator's own weights.
//!
//! One layer of each kind, and norm and head over a slice of the vocabulary, run on random inputs
//! through the kernels and through candle's autograd. One layer is in memory at a time.

use crate::weights::ModelFiles;
use anyhow::{Result, bail};
use compute::{Cpu, Device};
use model::oracle::{Difference, Precision, Probe, compare_head, compare_layer};
use model::{Config, Model};
use std::path::Path;
use std::sync::Arc;

/// The kernels sum in f32 over up to some ten thousand terms.
const TOLERANCE: f64 = 1e-4;
/// Rows of embedding and head that are looked at.
const VOCABULARY: usize = 2048;
/// Parameters of a layer up to which the reference computes in f64; 16 bytes each with its gradient.
const WIDE_MAX: usize = 50_000_000;

/// Prints one line per check; fails if any is off.
pub fn run(model_dir: &Path, threads: usize) -> Result<()> {
    let config = Config::read(model_dir)?;
    let files = ModelFiles::open(model_dir, &config)?;
    let decoder = &config.decoder;
    println!("model    {:?}, {} layers, hidden {}", decoder.family, decoder.layers, decoder.hidden);
    let device = Arc::new(Cpu::new(threads)?);
    let (mut failed, mut seen) = (0, Vec::new());
    for (layer, window) in config.windows.iter().enumerate() {
        if seen.contains(window) {
            continue;
        }
        let model = one_layer(&device, &config, &files, layer)?;
        let probe = Probe { context: 48, window: 16, seed: 1, precision: precision(&model) };
        if seen.is_empty() {
            failed += report("norm and head", &device.run(|| compare_head(&model, probe))?);
        }
        let kind = window.map_or("full attention".into(), |w| format!("sliding window {w}"));
        failed += report(&format!("layer {layer} ({kind})"), &device.run(|| compare_layer(&model, 0, probe))?);
        seen.push(*window);
    }
    if failed > 0 {
        bail!("{failed} results differ from the reference by more than {TOLERANCE:.0e}: do not train with this build");
    }
    println!("ok       kernels agree with candle's autograd within {TOLERANCE:.0e}");
    Ok(())
}

/// A model of layer `layer` alone, with a slice of embedding and head.
fn one_layer(device: &Arc<Cpu>, config: &Config, files: &ModelFiles, layer: usize) -> Result<Model<Cpu>> {
    let mut small = config.clone();
    (small.decoder.layers, small.windows) = (1, vec![config.windows[layer]]);
    small.decoder.vocab = config.decoder.vocab.min(VOCABULARY);
    let weight = |t: weight_map::HfTensor| {
        let name = t.name.replace("model.layers.0.", &format!("model.layers.{layer}."));
        files.weight(&name, crate::weights::matrix_shape(&t.shape).0, false)
    };
    let weights = small.decoder.tensors().into_iter().map(weight).collect::<Result<Vec<_>>>()?;
    Ok(Model::new(device.clone(), small, weights, 64))
}

fn precision(model: &Model<Cpu>) -> Precision {
    let parameters: usize = model.shapes().iter().map(|(m, n)| m * n).sum();
    if parameters <= WIDE_MAX { Precision::F64 } else { Precision::F32 }
}

fn report(what: &str, differences: &[Difference]) -> usize {
    let worst = differences.iter().max_by(|a, b| a.relative.total_cmp(&b.relative));
    let failed = differences.iter().filter(|d| d.relative.is_nan() || d.relative > TOLERANCE).count();
    let verdict = if failed == 0 { "ok      " } else { "DIFFERS " };
    if let Some(worst) = worst {
        println!("{verdict} {what}: {} results, worst {:.1e} ({})", differences.len(), worst.relative, worst.what);
    }
    failed
}
