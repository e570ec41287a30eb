//! Records of the journal: the changed blocks of one piece, from which its old content leads to its new and back.
//!
//! The byte layout is in the crate's documentation.

use std::borrow::Cow;
use std::ops::Range;

use crate::delta;
use crate::pack::{self, Counts, Packer};
use crate::piece::{BITMAP, BlockSet, CHUNK, Piece, SECTOR, cut, within};

const HEAD: usize = 16 + BITMAP;
/// Bytes of differences that are made and coded at once: they stay in the first-level cache.
const STEP: usize = 8 << 10;
/// Bytes of each step of which the code is made.
const SAMPLE: usize = STEP / 64;

/// The checksum of a sector's content: against torn writes, decay and strangers, not against forgery.
fn sector_sum(sector: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(sector)
}

/// What changed in a piece.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) piece: Piece,
    /// The record's body.
    pub(crate) body: Vec<u8>,
    /// Changed bytes of the file, neighbouring blocks joined.
    pub(crate) runs: Vec<Range<u64>>,
    /// Their new content, one after the other.
    pub(crate) new: Vec<u8>,
    /// Number of changed blocks.
    pub(crate) blocks: u64,
}

/// Makes records.
#[derive(Default)]
pub(crate) struct Encoder {
    packer: Packer,
    numbers: Vec<u16>,
}

impl Encoder {
    /// The change from `old` to `new`, both of the piece's length, which differ in these blocks alone. Where those are all,
    /// `new` becomes the change's, and `spare` takes its place.
    pub(crate) fn encode(
        &mut self,
        piece: Piece,
        changed: &BlockSet,
        old: &[u8],
        new: &mut Vec<u8>,
        spare: impl FnOnce() -> Vec<u8>,
    ) -> Change {
        assert!(old.len() == piece.bytes as usize && new.len() == old.len());
        let mut change = Change { piece, body: vec![0; HEAD], runs: Vec::new(), new: Vec::new(), blocks: 0 };
        for (_, block) in piece.blocks().filter(|(number, _)| changed.contains(*number)) {
            change.blocks += 1;
            for sector in cut(block.clone(), SECTOR) {
                let sum = sector_sum(&new[within(&sector, piece.offset)]);
                change.body.extend_from_slice(&sum.to_le_bytes());
            }
            match change.runs.last_mut() {
                Some(run) if run.end == block.start => run.end = block.end,
                _ => change.runs.push(block),
            }
        }
        change.body[..2].copy_from_slice(&piece.shard.to_le_bytes());
        change.body[2] = piece.width;
        change.body[4..8].copy_from_slice(&piece.bytes.to_le_bytes());
        change.body[8..16].copy_from_slice(&piece.offset.to_le_bytes());
        change.body[16..HEAD].copy_from_slice(&changed.0);
        change.new = match change.runs == [piece.range()] {
            true => std::mem::replace(new, spare()),
            false => gathered(&change.runs, piece, new).into_owned(),
        };
        self.pack(&mut change.body, piece.width, &gathered(&change.runs, piece, old), &change.new);
        change
    }

    /// Appends the packed difference to the body.
    fn pack(&mut self, body: &mut Vec<u8>, width: u8, old: &[u8], new: &[u8]) {
        for plane in 0..delta::planes(width) {
            let steps = || old.chunks(STEP).zip(new.chunks(STEP));
            let mut counts = Counts::new();
            for (old, new) in steps() {
                let sample = SAMPLE.min(new.len());
                counts.add(self.numbers(width, plane, &old[..sample], &new[..sample]));
            }
            self.packer.begin(&counts);
            for (old, new) in steps() {
                self.numbers(width, plane, old, new);
                self.packer.add(&self.numbers);
            }
            self.packer.end(body);
        }
    }

    fn numbers(&mut self, width: u8, plane: u32, old: &[u8], new: &[u8]) -> &[u16] {
        self.numbers.resize(delta::count(width, plane, new.len()), 0);
        delta::numbers(width, plane, old, new, &mut self.numbers);
        &self.numbers
    }
}

