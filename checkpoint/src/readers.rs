//! Readers and syncs of one model directory keep out of each other's way.
//!
//! A sync writes the shards in place, so a program that loads the model meanwhile could get half of one generation and half
//! of the next. `.apollod/readers` is there for its lock (flock) alone: a reader holds it shared while it loads, and a sync,
//! a rollback or a recovery holds it exclusively from before its journal is begun until the generation is published. So whoever
//! has it shared and sees a journal knows that a crash left it, and that the files lie between two generations.
//!
//! A reader writes nothing, and takes the lock of a file that is there. Where it is not (nobody ever opened the directory for
//! writing), or may not be opened, a reader looks instead: no journal and the same generation before and after mean that
//! nothing was written in between.

use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::checkpoint::Checkpoint;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::Paths;
use crate::recover::Recovery;

/// How long a reader waits for a sync to end, or for the one who may to recover.
const WAIT: Duration = Duration::from_secs(600);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);

/// Keeps syncs from writing into a model directory while it is read, until it is dropped.
#[derive(Debug)]
pub struct Reading {
    paths: Paths,
    lock: Option<File>,
    before: u64,
    recovered: Option<Recovery>,
}

impl Reading {
    /// Waits for a sync that is running, at most ten minutes. What a crash left is recovered first, as
    /// [`Checkpoint::open`] does it.
    ///
    /// Errors: the wait was too short, or the recovery's.
    pub fn begin(model_dir: &Path) -> Result<Reading> {
        Reading::begin_within(model_dir, WAIT)
    }

    /// [`Reading::begin`] with another wait.
    pub fn begin_within(model_dir: &Path, wait: Duration) -> Result<Reading> {
        let (disk, paths, began) = (Disk::real(), Paths::new(model_dir), Instant::now());
        let mut recovered = None;
        loop {
            let lock = open_shared(&paths)?;
            let free = match &lock {
                Some(file) => try_lock(file, &paths)?,
                None => true,
            };
            if free && !paths.is_torn(&disk)? {
                let before = newest(&disk, &paths)?;
                return Ok(Reading { before, paths, lock, recovered });
            }
            let locked = lock.is_some();
            drop(lock);
            if free && locked {
                match Checkpoint::open(model_dir) {
                    Ok((_, recovery)) => {
                        recovered = Some(recovery);
                        continue;
                    }
                    // Its holder is about to recover, or could not.
                    Err(Error::Locked { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            if began.elapsed() >= wait {
                return Err(Error::Busy { dir: paths.model });
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What [`Reading::begin`] had to recover.
    pub fn recovered(&self) -> Option<&Recovery> {
        self.recovered.as_ref()
    }

    /// Ends it. An error means that what was read may be of two generations: only where there was no lock to be had.
    pub fn end(self) -> Result<()> {
        let disk = Disk::real();
        if self.lock.is_none() && (self.paths.is_torn(&disk)? || newest(&disk, &self.paths)? != self.before) {
            return Err(Error::Overwritten { dir: self.paths.model.clone() });
        }
        Ok(())
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some(lock) = &self.lock {
            // A child that was forked meanwhile may have the file open still.
            let _ = lock.unlock();
        }
    }
}

/// The number of the current generation. The first one is the files as they were.
fn newest(disk: &Disk, paths: &Paths) -> Result<u64> {
    Ok(paths.numbers(disk)?.last().copied().unwrap_or(0))
}

fn open_shared(paths: &Paths) -> Result<Option<File>> {
    let path = paths.readers();
    let none = [ErrorKind::NotFound, ErrorKind::NotADirectory, ErrorKind::PermissionDenied];
    match File::open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if none.contains(&error.kind()) => Ok(None),
        Err(error) => Err(Error::io("open", &path)(error)),
    }
}

fn try_lock(file: &File, paths: &Paths) -> Result<bool> {
    match file.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &paths.readers())(error)),
    }
}

/// Waits until nobody reads, and keeps readers out until the file is dropped.
pub(crate) fn keep_out(disk: &Disk, paths: &Paths, wait: Duration) -> Result<DiskFile> {
    let began = Instant::now();
    let file = disk.open_lock(&paths.readers())?;
    while !file.try_lock(true)? {
        if began.elapsed() >= wait {
            return Err(Error::Readers { dir: paths.model.clone(), waited: wait });
        }
        std::thread::sleep(LOOK);
    }
    Ok(file)
}
