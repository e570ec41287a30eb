//! The supervisor's loop. Parents decide ([`Supervisor::advance`]), leaves act.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, Utc};

use super::child::{Child, Output};
use super::events::{Events, What};
use super::record::Records;
use super::{ControlError, DEATHS_MAX, Event, Forgotten, Options, Reply, State, Status};
use crate::protocol::{FromTrainer, Repaired, RolledBack, Scored, Scoring, Synced, ToTrainer};
use crate::queue::{Batch, Forget, Queue};

/// Longest wait between two restarts.
const RESTART_DELAY_MAX: Duration = Duration::from_secs(30);
/// Longest sleep, so that a clock that was set is noticed.
const SLEEP_MAX: Duration = Duration::from_secs(15);
/// How long a child that said its last word may take to end.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// Steps in flight for each worker, where there are several: the next is there when it has done with its own.
const STEPS_PER_WORKER: usize = 2;

/// Scores that may wait.
const SCORES_MAX: usize = 64;

/// A step that was sent.
pub(super) struct Sent {
    pub batch: Batch,
    pub started: Instant,
}

/// What waits for its answer.
pub(super) enum InFlight {
    /// Steps, at least one, in the order in which they are answered; the first of them were sent when nothing was in
    /// flight, at `since`.
    Train {
        steps: VecDeque<Sent>,
        since: Instant,
    },
    Sync {
        reason: String,
        waiting: Vec<Reply<Synced>>,
    },
    Rollback {
        reply: Reply<RolledBack>,
    },
    Repair {
        reply: Reply<Repaired>,
    },
    Forget {
        outcome: Forgotten,
        reply: Reply<Forgotten>,
    },
    Score {
        reply: Reply<Scored>,
    },
    Shutdown,
}

/// A child with what is known of it.
pub(super) struct Attached {
    child: Child,
    number: u64,
    pub(super) ready: bool,
    /// When it last gave a sign of life, once it has given one.
    heard: Option<Instant>,
    /// Why it says that it ends.
    last_word: Option<String>,
}

/// A sync that was asked for and not yet sent.
#[derive(Default)]
struct WantedSync {
    reason: String,
    waiting: Vec<Reply<Synced>>,
}

pub(super) struct Supervisor {
    pub(super) options: Options,
    pub(super) queue: Arc<Queue>,
    events: mpsc::Sender<Event>,
    happenings: Events,
    status: Arc<Mutex<Status>>,
    pub(super) attached: Option<Attached>,
    children: u64,
    spawn_at: Instant,
    /// Without a child: why, and whether a server is waited for.
    pub(super) absent: Option<(State, String)>,
    pub(super) in_flight: Option<InFlight>,
    wanted_sync: Option<WantedSync>,
    wanted_rollback: Option<(u64, Reply<RolledBack>)>,
    wanted_repair: Option<(Vec<PathBuf>, Reply<Repaired>)>,
    wanted_forget: Option<(Forget, Reply<Forgotten>)>,
    wanted_scores: VecDeque<(Vec<Scoring>, Reply<Scored>)>,
    /// Whether a score was the last that was sent: a step comes before the next.
    scored_last: bool,
    pub(super) paused: Option<String>,
    pub(super) stopping: bool,
    /// Steps after this cursor are trained again before new ones; `None` once there are none.
    pub(super) replay_from: Option<u64>,
    /// Whether anything was trained since the last sync.
    pub(super) unsynced: bool,
    pub(super) next_sync: Option<DateTime<Utc>>,
    pub(super) deaths_in_a_row: u32,
    pub(super) deaths_of_step: (u64, u32),
    /// The steps that were in flight when the last trainer died, one of which may have killed it. Each is sent alone.
    pub(super) suspects: Option<RangeInclusive<u64>>,
    pub(super) failures_in_a_row: u32,
    pub(super) records: Records,
    /// Until when no step is begun, for the duty cycle.
    rest_until: Option<Instant>,
}

