//! Dreams: examples from scenarios, without anybody posting them.
//!
//! The served model answers a scenario with a guiding instruction in its context. Judges accept or reject the answer. An
//! accepted one becomes a context-frozen example for the same conversation *without* the instruction, so that the model learns to
//! do untold what it could do when told (context distillation: Askell et al. 2021, arXiv 2112.00861; Snell et al. 2022, arXiv
//! 2209.15189). Nothing here touches weights: the model is asked by its OpenAI API, and examples go to the daemon over HTTP like
//! anybody else's, with `source` `dream` or `replay`.

mod chat;
mod judge;
mod ledger;
mod near;
mod post;
mod replay;
mod report;
mod scenario;
mod scheduled;
#[cfg(test)]
mod tests;

use std::fs::{File, TryLockError};
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::{Config, DreamConfig};
use crate::queue::new_id;
use chat::{Answer, Chat};
use judge::{Case, Rejection};
use ledger::Ledger;
use near::Shingles;
use post::PostError;
use replay::Replay;
use scenario::{Scenario, Task, told};

pub use judge::Judges;
pub use report::{Outcome, Summary, TurnReport};
pub use scheduled::start;

/// Turns that may fail in a row before a dream ends. A scenario that fails has no other turn in it.
const FAILURES_MAX: u32 = 3;
/// Held by the one dream of a model directory that posts.
const LOCK: &str = "dream.lock";
/// The turns of the last dream that posted, a line of JSON each.
pub const TURNS: &str = "dream.jsonl";

/// Another dream is under way.
#[derive(Debug, thiserror::Error)]
#[error("another dream on this model is under way: {0} is held")]
pub struct Busy(String);

/// Refuses what no dream can be made of.
///
/// # Errors
/// What is wrong in the configuration, or in the files that it names.
pub fn check(config: &Config) -> Result<()> {
    read(config, &mut fastrand::Rng::with_seed(0)).map(drop)
}

/// Where the model is, and what the configuration names.
fn read<'a>(config: &'a Config, random: &mut fastrand::Rng) -> Result<(&'a str, Vec<Scenario>, Replay)> {
    let Some(url) = config.server.url.as_deref() else {
        bail!("server.url: not set: dreams ask the served model over its OpenAI API, such as http://127.0.0.1:8000");
    };
    if let Some(command) = &config.dream.judge.command {
        judge::find(command)?;
    }
    Ok((url, scenario::read(&config.dream)?, Replay::read(config, random)?))
}

/// A dream that can begin. There is one at a time on a model directory, but for those that post nothing.
pub struct Dream<'a> {
    config: &'a DreamConfig,
    scenarios: Vec<Scenario>,
    ledger: Ledger,
    chat: Chat,
    daemon: &'a Client,
    /// Held, and turns written down, where examples are posted.
    posts: Option<(File, File)>,
    random: fastrand::Rng,
    id: String,
    posted: u64,
    replay: Replay,
    made: Vec<Shingles>,
}

impl<'a> Dream<'a> {
    /// Reads the scenarios and finds the served model. With `post` examples go to the daemon, and what was seen is kept for later
    /// dreams.
    ///
    /// # Errors
    /// What [`check`] says; [`Busy`]; the model or the daemon does not answer.
    pub fn begin(config: &'a Config, daemon: &'a Client, post: bool, seed: u64) -> Result<Self> {
        let mut random = fastrand::Rng::with_seed(seed);
        let (url, scenarios, replay) = read(config, &mut random)?;
        let dream = &config.dream;
        if post || scenarios.iter().any(|scenario| scenario.judges.min_divergence.is_some()) {
            daemon.get("/v1/status")?.ok()?;
        }
        let posts = post.then(|| Ok::<_, anyhow::Error>((lock(config)?, turns(config)?))).transpose()?;
        Ok(Self {
            ledger: Ledger::open(&config.state_dir(), dream, &scenarios, post)?,
            chat: Chat::new(url, dream.model.as_deref(), dream.max_tokens)?,
            scenarios,
            daemon,
            posts,
            replay,
            random,
            id: new_id(),
            posted: 0,
            made: Vec::new(),
            config: dream,
        })
    }

