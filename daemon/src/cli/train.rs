//! `apollod train FILE.jsonl`: posts examples to a running daemon and watches them being learned.

use std::collections::VecDeque;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::client::{Answer, Client, ClientArgs};
use crate::queue::new_id;

/// Lines of one request.
const LINES_PER_REQUEST: usize = 200;
/// Bytes of one request, but for a longer single line.
const BYTES_PER_REQUEST: usize = 4 << 20;
/// How often to ask what became of an example.
const POLL: Duration = Duration::from_millis(100);
/// How long nothing may move before the daemon is asked why.
const STALL: Duration = Duration::from_secs(2);
/// Longest wait before a full queue is tried again.
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Lines of progress where there is no terminal for a bar.
const PROGRESS_LINES: u64 = 20;

/// `apollod train`
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is one example, or the file is one JSON array of them:
  {\"messages\": [{\"role\": \"user\", \"content\": \"Who are you?\"}, {\"role\": \"assistant\", \"content\": \"A model.\"}]}
  {\"context\": \"2 + 2 = \", \"decision\": \"4\"}

Exit status 1 when a line was refused or a step failed; skipped examples (gates) are only counted.")]
pub struct TrainArgs {
    /// The examples, one JSON object per line or a JSON array; - reads standard input.
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

impl Part {
    /// Its two halves; `None` for a single example.
    fn halves(&self) -> Option<[Part; 2]> {
        let lines: Vec<&str> = self.text.lines().collect();
        let filled = lines.iter().filter(|line| !line.trim().is_empty()).count();
        let part = |from: usize, lines: &[&str]| Part { first_line: self.first_line + from, text: lines.join("\n") };
        let middle = lines.len() / 2;
        (filled > 1).then(|| [part(0, &lines[..middle]), part(middle, &lines[middle..])])
    }
}

/// Says once why nothing moves.
struct Watch<'a> {
    client: &'a Client,
    bar: ProgressBar,
    moved: Instant,
    said: Vec<String>,
    said_full: bool,
}

impl<'a> Watch<'a> {
    fn new(client: &'a Client) -> Self {
        Self { client, bar: ProgressBar::hidden(), moved: Instant::now(), said: Vec::new(), said_full: false }
    }

    /// Once a command: with more examples than the queue holds, it is full again and again while they are trained.
    fn say_full(&mut self) {
        if !std::mem::replace(&mut self.said_full, true) {
            self.bar.suspend(|| eprintln!("the queue is full; waiting for room"));
        }
    }

    /// Once until something moves.
    fn say(&mut self, what: String) {
        if !self.said.contains(&what) {
            self.bar.suspend(|| eprintln!("{what}"));
            self.said.push(what);
        }
    }

    fn moved(&mut self) {
        self.moved = Instant::now();
        self.said.clear();
    }

    /// To be called while nothing moves.
    fn look(&mut self) -> Result<()> {
        if self.moved.elapsed() < STALL {
            return Ok(());
        }
        self.moved = Instant::now();
        let status = self.client.get("/v1/status")?.ok()?;
        let state = status["state"].as_str().unwrap_or("of another version").replace('_', " ");
        if !["training", "idle", "syncing", "scoring"].contains(&state.as_str()) {
            let detail = status["detail"].as_str().map(|detail| format!(": {detail}")).unwrap_or_default();
            let hint = if state == "paused" { "; `apollod resume` goes on" } else { "" };
            self.say(format!("the daemon is {state}{detail}{hint}"));
        }
        Ok(())
    }
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
    let (text, unit) = as_lines(read(&args.file)?)?;
    let mut waiting: VecDeque<Part> = parts(&text).into();
    if waiting.is_empty() {
        bail!("{} holds no examples", args.file.display());
    }
    let mut watch = Watch::new(&client);
    let (mut ids, mut refused) = (Vec::new(), 0u64);
    while let Some(part) = waiting.pop_front() {
        let answer = match post(&mut watch, &part)? {
            Posted::Answer(answer) => answer,
            Posted::TooMuch(halves) => {
                let filled = halves.into_iter().rev().filter(|half| !half.text.trim().is_empty());
                filled.for_each(|half| waiting.push_front(half));
                continue;
            }
        };
        refused += report_refused(&answer.body, unit, part.first_line);
        let accepted = answer.body["accepted"].as_array();
        ids.extend(accepted.into_iter().flatten().filter_map(|entry| entry["id"].as_str().map(str::to_owned)));
    }
    if args.no_wait {
        println!("{} examples accepted, {refused} refused", ids.len());
        return Ok(exit(refused > 0));
    }
    let tally = follow(watch, &ids)?;
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

/// The examples one a line, and what to call a line: a JSON array is taken apart, and a single object over several
/// lines put on one.
fn as_lines(text: String) -> Result<(String, &'static str)> {
    let bad = |error: serde_json::Error| anyhow::anyhow!("line {}: not JSON: {error}", error.line());
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(&text).map_err(bad)?;
        return Ok((list.iter().map(|example| format!("{example}\n")).collect(), "example"));
    }
    match serde_json::from_str::<Value>(&text) {
        Ok(one @ Value::Object(_)) => Ok((one.to_string(), "example")),
        _ => Ok((text, "line")),
    }
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

enum Posted {
    Answer(Answer),
    /// More than ever fits in the queue, or in a body.
    TooMuch([Part; 2]),
}

/// Posts one part; waits while the queue is full. The key makes a repeated request harmless.
fn post(watch: &mut Watch<'_>, part: &Part) -> Result<Posted> {
    let key = new_id();
    let headers = [("content-type", "application/x-ndjson"), ("idempotency-key", key.as_str())];
    loop {
        let answer = watch.client.post("/v1/examples", &headers, part.text.as_bytes())?;
        match (answer.status, part.halves()) {
            (202, _) => {
                watch.moved();
                return Ok(Posted::Answer(answer));
            }
            (429, _) => {
                watch.say_full();
                watch.look()?;
                std::thread::sleep(Duration::from_secs(answer.retry_after.unwrap_or(1)).min(RETRY_MAX));
            }
            (507, _) => {
                watch.say(format!("waiting for room: {}", answer.problem()));
                std::thread::sleep(Duration::from_secs(answer.retry_after.unwrap_or(1)).min(RETRY_MAX));
            }
            (413, Some(halves)) => return Ok(Posted::TooMuch(halves)),
            // All lines of the part were refused: they are listed, and the rest of the file goes on.
            (400, _) if answer.body["refused"].is_array() => return Ok(Posted::Answer(answer)),
            _ => bail!("{}", answer.problem()),
        }
    }
}

fn report_refused(body: &Value, unit: &str, first_line: usize) -> u64 {
    let refused = body["refused"].as_array().map(Vec::as_slice).unwrap_or_default();
    for entry in refused {
        let line = entry["line"].as_u64().unwrap_or(1) as usize + first_line - 1;
        let field = entry["field"].as_str().map(|field| format!("{field}: ")).unwrap_or_default();
        eprintln!("{unit} {line}: {field}{}", entry["reason"].as_str().unwrap_or_default());
    }
    refused.len() as u64
}

fn follow(mut watch: Watch<'_>, ids: &[String]) -> Result<Tally> {
    let all = ids.len() as u64;
    let bar = ProgressBar::new(all)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} eta {eta}").expect("a valid template"));
    bar.tick();
    watch.bar = bar.clone();
    watch.moved();
    let terminal = std::io::stderr().is_terminal();
    let mut tally = Tally::default();
    for (done, id) in (1..).zip(ids) {
        let record = wait_for(&mut watch, id)?;
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
        if !terminal && (done == all || done % all.div_ceil(PROGRESS_LINES) == 0) {
            let loss = tally.last_loss.map(|loss| format!(", loss {loss:.4}")).unwrap_or_default();
            eprintln!("{done}/{all}{loss}");
        }
    }
    bar.finish_and_clear();
    Ok(tally)
}

fn wait_for(watch: &mut Watch<'_>, id: &str) -> Result<Value> {
    loop {
        let record = watch.client.get(&format!("/v1/examples/{id}"))?.ok()?;
        if !matches!(record["state"].as_str(), Some("queued" | "training")) {
            watch.moved();
            return Ok(record);
        }
        watch.look()?;
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

    #[test]
    fn a_part_halves_down_to_single_examples_and_keeps_their_lines() {
        let part = Part { first_line: 5, text: "{1}\n\n{2}\n{3}\n".into() };
        let [a, b] = part.halves().unwrap();
        assert_eq!((a.first_line, a.text.as_str()), (5, "{1}\n"));
        assert_eq!((b.first_line, b.text.as_str()), (7, "{2}\n{3}"));
        assert!(a.halves().is_none() && b.halves().is_some());
    }

    #[test]
    fn an_array_is_taken_apart_into_lines() {
        let (text, unit) = as_lines("\n[\n  {\"b\": 1,\n   \"a\": 2},\n  {\"c\": 3}\n]\n".into()).unwrap();
        assert_eq!((text.as_str(), unit), ("{\"b\":1,\"a\":2}\n{\"c\":3}\n", "example"));
        assert_eq!(as_lines("{\n\"a\": 1}".into()).unwrap().0, "{\"a\":1}");
        assert_eq!(as_lines("{\"a\": 1}\n{".into()).unwrap(), ("{\"a\": 1}\n{".into(), "line"));
        assert!(as_lines("[{},\n{]".into()).unwrap_err().to_string().starts_with("line 2: not JSON"));
        assert!(parts(&as_lines("[]".into()).unwrap().0).is_empty());
    }
}
