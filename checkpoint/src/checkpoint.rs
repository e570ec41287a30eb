//! [`Checkpoint`]: the one writer of a model directory.

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::commit::{self, Draft, Files, Place, RollbackReport, SyncReport};
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, Progress};
use crate::known::{Changed, Known};
use crate::layout::Layout;
use crate::readers::keep_out;
use crate::recover::{self, Recovery};
use crate::retain::{Keep, prune};
use crate::source::{LiveSource, Source, UndoSource};
use crate::storage::{RealStorage, Storage};
use crate::sums::{self, Quick};
use crate::verify::{self, Damage, VerifyReport};

/// A tensor of the live weights under its Hugging Face name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveTensor {
    /// Its name in the files.
    pub name: String,
    /// Its dtype as safetensors writes it, such as "BF16".
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Some of a live tensor's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The tensor's index.
    pub tensor: usize,
    /// First byte in the tensor.
    pub offset: u64,
    /// Length in bytes; at most 1 MiB.
    pub bytes: u64,
}

/// Live weights as a sync sees them. Nothing writes them while the sync runs: training stands still, and a server
/// only reads. (A write in between would be in the files or not; weights with hashes, which are taken before the first
/// read, would have it found by the next sync. But a generation would hold half a step.)
///
/// A sync calls `tensors`, then `block_hashes`, `written` and `announce` once each at most, then `read` for every part
/// that was announced.
pub trait LiveWeights: Sync {
    /// The tensors that a sync covers. Tensors of the files that are not here stay as they are.
    fn tensors(&self) -> &[LiveTensor];

    /// Copies `buf.len()` bytes of the tensor with this index, in row-major order, from byte `offset` of
    /// it. Never called past the tensor's end.
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]);

    /// A hash of every block of `block_bytes` bytes of every tensor, tensor by tensor, computed where the tensors are.
    /// Blocks count from the start of a tensor, whose last block is as long as what is left.
    ///
    /// Two contents of the same block have the same hash with a probability of at most 2⁻⁶⁴; what hashes as at the
    /// last sync is not read. None, the default, from weights that are as cheap to read as to hash.
    fn block_hashes(&self, block_bytes: u64) -> Option<Vec<u128>> {
        let _ = block_bytes;
        None
    }

    /// Ranges of the bytes of each tensor, which together hold all that may have been written since the last sync of
    /// these weights that succeeded, or since [`Checkpoint::assume_equal`]: without hashes, nothing else is read. None,
    /// the default, if that is not known.
    fn written(&self) -> Option<Vec<Vec<Range<u64>>>> {
        None
    }

    /// Tells every part that is going to be read, so that copies from a device can be on their way while what came
    /// before is compressed and written. Gives how `read` may be called. By default, any way.
    fn announce(&self, parts: Vec<Part>) -> Reads {
        drop(parts);
        Reads::Anyhow
    }
}

/// How live weights want to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// By several threads at once, in any order; parts may be read in pieces.
    Anyhow,
    /// Part by part as they were announced, by one thread.
    InOrder,
}

/// What an opener can choose.
#[derive(Debug, Clone)]
pub struct Options {
    /// How much history is kept beside the current generation. Default all.
    pub keep: Keep,
    /// How long a sync, a rollback or a recovery waits for those who are loading the model, before it gives up with
    /// nothing written. Default 10 s.
    pub readers_wait: Duration,
    /// Bytes of changed blocks that are journalled together before they go into the files. They are held in memory
    /// until then. Default 32 MiB.
    pub segment: u64,
    /// Threads that read, compare and compress; with 1 a sync does one thing after the other. Default: as many as the
    /// machine has cores.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Options {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Options { keep: Keep::default(), readers_wait: Duration::from_secs(10), segment: 32 << 20, threads }
    }
}

/// The exclusive right to change a model directory, from [`Checkpoint::open`] until drop.
#[derive(Debug)]
pub struct Checkpoint {
    paths: Paths,
    options: Options,
    disk: Disk,
    current: Generation,
    /// Of the live tensors that the last sync wrote.
    known: Option<Known>,
    /// Of the blocks of the current generation.
    quick: Quick,
    /// Generations to which the history led back until this handle pruned it, and that nobody has asked for yet.
    pruned: Vec<u64>,
    /// What did not go as it should and changes nothing, that nobody has asked for yet.
    warnings: Vec<String>,
    /// Why this handle must not be used any more.
    unusable: Option<String>,
    _lock: DiskFile,
}

