//! The model's files as they are written in place: each opened when it is first needed, all made durable together.

use std::path::{Path, PathBuf};

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

    /// Makes durable what was written.
    pub(crate) fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(|(_, file)| file.as_ref().map_or(Ok(()), DiskFile::sync))
    }
}
