//! A file system that stops: after so many changes every operation fails, and what is there stays as it is.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use checkpoint::{Open, RealStorage, Stat, Storage, StorageFile};

/// Real files until a number of writes, syncs, renames and removals have been made.
#[derive(Debug, Clone)]
pub struct Stopping {
    left: Arc<AtomicI64>,
    /// The process ends there instead.
    aborts: bool,
}

impl Stopping {
    pub fn after(changes: i64) -> Arc<Stopping> {
        Arc::new(Stopping { left: Arc::new(AtomicI64::new(changes)), aborts: false })
    }

    /// The process dies, as by SIGKILL, instead of the operation after so many.
    pub fn aborting_after(changes: i64) -> Arc<Stopping> {
        Arc::new(Stopping { left: Arc::new(AtomicI64::new(changes)), aborts: true })
    }

    /// Changes from now on until it stops.
    pub fn stop_after(&self, changes: i64) {
        self.left.store(changes, Ordering::SeqCst);
    }

    pub fn stopped(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }

    fn change(&self) -> io::Result<()> {
        self.left.fetch_sub(1, Ordering::SeqCst);
        if self.aborts && self.stopped() {
            std::process::abort();
        }
        self.alive()
    }

    fn alive(&self) -> io::Result<()> {
        if self.stopped() { Err(io::Error::other("stopped")) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct File {
    file: Box<dyn StorageFile>,
    of: Stopping,
}

impl Storage for Stopping {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn StorageFile>> {
        if how == Open::Create {
            self.change()?
        } else {
            self.alive()?
        }
        Ok(Box::new(File { file: RealStorage.open(path, how)?, of: self.clone() }))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        self.alive()?;
        RealStorage.stat(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.alive()?;
        RealStorage.list(dir)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        RealStorage.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change()?;
        RealStorage.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        RealStorage.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.change()?;
        RealStorage.sync_dir(dir)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealStorage.free_bytes(path)
    }

    fn now_unix(&self) -> u64 {
        RealStorage.now_unix()
    }
}

impl StorageFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.of.alive()?;
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.of.change()?;
        self.file.write_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.of.change()?;
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
