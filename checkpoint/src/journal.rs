//! Writing and reading journals; the byte layout is in the crate's documentation.
//!
//! A piece is the part of one tensor in one chunk. A record holds the changed blocks of one piece, and
//! turns its old content into its new ([`Record::redo`]) or back ([`Record::undo`]).

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::delta;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::sums::sum8;

/// Bytes that one record covers at most, and the multiple at which records are cut.
pub(crate) const CHUNK: u64 = 1 << 20;
/// Bytes that are compared, and written or left alone, together.
pub(crate) const BLOCK: u64 = 4096;
/// Bytes that a disk writes whole.
pub(crate) const SECTOR: u64 = 512;

const MAGIC: &[u8; 8] = b"APOLJNL1";
const HEAD: &[u8; 4] = b"HEAD";
const RECORD: &[u8; 4] = b"RECD";
const GENERATION: &[u8; 4] = b"GENR";
const BITMAP: usize = (CHUNK / BLOCK) as usize / 8;
const RECORD_HEAD: usize = 16 + BITMAP;
/// A longer body is refused before memory is taken for it.
const BODY_MAX: u32 = 1 << 30;
/// zstd's level: on planes, 1 is faster than 3 and no larger (256 MiB of bf16: 51.2 and 52.3 MB).
const LEVEL: i32 = 1;

/// What a journal says first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) generation: u64,
    pub(crate) previous: u64,
    pub(crate) shards: Vec<HeadShard>,
}

/// A shard as the journal knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct HeadShard {
    pub(crate) file: String,
    pub(crate) bytes: u64,
}

/// Cuts a range of a file at the multiples of `step`.
pub(crate) fn cut(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let end = ((at / step + 1) * step).min(range.end);
        (at < range.end).then(|| std::mem::replace(&mut at, end)..end)
    })
}

fn length(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}

/// Where a range of the file lies in a buffer that starts at `base`.
fn within(range: &Range<u64>, base: u64) -> Range<usize> {
    (range.start - base) as usize..(range.end - base) as usize
}

/// Writes the frames of a journal into `journal.tmp`.
pub(crate) struct Writer {
    out: BufWriter<DiskFile>,
    path: PathBuf,
    total: blake3::Hasher,
    bytes: u64,
}

impl Writer {
    /// Creates the file and writes its head.
    pub(crate) fn create(disk: &Disk, path: &Path, head: &Head) -> Result<Writer> {
        let mut writer = Writer {
            out: BufWriter::with_capacity(1 << 20, disk.create(path)?),
            path: path.to_path_buf(),
            total: blake3::Hasher::new(),
            bytes: 0,
        };
        writer.write(MAGIC)?;
        let head = serde_json::to_vec(head).expect("a head has no maps");
        writer.frame(HEAD, &head)?;
        Ok(writer)
    }

    /// Adds a record that [`Encoder::encode`] made.
    pub(crate) fn record(&mut self, body: &[u8]) -> Result<()> {
        self.frame(RECORD, body)
    }

    /// Adds the generation and the total checksum, and hands the data to the kernel.
    pub(crate) fn finish(mut self, generation: &Generation) -> Result<(DiskFile, u64)> {
        self.frame(GENERATION, &generation.to_json())?;
        let total = self.total.finalize();
        self.write(total.as_bytes())?;
        let path = self.path;
        let file = self.out.into_inner().map_err(|error| Error::io("write", &path)(error.into_error()))?;
        Ok((file, self.bytes))
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn frame(&mut self, tag: &[u8; 4], body: &[u8]) -> Result<()> {
        let n = u32::try_from(body.len()).expect("a frame is shorter than 4 GiB");
        assert!(n <= BODY_MAX, "a frame of {n} bytes");
        let sum = frame_sum(tag, n, body);
        self.write(tag)?;
        self.write(&n.to_le_bytes())?;
        self.write(body)?;
        self.write(&sum)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.total.update(bytes);
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

fn frame_sum(tag: &[u8; 4], n: u32, body: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(tag).update(&n.to_le_bytes()).update(body);
    let hash = hasher.finalize();
    *hash.as_bytes().first_chunk().expect("a hash is 32 bytes")
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
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.bytes)
    }

    /// The blocks of the piece, each with its bit in the bitmap.
    fn blocks(&self) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
        let chunk = self.offset / CHUNK * CHUNK;
        cut(self.range(), BLOCK).map(move |block| (((block.start - chunk) / BLOCK) as usize, block))
    }
}

