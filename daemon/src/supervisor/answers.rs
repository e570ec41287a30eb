//! What the supervisor makes of the child's answers.

use std::collections::VecDeque;
use std::time::Instant;

use chrono::Utc;

use super::child::Output;
use super::events::What;
use super::run::{InFlight, Sent, Supervisor, answer, now};
use super::status::{
    LOSSES_KEPT, LastInvalidation, LastProbed, LastPublished, LastRollback, LastSync, StepLoss, Timings,
};
use super::{ControlError, FAILURES_MAX, Reply, State};
use crate::protocol::{
    Cause, FromTrainer, Harmed, Invalidated, Probed, Published, Ready, Repaired, Request, RolledBack, Synced, Trained,
};

impl Supervisor {
    /// Takes in what the child says. Every request gets exactly one answer; anything else is a broken trainer.
    pub(super) fn hear(&mut self, output: Output) {
        let message = match output {
            Output::Message(message) => message,
            Output::Nonsense(error) => return self.kill_child(error.to_string()),
            Output::Closed => {
                let stopped = self.stopping && matches!(self.in_flight, None | Some(InFlight::Shutdown));
                if stopped {
                    self.note_missing_sync();
                }
                return self.lose_child(if stopped { State::Stopping } else { State::Failed }, String::new());
            }
        };
        match (message, self.in_flight.take()) {
            (FromTrainer::Ready(ready), None) => self.on_ready(ready),
            (FromTrainer::Trained(trained), Some(InFlight::Train { steps, since })) => {
                self.on_trained(trained, steps, since)
            }
            (FromTrainer::Synced(synced), Some(InFlight::Sync { reason, waiting })) => {
                self.on_synced(reason, waiting, synced)
            }
            (FromTrainer::Synced(synced), Some(InFlight::Shutdown)) => {
                self.in_flight = Some(InFlight::Shutdown);
                self.on_synced("shutdown".into(), Vec::new(), synced)
            }
            (FromTrainer::Harmed(harmed), Some(InFlight::Sync { reason, waiting })) => {
                self.on_harmed(reason, waiting, *harmed)
            }
            (FromTrainer::Harmed(harmed), Some(InFlight::Shutdown)) => {
                self.in_flight = Some(InFlight::Shutdown);
                self.on_harmed("shutdown".into(), Vec::new(), *harmed)
            }
            (FromTrainer::RolledBack(done), Some(InFlight::Rollback { reply })) => self.on_rolled_back(done, reply),
            (FromTrainer::RolledBack(done), Some(InFlight::Forget { outcome, reply })) => {
                self.on_forgotten(done, outcome, reply)
            }
            (FromTrainer::Scored(scored), Some(InFlight::Score { reply })) => answer(Some(reply), Ok(scored)),
            (FromTrainer::Repaired(repaired), Some(InFlight::Repair { reply })) => on_repaired(repaired, reply),
            (FromTrainer::ServerGone { reason }, in_flight) => {
                self.in_flight = in_flight;
                // One that is waited for is told once.
                if self.attached.as_ref().is_some_and(|attached| attached.ready) {
                    tracing::warn!("the inference server is gone: {reason}");
                    self.tell(What::ServerGone { reason: reason.clone() });
                } else if self.waits_because() != Some(&reason) {
                    tracing::warn!("waiting for the inference server: {reason}");
                }
                self.update(|status| {
                    (status.server, status.server_pid, status.epoch, status.shadow_check) = (None, None, None, None);
                });
                self.lose_child(State::WaitingForServer, reason);
            }
            (FromTrainer::Failed { request, reason, cause }, in_flight) => {
                self.on_failed(request, reason, cause, in_flight)
            }
            (message, in_flight) => {
                self.in_flight = in_flight;
                self.kill_child(format!("it broke the protocol with an answer out of turn: {message:?}"));
            }
        }
    }

    /// A trainer that was to sync before its end, and ended without a word about it.
    fn note_missing_sync(&mut self) {
        let wanted =
            matches!(self.in_flight, Some(InFlight::Shutdown)) && self.options.sync_on_shutdown && self.unsynced;
        self.update(|status| {
            if wanted && status.last_sync.as_ref().is_none_or(|last| last.reason != "shutdown") {
                let failed = Some("the trainer ended before it was done".into());
                status.last_sync =
                    Some(LastSync { at: now(), reason: "shutdown".into(), done: None, failed, harmed: false });
            }
        });
    }

