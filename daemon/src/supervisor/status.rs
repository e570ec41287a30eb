//! What the supervisor knows, as `/v1/status` serves it and as text for a bug report.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::dream::Summary;
use crate::protocol::{Budget, Invalidated, Probed, Published, RolledBack, Synced};

/// Steps whose losses are kept.
pub const LOSSES_KEPT: usize = 32;

/// What the daemon is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A trainer was started and is attaching and recovering.
    #[default]
    Starting,
    /// A step is running.
    Training,
    /// Nothing to train.
    Idle,
    /// Told not to train, or stopped by the guard, or after failures in a row.
    Paused,
    /// Live weights are being written into the model directory.
    Syncing,
    /// Files and live weights are going back to an earlier generation.
    RollingBack,
    /// Damaged blocks of the files are being put right.
    Repairing,
    /// Log-probabilities are being computed for a client.
    Scoring,
    /// There is no inference server to attach to; tried again every second.
    WaitingForServer,
    /// The queue cannot be written: its disk is full, or fails. Training goes on by itself when it can.
    WaitingForQueue,
    /// The trainer cannot start or died; tried again.
    Failed,
    /// The last step and sync before the end.
    Stopping,
}

impl State {
    /// Whether a trainer is attached and can train.
    pub fn is_ready(self) -> bool {
        use State::{Idle, Paused, Repairing, RollingBack, Scoring, Syncing, Training};
        matches!(self, Training | Idle | Paused | Syncing | RollingBack | Repairing | Scoring)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Training => "training",
            Self::Idle => "idle",
            Self::Paused => "paused",
            Self::Syncing => "syncing",
            Self::RollingBack => "rolling back",
            Self::Repairing => "repairing",
            Self::Scoring => "scoring",
            Self::WaitingForServer => "waiting for server",
            Self::WaitingForQueue => "waiting for queue",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
        })
    }
}

/// One step's outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepLoss {
    /// The step.
    pub step: u64,
    /// Mean loss over its decision tokens, in nats.
    pub loss: Option<f32>,
    /// Why the weights were left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// Times of the last step, in ms.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Timings {
    /// The contexts.
    pub prefill_ms: f64,
    /// The windows' forward passes.
    pub forward_ms: f64,
    /// The backward passes.
    pub backward_ms: f64,
    /// Optimizer and writes.
    pub update_ms: f64,
    /// Of these, for how long the engine was held; 0 when it was not.
    #[serde(default)]
    pub hold_ms: f64,
    /// From request to answer.
    pub total_ms: f64,
}

/// The last sync.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastSync {
    /// When it ended, RFC 3339.
    pub at: String,
    /// Why it was made.
    pub reason: String,
    /// What it did; `None` when it failed.
    pub done: Option<Synced>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Whether that is because of harm that was taken back.
    #[serde(default)]
    pub harmed: bool,
}

/// The last rollback.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastRollback {
    /// When it ended, RFC 3339.
    pub at: String,
    /// What it did.
    #[serde(flatten)]
    pub done: RolledBack,
}

/// The last dream of the daemon's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastDream {
    /// When it ended, RFC 3339.
    pub at: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Dreamt,
}

/// What came of a time to dream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dreamt {
    /// A dream.
    Done(Summary),
    /// None, as it was not the time.
    Skipped(String),
    /// None, and somebody should look.
    Failed(String),
}

/// The last time that the guard looked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastProbed {
    /// When, RFC 3339.
    pub at: String,
    /// What it found.
    #[serde(flatten)]
    pub probed: Probed,
    /// What was wrong, if the model was harmed.
    pub harmed: Option<String>,
}

/// The last time that the server was told of moved weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastInvalidation {
    /// When, RFC 3339.
    pub at: String,
    /// What came of it.
    #[serde(flatten)]
    pub invalidated: Invalidated,
}

/// The last time that a generation was to get a directory of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastPublished {
    /// When, RFC 3339.
    pub at: String,
    /// What came of it.
    #[serde(flatten)]
    pub published: Published,
}

