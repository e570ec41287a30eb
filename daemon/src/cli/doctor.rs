//! `apollod doctor`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::backend::DeviceChoice;
use crate::reading::reading;

/// `apollod doctor`
#[derive(Debug, Args)]
#[command(after_help = "\
One layer of each kind, and norm and head over a slice of the vocabulary, run on random inputs through the kernels and
through candle's autograd. Nothing is written; one layer is in memory at a time.

Examples:
  apollod doctor --model ./model
  apollod doctor --model ./model --device cuda")]
pub struct DoctorArgs {
    /// Model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// cpu, cuda, cuda:1, or a GPU's UUID.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Compute threads of the CPU; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs the checks.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    super::need_model(&args.model)?;
    reading(&args.model, || crate::doctor::run(&args.device, args.threads, &args.model))?;
    Ok(ExitCode::SUCCESS)
}