    fn on_ready(&mut self, ready: Ready) {
        let (generation, cursor, step) = (ready.generation, ready.cursor, ready.step);
        self.record(move |queue| {
            let rolled_back = queue.reconcile(generation, cursor, step)?;
            if rolled_back > 0 {
                tracing::warn!(
                    "the files are at generation {generation}, cursor {cursor}: behind what was synced before. \
                     {rolled_back} later examples count as rolled back and are not trained again"
                );
            }
            Ok(())
        });
        self.replay_from = Some(ready.cursor);
        (self.unsynced, self.absent) = (false, None);
        if let Some(attached) = &mut self.attached {
            attached.ready = true;
        }
        tracing::info!(
            "trainer ready: generation {}, cursor {}, step {}{}{}",
            ready.generation,
            ready.cursor,
            ready.step,
            if ready.recovery.is_empty() { "" } else { "; " },
            ready.recovery
        );
        let attached =
            What::Attached { epoch: ready.epoch.clone(), server_pid: ready.server_pid, generation: ready.generation };
        self.update(|status| {
            (status.server, status.shadow_check) = (ready.server, ready.shadow_check);
            (status.warnings_of_trainer, status.budget) = (ready.warnings, ready.budget);
            status.epoch = Some(ready.epoch);
            status.server_pid = ready.server_pid;
            status.weight_version = ready.weight_version;
            (status.generation, status.cursor, status.step) = (Some(ready.generation), Some(ready.cursor), ready.step);
            (status.parameters, status.trainable) = (Some(ready.parameters), Some(ready.trainable));
            status.guard = ready.probed.map(|probed| LastProbed { at: now(), probed: *probed, harmed: None });
            status.recovery = ready.recovery;
        });
        self.tell(attached);
    }

    /// What is still in flight after the answer to the first of these steps. Rests once it is nothing.
    fn answered(&mut self, steps: VecDeque<Sent>, since: Instant) {
        if steps.is_empty() {
            self.rest_after(since);
        } else {
            self.in_flight = Some(InFlight::Train { steps, since });
        }
    }

    fn on_trained(&mut self, trained: Trained, mut steps: VecDeque<Sent>, since: Instant) {
        let first = &steps.front().expect("steps in flight are at least one").batch;
        let sent: Vec<u64> = first.examples.iter().map(|example| example.seq).collect();
        let answered: Vec<u64> = trained.examples.iter().map(|example| example.seq).collect();
        if trained.step != first.step || answered != sent {
            let reason = format!("it answered step {} {answered:?} to step {} {sent:?}", trained.step, first.step);
            self.in_flight = Some(InFlight::Train { steps, since });
            return self.kill_child(reason);
        }
        let Sent { started, .. } = steps.pop_front().expect("it was just looked at");
        self.answered(steps, since);
        let (results, version, why) = (trained.examples.clone(), trained.weight_version, trained.skipped.clone());
        self.record(move |queue| queue.record_trained(&results, version, why.as_deref()));
        self.unsynced = true;
        (self.deaths_in_a_row, self.failures_in_a_row) = (0, 0);
        // A replay of earlier steps says nothing about the one that trainers died on.
        if trained.step >= self.deaths_of_step.0 {
            self.deaths_of_step = (0, 0);
        }
        let timings = Timings {
            prefill_ms: trained.prefill_ms,
            forward_ms: trained.forward_ms,
            backward_ms: trained.backward_ms,
            update_ms: trained.update_ms,
            hold_ms: trained.hold.map_or(0.0, |hold| hold.ms),
            total_ms: started.elapsed().as_secs_f64() * 1e3,
        };
        tracing::info!(
            "step {}: loss {}, {:.1} ms{}",
            trained.step,
            trained.loss.map_or_else(|| "not finite".into(), |loss| format!("{loss:.4}")),
            timings.total_ms,
            trained.skipped.as_ref().map(|why| format!("; skipped: {why}")).unwrap_or_default()
        );
        let (skipped, examples) = (trained.skipped.clone(), trained.examples.len());
        let what = What::Step { step: trained.step, loss: trained.loss, examples, skipped };
        self.update(|status| {
            (status.step, status.weight_version, status.timings) =
                (trained.step, trained.weight_version, Some(timings));
            match trained.skipped {
                None => {
                    status.counts.applied += 1;
                    status.counts.staleness_sum += trained.staleness;
                    status.counts.staleness_max = status.counts.staleness_max.max(trained.staleness);
                }
                Some(_) => status.counts.skipped += 1,
            }
            status.counts.holds += u64::from(trained.hold.is_some());
            status.counts.holds_overrun += u64::from(trained.hold.is_some_and(|hold| hold.overran));
            status.server_pid = trained.server_pid;
            status.last_losses.push_back(StepLoss { step: trained.step, loss: trained.loss, skipped: trained.skipped });
            while status.last_losses.len() > LOSSES_KEPT {
                status.last_losses.pop_front();
            }
        });
        self.tell(what);
    }

