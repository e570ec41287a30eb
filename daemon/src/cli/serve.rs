//! `apollod serve`: everything but the training itself, which is the trainer child's.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{ConfigArgs, LogFormat};
use crate::client;
use crate::config::{Config, TrainConfig};
use crate::dream;
use crate::durable;
use crate::examples::Templates;
use crate::guard;
use crate::http::{App, router};
use crate::queue::Queue;
use crate::schedule::Schedule;
use crate::signals::StopSignals;
use crate::supervisor::{self, ChildCommand};
use crate::trainer;

/// How long open connections may take once the trainer is done.
const CONNECTIONS_PATIENCE: Duration = Duration::from_secs(2);

/// How long the lock of a daemon that was killed is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// The copy of the guard's probes in the state directory.
const PROBES: &str = "probes.jsonl";

/// `apollod serve`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  apollod serve --config apollod.toml
  apollod serve --set model.dir=./model --set server.live=/dev/shm/live --set server.prefix_cache=ignore
  apollod serve --set model.dir=./model --set server.socket=/tmp/vllm.sock --set server.url=http://127.0.0.1:8000
  curl -s localhost:8844/v1/examples -d '{\"context\": \"2 + 2 = \", \"decision\": \"4\"}'
  curl -sN localhost:8844/v1/events

The first line on stdout is JSON: where it listens and its process id.
GET /v1/events streams what happens, GET /metrics is for Prometheus.
Stops on SIGTERM or Ctrl-C after the step in flight and a last sync (sync.on_shutdown); a second signal stops at once.")]
pub struct ServeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Program to start as the trainer instead of this one, for tests of the supervisor.
    #[arg(long, hide = true, value_name = "PROGRAM")]
    trainer: Option<PathBuf>,
}

/// Serves until told to stop.
pub fn run(args: &ServeArgs, log_format: LogFormat) -> Result<ExitCode> {
    let mut config = args.config.load()?;
    let state_dir = config.state_dir();
    std::fs::create_dir_all(&state_dir).with_context(|| format!("cannot create {}", state_dir.display()))?;
    let _lock = lock(&client::lock_file(&config.model.dir))?;
    // Left by a daemon that was killed; with the lock held, an address that is there is this daemon's.
    let _ = std::fs::remove_file(client::address_file(&config.model.dir));

    copy_probes(&mut config)?;
    // Another trainer's model may be anything.
    let longest = if args.trainer.is_some() { config.train.max_tokens } else { check(&config)? };
    let asked = config.train.max_tokens;
    // The default is nobody's wish.
    if longest < asked && asked != TrainConfig::default().max_tokens {
        tracing::warn!(
            "train.max_tokens is {asked} and the model has {longest} positions: longer examples are refused"
        );
    }
    let templates = Templates::load(&config.model.dir, longest)?;
    let queue = Arc::new(Queue::open(&config.queue_path(), config.queue.capacity)?);
    let refused = queue.refuse_longer_than(longest)?;
    if refused > 0 {
        tracing::warn!("{refused} waiting examples are longer than {longest} tokens and were refused");
    }
    let options = supervisor::Options {
        command: trainer_command(args, &config, log_format)?,
        model: config.model.dir.display().to_string(),
        batch_examples: config.train.batch_examples,
        workers: config.train.workers,
        duty_cycle: config.train.duty_cycle,
        schedule: Schedule::parse(&config.sync.schedule, &config.sync.timezone)?,
        sync_on_shutdown: config.sync.on_shutdown,
        restart_delay: Duration::from_secs(1),
        server_delay: Duration::from_secs(1),
        queue_delay: Duration::from_secs(5),
        files: files(&config.model.dir),
        silence_max: Duration::from_secs(30),
    };

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(config.http.listen)
            .await
            .with_context(|| format!("cannot listen on {} (http.listen)", config.http.listen))?;
        let address = listener.local_addr()?;
        let mut signals = StopSignals::new()?;
        let (handle, thread) = supervisor::start(options, Arc::clone(&queue))?;
        let app = App {
            queue,
            templates: Arc::new(templates),
            supervisor: handle.clone(),
            model_dir: config.model.dir.clone(),
            config: Arc::new(config.http.clone()),
        };
        let address_file = client::address_file(&config.model.dir);
        write_private(&address_file, &format!("http://{address}\n"))?;
        let dreamer = dream::start(&config, address, handle.clone())?;
        tracing::info!("listening on http://{address}");
        println!("{}", serde_json::json!({ "listening": address.to_string(), "pid": std::process::id() }));

        let (stop, stopped) = tokio::sync::watch::channel(false);
        let mut no_more = stopped.clone();
        let server = axum::serve(listener, router(app)).with_graceful_shutdown(async move {
            // The sender lives as long as the process serves.
            let _ = no_more.wait_for(|stop| *stop).await;
        });
        let server = tokio::spawn(server.into_future());

        signals.next().await;
        tracing::info!("stopping after the step in flight; once more stops at once");
        handle.shutdown();
        if let Some(dreamer) = dreamer {
            tokio::task::spawn_blocking(|| dreamer.end()).await?;
        }
        stop.send_replace(true);
        let joined = tokio::task::spawn_blocking(move || thread.join());
        tokio::select! {
            joined = joined => if joined?.is_err() { bail!("the supervisor panicked; see the log above") },
            () = signals.next() => {
                tracing::warn!("stopped at once; what was not synced is trained again at the next start");
                std::process::exit(130);
            }
        }
        if tokio::time::timeout(CONNECTIONS_PATIENCE, server).await.is_err() {
            tracing::warn!("connections were still open");
        }
        // A stale address would send the next command to whoever listens there then.
        let _ = std::fs::remove_file(&address_file);
        let status = handle.status();
        let last = status.last_sync.filter(|sync| sync.reason == "shutdown");
        if let Some((harmed, reason)) = last.and_then(|sync| Some((sync.harmed, sync.failed?))) {
            match harmed {
                true => bail!("the last sync was not made, and what it would have written is quarantined: {reason}"),
                false => {
                    bail!("the last sync failed, what was not synced is trained again at the next start: {reason}")
                }
            }
        }
        tracing::info!("stopped");
        Ok(ExitCode::SUCCESS)
    })
}

