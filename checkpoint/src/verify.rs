//! Every byte of the files against the checksums of a generation.
//!
//! A shard is its header and its tensors with nothing between (safetensors allows no gaps), so a flipped
//! bit anywhere is under one of the checksums. What is read comes from the generation's document, not from
//! the headers, which may be what is damaged.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::checkpoint::open_state;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, TensorSum};
use crate::sums::{self, Sum};
use crate::verify_history::verify_history;

/// How often and how long a check without the lock waits for a sync to end.
const ATTEMPTS: u32 = 20;
const WAIT: Duration = Duration::from_millis(250);

/// Something that is not as the generation recorded it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// A shard is not there or cannot be read, or has another length.
    File {
        /// Its name.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The header of a shard.
    Header {
        /// The shard's name.
        file: String,
    },
    /// A tensor.
    Tensor {
        /// The shard's name.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The damaged blocks of 16 KiB, as bytes of the tensor; empty if `sums/G` is damaged too.
        blocks: Vec<Range<u64>>,
    },
    /// A delta or an optimizer state of the history. The current generation does not need it.
    History {
        /// What is wrong with which file.
        reason: String,
        /// Without it these generations cannot be restored: from this one
        oldest: u64,
        /// to this one.
        newest: u64,
    },
    /// The optimizer state, the block sums, or the document of an earlier generation.
    Other {
        /// What is wrong with which file.
        reason: String,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::File { file, reason } => write!(f, "{file}: {reason}"),
            Damage::Header { file } => write!(f, "{file}: its header is damaged"),
            Damage::Tensor { file, tensor, blocks } => {
                write!(f, "{file}: tensor `{tensor}` is damaged")?;
                match blocks.first() {
                    Some(first) => {
                        write!(f, " in {} of its 16 KiB blocks, the first at its bytes {first:?}", blocks.len())
                    }
                    None => Ok(()),
                }
            }
            Damage::History { reason, oldest, newest } if oldest == newest => {
                write!(f, "{reason}; generation {oldest} cannot be restored without it")
            }
            Damage::History { reason, oldest, newest } => {
                write!(f, "{reason}; generations {oldest} to {newest} cannot be restored without it")
            }
            Damage::Other { reason } => f.write_str(reason),
        }
    }
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyReport {
    /// The generation that the files were compared with.
    pub generation: u64,
    /// Tensors compared.
    pub tensors: usize,
    /// Bytes compared.
    pub bytes: u64,
    /// Earlier generations whose deltas, states and documents were checked; 0 where only the files were.
    pub history: u64,
    /// What differs; empty if all is well.
    pub damage: Vec<Damage>,
    /// Time it took.
    pub seconds: f64,
}

impl VerifyReport {
    /// True if nothing differs.
    pub fn is_ok(&self) -> bool {
        self.damage.is_empty()
    }
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}: {} tensors, {} bytes, ", self.generation, self.tensors, self.bytes)?;
        match self.history {
            0 => {}
            1 => f.write_str("1 earlier generation, ")?,
            history => write!(f, "{history} earlier generations, ")?,
        }
        write!(f, "{:.2} s: ", self.seconds)?;
        if self.is_ok() {
            return f.write_str("all checksums match");
        }
        write!(f, "{} damaged", self.damage.len())?;
        for damage in &self.damage {
            write!(f, "\n  {damage}")?;
        }
        Ok(())
    }
}

/// Compares a model directory with its current generation, and what is kept of earlier ones with its checksums, without
/// the lock and without writing.
///
/// Errors: no generation, syncs that overtake every look ([`Error::Unsteady`]), a damaged document, or a journal that stays ([`Error::Busy`]) so that the files
/// may lie between two generations. Damage is not an error: it is in the report.
pub fn verify(model_dir: &Path) -> Result<VerifyReport> {
    let (disk, paths) = (Disk::real(), Paths::new(model_dir));
    let began = Instant::now();
    let agreed = agreed(|| {
        let generation = paths.newest(&disk)?.ok_or_else(|| Error::Model {
            path: model_dir.to_path_buf(),
            reason: "it has no generation to compare with; open it once".into(),
        })?;
        let mut report = verify_files(&disk, &paths, model_dir, &generation, true)?;
        let (damage, history) = verify_history(&disk, &paths, &generation)?;
        report.damage.extend(damage);
        (report.history, report.seconds) = (history, 0.0);
        // In this order: the journal goes when its generation is there.
        let moved = disk.exists(&paths.journal())?
            || paths.newest(&disk)?.is_none_or(|newest| newest.generation != generation.generation);
        Ok((report, moved))
    })?;
    let Some(mut report) = agreed else {
        let (dir, waits) = (model_dir.to_path_buf(), disk.exists(&paths.journal())?);
        return Err(if waits { Error::Busy { dir } } else { Error::Unsteady { dir } });
    };
    report.seconds = began.elapsed().as_secs_f64();
    Ok(report)
}

