//! Loading a model directory while no sync writes into it.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use checkpoint::{Error, Reading};

/// Loads while syncs are kept out. One that is running is waited for; what a crash left half written is recovered first.
///
/// # Errors
/// Those of `load`; a sync that did not end, or that the directory cannot be locked and was written meanwhile.
pub fn reading<T>(model_dir: &Path, load: impl FnOnce() -> Result<T>) -> Result<T> {
    let reading = match Reading::begin_within(model_dir, Duration::ZERO) {
        Err(Error::Busy { .. }) => {
            tracing::info!("a sync is being written into {}: waiting for its end", model_dir.display());
            Reading::begin(model_dir)
        }
        at_once => at_once,
    }?;
    if let Some(recovery) = reading.recovered() {
        tracing::warn!("{}: {recovery}", model_dir.display());
    }
    let loaded = load()?;
    reading.end()?;
    Ok(loaded)
}
