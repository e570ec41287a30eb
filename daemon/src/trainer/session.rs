//! One attachment from start to end: attach, restore, train, sync, roll back.

use super::hold::{hold, released};
use super::live::Live;
use super::prefix_cache::PrefixCache;
use super::probes::Watched;
use super::restore::Attached;
use super::shadow::{self, Finding};
use super::start::{self, Start, StartError};
use super::workers::{Computed, Done, Step, Worker};
use super::{repair, restore, settings};
use crate::backend::Backend;
use crate::config::{Activations, SyncMode, Update};
use crate::protocol::{
    Budget, Cause, ExampleResult, FromTrainer, Harmed, Invalidated, Probed, Published, Ready, Request, RolledBack,
    Scored, Scoring, Synced, ToTrainer, Trained, Work,
};
use crate::weights;
use anyhow::{Result, bail};
use apollo::{Gates, Optimizer, Rule};
use checkpoint::{Checkpoint, Progress};
use compute::Dtype;
use ipc::{Attachment, ControlError, Invalidation, SafetensorsDir, Source};
use model::{Example, Model, Report};
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often an idle trainer asks the server for a sign of life, and how long it waits for it.
const PING: Duration = Duration::from_secs(1);

/// Live weights, their optimizer and their checkpoint.
pub struct Session<D: Backend> {
    device: Arc<D>,
    attachment: Arc<Attachment>,
    model: Arc<Model<D>>,
    optimizer: Optimizer<D>,
    gates: Gates,
    lr: f32,
    checkpoint: Checkpoint,
    /// Element type of each tensor in the files.
    file_dtypes: Vec<Dtype>,
    /// Name of the head that the files hold although it is the embedding; it is written along.
    head_copy: Option<String>,
    /// Of the live weights; becomes the next generation's.
    progress: Progress,
    recovery: String,
    update: Update,
    prefix_cache: PrefixCache,
    shadow_check: Option<String>,
    warnings: Vec<String>,
    pinged: Instant,
    /// Whether each generation gets a directory of its own, and whether the current one may still need it.
    mode: SyncMode,
    unpublished: bool,
    budget: Budget,
    /// Of the hashes that tell a sync what has changed, where the weights are hashed.
    hash_seed: u64,
    /// The guard, if there is one, and how its probes did at the start.
    watched: Option<Watched<D>>,
    probed: Option<Probed>,
    /// Why live weights or optimizer are not those of the files, after a rollback that was made of the files alone.
    stranded: Option<String>,
}

