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
}

/// Trains until stdin ends.
pub fn run(args: &TrainerArgs) -> Result<ExitCode> {
    crate::trainer::run(&args.config.load()?)?;
    Ok(ExitCode::SUCCESS)
}
