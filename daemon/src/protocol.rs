//! What the supervisor and its trainer child say to each other: one JSON object per line, requests on the child's
//! stdin, answers on its stdout. (Its logs go to stderr, which it inherits.)
//!
//! The rules, which `supervisor` enforces and the trainer follows:
//!
//! 1. The child speaks first: [`FromTrainer::Ready`] once it has attached and recovered, or
//!    [`FromTrainer::ServerGone`] when there is no server to attach to, or [`FromTrainer::Failed`] with request
//!    [`Request::Start`] for anything else that stops it. After the last two it exits.
//! 2. Requests come one at a time: the supervisor sends the next one only after the answer to the one before. The one
//!    exception: with `train.workers` above 1 a [`ToTrainer::Train`] may follow others that have no answer yet.
//! 3. Every request gets exactly one answer, in the order of the requests:
//!
//!    | request | answer |
//!    |---|---|
//!    | [`ToTrainer::Train`] | `Trained` (a gated or non-finite step too: `skipped` says why) or `Failed` |
//!    | [`ToTrainer::Sync`] | `Synced`, `Harmed` (by the guard: nothing was written, and the live weights are as the last sync left them, if possible) or `Failed` |
//!    | [`ToTrainer::Rollback`] | `RolledBack` or `Failed`; none, but `Dying`, where only the files are rolled back |
//!    | [`ToTrainer::Repair`] | `Repaired`, also when not everything could be, or `Failed` |
//!    | [`ToTrainer::Score`] | `Scored` or `Failed` |
//!    | [`ToTrainer::Shutdown`] with `sync` | `Synced`, `Harmed` or `Failed`, then the child exits with status 0 |
//!    | [`ToTrainer::Shutdown`] without `sync` | none: the child exits with status 0 |
//!
//! 4. `ServerGone` may come at any time. It takes the place of all answers that were due, nothing follows it, and the
//!    child exits: nothing is written to the weights of a server that is gone.
//! 5. `Failed` to a `Train` means that no weight was changed by it.
//! 6. `Alive` comes every second from a thread of its own, before `Ready` and during requests too; it answers
//!    nothing. A trainer that has sent one and then says nothing for long is stopped or hangs, and is killed.
//! 7. [`FromTrainer::Invalidated`] comes whenever the server was told that weights have moved; it answers nothing.
//!    [`FromTrainer::Published`] comes when a generation got a directory of its own (`sync.mode = "generation"`), or did
//!    not: before the answer to a sync or a rollback, and once after `Ready`. It answers nothing either.
//!    [`FromTrainer::Probed`] comes after the answer to a rollback, and answers nothing.
//! 8. [`FromTrainer::Dying`] is the last word of a child that cannot go on, such as after an error of its GPU: it answers
//!    nothing, and the child exits.
//! 9. End of file on stdin is an order to stop at once, without a sync: the supervisor is gone.
//!
//! Why sequence numbers: an example gets a durable `seq` (1, 2, 3, ...) before it is sent. A generation's cursor is
//! the highest `seq` whose effect its files hold. After a restart the child reports that cursor and the supervisor
//! sends everything after it again, in the same order, in the same batches and with the same step numbers, so that
//! with one worker the weights come out the same to the bit.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// One example as the trainer sees it: tokens and which of them are learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Its place in the order of training; unique, increasing, durable.
    pub seq: u64,
    /// The id that the client was given.
    pub id: String,
    /// All tokens, context and decisions.
    pub ids: Vec<u32>,
    /// The decision spans within `ids`, ascending and disjoint; each starts at 1 or later.
    pub spans: Vec<Range<usize>>,
    /// Multiplies lr at batch 1 and the example's share of the loss otherwise. Positive.
    pub weight: f32,
}

/// Tokens whose log-probabilities are asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scoring {
    /// All tokens.
    pub ids: Vec<u32>,
    /// The spans that are scored, as in [`Work::spans`].
    pub spans: Vec<Range<usize>>,
}