impl<D: Backend> Session<D> {
    /// Brings live weights and optimizer to the last generation; with a worker on each of the devices, which are one
    /// machine's. Nothing is written to live weights before everything was checked.
    pub fn open(start: Start, devices: Vec<Arc<D>>) -> Result<(Session<D>, Vec<Worker<D>>), StartError> {
        let device = devices[0].clone();
        let Start { config, told, model: model_config, mut tensors, mut checkpoint, recovery, attachment, probes } =
            start;
        start::same_directory(attachment.model_dir(), &config.model.dir)?;
        start::can_be_held(config.server.update, &attachment)?;
        let mut warnings = start::damaged_documents(&checkpoint)?;
        let mut prefix_cache = start::prefix_cache(&config.server, &attachment, &mut warnings);

        let files = SafetensorsDir::open(&config.model.dir)?;
        let head_copy = ipc::tied_head_copy(&files, model_config.decoder.tied)?;
        let longest = settings::longest(&model_config, &config.train);
        let model = Model::new(device.clone(), model_config, D::attached(&device, &attachment), longest);
        let model = Arc::new(model.rounding_windows(config.train.activations == Activations::Bf16));
        let mut cache = model.cache(longest);
        let mut recovery = vec![recovery];
        let optimizer_settings = settings::optimizer_settings(&*device, &config.train)?;
        let names: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
        let file_dtypes = weights::file_dtypes(&files, &names)?;
        recovery.extend(start::freeze_widened(&mut tensors, &model, &file_dtypes)?);
        let known = restore::known_epoch(&config.state_dir(), attachment.epoch())?;
        if known.is_some() {
            let bytes = restore_all(&checkpoint, &tensors, &model, &file_dtypes)?;
            if bytes > 0 {
                recovery.push(format!("{bytes} bytes of live weights restored from the files"));
            }
            // The last trainer may have died before it could say that weights had moved.
            prefix_cache.moved();
        } else {
            restore::require_equal(&*device, &checkpoint, &names, model.weights(), &file_dtypes)?;
        }
        // A live copy keeps its epoch when another server maps it, and that one is to be asked too.
        let lasting = !matches!(attachment.source(), Source::Staged(_));
        let mut shadow_check = known.as_ref().filter(|_| lasting).and_then(|known| known.shadow_check.clone());
        let mut unchecked = None;
        if shadow_check.is_none() {
            let url = config.server.url.as_deref();
            match device.run(|| shadow::check(&model, &mut cache, &attachment, url))? {
                Finding::Agrees(figures) => shadow_check = Some(figures),
                Finding::NoWay(how) => unchecked = Some(how),
            }
            let attached = Attached { epoch: attachment.epoch().into(), shadow_check: shadow_check.clone() };
            restore::remember_epoch(&config.state_dir(), &attached)?;
        }

        let generation = checkpoint.current().generation;
        let begin = |probes| Watched::begin(config, probes, generation, &model, &attachment);
        let watched = probes.map(begin).transpose().map_err(|error| match error.downcast::<ipc::Gone>() {
            Ok(gone) => StartError::ServerGone(gone.to_string()),
            Err(error) => StartError::Failed(error),
        })?;
        let (watched, probed) = watched.unzip();
        let wanted: Vec<bool> = tensors.iter().map(|t| t.effective_rule() != Rule::Frozen).collect();
        let mut caches = std::iter::once(cache).chain(std::iter::repeat_with(|| model.cache(longest)));
        let worker = |device: Arc<D>| {
            let mut cache = caches.next().expect("there is no end of them");
            cache.keep_prefixes(settings::prefix_limits(&config.train));
            let (attachment, model, extent) = (attachment.clone(), model.clone(), settings::extent(&config.train));
            Worker { device, attachment, model, cache, extent, wanted: wanted.clone() }
        };
        let workers: Vec<Worker<D>> = devices.into_iter().map(worker).collect();
        let mut optimizer = Optimizer::new(device.clone(), tensors, optimizer_settings);
        recovery.extend(load_state(&mut optimizer, &checkpoint)?);
        // Every tensor was compared with the files or restored from them.
        let hash_seed = RandomState::new().hash_one(std::process::id());
        checkpoint.assume_equal(&Live::new(&model, &optimizer, head_copy.as_deref(), hash_seed));
        let mut progress = Progress { epoch: attachment.epoch().into(), ..checkpoint.current().progress.clone() };
        if told > progress.weight_version {
            // Weights of that version are gone; these are older ones again, which no version has named so far.
            progress.weight_version = told + 1;
        }
        let session = Session {
            gates: settings::gates(&config.train),
            lr: config.train.lr as f32,
            recovery: recovery.join("; "),
            update: config.server.update,
            pinged: Instant::now(),
            mode: config.sync.mode,
            unpublished: true,
            budget: settings::budget(&config.train)?,
            hash_seed,
            stranded: None,
            watched,
            probed,
            device,
            attachment,
            model,
            optimizer,
            checkpoint,
            file_dtypes,
            head_copy,
            progress,
            prefix_cache,
            shadow_check: shadow_check.or(unchecked),
            warnings,
        };
        Ok((session, workers))
    }

