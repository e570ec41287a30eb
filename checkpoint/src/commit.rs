//! One sync: [`write`] fills journal and files and can be undone, [`publish`] makes the generation certain, [`retire`]
//! turns the journal into history.

use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use crate::compare::{Compared, Comparer, Spare};
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, Progress, ShardSum, StateSum, TensorSum, VERSION, rfc3339};
use crate::journal::{Head, HeadShard};
use crate::layout::{Layout, Shard, Tensor};
use crate::pass::{Job, Pass};
use crate::pipeline::{self, Stages};
use crate::recover;
use crate::segments::{self, Apply, Segments};
use crate::shards::Shards;
use crate::source::Source;
use crate::sums::{self, Quick, Sum};

/// What a sync did.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncReport {
    /// The generation that is current now.
    pub generation: u64,
    /// 4 KiB blocks compared.
    pub blocks_total: u64,
    /// Blocks that differed.
    pub blocks_changed: u64,
    /// Length of the journal, which is the delta in the history from now on, without the generation at its end.
    pub bytes_journal: u64,
    /// Bytes written into the shards.
    pub bytes_written: u64,
    /// Length of the optimizer state.
    pub bytes_state: u64,
    /// Length of the block sums.
    pub bytes_sums: u64,
    /// Time it took.
    pub seconds: f64,
    /// True if nothing had changed since the current generation, so that no new one was made.
    pub unchanged: bool,
}

impl fmt::Display for SyncReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.unchanged {
            return write!(f, "nothing changed since generation {}, so there is no new one", self.generation);
        }
        write!(
            f,
            "generation {}: {} of {} blocks changed, {} bytes written, journal {} bytes, state {} bytes, {:.2} s",
            self.generation,
            self.blocks_changed,
            self.blocks_total,
            self.bytes_written,
            self.bytes_journal,
            self.bytes_state,
            self.seconds
        )
    }
}

impl SyncReport {
    /// One of a sync that had nothing to do.
    pub(crate) fn unchanged(generation: u64, time: Duration) -> SyncReport {
        SyncReport {
            generation,
            blocks_total: 0,
            blocks_changed: 0,
            bytes_journal: 0,
            bytes_written: 0,
            bytes_state: 0,
            bytes_sums: 0,
            seconds: time.as_secs_f64(),
            unchanged: true,
        }
    }
}

/// What a rollback did.
#[derive(Debug, Clone, PartialEq)]
pub struct RollbackReport {
    /// The generation whose content the files have again.
    pub to: u64,
    /// The new generation that holds it.
    pub sync: SyncReport,
}

impl fmt::Display for RollbackReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "back at the content of {}: {}", self.to, self.sync)
    }
}

/// Writes the optimizer state.
pub(crate) type WriteState<'a> = dyn FnMut(&mut dyn Write) -> io::Result<()> + Send + 'a;

/// What a new generation will be, beside its bytes.
pub(crate) struct Draft<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) progress: Progress,
    pub(crate) rollback_of: Option<u64>,
    /// The generation whose tensors the new content must have.
    pub(crate) expect: Option<&'a Generation>,
    /// Bytes of changed blocks in a segment.
    pub(crate) segment: u64,
    pub(crate) threads: usize,
}

/// Where a sync happens.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) disk: &'a Disk,
    pub(crate) paths: &'a Paths,
    /// The generation before it.
    pub(crate) current: &'a Generation,
    pub(crate) quick: &'a Quick,
}

/// What an error in [`write`] leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Files {
    /// The current generation, with nothing left over.
    AsBefore,
    /// Something between two generations, or on a disk of which nothing is known: for recovery.
    Unknown,
}

/// Journal, blocks, optimizer state and sums, all durable; gives the generation, which is not published yet, and what is
/// known of its blocks.
/// `done` is told the bytes that were compared. An error undoes what was written, where that is possible.
pub(crate) fn write(
    place: Place,
    draft: Draft,
    source: &mut dyn Source<'_>,
    state: Option<&mut WriteState>,
    done: &mut dyn FnMut(u64),
) -> std::result::Result<(Generation, Quick), (Error, Files)> {
    let Place { disk, paths, current, .. } = place;
    let mut applied = 0;
    fill(place, draft, source, state, done, &mut applied).map_err(|error| {
        if matches!(error, Error::Sync { .. }) {
            return (error, Files::Unknown);
        }
        let undone = recover::undo_here(disk, paths, current, applied);
        (error, if undone.is_ok() { Files::AsBefore } else { Files::Unknown })
    })
}

