//! The current generation of a model directory as a GGUF file.

use super::{Gguf, name};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Files of an export that is under way, removed at its end however it ends.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // The error that led here, if any, is the one to report.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes `to`, which must not exist, and says what was written. Safe while syncs go on: the directory is first
/// exported as one generation beside `to`, which takes room for the weights twice while it lasts. The file appears
/// under its name only when it is whole and on the disk.
///
/// # Errors
/// Those of an export, of [`Gguf::of`] and of the system; nothing is left behind.
pub fn export(
    model_dir: &Path,
    to: &Path,
    template: Option<&Path>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<String> {
    if to.symlink_metadata().is_ok() {
        bail!("{} exists already; name another file or remove it", to.display());
    }
    let file_name = to.file_name().with_context(|| format!("{} has no name", to.display()))?;
    let parent = match to.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    // Before the long copy.
    Gguf::of(model_dir, &name(model_dir), template)?;

    let mut partial = OsString::from(".");
    partial.push(file_name);
    partial.push(format!(".gguf-partial-{}", std::process::id()));
    let partial = Partial(parent.join(partial));
    fs::create_dir(&partial.0).with_context(|| format!("cannot create {}", partial.0.display()))?;
    let copy = partial.0.join("model");
    let report = checkpoint::export(model_dir, &copy)?;
    let gguf = Gguf::of(&copy, &name(model_dir), template)?;
    let whole = partial.0.join("whole.gguf");
    gguf.write(&whole, progress)?;
    fs::rename(&whole, to).with_context(|| format!("cannot rename {} to {}", whole.display(), to.display()))?;
    File::open(parent).and_then(|dir| dir.sync_all()).with_context(|| format!("cannot sync {}", parent.display()))?;
    let generation = match report.generation {
        Some(generation) => format!("generation {generation}"),
        None => "a model without generations".into(),
    };
    Ok(format!("{generation}: {} tensors, {} bytes", gguf.tensors(), gguf.bytes()))
}