    /// Dreams until there are enough examples or it was tried often enough, or somebody says why not to go on; tells of each turn.
    pub fn run(
        &mut self,
        wanted: u64,
        mut stop: impl FnMut() -> Option<String>,
        mut tell: impl FnMut(&TurnReport),
    ) -> Summary {
        let (clock, mut failures) = (Instant::now(), 0);
        let mut summary = Summary { id: self.id.clone(), wanted, ..Summary::default() };
        while summary.accepted < wanted && summary.turns < self.config.attempts && summary.broke_off.is_none() {
            if let Some(why) = stop() {
                summary.broke_off = Some(why);
                break;
            }
            // Where all were rejected without chance, more turns would bring the same.
            let Some(index) = self.ledger.choose(&self.scenarios, &mut self.random) else { break };
            let (report, broke_off) = self.turn(index);
            summary.count(&report);
            self.write_down(&report);
            tell(&report);
            failures = if matches!(report.outcome, Outcome::Failed { .. }) { failures + 1 } else { 0 };
            summary.broke_off = broke_off.map(|error| format!("{error:#}"));
            if failures == FAILURES_MAX && summary.broke_off.is_none() {
                let last = summary.last_reason.as_deref().unwrap_or_default();
                summary.broke_off = Some(format!("{FAILURES_MAX} answers in a row failed, the last because of {last}"));
            }
            if matches!(report.outcome, Outcome::Accepted { .. }) && summary.broke_off.is_none() {
                match self.mix_in() {
                    Ok(replayed) => summary.replayed += replayed,
                    Err(error) => summary.broke_off = Some(format!("{error:#}")),
                }
            }
        }
        (summary.temperature, summary.seconds) = (self.ledger.temperature(), clock.elapsed().as_secs_f64());
        summary
    }

    /// One scenario's turn, and why there cannot be another. What goes wrong with the model or a judge is part of the report.
    fn turn(&mut self, index: usize) -> (TurnReport, Option<anyhow::Error>) {
        let mut report = TurnReport {
            scenario: self.scenarios[index].id.clone(),
            asked: String::new(),
            answer: String::new(),
            temperature: self.ledger.temperature(),
            divergence: None,
            outcome: Outcome::Known,
        };
        let (outcome, broke_off) = match self.judged(index, &mut report) {
            Ok((messages, Outcome::Accepted { .. })) => self.posted(index, messages),
            Ok((_, outcome)) => (outcome, None),
            Err(error) => (Outcome::Failed { reason: format!("{error:#}") }, None),
        };
        report.outcome = outcome;
        let noted = self.ledger.note(index, &self.scenarios[index], &report.outcome);
        (report, broke_off.or(noted.err()))
    }

