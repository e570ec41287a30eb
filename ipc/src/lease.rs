//! One trainer at a time: a file that is locked for as long as its owner lives.
//!
//! The lock (`flock`) is what counts and dies with the process; the pid inside is only there to be told.
//! The file itself stays, because unlinking a lock file races with whoever opens it.

use crate::Error;
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An exclusive lock on a file, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lease {
    file: File,
    path: PathBuf,
}

impl Lease {
    /// Takes the lease at `path`, creating the file (mode 0600) if need be. Never waits.
    ///
    /// # Errors
    /// [`Error::Leased`] with the holder's pid if another process, or another lease of this one, has it.
    pub fn take(path: &Path) -> Result<Lease, Error> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|source| Error::io("open the lease", path, source))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
                return Err(Error::Leased { path: path.to_owned(), pid });
            }
            Err(error) => return Err(Error::io("lock", path, error)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|source| Error::io("write the lease", path, source))?;
        Ok(Lease { file, path: path.to_owned() })
    }

    /// Where the lease lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The pid is only a hint for people: if it cannot be removed, the lock is still released.
        let _ = self.file.set_len(0);
        // Closing would do, but not while a child that is being started still has a copy of the descriptor.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}
