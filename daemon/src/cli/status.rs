//! `apollod status`: what a running daemon is doing.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::client::{Client, ClientArgs};
use crate::supervisor::Status;

/// `apollod status`
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  apollod status --json | jq .queue")]
pub struct StatusArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Print the JSON of GET /v1/status.
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub fn run(args: &StatusArgs) -> Result<ExitCode> {
    let client = Client::new(&args.client);
    let body = client.get("/v1/status")?.ok()?;
    if !(body["version"].is_string() && body["state"].is_string()) {
        bail!("what answers at {} is not apollod", client.url());
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&body)?);
    } else {
        let status: Status = serde_json::from_value(body).context("the daemon is of another version: use --json")?;
        println!("{status}");
    }
    Ok(ExitCode::SUCCESS)
}
