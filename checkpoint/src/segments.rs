//! The journal as it grows, and the blocks that follow it into the files.
//!
//! Records are gathered into segments. Before the first block of a segment goes into a file, the segment is durable in
//! the journal, and so is the journal's name: whatever a crash leaves of those blocks can be undone. While the blocks of
//! one segment are written, the next is journalled: a disk that only ever has one of the two to do waits a fifth of the time.

use crate::compare::{Compared, NewSum, Spare};
use crate::disk::Disk;
use crate::error::Result;
use crate::generation::Paths;
use crate::journal::{Head, Writer};
use crate::piece::within;
use crate::record::Change;
use crate::shards::Shards;
use crate::sums::{Quick, Sum};

/// What a sync has done so far.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    disk: &'a Disk,
    paths: &'a Paths,
    pub(crate) writer: Writer,
    /// Bytes of changed blocks after which a segment ends.
    limit: u64,
    held: Vec<Change>,
    held_bytes: u64,
    /// Records whose blocks may have been begun to be written.
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
        applied: &'a mut u64,
    ) -> Result<Segments<'a>> {
        Ok(Segments {
            disk,
            paths,
            writer: Writer::create(disk, &paths.journal(), head)?,
            limit,
            held: Vec::new(),
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

    /// Journals what changed in a piece; gives the segment to `apply` when it is full.
    pub(crate) fn take(&mut self, compared: Compared, apply: &mut Apply) -> Result<()> {
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
            true => self.flush(apply),
            false => Ok(()),
        }
    }

    /// Ends a segment: durable in the journal, then given to `apply`. Also for the rest at the end, after which the
    /// journal's name is durable even if nothing changed.
    pub(crate) fn flush(&mut self, apply: &mut Apply) -> Result<()> {
        if !self.held.is_empty() {
            self.writer.sync()?;
        }
        if *self.applied == 0 {
            self.disk.sync_dir(&self.paths.root)?;
        }
        *self.applied += self.held.len() as u64;
        self.held_bytes = 0;
        apply(std::mem::take(&mut self.held))
    }
}

/// Writes the blocks of a segment that is durable in the journal.
pub(crate) type Apply<'a> = dyn FnMut(Vec<Change>) -> Result<()> + Send + 'a;

/// Writes blocks into the files, and asks the system to begin to bring them to the disk.
pub(crate) fn write_blocks(segment: Vec<Change>, shards: &mut Shards, spare: &Spare) -> Result<()> {
    for change in segment {
        let file = shards.file(change.piece.shard.into())?;
        let mut new = change.new.as_slice();
        for run in &change.runs {
            let (now, later) = new.split_at(within(run, run.start).len());
            file.write_at(now, run.start)?;
            new = later;
        }
        spare.give(change.new);
        file.start_writing(change.piece.offset, change.piece.bytes.into());
    }
    Ok(())
}
