//! `apollod grads`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::backend::DeviceChoice;
use crate::grads::Grads;

/// `apollod grads`
#[derive(Debug, Args)]
#[command(after_help = "\
Prints {\"examples\": [{\"loss\": ..., \"tokens\": ...}, ...]} and writes the f32 gradient of example i's mean loss
as {i}.{tensor name}. The context is frozen: only decision tokens have gradients.

Examples:
  apollod grads --model ./model --examples examples.jsonl --out gradients.safetensors --dtype f32")]
pub struct GradsArgs {
    /// Model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Examples as POST /v1/examples takes them, one JSON object a line.
    #[arg(long, value_name = "FILE.jsonl")]
    examples: PathBuf,
    /// Where the gradients go; a file that must not exist.
    #[arg(long, value_name = "OUT.safetensors")]
    out: PathBuf,
    /// Compute with the weights as they are in the files, or widened to f32.
    #[arg(long, value_enum, default_value = "native")]
    dtype: Precision,
    /// cpu, cuda, cuda:1, or a GPU's UUID.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Compute threads of the CPU; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    /// As in the files.
    Native,
    /// f32.
    F32,
}

/// Computes and writes.
pub fn run(args: &GradsArgs) -> Result<ExitCode> {
    super::need_model(&args.model)?;
    let widen = args.dtype == Precision::F32;
    let grads = Grads { model: &args.model, examples: &args.examples, out: &args.out, widen };
    crate::grads::run(&args.device, args.threads, grads)?;
    Ok(ExitCode::SUCCESS)
}