/// A request to the trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum ToTrainer {
    /// Train one step on these examples together.
    Train {
        /// The step's number: 1 for the first ever, used twice only in a replay of the same batch, or when the weights have gone
        /// back to before it in order to forget something.
        step: u64,
        /// Replaces `train.lr` for this step.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lr: Option<f32>,
        /// At least one; ascending in `seq`.
        examples: Vec<Work>,
    },
    /// Write the live weights, the optimizer's state and the cursor to the model directory as a generation.
    Sync {
        /// Why now, for the log and the generation: `schedule`, `request`, ...
        reason: String,
    },
    /// Set the files and the live weights back to an earlier generation.
    Rollback {
        /// The generation to return to.
        to: u64,
    },
    /// Put damaged blocks of the files right, from the live weights and from these directories.
    Repair {
        /// Copies of the model directory.
        from: Vec<PathBuf>,
    },
    /// Compute log-probabilities on the live weights; nothing is changed.
    Score {
        /// At least one.
        examples: Vec<Scoring>,
    },
    /// Stop, with or without a last sync.
    Shutdown {
        /// Whether to sync first.
        sync: bool,
    },
}

impl ToTrainer {
    /// Which request this is, without what it carries.
    pub fn kind(&self) -> Request {
        match self {
            Self::Train { .. } => Request::Train,
            Self::Sync { .. } => Request::Sync,
            Self::Rollback { .. } => Request::Rollback,
            Self::Repair { .. } => Request::Repair,
            Self::Score { .. } => Request::Score,
            Self::Shutdown { .. } => Request::Shutdown,
        }
    }
}

/// The kinds of request, for [`FromTrainer::Failed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Not a request: the child's own start.
    Start,
    /// [`ToTrainer::Train`].
    Train,
    /// [`ToTrainer::Sync`].
    Sync,
    /// [`ToTrainer::Rollback`].
    Rollback,
    /// [`ToTrainer::Repair`].
    Repair,
    /// [`ToTrainer::Score`].
    Score,
    /// [`ToTrainer::Shutdown`].
    Shutdown,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Train => "train",
            Self::Sync => "sync",
            Self::Rollback => "rollback",
            Self::Repair => "repair",
            Self::Score => "score",
            Self::Shutdown => "shutdown",
        })
    }
}

/// What one example of a step came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExampleResult {
    /// Which example.
    pub seq: u64,
    /// Mean cross entropy over its decision tokens, in nats, before the update. `None` when it was not finite
    /// (JSON has no NaN).
    pub loss: Option<f32>,
    /// Its decision tokens.
    pub tokens: u64,
}

/// The answer to [`ToTrainer::Train`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// The step's number, as sent.
    pub step: u64,
    /// One per example sent, in the same order.
    pub examples: Vec<ExampleResult>,
    /// The step's loss: mean over all its decision tokens, in nats. `None` when it was not finite.
    pub loss: Option<f32>,
    /// How many updates the live weights have had, this one included when there was one.
    pub weight_version: u64,
    /// The server's process id; `None` when no process maps a staged copy.
    #[serde(default)]
    pub server_pid: Option<u32>,
    /// Why the weights were left alone (a gate, a non-finite gradient); `None` when the step was applied.
    pub skipped: Option<String>,
    /// Time to run the contexts, in ms.
    pub prefill_ms: f64,
    /// Time of the windows' forward passes, in ms.
    pub forward_ms: f64,
    /// Time of the backward passes, in ms.
    pub backward_ms: f64,
    /// Time of the optimizer and the writes, in ms.
    pub update_ms: f64,
    /// How long the engine was held for the writes; `None` when it was not.
    #[serde(default)]
    pub hold: Option<Hold>,
    /// Updates of the weights between the step's first look at them and its own update.
    #[serde(default)]
    pub staleness: u64,
}

/// A hold of the server's engine.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    /// From the grant to the release, in ms.
    pub ms: f64,
    /// Whether it ended by itself, as its time had passed, perhaps before the last write.
    pub overran: bool,
}

/// What was done about the server's prefix cache; exactly one of `done` and `failed` is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Invalidated {
    /// Updates that the live weights had had by then.
    pub weight_version: u64,
    /// `reset` or `salt`.
    pub done: Option<String>,
    /// Why it was not done. It is tried again after `server.prefix_cache_interval`.
    pub failed: Option<String>,
}

/// What came of a generation's own directory; exactly one of `directory` and `failed` is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Published {
    /// The generation that the files hold.
    pub generation: u64,
    /// Its directory, which `current` beside it names.
    pub directory: Option<String>,
    /// Bytes that were copied: 0 where the file system could clone the files.
    pub bytes_copied: u64,
    /// How long it took.
    pub seconds: f64,
    /// Why there is none. `current` names what it named before; it is tried again after the next sync.
    pub failed: Option<String>,
}