    pub(super) fn on_invalidated(&mut self, invalidated: Invalidated) {
        if let Some(reason) = &invalidated.failed {
            tracing::warn!("the server's prefix cache was not invalidated: {reason}");
        }
        let what = What::from(&invalidated);
        self.update(|status| {
            match invalidated.failed {
                None => status.counts.invalidations += 1,
                Some(_) => status.counts.invalidations_failed += 1,
            }
            status.prefix_cache = Some(LastInvalidation { at: now(), invalidated });
        });
        self.tell(what);
    }

    pub(super) fn on_published(&mut self, published: Published) {
        match (&published.directory, &published.failed) {
            (Some(directory), _) => tracing::info!("generation {} is in {directory}", published.generation),
            (None, failed) => tracing::warn!(
                "generation {} got no directory of its own: {}",
                published.generation,
                failed.as_deref().unwrap_or_default()
            ),
        }
        self.update(|status| status.directory = Some(LastPublished { at: now(), published }));
    }

    fn on_synced(&mut self, reason: String, waiting: Vec<Reply<Synced>>, synced: Synced) {
        let cursor = synced.cursor;
        let (generation, model) = (synced.generation, self.options.model.clone());
        let oldest = move || {
            let generations = checkpoint::list(std::path::Path::new(&model)).ok()?;
            generations.iter().find(|one| one.restorable).map(|one| one.generation)
        };
        self.record(move |queue| queue.record_synced(generation, cursor, &oldest));
        (self.unsynced, self.deaths_in_a_row) = (false, 0);
        self.next_sync = self.options.schedule.next_after(Utc::now());
        tracing::info!("sync ({reason}): {synced}, {:.2} s", synced.seconds);
        self.update(|status| {
            (status.generation, status.cursor) = (Some(synced.generation), Some(synced.cursor));
            status.last_sync =
                Some(LastSync { at: now(), reason, done: Some(synced.clone()), failed: None, harmed: false });
            if let Some(probed) = synced.probed.as_deref().cloned() {
                status.guard = Some(LastProbed { at: now(), probed, harmed: None });
            }
            status.counts.syncs += u64::from(!synced.unchanged);
        });
        if !synced.unchanged {
            self.tell(What::Sync(synced.clone()));
        }
        waiting.into_iter().for_each(|reply| answer(Some(reply), Ok(synced.clone())));
    }

    /// The guard found harm. Nobody knows which of the examples since the last sync did it, so all of them are put aside once it is
    /// taken back, and somebody is to look before more are trained, also after a restart.
    fn on_harmed(&mut self, why: String, waiting: Vec<Reply<Synced>>, harmed: Harmed) {
        let Harmed { reason, probed, applied, restored } = harmed;
        let pause = match &restored {
            Ok(RolledBack { generation, .. }) => format!(
                "the guard took back what was trained since generation {generation}: {reason}. Its examples are quarantined (GET \
                 /v1/examples?state=quarantined); resume to train what waits"
            ),
            Err(error) => format!(
                "the guard found harm and could not take it back: {error}. {reason}. Mend that and roll back to the current generation, \
                 which takes back what was trained since; or resume, and the next sync looks again"
            ),
        };
        tracing::error!("{pause}");
        self.paused = Some(pause.clone());
        self.next_sync = self.options.schedule.next_after(Utc::now());
        let taken_back = restored.is_ok();
        match restored {
            Ok(RolledBack { generation, cursor, step, weight_version, .. }) => {
                let reason = reason.clone();
                self.record(move |queue| {
                    let count = queue.record_quarantined(cursor, applied, &reason, &pause)?;
                    tracing::error!("{count} examples are quarantined");
                    Ok(())
                });
                (self.unsynced, self.deaths_in_a_row) = (false, 0);
                self.update(|status| {
                    (status.generation, status.cursor) = (Some(generation), Some(cursor));
                    (status.weight_version, status.step) = (weight_version, step);
                });
            }
            Err(_) => self.record(move |queue| queue.record_paused(&pause)),
        }
        let said = self.paused.clone().unwrap_or_default();
        self.update(|status| {
            status.guard = Some(LastProbed { at: now(), probed, harmed: Some(reason.clone()) });
            status.last_sync =
                Some(LastSync { at: now(), reason: why, done: None, failed: Some(reason.clone()), harmed: taken_back });
            status.counts.harmed += 1;
        });
        self.tell(What::Harmed { reason: said.clone() });
        waiting.into_iter().for_each(|reply| answer(Some(reply), Err(ControlError::Harmed(said.clone()))));
    }