impl Checkpoint {
    /// Takes the lock and recovers; makes generation 0 of the files on first use.
    ///
    /// Errors: no model here, shared shards, the lock is taken, or files that recovery must not touch.
    pub fn open(model_dir: &Path) -> Result<(Checkpoint, Recovery)> {
        Checkpoint::open_with(model_dir, Options::default())
    }

    /// [`Checkpoint::open`] with settings.
    pub fn open_with(model_dir: &Path, options: Options) -> Result<(Checkpoint, Recovery)> {
        Checkpoint::open_on(Arc::new(RealStorage), model_dir, options)
    }

    /// [`Checkpoint::open_with`] on another storage than the operating system's.
    pub fn open_on(storage: Arc<dyn Storage>, model_dir: &Path, options: Options) -> Result<(Checkpoint, Recovery)> {
        let (disk, paths) = (Disk::new(storage), Paths::new(model_dir));
        let layout = Layout::load(&disk, model_dir)?;
        disk.create_dir(&paths.root)?;
        // Where it was there: whoever made it may have died before its name was durable.
        disk.sync_dir(model_dir)?;
        let lock = take_lock(&disk, &paths)?;
        // It is there from now on, so that readers who may not create it can lock it.
        let mut readers = disk.open_lock(&paths.readers())?;
        if paths.is_torn(&disk)? {
            readers = keep_out(&disk, &paths, options.readers_wait)?;
        }
        for dir in paths.dirs() {
            disk.create_dir(&dir)?;
        }
        let (current, recovery) = recover::recover(&disk, &paths, &layout)?;
        let (known, quick, pruned, unusable) = (None, Quick::unknown(&current.tensors), Vec::new(), None);
        let warnings = Vec::new();
        let mut checkpoint =
            Checkpoint { paths, options, disk, current, known, quick, pruned, warnings, unusable, _lock: lock };
        checkpoint.prune(checkpoint.options.keep.at_any_age())?;
        drop(readers);
        Ok((checkpoint, recovery))
    }

    /// Writes the live weights that differ into the files, with the optimizer state that `state` writes on another thread,
    /// as a new generation. `report` is told done and total, in bytes of weights; done is total when all of it is durable.
    ///
    /// Whoever loads the model ([`crate::Reading`]) is waited for, and kept waiting until the generation is published.
    ///
    /// Makes no generation where nothing can have changed since the current one: training stands where it stood
    /// ([`Progress`]), `live` says by hashes or by what was written that no block is another one, and `state`, which is
    /// then asked twice if it turns out otherwise, writes the same bytes. (A current generation without a state, the base or
    /// adopted files, has one that begins afresh, which is what a trainer has that has not moved since.)
    ///
    /// `live` must not change before this returns. If it has hashes, only those blocks of it are read whose hash is
    /// not that of the last sync through this handle; if it knows what was written since, only that. On an error that is
    /// not [`Error::Interrupted`] the files are those of the current generation.
    pub fn sync(
        &mut self,
        live: &dyn LiveWeights,
        state: &mut (dyn FnMut(&mut dyn Write) -> io::Result<()> + Send),
        progress: Progress,
        report: &mut dyn FnMut(u64, u64),
    ) -> Result<SyncReport> {
        self.usable()?;
        let began = std::time::Instant::now();
        let layout = self.layout()?;
        let mut source = LiveSource::new(&layout, live)?;
        let current = self.current.generation;
        let known = Known::of(live, current + 1);
        let changed = known.changed_since(self.known.as_ref(), current, live);
        let still = progress.stands_at(&self.current.progress) && changed.as_ref().is_some_and(Changed::is_empty);
        if still && commit::is_state(self.current.state.as_ref(), state)? {
            let total = source.bytes();
            report(total, total);
            return Ok(SyncReport::unchanged(current, began.elapsed()));
        }
        let _readers = keep_out(&self.disk, &self.paths, self.options.readers_wait)?;
        source.announce(&layout, changed);
        let draft = self.draft(&layout, progress);
        let done = self.commit(draft, &mut source, Some(state), report)?;
        self.known = Some(known);
        Ok(done)
    }