/// [`write`] without the undoing; `applied` counts the records whose blocks were begun to be written.
fn fill(
    place: Place,
    draft: Draft,
    source: &mut dyn Source<'_>,
    state: Option<&mut WriteState>,
    done: &mut dyn FnMut(u64),
    applied: &mut u64,
) -> Result<(Generation, Quick)> {
    let Place { disk, paths, current, quick } = place;
    let number = current.generation + 1;
    check_space(disk, paths, space_needed(current, source.bytes()))?;
    let before = sums::load_or_rebuild(disk, paths, current)?;
    let head = Head {
        generation: number,
        previous: current.generation,
        shards: draft.layout.shards.iter().map(head_shard).collect(),
    };
    let spare = Spare::default();
    let known = (before.clone(), quick.clone());
    let mut segments = Segments::begin(disk, paths, &head, known, draft.segment, applied)?;
    let mut shards = Shards::new(disk, &paths.model, head.shards.iter().map(|shard| &shard.file));
    let mut pass = Pass::new(disk, draft.layout, source);
    let write_state = || state.map(|state| write_state(disk, paths, number, state)).transpose();
    let compare_and_journal = |apply: &mut Apply| {
        let stages = Stages {
            next: |used| {
                let job = pass.next(used)?;
                done(pass.done);
                Ok(job)
            },
            worker: || {
                let mut comparer = Comparer::new(draft.layout, current, &before, quick, &spare);
                move |job: &mut Job| comparer.compare(job)
            },
            take: |compared: Compared| segments.take(compared, apply),
        };
        pipeline::run(draft.threads, stages)?;
        segments.flush(apply)
    };
    let (state, ()) = pipeline::both(draft.threads, write_state, || {
        let write_blocks = |segment| segments::write_blocks(segment, &mut shards, &spare);
        pipeline::behind(draft.threads, write_blocks, compare_and_journal)
    })?;
    let sync_shards = || shards.sync(draft.threads);
    let ((), (tensors, sums_blake3)) = pipeline::both(draft.threads, sync_shards, || {
        let tensors = new_tensors(&draft, current, &segments)?;
        // Also where there is none: what a sync that failed has removed must not be back beside this generation.
        disk.sync_dir(&paths.root.join("state"))?;
        Ok((tensors, write_sums(disk, paths, number, &segments.sums)?))
    })?;
    let created_unix = disk.now_unix();
    let Segments { writer, quick, blocks_total, blocks_changed, bytes_changed, .. } = segments;
    let mut generation = Generation {
        version: VERSION,
        generation: number,
        previous: Some(current.generation),
        rollback_of: draft.rollback_of,
        created_unix,
        created: rfc3339(created_unix),
        progress: draft.progress,
        blocks_total: blocks_total + pass.blocks_passed,
        blocks_changed,
        journal_bytes: writer.bytes(),
        written_bytes: bytes_changed,
        ratio: match bytes_changed {
            0 => 0.0,
            written => writer.bytes() as f64 / written as f64,
        },
        state,
        sums_blake3,
        shards: draft.layout.shards.iter().map(shard_sum).collect(),
        tensors,
        lineage: String::new(),
        seal: String::new(),
        restorable: true,
        damage: None,
    };
    generation.lineage = generation.lineage_after(&current.lineage);
    writer.finish(&generation)?;
    Ok((generation, quick))
}

/// The tensors with their new checksums, which must be the expected ones where something is expected.
fn new_tensors(draft: &Draft, current: &Generation, segments: &Segments) -> Result<Vec<TensorSum>> {
    let mut tensors = current.tensors.clone();
    for ((tensor, sums), changed) in tensors.iter_mut().zip(&segments.sums).zip(&segments.changed) {
        if *changed {
            tensor.blake3 = sums::root(sums);
        }
    }
    if let Some(expect) = draft.expect {
        let differs = tensors.iter().zip(&expect.tensors).find(|(is, want)| is.blake3 != want.blake3);
        if let Some((tensor, _)) = differs {
            return Err(Error::History { generation: expect.generation, tensor: tensor.name.clone() });
        }
    }
    Ok(tensors)
}

/// The turning point: the generation gets its name.
pub(crate) fn publish(disk: &Disk, paths: &Paths, generation: &Generation) -> Result<()> {
    disk.replace(&paths.generation(generation.generation), &generation.to_json())
}

/// The journal of a published generation becomes its delta. Both names are durable after it: the next sync of this handle
/// writes a journal of the same name, which it could not rely on while this rename may still be undone, and an adoption
/// would leave this one beside a generation that it does not fit.
pub(crate) fn retire(disk: &Disk, paths: &Paths, generation: u64) -> Result<()> {
    if disk.exists(&paths.delta(generation))? {
        // Renamed before a crash that left both names. A rename of two names of one file does nothing.
        disk.remove(&paths.journal())?;
    } else {
        disk.rename(&paths.journal(), &paths.delta(generation))?;
    }
    disk.sync_dir(&paths.root.join("history"))?;
    disk.sync_dir(&paths.root)
}

