//! Dreams of a serving daemon.

use std::net::SocketAddr;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use chrono::{SecondsFormat, Utc};

use super::{Busy, Dream, Summary};
use crate::client::{Client, ClientArgs};
use crate::config::Config;
use crate::schedule::Schedule;
use crate::supervisor::{Dreamt, Handle, State, Status};

/// Longest sleep, so that a clock that was set is noticed.
const SLEEP_MAX: Duration = Duration::from_secs(15);
/// How long the end of the thread is waited for; a dream that is under way ends with the process.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// The thread that dreams.
pub struct Dreamer {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Dreamer {
    /// Ends it, if it only waits.
    pub fn end(self) {
        drop(self.stop);
        let mut left = END_PATIENCE;
        while !self.thread.is_finished() && !left.is_zero() {
            let wait = Duration::from_millis(10);
            std::thread::sleep(wait);
            left = left.saturating_sub(wait);
        }
    }
}

/// Dreams by `dream.schedule`, if there is one. A time at which training is paused, no server is there or another dream is under way
/// passes without one.
///
/// # Errors
/// The schedule is none; the system gives no thread.
pub fn start(config: &Config, address: SocketAddr, supervisor: Handle) -> Result<Option<Dreamer>> {
    let Some(schedule) = &config.dream.schedule else { return Ok(None) };
    let schedule = Schedule::parse(schedule, &config.sync.timezone)?;
    let daemon = Client::new(&ClientArgs { url: address.to_string(), api_key: config.http.api_key.clone() });
    let config = config.clone();
    let (stop, stopped) = mpsc::channel();
    let thread = std::thread::Builder::new().name("dream".into()).spawn(move || {
        while let Some(due) = schedule.next_after(Utc::now()) {
            supervisor.dreams_next(due.to_rfc3339_opts(SecondsFormat::Secs, true));
            if !wait_until(due, &stopped) {
                return;
            }
            supervisor.dreamt(match whether(&supervisor.status()) {
                Some(why) => Dreamt::Skipped(why),
                None => outcome(dream(&config, &daemon, &supervisor)),
            });
        }
    })?;
    Ok(Some(Dreamer { stop, thread }))
}

/// False when it is to end.
fn wait_until(due: chrono::DateTime<Utc>, stopped: &Receiver<()>) -> bool {
    loop {
        let left = (due - Utc::now()).to_std().unwrap_or_default().min(SLEEP_MAX);
        match stopped.recv_timeout(left) {
            Err(RecvTimeoutError::Timeout) if left.is_zero() => return true,
            Err(RecvTimeoutError::Timeout) => {}
            _ => return false,
        }
    }
}

/// Why examples would not be trained.
fn whether(status: &Status) -> Option<String> {
    match (&status.paused, status.state) {
        (Some(why), _) => Some(format!("training is paused: {why}")),
        (None, state) if state.is_ready() => None,
        (None, State::Stopping) => Some("the daemon is stopping".into()),
        (None, state) => Some(format!("the daemon is {state}")),
    }
}

fn dream(config: &Config, daemon: &Client, supervisor: &Handle) -> Result<Summary> {
    let mut dream = Dream::begin(config, daemon, true, fastrand::u64(..))?;
    Ok(dream.run(
        config.dream.examples,
        || supervisor.status().paused.map(|why| format!("training was paused: {why}")),
        |turn| tracing::debug!("dream: {}", serde_json::json!(turn)),
    ))
}

fn outcome(dreamt: Result<Summary>) -> Dreamt {
    match dreamt {
        Ok(summary) => Dreamt::Done(summary),
        Err(error) if error.is::<Busy>() => Dreamt::Skipped(error.to_string()),
        Err(error) => Dreamt::Failed(format!("{error:#}")),
    }
}