    /// Takes it that live weights equal the files in every byte, so that the next sync need not read them all where they
    /// have hashes or know what was written. Only for a caller who has just compared or restored every one of these
    /// tensors: where that is not so, the difference stays out of the files.
    pub fn assume_equal(&mut self, live: &dyn LiveWeights) {
        self.known = Some(Known::of(live, self.current.generation));
    }

    /// Makes files, optimizer state and progress those of generation `to`, as a new generation, by the
    /// same protocol; none is made of the current one. Live weights are not touched: restore them with
    /// [`Checkpoint::read_tensor`].
    pub fn rollback(&mut self, to: u64) -> Result<RollbackReport> {
        self.roll_back(to).map_err(|error| match error {
            Error::Torn { .. } => Error::Delta { reason: error.to_string(), model: self.paths.model.clone() },
            error => error,
        })
    }

    fn roll_back(&mut self, to: u64) -> Result<RollbackReport> {
        self.usable()?;
        let began = std::time::Instant::now();
        let target = self.restorable(to)?;
        let _readers = keep_out(&self.disk, &self.paths, self.options.readers_wait)?;
        let layout = self.layout()?;
        self.require_unchanged()?;
        let mut state = match &target.state {
            Some(_) if to == self.current.generation => Some(open_state(&self.disk, &self.paths, &target)?),
            Some(_) => Some(open_state(&self.disk, &self.paths, &target).map_err(of_history)?),
            None => None,
        };
        if to == self.current.generation {
            return Ok(RollbackReport { to, sync: SyncReport::unchanged(to, began.elapsed()) });
        }
        let mut write_state = |out: &mut dyn Write| io::copy(state.as_mut().expect("used if there"), out).map(|_| ());
        let mut source = UndoSource::open(&self.disk, &self.paths, &layout, self.current.generation, to)?;
        let draft =
            Draft { rollback_of: Some(to), expect: Some(&target), ..self.draft(&layout, target.progress.clone()) };
        let with_state = target.state.is_some();
        let write_state: Option<&mut commit::WriteState> = match with_state {
            true => Some(&mut write_state),
            false => None,
        };
        let sync = self.commit(draft, &mut source, write_state, &mut |_, _| {})?;
        Ok(RollbackReport { to, sync })
    }

    /// Records the files as they are as a new generation without optimizer state, after someone else
    /// changed them on purpose. No generation before it can be restored.
    pub fn adopt(&mut self, progress: Progress) -> Result<&Generation> {
        self.usable()?;
        let layout = self.layout()?;
        let number = self.current.generation + 1;
        let adopted = commit::record_files(&self.disk, &self.paths, &layout, Some(&self.current), progress);
        // Whether it has its name is for the next open to see.
        self.current = adopted.map_err(|error| self.interrupted(error))?;
        self.quick = Quick::unknown(&self.current.tensors);
        if let Err(source) = self.prune(self.options.keep) {
            self.unusable = Some(source.to_string());
            return Err(Error::Interrupted { generation: number, source: Box::new(source) });
        }
        Ok(&self.current)
    }

    /// Removes what `keep` does not ask for. The current generation does not depend on it: what cannot be removed is tried
    /// again the next time, unless it is not known what is on the disk.
    fn prune(&mut self, keep: Keep) -> Result<()> {
        let (pruned, failed) = prune(&self.disk, &self.paths, self.current.generation, keep);
        self.pruned.extend(pruned);
        match failed {
            None => {}
            Some(error @ Error::Sync { .. }) => return Err(error),
            Some(error) => {
                let warning =
                    format!("what the history no longer needs could not be removed: {error}; it will be tried again");
                self.warnings.push(warning);
            }
        }
        Ok(())
    }

