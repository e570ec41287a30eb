//! Live weights against files, at attach and after a rollback.
//!
//! A trainer may have died in the middle of a step: live weights are then ahead of the last generation,
//! or half way. Whether that can be is known from `attached.json` in the state directory, which names
//! the epoch that the last trainer wrote to:
//!
//! - the same epoch: every tensor goes back to the generation in the files, also one that is frozen now
//!   and was trained before;
//! - another epoch: the server has loaded its weights itself. They must equal the files; where they do
//!   not, this is another model or another version, and nothing is written.

use crate::durable;
use crate::weights::widened;
use anyhow::{Context, Result, bail};
use checkpoint::Checkpoint;
use compute::{Device, Dtype};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs;
use std::path::Path;

/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// The last epoch that was written to.
#[derive(Serialize, Deserialize)]
pub struct Attached {
    /// Its name.
    pub epoch: String,
    /// What the shadow check of it found; none if it was not possible.
    #[serde(default)]
    pub shadow_check: Option<String>,
}

/// What is known if the last trainer of this model directory wrote to weights of this epoch.
pub fn known_epoch(state_dir: &Path, epoch: &str) -> Result<Option<Attached>> {
    let path = state_dir.join("attached.json");
    match fs::read(&path) {
        Ok(bytes) => {
            let attached: Attached = serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is damaged; restart the server and remove it", path.display()))?;
            Ok(Some(attached).filter(|attached| attached.epoch == epoch))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Notes, before the first write, that weights of this epoch are about to be written.
pub fn remember_epoch(state_dir: &Path, attached: &Attached) -> Result<()> {
    durable::replace(state_dir, "attached.json", &serde_json::to_vec(attached)?)
        .with_context(|| format!("cannot note the server's epoch in {}", state_dir.display()))
}

/// Fails at the first tensor whose live bytes differ from the files.
pub fn require_equal<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    names: &[String],
    weights: &[D::Weight],
    files: &[Dtype],
) -> Result<()> {
    for ((name, weight), files) in names.iter().zip(weights).zip(files) {
        let same = compare(device, checkpoint, name, weight, *files, |_, _| false)?;
        if !same {
            bail!(
                "live tensor {name} differs from the model directory's: the server holds another model or another \
                 version of it; nothing was written. Restart the server from this directory, or stage it again"
            );
        }
    }
    Ok(())
}

/// Writes the files' values over live bytes that differ; returns how many bytes that were.
pub fn restore<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    name: &str,
    weight: &D::Weight,
    files: Dtype,
) -> Result<u64> {
    let mut written = 0;
    compare(device, checkpoint, name, weight, files, |at, bytes| {
        device.write_weight(weight, at, bytes);
        written += bytes.len() as u64;
        true
    })?;
    Ok(written)
}

/// Calls `differs(offset in the weight, bytes as they should be)` for every chunk that differs from the files,
/// whose element type is `files`, until it returns false; whether nothing differed.
fn compare<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    name: &str,
    weight: &D::Weight,
    files: Dtype,
    mut differs: impl FnMut(usize, &[u8]) -> bool,
) -> Result<bool> {
    let (dtype, (rows, cols)) = (device.dtype(weight), device.shape(weight));
    let (mut file, mut live) = (vec![0; CHUNK], vec![0; CHUNK / files.size() * dtype.size()]);
    let bytes = rows * cols * files.size();
    let mut same = true;
    for at in (0..bytes).step_by(CHUNK) {
        let file = &mut file[..CHUNK.min(bytes - at)];
        checkpoint.read_tensor(name, at as u64, file)?;
        let wanted = if files == dtype { Cow::Borrowed(&*file) } else { Cow::Owned(widened(file, files)) };
        let (at, live) = (at / files.size() * dtype.size(), &mut live[..wanted.len()]);
        device.read_weight(weight, at, live);
        if *live != *wanted {
            same = false;
            if !differs(at, &wanted) {
                break;
            }
        }
    }
    Ok(same)
}