/// What was counted since the daemon's start.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Steps that moved the weights.
    pub applied: u64,
    /// Steps that left them alone.
    pub skipped: u64,
    /// Steps that failed.
    pub failed: u64,
    /// Updates between a step's first look at the weights and its own, added up over the applied steps.
    #[serde(default)]
    pub staleness_sum: u64,
    /// The most of any step.
    #[serde(default)]
    pub staleness_max: u64,
    /// Syncs.
    pub syncs: u64,
    /// Syncs that failed.
    pub syncs_failed: u64,
    /// Times that the guard found harm.
    #[serde(default)]
    pub harmed: u64,
    /// Dreams by the schedule.
    #[serde(default)]
    pub dreams: u64,
    /// Those that failed or broke off.
    #[serde(default)]
    pub dreams_failed: u64,
    /// Their answers that became examples.
    #[serde(default)]
    pub dreamt_accepted: u64,
    /// Their answers that judges rejected.
    #[serde(default)]
    pub dreamt_rejected: u64,
    /// Their answers that the model gives without the instruction too.
    #[serde(default)]
    pub dreamt_known: u64,
    /// Invalidations of the server's prefix cache.
    pub invalidations: u64,
    /// Those that failed.
    pub invalidations_failed: u64,
    /// Steps for which the engine was held.
    pub holds: u64,
    /// Those whose hold ended by itself.
    pub holds_overrun: u64,
}

impl Counts {
    /// Takes in what came of a time to dream.
    pub(super) fn count_dream(&mut self, outcome: &Dreamt) {
        match outcome {
            Dreamt::Skipped(_) => {}
            Dreamt::Failed(_) => self.dreams_failed += 1,
            Dreamt::Done(summary) => {
                self.dreams += u64::from(summary.broke_off.is_none());
                self.dreams_failed += u64::from(summary.broke_off.is_some());
                self.dreamt_accepted += summary.accepted;
                self.dreamt_rejected += summary.rejections();
                self.dreamt_known += summary.known;
            }
        }
    }

    /// Mean staleness of the applied steps, in updates.
    pub fn staleness_mean(&self) -> f64 {
        self.staleness_sum as f64 / self.applied.max(1) as f64
    }
}

/// Everything about the daemon at one moment. `None` stands for what is not known, as no trainer has reported it yet.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Status {
    /// apollod's version.
    pub version: String,
    /// What it is doing.
    pub state: State,
    /// Why, where the state alone does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What an operator should look at although training goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// Since when, RFC 3339.
    pub since: String,
    /// The model directory.
    pub model: String,
    /// Process id of the trainer.
    pub trainer_pid: Option<u32>,
    /// What the trainer takes of the machine.
    #[serde(default)]
    pub budget: Option<Budget>,
    /// Process id of the inference server.
    pub server_pid: Option<u32>,
    /// The server's program and version, where it says so.
    #[serde(default)]
    pub server: Option<String>,
    /// Epoch of the server's weights.
    pub epoch: Option<String>,
    /// What the comparison of log-probabilities with the server found.
    #[serde(default)]
    pub shadow_check: Option<String>,
    /// The last time that the server was told of moved weights.
    #[serde(default)]
    pub prefix_cache: Option<LastInvalidation>,
    /// What the trainer says should be looked at; part of `warning`.
    #[serde(default, skip)]
    pub(crate) warnings_of_trainer: Vec<String>,
    /// Updates that the live weights have had.
    pub weight_version: u64,
    /// The generation that the files hold.
    pub generation: Option<u64>,
    /// The highest seq whose effect the files hold.
    pub cursor: Option<u64>,
    /// The last step done.
    pub step: u64,
    /// Parameters of the model.
    pub parameters: Option<u64>,
    /// Of these, the ones that train.
    pub trainable: Option<u64>,
    /// What the trainer restored at its start.
    pub recovery: String,
    /// Whether steps after the cursor are being trained again.
    pub replaying: bool,
    /// Of the queue's trained and skipped examples, those that the live weights do not hold (any more): they are trained
    /// again before new ones.
    #[serde(default)]
    pub to_replay: u64,
    /// The seq after which examples are trained again; `None` when none is.
    #[serde(default, skip)]
    pub(crate) replayed_from: Option<u64>,
    /// Examples in each state.
    pub queue: BTreeMap<String, u64>,
    /// The last steps' losses, oldest first.
    pub last_losses: VecDeque<StepLoss>,
    /// Times of the last step.
    pub timings: Option<Timings>,
    /// The last sync since the daemon's start.
    pub last_sync: Option<LastSync>,
    /// The last rollback since the daemon's start.
    #[serde(default)]
    pub last_rollback: Option<LastRollback>,
    /// The guard's last look at its probes; `None` where nothing is guarded.
    #[serde(default)]
    pub guard: Option<LastProbed>,
    /// Why no new step is begun, whatever else is done meanwhile.
    #[serde(default)]
    pub paused: Option<String>,
    /// The last time to dream by `dream.schedule` since the daemon's start.
    #[serde(default)]
    pub dream: Option<LastDream>,
    /// The next one, RFC 3339.
    #[serde(default)]
    pub next_dream: Option<String>,
    /// The directory of the last generation, with `sync.mode = "generation"`.
    #[serde(default)]
    pub directory: Option<LastPublished>,
    /// When the next scheduled sync is due, RFC 3339.
    pub next_sync: Option<String>,
    /// Whether that time has passed: it is made as soon as a trainer is attached and done with its replay.
    #[serde(default)]
    pub sync_overdue: bool,
    /// Trainers that died since the daemon's start.
    pub restarts: u64,
    /// Why the last one did.
    pub last_restart: Option<String>,
    /// What was counted since the daemon's start.
    #[serde(default)]
    pub counts: Counts,
}

