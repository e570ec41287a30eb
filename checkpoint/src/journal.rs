//! Writing and reading journals; the byte layout is in the crate's documentation.

use std::hash::Hasher;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::record::{Decoder, Record};

const MAGIC: &[u8; 8] = b"APOLJNL4";
/// What it begins with in every version.
const FAMILY: &[u8] = b"APOLJNL";
const HEAD: &[u8; 4] = b"HEAD";
const RECORD: &[u8; 4] = b"RECD";
const GENERATION: &[u8; 4] = b"GENR";
/// A longer body is refused before memory is taken for it.
const BODY_MAX: u32 = 1 << 30;
/// Bytes written, and read, at once. (A `BufReader` clears its buffer first, so that of short journals is short.)
const WRITTEN: usize = 1 << 20;
const READ: usize = 64 << 10;

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

/// Writes the frames of a journal.
#[derive(Debug)]
pub(crate) struct Writer {
    out: BufWriter<DiskFile>,
    path: PathBuf,
    /// Over the checksums of the frames.
    total: blake3::Hasher,
    bytes: u64,
    /// Of them, durable.
    synced: u64,
}

impl Writer {
    /// Creates the file and writes its head.
    pub(crate) fn create(disk: &Disk, path: &Path, head: &Head) -> Result<Writer> {
        let mut writer = Writer {
            out: BufWriter::with_capacity(WRITTEN, disk.create(path)?),
            path: path.to_path_buf(),
            total: blake3::Hasher::new(),
            bytes: 0,
            synced: 0,
        };
        writer.write(MAGIC)?;
        let head = serde_json::to_vec(head).expect("a head has no maps");
        writer.frame(HEAD, &head)?;
        Ok(writer)
    }

    /// Adds a record.
    pub(crate) fn record(&mut self, body: &[u8]) -> Result<()> {
        self.frame(RECORD, body)
    }

    /// Makes durable what was added so far.
    pub(crate) fn sync(&mut self) -> Result<()> {
        self.out.flush().map_err(Error::io("write", &self.path))?;
        let file = self.out.get_ref();
        file.sync()?;
        // Recovery alone would read it again, and the server has better use for the memory.
        file.let_go(self.synced, self.bytes - self.synced);
        self.synced = self.bytes;
        Ok(())
    }

    /// Adds the generation and the total checksum, and makes all of it durable.
    pub(crate) fn finish(mut self, generation: &Generation) -> Result<()> {
        self.frame(GENERATION, &generation.to_json())?;
        let total = self.total.finalize();
        self.write(total.as_bytes())?;
        self.sync()
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn frame(&mut self, tag: &[u8; 4], body: &[u8]) -> Result<()> {
        let n = u32::try_from(body.len()).expect("a frame is shorter than 4 GiB");
        assert!(n <= BODY_MAX, "a frame of {n} bytes");
        let sum = frame_sum(tag, n, body);
        self.total.update(&sum);
        self.write(tag)?;
        self.write(&n.to_le_bytes())?;
        self.write(body)?;
        self.write(&sum)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

fn frame_sum(tag: &[u8; 4], n: u32, body: &[u8]) -> [u8; 8] {
    let mut hasher = XxHash3_64::new();
    hasher.write(tag);
    hasher.write(&n.to_le_bytes());
    hasher.write(body);
    hasher.finish().to_le_bytes()
}

/// Reads a journal or a delta from its start to its end.
pub(crate) struct Reader {
    input: BufReader<DiskFile>,
    path: PathBuf,
    at: u64,
    total: blake3::Hasher,
    body: Vec<u8>,
    decoder: Decoder,
    lengths: Vec<u64>,
    pub(crate) head: Head,
    /// The generation, once all records are read.
    pub(crate) generation: Option<Generation>,
}

impl Reader {
    /// Opens the file and reads its head.
    pub(crate) fn open(disk: &Disk, path: &Path) -> Result<Reader> {
        let mut reader = Reader {
            input: BufReader::with_capacity(READ, disk.open(path)?),
            path: path.to_path_buf(),
            at: 0,
            total: blake3::Hasher::new(),
            body: Vec::new(),
            decoder: Decoder::default(),
            lengths: Vec::new(),
            head: Head { generation: 0, previous: 0, shards: Vec::new() },
            generation: None,
        };
        let magic = reader.bytes::<8>()?;
        if magic.starts_with(FAMILY) && &magic != MAGIC {
            let [is, reads] = [&magic, MAGIC].map(|magic| magic.escape_ascii());
            return Err(reader
                .torn(&format!("it is of another version of apollod: its format is {is}, this one reads {reads}")));
        }
        if &magic != MAGIC {
            return Err(reader.torn("it does not begin as a journal"));
        }
        if &reader.frame()? != HEAD {
            return Err(reader.torn("its first frame is not its head"));
        }
        reader.head = serde_json::from_slice(&reader.body)
            .map_err(|error| reader.torn(&format!("its head cannot be read: {error}")))?;
        reader.lengths = reader.head.shards.iter().map(|shard| shard.bytes).collect();
        Ok(reader)
    }

    /// The next record; none after the last, when the generation and the total checksum were read too.
    pub(crate) fn record(&mut self) -> Result<Option<Record>> {
        if !self.advance()? {
            return Ok(None);
        }
        let record = self.decoder.decode(&self.body, &self.lengths);
        record.map(Some).map_err(|reason| self.torn(reason))
    }

    /// Reads to the end without unpacking: fine only if every checksum holds.
    pub(crate) fn scan(mut self) -> Result<()> {
        while self.advance()? {}
        Ok(())
    }

    /// The same, for the generation at the end.
    pub(crate) fn last(mut self) -> Result<Generation> {
        while self.advance()? {}
        Ok(self.generation.expect("all records are read"))
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
        let read = (&mut self.input).take(u64::from(n)).read_to_end(&mut self.body);
        let read = read.map_err(Error::io("read", &self.path))?;
        self.at += read as u64;
        if read < n as usize {
            return Err(self.torn("it ends inside a frame"));
        }
        let sum = frame_sum(&tag, n, &self.body);
        if self.bytes::<8>()? != sum {
            return Err(self.torn("a frame does not match its checksum"));
        }
        self.total.update(&sum);
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
        self.at += N as u64;
        Ok(bytes)
    }

    fn torn(&self, reason: &str) -> Error {
        Error::Torn { path: self.path.clone(), byte: self.at, reason: reason.into() }
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