/// The first look that finds no damage, or what two looks on end agree on while no sync is under way. What a sync is writing,
/// undoing or removing looks damaged for a moment. None if they never agree.
fn agreed(mut look: impl FnMut() -> Result<(VerifyReport, bool)>) -> Result<Option<VerifyReport>> {
    let mut seen = None;
    for _ in 0..ATTEMPTS {
        let (report, moved) = look()?;
        if report.is_ok() || !moved && seen.as_ref() == Some(&report) {
            return Ok(Some(report));
        }
        seen = Some(report).filter(|_| !moved);
        std::thread::sleep(WAIT);
    }
    Ok(None)
}

/// Compares the shards in `dir` with a generation, and if `with_state` what `.apollod` holds of it.
pub(crate) fn verify_files(
    disk: &Disk,
    paths: &Paths,
    dir: &Path,
    generation: &Generation,
    with_state: bool,
) -> Result<VerifyReport> {
    let began = Instant::now();
    let mut damage = Vec::new();
    let sums = sums::load(disk, paths, generation);
    for (i, shard) in generation.shards.iter().enumerate() {
        let path = dir.join(&shard.file);
        let reason = match disk.stat(&path)? {
            Some(stat) if stat.bytes == shard.bytes => None,
            Some(stat) => Some(format!("it has {} bytes, not {}", stat.bytes, shard.bytes)),
            None => Some("it is not there".into()),
        };
        if let Some(reason) = reason {
            let file = shard.file.clone();
            damage.push(Damage::File { file, reason });
            continue;
        }
        let file = disk.open(&path)?;
        let mut header = vec![0; shard.header_bytes as usize];
        file.read_at(&mut header, 0)?;
        if blake3::hash(&header).to_hex().as_str() != shard.header_blake3 {
            let file = shard.file.clone();
            damage.push(Damage::Header { file });
        }
        for (t, tensor) in generation.tensors.iter().enumerate().filter(|(_, tensor)| tensor.shard == i) {
            let is = sums::of_file(&file, tensor.range())?;
            let want = sums.as_ref().ok().map(|sums| sums[t].as_slice());
            damage.extend(compare(&shard.file, tensor, &is, want));
        }
    }
    if with_state {
        damage.extend(sums.err().map(|error| Damage::Other { reason: error.to_string() }));
        if generation.state.is_some() {
            let state = open_state(disk, paths, generation);
            damage.extend(state.err().map(|error| Damage::Other { reason: error.to_string() }));
        }
    }
    Ok(VerifyReport {
        generation: generation.generation,
        tensors: generation.tensors.len(),
        bytes: generation.shards.iter().map(|shard| shard.bytes).sum(),
        history: 0,
        damage,
        seconds: began.elapsed().as_secs_f64(),
    })
}

fn compare(file: &str, tensor: &TensorSum, is: &[Sum], want: Option<&[Sum]>) -> Option<Damage> {
    if sums::root(is) == tensor.blake3 {
        return None;
    }
    let pairs = is.iter().zip(want.unwrap_or_default()).zip(sums::blocks(tensor.range()));
    let differ = pairs.filter(|((is, want), _)| is != want);
    Some(Damage::Tensor {
        file: file.into(),
        tensor: tensor.name.clone(),
        blocks: differ.map(|(_, block)| block.start - tensor.offset..block.end - tensor.offset).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_what_two_looks_agree_on_while_nothing_moves() {
        let report = |reasons: &[&str]| VerifyReport {
            generation: 1,
            tensors: 0,
            bytes: 0,
            history: 0,
            damage: reasons.iter().map(|reason| Damage::Other { reason: (*reason).into() }).collect(),
            seconds: 0.0,
        };
        type Look = (&'static [&'static str], bool);
        let cases: [(&[Look], &[&str], usize); 4] = [
            (&[(&[], true)], &[], 1),
            (&[(&["gone", "going"], false), (&["gone"], false), (&[], false)], &[], 3),
            (&[(&["gone", "bad"], false), (&["bad"], false), (&["bad"], false), (&[], false)], &["bad"], 3),
            (&[(&["bad"], true), (&["bad"], false), (&["bad"], true), (&["bad"], false), (&[], false)], &[], 5),
        ];
        for (looks, want, taken) in cases {
            let mut rest = looks.iter();
            let agreed = agreed(|| {
                let (reasons, moved) = rest.next().unwrap();
                Ok((report(reasons), *moved))
            });
            assert_eq!((agreed.unwrap().unwrap(), looks.len() - rest.len()), (report(want), taken));
        }
    }
}
