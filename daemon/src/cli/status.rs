//! `apollod status`: what a running daemon is doing.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::client::{Client, ClientArgs};
use crate::supervisor::Status;

/// `apollod status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Print the JSON of GET /v1/status.
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub fn run(args: &StatusArgs) -> Result<ExitCode> {
    let body = Client::new(&args.client).get("/v1/status")?.ok()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&body)?);
    } else {
        let status: Status = serde_json::from_value(body).context("the daemon is of another version: use --json")?;
        println!("{status}");
    }
    Ok(ExitCode::SUCCESS)
}