/// Makes records. Holds the buffers, so that a sync allocates once.
pub(crate) struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    old: Vec<u8>,
    new: Vec<u8>,
    planes: Vec<u8>,
    packed: Vec<u8>,
    body: Vec<u8>,
    /// Blocks seen, blocks changed, bytes in changed blocks.
    pub(crate) blocks_total: u64,
    pub(crate) blocks_changed: u64,
    pub(crate) bytes_changed: u64,
}

impl Encoder {
    pub(crate) fn new() -> Encoder {
        Encoder {
            zstd: zstd::bulk::Compressor::new(LEVEL).expect("zstd has its level 1"),
            old: Vec::new(),
            new: Vec::new(),
            planes: Vec::new(),
            packed: Vec::new(),
            body: Vec::new(),
            blocks_total: 0,
            blocks_changed: 0,
            bytes_changed: 0,
        }
    }

    /// The body of the record that turns `old` into `new`, or none if they are equal.
    pub(crate) fn encode(&mut self, piece: Piece, old: &[u8], new: &[u8]) -> Option<&[u8]> {
        assert!(old.len() == piece.bytes as usize && new.len() == old.len());
        let mut bitmap = [0u8; BITMAP];
        self.old.clear();
        self.new.clear();
        self.body.clear();
        self.body.resize(RECORD_HEAD, 0);
        for (bit, block) in piece.blocks() {
            self.blocks_total += 1;
            let at = within(&block, piece.offset);
            if old[at.clone()] == new[at.clone()] {
                continue;
            }
            bitmap[bit / 8] |= 1 << (bit % 8);
            self.blocks_changed += 1;
            self.bytes_changed += at.len() as u64;
            self.old.extend_from_slice(&old[at.clone()]);
            self.new.extend_from_slice(&new[at]);
            for sector in cut(block, SECTOR) {
                let sum = sum8(&new[within(&sector, piece.offset)]);
                self.body.extend_from_slice(&sum.to_le_bytes());
            }
        }
        if self.new.is_empty() {
            return None;
        }
        self.body[..2].copy_from_slice(&piece.shard.to_le_bytes());
        self.body[2] = piece.width;
        self.body[4..8].copy_from_slice(&piece.bytes.to_le_bytes());
        self.body[8..16].copy_from_slice(&piece.offset.to_le_bytes());
        self.body[16..RECORD_HEAD].copy_from_slice(&bitmap);
        self.compress(piece.width);
        self.body.extend_from_slice(&self.packed);
        Some(&self.body)
    }

    /// `old` and `new` into `packed`.
    fn compress(&mut self, width: u8) {
        self.planes.resize(self.new.len(), 0);
        delta::to_planes(width, &self.old, &self.new, &mut self.planes);
        self.packed.resize(zstd::zstd_safe::compress_bound(self.planes.len()), 0);
        let packed = self
            .zstd
            .compress_to_buffer(&self.planes, &mut self.packed)
            .expect("the buffer holds compress_bound bytes");
        self.packed.truncate(packed);
    }
}

/// A record, read.
#[derive(Debug)]
pub(crate) struct Record {
    pub(crate) piece: Piece,
    bitmap: [u8; BITMAP],
    sums: Vec<u64>,
    diff: Vec<u8>,
}

/// How a sector took a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Took {
    WasOld,
    WasNew,
    Neither,
}

