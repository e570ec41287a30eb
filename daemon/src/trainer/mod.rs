//! The trainer: a process of its own that owns the device, the live weights and the sync.
//!
//! Why a process: a CUDA error is sticky and a truncated file under a mapping raises SIGBUS; whatever
//! happens here ends this process alone, and its end is also what lets go of the server's memory.
//! Requests come as lines on stdin; answers go to stdout (see `protocol`).

mod hold;
mod live;
mod prefix_cache;
mod probes;
mod repair;
mod restore;
mod session;
mod settings;
mod shadow;
mod start;
mod watch;
mod workers;

use crate::backend::Backend;
use crate::config::Config;
use crate::protocol::{self, Cause, FromTrainer, Request, ToTrainer};
use anyhow::{Context, Result, bail};
use compute::cuda::DeviceName;
use compute::{Cpu, Cuda};
use session::Session;
use start::{Start, StartError};
use std::io::{BufRead, stdin, stdout};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use workers::{Line, Step};

pub use probes::read as probes;
pub use repair::{files as repair_files, told as repaired};
pub use settings::{longest, optimizer_settings, tensors, unmatched_rules};

/// How often an idle trainer looks after its server and its prefix cache. (`watch` sees its end at once.)
const WATCH: Duration = Duration::from_millis(200);

/// How often the supervisor gets a sign of life.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Runs until told to stop, until stdin ends or until the server is gone. Versions of the weights go on after `told`.
pub fn run(config: &Config, told: u64) -> Result<()> {
    // Threads have the niceness of the one that starts them, so this comes before the first.
    rustix::process::nice(config.train.nice.into()).context("the trainer's niceness cannot be set (train.nice)")?;
    watch::end_on_panic();
    std::thread::spawn(|| {
        while say(&FromTrainer::Alive).is_ok() {
            std::thread::sleep(HEARTBEAT);
        }
    });
    match Start::new(config, told) {
        Ok(start) => match start.gpu().map(|uuid| DeviceName::Uuid(uuid.to_owned())) {
            None => serve(cpus(config), start),
            Some(gpu) => {
                if let Some(server) = start.server_pid() {
                    compute::cuda::use_library_of(server);
                }
                serve(one_gpu(config, &gpu), start)
            }
        },
        Err(error) => say_why(error),
    }
}

/// Says why there is no session.
fn say_why(error: StartError) -> Result<()> {
    match error {
        StartError::ServerGone(reason) => say(&FromTrainer::ServerGone { reason }),
        StartError::Failed(error) => {
            say(&FromTrainer::Failed { request: Request::Start, reason: format!("{error:#}"), cause: Cause::Other })
        }
    }
}

/// A pool of threads for each worker.
fn cpus(config: &Config) -> Result<Vec<Cpu>> {
    let threads = settings::threads(&config.train);
    (0..config.train.workers).map(|_| Cpu::new(threads).map_err(Into::into)).collect()
}

fn one_gpu(config: &Config, name: &DeviceName) -> Result<Vec<Cuda>> {
    let workers = config.train.workers;
    if workers > 1 {
        bail!(
            "train.workers is {workers}, but the weights lie on a GPU, where one step takes all of it: set train.workers \
             to 1, nothing was written"
        );
    }
    Ok(vec![Cuda::open(name)?])
}

/// What the main thread waits for.
enum Input {
    Request(ToTrainer),
    Nonsense(protocol::ProtocolError),
    /// A worker has applied a step.
    Answer(FromTrainer),
    /// Nobody will ask any more.
    End,
}

