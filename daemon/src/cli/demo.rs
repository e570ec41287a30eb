//! `apollod demo`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

/// `apollod demo`
#[derive(Debug, Args)]
#[command(after_help = "\
Takes a few seconds. Exits with 0 only if the served answer changed as taught, unrelated answers did not, and the model directory's files
equal the live weights byte for byte.

Examples:
  apollod demo
  apollod demo --keep ./demo && apollod checkpoint list ./demo/model")]
pub struct DemoArgs {
    /// Leave the model directory with its generations in DIR/model.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Runs the demo.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    crate::demo::run(args.keep.as_deref())?;
    Ok(ExitCode::SUCCESS)
}