    pub(super) fn on_probed(&mut self, probed: Probed) {
        self.update(|status| status.guard = Some(LastProbed { at: now(), probed, harmed: None }));
    }

    fn on_rolled_back(&mut self, done: RolledBack, reply: Reply<RolledBack>) {
        let RolledBack { generation, cursor, .. } = done;
        self.record(move |queue| {
            let taken_back = queue.record_rolled_back(generation, cursor)?;
            tracing::warn!("rolled back: generation {generation}, cursor {cursor}; {taken_back} examples taken back");
            Ok(())
        });
        self.after_rollback(done.clone());
        answer(Some(reply), Ok(done));
    }

    /// Files and live weights are at another generation.
    pub(super) fn after_rollback(&mut self, done: RolledBack) {
        let RolledBack { generation, cursor, step, weight_version, .. } = done;
        (self.unsynced, self.replay_from) = (false, None);
        // Their numbers may come again.
        (self.deaths_of_step, self.suspects) = ((0, 0), None);
        self.update(|status| {
            (status.generation, status.cursor) = (Some(generation), Some(cursor));
            (status.weight_version, status.step) = (weight_version, step);
            status.last_rollback = Some(LastRollback { at: now(), done });
        });
        self.tell(What::Rollback { generation });
    }

    fn on_failed(&mut self, request: Request, reason: String, cause: Cause, in_flight: Option<InFlight>) {
        if request != Request::Start {
            tracing::error!("{request} failed: {reason}");
        }
        match (request, in_flight) {
            (Request::Start, None) => self.lose_child(State::Failed, reason),
            (Request::Train, Some(InFlight::Train { mut steps, since })) => {
                let Sent { batch, .. } = steps.pop_front().expect("steps in flight are at least one");
                self.answered(steps, since);
                self.record_failed(batch.step, reason.clone());
                self.update(|status| status.counts.failed += 1);
                self.failures_in_a_row += 1;
                if self.failures_in_a_row >= FAILURES_MAX {
                    self.paused = Some(format!(
                        "{FAILURES_MAX} steps failed in a row, the last because: {reason}; resume when that is mended"
                    ));
                }
            }
            (Request::Sync, Some(InFlight::Sync { reason: why, waiting })) => {
                self.on_sync_failed(why, waiting, reason, cause)
            }
            (Request::Shutdown | Request::Sync, Some(InFlight::Shutdown)) => {
                self.in_flight = Some(InFlight::Shutdown);
                self.on_sync_failed("shutdown".into(), Vec::new(), reason, cause);
            }
            (Request::Rollback, Some(InFlight::Rollback { reply })) => {
                answer(Some(reply), Err(failed(reason, cause)));
            }
            (Request::Rollback, Some(InFlight::Forget { reply, .. })) => {
                self.on_forget_failed(failed(reason, cause), reply);
            }
            (Request::Repair, Some(InFlight::Repair { reply })) => {
                answer(Some(reply), Err(failed(reason, cause)));
            }
            (Request::Score, Some(InFlight::Score { reply })) => answer(Some(reply), Err(failed(reason, cause))),
            (_, in_flight) => {
                self.in_flight = in_flight;
                self.kill_child(format!("it says that {request} failed, which was not asked: {reason}"));
            }
        }
    }

    fn on_sync_failed(&mut self, why: String, waiting: Vec<Reply<Synced>>, reason: String, cause: Cause) {
        self.next_sync = self.options.schedule.next_after(Utc::now());
        self.update(|status| {
            status.last_sync =
                Some(LastSync { at: now(), reason: why, done: None, failed: Some(reason.clone()), harmed: false });
            status.counts.syncs_failed += 1;
        });
        waiting.into_iter().for_each(|reply| answer(Some(reply), Err(failed(reason.clone(), cause))));
    }
}

fn failed(reason: String, cause: Cause) -> ControlError {
    match cause {
        Cause::Other => ControlError::Failed(reason),
        Cause::NoRoom => ControlError::NoRoom(reason),
        Cause::Readers => ControlError::Readers(reason),
    }
}

fn on_repaired(repaired: Repaired, reply: Reply<Repaired>) {
    repaired.repaired.iter().for_each(|what| tracing::warn!("repaired: {what}"));
    repaired.damage.iter().for_each(|what| tracing::error!("still damaged: {what}"));
    answer(Some(reply), Ok(repaired));
}
