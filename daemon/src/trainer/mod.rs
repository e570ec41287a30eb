//! The trainer: a process of its own that owns the device, the live weights and the sync.
//!
//! Why a process: a CUDA error is sticky and a truncated file under a mapping raises SIGBUS; whatever
//! happens here ends this process alone, and its end is also what lets go of the server's memory.
//! Requests come as lines on stdin, one at a time; answers go to stdout (see `protocol`).

mod prefix_cache;
mod repair;
mod restore;
mod session;
mod settings;
mod shadow;
mod watch;

use crate::backend::Backend;
use crate::config::Config;
use crate::protocol::{self, FromTrainer, Request, ToTrainer};
use anyhow::{Context, Result};
use compute::cuda::DeviceName;
use compute::{Cpu, Cuda};
use session::{Session, Start, StartError};
use std::io::{BufRead, stdin, stdout};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

pub use repair::{files as repair_files, told as repaired};
pub use settings::{can_store_moments, longest, optimizer_settings, tensors, unmatched_rules};

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
            None => serve(Cpu::new(config.train.threads).map_err(Into::into), start),
            Some(gpu) => {
                if let Some(server) = start.server_pid() {
                    compute::cuda::use_library_of(server);
                }
                serve(Cuda::open(&gpu).map_err(Into::into), start)
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
            say(&FromTrainer::Failed { request: Request::Start, reason: format!("{error:#}") })
        }
    }
}

/// Answers requests on the device that has the weights in its memory.
fn serve<D: Backend>(device: Result<D>, start: Start) -> Result<()> {
    let opened = device.map_err(StartError::Failed).and_then(|device| Session::open(start, Arc::new(device)));
    let mut session = match opened {
        Ok(session) => session,
        Err(error) => return say_why(error),
    };
    say(&FromTrainer::Ready(session.ready()))?;
    session.publish().map_or(Ok(()), |published| say(&published))?;
    let requests = requests();
    loop {
        let request = match requests.recv_timeout(WATCH) {
            Ok(request) => Some(request?),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => None,
        };
        let stop = matches!(request, Some(ToTrainer::Shutdown { .. }));
        let answer = match request {
            Some(request) => session.answer(request),
            None => session.look().err().map(|reason| FromTrainer::ServerGone { reason }),
        };
        if let Some(answer) = answer {
            say(&answer)?;
            if matches!(answer, FromTrainer::ServerGone { .. }) {
                return Ok(());
            }
        }
        if let Some(reason) = session.broken() {
            return say(&FromTrainer::Dying { reason });
        }
        session.publish().map_or(Ok(()), |published| say(&published))?;
        if let Some(invalidated) = session.invalidate(stop) {
            say(&invalidated)?;
        }
        if stop {
            return Ok(());
        }
    }
}

fn say(message: &FromTrainer) -> Result<()> {
    Ok(protocol::send(&mut stdout().lock(), message)?)
}

/// Lines of stdin, parsed; the channel closes at their end.
fn requests() -> Receiver<Result<ToTrainer, protocol::ProtocolError>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in stdin().lock().lines().map_while(Result::ok) {
            if sender.send(protocol::parse(&line)).is_err() {
                break;
            }
        }
    });
    receiver
}