/// The answer to [`ToTrainer::Sync`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Synced {
    /// The generation that the files now hold.
    pub generation: u64,
    /// The highest `seq` whose effect they hold.
    pub cursor: u64,
    /// Blocks of 4 KiB compared.
    pub blocks_total: u64,
    /// Blocks that differed and were written.
    pub blocks_changed: u64,
    /// Bytes written into the safetensors files.
    pub bytes_written: u64,
    /// Bytes of the journal.
    pub bytes_journal: u64,
    /// How long it took.
    pub seconds: f64,
    /// Whether nothing had changed since that generation, so that no new one was made.
    #[serde(default)]
    pub unchanged: bool,
    /// Why the generation got no directory of its own, where it was to get one.
    #[serde(default)]
    pub directory_failed: Option<String>,
    /// How the probes do, where there are any.
    #[serde(default)]
    pub probed: Option<Box<Probed>>,
}

/// How the guard's probes do. Losses are in nats a decision token; `None` is one that is not finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probed {
    /// How many there are.
    pub probes: u64,
    /// Their mean loss.
    pub loss: Option<f64>,
    /// What it was when the guard first saw them.
    pub reference: Option<f64>,
    /// The mean of what each rose by, without the one that rose most where they are four or more.
    pub rise: Option<f64>,
    /// How far it may rise.
    pub limit: f64,
    /// The probe that rose most.
    pub worst: Option<WorstProbe>,
    /// What should be looked at although nothing that was trained is to blame.
    #[serde(default)]
    pub warning: Option<String>,
}

/// One probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorstProbe {
    /// Its line in the file of the probes.
    pub line: u64,
    /// Its loss.
    pub loss: Option<f64>,
    /// What that was when the guard first saw it.
    pub reference: f64,
}

/// The answer to [`ToTrainer::Sync`] where the guard found the live weights harmed: nothing was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Harmed {
    /// What is wrong, in words.
    pub reason: String,
    /// What the probes said.
    pub probed: Probed,
    /// The highest `seq` whose effect they held.
    pub applied: u64,
    /// Where live weights and optimizer are again, or why they could not be taken back.
    pub restored: Result<RolledBack, String>,
}

/// The answer to [`ToTrainer::Rollback`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolledBack {
    /// The generation that the files now hold: the one that was asked for if they held it before, else a new one.
    pub generation: u64,
    /// The one that was asked for.
    #[serde(default)]
    pub to: u64,
    /// Its cursor.
    pub cursor: u64,
    /// Its optimizer steps.
    #[serde(default)]
    pub step: u64,
    /// How many times the live weights have moved, this time included.
    #[serde(default)]
    pub weight_version: u64,
    /// Generations that went from the history for it.
    #[serde(default)]
    pub no_longer: Vec<u64>,
}

impl fmt::Display for Synced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { generation, blocks_changed, blocks_total, .. } = self;
        match self.unchanged {
            true => write!(f, "nothing changed since generation {generation}"),
            false => write!(f, "generation {generation}, {blocks_changed} of {blocks_total} blocks"),
        }
    }
}

/// The answer to [`ToTrainer::Repair`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Repaired {
    /// The generation that the files are, where nothing is damaged any more.
    pub generation: u64,
    /// What was put right, in words: the file, the tensor, and where the content was.
    pub repaired: Vec<String>,
    /// What is damaged still.
    pub damage: Vec<String>,
}

/// The answer to [`ToTrainer::Score`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// Updates that the live weights had had.
    pub weight_version: u64,
    /// For each sequence that was sent, the natural log-probability of each token of its spans, given all tokens before it.
    /// `None` is one that is not finite.
    pub logprobs: Vec<Vec<Option<f32>>>,
}

/// The child's first word: attached, recovered, able to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// The server's epoch: random per load of the weights.
    pub epoch: String,
    /// The server's process id; `None` when weights are a staged copy without a process.
    pub server_pid: Option<u32>,
    /// The generation that the files hold.
    pub generation: u64,
    /// The highest `seq` whose effect live weights and optimizer state hold.
    pub cursor: u64,
    /// The last step of that generation.
    pub step: u64,
    /// How many updates the live weights have had.
    #[serde(default)]
    pub weight_version: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Of these, the ones that train.
    pub trainable: u64,
    /// What was restored at the start, in words; empty when there was nothing to do.
    pub recovery: String,
    /// The server's program and version, where it says so.
    #[serde(default)]
    pub server: Option<String>,
    /// What the comparison of log-probabilities with the server found at the first contact; `None` when it was not
    /// possible.
    #[serde(default)]
    pub shadow_check: Option<String>,
    /// What an operator should look at although training goes on.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What it takes of the machine.
    #[serde(default)]
    pub budget: Option<Budget>,
    /// How the probes do, where there are any.
    #[serde(default)]
    pub probed: Option<Box<Probed>>,
}

