//! Every file operation of the protocol, in one place: create, write, fdatasync, rename, fsync of a folder.
//!
//! The order of these calls is the whole of crash safety, so no other module of the protocol touches the
//! file system for writing. [`Disk::reached`] marks the numbered points between them, where a test can
//! stop the process or make the operation fail.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};

/// The points of the protocol at which a crash is simulated, in their order. Each lies after the
/// thing it is named for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CrashPoint {
    /// The optimizer state is written, not synced.
    StateWritten,
    /// The optimizer state is synced.
    StateSynced,
    /// A record of the journal is written (arrived at once per record).
    JournalPartial,
    /// The journal is whole, not synced.
    JournalWritten,
    /// The journal is synced under its temporary name.
    JournalSynced,
    /// The journal has its name: from here on the generation is certain.
    JournalPublished,
    /// The blocks of a record are written to their shard (arrived at once per record).
    BlocksPartial,
    /// All blocks are written, no shard is synced.
    BlocksWritten,
    /// All shards are synced.
    ShardsSynced,
    /// The generation's document is written and synced under its temporary name.
    GenerationWritten,
    /// The generation is published.
    GenerationPublished,
    /// The journal is in the history.
    JournalRetired,
    /// One file too old to keep is removed (arrived at once per file).
    PrunePartial,
    /// All done.
    Pruned,
}

impl CrashPoint {
    /// All points in the order in which a sync passes them.
    pub const ALL: [CrashPoint; 14] = [
        CrashPoint::StateWritten,
        CrashPoint::StateSynced,
        CrashPoint::JournalPartial,
        CrashPoint::JournalWritten,
        CrashPoint::JournalSynced,
        CrashPoint::JournalPublished,
        CrashPoint::BlocksPartial,
        CrashPoint::BlocksWritten,
        CrashPoint::ShardsSynced,
        CrashPoint::GenerationWritten,
        CrashPoint::GenerationPublished,
        CrashPoint::JournalRetired,
        CrashPoint::PrunePartial,
        CrashPoint::Pruned,
    ];

    /// The name in kebab case, as in `journal-synced`.
    pub fn name(self) -> &'static str {
        match self {
            CrashPoint::StateWritten => "state-written",
            CrashPoint::StateSynced => "state-synced",
            CrashPoint::JournalPartial => "journal-partial",
            CrashPoint::JournalWritten => "journal-written",
            CrashPoint::JournalSynced => "journal-synced",
            CrashPoint::JournalPublished => "journal-published",
            CrashPoint::BlocksPartial => "blocks-partial",
            CrashPoint::BlocksWritten => "blocks-written",
            CrashPoint::ShardsSynced => "shards-synced",
            CrashPoint::GenerationWritten => "generation-written",
            CrashPoint::GenerationPublished => "generation-published",
            CrashPoint::JournalRetired => "journal-retired",
            CrashPoint::PrunePartial => "prune-partial",
            CrashPoint::Pruned => "pruned",
        }
    }

    /// True if the operation before this point is an fsync.
    fn is_sync(self) -> bool {
        matches!(self, CrashPoint::StateSynced | CrashPoint::JournalSynced | CrashPoint::ShardsSynced)
    }
}

impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CrashPoint {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        CrashPoint::ALL
            .into_iter()
            .find(|point| point.name() == name)
            .ok_or_else(|| format!("`{name}` is no crash point"))
    }
}

/// What happens at a crash point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashAction {
    /// The process aborts, as by SIGKILL.
    Abort,
    /// The operation returns at once with [`Error::Stopped`] and cleans nothing up.
    Stop,
    /// The operation before the point fails with this errno, through the ordinary handling of errors.
    Errno(i32),
}

/// A simulated failure: the test hook of [`crate::Checkpoint::crash_at`] and [`crate::Options`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub point: CrashPoint,
    /// How many arrivals at the point pass before it happens.
    pub after: u32,
    /// What.
    pub action: CrashAction,
}

/// The file system as the protocol uses it.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    fault: Option<Fault>,
    unsynced: Unsynced,
}

/// Files that were written since their last fdatasync; true for one written in place.
type Unsynced = Arc<Mutex<BTreeMap<PathBuf, bool>>>;

impl Disk {
    pub(crate) fn new(fault: Option<Fault>) -> Disk {
        Disk { fault, unsynced: Unsynced::default() }
    }

