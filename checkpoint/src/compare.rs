//! What became of a piece: which of its blocks differ, and the checksums and the record of those.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::layout::Layout;
use crate::pass::Job;
use crate::piece::{BlockSet, Piece, cut, within};
use crate::record::{Change, Encoder, Record};
use crate::source::Content;
use crate::sums::{self, Quick, SUM_BLOCK, Sum};

/// Bytes that are read and compared at once: twice as many fit into a core's second cache.
const STEP: u64 = 128 << 10;

/// What a piece turned out to be.
#[derive(Debug)]
pub(crate) struct Compared {
    pub(crate) tensor: usize,
    /// 4 KiB blocks in it.
    pub(crate) blocks: u64,
    pub(crate) change: Option<Change>,
    /// The sums that are others now.
    pub(crate) sums: Vec<NewSum>,
}

/// The sums of a block that has changed.
#[derive(Debug)]
pub(crate) struct NewSum {
    /// Its index in the tensor.
    pub(crate) block: usize,
    pub(crate) sum: Sum,
    pub(crate) quick: u64,
}

/// Memory of changes that are in the files: fresh memory costs more than to fill it.
#[derive(Debug, Default)]
pub(crate) struct Spare(Mutex<Vec<Vec<u8>>>);

impl Spare {
    fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Takes what nobody needs any more. As much comes back as was taken, which two segments and the pieces in flight bound.
    pub(crate) fn give(&self, memory: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }
}

/// Compares pieces, on one thread.
pub(crate) struct Comparer<'p> {
    layout: &'p Layout,
    current: &'p Generation,
    /// The sums of the blocks of every tensor of the current generation.
    before: &'p [Vec<Sum>],
    quick: &'p Quick,
    spare: &'p Spare,
    encoder: Encoder,
    old: Vec<u8>,
    new: Vec<u8>,
}

impl<'p> Comparer<'p> {
    pub(crate) fn new(
        layout: &'p Layout,
        current: &'p Generation,
        before: &'p [Vec<Sum>],
        quick: &'p Quick,
        spare: &'p Spare,
    ) -> Comparer<'p> {
        let (encoder, old, new) = (Encoder::default(), Vec::new(), Vec::new());
        Comparer { layout, current, before, quick, spare, encoder, old, new }
    }

    /// Reads and compares a piece.
    pub(crate) fn compare(&mut self, job: &Job) -> Result<Compared> {
        let Job { tensor, piece, .. } = *job;
        self.old.resize(piece.bytes as usize, 0);
        self.new.resize(piece.bytes as usize, 0);
        let changed = self.load(job)?;
        let (mut change, mut sums) = (None, Vec::new());
        if !changed.is_empty() {
            sums = self.sums(job, &changed)?;
            change = Some(self.encoder.encode(piece, &changed, &self.old, &mut self.new, || self.spare.take()));
        }
        Ok(Compared { tensor, blocks: piece.blocks().count() as u64, change, sums })
    }

    /// Fills `old` from the file and `new` with the new content, where they may differ; gives the blocks that do.
    fn load(&mut self, job: &Job) -> Result<BlockSet> {
        let (piece, mut changed) = (job.piece, BlockSet::default());
        match &job.content {
            Content::Live { parts, .. } | Content::Read { parts, .. } => {
                for step in windows(piece, parts).flat_map(|window| cut(window, STEP)) {
                    let at = within(&step, piece.offset);
                    let (old, new) = (&mut self.old[at.clone()], &mut self.new[at.clone()]);
                    job.file.read_at(old, step.start)?;
                    if !parts.iter().any(|part| part.start <= at.start && at.end <= part.end) {
                        new.copy_from_slice(old);
                    }
                    fill(&job.content, at, new);
                    if old != new {
                        insert_differing(&mut changed, piece, step, &self.old, &self.new);
                    }
                }
            }
            Content::Undo { records, to } => {
                job.file.read_at(&mut self.old, piece.offset)?;
                self.new.copy_from_slice(&self.old);
                self.undo(job, records, *to)?;
                insert_differing(&mut changed, piece, piece.range(), &self.old, &self.new);
            }
        }
        Ok(changed)
    }

    /// Turns `new`, which is the old content, back by deltas.
    fn undo(&mut self, job: &Job, records: &[(usize, Record)], to: u64) -> Result<()> {
        for (delta, record) in records {
            if record.undo(&mut self.new).is_err() {
                let tensor = self.layout.tensors[job.tensor].name.clone();
                return Err(match delta {
                    0 => self.changed(job),
                    _ => Error::History { generation: to, tensor },
                });
            }
        }
        Ok(())
    }

    /// The sums of the blocks that differ.
    ///
    /// They must be what the current generation says. One that does not differ keeps its sum, so that no damage ever
    /// becomes the truth.
    fn sums(&self, job: &Job, changed: &BlockSet) -> Result<Vec<NewSum>> {
        let mut sums = Vec::new();
        for (i, block) in sums::blocks(job.piece.range()).enumerate() {
            if !job.piece.blocks_of(block.clone()).any(|(number, _)| changed.contains(number)) {
                continue;
            }
            let (block, at) = (job.first_sum + i, within(&block, job.piece.offset));
            let (old, new) = (&self.old[at.clone()], &self.new[at]);
            let as_it_was = match self.quick.get(job.tensor, block) {
                Some(quick) => sums::quick_sum(old) == quick,
                None => sums::sum(old) == self.before[job.tensor][block],
            };
            if !as_it_was {
                return Err(self.changed(job));
            }
            sums.push(NewSum { block, sum: sums::sum(new), quick: sums::quick_sum(new) });
        }
        Ok(sums)
    }

    /// Somebody else changed the file.
    fn changed(&self, job: &Job) -> Error {
        let path = self.layout.shards[usize::from(job.piece.shard)].path.clone();
        Error::Changed {
            tensor: self.layout.tensors[job.tensor].name.clone(),
            path,
            generation: self.current.generation,
        }
    }
}

