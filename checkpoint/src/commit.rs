//! The two halves of a sync: [`journal`] leaves the files untouched, [`finish`] cannot be turned back.
//!
//! `finish` reads nothing but the journal and the files, so recovery is `finish` called again.

use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::disk::{CrashPoint, Disk, DiskFile, free_bytes};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, Progress, ShardSum, StateSum, TensorSum, VERSION, now_unix, rfc3339};
use crate::journal::{Head, HeadShard, Reader, Record, Writer};
use crate::layout::{Layout, Shard, Tensor};
use crate::retain::prune;
use crate::source::Source;
use crate::stream::Stream;
use crate::sums;

/// What a sync did.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncReport {
    /// The generation that is current now.
    pub generation: u64,
    /// 4 KiB blocks compared.
    pub blocks_total: u64,
    /// Blocks that differed.
    pub blocks_changed: u64,
    /// Length of the journal.
    pub bytes_journal: u64,
    /// Bytes written into the shards.
    pub bytes_written: u64,
    /// Length of the optimizer state.
    pub bytes_state: u64,
    /// Time it took.
    pub seconds: f64,
}

impl fmt::Display for SyncReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
pub(crate) type WriteState<'a> = dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a;

/// What a new generation will be, beside its bytes.
pub(crate) struct Draft<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) progress: Progress,
    pub(crate) rollback_of: Option<u64>,
    /// The generation whose tensors the new content must have.
    pub(crate) expect: Option<&'a Generation>,
}

/// The first half: optimizer state, sums and `journal.tmp`, all synced. Gives the journal's length.
pub(crate) fn journal(
    disk: &mut Disk,
    paths: &Paths,
    current: &Generation,
    draft: Draft,
    source: &mut dyn Source,
    state: Option<&mut WriteState>,
    done: &mut dyn FnMut(u64),
) -> Result<u64> {
    let number = current.generation + 1;
    check_space(&paths.root, space_needed(current, source.bytes()))?;
    let state = match state {
        Some(write) => Some(write_state(disk, paths, number, write)?),
        None => None,
    };
    let head = Head {
        generation: number,
        previous: current.generation,
        shards: draft.layout.shards.iter().map(head_shard).collect(),
    };
    let mut writer = Writer::create(disk, &paths.journal_tmp(), &head)?;
    let mut stream = Stream::new(disk, paths, current, &mut writer);
    let (tensors, block_sums) = stream.tensors(&draft, source, done)?;
    let encoder = stream.encoder;
    let sums = sums::to_bytes(&block_sums);
    disk.replace(&paths.sums(number), &sums, None)?;
    let created_unix = now_unix();
    let generation = Generation {
        version: VERSION,
        generation: number,
        previous: Some(current.generation),
        rollback_of: draft.rollback_of,
        created_unix,
        created: rfc3339(created_unix),
        progress: draft.progress,
        blocks_total: encoder.blocks_total,
        blocks_changed: encoder.blocks_changed,
        journal_bytes: writer.bytes(),
        written_bytes: encoder.bytes_changed,
        ratio: match encoder.bytes_changed {
            0 => 0.0,
            written => writer.bytes() as f64 / written as f64,
        },
        state,
        sums_blake3: blake3::hash(&sums).to_hex().to_string(),
        shards: draft.layout.shards.iter().map(shard_sum).collect(),
        tensors,
        seal: String::new(),
        restorable: true,
    };
    let (file, bytes) = writer.finish(&generation)?;
    disk.reached(CrashPoint::JournalWritten, &paths.journal_tmp())?;
    file.sync()?;
    disk.reached(CrashPoint::JournalSynced, &paths.journal_tmp())?;
    Ok(bytes)
}

/// Removes what [`journal`] left after an error. What cannot be removed now, the next open removes.
pub(crate) fn discard(disk: &Disk, paths: &Paths, number: u64) {
    for path in [paths.journal_tmp(), paths.state(number), paths.sums(number)] {
        // The error that led here is the one to report.
        let _ = disk.remove(&path);
    }
}

/// The turning point: the journal gets its name.
pub(crate) fn publish(disk: &mut Disk, paths: &Paths) -> Result<()> {
    disk.rename(&paths.journal_tmp(), &paths.journal())?;
    disk.sync_dir(&paths.root)?;
    disk.reached(CrashPoint::JournalPublished, &paths.journal())
}

/// The second half: blocks, generation, history. Any part of it may have happened before.
/// `done` is told how far into the bytes of all files it is.
pub(crate) fn finish(
    disk: &mut Disk,
    paths: &Paths,
    current: &Generation,
    keep: u64,
    done: &mut dyn FnMut(u64, u64),
) -> Result<Generation> {
    let mut reader = Reader::open(&paths.journal())?;
    let mut shards: Vec<Option<DiskFile>> = reader.head.shards.iter().map(|_| None).collect();
    while let Some(record) = reader.record()? {
        let shard = usize::from(record.piece.shard);
        let path = paths.model.join(&reader.head.shards[shard].file);
        let file = match &mut shards[shard] {
            Some(file) => file,
            closed => closed.insert(disk.open_in_place(&path)?),
        };
        write_record(file, &record, false)?
            .map_err(|offset| foreign(&path, &record, offset, current, reader.head.generation))?;
        disk.reached(CrashPoint::BlocksPartial, &path)?;
        let files: u64 = current.shards.iter().map(|shard| shard.bytes).sum();
        done(record_end(current, &record), files);
    }
    disk.reached(CrashPoint::BlocksWritten, &paths.model)?;
    for shard in shards.iter().flatten() {
        shard.sync()?;
    }
    disk.reached(CrashPoint::ShardsSynced, &paths.model)?;
    let mut generation = reader.generation.take().expect("all records are read");
    generation.restorable = true;
    let number = generation.generation;
    let published = Some(CrashPoint::GenerationWritten);
    disk.replace(&paths.generation(number), &generation.to_json(), published)?;
    disk.reached(CrashPoint::GenerationPublished, &paths.generation(number))?;
    disk.rename(&paths.journal(), &paths.delta(number))?;
    disk.sync_dir(&paths.root.join("history"))?;
    disk.sync_dir(&paths.root)?;
    disk.reached(CrashPoint::JournalRetired, &paths.delta(number))?;
    prune(disk, paths, number, keep)?;
    Ok(generation)
}

