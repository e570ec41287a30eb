//! A disk in memory that keeps a log of what was done to it, and fails on demand.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use checkpoint::{Kind, Open, Stat, Storage, StorageFile};

use crate::common::Rng;
use crate::image::{FileId, Image, Node, SECTOR};
use crate::medium::{Medium, Op};

/// What fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// ENOSPC for every write and every new name from here on.
    NoSpace,
    /// EIO for one write, part of which may have happened.
    Write,
    /// EIO for one fsync of a file or folder: what it should have made durable never is, unless written again.
    Sync,
    /// EIO for one read.
    Read,
    /// EROFS for every change from here on.
    ReadOnly,
    /// The process ends at a barrier: nothing that it does from here on reaches the disk.
    Death,
}

impl Fault {
    /// Those that the process outlives.
    pub const ALL: [Fault; 5] = [Fault::NoSpace, Fault::Write, Fault::Sync, Fault::Read, Fault::ReadOnly];
}

/// How a disk misbehaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Reads and writes are cut short at random, from this seed.
    pub short: Option<u64>,
    /// This fault, after so many operations that it could hit.
    pub fail: Option<(Fault, u64)>,
}

#[derive(Debug)]
struct State {
    medium: Medium,
    log: Option<Vec<Op>>,
    faults: Faults,
    /// Operations that the fault could have hit.
    seen: u64,
    rng: Rng,
    /// Open handles that hold a lock: shared ones, and whether one is exclusive.
    locks: BTreeMap<FileId, (usize, bool)>,
}

/// A file system in memory.
#[derive(Debug, Clone)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

/// Every disk's clock stands still, so that the same operations leave the same bytes.
pub const NOW: u64 = 1_750_000_000;

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EEXIST: i32 = 17;
const EISDIR: i32 = 21;
const ENOSPC: i32 = 28;
const EROFS: i32 = 30;

impl SimulatedDisk {
    /// A disk that only has to work.
    pub fn new(image: &Image) -> SimulatedDisk {
        SimulatedDisk::with(image, false, Faults::default())
    }

    /// A disk that records.
    pub fn recording(image: &Image) -> SimulatedDisk {
        SimulatedDisk::with(image, true, Faults::default())
    }

    pub fn with(image: &Image, record: bool, faults: Faults) -> SimulatedDisk {
        let state = State {
            medium: Medium::new(image, false),
            log: record.then(Vec::new),
            faults,
            seen: 0,
            rng: Rng(faults.short.unwrap_or(0)),
            locks: BTreeMap::new(),
        };
        SimulatedDisk { state: Arc::new(Mutex::new(state)) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a program sees now.
    pub fn live(&self) -> Image {
        self.state().medium.live()
    }

    /// Operations so far.
    pub fn len(&self) -> usize {
        self.state().log.as_ref().map_or(0, Vec::len)
    }

    /// The operations.
    pub fn log(&self) -> Vec<Op> {
        self.state().log.clone().unwrap_or_default()
    }

    /// Whether the fault's time came.
    pub fn hit(&self) -> bool {
        let state = self.state();
        state.faults.fail.is_some_and(|(_, after)| state.seen > after)
    }

    /// From now on this fails and nothing else.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.state();
        state.faults = faults;
        state.seen = 0;
    }
}

impl State {
    fn apply(&mut self, op: Op) {
        self.medium.apply(&op);
        if let Some(log) = &mut self.log {
            log.push(op);
        }
    }

    /// True if the fault is of this kind and its time has come; `lasting` ones stay.
    fn hits(&mut self, fault: Fault, lasting: bool) -> bool {
        let Some((what, after)) = self.faults.fail else { return false };
        if what != fault {
            return false;
        }
        self.seen += 1;
        match lasting {
            true => self.seen > after,
            false => self.seen == after + 1,
        }
    }

    /// The process has come to the barrier at which it ends.
    fn dead(&self) -> bool {
        self.faults.fail.is_some_and(|(what, after)| what == Fault::Death && self.seen > after)
    }

    /// The errors of a barrier that the process does not live to see.
    fn may_sync(&mut self) -> io::Result<()> {
        match self.hits(Fault::Death, true) {
            true => Err(errno(EIO)),
            false => Ok(()),
        }
    }

    /// The errors of an operation that changes something; `grows` if it needs room.
    fn may_change(&mut self, grows: bool) -> io::Result<()> {
        if self.dead() {
            return Err(errno(EIO));
        }
        if self.hits(Fault::ReadOnly, true) {
            return Err(errno(EROFS));
        }
        if grows && self.hits(Fault::NoSpace, true) {
            return Err(errno(ENOSPC));
        }
        Ok(())
    }

    /// How much of `n` bytes one call moves.
    fn short(&mut self, n: usize) -> usize {
        match self.faults.short {
            Some(_) if n > 1 && self.rng.below(3) == 0 => 1 + self.rng.below(n),
            _ => n,
        }
    }

