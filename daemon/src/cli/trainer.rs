//! `apollod trainer`: the child of `apollod serve`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::ConfigArgs;

/// `apollod trainer`
#[derive(Debug, Args)]
pub struct TrainerArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The highest weight version that was ever told.
    #[arg(long, default_value_t = 0)]
    weight_version: u64,
}

/// Trains until stdin ends.
pub fn run(args: &TrainerArgs) -> Result<ExitCode> {
    crate::trainer::run(&args.config.load()?, args.weight_version)?;
    Ok(ExitCode::SUCCESS)
}