    /// The first answer.
    pub fn ready(&self) -> Ready {
        let count = |only_trained: bool| -> u64 {
            let counted =
                self.optimizer.tensors().iter().filter(|t| !only_trained || t.effective_rule() != Rule::Frozen);
            counted.map(|t| (t.rows * t.cols) as u64).sum()
        };
        Ready {
            epoch: self.attachment.epoch().into(),
            server_pid: self.attachment.pid(),
            generation: self.checkpoint.current().generation,
            cursor: self.progress.cursor,
            step: self.progress.step,
            weight_version: self.progress.weight_version,
            parameters: count(false),
            trainable: count(true),
            recovery: self.recovery.clone(),
            server: self.attachment.server_program().map(ToString::to_string),
            shadow_check: self.shadow_check.clone(),
            warnings: self.warnings.clone(),
            budget: Some(self.budget.clone()),
            probed: self.probed.clone().map(Box::new),
        }
    }

    /// What an idle trainer looks at: whether the server is still there and holds the same weights, in words if not.
    pub fn look(&mut self) -> Result<(), String> {
        if self.pinged.elapsed() >= PING {
            self.pinged = Instant::now();
            // A server that is busy is not gone.
            if let Err(ControlError::Gone(gone)) = self.attachment.ping(PING) {
                return Err(gone.to_string());
            }
        }
        self.check()
    }

