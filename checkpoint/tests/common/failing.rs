//! A file system on which what a test names goes wrong, until it is well again. Its clock and its room are the test's.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use checkpoint::{Open, RealStorage, Stat, Storage, StorageFile};

pub const EIO: i32 = 5;
pub const EACCES: i32 = 13;
pub const ENOSPC: i32 = 28;
pub const EROFS: i32 = 30;

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Create,
    Write,
    Read,
    List,
    /// fsync of a file or a folder.
    Sync,
    Rename,
    Remove,
}

#[derive(Debug)]
struct Fault {
    operation: Operation,
    /// The end of the paths that are meant.
    path: PathBuf,
    errno: i32,
    /// How often it still goes well.
    passes: usize,
}

#[derive(Debug)]
struct State {
    broken: Mutex<Vec<Fault>>,
    /// How often a fault was met.
    met: AtomicU64,
    /// Every change fails with this error, 0 for none.
    sealed: AtomicU64,
    /// Bytes that can still be written, the blocks of a file in place among them, as where files are copied on write.
    room: AtomicU64,
    /// Bytes that are said to be free, which may be too many.
    free: AtomicU64,
    now: AtomicU64,
    /// What was synced, in order.
    synced: Mutex<Vec<PathBuf>>,
    /// Whether files are told that writing may begin. Where they are not, this is a file system that cannot.
    hints: AtomicBool,
}

/// Real files in such surroundings.
#[derive(Debug, Clone)]
pub struct Failing(Arc<State>);

impl Failing {
    pub fn new() -> Arc<Failing> {
        Arc::new(Failing(Arc::new(State {
            broken: Mutex::new(Vec::new()),
            met: AtomicU64::new(0),
            sealed: AtomicU64::new(0),
            room: AtomicU64::new(u64::MAX),
            free: AtomicU64::new(u64::MAX),
            synced: Mutex::new(Vec::new()),
            now: AtomicU64::new(RealStorage.now_unix()),
            hints: AtomicBool::new(false),
        })))
    }

    /// This operation fails from now on for every path that ends so.
    pub fn fail(&self, operation: Operation, path: &str, errno: i32) {
        self.fail_after(0, operation, path, errno);
    }

    /// The same, after it went well so many times.
    pub fn fail_after(&self, passes: usize, operation: Operation, path: &str, errno: i32) {
        self.0.broken.lock().unwrap().push(Fault { operation, path: path.into(), errno, passes });
    }

    /// Whether anything failed by [`Failing::fail`] or [`Failing::fail_after`] so far.
    pub fn has_failed(&self) -> bool {
        self.0.met.load(Ordering::SeqCst) > 0
    }

    /// Every change fails from now on.
    pub fn seal(&self, errno: i32) {
        self.0.sealed.store(errno as u64, Ordering::SeqCst);
    }

    /// So many bytes can be written from now on.
    pub fn leave_room(&self, bytes: u64) {
        self.0.room.store(bytes, Ordering::SeqCst);
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        self.0.broken.lock().unwrap().clear();
        self.seal(0);
        self.leave_room(u64::MAX);
        self.say_free(u64::MAX);
    }

    /// So many bytes are said to be free, however many are.
    pub fn say_free(&self, bytes: u64) {
        self.0.free.store(bytes, Ordering::SeqCst);
    }

    /// The files and folders that were synced so far, sorted, each as often as it was.
    pub fn synced(&self) -> Vec<PathBuf> {
        let mut synced = self.0.synced.lock().unwrap().clone();
        synced.sort();
        synced
    }

    pub fn set_clock(&self, unix: u64) {
        self.0.now.store(unix, Ordering::SeqCst);
    }

    /// Passes hints on to the system from now on.
    pub fn take_hints(&self) {
        self.0.hints.store(true, Ordering::SeqCst);
    }

    fn check(&self, operation: Operation, path: &Path) -> io::Result<()> {
        if !matches!(operation, Operation::Read | Operation::List) {
            self.change()?;
        }
        let mut broken = self.0.broken.lock().unwrap();
        match broken.iter_mut().find(|fault| fault.operation == operation && path.ends_with(&fault.path)) {
            None => Ok(()),
            Some(Fault { passes, .. }) if *passes > 0 => {
                *passes -= 1;
                Ok(())
            }
            Some(Fault { errno, .. }) => {
                self.0.met.fetch_add(1, Ordering::SeqCst);
                Err(io::Error::from_raw_os_error(*errno))
            }
        }
    }

    fn change(&self) -> io::Result<()> {
        match self.0.sealed.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }

    /// Takes up to `bytes` of the room: as much as there is, and an error if there is none.
    fn take_room(&self, bytes: usize) -> io::Result<usize> {
        let take = |room: u64| Some(room - room.min(bytes as u64));
        let room = self.0.room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).unwrap();
        match room {
            0 => Err(io::Error::from_raw_os_error(ENOSPC)),
            room => Ok(room.min(bytes as u64) as usize),
        }
    }
}

#[derive(Debug)]
struct File {
    file: Box<dyn StorageFile>,
    path: PathBuf,
    of: Failing,
}

impl Storage for Failing {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn StorageFile>> {
        match how {
            Open::Read => {}
            Open::Create => self.check(Operation::Create, path)?,
            Open::InPlace | Open::Lock => self.change()?,
        }
        Ok(Box::new(File { file: RealStorage.open(path, how)?, path: path.into(), of: self.clone() }))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        RealStorage.stat(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.check(Operation::List, dir)?;
        RealStorage.list(dir)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.check(Operation::Create, path)?;
        RealStorage.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check(Operation::Rename, from)?;
        RealStorage.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.check(Operation::Remove, path)?;
        RealStorage.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.check(Operation::Sync, dir)?;
        self.0.synced.lock().unwrap().push(dir.into());
        RealStorage.sync_dir(dir)
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Ok(self.0.free.load(Ordering::SeqCst))
    }

    fn now_unix(&self) -> u64 {
        self.0.now.load(Ordering::SeqCst)
    }
}

impl StorageFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.of.check(Operation::Read, &self.path)?;
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.of.check(Operation::Write, &self.path)?;
        let n = self.of.take_room(buf.len())?;
        self.file.write_at(&buf[..n], offset)
    }

    fn start_writing(&self, offset: u64, bytes: u64) {
        if self.of.0.hints.load(Ordering::SeqCst) {
            self.file.start_writing(offset, bytes);
        }
    }

    fn let_go(&self, offset: u64, bytes: u64) {
        if self.of.0.hints.load(Ordering::SeqCst) {
            self.file.let_go(offset, bytes);
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.of.check(Operation::Sync, &self.path)?;
        self.of.0.synced.lock().unwrap().push(self.path.clone());
        self.file.sync()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.of.change()?;
        self.file.set_len(bytes)
    }

    fn try_lock(&self, exclusive: bool) -> io::Result<bool> {
        self.file.try_lock(exclusive)
    }
}
