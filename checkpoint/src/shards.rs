//! The model's files as they are written in place: each opened when it is first needed, all made durable together.

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use crate::disk::{Disk, DiskFile};
use crate::error::Result;

/// Files by their number in a generation, of which those that were asked for are open.
#[derive(Debug)]
pub(crate) struct Shards<'a> {
    disk: &'a Disk,
    files: Vec<(PathBuf, Option<DiskFile>)>,
}

impl<'a> Shards<'a> {
    /// The files by these names in a model directory; none is open yet.
    pub(crate) fn new<'n>(disk: &'a Disk, model: &Path, names: impl Iterator<Item = &'n String>) -> Shards<'a> {
        Shards { disk, files: names.map(|name| (model.join(name), None)).collect() }
    }

    /// A file, for writing in place.
    pub(crate) fn file(&mut self, shard: usize) -> Result<&DiskFile> {
        let (path, file) = &mut self.files[shard];
        Ok(match file {
            Some(file) => file,
            closed => closed.insert(self.disk.open_in_place(path)?),
        })
    }

    /// Makes durable what was written: all files at once, or one after the other with one thread.
    pub(crate) fn sync(&self, threads: usize) -> Result<()> {
        let mut open = self.files.iter().filter_map(|(_, file)| file.as_ref());
        if threads <= 1 {
            return open.try_for_each(DiskFile::sync);
        }
        thread::scope(|scope| {
            let syncs: Vec<_> = open.map(|file| scope.spawn(|| file.sync())).collect();
            let mut ended = syncs.into_iter().map(|sync| sync.join().unwrap_or_else(|panic| resume_unwind(panic)));
            ended.try_for_each(|synced| synced)
        })
    }
}
