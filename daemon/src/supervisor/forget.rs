//! Forgetting: back to a generation before an example, and on without it.

use std::path::Path;

use serde::Serialize;

use super::run::{InFlight, Supervisor, answer};
use super::{ControlError, Reply};
use crate::lineage::{Ancestor, ancestors};
use crate::protocol::{RolledBack, ToTrainer};
use crate::queue::{Base, Forget, Plan, Queue, QueueError};

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
    /// Generations that went from the history for it.
    pub no_longer: Vec<u64>,
}

impl Supervisor {
    /// Finds the generation to go back to and asks the trainer to, or does what needs no trainer.
    pub(super) fn begin_forget(&mut self, what: Forget, reply: Reply<Forgotten>) {
        match self.plan_forget(&what) {
            Err(error) => answer(Some(reply), Err(error)),
            Ok(outcome) => match outcome.base {
                None => answer(Some(reply), Ok(outcome)),
                Some(to) => self.send(InFlight::Forget { outcome, reply }, &ToTrainer::Rollback { to }),
            },
        }
    }

    /// What it will come to, with the generation to go back to, which is noted in the queue; without one it is done.
    fn plan_forget(&mut self, what: &Forget) -> Result<Forgotten, ControlError> {
        let failed = |error: QueueError| ControlError::Failed(error.to_string());
        let generations = checkpoint::list(Path::new(&self.options.model))
            .map_err(|error| ControlError::Failed(error.to_string()))?;
        let plan = self.queue.plan_forget(what).map_err(failed)?;
        let outcome =
            Forgotten { forgotten: plan.examples, again: 0, base: None, generation: None, no_longer: Vec::new() };
        let current = generations.last().map_or(0, |current| current.generation);
        let ancestors = ancestors(&generations, current);
        let Some(base) = base(&ancestors, &plan, current)? else {
            self.queue.forget_unheld(what).map_err(failed)?;
            return Ok(outcome);
        };
        let again = self.queue.begin_forget(what, &base).map_err(failed)?;
        Ok(Forgotten { again, base: Some(base.generation), ..outcome })
    }

    pub(super) fn on_forgotten(&mut self, done: RolledBack, outcome: Forgotten, reply: Reply<Forgotten>) {
        let RolledBack { generation, cursor, step, .. } = done;
        let Forgotten { forgotten, again, .. } = outcome;
        tracing::warn!(
            "{forgotten} examples are forgotten: generation {generation}; {again} later ones are trained again"
        );
        self.record(move |queue| queue.finish_forget(cursor, step));
        let no_longer = done.no_longer.clone();
        self.after_rollback(done);
        // Its texts may be among those of the last dream.
        let _ = std::fs::remove_file(Path::new(&self.options.model).join(".apollod").join(crate::dream::TURNS));
        answer(Some(reply), Ok(Forgotten { generation: Some(generation), no_longer, ..outcome }));
    }

    pub(super) fn on_forget_failed(&mut self, error: ControlError, reply: Reply<Forgotten>) {
        self.record(Queue::cancel_forget);
        answer(Some(reply), Err(error));
    }
}

/// The last of the ancestors that can be restored and is older than the first to hold one of the examples; `None` where the weights
/// hold none of them.
///
/// # Errors
/// There is none. So it is said, too, where the way back ends before an example's generation (files were adopted, or a document is
/// damaged): whether the weights hold it is then not known.
fn base(ancestors: &[Ancestor<'_>], plan: &Plan, current: u64) -> Result<Option<Base>, ControlError> {
    let holds = |ancestor: &Ancestor<'_>| ancestor.numbers().any(|number| plan.generations.contains(&number));
    let root = ancestors.last().and_then(|ancestor| ancestor.numbers().last()).unwrap_or(current);
    let lost = root > 0 && plan.generations.iter().any(|generation| *generation < root);
    let before = match (ancestors.iter().rposition(holds), plan.unsynced) {
        _ if lost => ancestors.len(),
        (Some(oldest), _) => oldest + 1,
        (None, true) => 0,
        (None, false) => return Ok(None),
    };
    for (index, ancestor) in ancestors.iter().enumerate().skip(before) {
        if let Some(one) = ancestor.same.iter().find(|one| one.restorable) {
            let undone = ancestors[..index].iter().flat_map(Ancestor::numbers).collect();
            return Ok(Some(Base { generation: one.generation, cursor: one.progress.cursor, current, undone }));
        }
    }
    let oldest = ancestors.iter().flat_map(|ancestor| &ancestor.same).rfind(|one| one.restorable);
    let oldest = oldest.map_or_else(
        || "none can be restored".to_owned(),
        |one| format!("the oldest that it is made of and that can be restored is {}", one.generation),
    );
    Err(ControlError::Expired(format!(
        "the weights hold it since before the first generation that is kept: {oldest}. sync.keep, keep_bytes and keep_days say how many are kept"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lineage;
    use crate::lineage::tests::generation;

    /// The base of examples that these generations were the first to hold, and whether there are some that none holds.
    fn of(all: &[checkpoint::Generation], generations: &[u64], unsynced: bool) -> Result<Option<u64>, ControlError> {
        let current = all.last().unwrap().generation;
        let plan = Plan { examples: 1, generations: generations.to_vec(), unsynced };
        base(&lineage::ancestors(all, current), &plan, current).map(|base| base.map(|base| base.generation))
    }

    #[test]
    fn the_base_is_the_last_that_does_not_hold_it_and_what_is_not_known_is_not_denied() {
        let restorable = |all: &[(u64, Option<u64>, Option<u64>)]| -> Vec<_> {
            let all = all.iter().map(|one| checkpoint::Generation { restorable: true, ..generation(*one) });
            all.collect()
        };
        let all = restorable(&[
            (0, None, None),
            (1, Some(0), None),
            (2, Some(1), None),
            (3, Some(2), Some(1)),
            (4, Some(3), None),
        ]);
        assert_eq!(of(&all, &[4], false).unwrap(), Some(3), "the later copy of 1");
        assert_eq!(of(&all, &[], true).unwrap(), Some(4));
        assert_eq!(of(&all, &[4, 1], true).unwrap(), Some(0));
        assert_eq!(of(&all, &[2], false).unwrap(), None, "rolled back");
        assert!(of(&all, &[0], false).is_err());

        // Files that were adopted as generation 6 may hold whatever came before.
        let adopted = restorable(&[(4, Some(3), None), (6, None, None), (7, Some(6), None)]);
        assert!(of(&adopted, &[4], false).is_err());
        assert!(of(&adopted, &[4, 7], true).is_err());
        assert_eq!(of(&adopted, &[7], false).unwrap(), Some(6));
    }
}