impl Record {
    /// The changed blocks.
    pub(crate) fn changed(&self) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let set = |bit: usize| self.bitmap[bit / 8] & (1 << (bit % 8)) != 0;
        let changed = self.piece.blocks().filter(move |(bit, _)| set(*bit));
        changed.map(|(_, block)| block)
    }

    /// Turns the piece's content, each sector of it old or new, into the new.
    /// The error is the file offset of a sector that is neither; it keeps its content, and so does
    /// everything after it unless `skip_foreign`.
    pub(crate) fn redo(&self, content: &mut [u8], skip_foreign: bool) -> std::result::Result<(), u64> {
        let width = self.piece.width;
        self.sectors(content, skip_foreign, |sector, diff, sum| {
            delta::add(width, sector, diff);
            if sum8(sector) == sum {
                return Took::WasOld;
            }
            delta::sub(width, sector, diff);
            if sum8(sector) == sum {
                return Took::WasNew;
            }
            Took::Neither
        })
    }

    /// Turns the piece's content, all of it new, into the old. The error is as in [`Record::redo`].
    pub(crate) fn undo(&self, content: &mut [u8]) -> std::result::Result<(), u64> {
        let width = self.piece.width;
        self.sectors(content, false, |sector, diff, sum| {
            if sum8(sector) != sum {
                return Took::Neither;
            }
            delta::sub(width, sector, diff);
            Took::WasNew
        })
    }

    fn sectors(
        &self,
        content: &mut [u8],
        skip_foreign: bool,
        mut turn: impl FnMut(&mut [u8], &[u8], u64) -> Took,
    ) -> std::result::Result<(), u64> {
        assert_eq!(content.len(), self.piece.bytes as usize);
        let (mut diff, mut sums) = (self.diff.as_slice(), self.sums.iter());
        for sector in self.changed().flat_map(|block| cut(block, SECTOR)) {
            let (now, later) = diff.split_at(length(&sector));
            let sum = *sums.next().expect("parse counted the sums");
            let at = within(&sector, self.piece.offset);
            if turn(&mut content[at], now, sum) == Took::Neither && !skip_foreign {
                return Err(sector.start);
            }
            diff = later;
        }
        Ok(())
    }
}

/// Reads a journal or a delta from its start to its end.
pub(crate) struct Reader {
    input: BufReader<File>,
    path: PathBuf,
    at: u64,
    total: blake3::Hasher,
    body: Vec<u8>,
    zstd: zstd::bulk::Decompressor<'static>,
    planes: Vec<u8>,
    pub(crate) head: Head,
    /// The generation, once all records are read.
    pub(crate) generation: Option<Generation>,
}