/// What will not get better by trying again, before anything is listened to: an unsupported model, files that are
/// not it, a live copy that is none, rules for tensors that are not there. Returns the longest example in tokens.
fn check(config: &Config) -> Result<usize> {
    let model = model::Config::read(&config.model.dir)?;
    crate::weights::ModelFiles::open(&config.model.dir, &model)?;
    if let Some(live) = &config.server.live
        && ipc::StageMarker::read(live)?.is_none()
    {
        bail!("{} is no live copy: make it with `apollod stage {} {0}`", live.display(), config.model.dir.display());
    }
    if model.decoder.delta_net.is_some() && config.train.prefix_cache_tokens > 0 {
        bail!(
            "train.prefix_cache_tokens: this model has recurrent layers, whose state after a context cannot be cut back to what \
             another begins with; leave it at 0"
        );
    }
    let unmatched = trainer::unmatched_rules(&model, &config.train);
    if !unmatched.is_empty() {
        bail!("train.rules: no tensor of this model matches {}", unmatched.join(", "));
    }
    if config.dream.schedule.is_some() {
        dream::check(config).context("dream.schedule is set, and no dream can be")?;
    }
    if trainer::probes(config, &model)?.is_some() {
        guard::check(&config.state_dir())?;
    }
    Ok(trainer::longest(&model, &config.train))
}

/// Takes a copy of the probes for this daemon's time: a trainer's restart in the middle of the night must not pick up an edit.
fn copy_probes(config: &mut Config) -> Result<()> {
    let Some(probes) = &config.guard.probes else { return Ok(()) };
    let bytes = std::fs::read(probes).with_context(|| format!("guard.probes: cannot read {}", probes.display()))?;
    let state_dir = config.state_dir();
    durable::replace(&state_dir, PROBES, &bytes)
        .with_context(|| format!("guard.probes: cannot copy {} to {}", probes.display(), state_dir.display()))?;
    config.guard.probes = Some(state_dir.join(PROBES));
    Ok(())
}

/// What the files hold, for the status until a trainer says it.
fn files(model_dir: &Path) -> Option<supervisor::Files> {
    match checkpoint::current(model_dir) {
        Ok(current) => current.map(|current| supervisor::Files {
            generation: current.generation,
            cursor: current.progress.cursor,
            step: current.progress.step,
        }),
        Err(error) => {
            tracing::warn!("{error}");
            None
        }
    }
}

/// The trainer runs under a file of its own with the configuration as it is now: a restart in the middle of the night
/// must not pick up an edit.
fn trainer_command(args: &ServeArgs, config: &Config, log_format: LogFormat) -> Result<ChildCommand> {
    let file = config.state_dir().join("trainer.toml");
    write_private(&file, &config.for_trainer().to_toml())?;
    let mut command = ChildCommand::of_this_program(&file)?;
    if log_format == LogFormat::Json {
        command.arguments.extend(["--log-format".into(), "json".into()]);
    }
    if let Some(program) = &args.trainer {
        command.program = program.clone();
    }
    Ok(command)
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    let open = || File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    open()
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// One daemon per model directory. One that was killed while it started a trainer leaves its lock for a moment to that
/// process, which is not a trainer yet.
fn lock(path: &Path) -> Result<File> {
    let file = File::options().write(true).create(true).truncate(false).open(path);
    let mut file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let patience = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => {
                let said = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                said.with_context(|| format!("cannot write {}", path.display()))?;
                return Ok(file);
            }
            Err(TryLockError::WouldBlock) if Instant::now() < patience => std::thread::sleep(LOCK_PATIENCE / 100),
            Err(TryLockError::WouldBlock) => {
                // It has said so for as long as this one has waited.
                let holder = std::fs::read_to_string(path).unwrap_or_default();
                let (holder, path) = (holder.trim(), path.display());
                bail!("another apollod serves this model directory: process {holder} holds {path}")
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_about_to_be_let_go_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serve.lock");
        let held = lock(&path).unwrap();
        assert!(lock(&path).unwrap_err().to_string().contains("another apollod"));
        let letting_go = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        lock(&path).unwrap();
        letting_go.join().unwrap();
    }

    #[test]
    fn a_recurrent_state_is_not_kept_for_other_contexts() {
        let mut config = Config::default();
        config.model.dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens/qwen35_untied");
        check(&config).unwrap();
        config.train.prefix_cache_tokens = 1024;
        let error = check(&config).unwrap_err().to_string();
        assert!(error.starts_with("train.prefix_cache_tokens: this model has recurrent layers"), "{error}");
    }
}
