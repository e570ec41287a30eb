//! Whole directories, for readers who take no lock: `MODEL.generations/G` beside `MODEL`, and `current` among them.
//!
//! ```text
//! MODEL.generations/7/                    generation 7 as a model directory that nobody writes into any more
//! MODEL.generations/7/generation.json     its document, with the checksum of every tensor
//! MODEL.generations/current -> 7          switched by one rename
//! MODEL.generations/.8.partial-PID/       being made, or left by a crash
//! ```
//! A directory gets its number when it is whole, checked and on the disk, and is named by `current` after that. So
//! `current` names a whole generation at every moment, and a crash leaves what the next [`Checkpoint::publish`] removes.
//! The one that `current` named before stays until the next is begun: who opened it can finish. The files are clones that share
//! their blocks where the file system can do that (btrfs, xfs), and copies elsewhere.

use std::fmt;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::checkpoint::Checkpoint;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::export::{self, DOCUMENT};

/// What [`Checkpoint::publish`] did.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    /// The generation that `current` names.
    pub generation: u64,
    /// Its directory.
    pub path: PathBuf,
    /// Bytes that were copied; 0 if the file system could clone all files, or the directory was there already.
    pub bytes_copied: u64,
    /// Time it took.
    pub seconds: f64,
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Published { generation, path, bytes_copied, seconds } = self;
        write!(f, "{}: generation {generation}, {bytes_copied} bytes copied, {seconds:.2} s", path.display())
    }
}

impl Checkpoint {
    /// Makes a directory of its own of the current generation and lets `MODEL.generations/current` name it. First it removes
    /// what a crash left and all directories but the one that `current` names, so that two are there at the end.
    /// Makes none if `current` names this generation already.
    ///
    /// Errors: no room for a copy, or the system's. `current` names what it named before then.
    pub fn publish(&self) -> Result<Published> {
        self.usable()?;
        let began = Instant::now();
        let model = self.model_dir();
        let (root, number) = (beside(model)?, self.current().generation);
        let disk = Disk::real();
        disk.create_dir(&root)?;
        let (path, link) = (root.join(number.to_string()), root.join("current"));
        let before = named(&link)?;
        let last = if before == Some(number) { greatest_below(&root, number)? } else { before };
        remove_all_but(&root, &[last, Some(number)])?;
        let same = fs::read(path.join(DOCUMENT)).is_ok_and(|document| document == self.current().to_json());
        let mut bytes_copied = 0;
        if !same {
            if before == Some(number) {
                let reason = "it is of another history with the same numbers; remove it".into();
                return Err(Error::Target { path, reason });
            }
            remove(&path)?;
            check_room(disk.free_bytes(&root)?, model, &root)?;
            bytes_copied = export::export_with_document(model, &path)?.bytes_copied;
        }
        if before != Some(number) {
            let new = root.join("current.tmp");
            symlink(number.to_string(), &new).map_err(Error::io("create", &new))?;
            disk.rename(&new, &link)?;
            disk.sync_dir(&root)?;
        }
        Ok(Published { generation: number, path, bytes_copied, seconds: began.elapsed().as_secs_f64() })
    }
}

/// `MODEL.generations`, whatever name `MODEL` was given by.
fn beside(model: &Path) -> Result<PathBuf> {
    let real = model.canonicalize().map_err(Error::io("find", model))?;
    let (Some(parent), Some(name)) = (real.parent(), real.file_name()) else {
        return Err(Error::Target { path: real, reason: "it is no folder in another".into() });
    };
    let mut name = name.to_owned();
    name.push(".generations");
    Ok(parent.join(name))
}

/// The directories of generations beside a model, in any order; none where there are none.
pub(crate) fn all(model: &Path) -> Result<Vec<PathBuf>> {
    let Ok(root) = beside(model) else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(&root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", &root)(error)),
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>();
    let mut paths = paths.map_err(Error::io("list", &root))?;
    paths
        .retain(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<u64>().is_ok()));
    Ok(paths)
}

/// The generation that the link names.
fn named(link: &Path) -> Result<Option<u64>> {
    match fs::read_link(link) {
        Ok(target) => Ok(target.to_str().and_then(|name| name.parse().ok())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", link)(error)),
    }
}

/// The directory that was made before that of `number`.
fn greatest_below(root: &Path, number: u64) -> Result<Option<u64>> {
    let mut greatest = None;
    for entry in fs::read_dir(root).map_err(Error::io("list", root))? {
        let name = entry.map_err(Error::io("list", root))?.file_name();
        let other = name.to_str().and_then(|name| name.parse().ok());
        greatest = greatest.max(other.filter(|other| *other < number));
    }
    Ok(greatest)
}

/// Removes other generations, and everything that was being made. What has other names is not ours and stays.
fn remove_all_but(root: &Path, keep: &[Option<u64>]) -> Result<()> {
    for entry in fs::read_dir(root).map_err(Error::io("list", root))? {
        let name = entry.map_err(Error::io("list", root))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let partial = name.strip_prefix('.').and_then(|rest| rest.split_once(".partial-"));
        let old = match partial {
            Some((number, _)) => number.parse::<u64>().is_ok(),
            None => name == "current.tmp" || name.parse().is_ok_and(|number| !keep.contains(&Some(number))),
        };
        if old {
            remove(&root.join(name))?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(stat) if stat.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Refuses before anything is copied, unless files are cloned there.
fn check_room(free: u64, model: &Path, root: &Path) -> Result<()> {
    let (largest, need) = export::size(model)?;
    let probe = root.join(".0.partial-probe");
    let cloned = match (&largest, File::create(&probe)) {
        (Some(largest), Ok(target)) => {
            let source = File::open(largest).map_err(Error::io("open", largest))?;
            rustix::fs::ioctl_ficlone(&target, &source).is_ok()
        }
        (None, Ok(_)) => true,
        (_, Err(error)) => return Err(Error::io("create", &probe)(error)),
    };
    remove(&probe)?;
    if !cloned && free < need {
        return Err(Error::NoRoom { dir: root.to_path_buf(), need, free });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_without_room_is_refused_before_it_is_begun() {
        let dir = tempfile::tempdir().unwrap();
        let (model, root) = (dir.path().join("model"), dir.path().join("model.generations"));
        fs::create_dir_all(model.join("sub")).unwrap();
        fs::create_dir_all(model.join(".apollod")).unwrap();
        fs::create_dir(&root).unwrap();
        for (name, bytes) in [("a", 5000), ("sub/b", 100), (".apollod/state", 9999)] {
            fs::write(model.join(name), vec![1; bytes]).unwrap();
        }
        check_room(5100, &model, &root).unwrap();
        match check_room(5099, &model, &root) {
            Err(Error::NoRoom { need, free, .. }) => assert_eq!((need, free), (5100, 5099)),
            Err(error) => panic!("{error}"),
            // A file system that clones.
            Ok(()) => check_room(0, &model, &root).unwrap(),
        }
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }
}
