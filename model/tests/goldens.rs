//! Loss and every gradient against transformers, on the models under `goldens/` (see `make.py`).

mod common;

use anyhow::Result;
use common::{Machine, cases, examples, gradients, gradients_in, load, relative, values};
use compute::{Cpu, Cuda, Dtype};
use model::{Config, Example, Extent, Model};
use safetensors::SafeTensors;
use std::sync::Arc;

/// Both sides compute in f32 with other orders of summation: observed differences are below 1e-5.
const TOLERANCE: f64 = 1e-4;

/// Whether rounding is magnified somewhere: a Gated DeltaNet normalises its output over each head, however small it is.
fn magnifies<D: Machine>(model: &Model<D>) -> bool {
    model.config().decoder.delta_net.is_some()
}

/// Whether rounding may choose other experts, which is another model: what is compared with what was rounded has none.
fn chooses<D: Machine>(model: &Model<D>) -> bool {
    model.config().decoder.experts.is_some()
}

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
            // As a GPU holds them.
            let context = reference.cache_in(Dtype::F32, reference.positions());
            let (want_report, want) = gradients_in(&cpu, &reference, example, Extent::Frozen, context);
            let (report, got) = gradients(&cuda, &model, example, Extent::Frozen);
            let error = relative(&[report.loss()], &[want_report.loss()]);
            assert!(error < TOLERANCE, "{report:?} instead of {want_report:?}");
            for ((tensor, got), want) in model.tensors().iter().zip(&got).zip(&want) {
                let error = relative(got, want);
                println!("{} example {i}, {}: {error:.1e}", dir.display(), tensor.name);
                // Activations have 16 bits there, 256 times coarser than f32: 2e-3 was seen, of a sum that nearly cancels.
                assert!(
                    error < if magnifies(&model) { 5e-3 } else { TOLERANCE },
                    "{} example {i}, {} is off by {error:.1e}",
                    dir.display(),
                    tensor.name
                );
            }
        }
    }
    Ok(())
}

/// Keys and values of a context in bf16, as a CPU holds them where the weights have 16 bits, beside f32. Where the processor has
/// dot products of bf16, the context's inputs are rounded with them.
#[test]
fn keys_and_values_in_bf16_cost_a_few_hundredths_of_a_gradient_at_most() -> Result<()> {
    let cpu = <Cpu as Machine>::open();
    let mut worst = 0f64;
    for dir in cases() {
        let model = load(&cpu, &dir, Dtype::BF16)?;
        if chooses(&model) {
            continue;
        }
        let long: Vec<u32> = (0..200).map(|i| (i * 31 + 7) % 90).collect();
        let mut examples = examples(&dir)?;
        examples.push(Example::new(long, vec![180..200])?);
        for (i, example) in examples.iter().enumerate() {
            let in_dtype = |dtype| {
                let cache = model.cache_in(dtype, model.positions());
                let (report, gradients) = gradients_in(&cpu, &model, example, Extent::Frozen, cache);
                (report.loss(), gradients.concat())
            };
            let ((loss, got), (want_loss, want)) = (in_dtype(Dtype::BF16), in_dtype(Dtype::F32));
            let (of_loss, of_gradient) = (relative(&[loss], &[want_loss]), relative(&got, &want));
            println!("{} example {i}: loss {of_loss:.1e}, gradient {of_gradient:.1e}", dir.display());
            // A rounding is 2^-9 = 2e-3 of a value at most. These random models attend sharply, so that a score moves by more
            // than a trained one's does: 2.6e-2 was seen here, 2e-3 with the demo's model; 9e-2 where a norm magnifies it and the
            // context's inputs are rounded too.
            let most = if magnifies(&model) { 0.2 } else { 5e-2 };
            assert!(of_loss < 5e-3 && of_gradient < most, "{} example {i}: {of_loss}, {of_gradient}", dir.display());
            worst = worst.max(of_gradient);
        }
        let (_, chosen) = gradients(&cpu, &model, &examples[0], Extent::Frozen);
        let narrow = model.cache_in(Dtype::BF16, model.positions());
        assert!(chosen == gradients_in(&cpu, &model, &examples[0], Extent::Frozen, narrow).1, "bf16 is what it takes");
    }
    assert!(worst > 1e-6, "the test compared f32 with f32");
    Ok(())
}

/// Windows that round activations and gradients to bf16, as they do where the processor has dot products of it, beside those that
/// do not; with keys and values in f32, so that nothing else differs, and in bf16, as they are then.
#[test]
fn windows_in_bf16_cost_a_few_hundredths_of_a_gradient_at_most() -> Result<()> {
    let exact = Arc::new(Cpu::new(2)?.without_pairs());
    let pairs = Arc::new(Cpu::new(2)?.with_portable_pairs());
    let mut worst = [0f64; 2];
    for dir in cases() {
        let reference = load(&exact, &dir, Dtype::BF16)?;
        let model = load(&pairs, &dir, Dtype::BF16)?.rounding_windows(true);
        if chooses(&model) {
            continue;
        }
        for (i, example) in examples(&dir)?.iter().enumerate() {
            let context = reference.cache_in(Dtype::F32, reference.positions());
            let (want_report, want) = gradients_in(&exact, &reference, example, Extent::Frozen, context);
            for (keys, worst) in [Dtype::F32, Dtype::BF16].into_iter().zip(&mut worst) {
                let (report, got) =
                    gradients_in(&pairs, &model, example, Extent::Frozen, model.cache_in(keys, model.positions()));
                let of_loss = relative(&[report.loss()], &[want_report.loss()]);
                let of_gradient = relative(&got.concat(), &want.concat());
                println!(
                    "{} example {i}, keys in {keys}: loss {of_loss:.1e}, gradient {of_gradient:.1e}",
                    dir.display()
                );
                // As above, and PyTorch's own bf16 is off by up to 0.18 here (research/LOG.md).
                let most = if magnifies(&model) { 0.2 } else { 6e-2 };
                assert!(of_loss < 1e-2 && of_gradient < most, "{} {i} {keys}: {of_loss}, {of_gradient}", dir.display());
                *worst = worst.max(of_gradient);
            }
        }
    }
    println!("worst gradient: {:.1e} with keys and values in f32, {:.1e} in bf16", worst[0], worst[1]);
    assert!(worst[0] > 1e-4, "nothing was rounded");
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
