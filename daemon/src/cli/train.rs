//! `apollod train FILE.jsonl`: posts examples to a running daemon and watches them being learned.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::client::{Answer, Client, ClientArgs};
use crate::queue::new_id;

/// Lines of one request.
const LINES_PER_REQUEST: usize = 200;
/// Bytes of one request, but for a longer single line.
const BYTES_PER_REQUEST: usize = 4 << 20;
/// How often to ask what became of an example.
const POLL: Duration = Duration::from_millis(100);

/// `apollod train`
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is one example:
  {\"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}, {\"role\": \"assistant\", \"content\": \"A model.\"}]}
  {\"context\": \"2 + 2 = \", \"decision\": \"4\"}

Exit status 1 when a line was refused or a step failed; skipped examples (gates) are only counted.")]
pub struct TrainArgs {
    /// The examples, one JSON object per line; - reads standard input.
    file: PathBuf,
    /// Post and leave.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    client: ClientArgs,
}

/// Lines of the file that go in one request.
struct Part {
    /// Number of its first line in the file, from 1.
    first_line: usize,
    text: String,
}

/// What became of the examples.
#[derive(Default)]
struct Tally {
    trained: u64,
    skipped: u64,
    failed: u64,
    first_loss: Option<f64>,
    last_loss: Option<f64>,
}

/// Posts, watches, sums up.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    let client = Client::new(&args.client);
    let text = read(&args.file)?;
    let run = new_id();
    let (mut ids, mut refused) = (Vec::new(), 0u64);
    for (number, part) in parts(&text).into_iter().enumerate() {
        let answer = post(&client, &part, &format!("{run}-{number}"))?;
        refused += report_refused(&answer.body, part.first_line);
        let accepted = answer.body["accepted"].as_array();
        ids.extend(accepted.into_iter().flatten().filter_map(|entry| entry["id"].as_str().map(str::to_owned)));
    }
    if args.no_wait {
        println!("{} examples accepted, {refused} refused", ids.len());
        return Ok(exit(refused > 0));
    }
    let tally = watch(&client, &ids)?;
    let loss = |loss: Option<f64>| loss.map_or_else(|| "none".into(), |loss| format!("{loss:.4}"));
    println!(
        "{} trained, {} skipped, {} failed, {refused} refused; loss {} -> {}",
        tally.trained,
        tally.skipped,
        tally.failed,
        loss(tally.first_loss),
        loss(tally.last_loss)
    );
    Ok(exit(refused + tally.failed > 0))
}

fn exit(bad: bool) -> ExitCode {
    if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn read(file: &Path) -> Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

fn parts(text: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let full = parts.last().is_none_or(|part| {
            number + 1 - part.first_line >= LINES_PER_REQUEST || part.text.len() + line.len() > BYTES_PER_REQUEST
        });
        if full {
            parts.push(Part { first_line: number + 1, text: String::new() });
        }
        let Some(part) = parts.last_mut() else { continue };
        part.text.push_str(line);
        part.text.push('\n');
    }
    parts.retain(|part| !part.text.trim().is_empty());
    parts
}

/// Posts one part; waits while the queue is full. The key makes a repeated request harmless.
fn post(client: &Client, part: &Part, key: &str) -> Result<Answer> {
    let headers = [("content-type", "application/x-ndjson"), ("idempotency-key", key)];
    loop {
        let answer = client.post("/v1/examples", &headers, part.text.as_bytes())?;
        match answer.status {
            202 => return Ok(answer),
            429 => {
                eprintln!("the queue is full; waiting {} s", answer.retry_after.unwrap_or(1));
                std::thread::sleep(Duration::from_secs(answer.retry_after.unwrap_or(1)));
            }
            // All lines of the part were refused: they are listed, and the rest of the file goes on.
            400 if answer.body["refused"].is_array() => return Ok(answer),
            _ => bail!("{}", answer.problem()),
        }
    }
}

fn report_refused(body: &Value, first_line: usize) -> u64 {
    let refused = body["refused"].as_array().map(Vec::as_slice).unwrap_or_default();
    for entry in refused {
        let line = entry["line"].as_u64().unwrap_or(1) as usize + first_line - 1;
        let field = entry["field"].as_str().map(|field| format!("{field}: ")).unwrap_or_default();
        eprintln!("line {line}: {field}{}", entry["reason"].as_str().unwrap_or_default());
    }
    refused.len() as u64
}

fn watch(client: &Client, ids: &[String]) -> Result<Tally> {
    let bar = ProgressBar::new(ids.len() as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} eta {eta}").expect("a valid template"));
    let mut tally = Tally::default();
    for id in ids {
        let record = wait_for(client, id)?;
        match record["state"].as_str() {
            Some("trained") => tally.trained += 1,
            Some("skipped") => tally.skipped += 1,
            Some(state) => {
                tally.failed += 1;
                bar.suspend(|| eprintln!("{id} {state}: {}", record["reason"].as_str().unwrap_or_default()));
            }
            None => bail!("the daemon no longer knows example {id}"),
        }
        if let Some(loss) = record["loss"].as_f64() {
            tally.first_loss.get_or_insert(loss);
            tally.last_loss = Some(loss);
            bar.set_message(format!("loss {loss:.4}"));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(tally)
}

fn wait_for(client: &Client, id: &str) -> Result<Value> {
    loop {
        let record = client.get(&format!("/v1/examples/{id}"))?.ok()?;
        if !matches!(record["state"].as_str(), Some("queued" | "training")) {
            return Ok(record);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_remember_where_they_begin_and_leave_blank_ones_out() {
        let text = format!("{}\n\n{}", "{}\n".repeat(LINES_PER_REQUEST), "\n".repeat(LINES_PER_REQUEST));
        let parts = parts(&text);
        assert_eq!(parts.iter().map(|part| part.first_line).collect::<Vec<_>>(), [1]);
        let text = "{}\n".repeat(2 * LINES_PER_REQUEST + 1);
        let firsts: Vec<usize> = super::parts(&text).iter().map(|part| part.first_line).collect();
        assert_eq!(firsts, [1, LINES_PER_REQUEST + 1, 2 * LINES_PER_REQUEST + 1]);
    }
}
