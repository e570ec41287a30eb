//! Updates between two steps of the engine: it is held while weights are written (`server.update = "between"`).

use crate::config::Update;
use crate::protocol::Hold;
use anyhow::{Context, Result};
use ipc::{Attachment, ControlError};
use std::time::{Duration, Instant};

/// Longest time for which an engine is held, and for which its running step is waited for.
const HOLD: Duration = Duration::from_secs(5);

/// Attempts to hold the engine for one step, and the pause between two.
const HOLDS_MAX: u32 = 12;
const HOLD_AGAIN: Duration = Duration::from_millis(500);

/// In the update mode `between`: the engine, standing still, and since when.
pub(super) fn hold(attachment: &Attachment, update: Update) -> Result<Option<(ipc::Hold<'_>, Instant)>> {
    if update == Update::Hogwild {
        return Ok(None);
    }
    let mut attempts = 0;
    loop {
        attempts += 1;
        match attachment.hold(HOLD) {
            Ok(held) => return Ok(Some((held, Instant::now()))),
            Err(ControlError::Gone(gone)) => return Err(gone.into()),
            // A long prompt is one long step of the engine: the example waits for its end.
            Err(error) if attempts < HOLDS_MAX => {
                tracing::warn!("the engine could not be held, tried again: {error}");
                std::thread::sleep(HOLD_AGAIN);
            }
            Err(error) => {
                return Err(error).context(format!(
                    "server.update is \"between\" and the engine could not be held in {attempts} attempts"
                ));
            }
        }
    }
}

/// Lets the engine go on; how long it stood still.
pub(super) fn released(held: ipc::Hold<'_>, since: Instant) -> Hold {
    let in_time = held.release();
    if let Err(error) = &in_time {
        tracing::warn!("{error}");
    }
    Hold { ms: since.elapsed().as_secs_f64() * 1e3, overran: in_time != Ok(true) }
}