/// These parts of a piece's content, one after the other.
fn gathered<'a>(runs: &[Range<u64>], piece: Piece, content: &'a [u8]) -> Cow<'a, [u8]> {
    let part = |run: &Range<u64>| &content[within(run, piece.offset)];
    match runs {
        [one] => Cow::Borrowed(part(one)),
        several => Cow::Owned(several.iter().map(part).collect::<Vec<_>>().concat()),
    }
}

/// Which content a sector is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// That of the generation before.
    Old,
    /// That of the record's generation.
    New,
}

/// A record, read.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) piece: Piece,
    changed: BlockSet,
    sums: Vec<u64>,
    diff: Vec<u8>,
}

/// Reads records. Holds the buffers, so that a journal allocates once.
#[derive(Default)]
pub(crate) struct Decoder {
    planes: [Vec<u16>; 2],
}

impl Decoder {
    /// A body as a record; `shards` are the lengths of the files. Everything is checked: the frame's checksum only says
    /// that the bytes are as they were written. The error says what is wrong.
    pub(crate) fn decode(&mut self, body: &[u8], shards: &[u64]) -> Result<Record, &'static str> {
        let (head, rest) = body.split_at_checked(HEAD).ok_or("a record is too short")?;
        let piece = Piece {
            shard: u16::from_le_bytes([head[0], head[1]]),
            width: head[2],
            bytes: u32::from_le_bytes(head[4..8].try_into().expect("4 bytes")),
            offset: u64::from_le_bytes(head[8..16].try_into().expect("8 bytes")),
        };
        let end = piece.offset.saturating_add(u64::from(piece.bytes));
        let file = *shards.get(usize::from(piece.shard)).ok_or("a record names a shard that is not there")?;
        let one_chunk = piece.bytes > 0 && piece.offset / CHUNK == (end - 1) / CHUNK;
        if !one_chunk || end > file || ![1, 2, 4].contains(&piece.width) {
            return Err("a record is out of range");
        }
        let changed = BlockSet(head[16..].try_into().expect("the head is split there"));
        let mut record = Record { piece, changed, sums: Vec::new(), diff: Vec::new() };
        let sectors = record.sectors().count();
        let (sums, packed) = rest.split_at_checked(sectors * 8).ok_or("a record has too few checksums")?;
        record.sums = sums.as_chunks::<8>().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
        let changed = record.sectors().map(|sector| sector.end - sector.start).sum::<u64>() as usize;
        self.unpack(piece.width, packed, changed).ok_or("a record does not unpack to its blocks")?;
        record.diff.resize(changed, 0);
        delta::from_planes(piece.width, &self.planes, &mut record.diff);
        Ok(record)
    }

    /// Reads the planes of so many bytes, and nothing may be left.
    fn unpack(&mut self, width: u8, mut packed: &[u8], bytes: usize) -> Option<()> {
        for plane in 0..delta::planes(width) {
            let numbers = &mut self.planes[plane as usize];
            numbers.resize(delta::count(width, plane, bytes), 0);
            packed = pack::unpack(packed, numbers)?;
        }
        packed.is_empty().then_some(())
    }
}