/// The ranges of the file to be read for parts of a piece: blocks that have a sum, as long as possible.
fn windows(piece: Piece, parts: &[Range<usize>]) -> impl Iterator<Item = Range<u64>> {
    let range = piece.range();
    let mut parts = parts.iter().map(move |part| {
        let (start, end) = (piece.offset + part.start as u64, piece.offset + part.end as u64);
        (start / SUM_BLOCK * SUM_BLOCK).max(range.start)..end.next_multiple_of(SUM_BLOCK).min(range.end)
    });
    let mut next = parts.next();
    std::iter::from_fn(move || {
        let mut window = next.take()?;
        next = parts.find(|part| {
            let apart = part.start > window.end;
            if !apart {
                window.end = part.end;
            }
            apart
        });
        Some(window)
    })
}

/// Fills a range of the piece with those parts of its new content that lie in it.
fn fill(content: &Content, range: Range<usize>, new: &mut [u8]) {
    let (Content::Live { parts, .. } | Content::Read { parts, .. }) = content else { return };
    let mut before = 0;
    for part in parts {
        let (start, end) = (part.start.max(range.start), part.end.min(range.end));
        if start < end {
            let new = &mut new[start - range.start..end - range.start];
            match content {
                Content::Live { live, tensor, at, .. } => live.read(*tensor, at + start as u64, new),
                Content::Read { bytes, .. } => {
                    new.copy_from_slice(&bytes[before + start - part.start..][..end - start])
                }
                Content::Undo { .. } => {}
            }
        }
        before += part.len();
    }
}

/// Adds the blocks of a part of the piece in which its contents differ.
fn insert_differing(set: &mut BlockSet, piece: Piece, part: Range<u64>, old: &[u8], new: &[u8]) {
    for (number, block) in piece.blocks_of(part) {
        let at = within(&block, piece.offset);
        if old[at.clone()] != new[at] {
            set.insert(number);
        }
    }
}
