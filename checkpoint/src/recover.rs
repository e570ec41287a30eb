//! What an opener finds, and what becomes of it.

use std::fmt;

use crate::commit;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, Progress};
use crate::journal::Reader;
use crate::layout::Layout;
use crate::retain::prune;
use crate::verify;

/// What [`crate::Checkpoint::open`] found and did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// First use: the files became generation 0.
    Created,
    /// Nothing was left open.
    Clean {
        /// The current generation.
        generation: u64,
    },
    /// A complete journal was applied again to the end.
    Finished {
        /// Its generation, now the current one.
        generation: u64,
    },
    /// A journal that never counted, or a torn one, was thrown away.
    Discarded {
        /// The generation at which the weights remain.
        generation: u64,
        /// What was wrong with the journal.
        reason: String,
    },
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Recovery::Created => write!(f, "first use: the files are generation 0"),
            Recovery::Clean { generation } => write!(f, "clean at generation {generation}"),
            Recovery::Finished { generation } => {
                write!(f, "journal complete: generation {generation} finished")
            }
            Recovery::Discarded { generation, reason } => {
                write!(f, "journal discarded ({reason}); weights remain at generation {generation}")
            }
        }
    }
}

/// Brings the directory to a generation and gives it.
pub(crate) fn recover(disk: &mut Disk, paths: &Paths, layout: &Layout, keep: u64) -> Result<(Generation, Recovery)> {
    let left = remove_temporary(disk, paths)?;
    let Some(current) = paths.newest()? else {
        if paths.journal().exists() {
            return Err(Error::Document {
                path: paths.journal(),
                reason: "there is a journal and no generation before it; remove it if the files are known to be good"
                    .into(),
            });
        }
        let base = commit::record_files(disk, paths, layout, 0, Progress::default())?;
        prune(disk, paths, 0, keep)?;
        return Ok((base, Recovery::Created));
    };
    same_files(paths, layout, &current)?;
    if paths.journal().exists() {
        return journal(disk, paths, current, keep);
    }
    prune(disk, paths, current.generation, keep)?;
    let generation = current.generation;
    let recovery = match left {
        true => Recovery::Discarded { generation, reason: "it was never published".into() },
        false => Recovery::Clean { generation },
    };
    Ok((current, recovery))
}

/// Deals with a journal under its published name.
fn journal(disk: &mut Disk, paths: &Paths, current: Generation, keep: u64) -> Result<(Generation, Recovery)> {
    let number = current.generation;
    match Reader::open(&paths.journal()).and_then(Reader::scan) {
        Ok((head, _)) if head.generation == number || head.generation == number + 1 => {
            // Its name may not be durable yet, and the first block must not be before it.
            disk.sync_dir(&paths.root)?;
            let generation = commit::finish(disk, paths, &current, keep, &mut |_, _| {})?;
            let recovery = Recovery::Finished { generation: generation.generation };
            Ok((generation, recovery))
        }
        Ok((head, _)) => Err(Error::Document {
            path: paths.journal(),
            reason: format!("it is of generation {} and the files are of generation {number}", head.generation),
        }),
        Err(torn @ Error::Torn { .. }) => discard_torn(disk, paths, current, keep, torn),
        Err(error) => Err(error),
    }
}

/// A damaged journal may be thrown away only if no block of it was written, or all of them and the
/// generation too: if the files are exactly the current generation.
fn discard_torn(
    disk: &mut Disk,
    paths: &Paths,
    current: Generation,
    keep: u64,
    torn: Error,
) -> Result<(Generation, Recovery)> {
    let report = verify::verify_files(paths, &paths.model, &current, false)?;
    if let Some(damage) = report.damage.first() {
        return Err(Error::Stranded {
            reason: torn.to_string(),
            generation: current.generation,
            damage: damage.to_string(),
        });
    }
    disk.remove(&paths.journal())?;
    disk.sync_dir(&paths.root)?;
    prune(disk, paths, current.generation, keep)?;
    let recovery = Recovery::Discarded { generation: current.generation, reason: torn.to_string() };
    Ok((current, recovery))
}

/// Removes files that were being written under a temporary name: true if one was a journal.
fn remove_temporary(disk: &Disk, paths: &Paths) -> Result<bool> {
    let journal = disk.remove(&paths.journal_tmp())?;
    for (folder, suffix) in [("generations", ".json.tmp"), ("sums", ".tmp")] {
        for number in paths.numbers(folder, suffix)? {
            let path = paths.root.join(folder).join(format!("{number}{suffix}"));
            disk.remove(&path)?;
        }
    }
    Ok(journal)
}

/// Refuses files that are not those of the generation by name, size or header; contents are not read.
pub(crate) fn same_files(paths: &Paths, layout: &Layout, current: &Generation) -> Result<()> {
    let refuse = |file: &str, reason: &str| Error::Replaced {
        path: paths.model.join(file),
        generation: current.generation,
        reason: reason.into(),
    };
    for (was, is) in current.shards.iter().zip(&layout.shards) {
        if was.file != is.file {
            let reason = format!("it stands where {} stood", was.file);
            return Err(refuse(&is.file, &reason));
        }
        if was.bytes != is.bytes {
            let reason = format!("it has {} bytes, and had {}", is.bytes, was.bytes);
            return Err(refuse(&is.file, &reason));
        }
        if was.header_bytes != is.header_bytes || was.header_blake3 != is.header_blake3 {
            return Err(refuse(&is.file, "its header is another one"));
        }
    }
    if let Some(more) = layout.shards.get(current.shards.len()) {
        return Err(refuse(&more.file, "it is one file more than there were"));
    }
    if let Some(fewer) = current.shards.get(layout.shards.len()) {
        return Err(refuse(&fewer.file, "the index does not name it any more"));
    }
    Ok(())
}
