//! `apollod dream`: one dream, now.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use super::ConfigArgs;
use crate::client::{Client, ClientArgs};
use crate::dream::{Dream, Outcome, TurnReport};

/// Characters of a text in a line of progress.
const SHOWN: usize = 60;

/// `apollod dream`
#[derive(Debug, Args)]
#[command(after_help = "\
The configuration is the running daemon's; its [dream] says what to dream about and what a good answer is:
  [dream]
  scenarios = \"scenarios.jsonl\"     # a line each: {\"prompt\": \"Where is my order?\"}; or a folder of notes
  instruction = \"Answer in at most two sentences, and offer to call back.\"
  judge = { max_chars = 300, matches = \"call you back\" }

Examples:
  apollod dream --config apollod.toml --dry-run --examples 3   # see what it would make, train nothing
  apollod dream --config apollod.toml                          # make dream.examples examples and post them
  apollod dream --config apollod.toml --json | jq -c 'select(.outcome == \"rejected\")'

Each answer is a line on standard output. With --json each is an object and the last one is the summary.")]
pub struct DreamArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Examples to make, instead of dream.examples.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    examples: Option<u64>,
    /// Post nothing; a daemon is then needed for judge.min_divergence alone.
    #[arg(long)]
    dry_run: bool,
    /// Seed of the choice of scenarios and of the answers; by default another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// JSON lines.
    #[arg(long)]
    json: bool,
    /// The API key of the daemon, where it asks for one and the configuration does not have it.
    #[arg(long, env = "APOLLOD_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

/// Dreams once.
pub fn run(args: &DreamArgs) -> Result<ExitCode> {
    let config = args.config.load()?;
    let api_key = args.api_key.clone().or_else(|| config.http.api_key.clone());
    let at = ClientArgs { url: config.http.listen.to_string(), api_key };
    let daemon = match Client::of_model(&config.model.dir, &at) {
        Some(daemon) => daemon,
        None if args.dry_run => Client::new(&at),
        None => {
            let model = config.model.dir.display();
            return Err(anyhow::anyhow!("no daemon runs on {model}: start `apollod serve`, or give --dry-run"));
        }
    };
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut dream = Dream::begin(&config, &daemon, !args.dry_run, seed)?;
    let summary = dream.run(args.examples.unwrap_or(config.dream.examples), |turn| match args.json {
        true => println!("{}", serde_json::json!(turn)),
        false => println!("{}", line(turn)),
    })?;
    if args.json {
        println!("{}", serde_json::to_string(&summary).context("plain values")?);
    } else {
        println!("{summary}");
    }
    Ok(ExitCode::SUCCESS)
}

fn line(turn: &TurnReport) -> String {
    let (what, why) = match &turn.outcome {
        Outcome::Accepted { .. } => ("accepted", String::new()),
        Outcome::Rejected { reason } => ("rejected", format!(": {reason}")),
        Outcome::Known => ("known", String::new()),
        Outcome::Duplicate => ("duplicate", String::new()),
        Outcome::Failed { reason } => ("failed", format!(": {reason}")),
    };
    let divergence = turn.divergence.map(|nats| format!(", {nats:.3} nats")).unwrap_or_default();
    let (asked, answer) = (shortened(&turn.asked), shortened(&turn.answer));
    format!("{what:9} {asked} -> {answer} ({}, {:.2}{divergence}){why}", turn.scenario, turn.temperature)
}

/// On one line.
fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}