/// Answers requests with a worker on each of these devices, which have the weights in their memory.
fn serve<D: Backend>(devices: Result<Vec<D>>, start: Start) -> Result<()> {
    let devices = devices.map(|devices| devices.into_iter().map(Arc::new).collect());
    let (session, workers) = match devices.map_err(StartError::Failed).and_then(|devices| Session::open(start, devices))
    {
        Ok(opened) => opened,
        Err(error) => return say_why(error),
    };
    say(&FromTrainer::Ready(session.ready()))?;
    let (inputs, inbox) = mpsc::channel();
    read_requests(inputs.clone());
    let (line, session) = (Line::new(workers.len()), Mutex::new(session));
    std::thread::scope(|scope| {
        for worker in workers {
            let (line, session, inputs) = (&line, &session, inputs.clone());
            // The receiver ends with the main thread; answers are then nobody's.
            scope.spawn(move || worker.run(line, session, |answer| drop(inputs.send(Input::Answer(answer)))));
        }
        let served = answer_requests(&line, &session, &inbox);
        line.close();
        served
    })
}

fn answer_requests<D: Backend>(line: &Line<D>, session: &Mutex<Session<D>>, inbox: &Receiver<Input>) -> Result<()> {
    let lock = || -> MutexGuard<Session<D>> { session.lock().unwrap_or_else(PoisonError::into_inner) };
    lock().publish().map_or(Ok(()), |published| say(&published))?;
    loop {
        let (mut stop, mut rolled_back) = (false, false);
        let answer = match inbox.recv_timeout(WATCH) {
            Ok(Input::Request(ToTrainer::Train { step, lr, examples })) => {
                line.push(Step { number: step, lr, work: examples });
                None
            }
            Ok(Input::Request(request)) if !line.is_empty() => {
                bail!("{} was asked for while steps are in flight: the supervisor breaks the protocol", request.kind())
            }
            Ok(Input::Request(request)) => {
                stop = matches!(request, ToTrainer::Shutdown { .. });
                lock().answer(&request)
            }
            Ok(Input::Nonsense(error)) => return Err(error.into()),
            Ok(Input::Answer(answer)) => Some(answer),
            Ok(Input::End) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) if !line.is_empty() => None,
            Err(RecvTimeoutError::Timeout) => lock().look().err().map(|reason| FromTrainer::ServerGone { reason }),
        };
        if let Some(mut answer) = answer {
            if matches!(answer, FromTrainer::Synced(_) | FromTrainer::RolledBack(_) | FromTrainer::Harmed(_)) {
                // A replay from this generation begins without keys and values, and is to end with the same bytes.
                line.forget();
                // Who hears of a generation finds its directory.
                let published = lock().publish();
                published.as_ref().map_or(Ok(()), say)?;
                if let (FromTrainer::Synced(synced), Some(FromTrainer::Published(published))) = (&mut answer, published)
                {
                    synced.directory_failed = published.failed;
                }
            }
            say(&answer)?;
            rolled_back = matches!(answer, FromTrainer::RolledBack(_));
            if let FromTrainer::ServerGone { .. } = answer {
                return Ok(());
            }
        }
        let mut session = lock();
        if let Some(reason) = session.broken() {
            return say(&FromTrainer::Dying { reason });
        }
        if let Some(invalidated) = session.invalidate(stop) {
            say(&invalidated)?;
        }
        if rolled_back {
            // After the answer, which nobody is to wait for longer, and before anything is trained on top.
            match session.probe_again() {
                Ok(probed) => probed.as_ref().map_or(Ok(()), say)?,
                Err(error) => return say(&session::end_of(error)),
            }
        }
        if stop {
            return Ok(());
        }
    }
}

fn say(message: &FromTrainer) -> Result<()> {
    Ok(protocol::send(&mut stdout().lock(), message)?)
}

/// Hands on the lines of stdin, parsed, and its end.
fn read_requests(inputs: Sender<Input>) {
    std::thread::spawn(move || {
        for line in stdin().lock().lines().map_while(Result::ok) {
            if inputs.send(protocol::parse(&line).map_or_else(Input::Nonsense, Input::Request)).is_err() {
                return;
            }
        }
        drop(inputs.send(Input::End));
    });
}
