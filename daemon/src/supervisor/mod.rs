//! The supervisor: feeds one trainer child, one request at a time, and outlives it.
//!
//! One thread owns everything here and reacts to events: lines from the child, requests from HTTP, the clock. Its
//! rules:
//!
//! - A trainer that reports ready first gets every step that was handed out after its cursor, as it was
//!   (`queue::Queue::replay`), then new ones.
//! - A trainer that dies is replaced, at once the first time and ever later when it keeps dying; a step on which
//!   [`DEATHS_MAX`] trainers in a row died is given up, with the reason.
//! - A server that is gone is not a death: a new trainer looks for it every second.
//! - A queue that cannot be written (a full disk) stops new steps and nothing else: the trainer lives on, and what has
//!   happened is written down once that is possible.
//! - Two syncs never overlap: requests that come during one share its outcome (no step runs meanwhile, so it holds
//!   what they ask for). A scheduled sync that was missed, however often, happens once.
//! - Harm that the guard found stops training until somebody resumes it, also over restarts; what did it is put aside.
//! - On shutdown the step in flight is finished, then one sync is made if anything was trained since the last.

mod answers;
mod child;
mod events;
mod forget;
mod record;
mod run;
mod status;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{broadcast, oneshot};

pub use child::ChildCommand;
pub use events::{Happening, What};
pub use forget::Forgotten;
pub use status::{Dreamt, LastDream, State, Status};
#[cfg(test)]
pub use status::{LastProbed, StepLoss, Timings};

use crate::protocol::{Repaired, RolledBack, Scored, Scoring, Synced};
use crate::queue::{Forget, Queue};
use crate::schedule::Schedule;
use child::Output;
use events::Events;

/// Trainers that may die on one step before it is given up.
pub const DEATHS_MAX: u32 = 5;
/// Steps that may fail in a row before training pauses itself.
pub const FAILURES_MAX: u32 = 5;

/// How the supervisor works.
#[derive(Debug, Clone)]
pub struct Options {
    /// The trainer.
    pub command: ChildCommand,
    /// The model directory, for the status.
    pub model: String,
    /// Examples per step.
    pub batch_examples: usize,
    /// Steps that the trainer computes side by side, at least 1.
    pub workers: usize,
    /// Share of the time in which steps run, above 0 and at most 1: a rest follows each, or each `workers` of them.
    pub duty_cycle: f64,
    /// When to sync.
    pub schedule: Schedule,
    /// Whether to sync at the end.
    pub sync_on_shutdown: bool,
    /// Wait before the second restart in a row; doubled for each further one, up to 30 s.
    pub restart_delay: Duration,
    /// Wait before looking again for a server that is gone.
    pub server_delay: Duration,
    /// Wait before a queue that could not be written is tried again.
    pub queue_delay: Duration,
    /// What the files hold, as far as it is known before a trainer says so.
    pub files: Option<Files>,
    /// A trainer that gives signs of life and then none for so long is killed.
    pub silence_max: Duration,
}

/// The generation that the files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Files {
    /// Its number.
    pub generation: u64,
    /// The highest seq whose effect it holds.
    pub cursor: u64,
    /// Its last step.
    pub step: u64,
}

/// Why a request to the supervisor was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// No trainer is attached.
    #[error("no trainer is attached ({state}{}); try again when /ready says so", detail.as_ref().map(|d| format!(": {d}")).unwrap_or_default())]
    NotReady {
        /// What the daemon is doing instead.
        state: State,
        /// Why.
        detail: Option<String>,
    },
    /// The trainer tried and failed; nothing was changed.
    #[error("{0}")]
    Failed(String),
    /// The same, and it may be done when there is room in the file system.
    #[error("{0}")]
    NoRoom(String),
    /// The same, and it may be done when another program has loaded the model.
    #[error("{0}")]
    Readers(String),
    /// The guard found the model harmed: what, and what was done about it.
    #[error("not synced: {0}")]
    Harmed(String),
    /// The generation that it would take is no longer kept.
    #[error("{0}")]
    Expired(String),
    /// The trainer died, or lost its server, before it answered.
    #[error("the trainer did not answer: {0}; whether it was done will show in the generations")]
    Lost(String),
    /// The same of what changes nothing.
    #[error("the trainer did not answer: {0}; ask again when /ready says so")]
    Unanswered(String),
    /// Too many others wait for the same.
    #[error("{0} requests wait already")]
    Busy(usize),
    /// The daemon is stopping.
    #[error("apollod is stopping")]
    Stopping,
}

/// Where an outcome goes.
type Reply<T> = oneshot::Sender<Result<T, ControlError>>;

/// What happens to the supervisor.
enum Event {
    Child { number: u64, output: Output },
    Sync { reason: String, reply: Option<Reply<Synced>> },
    Rollback { to: u64, reply: Reply<RolledBack> },
    Repair { from: Vec<PathBuf>, reply: Reply<Repaired> },
    Forget { what: Forget, reply: Reply<Forgotten> },
    Score { examples: Vec<Scoring>, reply: Reply<Scored> },
    Pause(bool),
    Wake,
    Shutdown,
}