impl Status {
    /// What is wrong although the trainer is attached.
    pub(super) fn reason_to_warn(&self) -> Option<String> {
        if !self.state.is_ready() {
            return None;
        }
        let mut warnings = Vec::new();
        if self.server_pid.is_none() {
            let hint = "no process maps the live copy, so nobody is served what is learned: is the server running, \
                        with its dtype at auto?";
            warnings.push(hint.to_owned());
        }
        // Of harm the pause speaks, and once somebody has resumed, it is over.
        let failed = self.last_sync.as_ref().filter(|sync| !sync.harmed).and_then(|sync| sync.failed.as_ref());
        let failed = failed.filter(|_| self.state != State::Syncing);
        warnings.extend(failed.map(|reason| format!("the last sync failed: {reason}")));
        let failed = self.directory.as_ref().and_then(|last| last.published.failed.as_ref());
        warnings.extend(failed.map(|reason| {
            format!("the last generation got no directory of its own, `current` names an older one: {reason}")
        }));
        let failed = self.prefix_cache.as_ref().and_then(|last| last.invalidated.failed.as_ref());
        warnings.extend(failed.map(|reason| {
            format!("the prefix cache was not invalidated, answers may rest on keys of older weights: {reason}")
        }));
        if self.counts.holds_overrun > 0 {
            let count = self.counts.holds_overrun;
            warnings
                .push(format!("{count} holds of the engine ended before the writes of their step were known to have"));
        }
        warnings.extend(self.dream.as_ref().and_then(|last| match &last.outcome {
            Dreamt::Done(summary) => summary.trouble().map(|trouble| format!("the last dream: {trouble}")),
            Dreamt::Skipped(_) => None,
            Dreamt::Failed(why) => Some(format!("the last dream failed: {why}")),
        }));
        warnings.extend(self.guard.as_ref().and_then(|last| last.probed.warning.clone()));
        warnings.extend(self.warnings_of_trainer.iter().cloned());
        (!warnings.is_empty()).then(|| warnings.join("; "))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".into());
        writeln!(f, "apollod {} · {} since {}", self.version, self.state, self.since)?;
        if let Some(detail) = &self.detail {
            writeln!(f, "  why         {detail}")?;
        }
        if let Some(warning) = &self.warning {
            writeln!(f, "  WARNING     {warning}")?;
        }
        write!(f, "  model       {}", self.model)?;
        if let (Some(parameters), Some(trainable)) = (self.parameters, self.trainable) {
            write!(f, " ({parameters} parameters, {trainable} train)")?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "  server      {}pid {}, epoch {}",
            self.server.as_ref().map(|server| format!("{server}, ")).unwrap_or_default(),
            or_none(self.server_pid.map(|pid| pid.to_string())),
            or_none(self.epoch.clone())
        )?;
        if let Some(found) = &self.shadow_check {
            writeln!(f, "  checked     at the first contact: {found}")?;
        }
        if let Some(LastInvalidation { at, invalidated }) = &self.prefix_cache {
            let what = invalidated.done.as_deref().unwrap_or("not invalidated");
            writeln!(f, "  prefixes    {what} at {at}, version {}", invalidated.weight_version)?;
        }
        writeln!(
            f,
            "  trainer     pid {}, {} restarts{}",
            or_none(self.trainer_pid.map(|pid| pid.to_string())),
            self.restarts,
            self.last_restart.as_ref().map(|why| format!(", the last because: {why}")).unwrap_or_default()
        )?;
        if let Some(Budget { workers, threads, nice, duty_cycle }) = &self.budget {
            let each = if *workers > 1 { format!("{workers} workers of ") } else { String::new() };
            writeln!(f, "  budget      {each}{threads} threads, niceness {nice}, duty cycle {duty_cycle}")?;
            if *workers > 1 {
                let (mean, max) = (self.counts.staleness_mean(), self.counts.staleness_max);
                writeln!(f, "  staleness   {mean:.2} updates in the mean, {max} at most")?;
            }
        }
        if !self.recovery.is_empty() {
            writeln!(f, "  recovery    {}", self.recovery)?;
        }
        writeln!(
            f,
            "  weights     version {}, step {}; files: {}{}",
            self.weight_version,
            self.step,
            match (self.generation, self.cursor) {
                (Some(generation), Some(cursor)) => format!("generation {generation}, cursor {cursor}"),
                _ => "no generation yet".into(),
            },
            if self.replaying { "; replaying what came after it" } else { "" }
        )?;
        let queue: Vec<String> = self.queue.iter().map(|(state, count)| format!("{count} {state}")).collect();
        write!(f, "  queue       {}", queue.join(", "))?;
        if self.to_replay > 0 {
            write!(f, "; {} of the trained ones will be trained again, from the last sync on", self.to_replay)?;
        }
        writeln!(f)?;
        let losses: Vec<String> = self
            .last_losses
            .iter()
            .rev()
            .take(8)
            .map(|step| step.loss.map_or_else(|| "not finite".into(), |loss| format!("{loss:.4}")))
            .collect();
        writeln!(
            f,
            "  losses      {} (newest first)",
            if losses.is_empty() { "none".into() } else { losses.join(" ") }
        )?;
        if let Some(t) = &self.timings {
            writeln!(
                f,
                "  last step   {:.1} ms: prefill {:.1}, forward {:.1}, backward {:.1}, update {:.1}, engine held {:.1}",
                t.total_ms, t.prefill_ms, t.forward_ms, t.backward_ms, t.update_ms, t.hold_ms
            )?;
        }
        if let Some(LastPublished { at, published }) = &self.directory {
            let what = published.directory.as_deref().unwrap_or("none");
            writeln!(f, "  directory   {what} at {at}, generation {}", published.generation)?;
        }
        if let Some(LastProbed { at, probed, harmed }) = &self.guard {
            let nats = |value: Option<f64>| value.map_or_else(|| "not finite".into(), |value| format!("{value:.3}"));
            let Probed { probes, loss, rise, limit, .. } = probed;
            let (loss, rise) = (nats(*loss), nats(*rise));
            let verdict = if harmed.is_some() { "; harmed" } else { "" };
            writeln!(
                f,
                "  guard       {probes} probes, loss {loss}, {rise} above when first seen (limit {limit}) at {at}{verdict}"
            )?;
        }
        if let Some(next) = &self.next_dream {
            let last = self.dream.as_ref().map(|LastDream { at, outcome }| match outcome {
                Dreamt::Done(summary) => format!("{at}: {summary}"),
                Dreamt::Skipped(why) => format!("{at}: none, {why}"),
                Dreamt::Failed(why) => format!("{at} failed: {why}"),
            });
            writeln!(f, "  dream       last {}; next {next}", or_none(last))?;
        }
        if let Some(LastRollback { at, done: RolledBack { generation, to, .. } }) = &self.last_rollback {
            writeln!(f, "  rollback    last {at}: generation {generation} has the content of {to}")?;
        }
        let last_sync = self.last_sync.as_ref().map(|sync| match (&sync.done, &sync.failed) {
            (Some(done), _) => format!("{} ({}): {done}, {:.2} s", sync.at, sync.reason, done.seconds),
            (None, failed) => format!("{} ({}) failed: {}", sync.at, sync.reason, failed.as_deref().unwrap_or("")),
        });
        let due = if self.sync_overdue { "due since " } else { "" };
        write!(f, "  sync        last {}; next {due}{}", or_none(last_sync), or_none(self.next_sync.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_that_failed_is_no_warning_while_the_next_one_runs() {
        let failed = LastSync {
            at: "t".into(),
            reason: "schedule".into(),
            done: None,
            failed: Some("no room".into()),
            harmed: false,
        };
        let status =
            |state| Status { state, server_pid: Some(1), last_sync: Some(failed.clone()), ..Status::default() };
        assert!(status(State::Idle).reason_to_warn().is_some_and(|why| why.contains("the last sync failed: no room")));
        assert_eq!(status(State::Syncing).reason_to_warn(), None);
    }

    #[test]
    fn a_sync_whose_time_has_passed_is_said_to_be_due() {
        let next_sync = Some("2026-01-01T00:10:00Z".to_owned());
        let text =
            |sync_overdue| Status { next_sync: next_sync.clone(), sync_overdue, ..Status::default() }.to_string();
        assert!(text(true).contains("next due since 2026-01-01T00:10:00Z"));
        assert!(text(false).contains("next 2026-01-01T00:10:00Z"));
    }
}