    /// Marks a point between two operations; `path` is what the operation before it worked on.
    pub(crate) fn reached(&mut self, point: CrashPoint, path: &Path) -> Result<()> {
        let Some(fault) = self.fault.as_mut().filter(|fault| fault.point == point) else {
            return Ok(());
        };
        if fault.after > 0 {
            fault.after -= 1;
            return Ok(());
        }
        match fault.action {
            CrashAction::Abort => std::process::abort(),
            CrashAction::Stop => Err(Error::Stopped(point)),
            CrashAction::Errno(errno) => {
                let source = io::Error::from_raw_os_error(errno);
                if point.is_sync() {
                    let path = path.to_path_buf();
                    return Err(Error::Sync { path, source });
                }
                Err(Error::io("write", path)(source))
            }
        }
    }

    /// Creates a folder if it is not there and makes its name durable.
    pub(crate) fn create_dir(&self, path: &Path) -> Result<()> {
        match fs::create_dir(path) {
            Ok(()) => self.sync_dir(path.parent().unwrap_or(Path::new("."))),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(Error::io("create", path)(error)),
        }
    }

    /// Creates or empties a file for writing.
    pub(crate) fn create(&self, path: &Path) -> Result<DiskFile> {
        let file = File::create(path).map_err(Error::io("create", path))?;
        Ok(self.track(file, path, false))
    }

    /// Opens a file for writing in place; a symbolic link is refused.
    pub(crate) fn open_in_place(&self, path: &Path) -> Result<DiskFile> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(path)
            .map_err(Error::io("open", path))?;
        Ok(self.track(file, path, true))
    }

    fn track(&self, file: File, path: &Path, in_place: bool) -> DiskFile {
        DiskFile { file, path: path.to_path_buf(), in_place, unsynced: Arc::clone(&self.unsynced) }
    }

    /// Renames within one file system; durable only after [`Disk::sync_dir`].
    ///
    /// A rename publishes, so the file itself and every file written in place must be on the disk: a
    /// missing barrier is our own mistake and never shows without a power cut, hence the assertion.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let open = self.unsynced.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let early = open.iter().find(|(path, in_place)| **in_place || path.as_path() == from);
        assert!(early.is_none(), "{} is renamed before {early:?} was synced", from.display());
        fs::rename(from, to).map_err(Error::io("rename", from))
    }

    /// Removes a file; one that is not there is no error.
    pub(crate) fn remove(&self, path: &Path) -> Result<bool> {
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("remove", path)(error)),
        }
    }

    /// Makes the names in a folder durable.
    pub(crate) fn sync_dir(&self, path: &Path) -> Result<()> {
        let dir = File::open(path).map_err(Error::io("open", path))?;
        dir.sync_all().map_err(|source| Error::Sync { path: path.to_path_buf(), source })
    }

    /// Writes a whole file through `path.tmp`, so that its name only ever shows whole content.
    /// `written` is called before the rename.
    pub(crate) fn replace(&mut self, path: &Path, bytes: &[u8], written: Option<CrashPoint>) -> Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(".tmp");
        let tmp = PathBuf::from(name);
        let mut file = self.create(&tmp)?;
        file.write_all(bytes).map_err(Error::io("write", &tmp))?;
        file.sync()?;
        if let Some(point) = written {
            self.reached(point, &tmp)?;
        }
        self.rename(&tmp, path)?;
        self.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }
}

/// An open file of the protocol.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    path: PathBuf,
    in_place: bool,
    unsynced: Unsynced,
}

impl DiskFile {
    fn note(&self, written: bool) {
        let mut unsynced = self.unsynced.lock().unwrap_or_else(PoisonError::into_inner);
        if written {
            unsynced.insert(self.path.clone(), self.in_place);
        } else {
            unsynced.remove(&self.path);
        }
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset).map_err(Error::io("read", &self.path))
    }

    /// Writes `buf` at `offset`, with `pwrite`.
    pub(crate) fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.note(true);
        self.file.write_all_at(buf, offset).map_err(Error::io("write", &self.path))
    }

    /// fdatasync. Never called twice after it failed.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::Sync { path: self.path.clone(), source })?;
        self.note(false);
        Ok(())
    }
}

impl Write for DiskFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.note(true);
        self.file.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that this user may still write on the file system of `path`.
pub(crate) fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
