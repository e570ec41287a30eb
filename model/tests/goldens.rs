//! Loss and every gradient against transformers, on the models under `goldens/` (see `make.py`).

mod common;

use anyhow::Result;
use common::{Machine, cases, examples, gradients, load, relative, values};
use compute::{Cpu, Cuda, Dtype};
use model::{Config, Example, Extent};
use safetensors::SafeTensors;

/// Both sides compute in f32 with other orders of summation: observed differences are below 1e-5.
const TOLERANCE: f64 = 1e-4;

on_every_device!(loss_and_gradients_agree_with_transformers);

fn loss_and_gradients_agree_with_transformers<D: Machine>() -> Result<()> {
    let device = D::open();
    for dir in cases() {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = load(&device, &dir, Dtype::F32)?;
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

/// Of bf16 weights: a GPU's products take activations as sums of two bf16, which is nearly f32. Beside the small examples
/// one with so many rows that they go through cuBLASLt.
#[test]
fn gradients_of_bf16_weights_agree_between_cpu_and_cuda() -> Result<()> {
    let (cpu, cuda) = (<Cpu as Machine>::open(), <Cuda as Machine>::open());
    for dir in cases() {
        let (reference, model) = (load(&cpu, &dir, Dtype::BF16)?, load(&cuda, &dir, Dtype::BF16)?);
        let long: Vec<u32> = (0..200).map(|i| (i * 31 + 7) % 90).collect();
        let mut examples = examples(&dir)?;
        examples.push(Example::new(long, vec![180..200])?);
        for (i, example) in examples.iter().enumerate() {
            let (want_report, want) = gradients(&cpu, &reference, example, Extent::Frozen);
            let (report, got) = gradients(&cuda, &model, example, Extent::Frozen);
            let error = relative(&[report.loss()], &[want_report.loss()]);
            assert!(error < TOLERANCE, "{report:?} instead of {want_report:?}");
            for ((tensor, got), want) in model.tensors().iter().zip(&got).zip(&want) {
                let error = relative(got, want);
                println!("{} example {i}, {}: {error:.1e}", dir.display(), tensor.name);
                assert!(error < TOLERANCE, "{} example {i}, {} is off by {error:.1e}", dir.display(), tensor.name);
            }
        }
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
