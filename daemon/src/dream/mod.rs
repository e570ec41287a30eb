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
mod scenario;
mod scheduled;
#[cfg(test)]
mod tests;

use std::fs::{File, TryLockError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::{Config, DreamConfig};
use crate::queue::new_id;
use chat::{Answer, Chat};
use judge::Case;
use ledger::{Ledger, Turn};
use near::Shingles;
use scenario::{Scenario, Task, told};

pub use judge::Judges;
pub use scheduled::start;

/// Turns that may fail in a row before a dream ends.
const FAILURES_MAX: u32 = 3;
/// Held by the one dream of a model directory.
const LOCK: &str = "dream.lock";

/// What became of one turn.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It became an example.
    Accepted {
        /// Its id.
        example: Option<String>,
    },
    /// The judges did not accept it.
    Rejected {
        /// Why.
        reason: String,
    },
    /// The model says the like without the instruction.
    Known,
    /// Too near to an example of this dream.
    Duplicate,
    /// It could not be asked or judged.
    Failed {
        /// Why.
        reason: String,
    },
}

/// One turn, for whoever watches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TurnReport {
    /// Which scenario.
    pub scenario: String,
    /// What was asked.
    pub asked: String,
    /// What the model said to it with the instruction.
    pub answer: String,
    /// At which temperature.
    pub temperature: f64,
    /// How much more likely the instruction made it, in nats a token, where that was asked.
    pub divergence: Option<f64>,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a dream.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Answers asked for, one a turn.
    pub turns: u64,
    /// Of these, the ones that became examples.
    pub accepted: u64,
    /// The ones that judges rejected.
    pub rejected: u64,
    /// The ones that the model gives untold.
    pub known: u64,
    /// The ones that were too near to others.
    pub duplicates: u64,
    /// The ones that could not be asked or judged.
    pub failed: u64,
    /// General examples that were posted among them.
    pub replayed: u64,
    /// The temperature that the next dream begins with.
    pub temperature: f64,
    /// How long it took.
    pub seconds: f64,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { turns, accepted, rejected, known, duplicates, failed, replayed, temperature, seconds } = self;
        write!(
            f,
            "{turns} answers in {seconds:.1} s: {accepted} accepted, {rejected} rejected, {known} known, {duplicates} duplicates, \
             {failed} failed; {replayed} replayed; temperature {temperature:.2}"
        )
    }
}

/// Refuses what no dream can be made of.
///
/// # Errors
/// What is wrong in the configuration, or in the files that it names.
pub fn check(config: &Config) -> Result<()> {
    if config.server.url.is_none() {
        bail!("server.url: not set: dreams ask the served model over its OpenAI API, such as http://127.0.0.1:8000");
    }
    scenario::read(&config.dream)?;
    general(&config.dream).map(drop)
}

/// A dream that can begin. There is one at a time on a model directory.
pub struct Dream<'a> {
    config: &'a DreamConfig,
    scenarios: Vec<Scenario>,
    ledger: Ledger,
    chat: Chat,
    /// Where examples go; `None` posts none.
    daemon: Option<&'a Client>,
    /// Where log-probabilities come from.
    scorer: &'a Client,
    random: fastrand::Rng,
    id: String,
    posted: u64,
    general: Vec<Value>,
    owed: f64,
    made: Vec<Shingles>,
    _lock: File,
}

impl<'a> Dream<'a> {
    /// Reads the scenarios and finds the served model. With `post` examples go to the daemon.
    ///
    /// # Errors
    /// What [`check`] says; another dream is under way; the model does not answer.
    pub fn begin(config: &'a Config, daemon: &'a Client, post: bool, seed: u64) -> Result<Self> {
        check(config)?;
        let url = config.server.url.as_deref().context("server.url was checked")?;
        let dream = &config.dream;
        let lock = lock(config)?;
        let scenarios = scenario::read(dream)?;
        Ok(Self {
            ledger: Ledger::open(&config.state_dir(), dream, scenarios.len())?,
            chat: Chat::new(url, dream.model.as_deref(), dream.max_tokens)?,
            scenarios,
            daemon: post.then_some(daemon),
            scorer: daemon,
            random: fastrand::Rng::with_seed(seed),
            id: new_id(),
            posted: 0,
            general: general(dream)?,
            owed: 0.0,
            made: Vec::new(),
            config: dream,
            _lock: lock,
        })
    }

