//! `apollod doctor`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

/// `apollod doctor`
#[derive(Debug, Args)]
#[command(after_help = "\
One layer of each kind, and norm and head over a slice of the vocabulary, run on random inputs through the kernels and
through candle's autograd. Nothing is written; one layer is in memory at a time.

Examples:
  apollod doctor --model ./model")]
pub struct DoctorArgs {
    /// Model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Compute threads; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Runs the checks.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    crate::doctor::run(&args.model, args.threads)?;
    Ok(ExitCode::SUCCESS)
}
