//! What else makes files of weights: the safetensors crate, and rsync. Both end with everything on the disk.

use super::weights::Weights;
use anyhow::{Context, Result, bail};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

/// The safetensors crate's own save of everything, then fsync. All files are written before the first fsync waits.
pub fn save(weights: &Weights, dir: &Path) -> Result<()> {
    for (i, shard) in weights.shards.iter().enumerate() {
        let view = |(tensor, bytes): (&checkpoint::LiveTensor, _)| {
            let view = TensorView::new(Dtype::BF16, tensor.shape.clone(), bytes)?;
            Ok((tensor.name.clone(), view))
        };
        let views = weights.tensors_of(i).map(view).collect::<Result<Vec<_>>>()?;
        let path = dir.join(&shard.file);
        serialize_to_file(views, None, &path).with_context(|| format!("write {}", path.display()))?;
    }
    sync_files(weights, dir)
}

/// fsync of the shards and of their folder.
fn sync_files(weights: &Weights, dir: &Path) -> Result<()> {
    let shards = weights.shards.iter().map(|shard| dir.join(&shard.file));
    for path in shards.chain([dir.to_path_buf()]) {
        let synced = File::open(&path).and_then(|file| file.sync_all());
        synced.with_context(|| format!("sync {}", path.display()))?;
    }
    Ok(())
}

/// An rsync that is there.
pub struct Rsync<'a> {
    program: &'a str,
    /// It can fsync by itself, each file as soon as it is written.
    syncs: bool,
}

impl<'a> Rsync<'a> {
    /// None if there is no such program.
    pub fn find(program: &'a str) -> Result<Option<Rsync<'a>>> {
        match Command::new(program).arg("--help").output() {
            Ok(help) => Ok(Some(Rsync { program, syncs: String::from_utf8_lossy(&help.stdout).contains("--fsync") })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("run {program}")),
        }
    }

    /// Brings `to` to what `from` is, in place, by rsync's differences. Gives the bytes that were not there before.
    pub fn copy(&self, weights: &Weights, from: &Path, to: &Path) -> Result<u64> {
        let mut command = Command::new(self.program);
        command.args(["--recursive", "--inplace", "--no-whole-file", "--ignore-times", "--exclude=.apollod"]);
        command.args(["--stats", "--no-human-readable"]).args(self.syncs.then_some("--fsync"));
        // With a slash at its end it is what the folder holds, not the folder.
        let ran = command.arg(from.join("")).arg(to).output().with_context(|| format!("run {}", self.program))?;
        if !ran.status.success() {
            bail!("{} failed: {}\n{}", self.program, ran.status, String::from_utf8_lossy(&ran.stderr).trim());
        }
        sync_files(weights, to)?;
        let stats = String::from_utf8_lossy(&ran.stdout);
        literal_bytes(&stats).with_context(|| format!("{} --stats says no literal data: {stats}", self.program))
    }
}

/// From `--stats`: the bytes that rsync found nowhere in the old file.
fn literal_bytes(stats: &str) -> Option<u64> {
    let line = stats.lines().find_map(|line| line.strip_prefix("Literal data:"))?;
    line.trim().strip_suffix(" bytes")?.replace(',', "").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_data_is_read_with_and_without_separators() {
        let stats = "Total file size: 53 bytes\nLiteral data: 1,234,567 bytes\nMatched data: 8 bytes\n";
        assert_eq!(literal_bytes(stats), Some(1_234_567));
        assert_eq!(literal_bytes("Literal data: 12 bytes"), Some(12));
        assert_eq!(literal_bytes("Matched data: 8 bytes"), None);
    }

    #[test]
    fn a_save_holds_the_weights_and_one_flipped_bit_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let mut weights = Weights::new(10 << 21, 3);
        save(&weights, dir.path()).unwrap();
        weights.locate(dir.path()).unwrap();
        weights.check(dir.path()).unwrap();
        for shard in &weights.shards {
            let path = dir.path().join(&shard.file);
            let whole = std::fs::read(&path).unwrap();
            let mut flipped = whole.clone();
            *flipped.last_mut().unwrap() ^= 1;
            for other in [flipped, [whole.as_slice(), &[0]].concat()] {
                std::fs::write(&path, other).unwrap();
                let error = weights.check(dir.path()).unwrap_err().to_string();
                assert!(error.contains(&shard.file), "{error}");
            }
            std::fs::write(&path, whole).unwrap();
        }
    }

    #[test]
    fn an_rsync_that_is_not_there_is_none() {
        assert!(Rsync::find("no-such-rsync").unwrap().is_none());
    }
}
