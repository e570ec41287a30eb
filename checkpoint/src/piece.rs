//! How files are cut: chunks of 1 MiB, blocks of 4 KiB, sectors of 512 bytes, all at multiples in the file.
//!
//! A piece is the part of one tensor in one chunk: what is read, compared and journalled together.

use std::ops::Range;

/// Bytes that one record of the journal covers at most.
pub(crate) const CHUNK: u64 = 1 << 20;
/// Bytes that are compared, and written or left alone, together.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes that a disk writes whole.
pub(crate) const SECTOR: u64 = 512;

/// Cuts a range of a file at the multiples of `step`.
pub(crate) fn cut(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let end = ((at / step + 1) * step).min(range.end);
        (at < range.end).then(|| std::mem::replace(&mut at, end)..end)
    })
}

/// Where a range of the file lies in a buffer that starts at `base`.
pub(crate) fn within(range: &Range<u64>, base: u64) -> Range<usize> {
    (range.start - base) as usize..(range.end - base) as usize
}

/// Bytes of a [`BlockSet`].
pub(crate) const BITMAP: usize = (CHUNK / BLOCK) as usize / 8;

/// Some of a chunk's blocks: a bit for each, the lowest of the first byte first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct BlockSet(pub(crate) [u8; BITMAP]);

impl BlockSet {
    pub(crate) fn insert(&mut self, block: usize) {
        self.0[block / 8] |= 1 << (block % 8);
    }

    pub(crate) fn contains(&self, block: usize) -> bool {
        self.0[block / 8] & (1 << (block % 8)) != 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; BITMAP]
    }
}

/// Where a piece lies and how its elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) shard: u16,
    pub(crate) width: u8,
    /// In the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
}

impl Piece {
    /// Its bytes in the file.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.bytes)
    }

    /// Its blocks, each with its number in the chunk.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
        self.blocks_of(self.range())
    }

    /// The blocks of a part of it.
    pub(crate) fn blocks_of(&self, part: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
        let chunk = self.offset / CHUNK * CHUNK;
        cut(part, BLOCK).map(move |block| (((block.start - chunk) / BLOCK) as usize, block))
    }
}
