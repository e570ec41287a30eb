//! File operations of the protocol with the errors of this crate, over any [`Storage`].
//!
//! The order of these calls is the whole of crash safety, so no other module of the protocol touches the
//! file system.

use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::storage::{Kind, Open, RealStorage, Stat, Storage, StorageFile};

/// A file system and what the protocol does with it.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    storage: Arc<dyn Storage>,
}

impl Disk {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Disk {
        Disk { storage }
    }

    /// The operating system's.
    pub(crate) fn real() -> Disk {
        Disk::new(Arc::new(RealStorage))
    }

    /// What the path is; none if there is nothing.
    pub(crate) fn stat(&self, path: &Path) -> Result<Option<Stat>> {
        match self.storage.stat(path) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Whether there is anything by that name.
    pub(crate) fn exists(&self, path: &Path) -> Result<bool> {
        Ok(self.stat(path)?.is_some())
    }

    /// The names in a folder that end in `suffix`, without it, as numbers, ascending; none if there is no folder.
    pub(crate) fn numbers(&self, dir: &Path, suffix: &str) -> Result<Vec<u64>> {
        let names = match self.storage.list(dir) {
            Ok(names) => names,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("list", dir)(error)),
        };
        let number = |name: &std::ffi::OsString| name.to_str()?.strip_suffix(suffix)?.parse().ok();
        let mut numbers: Vec<u64> = names.iter().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Creates a folder if it is not there and makes its name durable.
    pub(crate) fn create_dir(&self, path: &Path) -> Result<()> {
        if self.stat(path)?.is_some_and(|stat| stat.kind == Kind::Dir) {
            return Ok(());
        }
        match self.storage.create_dir(path) {
            Ok(()) => self.sync_dir(path.parent().unwrap_or(Path::new("."))),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(Error::io("create", path)(error)),
        }
    }

    /// Opens a file for reading.
    pub(crate) fn open(&self, path: &Path) -> Result<DiskFile> {
        self.open_as(path, Open::Read, "open")
    }

    /// Creates or empties a file for writing.
    pub(crate) fn create(&self, path: &Path) -> Result<DiskFile> {
        self.open_as(path, Open::Create, "create")
    }

    /// Opens a file for writing in place; a symbolic link is refused.
    pub(crate) fn open_in_place(&self, path: &Path) -> Result<DiskFile> {
        self.open_as(path, Open::InPlace, "open for writing")
    }

    /// Opens or creates a file to be locked; a symbolic link is refused.
    pub(crate) fn open_lock(&self, path: &Path) -> Result<DiskFile> {
        self.open_as(path, Open::Lock, "open")
    }

    fn open_as(&self, path: &Path, how: Open, what: &'static str) -> Result<DiskFile> {
        let file = self.storage.open(path, how).map_err(Error::io(what, path))?;
        Ok(DiskFile { file, path: path.to_path_buf(), at: 0 })
    }

    /// A whole file.
    pub(crate) fn read(&self, path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        Ok(bytes)
    }

    /// Renames within one file system; durable only after [`Disk::sync_dir`].
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.storage.rename(from, to).map_err(Error::io("rename", from))
    }

    /// Removes a file: false if it was not there.
    pub(crate) fn remove(&self, path: &Path) -> Result<bool> {
        match self.storage.remove(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io("remove", path)(error)),
        }
    }

    /// Makes the names in a folder durable.
    pub(crate) fn sync_dir(&self, path: &Path) -> Result<()> {
        self.storage.sync_dir(path).map_err(|source| Error::Sync { path: path.to_path_buf(), source })
    }

    /// Writes a whole file through `path.tmp`, so that its name only ever shows whole content.
    pub(crate) fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(".tmp");
        let tmp = PathBuf::from(name);
        let mut file = self.create(&tmp)?;
        if let Err(error) = file.write_all(bytes).map_err(Error::io("write", &tmp)) {
            // On a full disk it is in the way of what comes next; whoever opens removes what stays.
            let _ = self.remove(&tmp);
            return Err(error);
        }
        file.sync()?;
        self.rename(&tmp, path)?;
        self.sync_dir(path.parent().unwrap_or(Path::new(".")))
    }

    /// Bytes that this user may still write on the file system of `path`.
    pub(crate) fn free_bytes(&self, path: &Path) -> Result<u64> {
        self.storage.free_bytes(path).map_err(Error::io("ask for the free space of", path))
    }

    /// Seconds since 1970 UTC.
    pub(crate) fn now_unix(&self) -> u64 {
        self.storage.now_unix()
    }
}

/// An open file of the protocol. `Read` and `Write` go on where they stopped, from the file's start.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: Box<dyn StorageFile>,
    path: PathBuf,
    at: u64,
}

impl DiskFile {
    /// Fills `buf` from `offset`.
    pub(crate) fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => return Err(Error::io("read", &self.path)(ErrorKind::UnexpectedEof.into())),
                Ok(n) => (buf, offset) = (&mut buf[n..], offset + n as u64),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.path)(error)),
            }
        }
        Ok(())
    }

    /// Writes `buf` at `offset`.
    pub(crate) fn write_at(&self, mut buf: &[u8], mut offset: u64) -> Result<()> {
        while !buf.is_empty() {
            match self.file.write_at(buf, offset) {
                Ok(0) => return Err(Error::io("write", &self.path)(ErrorKind::WriteZero.into())),
                Ok(n) => (buf, offset) = (&buf[n..], offset + n as u64),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("write", &self.path)(error)),
            }
        }
        Ok(())
    }

    /// Begins to bring to the disk what was written there, without waiting.
    pub(crate) fn start_writing(&self, offset: u64, bytes: u64) {
        self.file.start_writing(offset, bytes);
    }

    /// Gives the memory back that holds what was written there, where that is on the disk already.
    pub(crate) fn let_go(&self, offset: u64, bytes: u64) {
        self.file.let_go(offset, bytes);
    }

    /// fdatasync. Never called twice after it failed.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|source| Error::Sync { path: self.path.clone(), source })
    }

    /// Empties the file and writes from its start.
    pub(crate) fn truncate(&mut self) -> Result<()> {
        self.at = 0;
        self.file.set_len(0).map_err(Error::io("write", &self.path))
    }

    /// Takes a lock until the file is dropped, without waiting: false if somebody else has one that forbids it.
    pub(crate) fn try_lock(&self, exclusive: bool) -> Result<bool> {
        self.file.try_lock(exclusive).map_err(Error::io("lock", &self.path))
    }

    /// Reads from the start again.
    pub(crate) fn rewind(&mut self) {
        self.at = 0;
    }
}

impl Read for DiskFile {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for DiskFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.file.write_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
