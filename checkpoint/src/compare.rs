//! What became of a piece: which of its blocks differ, and the checksums and the record of those.

use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::layout::Layout;
use crate::pass::Job;
use crate::piece::{BlockSet, Piece, cut, within};
use crate::record::{Change, Encoder};
use crate::source::Content;
use crate::sums::{self, Quick, Sum};

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

/// Compares pieces, on one thread.
pub(crate) struct Comparer<'p> {
    layout: &'p Layout,
    current: &'p Generation,
    /// The sums of the blocks of every tensor of the current generation.
    before: &'p [Vec<Sum>],
    quick: &'p Quick,
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
    ) -> Comparer<'p> {
        Comparer { layout, current, before, quick, encoder: Encoder::new(), old: Vec::new(), new: Vec::new() }
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
            change = Some(self.encoder.encode(piece, &changed, &self.old, &self.new));
        }
        Ok(Compared { tensor, blocks: piece.blocks().count() as u64, change, sums })
    }

    /// Fills `old` from the file and `new` with the new content; gives the blocks that differ.
    fn load(&mut self, job: &Job) -> Result<BlockSet> {
        let (piece, range) = (job.piece, job.piece.range());
        let (old, new) = (self.old.as_mut_slice(), self.new.as_mut_slice());
        let mut changed = BlockSet::default();
        match &job.content {
            Content::Live { live, tensor, at, parts } if *parts == [0..new.len()] => {
                for step in cut(range, STEP) {
                    let within = within(&step, piece.offset);
                    job.file.read_at(&mut old[within.clone()], step.start)?;
                    live.read(*tensor, at + within.start as u64, &mut new[within.clone()]);
                    if old[within.clone()] != new[within] {
                        insert_differing(&mut changed, piece, step, old, new);
                    }
                }
                return Ok(changed);
            }
            content => {
                job.file.read_at(old, range.start)?;
                new.copy_from_slice(old);
                self.turn(job, content)?;
            }
        }
        insert_differing(&mut changed, piece, range, &self.old, &self.new);
        Ok(changed)
    }

    /// Makes `new`, which is the old content, the new one.
    fn turn(&mut self, job: &Job, content: &Content) -> Result<()> {
        let new = self.new.as_mut_slice();
        match content {
            Content::Live { live, tensor, at, parts } => {
                parts.iter().for_each(|part| live.read(*tensor, at + part.start as u64, &mut new[part.clone()]));
            }
            Content::Read { parts, bytes } => {
                let mut rest = bytes.as_slice();
                for part in parts {
                    let (now, later) = rest.split_at(part.len());
                    new[part.clone()].copy_from_slice(now);
                    rest = later;
                }
            }
            Content::Undo { records, to } => {
                for (delta, record) in records {
                    if record.undo(new).is_err() {
                        let tensor = self.layout.tensors[job.tensor].name.clone();
                        return Err(match delta {
                            0 => self.changed(job),
                            _ => Error::History { generation: *to, tensor },
                        });
                    }
                }
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
        Error::Changed { tensor: self.layout.tensors[job.tensor].name.clone(), path, generation: self.current.generation }
    }
}

/// Adds the blocks of a part of the piece in which its contents differ.
fn insert_differing(set: &mut BlockSet, piece: Piece, part: std::ops::Range<u64>, old: &[u8], new: &[u8]) {
    for (number, block) in piece.blocks_of(part) {
        let at = within(&block, piece.offset);
        if old[at.clone()] != new[at] {
            set.insert(number);
        }
    }
}