    /// What did not go as it should and changes nothing of what was done. Each is told once.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// Generations that could be restored until this handle removed what led back to them, by [`Options::keep`] or because
    /// files were adopted. Each is told once.
    pub fn take_pruned(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.pruned)
    }

    /// The current generation: what the files hold.
    pub fn current(&self) -> &Generation {
        &self.current
    }

    /// All generations, oldest first; `restorable` says which of them rollback can reach.
    pub fn generations(&self) -> Result<Vec<Generation>> {
        self.paths.list(&self.disk)
    }

    /// The optimizer state of the current generation, its checksum verified before the first byte is
    /// given; none if the generation has none.
    pub fn state(&self) -> Result<Option<impl Read + use<>>> {
        self.usable()?;
        match self.current.state {
            Some(_) => open_state(&self.disk, &self.paths, &self.current).map(Some),
            None => Ok(None),
        }
    }

    /// Fills `buf` from byte `offset` of a tensor in the files: to restore live weights.
    pub fn read_tensor(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.usable()?;
        let refuse = |reason: String| Error::Tensor { tensor: name.into(), reason };
        let tensors = &self.current.tensors;
        let tensor = tensors.iter().find(|tensor| tensor.name == name);
        let tensor = tensor.ok_or_else(|| refuse("it is not in the files".into()))?;
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > tensor.bytes) {
            let n = buf.len();
            let reason = format!("bytes {offset}+{n} are past its {} bytes", tensor.bytes);
            return Err(refuse(reason));
        }
        let shard = &self.current.shards[tensor.shard];
        let path = self.paths.model.join(&shard.file);
        self.disk.open(&path)?.read_at(buf, tensor.offset + offset)
    }

    /// Compares every byte of the files, the optimizer state and the sums with the current generation.
    pub fn verify(&self) -> Result<VerifyReport> {
        self.usable()?;
        verify::verify_files(&self.disk, &self.paths, &self.paths.model, &self.current, true)
    }

    /// The model directory, as it was given.
    pub(crate) fn model_dir(&self) -> &Path {
        &self.paths.model
    }

    /// Where this handle works, and how long it waits for readers.
    pub(crate) fn place(&self) -> (&Disk, &Paths, Duration) {
        (&self.disk, &self.paths, self.options.readers_wait)
    }

    /// Refuses further work after an error that leaves open what is on the disk.
    pub(crate) fn give_up(&mut self, why: &Error) {
        self.unusable = Some(why.to_string());
    }

    /// Why this handle refuses further work, if it does: after an error in the middle of a sync the directory has to be
    /// opened again.
    pub fn unusable(&self) -> Option<&str> {
        self.unusable.as_deref()
    }

    pub(crate) fn usable(&self) -> Result<()> {
        match &self.unusable {
            Some(reason) => Err(Error::Unusable { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// The files' headers, read again: someone may have replaced a file since.
    fn layout(&self) -> Result<Layout> {
        let layout = Layout::load(&self.disk, &self.paths.model)?;
        recover::same_files(&self.paths, &layout, &self.current)?;
        Ok(layout)
    }

    /// Refuses files of which any byte is not the current generation's: a rollback reads only what its deltas changed.
    fn require_unchanged(&self) -> Result<()> {
        let report = verify::verify_files(&self.disk, &self.paths, &self.paths.model, &self.current, false)?;
        match report.damage.into_iter().next() {
            None => Ok(()),
            Some(Damage::Tensor { file, tensor, .. }) => {
                let (path, generation) = (self.paths.model.join(file), self.current.generation);
                Err(Error::Changed { tensor, path, generation })
            }
            Some(damage) => Err(Error::Source { generation: self.current.generation, damage: damage.to_string() }),
        }
    }

    fn draft<'a>(&self, layout: &'a Layout, progress: Progress) -> Draft<'a> {
        let Options { segment, threads, .. } = self.options;
        Draft { layout, progress, rollback_of: None, expect: None, segment, threads }
    }

    /// The whole protocol, and what an error means for this handle.
    fn commit(
        &mut self,
        draft: Draft,
        source: &mut dyn Source<'_>,
        state: Option<&mut commit::WriteState>,
        report: &mut dyn FnMut(u64, u64),
    ) -> Result<SyncReport> {
        let began = std::time::Instant::now();
        let (disk, paths, total) = (&self.disk, &self.paths, source.bytes());
        // All of it is said when it is durable.
        let mut compared = |done: u64| report(done.min(total.saturating_sub(1)), total);
        let place = Place { disk, paths, current: &self.current, quick: &self.quick };
        let (generation, quick) = match commit::write(place, draft, source, state, &mut compared) {
            Ok(written) => written,
            Err((error, Files::AsBefore)) => return Err(error),
            Err((error, Files::Unknown)) => return Err(self.interrupted(error)),
        };
        let number = generation.generation;
        let finished = commit::publish(disk, paths, &generation).and_then(|()| commit::retire(disk, paths, number));
        finished.map_err(|error| self.interrupted(error))?;
        let before = std::mem::replace(&mut self.current, generation);
        if let Err(error) = self.prune(self.options.keep) {
            self.current = before;
            return Err(self.interrupted(error));
        }
        self.quick = quick;
        report(total, total);
        Ok(SyncReport {
            generation: number,
            blocks_total: self.current.blocks_total,
            blocks_changed: self.current.blocks_changed,
            bytes_journal: self.current.journal_bytes,
            bytes_written: self.current.written_bytes,
            bytes_state: self.current.state.as_ref().map_or(0, |state| state.bytes),
            bytes_sums: sums::bytes(&self.current),
            seconds: began.elapsed().as_secs_f64(),
            unchanged: false,
        })
    }

    fn interrupted(&mut self, source: Error) -> Error {
        self.unusable = Some(source.to_string());
        Error::Interrupted { generation: self.current.generation + 1, source: Box::new(source) }
    }

    /// The document of a generation that can be restored.
    fn restorable(&self, to: u64) -> Result<Generation> {
        let all = self.paths.list(&self.disk)?;
        let possible: Vec<u64> =
            all.iter().filter(|generation| generation.restorable).map(|generation| generation.generation).collect();
        let known = all.into_iter().find(|known| known.generation == to);
        let reason = match known {
            Some(known) if known.restorable => return Ok(known),
            Some(Generation { damage: Some(damage), .. }) => damage,
            Some(_) => "its deltas or its optimizer state were pruned or are missing, which `verify` tells".into(),
            None => "there is no such generation".into(),
        };
        Err(Error::NotRestorable { generation: to, reason, restorable: possible })
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.paths.model.display(), self.current)?;
        match &self.unusable {
            Some(reason) => write!(f, " · to be opened again: {reason}"),
            None => Ok(()),
        }
    }
}

