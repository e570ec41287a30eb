//! Loss and every gradient against transformers, on the models under `goldens/` (see `make.py`).

mod common;

use anyhow::Result;
use common::{cases, examples, gradients, load, relative, values};
use compute::Cpu;
use model::{Config, Extent};
use safetensors::SafeTensors;
use std::sync::Arc;

/// Both sides compute in f32 with other orders of summation: observed differences are below 1e-5.
const TOLERANCE: f64 = 1e-4;

#[test]
fn loss_and_gradients_agree_with_transformers() -> Result<()> {
    let device = Arc::new(Cpu::new(2)?);
    for dir in cases() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = load(&device, &dir, Config::read(&dir)?)?;
        let bytes = std::fs::read(dir.join("expected.safetensors"))?;
        let expected = SafeTensors::deserialize(&bytes)?;
        let mut worst = (0.0, String::new());
        for (i, example) in examples(&dir)?.iter().enumerate() {
            model.check(example)?;
            let (report, gradients) = gradients(&device, &model, example, Extent::Frozen);
            let loss = values(&expected, &format!("{i}.loss"))?;
            let error = relative(&[report.loss()], &loss);
            assert!(error < TOLERANCE, "{name} example {i}: loss {} instead of {}", report.loss(), loss[0]);
            for (tensor, gradient) in model.tensors().iter().zip(&gradients) {
                let error = relative(gradient, &values(&expected, &format!("{i}.{}", tensor.name))?);
                if error > worst.0 {
                    worst = (error, format!("example {i}, {}", tensor.name));
                }
            }
        }
        println!("{name}: worst relative error {:.1e} ({})", worst.0, worst.1);
        assert!(worst.0 < TOLERANCE, "{name}: {} is off by {:.1e}", worst.1, worst.0);
    }
    Ok(())
}

/// Older checkpoints say the same in other keys.
#[test]
fn configs_of_transformers_4_mean_the_same() -> Result<()> {
    for dir in cases() {
        let legacy = std::fs::read_to_string(dir.join("config.legacy.json"))?;
        assert_eq!(Config::parse(&legacy)?, Config::read(&dir)?, "{}", dir.display());
    }
    Ok(())
}
