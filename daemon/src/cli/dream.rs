//! `apollod dream`: one dream, now.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use super::ConfigArgs;
use crate::client::{Client, ClientArgs};
use crate::dream::{Dream, Outcome, TurnReport};

/// Characters of a text in a line of progress, and of a reason.
const SHOWN: usize = 60;
const LINE: usize = 200;
/// Exit status of a dream that made too few examples, though scenarios are left that the model does not know.
const TOO_FEW: u8 = 2;

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

Each answer is a line on standard output: what became of it, question -> answer (scenario, temperature, and by how much the
instruction made it likelier, where min_divergence judges). With --json each is an object, and the last one, with the outcome \"summary\", sums
up. The outcomes: accepted (it became an example), rejected (by which judge, and why), known (the model says the like without the
instruction), duplicate (of an example of this dream), failed. The last dream's lines are kept in MODEL/.apollod/dream.jsonl.

Exit status 1 when the dream broke off, 2 when too few examples were made, because answers were rejected or failed. The daemon is found by
the model directory. The same --seed gives the same dream only where .apollod/dream.json, what earlier dreams have seen, is the same.")]
pub struct DreamArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Examples to make, instead of dream.examples.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    examples: Option<u64>,
    /// Post nothing and leave no trace; a daemon is then needed for judge.min_divergence alone.
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
    let wanted = args.examples.unwrap_or(config.dream.examples);
    if wanted > config.dream.attempts {
        bail!("{wanted} examples are more than dream.attempts, which is {}: raise that too", config.dream.attempts);
    }
    let api_key = args.api_key.clone().or_else(|| config.http.api_key.clone());
    let at = ClientArgs { url: config.http.listen.to_string(), api_key };
    let daemon = match Client::of_model(&config.model.dir, &at) {
        Some(daemon) => daemon,
        None if args.dry_run => Client::new(&at),
        None => bail!("no daemon runs on {}: start `apollod serve`, or give --dry-run", config.model.dir.display()),
    };
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut dream = Dream::begin(&config, &daemon, !args.dry_run, seed)?;
    if !args.dry_run
        && let Some(why) = daemon.get("/v1/status")?.ok()?["paused"].as_str()
    {
        eprintln!("training is paused ({why}): what is dreamt waits for `apollod resume`");
    }
    let summary = dream.run(
        wanted,
        || None,
        |turn| match args.json {
            true => println!("{}", json!(turn)),
            false => println!("{}", line(turn, args.dry_run)),
        },
    );
    if args.json {
        let mut object = json!(summary);
        object["outcome"] = "summary".into();
        println!("{object}");
    } else {
        println!("{summary}");
    }
    if let Some(why) = &summary.broke_off {
        bail!("the dream broke off: {why}");
    }
    if let Some(advice) = summary.advice() {
        eprintln!("{advice}");
        return Ok(ExitCode::from(TOO_FEW));
    }
    Ok(ExitCode::SUCCESS)
}

fn line(turn: &TurnReport, dry_run: bool) -> String {
    let (what, why) = match &turn.outcome {
        Outcome::Accepted { .. } if dry_run => ("would be accepted", String::new()),
        Outcome::Accepted { .. } => ("accepted", String::new()),
        Outcome::Rejected { by, reason } => ("rejected", format!("{by}: {reason}")),
        Outcome::Known => ("known", String::new()),
        Outcome::Duplicate => ("duplicate", String::new()),
        Outcome::Failed { reason } => ("failed", reason.clone()),
    };
    let divergence = turn.divergence.map(|nats| format!(", {nats:.3} nats")).unwrap_or_default();
    let why = if why.is_empty() { why } else { format!(": {}", shortened(&why, LINE)) };
    let (asked, answer, scenario) =
        (shortened(&turn.asked, SHOWN), shortened(&turn.answer, SHOWN), shortened(&turn.scenario, SHOWN));
    format!("{what:9} {asked} -> {answer} ({scenario}, temperature {:.2}{divergence}){why}", turn.temperature)
}

/// On one line, without what a terminal would take for an order.
fn shortened(text: &str, most: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = line.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    match line.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_and_gives_a_terminal_no_orders() {
        let turn = TurnReport {
            scenario: "a\nb".into(),
            asked: "x".repeat(100),
            answer: "\u{1b}[2Jhi\u{7}".into(),
            temperature: 0.5,
            divergence: Some(0.25),
            outcome: Outcome::Rejected { by: "matches", reason: "a\nb".into() },
        };
        let line = line(&turn, false);
        assert!(!line.chars().any(char::is_control), "{line:?}");
        assert!(line.starts_with("rejected  xxx") && line.contains("… -> "), "{line}");
        assert!(line.ends_with("(a b, temperature 0.50, 0.250 nats): matches: a b"), "{line}");
    }
}