    /// Tells the server that weights have moved, when that is due, or at the end if it still is to be said.
    pub fn invalidate(&mut self, at_the_end: bool) -> Option<FromTrainer> {
        let now = Instant::now();
        let how = if at_the_end { self.prefix_cache.pending() } else { self.prefix_cache.due(now) }?;
        let outcome = self.attachment.invalidate(how);
        self.prefix_cache.tried(now, outcome.is_ok());
        let (done, failed) = match outcome {
            Ok(Invalidation::Reset) => (Some("reset".into()), None),
            Ok(Invalidation::Salt) => (Some("salt".into()), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Some(FromTrainer::Invalidated(Invalidated { weight_version: self.progress.weight_version, done, failed }))
    }

    /// Makes a directory of its own of a generation that has none, where that is configured.
    pub fn publish(&mut self) -> Option<FromTrainer> {
        if !std::mem::take(&mut self.unpublished) || self.mode == SyncMode::InPlace {
            return None;
        }
        let generation = self.checkpoint.current().generation;
        let none = Published { generation, directory: None, bytes_copied: 0, seconds: 0.0, failed: None };
        Some(FromTrainer::Published(match self.checkpoint.publish() {
            Ok(done) => {
                tracing::info!("{done}");
                let directory = Some(done.path.display().to_string());
                Published { directory, bytes_copied: done.bytes_copied, seconds: done.seconds, ..none }
            }
            Err(error) => Published { failed: Some(error.to_string()), ..none },
        }))
    }

    /// Whether the server is still there, in words if not.
    fn check(&self) -> Result<(), String> {
        self.attachment.check().map_err(|gone| gone.to_string())?;
        if self.attachment.pid().is_none() {
            // A staged copy: a server may have mapped it by now. That it has not is no reason to stop.
            self.attachment.refresh_server().map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// Why a new process has to open the directory again, if it does: only recovery knows what is in the files then, or
    /// only a new start brings live weights and optimizer to the files.
    pub fn broken(&self) -> Option<String> {
        self.stranded.clone().or_else(|| self.checkpoint.unusable().map(str::to_owned))
    }

    /// Does what is asked, other than to train; `None` where the protocol has no answer, and where this process is to end
    /// in its place.
    pub fn answer(&mut self, request: &ToTrainer) -> Option<FromTrainer> {
        let needs_server =
            matches!(request, ToTrainer::Rollback { .. } | ToTrainer::Repair { .. } | ToTrainer::Score { .. });
        if let (true, Err(reason)) = (needs_server, self.check()) {
            return Some(FromTrainer::ServerGone { reason });
        }
        let result = match request {
            ToTrainer::Train { .. } => unreachable!("steps have a line of their own"),
            ToTrainer::Sync { reason } => self.sync(reason),
            ToTrainer::Rollback { to } => self.rollback(*to),
            ToTrainer::Repair { from } => self.repair(from),
            ToTrainer::Score { examples } => self.score(examples),
            ToTrainer::Shutdown { sync: true } => self.sync("shutdown"),
            ToTrainer::Shutdown { sync: false } => return None,
        };
        if let (Some(_), Err(error)) = (&self.stranded, &result) {
            tracing::error!("{error:#}");
            return None;
        }
        Some(answer_of(request.kind(), result))
    }

    /// Makes the one update of a step that was computed, or none; on the threads of `device`.
    pub fn apply(&mut self, device: &D, done: Done<D>) -> FromTrainer {
        if let Err(reason) = self.check() {
            return FromTrainer::ServerGone { reason };
        }
        let Done { step, computed, staleness } = done;
        answer_of(Request::Train, computed.and_then(|computed| self.update(device, &step, &computed, staleness)))
    }

    fn update(&mut self, device: &D, step: &Step, computed: &Computed<D>, staleness: u64) -> Result<FromTrainer> {
        let (Step { number, lr, work }, Computed { gradients, reports, timings }) = (step, computed);
        let tokens: usize = reports.iter().map(|r| r.tokens).sum();
        let loss = (reports.iter().map(|r| r.loss_sum).sum::<f64>() / tokens as f64) as f32;
        let weight = if work.len() == 1 { work[0].weight } else { 1.0 };
        let lr_scale = weight * lr.map_or(1.0, |lr| lr / self.lr);

        let clock = Instant::now();
        let prepared =
            device.run(|| self.optimizer.prepare(self.model.weights(), gradients, loss, lr_scale, &self.gates));
        let mut update_ms = ms(clock);
        let mut held_for = None;
        let skipped = match prepared {
            Ok(prepared) => {
                self.attachment.check()?;
                let held = hold(&self.attachment, self.update)?;
                let clock = Instant::now();
                device.run(|| self.optimizer.commit(self.model.weights(), prepared));
                device.synchronize();
                update_ms += ms(clock);
                self.progress.weight_version += 1;
                self.prefix_cache.moved();
                held_for = held.map(|(held, since)| released(held, since));
                None
            }
            Err(why) => Some(why.to_string()),
        };
        let finite = |loss: f32| Some(loss).filter(|l| l.is_finite());
        self.progress.cursor = work.last().expect("a step has examples").seq;
        self.progress.step = *number;
        self.progress.examples += work.len() as u64;
        self.progress.loss = finite(loss).or(self.progress.loss);
        let result =
            |(w, r): (&Work, &Report)| ExampleResult { seq: w.seq, loss: finite(r.loss()), tokens: r.tokens as u64 };
        Ok(FromTrainer::Trained(Trained {
            step: *number,
            examples: work.iter().zip(reports).map(result).collect(),
            loss: finite(loss),
            weight_version: self.progress.weight_version,
            server_pid: self.attachment.pid(),
            skipped,
            prefill_ms: timings.prefill_ms,
            forward_ms: timings.forward_ms,
            backward_ms: timings.backward_ms,
            update_ms,
            hold: held_for,
            staleness,
        }))
    }

    fn sync(&mut self, reason: &str) -> Result<FromTrainer> {
        let looked = self.watched.as_mut().map(Watched::look).transpose()?;
        if let Some((_, probed, Some(harm))) = looked {
            tracing::error!("{harm}");
            let (applied, restored) = (self.progress.cursor, self.take_back().map_err(|error| format!("{error:#}")));
            return Ok(FromTrainer::Harmed(Box::new(Harmed { reason: harm, probed, applied, restored })));
        }
        let live = Live::new(&self.model, &self.optimizer, self.head_copy.as_deref(), self.hash_seed);
        let optimizer = &self.optimizer;
        let report =
            self.checkpoint.sync(&live, &mut |out| optimizer.save(out), self.progress.clone(), &mut |_, _| {})?;
        drop(live);
        self.optimizer.forget_written();
        tracing::info!(reason, "{report}");
        start::tell_pruned(&mut self.checkpoint);
        self.unpublished = true;
        let mut probed = None;
        if let (Some(watched), Some((losses, now, None))) = (&mut self.watched, looked) {
            // The sync is made; that the guard could not note it costs no more than a look at the next start.
            watched.accept(report.generation, &losses).unwrap_or_else(|error| tracing::warn!("{error:#}"));
            probed = Some(Box::new(now));
        }
        Ok(FromTrainer::Synced(Synced {
            directory_failed: None,
            probed,
            generation: report.generation,
            cursor: self.progress.cursor,
            blocks_total: report.blocks_total,
            blocks_changed: report.blocks_changed,
            bytes_written: report.bytes_written,
            bytes_journal: report.bytes_journal,
            seconds: report.seconds,
            unchanged: report.unchanged,
        }))
    }

    /// Log-probabilities on the live weights, which are read only.
    fn score(&self, examples: &[Scoring]) -> Result<FromTrainer> {
        let examples: Vec<Example> = examples
            .iter()
            .map(|scoring| {
                let example = Example::new(scoring.ids.clone(), scoring.spans.clone())?;
                self.model.check(&example).map(|()| example)
            })
            .collect::<Result<_, _>>()?;
        let longest = examples.iter().map(|example| example.ids().len()).max().unwrap_or(1);
        let mut cache = self.model.cache(longest);
        let mut logprobs = Vec::with_capacity(examples.len());
        for example in &examples {
            // A server that ends takes the weights with it.
            self.attachment.check()?;
            let losses = self.device.run(|| self.model.losses(&mut cache, example));
            logprobs.push(losses.iter().map(|loss| Some(-loss).filter(|l| l.is_finite())).collect());
        }
        Ok(FromTrainer::Scored(Scored { weight_version: self.progress.weight_version, logprobs }))
    }

    /// Live weights are read only: they are what they are, and the files are what is damaged.
    fn repair(&mut self, copies: &[PathBuf]) -> Result<FromTrainer> {
        let device = self.model.device();
        let held = repair::Held::new(&**device, self.model.tensors(), self.model.weights(), &self.file_dtypes);
        let report = self.checkpoint.repair(&checkpoint::Sources { live: Some(&held), copies })?;
        tracing::info!("{report}");
        Ok(FromTrainer::Repaired(repair::told(&report)))
    }

    /// Files first, by the journal; then live weights and optimizer follow them.
    fn rollback(&mut self, to: u64) -> Result<FromTrainer> {
        let report = self.checkpoint.rollback(to)?;
        let no_longer = start::tell_pruned(&mut self.checkpoint);
        self.unpublished = true;
        self.prefix_cache.moved();
        if let Err(error) = self.follow_files() {
            let files = match report.sync.unchanged {
                true => format!("the files are at generation {to}, as before, what came after is trained again"),
                false => format!("the files are rolled back to {to}"),
            };
            let why = format!("{files}, and live weights could not follow them: {error:#}");
            self.stranded = Some(why);
            return Err(error);
        }
        tracing::info!("{report}");
        Ok(FromTrainer::RolledBack(self.rolled_back(to, no_longer)))
    }

    fn rolled_back(&self, to: u64, no_longer: Vec<u64>) -> RolledBack {
        RolledBack {
            generation: self.checkpoint.current().generation,
            to,
            cursor: self.progress.cursor,
            step: self.progress.step,
            weight_version: self.progress.weight_version,
            no_longer,
        }
    }

    /// Live weights, optimizer and progress become those of the last sync. No file is written, so nobody who loads the model is
    /// in the way; but what is in the files is checked before it is written over live weights.
    fn take_back(&mut self) -> Result<RolledBack> {
        let report = self.checkpoint.verify()?;
        if !report.is_ok() {
            bail!("the files are damaged: {report}; `apollod checkpoint repair` puts them right");
        }
        self.prefix_cache.moved();
        if let Err(error) = self.follow_files() {
            self.stranded = Some(format!("what harmed the model could not be taken back: {error:#}"));
            return Err(error);
        }
        Ok(self.rolled_back(self.checkpoint.current().generation, Vec::new()))
    }

    /// How the probes do after a rollback: whoever wants that generation has it, however it does.
    pub fn probe_again(&mut self) -> Result<Option<FromTrainer>> {
        let (generation, watched) = (self.checkpoint.current().generation, self.watched.as_mut());
        watched.map(|watched| Ok(FromTrainer::Probed(Box::new(watched.begin_again(generation)?)))).transpose()
    }

    /// Live weights, optimizer and progress become those of the current generation. On an error they are nobody's.
    fn follow_files(&mut self) -> Result<()> {
        restore_all(&self.checkpoint, self.optimizer.tensors(), &self.model, &self.file_dtypes)?;
        let settings = self.optimizer.settings().clone();
        self.optimizer = Optimizer::new(self.device.clone(), self.optimizer.tensors().to_vec(), settings);
        load_state(&mut self.optimizer, &self.checkpoint)?;
        let head_copy = self.head_copy.as_deref();
        self.checkpoint.assume_equal(&Live::new(&self.model, &self.optimizer, head_copy, self.hash_seed));
        // Weights moved once more, so the version goes on rising.
        let weight_version = self.progress.weight_version + 1;
        let epoch = self.attachment.epoch().into();
        self.progress = Progress { weight_version, epoch, ..self.checkpoint.current().progress.clone() };
        Ok(())
    }
}

/// What is said of an outcome.
fn answer_of(request: Request, outcome: Result<FromTrainer>) -> FromTrainer {
    outcome.unwrap_or_else(|error| match error.downcast::<ipc::Gone>() {
        Ok(gone) => FromTrainer::ServerGone { reason: gone.to_string() },
        Err(error) => FromTrainer::Failed { request, reason: format!("{error:#}"), cause: cause_of(&error) },
    })
}

/// The last word of a trainer that cannot go on.
pub fn end_of(error: anyhow::Error) -> FromTrainer {
    match error.downcast::<ipc::Gone>() {
        Ok(gone) => FromTrainer::ServerGone { reason: gone.to_string() },
        Err(error) => FromTrainer::Dying { reason: format!("{error:#}") },
    }
}

fn cause_of(error: &anyhow::Error) -> Cause {
    use checkpoint::Error::{Full, Interrupted, Readers, TooLittleSpace};
    let error = match error.downcast_ref() {
        Some(Interrupted { source, .. }) => Some(&**source),
        error => error,
    };
    match error {
        Some(Full { .. } | TooLittleSpace { .. }) => Cause::NoRoom,
        Some(Readers { .. }) => Cause::Readers,
        _ => Cause::Other,
    }
}

fn ms(clock: Instant) -> f64 {
    clock.elapsed().as_secs_f64() * 1e3
}

/// Brings every tensor to the files' bytes, also one that is frozen now; how many bytes that took.
fn restore_all<D: Backend>(
    checkpoint: &Checkpoint,
    tensors: &[apollo::Tensor],
    model: &Model<D>,
    files: &[Dtype],
) -> Result<u64> {
    let each = tensors.iter().zip(model.weights()).zip(files);
    each.map(|((tensor, weight), files)| restore::restore(&**model.device(), checkpoint, &tensor.name, weight, *files))
        .sum()
}

/// Takes over the optimizer state of the current generation; what there is to say about it.
fn load_state<D: Backend>(optimizer: &mut Optimizer<D>, checkpoint: &Checkpoint) -> Result<Option<String>> {
    let Some(mut state) = checkpoint.state()? else { return Ok(None) };
    let restored = optimizer.load(&mut state)?;
    let mut said = format!("optimizer state of {} steps restored", restored.steps);
    let of_some = |tensors: &[String]| format!("{} tensors ({}, ...)", tensors.len(), tensors[0]);
    if !restored.reset.is_empty() {
        said += &format!("; fresh moments for {} whose rank or rule changed", of_some(&restored.reset));
    }
    if !restored.converted.is_empty() {
        let dtype = optimizer.settings().moments.to_string().to_ascii_lowercase();
        said += &format!("; moments of {} converted to {dtype}", of_some(&restored.converted));
    }
    Ok(Some(said))
}