impl Record {
    /// The changed blocks.
    pub(crate) fn changed(&self) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let changed = self.piece.blocks().filter(|(number, _)| self.changed.contains(*number));
        changed.map(|(_, block)| block)
    }

    fn sectors(&self) -> impl Iterator<Item = Range<u64>> + use<'_> {
        self.changed().flat_map(|block| cut(block, SECTOR))
    }

    /// Gives every changed sector of the piece's `content` one side's content, whichever it has, also if it is torn.
    ///
    /// The error is the file offset of a sector that is of neither side; it keeps its content, and so does everything
    /// after it.
    pub(crate) fn settle(&self, content: &mut [u8], side: Side) -> Result<(), u64> {
        self.each_sector(content, |sector, diff, sum| {
            let is = side_of(self.piece.width, sector, diff, sum).or_else(|| {
                let whole = mend(self.piece.width, sector, diff, sum)?;
                sector.copy_from_slice(&whole);
                Some(Side::New)
            });
            self.turn(sector, diff, is?, side);
            Some(())
        })
    }

    /// [`Record::settle`] that leaves sectors of neither side as they are.
    pub(crate) fn settle_known(&self, content: &mut [u8], side: Side) {
        let settled = self.each_sector(content, |sector, diff, sum| {
            if let Some(is) = side_of(self.piece.width, sector, diff, sum) {
                self.turn(sector, diff, is, side);
            }
            Some(())
        });
        settled.expect("no sector is refused");
    }

    /// Turns content that is new in every sector into the old. The error is as in [`Record::settle`].
    pub(crate) fn undo(&self, content: &mut [u8]) -> Result<(), u64> {
        self.each_sector(content, |sector, diff, sum| {
            (sector_sum(sector) == sum).then(|| self.turn(sector, diff, Side::New, Side::Old))
        })
    }

    fn turn(&self, sector: &mut [u8], diff: &[u8], from: Side, to: Side) {
        match (from, to) {
            (Side::Old, Side::New) => delta::add(self.piece.width, sector, diff),
            (Side::New, Side::Old) => delta::sub(self.piece.width, sector, diff),
            (Side::Old, Side::Old) | (Side::New, Side::New) => {}
        }
    }

    fn each_sector(
        &self,
        content: &mut [u8],
        mut take: impl FnMut(&mut [u8], &[u8], u64) -> Option<()>,
    ) -> Result<(), u64> {
        assert_eq!(content.len(), self.piece.bytes as usize);
        let (mut diff, mut sums) = (self.diff.as_slice(), self.sums.iter());
        for sector in self.sectors() {
            let at = within(&sector, self.piece.offset);
            let (now, later) = diff.split_at(at.len());
            let sum = *sums.next().expect("the decoder counted the sums");
            take(&mut content[at], now, sum).ok_or(sector.start)?;
            diff = later;
        }
        Ok(())
    }
}

/// Which side a sector is of. One checksum tells: adding the difference is a bijection.
fn side_of(width: u8, sector: &mut [u8], diff: &[u8], sum: u64) -> Option<Side> {
    if sector_sum(sector) == sum {
        return Some(Side::New);
    }
    delta::add(width, sector, diff);
    let old = sector_sum(sector) == sum;
    delta::sub(width, sector, diff);
    old.then_some(Side::Old)
}

/// The new content of a sector that is torn: whose bytes are of one side up to a first place, of the other up to a
/// second, and of the one again. (Two crashes can leave that, one while it was written and one while it was undone.)
fn mend(width: u8, torn: &[u8], diff: &[u8], sum: u64) -> Option<Vec<u8>> {
    let n = torn.len();
    let mut added = torn.to_vec();
    delta::add(width, &mut added, diff);
    let mut new = vec![0; n];
    let once = (1..n).map(|first| (first, n));
    let twice = (1..n).flat_map(|first| (first + 1..n).map(move |second| (first, second)));
    let found = once.chain(twice).any(|(first, second)| {
        [Side::Old, Side::New].into_iter().any(|outside| {
            let is_old = |at: usize| (outside == Side::Old) != (first..second).contains(&at);
            for part in [0..first, first..second, second..n] {
                let from = if is_old(part.start) { added.as_slice() } else { torn };
                new[part.clone()].copy_from_slice(&from[part]);
            }
            for tear in [first, second].into_iter().filter(|tear| *tear < n) {
                let element = element_around(width, n, tear);
                mend_element(&mut new, torn, diff, element, is_old);
            }
            sector_sum(&new) == sum
        })
    });
    found.then_some(new)
}

/// The bytes of the element that a byte belongs to; those after the last whole element are elements of their own.
fn element_around(width: u8, bytes: usize, at: usize) -> Range<usize> {
    let width = usize::from(width);
    match at < bytes - bytes % width {
        true => at - at % width..at - at % width + width,
        false => at..at + 1,
    }
}

/// The new content of an element of which each byte is known to be old or new: old + difference, byte by byte with carry.
fn mend_element(new: &mut [u8], torn: &[u8], diff: &[u8], element: Range<usize>, is_old: impl Fn(usize) -> bool) {
    let mut carry = 0;
    for at in element {
        let (is, add) = (torn[at], u16::from(diff[at]) + carry);
        let old = if is_old(at) { is } else { is.wrapping_sub(add as u8) };
        new[at] = if is_old(at) { is.wrapping_add(add as u8) } else { is };
        carry = (u16::from(old) + add) >> 8;
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
