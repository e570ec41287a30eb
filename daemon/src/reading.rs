//! Loading a model directory while no sync writes into it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow};
use checkpoint::{Error, Expected, Reading};
use ipc::SafetensorsDir;

/// The checksums of what a directory holds, the headers of its files already compared; none if it never had any. For the
/// time of a [`reading`].
///
/// # Errors
/// A header is not the one that was recorded; a file or the record of it cannot be read.
pub fn checksums(model_dir: &Path) -> Result<Option<Checksums>> {
    let Some(expected) = Expected::of(model_dir).map_err(refusal)? else { return Ok(None) };
    expected.check_headers()?.map_err(refusal)?;
    Ok(Some(Checksums(expected)))
}

fn refusal(error: impl std::error::Error) -> anyhow::Error {
    anyhow!("{error}. Nothing was loaded; --unchecked loads the files as they are")
}

/// What a directory should hold.
pub struct Checksums(Expected);

impl Checksums {
    /// Compares a tensor, by its name in the files.
    ///
    /// # Errors
    /// It is another one, with what to do.
    pub fn check(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.0.check(name, bytes).map_err(refusal)
    }

    /// Compares every tensor of the files.
    ///
    /// # Errors
    /// The first that is another one.
    pub fn check_all(&self, files: &SafetensorsDir) -> Result<()> {
        files.tensors().iter().try_for_each(|tensor| self.check(&tensor.name, files.bytes(&tensor.name)?))
    }
}

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
