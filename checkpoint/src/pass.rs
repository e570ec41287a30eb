//! The pass over the files: which pieces are to be compared, in the order of the files.

use std::sync::Arc;

use crate::delta::width_of;
use crate::disk::{Disk, DiskFile};
use crate::error::Result;
use crate::layout::Layout;
use crate::piece::{BLOCK, CHUNK, Piece, cut};
use crate::source::{Content, Source};
use crate::sums;

/// A piece with its file and where its new content comes from.
pub(crate) struct Job<'a> {
    pub(crate) tensor: usize,
    pub(crate) piece: Piece,
    /// Index of the piece's first block sum in those of the tensor.
    pub(crate) first_sum: usize,
    pub(crate) file: Arc<DiskFile>,
    pub(crate) content: Content<'a>,
}

/// Gives pieces in the order of the files.
pub(crate) struct Pass<'p, 'a> {
    disk: &'p Disk,
    layout: &'p Layout,
    source: &'p mut dyn Source<'a>,
    tensor: usize,
    /// Bytes of the tensor that are done.
    at: u64,
    file: Option<(usize, Arc<DiskFile>)>,
    /// Bytes that were given or passed over.
    pub(crate) done: u64,
    /// 4 KiB blocks that were passed over, as they cannot differ.
    pub(crate) blocks_passed: u64,
}

impl<'p, 'a> Pass<'p, 'a> {
    pub(crate) fn new(disk: &'p Disk, layout: &'p Layout, source: &'p mut dyn Source<'a>) -> Pass<'p, 'a> {
        Pass { disk, layout, source, tensor: 0, at: 0, file: None, done: 0, blocks_passed: 0 }
    }

    /// The next piece; none after the last. `used` is one that is done.
    pub(crate) fn next(&mut self, used: Option<Job<'a>>) -> Result<Option<Job<'a>>> {
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
        let bytes = range.end - range.start;
        let piece = Piece {
            shard: u16::try_from(tensor.shard).expect("a model has fewer than 65536 shards"),
            width: width_of(&tensor.dtype, tensor.offset),
            offset: range.start,
            bytes: bytes as u32,
        };
        let file = self.file(tensor.shard)?;
        let content = self.source.next(self.tensor, self.at, piece, used.map(|used| used.content))?;
        let first_sum = sums::count(&(tensor.offset..range.start));
        let job = Job { tensor: self.tensor, piece, first_sum, file, content };
        self.at += bytes;
        self.done += bytes;
        Ok(Some(job))
    }

    fn file(&mut self, shard: usize) -> Result<Arc<DiskFile>> {
        let open = self.file.take_if(|(open, _)| *open == shard);
        let open = match open {
            Some(open) => open,
            None => (shard, Arc::new(self.disk.open(&self.layout.shards[shard].path)?)),
        };
        Ok(self.file.insert(open).1.clone())
    }
}