/// All generations of a model directory, oldest first, without the lock; none if it was never opened.
pub fn list(model_dir: &Path) -> Result<Vec<Generation>> {
    Paths::new(model_dir).list(&Disk::real())
}

/// How long who takes the lock may need to say so in it.
const SAYS_WHO: Duration = Duration::from_millis(100);

/// Locks the directory for this process until the file is dropped.
pub(crate) fn take_lock(disk: &Disk, paths: &Paths) -> Result<DiskFile> {
    let path = paths.lock();
    let mut file = disk.open_lock(&path)?;
    if !file.try_lock(true)? {
        // What is there until its holder has written may be of one that died.
        std::thread::sleep(SAYS_WHO);
        let pid = String::from_utf8_lossy(&disk.read(&path)?).trim().into();
        return Err(Error::Locked { dir: paths.model.clone(), pid });
    }
    file.truncate()?;
    writeln!(file, "{}", std::process::id()).map_err(Error::io("write", &path))?;
    Ok(file)
}

/// The same error of a state that is not the current generation's, for which other things can be done.
pub(crate) fn of_history(error: Error) -> Error {
    match error {
        Error::State { path, reason, .. } => Error::Document { path, reason },
        error => error,
    }
}

/// The optimizer state of a generation, read once to check it and rewound.
pub(crate) fn open_state(disk: &Disk, paths: &Paths, generation: &Generation) -> Result<BufReader<DiskFile>> {
    let path = paths.state(generation.generation);
    let want = generation.state.as_ref().expect("the caller asked");
    let damaged = |reason: String| {
        let (path, model, generation) = (path.clone(), paths.model.clone(), generation.generation);
        Error::State { path, model, generation, reason }
    };
    if !disk.exists(&path)? {
        return Err(damaged("it is missing".into()));
    }
    let mut file = disk.open(&path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&mut file).map_err(Error::io("read", &path))?;
    let bytes = hasher.count();
    if bytes != want.bytes || hasher.finalize().to_hex().as_str() != want.blake3 {
        let written = want.bytes;
        return Err(damaged(format!(
            "its {bytes} bytes do not match the checksum of the {written} bytes that were written"
        )));
    }
    file.rewind();
    Ok(BufReader::with_capacity(64 << 10, file))
}