/// Publishes the files as they are as the generation after `before`, or the base, with nothing that leads back from it.
pub(crate) fn record_files(
    disk: &Disk,
    paths: &Paths,
    layout: &Layout,
    before: Option<&Generation>,
    progress: Progress,
) -> Result<Generation> {
    let number = before.map_or(0, |before| before.generation + 1);
    let mut tensors = Vec::new();
    let mut block_sums = Vec::new();
    for tensor in &layout.tensors {
        let file = disk.open(&layout.shards[tensor.shard].path)?;
        let sums = sums::of_file(&file, tensor.offset..tensor.offset + tensor.bytes)?;
        tensors.push(tensor_sum(tensor, sums::root(&sums)));
        block_sums.push(sums);
    }
    // What a sync that failed has removed must not be back beside this generation.
    disk.sync_dir(&paths.root.join("state"))?;
    let sums_blake3 = write_sums(disk, paths, number, &block_sums)?;
    let created_unix = disk.now_unix();
    let mut generation = Generation {
        created_unix,
        created: rfc3339(created_unix),
        progress,
        sums_blake3,
        shards: layout.shards.iter().map(shard_sum).collect(),
        tensors,
        restorable: true,
        ..Generation::empty(number)
    };
    generation.lineage = generation.lineage_after(before.map_or("", |before| &before.lineage));
    publish(disk, paths, &generation)?;
    Ok(generation)
}

/// Writes `sums/G` and gives its checksum. Until the generation is published the file means nothing.
fn write_sums(disk: &Disk, paths: &Paths, number: u64, sums: &[Vec<Sum>]) -> Result<String> {
    let (path, bytes) = (paths.sums(number), sums::to_bytes(sums));
    let mut file = disk.create(&path)?;
    file.write_all(&bytes).map_err(Error::io("write", &path))?;
    file.sync()?;
    disk.sync_dir(&paths.root.join("sums"))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

fn head_shard(shard: &Shard) -> HeadShard {
    HeadShard { file: shard.file.clone(), bytes: shard.bytes }
}

fn shard_sum(shard: &Shard) -> ShardSum {
    ShardSum {
        file: shard.file.clone(),
        bytes: shard.bytes,
        header_bytes: shard.header_bytes,
        header_blake3: shard.header_blake3.clone(),
    }
}

fn tensor_sum(tensor: &Tensor, blake3: String) -> TensorSum {
    TensorSum {
        name: tensor.name.clone(),
        shard: tensor.shard,
        dtype: tensor.dtype.clone(),
        shape: tensor.shape.clone(),
        offset: tensor.offset,
        bytes: tensor.bytes,
        blake3,
    }
}

/// By estimate: the last journal and a quarter more (an eighth of the weights for the first one: a step at
/// a small learning rate), the last optimizer state, and the sums.
fn space_needed(current: &Generation, covered: u64) -> u64 {
    let journal = match current.journal_bytes {
        0 => covered / 8,
        last => last + last / 4,
    };
    let state = current.state.as_ref().map_or(0, |state| state.bytes);
    journal + state + sums::bytes(current)
}

fn check_space(disk: &Disk, paths: &Paths, need: u64) -> Result<()> {
    let free = disk.free_bytes(&paths.root)?;
    if free < need {
        let dir = paths.root.clone();
        return Err(Error::TooLittleSpace { dir, need, free });
    }
    Ok(())
}

/// Counts and hashes what passes through to the state file, of which only the last stays in memory.
struct HashingWriter {
    file: DiskFile,
    hasher: blake3::Hasher,
}

/// Bytes of the state that are written at once, and that are on their way to the disk while the next are.
const STATE_STEP: usize = 1 << 20;
const STATE_AHEAD: u64 = 16 << 20;

impl Write for HashingWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.file.write(&buf[..buf.len().min(STATE_STEP)])?;
        let at = self.hasher.count();
        self.file.start_writing(at, n as u64);
        // All of it each time: what was still on its way to the disk the last time may be there now.
        self.file.let_go(0, at.saturating_sub(STATE_AHEAD));
        self.hasher.update(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether `write` writes the state that a generation has, or it has none. Nothing is written to the disk.
pub(crate) fn is_state(of: Option<&StateSum>, write: &mut WriteState) -> Result<bool> {
    let Some(want) = of else { return Ok(true) };
    let mut out = BufWriter::with_capacity(STATE_STEP, blake3::Hasher::new());
    write(&mut out).and_then(|()| out.flush()).map_err(Error::io("compare", Path::new("the optimizer state")))?;
    let hasher = out.get_ref();
    Ok(hasher.count() == want.bytes && hasher.finalize().to_hex().as_str() == want.blake3)
}

/// Writes `state/G`. Until the generation is published the file means nothing.
fn write_state(disk: &Disk, paths: &Paths, number: u64, write: &mut WriteState) -> Result<StateSum> {
    let path = paths.state(number);
    let inner = HashingWriter { file: disk.create(&path)?, hasher: blake3::Hasher::new() };
    let mut out = BufWriter::with_capacity(STATE_STEP, inner);
    write(&mut out).map_err(Error::io("write", &path))?;
    let HashingWriter { file, hasher } =
        out.into_inner().map_err(|error| Error::io("write", &path)(error.into_error()))?;
    file.sync()?;
    file.let_go(0, hasher.count());
    Ok(StateSum { bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_space_says_how_much_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, paths) = (Disk::real(), Paths::new(dir.path()));
        disk.create_dir(&paths.root).unwrap();
        check_space(&disk, &paths, 1).unwrap();
        let error = check_space(&disk, &paths, u64::MAX).unwrap_err().to_string();
        assert!(error.contains("bytes are missing"), "{error}");
        assert!(disk.free_bytes(&paths.root).unwrap() > 0);
    }
}
