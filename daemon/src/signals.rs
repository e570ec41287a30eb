//! The request to stop: SIGTERM, or SIGINT, which Ctrl-C is.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Hears what comes from the moment it was made on. Before, either signal ends the process: make it before saying
/// that this process is up.
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Needs a runtime of tokio.
    pub fn new() -> io::Result<StopSignals> {
        Ok(StopSignals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