    /// Dreams until there are enough examples or it was tried often enough; tells of each turn.
    ///
    /// # Errors
    /// Too many turns failed in a row; the daemon takes no examples.
    pub fn run(&mut self, examples: u64, mut tell: impl FnMut(&TurnReport)) -> Result<Summary> {
        let (clock, mut summary, mut failures) = (Instant::now(), Summary::default(), 0);
        while summary.accepted < examples && summary.turns < self.config.attempts {
            let report = self.turn()?;
            summary.turns += 1;
            *match &report.outcome {
                Outcome::Accepted { .. } => &mut summary.accepted,
                Outcome::Rejected { .. } => &mut summary.rejected,
                Outcome::Known => &mut summary.known,
                Outcome::Duplicate => &mut summary.duplicates,
                Outcome::Failed { .. } => &mut summary.failed,
            } += 1;
            tell(&report);
            if let Outcome::Accepted { .. } = &report.outcome {
                summary.replayed += self.replay()?;
            }
            match report.outcome {
                Outcome::Failed { reason } if failures + 1 == FAILURES_MAX => {
                    bail!("{FAILURES_MAX} answers in a row failed, the last because: {reason}")
                }
                Outcome::Failed { .. } => failures += 1,
                _ => failures = 0,
            }
        }
        (summary.temperature, summary.seconds) = (self.ledger.temperature(), clock.elapsed().as_secs_f64());
        Ok(summary)
    }

    /// One scenario's turn. What goes wrong with the model or a judge is part of the report.
    fn turn(&mut self) -> Result<TurnReport> {
        let index = self.ledger.choose(&self.scenarios, &mut self.random);
        let temperature = self.ledger.temperature();
        let mut report = TurnReport {
            scenario: self.scenarios[index].id.clone(),
            asked: String::new(),
            answer: String::new(),
            temperature,
            divergence: None,
            outcome: Outcome::Known,
        };
        report.outcome = match self.judged(index, &mut report) {
            Err(error) => Outcome::Failed { reason: format!("{error:#}") },
            Ok((messages, outcome)) => match self.remembered(index, &messages, outcome)? {
                Outcome::Accepted { .. } => Outcome::Accepted { example: self.post(index, messages)? },
                outcome => outcome,
            },
        };
        Ok(report)
    }

