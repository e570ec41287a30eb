//! What is to be written down in the queue, and the times when the queue cannot be written.
//!
//! A queue that fails (a full disk, mostly) is no reason to end a trainer: live weights would go back to the last
//! generation and be trained to the same bytes again, as often as it fails. What has happened waits here, in order,
//! and is tried again; until it is written no new step begins. Should the daemon end meanwhile, nothing is lost that
//! a replay does not bring back ([`Queue::reconcile`]).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::run::Supervisor;
use crate::queue::{Queue, QueueError};

type Record = Box<dyn Fn(&Queue) -> Result<(), QueueError> + Send>;

/// Records that wait, and why.
#[derive(Default)]
pub(super) struct Records {
    waiting: VecDeque<Record>,
    /// What the queue said last, until it takes something.
    fault: Option<String>,
    /// When it is tried again.
    retry_at: Option<Instant>,
}

impl Records {
    /// Why the queue cannot be written.
    pub(super) fn fault(&self) -> Option<&String> {
        self.fault.as_ref()
    }

    /// When the queue is tried again.
    pub(super) fn retry_in(&self) -> Option<Duration> {
        self.retry_at.map(|at| at.saturating_duration_since(Instant::now()))
    }
}

impl Supervisor {
    /// Writes down what has happened, now or as soon as the queue can be written.
    pub(super) fn record(&mut self, record: impl Fn(&Queue) -> Result<(), QueueError> + Send + 'static) {
        self.records.waiting.push_back(Box::new(record));
        self.catch_up();
    }

    /// Writes down that a step is not tried again.
    pub(super) fn record_failed(&mut self, step: u64, reason: String) {
        self.record(move |queue| queue.record_failed(step, &reason));
    }

    /// Writes what waits. False when the queue cannot be written, or it is too early to try again.
    pub(super) fn catch_up(&mut self) -> bool {
        if self.records.retry_in().is_some_and(|wait| !wait.is_zero()) {
            return false;
        }
        self.records.retry_at = None;
        while let Some(record) = self.records.waiting.pop_front() {
            if self.of_queue(|queue| record(queue)).is_none() {
                self.records.waiting.push_front(record);
                return false;
            }
        }
        true
    }

    /// Tries once more to write what waits; what cannot be written is lost with this process, and a replay makes up for it.
    pub(super) fn catch_up_at_the_end(&mut self) {
        self.records.retry_at = None;
        if !self.catch_up() {
            tracing::error!("{} records could not be written into the queue", self.records.waiting.len());
            // Nothing is quarantined, so it is trained again.
            self.update(|status| status.last_sync.iter_mut().for_each(|sync| sync.harmed = false));
        }
    }

    /// Asks the queue; `None` when it fails, which is noted.
    pub(super) fn of_queue<T>(&mut self, ask: impl FnOnce(&Queue) -> Result<T, QueueError>) -> Option<T> {
        match ask(&self.queue) {
            Ok(answer) => {
                if self.records.fault.take().is_some() {
                    tracing::info!("the queue can be written again");
                }
                Some(answer)
            }
            Err(error) => {
                self.records.retry_at = Some(Instant::now() + self.options.queue_delay);
                if self.records.fault.replace(error.to_string()).is_none() {
                    tracing::error!("training waits: {error}");
                }
                None
            }
        }
    }
}