/// Applies a record to a shard and writes every changed block, also where it was new already.
/// The inner error is the offset of a foreign sector.
pub(crate) fn write_record(
    file: &DiskFile,
    record: &Record,
    skip_foreign: bool,
) -> Result<std::result::Result<(), u64>> {
    let base = record.piece.offset;
    let mut content = vec![0; record.piece.bytes as usize];
    file.read_at(&mut content, base)?;
    if let Err(offset) = record.redo(&mut content, skip_foreign) {
        return Ok(Err(offset));
    }
    let mut run = 0..0;
    for block in record.changed() {
        if block.start != run.end {
            write_run(file, &content, base, run)?;
            run = block.start..block.start;
        }
        run.end = block.end;
    }
    write_run(file, &content, base, run)?;
    Ok(Ok(()))
}

fn write_run(file: &DiskFile, content: &[u8], base: u64, run: std::ops::Range<u64>) -> Result<()> {
    if run.is_empty() {
        return Ok(());
    }
    let at = (run.start - base) as usize..(run.end - base) as usize;
    file.write_at(&content[at], run.start)
}

/// Bytes of all files up to the end of a record.
fn record_end(current: &Generation, record: &Record) -> u64 {
    let shard = usize::from(record.piece.shard);
    let before: u64 = current.shards[..shard].iter().map(|s| s.bytes).sum();
    before + record.piece.offset + u64::from(record.piece.bytes)
}

fn foreign(path: &Path, record: &Record, offset: u64, current: &Generation, generation: u64) -> Error {
    let shard = usize::from(record.piece.shard);
    let inside =
        |tensor: &&TensorSum| tensor.shard == shard && (tensor.offset..tensor.offset + tensor.bytes).contains(&offset);
    let tensor = current.tensors.iter().find(inside);
    Error::Foreign {
        path: path.to_path_buf(),
        tensor: tensor.map_or_else(|| "?".into(), |tensor| tensor.name.clone()),
        offset,
        previous: generation - 1,
        generation,
    }
}

/// Publishes the files as they are as generation `number`, with nothing before it.
pub(crate) fn record_files(
    disk: &mut Disk,
    paths: &Paths,
    layout: &Layout,
    number: u64,
    progress: Progress,
) -> Result<Generation> {
    let mut tensors = Vec::new();
    let mut block_sums = Vec::new();
    for tensor in &layout.tensors {
        let path = &layout.shards[tensor.shard].path;
        let (hash, sums) = crate::verify::digest(path, tensor.offset, tensor.bytes)?;
        tensors.push(tensor_sum(tensor, hash));
        block_sums.push(sums);
    }
    let sums = sums::to_bytes(&block_sums);
    disk.replace(&paths.sums(number), &sums, None)?;
    let created_unix = now_unix();
    let generation = Generation {
        version: VERSION,
        generation: number,
        previous: None,
        rollback_of: None,
        created_unix,
        created: rfc3339(created_unix),
        progress,
        blocks_total: 0,
        blocks_changed: 0,
        journal_bytes: 0,
        written_bytes: 0,
        ratio: 0.0,
        state: None,
        sums_blake3: blake3::hash(&sums).to_hex().to_string(),
        shards: layout.shards.iter().map(shard_sum).collect(),
        tensors,
        seal: String::new(),
        restorable: true,
    };
    disk.replace(&paths.generation(number), &generation.to_json(), None)?;
    Ok(generation)
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

pub(crate) fn tensor_sum(tensor: &Tensor, blake3: String) -> TensorSum {
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
    journal + state + covered / 8192
}

fn check_space(dir: &Path, need: u64) -> Result<()> {
    let free = free_bytes(dir).map_err(Error::io("ask for the free space of", dir))?;
    if free < need {
        let dir = dir.to_path_buf();
        return Err(Error::TooLittleSpace { dir, need, free });
    }
    Ok(())
}

/// Counts and hashes what passes through to the state file.
struct HashingWriter {
    file: DiskFile,
    hasher: blake3::Hasher,
}

impl Write for HashingWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.file.write(buf)?;
        self.hasher.update(&buf[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn write_state(disk: &mut Disk, paths: &Paths, number: u64, write: &mut WriteState) -> Result<StateSum> {
    let path = paths.state(number);
    let inner = HashingWriter { file: disk.create(&path)?, hasher: blake3::Hasher::new() };
    let mut out = BufWriter::with_capacity(1 << 20, inner);
    write(&mut out).map_err(Error::io("write", &path))?;
    let inner = out.into_inner().map_err(|error| Error::io("write", &path)(error.into_error()))?;
    disk.reached(CrashPoint::StateWritten, &path)?;
    inner.file.sync()?;
    disk.sync_dir(&paths.root.join("state"))?;
    disk.reached(CrashPoint::StateSynced, &path)?;
    Ok(StateSum { bytes: inner.hasher.count(), blake3: inner.hasher.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_space_says_how_much_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        check_space(dir.path(), 1).unwrap();
        let error = check_space(dir.path(), u64::MAX).unwrap_err().to_string();
        let free = free_bytes(dir.path()).unwrap();
        assert!(error.contains("bytes are missing"), "{error}");
        assert!(free > 0);
    }
}