/// What the trainer takes of the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// Steps that are computed side by side.
    pub workers: usize,
    /// Threads of each of them on a CPU.
    pub threads: usize,
    /// Niceness of its process.
    pub nice: i32,
    /// Share of the time in which steps run.
    pub duty_cycle: f64,
}

/// What the trainer says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum FromTrainer {
    /// Attached and able to train.
    Ready(Ready),
    /// A step was done.
    Trained(Trained),
    /// The files are a new generation.
    Synced(Synced),
    /// What was trained since the last sync harmed the model.
    Harmed(Box<Harmed>),
    /// Files and live weights are back at an earlier generation.
    RolledBack(RolledBack),
    /// What was damaged in the files is right again, as far as possible.
    Repaired(Repaired),
    /// Log-probabilities.
    Scored(Scored),
    /// How the guard's probes do after a rollback.
    Probed(Box<Probed>),
    /// The server was told that weights have moved.
    Invalidated(Invalidated),
    /// The generation has a directory of its own, or could not get one.
    Published(Published),
    /// A sign of life.
    Alive,
    /// The end of a trainer that cannot go on.
    Dying {
        /// What went wrong.
        reason: String,
    },
    /// The inference server is not there, or no longer.
    ServerGone {
        /// What was seen.
        reason: String,
    },
    /// A request could not be done; nothing was changed by it.
    Failed {
        /// Which.
        request: Request,
        /// Why, and what to do about it.
        reason: String,
        /// Whether it is worth trying again.
        #[serde(default)]
        cause: Cause,
    },
}

/// What kept a request from being done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// Nothing that passes by itself.
    #[default]
    Other,
    /// The file system is full.
    NoRoom,
    /// Another program is loading the model.
    Readers,
}

/// A line that is not a message of this protocol.
#[derive(Debug, thiserror::Error)]
#[error("not a message of the trainer's protocol ({source}): {line}")]
pub struct ProtocolError {
    line: String,
    #[source]
    source: serde_json::Error,
}

/// Writes a message as one line, newline included, and flushes it.
///
/// # Errors
/// What the writer says; a broken pipe means that the other side is gone.
pub fn send<T: Serialize>(to: &mut impl std::io::Write, message: &T) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message).expect("protocol messages have string keys and no foreign types");
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Reads one message from a line.
///
/// # Errors
/// [`ProtocolError`] with the line's beginning.
pub fn parse<T: serde::de::DeserializeOwned>(line: &str) -> Result<T, ProtocolError> {
    serde_json::from_str(line)
        .map_err(|source| ProtocolError { line: line.trim_end().chars().take(200).collect(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_and_reads_back_equal() {
        let train = ToTrainer::Train {
            step: 7,
            lr: Some(1e-5),
            examples: vec![Work {
                seq: 9,
                id: "a\nb".into(),
                ids: vec![1, 2, 3],
                spans: vec![1..2, 2..3],
                weight: 0.5,
            }],
        };
        let mut bytes = Vec::new();
        send(&mut bytes, &train).unwrap();
        let line = String::from_utf8(bytes).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(line.ends_with('\n'));
        assert_eq!(parse::<ToTrainer>(&line).unwrap(), train);
    }

    #[test]
    fn the_wire_form_is_the_documented_one() {
        let line = r#"{"answer":"trained","step":1,"examples":[{"seq":1,"loss":2.5,"tokens":3}],"loss":2.5,
            "weight_version":1,"skipped":null,"prefill_ms":1,"forward_ms":2,"backward_ms":3,"update_ms":4}"#;
        let FromTrainer::Trained(trained) = parse(line).unwrap() else { panic!("not read as trained") };
        assert_eq!((trained.step, trained.examples[0].tokens), (1, 3));
        let sync = serde_json::to_string(&ToTrainer::Sync { reason: "schedule".into() }).unwrap();
        assert_eq!(sync, r#"{"request":"sync","reason":"schedule"}"#);
    }

    #[test]
    fn a_line_that_is_no_message_is_quoted_in_the_error() {
        let error = parse::<FromTrainer>("Traceback (most recent call last)\n").unwrap_err();
        assert!(error.to_string().contains("Traceback"), "{error}");
    }
}