    fn parent_of(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().filter(|parent| *parent != Path::new("/"));
        match parent.is_none_or(|parent| self.medium.node(parent) == Some(Node::Dir)) {
            true => Ok(()),
            false => Err(errno(ENOENT)),
        }
    }
}

impl Storage for SimulatedDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn StorageFile>> {
        let mut state = self.state();
        let handle = |file| SimulatedFile { disk: self.clone(), file, path: path.into(), lock: Mutex::new(None) };
        let file = match state.medium.node(path) {
            Some(Node::Dir) => return Err(errno(EISDIR)),
            Some(Node::File(file)) => file,
            None if matches!(how, Open::Create | Open::Lock) => {
                state.parent_of(path)?;
                state.may_change(true)?;
                let file = state.medium.add_file();
                state.apply(Op::Create { path: path.into(), node: Node::File(file) });
                return Ok(Box::new(handle(file)));
            }
            None => return Err(errno(ENOENT)),
        };
        if how == Open::Create && state.dead() {
            return Err(errno(EIO));
        }
        // A file system that is read-only refuses it when it is opened.
        if how != Open::Read && state.hits(Fault::ReadOnly, true) {
            return Err(errno(EROFS));
        }
        if how == Open::Create && !state.medium.content(file).is_empty() {
            state.apply(Op::SetLen { file, path: path.into(), bytes: 0 });
        }
        Ok(Box::new(handle(file)))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let state = self.state();
        match state.medium.node(path) {
            None => Err(errno(ENOENT)),
            Some(Node::Dir) => Ok(Stat { kind: Kind::Dir, bytes: 0, links: 2 }),
            Some(Node::File(file)) => {
                let links = state.medium.live_names().filter(|(_, node)| *node == Node::File(file)).count();
                Ok(Stat { kind: Kind::File, bytes: state.medium.content(file).len() as u64, links: links as u64 })
            }
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let state = self.state();
        if state.medium.node(dir) != Some(Node::Dir) {
            return Err(errno(ENOENT));
        }
        let inside = state.medium.live_names().filter(|(path, _)| path.is_in(dir));
        Ok(inside.filter_map(|(path, _)| path.path().file_name()).map(OsString::from).collect())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.medium.node(path).is_some() {
            return Err(errno(EEXIST));
        }
        state.parent_of(path)?;
        state.may_change(true)?;
        state.apply(Op::Create { path: path.into(), node: Node::Dir });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        let Some(node) = state.medium.node(from) else { return Err(errno(ENOENT)) };
        state.parent_of(to)?;
        state.may_change(false)?;
        // POSIX: two names of one file stay as they are.
        if state.medium.node(to) == Some(node) {
            return Ok(());
        }
        state.apply(Op::Rename { from: from.into(), to: to.into() });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        match state.medium.node(path) {
            None => return Err(errno(ENOENT)),
            Some(Node::Dir) => return Err(errno(EISDIR)),
            Some(Node::File(_)) => {}
        }
        state.may_change(false)?;
        state.apply(Op::Remove { path: path.into() });
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.medium.node(dir) != Some(Node::Dir) {
            return Err(errno(ENOENT));
        }
        state.may_sync()?;
        if state.hits(Fault::Sync, false) {
            state.apply(Op::SyncDirFailed { dir: dir.into() });
            return Err(errno(EIO));
        }
        state.apply(Op::SyncDir { dir: dir.into() });
        Ok(())
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(1 << 40)
    }

    fn now_unix(&self) -> u64 {
        NOW
    }
}

/// An open file of a [`SimulatedDisk`]. Its name may go; its content stays until it is closed.
#[derive(Debug)]
struct SimulatedFile {
    disk: SimulatedDisk,
    file: FileId,
    path: Arc<Path>,
    /// The lock that it holds: true for an exclusive one.
    lock: Mutex<Option<bool>>,
}

impl StorageFile for SimulatedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.state();
        if state.hits(Fault::Read, false) {
            return Err(errno(EIO));
        }
        let n = state.short(buf.len());
        let content = state.medium.content(self.file);
        let from = content.len().min(offset as usize);
        let part = &content[from..content.len().min(from + n)];
        buf[..part.len()].copy_from_slice(part);
        Ok(part.len())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.state();
        state.may_change(true)?;
        let fails = state.hits(Fault::Write, false);
        let n = match fails {
            true => state.rng.below(buf.len() + 1),
            false => state.short(buf.len()),
        };
        // At the end of a sector, as assumption 1 says.
        let end = (offset as usize + n) / SECTOR * SECTOR;
        let n = match end.checked_sub(offset as usize) {
            _ if n == buf.len() => n,
            Some(n) if n > 0 || fails => n,
            Some(_) => buf.len(),
            None if fails => 0,
            None => buf.len(),
        };
        let bytes: Arc<[u8]> = buf[..n].into();
        state.apply(Op::Write { file: self.file, path: self.path.clone(), at: offset as usize, bytes });
        match fails {
            true => Err(errno(EIO)),
            false => Ok(n),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        let (file, path) = (self.file, self.path.clone());
        state.may_sync()?;
        if state.hits(Fault::Sync, false) {
            state.apply(Op::SyncFailed { file, path });
            return Err(errno(EIO));
        }
        state.apply(Op::Sync { file, path });
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        let mut state = self.disk.state();
        state.may_change(true)?;
        state.apply(Op::SetLen { file: self.file, path: self.path.clone(), bytes: bytes as usize });
        Ok(())
    }

    fn try_lock(&self, exclusive: bool) -> io::Result<bool> {
        let mut state = self.disk.state();
        let mut mine = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let held = state.locks.entry(self.file).or_default();
        let others = (held.0 - usize::from(*mine == Some(false)), held.1 && *mine != Some(true));
        if others.1 || (exclusive && others.0 > 0) {
            return Ok(false);
        }
        *held = match exclusive {
            true => (others.0, true),
            false => (others.0 + 1, false),
        };
        *mine = Some(exclusive);
        Ok(true)
    }
}

impl Drop for SimulatedFile {
    fn drop(&mut self) {
        let mine = self.lock.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(exclusive) = *mine else { return };
        let mut state = self.disk.state();
        let held = state.locks.get_mut(&self.file).expect("locked");
        match exclusive {
            true => held.1 = false,
            false => held.0 -= 1,
        }
    }
}

/// The folder of the model on every simulated disk.
pub fn model_dir() -> PathBuf {
    PathBuf::from("/model")
}