impl Supervisor {
    pub(super) fn new(
        options: Options,
        queue: Arc<Queue>,
        events: mpsc::Sender<Event>,
        happenings: Events,
        status: Arc<Mutex<Status>>,
    ) -> Self {
        // A sync that was due while the daemon was down is due now, once.
        let last = queue.last_sync_ms().ok().flatten().and_then(DateTime::from_timestamp_millis);
        // What the guard has stopped stays so until somebody says otherwise.
        let unknown =
            |error| Some(format!("whether the guard has stopped training is not known ({error}); resume if not"));
        let paused = queue.pause().unwrap_or_else(unknown);
        let weight_version = queue.weight_version().unwrap_or_default();
        let next_sync = options.schedule.next_after(last.unwrap_or_else(Utc::now));
        let new = Self {
            options,
            queue,
            events,
            happenings,
            status,
            attached: None,
            children: 0,
            spawn_at: Instant::now(),
            absent: None,
            in_flight: None,
            wanted_sync: None,
            wanted_rollback: None,
            wanted_repair: None,
            wanted_forget: None,
            wanted_scores: VecDeque::new(),
            scored_last: false,
            paused,
            stopping: false,
            replay_from: None,
            unsynced: false,
            next_sync,
            deaths_in_a_row: 0,
            deaths_of_step: (0, 0),
            suspects: None,
            failures_in_a_row: 0,
            records: Records::default(),
            rest_until: None,
        };
        let files = new.options.files;
        new.update(|status| {
            status.version = env!("CARGO_PKG_VERSION").into();
            status.model = new.options.model.clone();
            status.since = now();
            status.weight_version = weight_version;
            status.generation = files.map(|files| files.generation);
            status.cursor = files.map(|files| files.cursor);
            status.step = files.map_or(0, |files| files.step);
        });
        new
    }

    pub(super) fn run(mut self, inbox: &mpsc::Receiver<Event>) {
        loop {
            self.advance();
            self.publish();
            if self.stopping && self.attached.is_none() {
                break;
            }
            let event = match inbox.recv_timeout(self.sleep()) {
                Ok(event) => event,
                Err(mpsc::RecvTimeoutError::Timeout) => continue,
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            };
            self.handle(event);
        }
        self.answer_waiting(&ControlError::Stopping);
        self.catch_up_at_the_end();
        self.tell(What::Stopped);
    }

    /// Tells whoever listens.
    pub(super) fn tell(&self, what: What) {
        self.happenings.tell(self.weight_version(), what);
    }

    /// Until when nothing happens by itself.
    fn sleep(&self) -> Duration {
        let until = match &self.attached {
            None => self.spawn_at.saturating_duration_since(Instant::now()),
            Some(_) => match self.next_sync {
                Some(due) if self.can_send() => (due - Utc::now()).to_std().unwrap_or_default(),
                _ => SLEEP_MAX,
            }
            .min(self.rest().unwrap_or(SLEEP_MAX)),
        };
        let until = self.records.retry_in().map_or(until, |retry| until.min(retry));
        // A child that must give signs of life is looked at as often as it may be silent.
        let watched = self.attached.as_ref().is_some_and(|attached| attached.heard.is_some());
        let most = if watched { SLEEP_MAX.min(self.options.silence_max) } else { SLEEP_MAX };
        until.clamp(Duration::from_millis(1), most)
    }

    /// Plans the rest that the duty cycle asks for after steps of which the first began then.
    pub(super) fn rest_after(&mut self, started: Instant) {
        let share = self.options.duty_cycle;
        self.rest_until = (share < 1.0).then(|| Instant::now() + started.elapsed().mul_f64((1.0 - share) / share));
    }

    /// What is left of the rest.
    fn rest(&self) -> Option<Duration> {
        self.rest_until.map(|until| until.saturating_duration_since(Instant::now())).filter(|rest| !rest.is_zero())
    }

    /// Whether a request can be sent that is alone in flight.
    fn can_send(&self) -> bool {
        self.in_flight.is_none() && self.is_ready()
    }

