//! What happens, told to whoever listens (`GET /v1/events`).
//!
//! Events go to a ring of fixed size, and nobody waits for a listener: one that falls behind loses the oldest and is
//! told how many.

use serde::Serialize;
use tokio::sync::broadcast;

use super::run::now;
use super::status::Dreamt;
use crate::protocol::{Invalidated, Synced};

/// Events that a listener may fall behind.
const KEPT: usize = 256;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Happening {
    /// When, RFC 3339.
    pub at: String,
    /// Updates that the live weights had had by then.
    pub weight_version: u64,
    /// What.
    #[serde(flatten)]
    pub what: What,
}

/// The kinds of events.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum What {
    /// A trainer is attached to a server's weights.
    Attached {
        /// Epoch of the weights.
        epoch: String,
        /// The server's process id.
        server_pid: Option<u32>,
        /// The generation that the files hold.
        generation: u64,
    },
    /// A step was done.
    Step {
        /// Its number.
        step: u64,
        /// Its mean loss in nats.
        loss: Option<f32>,
        /// Examples in it.
        examples: usize,
        /// Why the weights were left alone.
        skipped: Option<String>,
    },
    /// The files are a new generation.
    Sync(Synced),
    /// Files and live weights are back at an earlier generation.
    Rollback {
        /// The generation that now holds its content.
        generation: u64,
    },
    /// What was trained since the last sync harmed the model; training is paused.
    Harmed {
        /// What is wrong, and what was done about it.
        reason: String,
    },
    /// The inference server is gone.
    ServerGone {
        /// What was seen.
        reason: String,
    },
    /// The server was told that weights have moved.
    Invalidated {
        /// `reset` or `salt`.
        done: Option<String>,
        /// Why it was not done.
        failed: Option<String>,
    },
    /// The daemon was to dream by its schedule.
    Dream(Dreamt),
    /// The daemon has ended; nothing follows.
    Stopped,
}

impl What {
    /// Its name, as in its JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Attached { .. } => "attached",
            Self::Step { .. } => "step",
            Self::Sync(_) => "sync",
            Self::Rollback { .. } => "rollback",
            Self::Harmed { .. } => "harmed",
            Self::ServerGone { .. } => "server_gone",
            Self::Invalidated { .. } => "invalidated",
            Self::Dream(_) => "dream",
            Self::Stopped => "stopped",
        }
    }
}

impl From<&Invalidated> for What {
    fn from(of: &Invalidated) -> Self {
        Self::Invalidated { done: of.done.clone(), failed: of.failed.clone() }
    }
}

/// Where events go.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<Happening>);

impl Events {
    /// Without listeners so far.
    pub fn new() -> Self {
        Self(broadcast::channel(KEPT).0)
    }

    /// Tells whoever listens; never waits.
    pub fn tell(&self, weight_version: u64, what: What) {
        // Nobody listening is no error.
        let _ = self.0.send(Happening { at: now(), weight_version, what });
    }

    /// Everything from now on.
    pub fn listen(&self) -> broadcast::Receiver<Happening> {
        self.0.subscribe()
    }
}
