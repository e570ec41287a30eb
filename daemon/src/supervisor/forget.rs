//! Forgetting: back to a generation before an example, and on without it.

use std::path::Path;

use checkpoint::Generation;
use serde::Serialize;

use super::run::{InFlight, Supervisor, answer};
use super::{ControlError, Reply};
use crate::protocol::{RolledBack, ToTrainer};
use crate::queue::{Forget, Queue};

/// What forgetting came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Forgotten {
    /// Examples that are forgotten.
    pub forgotten: u64,
    /// Examples that came after the first of them, and are trained again.
    pub again: u64,
    /// The generation that files and live weights went back to; `None` where they held nothing of it.
    pub base: Option<u64>,
    /// The generation that the files are now.
    pub generation: Option<u64>,
}

impl Supervisor {
    /// Finds the generation to go back to and asks the trainer to, or does what needs no trainer.
    pub(super) fn begin_forget(&mut self, what: Forget, reply: Reply<Forgotten>) {
        match self.plan_forget(&what) {
            Err(error) => answer(Some(reply), Err(error)),
            Ok((outcome, None)) => answer(Some(reply), Ok(outcome)),
            Ok((outcome, Some(to))) => {
                self.send(InFlight::Forget { outcome, reply }, &ToTrainer::Rollback { to });
            }
        }
    }

    /// What it will come to, and the generation to go back to, which is noted in the queue; without one it is done.
    fn plan_forget(&mut self, what: &Forget) -> Result<(Forgotten, Option<u64>), ControlError> {
        let failed = |error: crate::queue::QueueError| ControlError::Failed(error.to_string());
        let generations = checkpoint::list(Path::new(&self.options.model))
            .map_err(|error| ControlError::Failed(error.to_string()))?;
        let current = generations.last().map_or(0, |current| current.progress.cursor);
        let plan = self.queue.plan_forget(what, current).map_err(failed)?;
        let outcome = Forgotten { forgotten: plan.examples, again: 0, base: None, generation: None };
        let Some(first) = plan.first_seq else {
            self.queue.forget_unheld(what).map_err(failed)?;
            return Ok((outcome, None));
        };
        let base = base(&generations, first)?;
        let again = self.queue.begin_forget(what, base.progress.cursor).map_err(failed)?;
        Ok((Forgotten { again, base: Some(base.generation), ..outcome }, Some(base.generation)))
    }

    pub(super) fn on_forgotten(&mut self, done: RolledBack, outcome: Forgotten, reply: Reply<Forgotten>) {
        let RolledBack { generation, cursor, step, .. } = done;
        let Forgotten { forgotten, again, .. } = outcome;
        tracing::warn!(
            "{forgotten} examples are forgotten: generation {generation}; {again} later ones are trained again"
        );
        self.record(move |queue| queue.finish_forget(cursor, step));
        self.after_rollback(done);
        answer(Some(reply), Ok(Forgotten { generation: Some(generation), ..outcome }));
    }

    pub(super) fn on_forget_failed(&mut self, error: ControlError, reply: Reply<Forgotten>) {
        self.record(Queue::cancel_forget);
        answer(Some(reply), Err(error));
    }
}

/// The last generation that does not hold an example and can be restored.
fn base(generations: &[Generation], first: u64) -> Result<&Generation, ControlError> {
    let mut restorable = generations.iter().filter(|of| of.restorable && of.damage.is_none());
    let before = restorable.clone().rfind(|of| of.progress.cursor < first);
    before.ok_or_else(|| {
        let oldest = restorable.next().map_or_else(
            || "none can be restored".to_owned(),
            |of| format!("the oldest that can be restored is {}, with what was trained up to seq {}", of.generation, of.progress.cursor),
        );
        ControlError::Expired(format!(
            "the weights hold it since before the first generation that is kept: it was trained as seq {first}, and {oldest}. sync.keep, \
             keep_bytes and keep_days say how many are kept"
        ))
    })
}