/// The supervisor's thread, for others to talk to.
#[derive(Clone)]
pub struct Handle {
    events: mpsc::Sender<Event>,
    happenings: Events,
    status: Arc<Mutex<Status>>,
    queue: Arc<Queue>,
}

/// Starts the supervisor on a thread of its own, which ends after [`Handle::shutdown`].
///
/// # Errors
/// When the system gives no thread.
pub fn start(options: Options, queue: Arc<Queue>) -> std::io::Result<(Handle, JoinHandle<()>)> {
    let (events, inbox) = mpsc::channel();
    let status = Arc::new(Mutex::new(Status::default()));
    let happenings = Events::new();
    let handle = Handle {
        events: events.clone(),
        happenings: happenings.clone(),
        status: Arc::clone(&status),
        queue: Arc::clone(&queue),
    };
    let thread = std::thread::Builder::new().name("supervisor".into()).spawn(move || {
        run::Supervisor::new(options, queue, events, happenings, status).run(&inbox);
    })?;
    Ok((handle, thread))
}

impl Handle {
    /// Says that the queue has something new.
    pub fn wake(&self) {
        self.tell(Event::Wake);
    }

    /// Stops training after the steps in flight, or goes on with it. Syncs go on either way.
    pub fn pause(&self, paused: bool) {
        self.tell(Event::Pause(paused));
    }

    /// Syncs now, without waiting for it.
    pub fn sync_later(&self, reason: &str) {
        self.tell(Event::Sync { reason: reason.into(), reply: None });
    }

    /// Syncs after the steps in flight.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn sync(&self, reason: &str) -> Result<Synced, ControlError> {
        let (reply, outcome) = oneshot::channel();
        self.tell(Event::Sync { reason: reason.into(), reply: Some(reply) });
        outcome.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// Goes back to the content of an earlier generation; gives the new generation that holds it, and its cursor.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn rollback(&self, to: u64) -> Result<RolledBack, ControlError> {
        let (reply, outcome) = oneshot::channel();
        self.tell(Event::Rollback { to, reply });
        outcome.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// Puts damaged blocks of the files right, from the live weights and from copies of the model directory.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn repair(&self, from: Vec<PathBuf>) -> Result<Repaired, ControlError> {
        let (reply, outcome) = oneshot::channel();
        self.tell(Event::Repair { from, reply });
        outcome.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// Takes the effect of examples back, and trains what came after them again without them.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn forget(&self, what: Forget) -> Result<Forgotten, ControlError> {
        let (reply, outcome) = oneshot::channel();
        self.tell(Event::Forget { what, reply });
        outcome.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// Log-probabilities on the live weights, after the steps in flight.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn score(&self, examples: Vec<Scoring>) -> Result<Scored, ControlError> {
        let (reply, outcome) = oneshot::channel();
        self.tell(Event::Score { examples, reply });
        outcome.await.unwrap_or(Err(ControlError::Stopping))
    }

    /// Finishes the steps in flight, syncs if so configured, ends the trainer and the thread.
    pub fn shutdown(&self) {
        self.tell(Event::Shutdown);
    }

    /// Takes note of when the daemon dreams next.
    pub fn dreams_next(&self, due: String) {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).next_dream = Some(due);
    }

    /// Takes note of a dream of the daemon's own, or why there was none.
    pub fn dreamt(&self, outcome: Dreamt) {
        match &outcome {
            Dreamt::Done(summary) => match summary.trouble() {
                None => tracing::info!("dreamt: {summary}"),
                Some(trouble) => tracing::warn!("dreamt: {summary}; {trouble}"),
            },
            Dreamt::Skipped(why) => tracing::info!("no dream: {why}"),
            Dreamt::Failed(why) => tracing::error!("a dream failed: {why}"),
        }
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let last = LastDream { at: run::now(), outcome };
        status.counts.count_dream(&last.outcome);
        self.happenings.tell(status.weight_version, What::Dream(last.outcome.clone()));
        status.dream = Some(last);
    }

    /// Everything that happens from now on.
    pub fn listen(&self) -> broadcast::Receiver<Happening> {
        self.happenings.listen()
    }

    /// Everything about the daemon now.
    pub fn status(&self) -> Status {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match self.queue.counts() {
            Ok(counts) => status.queue = counts.into_iter().map(|(state, n)| (state.name().to_owned(), n)).collect(),
            Err(error) => tracing::error!("{error}"),
        }
        let behind = status.replayed_from.map_or(Ok(0), |cursor| self.queue.trained_after(cursor));
        status.to_replay = behind.unwrap_or_default();
        status.sync_overdue = status.next_sync.as_ref().is_some_and(|due| *due < run::now());
        status
    }

    fn tell(&self, event: Event) {
        // The thread is gone only after a shutdown, when there is nobody left to tell.
        let _ = self.events.send(event);
    }
}
