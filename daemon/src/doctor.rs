//! `apollod doctor`: proves the kernels on the operator's own weights.
//!
//! One layer of each kind, and norm and head where the vocabulary is small enough, run on random
//! inputs through the kernels and through candle's autograd in f64.

use crate::weights;
use anyhow::{Result, bail};
use compute::Cpu;
use model::oracle::{Difference, Probe, compare_head, compare_layer};
use model::{Config, Model};
use std::path::Path;
use std::sync::Arc;

/// The kernels sum in f32 over up to some ten thousand terms.
const TOLERANCE: f64 = 1e-4;
/// Beyond this many elements the head in f64 with its gradient is left out.
const HEAD_MAX: usize = 40_000_000;

/// Prints one line per check; fails if any is off.
pub fn run(model_dir: &Path, threads: usize) -> Result<()> {
    let config = Config::read(model_dir)?;
    let decoder = config.decoder.clone();
    println!("model    {:?}, {} layers, hidden {}", decoder.family, decoder.layers, decoder.hidden);
    let probe = Probe { context: 48, window: 16, seed: 1 };
    let device = Arc::new(Cpu::new(threads)?);
    let windows = config.windows.clone();
    let model = Model::new(device.clone(), config.clone(), weights::load(model_dir, &config, false)?, 64);
    let mut failed = 0;
    let mut seen: Vec<Option<usize>> = Vec::new();
    for (layer, window) in windows.iter().enumerate() {
        if seen.contains(window) {
            continue;
        }
        seen.push(*window);
        let kind = window.map_or("full attention".into(), |w| format!("sliding window {w}"));
        let differences = device.run(|| compare_layer(&model, layer, probe))?;
        failed += report(&format!("layer {layer} ({kind})"), &differences);
    }
    if decoder.vocab * decoder.hidden <= HEAD_MAX {
        failed += report("head", &device.run(|| compare_head(&model, probe))?);
    } else {
        println!("skipped  head: {} x {} does not fit the check's memory", decoder.vocab, decoder.hidden);
    }
    if failed > 0 {
        bail!("{failed} results differ from the reference by more than {TOLERANCE:.0e}: do not train with this build");
    }
    println!("ok       kernels agree with candle's autograd within {TOLERANCE:.0e}");
    Ok(())
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
