//! The journal as it grows, and the blocks that follow it into the files.
//!
//! Records are gathered into segments. Before the first block of a segment goes into a file, the segment is durable in
//! the journal, and so is the journal's name: whatever a crash leaves of those blocks can be undone.

use std::path::PathBuf;

use crate::compare::{Compared, NewSum, Spare};
use crate::disk::{Disk, DiskFile};
use crate::error::Result;
use crate::generation::Paths;
use crate::journal::{Head, Writer};
use crate::piece::within;
use crate::record::Change;
use crate::sums::{Quick, Sum};

/// What a sync has done so far.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    disk: &'a Disk,
    paths: &'a Paths,
    pub(crate) writer: Writer,
    /// Each shard's path, and the file once something was written to it.
    shards: Vec<(PathBuf, Option<DiskFile>)>,
    /// Bytes of changed blocks after which a segment ends.
    limit: u64,
    held: Vec<Change>,
    spare: &'a Spare,
    held_bytes: u64,
    /// Records whose blocks were begun to be written.
    applied: &'a mut u64,
    /// The block sums of all tensors as they will be, and which tensors have changed.
    pub(crate) sums: Vec<Vec<Sum>>,
    pub(crate) quick: Quick,
    pub(crate) changed: Vec<bool>,
    pub(crate) blocks_total: u64,
    pub(crate) blocks_changed: u64,
    pub(crate) bytes_changed: u64,
}

impl<'a> Segments<'a> {
    /// Begins the journal; `sums` are those of the current generation, `applied` counts from 0.
    pub(crate) fn begin(
        disk: &'a Disk,
        paths: &'a Paths,
        head: &Head,
        (sums, quick): (Vec<Vec<Sum>>, Quick),
        limit: u64,
        spare: &'a Spare,
        applied: &'a mut u64,
    ) -> Result<Segments<'a>> {
        Ok(Segments {
            disk,
            paths,
            writer: Writer::create(disk, &paths.journal(), head)?,
            shards: head.shards.iter().map(|shard| (paths.model.join(&shard.file), None)).collect(),
            limit,
            held: Vec::new(),
            spare,
            held_bytes: 0,
            applied,
            changed: vec![false; sums.len()],
            sums,
            quick,
            blocks_total: 0,
            blocks_changed: 0,
            bytes_changed: 0,
        })
    }

    /// Journals what changed in a piece; writes the blocks when a segment is full.
    pub(crate) fn take(&mut self, compared: Compared) -> Result<()> {
        self.blocks_total += compared.blocks;
        let Some(change) = compared.change else { return Ok(()) };
        self.writer.record(&change.body)?;
        self.changed[compared.tensor] = true;
        for NewSum { block, sum, quick } in compared.sums {
            self.sums[compared.tensor][block] = sum;
            self.quick.set(compared.tensor, block, quick);
        }
        self.blocks_changed += change.blocks;
        self.bytes_changed += change.new.len() as u64;
        self.held_bytes += change.new.len() as u64;
        self.held.push(change);
        match self.held_bytes >= self.limit {
            true => self.flush(),
            false => Ok(()),
        }
    }

    /// Ends the last segment; all blocks and the journal's name are durable after it.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.flush()?;
        if *self.applied == 0 {
            self.disk.sync_dir(&self.paths.root)?;
        }
        self.shards.iter().try_for_each(|(_, file)| file.as_ref().map_or(Ok(()), DiskFile::sync))
    }

    /// Ends a segment: durable in the journal, then written to the files.
    fn flush(&mut self) -> Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.writer.sync()?;
        if *self.applied == 0 {
            self.disk.sync_dir(&self.paths.root)?;
        }
        *self.applied += self.held.len() as u64;
        for change in self.held.drain(..) {
            let (path, file) = &mut self.shards[usize::from(change.piece.shard)];
            let file = match file {
                Some(file) => file,
                closed => closed.insert(self.disk.open_in_place(path)?),
            };
            let mut new = change.new.as_slice();
            for run in &change.runs {
                let (now, later) = new.split_at(within(run, run.start).len());
                file.write_at(now, run.start)?;
                new = later;
            }
            self.spare.give(change.new);
            file.start_writing(change.piece.offset, change.piece.bytes.into());
        }
        self.held_bytes = 0;
        Ok(())
    }
}