    /// Asks and judges: the example that it would make, and what the judges say.
    fn judged(&mut self, index: usize, report: &mut TurnReport) -> Result<(Vec<Value>, Outcome)> {
        let Self { scenarios, chat, random, config, .. } = self;
        let Scenario { task, instruction, judges, .. } = &scenarios[index];
        let rejected = |Rejection { by, reason }| Outcome::Rejected { by, reason };
        let mut messages = match task {
            Task::Answer(messages) => messages.clone(),
            Task::Note(note) => {
                let asked = [json!({"role": "user", "content": format!("{note}\n\n{}", config.question)})];
                let question = chat.ask(&asked, report.temperature, random.u32(..))?;
                report.asked.clone_from(&question.text);
                if !question.ended || question.text.is_empty() {
                    let reason = "no question that ends was made of the note".into();
                    return Ok((Vec::new(), Outcome::Rejected { by: "question", reason }));
                }
                vec![json!({"role": "user", "content": question.text})]
            }
        };
        report.asked = messages.last().and_then(|m| m["content"].as_str()).unwrap_or_default().into();
        let with = told(&messages, instruction);
        let answer = chat.ask(&with, report.temperature, random.u32(..))?;
        report.answer.clone_from(&answer.text);
        let judge = |answer: &Answer| {
            let case = Case { messages: &messages, instruction, answer: &answer.text };
            judges.judge(chat, &case, answer)
        };
        if let Err(rejection) = judge(&answer)? {
            return Ok((messages, rejected(rejection)));
        }
        if config.skip_known {
            let untold = chat.ask(&messages, 0.0, 0)?;
            let known = match judges.judge_text() {
                true => judge(&untold)?.is_ok(),
                false => Shingles::of(&untold.text).similarity(&Shingles::of(&answer.text)) > config.similarity_max,
            };
            if known {
                return Ok((messages, Outcome::Known));
            }
        }
        let assistant = json!({"role": "assistant", "content": answer.text});
        if let Some(least) = judges.min_divergence {
            let divergence = post::divergence(self.daemon, &with, &messages, &assistant)?;
            report.divergence = Some(divergence);
            if divergence < least {
                return Ok((messages, Outcome::Known));
            }
        }
        messages.push(assistant);
        Ok((messages, Outcome::Accepted { example: None }))
    }

    /// Drops what is too near to an example of this dream, and posts the rest.
    fn posted(&mut self, index: usize, messages: Vec<Value>) -> (Outcome, Option<anyhow::Error>) {
        let texts: Vec<&str> = messages.iter().rev().take(2).filter_map(|m| m["content"].as_str()).collect();
        let shingles = Shingles::of(&texts.join(" "));
        if self.made.iter().any(|made| made.similarity(&shingles) > self.config.similarity_max) {
            return (Outcome::Duplicate, None);
        }
        let tag = format!("scenario:{}", self.scenarios[index].id).chars().take(1000).collect::<String>();
        match self.post(json!({"messages": messages, "source": "dream", "tags": [tag]})) {
            Ok(example) => {
                self.made.push(shingles);
                (Outcome::Accepted { example }, None)
            }
            Err(PostError::Refused(reason)) => (Outcome::Failed { reason }, None),
            Err(PostError::Down(error)) => (Outcome::Failed { reason: format!("{error:#}") }, Some(error)),
        }
    }

    /// Posts an example with this dream's tag; its id, where examples are posted.
    fn post(&mut self, mut example: Value) -> Result<Option<String>, PostError> {
        if self.posts.is_none() {
            return Ok(None);
        }
        let dream = Value::from(format!("dream:{}", self.id));
        match &mut example["tags"] {
            Value::Array(tags) => tags.push(dream),
            none => *none = vec![dream].into(),
        }
        let key = format!("{}-{}", self.id, self.posted);
        self.posted += 1;
        post::example(self.daemon, &key, &example).map(Some)
    }

    /// Posts the general examples that are due after an accepted one; how many.
    fn mix_in(&mut self) -> Result<u64> {
        let due = self.replay.due(&mut self.random);
        let posted = due.len() as u64;
        for mut example in due {
            example["source"] = "replay".into();
            match self.post(example) {
                Ok(_) => {}
                Err(PostError::Refused(reason)) => bail!("dream.replay_examples: {reason}"),
                Err(PostError::Down(error)) => return Err(error),
            }
        }
        Ok(posted)
    }

    fn write_down(&mut self, report: &TurnReport) {
        if let Some((_, turns)) = &mut self.posts {
            // A record for people to look at; the examples are in the queue.
            let _ = writeln!(turns, "{}", json!(report));
        }
    }
}

fn lock(config: &Config) -> Result<File> {
    let folder = config.state_dir();
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join(LOCK);
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Busy(path.display().to_string()).into()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// An empty file for the turns, readable for its owner alone like the queue.
fn turns(config: &Config) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = config.state_dir().join(TURNS);
    let open = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
    open.with_context(|| format!("cannot write {}", path.display()))
}