    fn is_ready(&self) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.ready)
    }

    /// Whether a step can be sent, perhaps after others that have no answer yet.
    fn can_send_step(&self) -> bool {
        let steps = match &self.in_flight {
            None => return self.is_ready(),
            Some(InFlight::Train { steps, .. }) => steps,
            Some(_) => return false,
        };
        let most = match self.options.workers {
            1 => 1,
            workers if self.rests() => workers,
            workers => STEPS_PER_WORKER * workers,
        };
        steps.len() < most && !steps.iter().any(|sent| self.is_suspect(sent.batch.step))
    }

    fn rests(&self) -> bool {
        self.options.duty_cycle < 1.0
    }

    fn is_suspect(&self, step: u64) -> bool {
        self.suspects.as_ref().is_some_and(|suspects| suspects.contains(&step))
    }

    /// Decides what to do next, when something can be done.
    fn advance(&mut self) {
        if self.attached.is_none() && !self.stopping && Instant::now() >= self.spawn_at {
            self.spawn();
        }
        let heard = self.attached.as_ref().and_then(|attached| attached.heard);
        let silence_max = self.options.silence_max;
        if heard.is_some_and(|heard| heard.elapsed() > silence_max) {
            self.kill_child(format!("no sign of life for {silence_max:?}: it was stopped or hangs"));
        }
        if self.stopping && self.attached.as_ref().is_some_and(|attached| !attached.ready) {
            self.lose_child(State::Stopping, "stopped before it was ready".into());
        }
        let writable = self.catch_up();
        if !self.can_send() {
            return self.advance_steps(writable);
        }
        if self.stopping {
            let sync = self.options.sync_on_shutdown && self.unsynced;
            self.send(InFlight::Shutdown, &ToTrainer::Shutdown { sync });
        } else if let Some((from, reply)) = self.wanted_repair.take() {
            self.send(InFlight::Repair { reply }, &ToTrainer::Repair { from });
        } else if let Some((to, reply)) = self.wanted_rollback.take() {
            self.send(InFlight::Rollback { reply }, &ToTrainer::Rollback { to });
        } else if writable && let Some((what, reply)) = self.wanted_forget.take() {
            self.begin_forget(what, reply);
        } else if let Some(WantedSync { reason, waiting }) = self.wanted_sync.take().or_else(|| self.scheduled()) {
            let request = ToTrainer::Sync { reason: reason.clone() };
            self.send(InFlight::Sync { reason, waiting }, &request);
        } else if !(self.scored_last && self.could_step(writable)) && self.send_score() {
            self.scored_last = true;
        } else {
            self.scored_last = false;
            self.advance_steps(writable);
            if self.in_flight.is_none() {
                self.send_score();
            }
        }
    }

    /// Sends what is to be scored, if anybody still waits for it.
    fn send_score(&mut self) -> bool {
        while let Some((examples, reply)) = self.wanted_scores.pop_front() {
            if !reply.is_closed() {
                self.send(InFlight::Score { reply }, &ToTrainer::Score { examples });
                return true;
            }
        }
        false
    }

    /// Sends the steps that can be sent now. Whatever else is wanted comes first, once the steps in flight are answered.
    fn advance_steps(&mut self, writable: bool) {
        if !self.could_step(writable) {
            return;
        }
        if self.rests() && self.in_flight.is_some() {
            // Workers that rest together begin together.
            return;
        }
        while self.can_send_step() && self.rest().is_none() {
            if self.in_flight.is_some() && self.wanted_sync.is_none() {
                self.wanted_sync = self.scheduled();
            }
            if self.something_else_is_wanted() {
                break;
            }
            let Some(batch) = self.next_batch() else { break };
            if self.in_flight.is_some() && self.is_suspect(batch.step) {
                break;
            }
            self.send_step(batch);
        }
    }

    /// Whether something waits for the steps in flight to be answered.
    fn something_else_is_wanted(&self) -> bool {
        self.wanted_sync.is_some()
            || self.wanted_rollback.is_some()
            || self.wanted_repair.is_some()
            || self.wanted_forget.is_some()
            || (!self.wanted_scores.is_empty() && self.in_flight.is_some())
    }

    fn could_step(&self, writable: bool) -> bool {
        writable && self.paused.is_none() && !self.stopping
    }

    fn send_step(&mut self, batch: Batch) {
        let Batch { step, lr, examples } = batch.clone();
        let last = examples.last().map(|example| example.seq);
        self.replay_from = self.replay_from.and(last);
        let sent = Sent { batch, started: Instant::now() };
        let (mut steps, since) = match self.in_flight.take() {
            Some(InFlight::Train { steps, since }) => (steps, since),
            _ => (VecDeque::new(), sent.started),
        };
        steps.push_back(sent);
        self.send(InFlight::Train { steps, since }, &ToTrainer::Train { step, lr, examples });
    }

    /// The sync of the schedule, if one is due and there is something to write.
    fn scheduled(&mut self) -> Option<WantedSync> {
        let due = self.next_sync.is_some_and(|due| due <= Utc::now());
        if !due || self.replay_from.is_some() {
            return None;
        }
        self.next_sync = self.options.schedule.next_after(Utc::now());
        let something = self.unsynced || matches!(self.in_flight, Some(InFlight::Train { .. }));
        something.then(|| WantedSync { reason: "schedule".into(), waiting: Vec::new() })
    }

    fn next_batch(&mut self) -> Option<Batch> {
        if let Some(cursor) = self.replay_from {
            let batch = self.of_queue(|queue| queue.replay(cursor))?;
            if batch.is_some() {
                return batch;
            }
            self.replay_from = None;
            if let Some(sync) = self.scheduled() {
                self.wanted_sync = Some(sync);
                self.events.send(Event::Wake).ok();
                return None;
            }
        }
        let limit = self.options.batch_examples;
        self.of_queue(|queue| queue.take(limit)).flatten()
    }

    fn weight_version(&self) -> u64 {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).weight_version
    }

    /// Why the last trainer found no server, until one does.
    pub(super) fn waits_because(&self) -> Option<&String> {
        self.absent.as_ref().filter(|(state, _)| *state == State::WaitingForServer).map(|(_, reason)| reason)
    }

    fn spawn(&mut self) {
        self.children += 1;
        let number = self.children;
        let events = self.events.clone();
        // The receiver ends with the supervisor; a child's last words are then nobody's.
        let output = move |output| drop(events.send(Event::Child { number, output }));
        match Child::spawn(&self.options.command, self.weight_version(), output) {
            Ok(child) => {
                // While a server is waited for, one is started every second.
                if self.waits_because().is_none() {
                    tracing::info!("trainer {} started", child.pid());
                }
                self.attached = Some(Attached { child, number, ready: false, heard: None, last_word: None });
            }
            Err(error) => {
                let reason = format!("{} cannot be started: {error}", self.options.command.program.display());
                self.back_off(State::Failed, reason);
            }
        }
    }

    pub(super) fn send(&mut self, in_flight: InFlight, request: &ToTrainer) {
        self.in_flight = Some(in_flight);
        let Some(attached) = &mut self.attached else { return };
        if let Err(error) = attached.child.send(request) {
            // Its reader sees the end of its output, which says how it died.
            tracing::warn!("trainer {}: {} could not be sent: {error}", attached.child.pid(), request.kind());
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Wake => {}
            Event::Shutdown => self.stopping = true,
            Event::Pause(true) => drop(self.paused.get_or_insert_with(|| "on request".into())),
            Event::Pause(false) => {
                (self.paused, self.failures_in_a_row) = (None, 0);
                self.record(Queue::record_resumed);
            }
            Event::Sync { reason, reply } => self.want_sync(reason, reply),
            Event::Rollback { to, reply } => self.want_rollback(to, reply),
            Event::Repair { from, reply } => self.want_repair(from, reply),
            Event::Forget { what, reply } => self.want_forget(what, reply),
            Event::Score { examples, reply } => match self.not_ready() {
                Some(error) => answer(Some(reply), Err(error)),
                None if self.wanted_scores.len() >= SCORES_MAX => {
                    answer(Some(reply), Err(ControlError::Busy(SCORES_MAX)));
                }
                None => self.wanted_scores.push_back((examples, reply)),
            },
            Event::Child { number, output } => {
                // What an earlier child still had to say no longer matters.
                if let Some(attached) = self.attached.as_mut().filter(|attached| attached.number == number) {
                    match output {
                        Output::Message(FromTrainer::Alive) => attached.heard = Some(Instant::now()),
                        Output::Message(FromTrainer::Dying { reason }) => attached.last_word = Some(reason),
                        Output::Message(FromTrainer::Invalidated(invalidated)) => self.on_invalidated(invalidated),
                        Output::Message(FromTrainer::Probed(probed)) => self.on_probed(*probed),
                        Output::Message(FromTrainer::Published(published)) => self.on_published(published),
                        output => self.hear(output),
                    }
                }
            }
        }
    }

    fn not_ready(&self) -> Option<ControlError> {
        if self.stopping {
            return Some(ControlError::Stopping);
        }
        let ready = self.attached.as_ref().is_some_and(|attached| attached.ready);
        let (state, detail) = self.state();
        (!ready).then_some(ControlError::NotReady { state, detail })
    }

    fn want_sync(&mut self, reason: String, reply: Option<Reply<Synced>>) {
        if let Some(error) = self.not_ready() {
            answer(reply, Err(error));
        } else if let Some(InFlight::Sync { waiting, .. }) = &mut self.in_flight {
            waiting.extend(reply);
        } else {
            let wanted = self.wanted_sync.get_or_insert_with(|| WantedSync { reason, waiting: Vec::new() });
            wanted.waiting.extend(reply);
        }
    }

    fn want_rollback(&mut self, to: u64, reply: Reply<RolledBack>) {
        let error = self.not_ready().or_else(|| {
            let busy = self.wanted_rollback.is_some() || matches!(self.in_flight, Some(InFlight::Rollback { .. }));
            busy.then(|| ControlError::Failed("another rollback is under way".into()))
        });
        match error {
            Some(error) => answer(Some(reply), Err(error)),
            None => self.wanted_rollback = Some((to, reply)),
        }
    }

    fn want_forget(&mut self, what: Forget, reply: Reply<Forgotten>) {
        let error = self.not_ready().or_else(|| {
            let busy = self.wanted_forget.is_some() || matches!(self.in_flight, Some(InFlight::Forget { .. }));
            busy.then_some(ControlError::Busy(1))
        });
        match error {
            Some(error) => answer(Some(reply), Err(error)),
            None => self.wanted_forget = Some((what, reply)),
        }
    }

    fn want_repair(&mut self, from: Vec<PathBuf>, reply: Reply<Repaired>) {
        let error = self.not_ready().or_else(|| {
            let busy = self.wanted_repair.is_some() || matches!(self.in_flight, Some(InFlight::Repair { .. }));
            busy.then(|| ControlError::Failed("another repair is under way".into()))
        });
        match error {
            Some(error) => answer(Some(reply), Err(error)),
            None => self.wanted_repair = Some((from, reply)),
        }
    }

    /// Kills a child that can no longer be trusted, at once: it may be writing to the weights.
    pub(super) fn kill_child(&mut self, reason: String) {
        self.lose_child_within(Duration::ZERO, State::Failed, reason);
    }

    /// Ends the child, or takes note of its end, and plans the next one. An empty reason stands for how it ended.
    pub(super) fn lose_child(&mut self, state: State, reason: String) {
        self.lose_child_within(END_PATIENCE, state, reason);
    }

    fn lose_child_within(&mut self, patience: Duration, state: State, reason: String) {
        let Some(attached) = self.attached.take() else {
            return self.back_off(state, reason);
        };
        let was_told = !reason.is_empty() && state == State::Failed;
        let pid = attached.child.pid();
        let end = attached.child.end(patience);
        let reason = match (reason.is_empty(), was_told) {
            (true, _) => {
                let why = attached.last_word.map_or_else(String::new, |word| format!(": {word}"));
                format!("trainer {pid} ended: {end}{why}")
            }
            (false, true) => format!("trainer {pid}: {reason}"),
            (false, false) => reason,
        };
        if let (State::Failed, Some(InFlight::Train { steps, .. })) = (state, &self.in_flight)
            && let (Some(first), Some(last)) = (steps.front(), steps.back())
        {
            let (first, last) = (first.batch.step, last.batch.step);
            self.suspects = Some(first..=last);
            // Of several, any may be to blame: each will be alone the next time.
            if first == last {
                self.note_death_of_step(first, &reason);
            }
        }
        self.answer_waiting(&ControlError::Lost(reason.clone()));
        if state == State::Stopping {
            tracing::info!("{reason}");
            return;
        }
        self.back_off(state, reason);
    }

    /// Counts the trainers that died on a step and gives it up when they were too many.
    fn note_death_of_step(&mut self, step: u64, reason: &str) {
        let deaths = if self.deaths_of_step.0 == step { self.deaths_of_step.1 + 1 } else { 1 };
        self.deaths_of_step = (step, deaths);
        if deaths >= DEATHS_MAX {
            let reason = format!("{deaths} trainers in a row died on this step; the last: {reason}");
            tracing::error!("step {step} is given up: {reason}");
            self.record_failed(step, reason);
        }
    }

    fn back_off(&mut self, state: State, reason: String) {
        let delay = match state {
            State::WaitingForServer => self.options.server_delay,
            _ => {
                self.deaths_in_a_row += 1;
                let doublings = self.deaths_in_a_row.saturating_sub(2).min(16);
                let delay = self.options.restart_delay.saturating_mul(1 << doublings).min(RESTART_DELAY_MAX);
                tracing::error!("{reason}");
                self.update(|status| {
                    status.restarts += 1;
                    status.last_restart = Some(reason.clone());
                });
                if self.deaths_in_a_row == 1 { Duration::ZERO } else { delay }
            }
        };
        self.spawn_at = Instant::now() + delay;
        self.absent = Some((state, reason));
        (self.replay_from, self.in_flight) = (None, None);
    }

    /// Tells everybody who waits for an outcome that there will be none.
    fn answer_waiting(&mut self, error: &ControlError) {
        let mut syncs = self.wanted_sync.take().map(|wanted| wanted.waiting).unwrap_or_default();
        let mut rollbacks: Vec<_> = self.wanted_rollback.take().map(|(_, reply)| reply).into_iter().collect();
        let mut repairs: Vec<_> = self.wanted_repair.take().map(|(_, reply)| reply).into_iter().collect();
        let mut forgets: Vec<_> = self.wanted_forget.take().map(|(_, reply)| reply).into_iter().collect();
        let mut scores: Vec<_> = self.wanted_scores.drain(..).map(|(_, reply)| reply).collect();
        match self.in_flight.take() {
            Some(InFlight::Score { reply }) => scores.push(reply),
            Some(InFlight::Forget { reply, .. }) => forgets.push(reply),
            Some(InFlight::Sync { waiting, .. }) => syncs.extend(waiting),
            Some(InFlight::Rollback { reply }) => rollbacks.push(reply),
            Some(InFlight::Repair { reply }) => repairs.push(reply),
            _ => {}
        }
        syncs.into_iter().for_each(|reply| answer(Some(reply), Err(error.clone())));
        rollbacks.into_iter().for_each(|reply| answer(Some(reply), Err(error.clone())));
        repairs.into_iter().for_each(|reply| answer(Some(reply), Err(error.clone())));
        forgets.into_iter().for_each(|reply| answer(Some(reply), Err(error.clone())));
        let unanswered = match error {
            ControlError::Lost(_) if self.stopping => ControlError::Stopping,
            ControlError::Lost(reason) => ControlError::Unanswered(reason.clone()),
            error => error.clone(),
        };
        scores.into_iter().for_each(|reply| answer(Some(reply), Err(unanswered.clone())));
    }

    /// What the daemon is doing, and why where that needs saying.
    fn state(&self) -> (State, Option<String>) {
        if self.stopping {
            return (State::Stopping, None);
        }
        let ready = self.attached.as_ref().is_some_and(|attached| attached.ready);
        match (&self.absent, ready, &self.in_flight) {
            (Some((state, reason)), false, _) => (*state, Some(reason.clone())),
            (None, false, _) => (State::Starting, None),
            (_, _, Some(InFlight::Train { .. })) => (State::Training, None),
            (_, _, Some(InFlight::Sync { reason, .. })) => (State::Syncing, Some(reason.clone())),
            (_, _, Some(InFlight::Rollback { .. } | InFlight::Forget { .. })) => (State::RollingBack, None),
            (_, _, Some(InFlight::Repair { .. })) => (State::Repairing, None),
            (_, _, Some(InFlight::Score { .. })) => (State::Scoring, None),
            (_, _, Some(InFlight::Shutdown)) => (State::Stopping, None),
            (_, _, None) => match (&self.paused, self.records.fault()) {
                (Some(why), _) => (State::Paused, Some(why.clone())),
                (None, Some(fault)) => (State::WaitingForQueue, Some(fault.clone())),
                (None, None) => (State::Idle, self.rest().map(|_| "rests after a step (train.duty_cycle)".into())),
            },
        }
    }

    fn publish(&self) {
        let (state, detail) = self.state();
        let trainer_pid = self.attached.as_ref().map(|attached| attached.child.pid());
        let next_sync = self.next_sync.map(|due| due.to_rfc3339_opts(SecondsFormat::Secs, true));
        let replaying = self.replay_from.is_some() && matches!(self.in_flight, Some(InFlight::Train { .. }));
        let ready = self.attached.as_ref().is_some_and(|attached| attached.ready);
        self.update(|status| {
            // The next trainer begins where the files are.
            status.replayed_from = if ready { self.replay_from } else { Some(status.cursor.unwrap_or(0)) };
            if status.state != state {
                status.since = now();
            }
            (status.state, status.detail) = (state, detail);
            status.paused = self.paused.clone();
            (status.trainer_pid, status.next_sync, status.replaying) = (trainer_pid, next_sync, replaying);
            status.warning = status.reason_to_warn();
        });
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

pub(super) fn answer<T>(reply: Option<Reply<T>>, outcome: Result<T, ControlError>) {
    if let Some(reply) = reply {
        // Whoever asked may have gone; the outcome is in the status too.
        let _ = reply.send(outcome);
    }
}

pub(super) fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true)
}
