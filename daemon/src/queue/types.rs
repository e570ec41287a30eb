//! What goes into the queue and what comes out.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::Serialize;

use crate::protocol::Work;

/// Where an example is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Waits.
    Queued,
    /// Handed to the trainer, no answer yet.
    Training,
    /// Applied to the live weights; in the files once the cursor has passed its seq.
    Trained,
    /// The trainer left the weights alone, with a reason.
    Skipped,
    /// Became impossible while it waited.
    Refused,
    /// The trainer could not do it.
    Failed,
    /// Its effect was taken back by a rollback.
    RolledBack,
    /// It is one of those that harmed the model, and their effect was taken back by the guard.
    Quarantined,
    /// Somebody wanted it forgotten: its effect was taken back, and its tokens are gone.
    Forgotten,
}

impl State {
    /// All states, in the order of an example's life.
    pub const ALL: [Self; 9] = [
        Self::Queued,
        Self::Training,
        Self::Trained,
        Self::Skipped,
        Self::Refused,
        Self::Failed,
        Self::RolledBack,
        Self::Quarantined,
        Self::Forgotten,
    ];

    /// Its name, as the file and the API write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Training => "training",
            Self::Trained => "trained",
            Self::Skipped => "skipped",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::RolledBack => "rolled_back",
            Self::Quarantined => "quarantined",
            Self::Forgotten => "forgotten",
        }
    }

    /// Whether nothing more will happen to it (but for a replay).
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Queued | Self::Training)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for State {
    type Err = ();
    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|state| state.name() == name).ok_or(())
    }
}

/// An example to be added.
#[derive(Debug, Clone, PartialEq)]
pub struct NewExample {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Decision spans within `ids`.
    pub spans: Vec<Range<usize>>,
    /// Its weight.
    pub weight: f32,
    /// Higher goes first.
    pub priority: i32,
    /// The client's labels.
    pub tags: Vec<String>,
    /// Where it came from.
    pub source: Option<String>,
    /// Replaces `train.lr` for the step that trains it.
    pub lr: Option<f32>,
    /// The job that it is a step of; such an example is trained in a step of its own.
    pub job: Option<String>,
}

/// What is known about an example.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// Its id.
    pub id: String,
    /// Where it is.
    pub state: State,
    /// Its tokens, context and decisions.
    pub tokens: u64,
    /// Of these, decision tokens.
    pub decision_tokens: u64,
    /// Its weight.
    pub weight: f32,
    /// Its priority.
    pub priority: i32,
    /// Its labels.
    pub tags: Vec<String>,
    /// Where it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Its place in the order of training, once it was handed out.
    pub seq: Option<u64>,
    /// The step that trained it.
    pub step: Option<u64>,
    /// Mean loss over its decision tokens before the update, in nats.
    pub loss: Option<f32>,
    /// The live weights' version after its step.
    pub weight_version: Option<u64>,
    /// Why it was skipped, refused, failed, rolled back, quarantined or forgotten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the model directory's files hold its effect.
    pub in_files: bool,
    /// When it came, RFC 3339.
    pub enqueued_at: String,
    /// When the trainer answered, RFC 3339.
    pub finished_at: Option<String>,
}

/// One step's examples, with their step number.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The step's number.
    pub step: u64,
    /// Replaces `train.lr`.
    pub lr: Option<f32>,
    /// Ascending in seq.
    pub examples: Vec<Work>,
}

/// What came of adding examples.
#[derive(Debug, Clone, PartialEq)]
pub enum Added {
    /// They are in; ids in the order given.
    New(Vec<String>),
    /// The idempotency key was seen before with the same body: status and answer of then.
    Before(u16, String),
}

/// An idempotency key with what identifies the request.
#[derive(Debug, Clone)]
pub struct Idempotency {
    /// The client's key.
    pub key: String,
    /// BLAKE3 of path and body.
    pub body: [u8; 32],
}
