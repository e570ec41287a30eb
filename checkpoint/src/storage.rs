//! The file system as the protocol sees it, behind a trait: so that a test can be the disk.
//!
//! # What the protocol assumes of a medium
//!
//! 1. **A sector is 512 bytes** at multiples of 512. A crash leaves of each sector that was written since its file's last
//!    [`StorageFile::sync`] any of its contents since then, whatever became of other sectors: writes may be reordered,
//!    split and left out at will between two syncs. A sector that was being written at that moment may also be torn once:
//!    its beginning is of one write and its end of the other. A write that is cut short is cut between two sectors. A disk
//!    that gives an I/O error for a sector is told by name.
//! 2. **The length of a file** that grew is any length between the two, and what was never written reads as zeros.
//! 3. **`sync` that succeeds** makes everything durable that was written to that file before it began. One that fails
//!    says nothing: what was written may be on the disk or not, later reads may show it and later syncs pass over it.
//! 4. **Names** (create, rename, remove, create_dir) become durable with [`Storage::sync_dir`] of their folders. Before
//!    that each may or may not have happened, in any order among different names. A rename is atomic: the old name
//!    or the new, or, on some file systems, both; never neither. A file's content does not make its name durable. After a
//!    `sync_dir` that failed they are as uncertain as before, and one that succeeds later covers them: file systems keep
//!    names by themselves, and give up where they cannot.
//! 5. **Reads** give what was written, before and after a crash, but for the above: what a disk flips later is found by
//!    checksums, not mended.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// For reading.
    Read,
    /// For writing, created or emptied.
    Create,
    /// For reading and writing what is there; a symbolic link is refused.
    InPlace,
    /// For reading, writing and locking, created if it is not there; a symbolic link is refused.
    Lock,
}

/// What a name stands for; links are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: Kind,
    /// Length in bytes.
    pub bytes: u64,
    /// Number of hard links.
    pub links: u64,
}

/// The kinds of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Dir,
    /// A symbolic link.
    Symlink,
    /// Anything else.
    Other,
}

/// A file system. All errors are the system's.
pub trait Storage: fmt::Debug + Send + Sync {
    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn StorageFile>>;

    /// What is there; a symbolic link itself, not its target.
    fn stat(&self, path: &Path) -> io::Result<Stat>;

    /// The names in a folder, in any order.
    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>>;

    /// Creates a folder in a folder that is there.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Renames a file, over another one if there is one.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// fsync of a folder: the names in it are durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Bytes that this user may still write there.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;

    /// Seconds since 1970 UTC, as the machine believes.
    fn now_unix(&self) -> u64;
}

/// An open file. Reads and writes may be shorter than asked for, and are continued by the caller.
pub trait StorageFile: fmt::Debug + Send + Sync {
    /// Reads from `offset` into `buf`; 0 at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Writes at `offset`, past the end too.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;

    /// Begins to bring to the disk what was written there, without waiting: a hint, which promises nothing.
    fn start_writing(&self, offset: u64, bytes: u64) {
        let _ = (offset, bytes);
    }

    /// What was written there is not read again soon: gives its memory in the page cache back where it is on the disk
    /// already. A hint, which promises nothing. It must not wait for the disk: an error that a wait is told of is not told
    /// to [`StorageFile::sync`] any more.
    fn let_go(&self, offset: u64, bytes: u64) {
        let _ = (offset, bytes);
    }

    /// fdatasync: content and length are durable. Never called again after it failed.
    fn sync(&self) -> io::Result<()>;

    /// Cuts the file, or lengthens it by zeros.
    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Takes a lock on the file until it is closed, without waiting: false if somebody else's lock forbids it.
    fn try_lock(&self, exclusive: bool) -> io::Result<bool>;
}

/// The operating system's files.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealStorage;

impl Storage for RealStorage {
    fn open(&self, path: &Path, how: Open) -> io::Result<Box<dyn StorageFile>> {
        let mut options = OpenOptions::new();
        match how {
            Open::Read => options.read(true),
            Open::Create => options.write(true).create(true).truncate(true),
            Open::InPlace => options.read(true).write(true).custom_flags(OFlags::NOFOLLOW.bits() as i32),
            Open::Lock => options.read(true).write(true).create(true).custom_flags(OFlags::NOFOLLOW.bits() as i32),
        };
        Ok(Box::new(options.open(path)?))
    }

    fn stat(&self, path: &Path) -> io::Result<Stat> {
        let stat = fs::symlink_metadata(path)?;
        let kind = match stat.file_type() {
            kind if kind.is_symlink() => Kind::Symlink,
            kind if kind.is_file() => Kind::File,
            kind if kind.is_dir() => Kind::Dir,
            _ => Kind::Other,
        };
        Ok(Stat { kind, bytes: stat.len(), links: stat.nlink() })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn now_unix(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_secs())
    }
}

impl StorageFile for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, buf, offset)
    }

    #[cfg(target_os = "linux")]
    #[allow(unsafe_code)]
    fn start_writing(&self, offset: u64, bytes: u64) {
        use std::os::fd::AsRawFd;
        let (Ok(offset), Ok(bytes)) = (offset.try_into(), bytes.try_into()) else { return };
        // SAFETY: the call takes a descriptor, which is open while `self` lives, and three numbers; it touches no memory
        // of this process. That it fails where a file system cannot do it is of no consequence: `sync` follows.
        unsafe { libc::sync_file_range(self.as_raw_fd(), offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    }

    #[cfg(target_os = "linux")]
    fn let_go(&self, offset: u64, bytes: u64) {
        if let Some(bytes) = std::num::NonZeroU64::new(bytes) {
            let _ = rustix::fs::fadvise(self, offset, Some(bytes), rustix::fs::Advice::DontNeed);
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        File::set_len(self, bytes)
    }

    fn try_lock(&self, exclusive: bool) -> io::Result<bool> {
        let operation = match exclusive {
            true => FlockOperation::NonBlockingLockExclusive,
            false => FlockOperation::NonBlockingLockShared,
        };
        match flock(self, operation) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}
