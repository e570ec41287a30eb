//! `apollod pause` and `apollod resume`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::client::{Client, ClientArgs};

/// `apollod pause`, `apollod resume`
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  apollod pause && apollod checkpoint export ./model /backup/model && apollod resume")]
pub struct PauseArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// Tells the daemon.
pub fn run(args: &PauseArgs, pause: bool) -> Result<ExitCode> {
    let path = if pause { "/v1/pause" } else { "/v1/resume" };
    Client::new(&args.client).post(path, &[], b"")?.ok()?;
    let done = if pause { "paused: what is posted waits until `apollod resume`" } else { "training goes on" };
    println!("{done}");
    Ok(ExitCode::SUCCESS)
}
