//! `apollod blame` and `apollod forget`: where a generation comes from, and being rid of it.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::client::{Client, ClientArgs};

/// Examples that are scored in one request.
const SCORED: usize = 64;

/// `apollod blame`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  apollod blame --generation 12                       id, source, loss before its step, loss now, of each example
  apollod blame --generation 12 --json | jq -r '.[] | select(.source == \"dream\") | .id' | xargs apollod forget")]
pub struct BlameArgs {
    /// The generation; `apollod checkpoint list` shows them.
    #[arg(long, value_name = "N")]
    generation: u64,
    /// Print a JSON list.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    client: ClientArgs,
}

/// `apollod forget`
#[derive(Debug, Args)]
#[command(after_help = "\
Files and live weights go back to the last generation before the first of the examples; what was trained after it is trained again
without them, in the same order and by the configuration of now. With train.workers = 1 and train.batch_examples = 1 the weights are then, to the
byte, those of a daemon that never saw the examples. Until that is done the server answers as of that generation. How far back it goes,
sync.keep, keep_bytes and keep_days say.

Examples:
  apollod forget 0193a1b2c3d4e5f60718293a4b
  apollod forget --source dream")]
pub struct ForgetArgs {
    /// Ids of examples, as posting them or `apollod blame` says.
    #[arg(required_unless_present = "source", conflicts_with = "source")]
    examples: Vec<String>,
    /// All examples of a source.
    #[arg(long)]
    source: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Lists what made a generation.
pub fn blame(args: &BlameArgs) -> Result<ExitCode> {
    let client = Client::new(&args.client);
    let body = client.get(&format!("/v1/checkpoints/{}/examples", args.generation))?.ok()?;
    let mut examples = body["examples"].as_array().cloned().unwrap_or_default();
    for part in examples.chunks_mut(SCORED) {
        // One that is forgotten or has become too long leaves the others their score.
        if score(&client, part).is_err() {
            part.chunks_mut(1).for_each(|one| drop(score(&client, one)));
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&examples)?);
        return Ok(ExitCode::SUCCESS);
    }
    if examples.is_empty() {
        match body["rollback_of"].as_u64() {
            Some(to) => println!("generation {} has the content of generation {to}", args.generation),
            None => println!("no example is on record that generation {} was the first to hold", args.generation),
        }
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:26} {:>6} {:7} {:>8} {:>8}  source, tags", "example", "step", "state", "before", "now");
    for example in &examples {
        let nats = |name: &str| example[name].as_f64().map_or_else(|| "-".into(), |nats| format!("{nats:.4}"));
        let word = |name: &str| example[name].as_str().unwrap_or("-").to_owned();
        let tags: Vec<&str> = example["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let step = example["step"].as_u64().unwrap_or_default();
        let (before, now) = (nats("loss"), nats("loss_now"));
        println!(
            "{:26} {step:>6} {:7} {before:>8} {now:>8}  {} {}",
            word("id"),
            word("state"),
            word("source"),
            tags.join(",")
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds to each what its loss is on the live weights.
fn score(client: &Client, examples: &mut [Value]) -> Result<()> {
    let ids: Vec<Value> = examples.iter().map(|example| json!({ "id": example["id"] })).collect();
    let body = Value::from(ids).to_string();
    let scored = client.post("/v1/score", &[("content-type", "application/json")], body.as_bytes())?.ok()?;
    for (index, example) in examples.iter_mut().enumerate() {
        example["loss_now"] = scored["scores"][index]["loss"].clone();
    }
    Ok(())
}

/// Forgets.
pub fn forget(args: &ForgetArgs) -> Result<ExitCode> {
    let client = Client::new(&args.client);
    let wanted = match &args.source {
        Some(source) => json!({ "source": source }),
        None => json!({ "examples": args.examples }),
    };
    let headers = [("content-type", "application/json")];
    let done = client.post("/v1/forget", &headers, wanted.to_string().as_bytes())?.ok()?;
    let forgotten = done["forgotten"].as_u64().unwrap_or_default();
    if forgotten == 0 {
        bail!("there is nothing to forget: no example of that source is on record, or it is forgotten already");
    }
    let no_longer: Vec<u64> = serde_json::from_value(done["no_longer"].clone()).unwrap_or_default();
    match (done["base"].as_u64(), done["generation"].as_u64()) {
        (Some(base), Some(generation)) => println!(
            "{forgotten} forgotten: generation {generation} has the content of {base}; {} later examples are trained again",
            done["again"]
        ),
        _ => println!("{forgotten} forgotten; the weights held nothing of it"),
    }
    super::checkpoints::say_no_longer(&no_longer);
    Ok(ExitCode::SUCCESS)
}
