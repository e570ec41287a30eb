//! What an opener finds, and what becomes of it.

use std::fmt;
use std::path::PathBuf;

use crate::commit;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, Progress, ShardSum};
use crate::journal::{HeadShard, Reader};
use crate::layout::Layout;
use crate::piece::within;
use crate::record::{Record, Side};
use crate::shards::Shards;
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
    /// A sync had published its generation and not yet put its journal away.
    Finished {
        /// Its generation, the current one.
        generation: u64,
    },
    /// A sync was cut short: what it had written was taken back.
    Undone {
        /// The generation at which the weights remain.
        generation: u64,
        /// Where its journal ends.
        reason: String,
    },
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Recovery::Created => write!(f, "first use: the files are generation 0"),
            // Nothing else was looked at: a flipped bit in the files is for `verify`.
            Recovery::Clean { generation } => write!(f, "journal: clean at generation {generation}"),
            Recovery::Finished { generation } => write!(f, "the last sync is whole: generation {generation}"),
            Recovery::Undone { generation, reason } => {
                write!(f, "a sync that was cut short is undone ({reason}); weights remain at generation {generation}")
            }
        }
    }
}

/// Brings the directory to a generation and gives it, with what had to be done.
pub(crate) fn recover(disk: &Disk, paths: &Paths, layout: &Layout) -> Result<(Generation, Recovery)> {
    remove_temporary(disk, paths)?;
    let Some(current) = paths.newest(disk)? else {
        if disk.exists(&paths.journal())? {
            return Err(Error::Document {
                path: paths.journal(),
                reason: "there is a journal and no document of the generation before it, and the files may lie between the two: \
                         put .apollod back from a copy, with the files"
                    .into(),
            });
        }
        let base = commit::record_files(disk, paths, layout, None, Progress::default())?;
        return Ok((base, Recovery::Created));
    };
    same_files(paths, layout, &current)?;
    // A process that died may have left names that are not durable: that of this generation, before which older ones
    // are pruned, and those of a journal that was put away, which the next journal takes.
    for dir in [&paths.root.join("generations"), &paths.root.join("history"), &paths.root] {
        disk.sync_dir(dir)?;
    }
    let generation = current.generation;
    let recovery = match disk.exists(&paths.journal())? {
        true => resolve(disk, paths, &current)?,
        false => Recovery::Clean { generation },
    };
    Ok((current, recovery))
}

/// Deals with a journal: the generation that it belongs to is published, or it is undone.
fn resolve(disk: &Disk, paths: &Paths, current: &Generation) -> Result<Recovery> {
    let number = current.generation;
    let journal = match Reader::open(disk, &paths.journal()) {
        Ok(journal) => journal,
        Err(torn @ Error::Torn { .. }) => return discard(disk, paths, current, torn.to_string()),
        Err(error) => return Err(error),
    };
    if journal.head.generation == number {
        return match journal.scan() {
            Ok(()) => {
                commit::retire(disk, paths, number)?;
                Ok(Recovery::Finished { generation: number })
            }
            Err(torn @ Error::Torn { .. }) => discard(disk, paths, current, torn.to_string()),
            Err(error) => Err(error),
        };
    }
    undo(disk, paths, current)
}

fn undo(disk: &Disk, paths: &Paths, current: &Generation) -> Result<Recovery> {
    let (_, reason) = take_back(disk, paths, current)?;
    discard(disk, paths, current, reason)
}

/// Undoes a sync that failed in this process, which had begun to write the blocks of `applied` records.
pub(crate) fn undo_here(disk: &Disk, paths: &Paths, current: &Generation, applied: u64) -> Result<()> {
    if applied > 0 {
        let (records, reason) = take_back(disk, paths, current)?;
        if records < applied {
            let (generation, damage) = (current.generation, format!("{applied} records of it were in use"));
            return Err(Error::Stranded { reason, generation, damage });
        }
    }
    forget(disk, paths, current.generation + 1)
}

