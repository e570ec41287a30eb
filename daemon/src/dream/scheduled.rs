//! Dreams of a serving daemon.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use chrono::{DateTime, Utc};

use super::{Dream, Summary};
use crate::client::{Client, ClientArgs};
use crate::config::Config;
use crate::schedule::Schedule;
use crate::supervisor::Handle;

/// Longest sleep, so that a clock that was set is noticed.
const SLEEP_MAX: Duration = Duration::from_secs(15);

/// Dreams by `dream.schedule`, if there is one, for as long as the process lives. A time at which training is paused, no server is
/// there or another dream is under way passes without one.
///
/// # Errors
/// The schedule is none; the system gives no thread.
pub fn start(config: &Config, address: SocketAddr, supervisor: Handle) -> Result<()> {
    let Some(schedule) = &config.dream.schedule else { return Ok(()) };
    let schedule = Schedule::parse(schedule, &config.sync.timezone)?;
    let daemon = Client::new(&ClientArgs { url: address.to_string(), api_key: config.http.api_key.clone() });
    let config = config.clone();
    std::thread::Builder::new().name("dream".into()).spawn(move || {
        while let Some(due) = schedule.next_after(Utc::now()) {
            sleep_until(due);
            match whether(&supervisor) {
                Ok(()) => supervisor.dreamed(dream(&config, &daemon).map_err(|error| format!("{error:#}"))),
                Err(why) => tracing::info!("no dream: {why}"),
            }
        }
    })?;
    Ok(())
}

fn sleep_until(due: DateTime<Utc>) {
    while let Ok(left) = (due - Utc::now()).to_std().map(|left| left.min(SLEEP_MAX)) {
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left);
    }
}

/// Whether examples would be trained, or why not.
fn whether(supervisor: &Handle) -> Result<(), String> {
    let status = supervisor.status();
    match status.state {
        state if state.is_ready() && state != crate::supervisor::State::Paused => Ok(()),
        state => Err(format!("the daemon is {state}")),
    }
}

fn dream(config: &Config, daemon: &Client) -> Result<Summary> {
    Dream::begin(config, daemon, true, fastrand::u64(..))?.run(config.dream.examples, |turn| {
        tracing::debug!("dream: {}", serde_json::json!(turn));
    })
}