    /// Asks and judges: the example that it would make, and what the judges say.
    fn judged(&mut self, index: usize, report: &mut TurnReport) -> Result<(Vec<Value>, Outcome)> {
        let Self { scenarios, chat, random, config, .. } = self;
        let Scenario { task, instruction, judges, .. } = &scenarios[index];
        let mut messages = match task {
            Task::Answer(messages) => messages.clone(),
            Task::Note => {
                let asked = [json!({"role": "user", "content": format!("{instruction}\n\n{}", config.question)})];
                let question = chat.ask(&asked, report.temperature, random.u32(..))?;
                let question = json!({"role": "user", "content": question.text});
                vec![question]
            }
        };
        report.asked = messages.last().and_then(|m| m["content"].as_str()).unwrap_or_default().into();
        if report.asked.is_empty() {
            return Ok((messages, Outcome::Rejected { reason: "no question was made of the note".into() }));
        }
        let answer = chat.ask(&told(&messages, instruction), report.temperature, random.u32(..))?;
        report.answer.clone_from(&answer.text);
        let case = |answer: &'_ Answer| {
            judges.judge(chat, &Case { messages: &messages, instruction, answer: &answer.text }, answer)
        };
        if let Err(reason) = case(&answer)? {
            return Ok((messages, Outcome::Rejected { reason }));
        }
        if config.skip_known && judges.judge_text() && case(&chat.ask(&messages, 0.0, 0)?)?.is_ok() {
            return Ok((messages, Outcome::Known));
        }
        let assistant = json!({"role": "assistant", "content": answer.text});
        if let Some(least) = judges.min_divergence {
            let with = told(&messages, instruction);
            let divergence = divergence(self.scorer, &with, &messages, &assistant)?;
            report.divergence = Some(divergence);
            if divergence < least {
                return Ok((messages, Outcome::Known));
            }
        }
        messages.push(assistant);
        Ok((messages, Outcome::Accepted { example: None }))
    }

    /// Takes the judges' word into the ledger, and drops what is too near to an example of this dream.
    fn remembered(&mut self, index: usize, messages: &[Value], outcome: Outcome) -> Result<Outcome> {
        let turn = match outcome {
            Outcome::Accepted { .. } => Turn::Accepted,
            Outcome::Known => Turn::Known,
            _ => Turn::Rejected,
        };
        self.ledger.note(&self.scenarios[index], turn)?;
        if turn != Turn::Accepted {
            return Ok(outcome);
        }
        let texts: Vec<&str> = messages.iter().rev().take(2).filter_map(|m| m["content"].as_str()).collect();
        let shingles = Shingles::of(&texts.join(" "));
        if self.made.iter().any(|made| made.similarity(&shingles) > self.config.similarity_max) {
            return Ok(Outcome::Duplicate);
        }
        self.made.push(shingles);
        Ok(outcome)
    }

    /// Posts an example; its id, where examples are posted.
    fn post(&mut self, index: usize, messages: Vec<Value>) -> Result<Option<String>> {
        let tag = format!("scenario:{}", self.scenarios[index].id);
        self.post_example(
            &json!({"messages": messages, "source": "dream", "tags": [tag, format!("dream:{}", self.id)]}),
        )
    }

    fn post_example(&mut self, example: &Value) -> Result<Option<String>> {
        let Some(daemon) = self.daemon else { return Ok(None) };
        let key = format!("{}-{}", self.id, self.posted);
        self.posted += 1;
        let headers = [("content-type", "application/json"), ("idempotency-key", key.as_str())];
        let answer = daemon.post("/v1/examples", &headers, example.to_string().as_bytes())?.ok()?;
        Ok(answer["accepted"][0]["id"].as_str().map(str::to_owned))
    }

    /// Posts the general examples that are due after an accepted one; how many.
    fn replay(&mut self) -> Result<u64> {
        if self.general.is_empty() {
            return Ok(0);
        }
        self.owed += self.config.replay / (1.0 - self.config.replay);
        let mut posted = 0;
        while self.owed >= 1.0 {
            let mut example = self.general[self.random.usize(..self.general.len())].clone();
            example["source"] = "replay".into();
            self.post_example(&example)?;
            self.owed -= 1.0;
            posted += 1;
        }
        Ok(posted)
    }
}

/// By how much `with` makes the answer more likely than `without`, in nats a token.
fn divergence(scorer: &Client, with: &[Value], without: &[Value], answer: &Value) -> Result<f64> {
    let example = |messages: &[Value]| {
        let messages: Vec<&Value> = messages.iter().chain([answer]).collect();
        json!({ "messages": messages })
    };
    let body = Value::from(vec![example(with), example(without)]).to_string();
    let scored = scorer.post("/v1/score", &[("content-type", "application/json")], body.as_bytes())?.ok()?;
    let loss = |index: usize| scored["scores"][index]["loss"].as_f64().context("a log-probability is not finite");
    Ok(loss(1)? - loss(0)?)
}

/// The general examples.
fn general(config: &DreamConfig) -> Result<Vec<Value>> {
    let Some(path) = config.replay_examples.as_ref().filter(|_| config.replay > 0.0) else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("dream.replay_examples: cannot read {}", path.display()))?;
    let mut examples = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        match serde_json::from_str(line) {
            Ok(example @ Value::Object(_)) => examples.push(example),
            Ok(_) => bail!("{}, line {number}: no JSON object", path.display()),
            Err(error) => bail!("{}, line {number}: not JSON: {error}", path.display()),
        }
    }
    if examples.is_empty() {
        bail!("dream.replay_examples: {} holds no examples", path.display());
    }
    Ok(examples)
}

fn lock(config: &Config) -> Result<File> {
    let folder = config.state_dir();
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join(LOCK);
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another dream on this model is under way: {} is held", path.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