/// Gives back to the files what the journal of the next generation says that they were: tells of how many records, and
/// where the journal ends.
///
/// Blocks are written also where they read as old: after an fsync that failed a page may read as it was written, be
/// marked clean, and not be on the disk.
fn take_back(disk: &Disk, paths: &Paths, current: &Generation) -> Result<(u64, String)> {
    let mut journal = Reader::open(disk, &paths.journal())?;
    require_fitting(paths, &journal, current)?;
    let mut shards = Shards::new(disk, &paths.model, current.shards.iter().map(|shard| &shard.file));
    let mut records = 0;
    let reason = loop {
        let record = match journal.record() {
            Ok(Some(record)) => record,
            Ok(None) => break "it was whole, and its generation not published".into(),
            // Its end, as a crash leaves it. Blocks of records that are not whole were never written.
            Err(torn @ Error::Torn { .. }) => break torn.to_string(),
            Err(error) => return Err(error),
        };
        records += 1;
        let shard = usize::from(record.piece.shard);
        if let Err(offset) = rewrite(shards.file(shard)?, &record, |content| record.settle(content, Side::Old))? {
            return Err(foreign(paths.model.join(&current.shards[shard].file), &record, offset, current));
        }
    };
    shards.sync(1)?;
    Ok((records, reason))
}

/// Puts a record's blocks, as `settle` makes them, into the file, every changed block of it. The inner error is `settle`'s.
pub(crate) fn rewrite<E>(
    file: &DiskFile,
    record: &Record,
    settle: impl FnOnce(&mut [u8]) -> std::result::Result<(), E>,
) -> Result<std::result::Result<(), E>> {
    let mut content = vec![0; record.piece.bytes as usize];
    file.read_at(&mut content, record.piece.offset)?;
    if let Err(error) = settle(&mut content) {
        return Ok(Err(error));
    }
    for block in record.changed() {
        file.write_at(&content[within(&block, record.piece.offset)], block.start)?;
    }
    Ok(Ok(()))
}

/// Removes a journal that has nothing more to say: only if every byte of the files is the current generation's.
fn discard(disk: &Disk, paths: &Paths, current: &Generation, reason: String) -> Result<Recovery> {
    let generation = current.generation;
    let report = verify::verify_files(disk, paths, &paths.model, current, false)?;
    if let Some(damage) = report.damage.first() {
        return Err(Error::Stranded { reason, generation, damage: damage.to_string() });
    }
    forget(disk, paths, generation + 1)?;
    Ok(Recovery::Undone { generation, reason })
}

/// Removes what a sync has left that is undone. The journal goes last: without it, state and sums would look like what is left of a
/// generation whose document was lost. One of them that cannot be removed keeps nobody from working: pruning says so.
fn forget(disk: &Disk, paths: &Paths, undone: u64) -> Result<()> {
    for left in [paths.state(undone), paths.sums(undone)] {
        if disk.remove(&left).is_ok() {
            disk.sync_dir(left.parent().expect("it lies in a folder"))?;
        }
    }
    disk.remove(&paths.journal())?;
    disk.sync_dir(&paths.root)
}

/// Refuses a journal that is not of the sync after the current generation, or not of these files.
fn require_fitting(paths: &Paths, journal: &Reader, current: &Generation) -> Result<()> {
    let refuse = |reason: String| Err(Error::Document { path: paths.journal(), reason });
    let (number, head) = (current.generation, &journal.head);
    if head.generation != number + 1 || head.previous != number {
        return refuse(format!("it is of generation {} and the files are of generation {number}", head.generation));
    }
    let same = |(journal, shard): (&HeadShard, &ShardSum)| journal.file == shard.file && journal.bytes == shard.bytes;
    if head.shards.len() != current.shards.len() || !head.shards.iter().zip(&current.shards).all(same) {
        return refuse(format!("it is of other files than those of generation {number}"));
    }
    Ok(())
}

fn foreign(path: PathBuf, record: &Record, offset: u64, current: &Generation) -> Error {
    let shard = usize::from(record.piece.shard);
    let tensor = current.tensors.iter().find(|tensor| tensor.shard == shard && tensor.range().contains(&offset));
    let tensor = tensor.map_or_else(|| "?".into(), |tensor| tensor.name.clone());
    let (previous, generation) = (current.generation, current.generation + 1);
    Error::Foreign { path, tensor, offset, previous, generation }
}

/// Removes documents that were being written under a temporary name.
fn remove_temporary(disk: &Disk, paths: &Paths) -> Result<()> {
    let folder = paths.root.join("generations");
    for number in disk.numbers(&folder, ".json.tmp")? {
        disk.remove(&folder.join(format!("{number}.json.tmp")))?;
    }
    Ok(())
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

#[cfg(test)]
#[path = "recover_tests.rs"]
mod tests;