impl Reader {
    /// Opens the file and reads its head.
    pub(crate) fn open(path: &Path) -> Result<Reader> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut reader = Reader {
            input: BufReader::with_capacity(1 << 20, file),
            path: path.to_path_buf(),
            at: 0,
            total: blake3::Hasher::new(),
            body: Vec::new(),
            zstd: zstd::bulk::Decompressor::new().expect("zstd has a decompressor"),
            planes: Vec::new(),
            head: Head { generation: 0, previous: 0, shards: Vec::new() },
            generation: None,
        };
        if &reader.bytes::<8>()? != MAGIC {
            return Err(reader.torn("it does not begin as a journal"));
        }
        if &reader.frame()? != HEAD {
            return Err(reader.torn("its first frame is not its head"));
        }
        reader.head = serde_json::from_slice(&reader.body)
            .map_err(|error| reader.torn(&format!("its head cannot be read: {error}")))?;
        Ok(reader)
    }

    /// The next record; none after the last, when the generation and the total checksum were read too.
    pub(crate) fn record(&mut self) -> Result<Option<Record>> {
        if !self.advance()? {
            return Ok(None);
        }
        self.parse_record().map(Some)
    }

    /// Reads to the end without unpacking: true at the end only if every checksum holds.
    pub(crate) fn scan(mut self) -> Result<(Head, Generation)> {
        while self.advance()? {}
        let generation = self.generation.expect("advance read it");
        Ok((self.head, generation))
    }

    /// Reads a frame: true for a record, false at the end.
    fn advance(&mut self) -> Result<bool> {
        match &self.frame()? {
            RECORD => return Ok(true),
            GENERATION => {}
            _ => return Err(self.torn("a frame has an unknown tag")),
        }
        let generation =
            Generation::from_json(&self.body).map_err(|reason| self.torn(&format!("its generation: {reason}")))?;
        if generation.generation != self.head.generation {
            return Err(self.torn("its head and its end name different generations"));
        }
        let want = self.total.finalize();
        if &self.bytes::<32>()? != want.as_bytes() {
            return Err(self.torn("its total checksum does not match"));
        }
        let mut more = [0];
        let read = self.input.read(&mut more);
        if read.map_err(Error::io("read", &self.path))? != 0 {
            return Err(self.torn("it goes on after its end"));
        }
        self.generation = Some(generation);
        Ok(false)
    }

    /// Reads a frame into `body` and gives its tag.
    fn frame(&mut self) -> Result<[u8; 4]> {
        let tag = self.bytes::<4>()?;
        let n = u32::from_le_bytes(self.bytes()?);
        if n > BODY_MAX {
            return Err(self.torn("a frame is longer than a frame can be"));
        }
        self.body.clear();
        // `take` and `read_to_end` take memory as bytes arrive, so a wrong length costs none.
        let mut body = std::mem::take(&mut self.body);
        let read = (&mut self.input).take(u64::from(n)).read_to_end(&mut body);
        let read = read.map_err(Error::io("read", &self.path))?;
        self.body = body;
        self.total.update(&self.body);
        self.at += read as u64;
        if read < n as usize {
            return Err(self.torn("it ends inside a frame"));
        }
        let want = frame_sum(&tag, n, &self.body);
        if self.bytes::<8>()? != want {
            return Err(self.torn("a frame does not match its checksum"));
        }
        Ok(tag)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        match self.input.read_exact(&mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                return Err(self.torn("it ends too early"));
            }
            Err(error) => return Err(Error::io("read", &self.path)(error)),
        }
        self.total.update(&bytes);
        self.at += N as u64;
        Ok(bytes)
    }

    fn torn(&self, reason: &str) -> Error {
        Error::Torn { path: self.path.clone(), byte: self.at, reason: reason.into() }
    }

    /// `body` as a record. Everything is checked: the checksum only says that the bytes are as written.
    fn parse_record(&mut self) -> Result<Record> {
        if self.body.len() < RECORD_HEAD {
            return Err(self.torn("a record is too short"));
        }
        let (head, rest) = self.body.split_at(RECORD_HEAD);
        let piece = Piece {
            shard: u16::from_le_bytes([head[0], head[1]]),
            width: head[2],
            bytes: u32::from_le_bytes(head[4..8].try_into().expect("4 bytes")),
            offset: u64::from_le_bytes(head[8..16].try_into().expect("8 bytes")),
        };
        self.check_piece(piece)?;
        let mut record = Record {
            piece,
            bitmap: head[16..].try_into().expect("the head is split there"),
            sums: Vec::new(),
            diff: Vec::new(),
        };
        let changed: usize = record.changed().map(|block| length(&block)).sum();
        let sectors = record.changed().flat_map(|block| cut(block, SECTOR)).count();
        let Some((sums, packed)) = rest.split_at_checked(sectors * 8) else {
            return Err(self.torn("a record has too few checksums"));
        };
        let sums = sums.as_chunks::<8>().0;
        record.sums = sums.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
        self.planes.resize(changed, 0);
        let unpacked = self.zstd.decompress_to_buffer(packed, &mut self.planes[..]);
        if unpacked.ok() != Some(changed) {
            return Err(self.torn("a record does not unpack to its blocks"));
        }
        record.diff.resize(changed, 0);
        delta::from_planes(piece.width, &self.planes, &mut record.diff);
        Ok(record)
    }

    fn check_piece(&self, piece: Piece) -> Result<()> {
        let end = piece.offset.saturating_add(u64::from(piece.bytes));
        let Some(shard) = self.head.shards.get(usize::from(piece.shard)) else {
            return Err(self.torn("a record names a shard that is not there"));
        };
        let one_chunk = piece.bytes > 0 && piece.offset / CHUNK == (end - 1) / CHUNK;
        if !one_chunk || end > shard.bytes || ![1, 2, 4].contains(&piece.width) {
            return Err(self.torn("a record is out of range"));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
