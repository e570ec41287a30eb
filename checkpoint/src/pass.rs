//! The pass over the files and the new content: piece by piece, what differs, and the checksums of it.

use crate::delta::width_of;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::layout::{Layout, Tensor};
use crate::piece::{BLOCK, CHUNK, Piece, cut, within};
use crate::record::{Change, Encoder};
use crate::source::Source;
use crate::sums::{self, Sum};

/// A piece with its content in the file and its new content.
#[derive(Debug)]
pub(crate) struct Job {
    tensor: usize,
    piece: Piece,
    /// Index of the piece's first block sum in those of the tensor.
    first_sum: usize,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// What a piece turned out to be.
#[derive(Debug)]
pub(crate) struct Compared {
    pub(crate) tensor: usize,
    /// 4 KiB blocks in it.
    pub(crate) blocks: u64,
    pub(crate) change: Option<Change>,
    /// The sums that are others now, with their indices in the tensor.
    pub(crate) sums: Vec<(usize, Sum)>,
}

/// Reads pieces in the order of the files.
pub(crate) struct Pass<'a> {
    disk: &'a Disk,
    layout: &'a Layout,
    source: &'a mut dyn Source,
    tensor: usize,
    /// Bytes of the tensor that are done.
    at: u64,
    file: Option<(usize, DiskFile)>,
    /// Bytes that were read or passed over.
    pub(crate) done: u64,
    /// 4 KiB blocks that were passed over, as they cannot differ.
    pub(crate) blocks_passed: u64,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(disk: &'a Disk, layout: &'a Layout, source: &'a mut dyn Source) -> Pass<'a> {
        Pass { disk, layout, source, tensor: 0, at: 0, file: None, done: 0, blocks_passed: 0 }
    }

    /// The next piece; none after the last. `used` gives its memory.
    pub(crate) fn next(&mut self, used: Option<Job>) -> Result<Option<Job>> {
        let layout = self.layout;
        let (tensor, range) = loop {
            let Some(tensor) = layout.tensors.get(self.tensor) else { return Ok(None) };
            let start = tensor.offset + self.at;
            let piece = cut(start..tensor.offset + tensor.bytes, CHUNK).next();
            match piece.filter(|_| self.source.covers(self.tensor)) {
                None => (self.tensor, self.at) = (self.tensor + 1, 0),
                Some(piece) => {
                    let bytes = piece.end - piece.start;
                    if self.source.may_differ(self.tensor, self.at..self.at + bytes) {
                        break (tensor, piece);
                    }
                    self.blocks_passed += cut(piece, BLOCK).count() as u64;
                    (self.at, self.done) = (self.at + bytes, self.done + bytes);
                }
            }
        };
        let (mut old, mut new) = used.map_or_else(Default::default, |used| (used.old, used.new));
        let bytes = range.end - range.start;
        old.resize(bytes as usize, 0);
        new.resize(bytes as usize, 0);
        let piece = Piece {
            shard: u16::try_from(tensor.shard).expect("a model has fewer than 65536 shards"),
            width: width_of(&tensor.dtype, tensor.offset),
            offset: range.start,
            bytes: bytes as u32,
        };
        self.file(tensor.shard)?.read_at(&mut old, range.start)?;
        self.source.fill(self.tensor, self.at, piece, &old, &mut new)?;
        let first_sum = sums::count(&(tensor.offset..range.start));
        let job = Job { tensor: self.tensor, piece, first_sum, old, new };
        self.at += bytes;
        self.done += bytes;
        Ok(Some(job))
    }

    fn file(&mut self, shard: usize) -> Result<&DiskFile> {
        let open = self.file.take_if(|(open, _)| *open == shard);
        let open = match open {
            Some(open) => open,
            None => (shard, self.disk.open(&self.layout.shards[shard].path)?),
        };
        Ok(&self.file.insert(open).1)
    }
}

/// Compares a piece; `before` are the sums of the blocks of every tensor of the `current` generation.
///
/// A block that differs must be what the current generation says. One that does not differ keeps its sum, so that no
/// damage ever becomes the truth.
pub(crate) fn compare(
    job: &Job,
    encoder: &mut Encoder,
    layout: &Layout,
    current: &Generation,
    before: &[Vec<Sum>],
) -> Result<Compared> {
    let Job { tensor, piece, first_sum, old, new } = job;
    let change = encoder.encode(*piece, old, new);
    let mut sums = Vec::new();
    if change.is_some() {
        for (i, block) in sums::blocks(piece.range()).enumerate() {
            let at = within(&block, piece.offset);
            if old[at.clone()] == new[at.clone()] {
                continue;
            }
            if sums::sum(&old[at.clone()]) != before[*tensor][first_sum + i] {
                let Tensor { name, shard, .. } = &layout.tensors[*tensor];
                let (tensor, path) = (name.clone(), layout.shards[*shard].path.clone());
                return Err(Error::Changed { tensor, path, generation: current.generation });
            }
            sums.push((first_sum + i, sums::sum(&new[at])));
        }
    }
    Ok(Compared { tensor: *tensor, blocks: piece.blocks().count() as u64, change, sums })
}
