//! Where the new content of the files comes from: live weights, or the files and the deltas that undo them.

use std::ops::Range;

use crate::checkpoint::{LiveWeights, Part, Reads};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::generation::Paths;
use crate::journal::Reader;
use crate::known::Changed;
use crate::layout::Layout;
use crate::piece::{CHUNK, Piece, cut};
use crate::record::Record;

/// New content, piece by piece.
pub(crate) trait Source<'a> {
    /// Bytes of all tensors that it covers.
    fn bytes(&self) -> u64;
    /// False if the tensor stays as it is.
    fn covers(&self, tensor: usize) -> bool;
    /// False if these bytes of the tensor are known to be what the file holds.
    fn may_differ(&self, tensor: usize, range: Range<u64>) -> bool;
    /// The new content of a piece, which starts at byte `at` of the tensor. Called in the order of the files for all
    /// pieces of the tensors that it covers and that may differ. `used` is what was given for a piece that is done.
    fn next(&mut self, tensor: usize, at: u64, piece: Piece, used: Option<Content<'a>>) -> Result<Content<'a>>;
}

/// The new content of a piece, or how it comes of the old. Ranges are bytes of the piece; outside them it is the old.
pub(crate) enum Content<'a> {
    /// In live weights, still to be read; the piece starts at byte `at` of the tensor.
    Live { live: &'a dyn LiveWeights, tensor: usize, at: u64, parts: Vec<Range<usize>> },
    /// The parts, one after the other.
    Read { parts: Vec<Range<usize>>, bytes: Vec<u8> },
    /// By undoing deltas, which come with how many undone ones they follow; `to` is the generation that is restored.
    Undo { records: Vec<(usize, Record)>, to: u64 },
}

/// New content from live weights.
pub(crate) struct LiveSource<'a> {
    live: &'a dyn LiveWeights,
    /// The live tensor of each tensor of the files.
    index: Vec<Option<usize>>,
    /// What has to be read; none for everything.
    changed: Option<Changed>,
    reads: Reads,
}

impl<'a> LiveSource<'a> {
    /// Matches live tensors with the files' by name, shape and dtype.
    pub(crate) fn new(layout: &Layout, live: &'a dyn LiveWeights) -> Result<LiveSource<'a>> {
        let mut index = vec![None; layout.tensors.len()];
        for (i, tensor) in live.tensors().iter().enumerate() {
            let refuse = |reason: String| Error::Tensor {
                tensor: tensor.name.clone(),
                reason: format!("{reason}; nothing was written"),
            };
            let found = layout.tensor(&tensor.name);
            let found = found.ok_or_else(|| refuse("it is live and not in the files".into()))?;
            let file = &layout.tensors[found];
            if (&file.dtype, &file.shape) != (&tensor.dtype, &tensor.shape) {
                return Err(refuse(format!(
                    "it is {} {:?} live and {} {:?} in the files",
                    tensor.dtype, tensor.shape, file.dtype, file.shape
                )));
            }
            if file.bytes != tensor.bytes {
                return Err(refuse(format!("it has {} bytes live and {} in the files", tensor.bytes, file.bytes)));
            }
            if index[found].replace(i).is_some() {
                return Err(refuse("it is live twice".into()));
            }
        }
        Ok(LiveSource { live, index, changed: None, reads: Reads::Anyhow })
    }

    /// From now on only the blocks in `changed` are read, if it is known; says so to the live weights.
    pub(crate) fn announce(&mut self, layout: &Layout, changed: Option<Changed>) {
        self.changed = changed;
        let mut parts = Vec::new();
        for (tensor, live) in layout.tensors.iter().zip(&self.index) {
            let Some(live) = *live else { continue };
            for piece in cut(tensor.offset..tensor.offset + tensor.bytes, CHUNK) {
                let range = piece.start - tensor.offset..piece.end - tensor.offset;
                self.each_part(live, range, |part| parts.push(part));
            }
        }
        self.reads = self.live.announce(parts);
    }

    /// The parts of a piece that have to be read.
    fn each_part(&self, tensor: usize, range: Range<u64>, mut part: impl FnMut(Part)) {
        let mut take = |run: Range<u64>| part(Part { tensor, offset: run.start, bytes: run.end - run.start });
        match &self.changed {
            Some(changed) => changed.within(tensor, range).for_each(take),
            None => take(range),
        }
    }
}

impl<'a> Source<'a> for LiveSource<'a> {
    fn bytes(&self) -> u64 {
        self.live.tensors().iter().map(|tensor| tensor.bytes).sum()
    }

    fn covers(&self, tensor: usize) -> bool {
        self.index[tensor].is_some()
    }

    fn may_differ(&self, tensor: usize, range: Range<u64>) -> bool {
        let live = self.index[tensor].expect("asked for what it covers only");
        self.changed.as_ref().is_none_or(|changed| changed.within(live, range).next().is_some())
    }

    fn next(&mut self, tensor: usize, at: u64, piece: Piece, used: Option<Content<'a>>) -> Result<Content<'a>> {
        let tensor = self.index[tensor].expect("asked for what it covers only");
        let mut parts = Vec::new();
        self.each_part(tensor, at..at + u64::from(piece.bytes), |part| {
            let start = (part.offset - at) as usize;
            parts.push(start..start + part.bytes as usize);
        });
        if self.reads == Reads::Anyhow {
            return Ok(Content::Live { live: self.live, tensor, at, parts });
        }
        let mut bytes = match used {
            Some(Content::Read { bytes, .. }) => bytes,
            _ => Vec::new(),
        };
        bytes.resize(parts.iter().map(Range::len).sum(), 0);
        let mut rest = bytes.as_mut_slice();
        for part in &parts {
            let (now, later) = rest.split_at_mut(part.len());
            self.live.read(tensor, at + part.start as u64, now);
            rest = later;
        }
        Ok(Content::Read { parts, bytes })
    }
}

/// New content from the files and the deltas in the history, newest first.
pub(crate) struct UndoSource {
    deltas: Vec<(Reader, Option<Record>)>,
    bytes: u64,
    to: u64,
}

impl UndoSource {
    /// Opens the deltas of current, current-1, …, to+1. A damaged one is found before anything is written.
    pub(crate) fn open(disk: &Disk, paths: &Paths, layout: &Layout, current: u64, to: u64) -> Result<UndoSource> {
        let mut deltas = Vec::new();
        for number in (to + 1..=current).rev() {
            Reader::open(disk, &paths.delta(number))?.scan()?;
            let mut reader = Reader::open(disk, &paths.delta(number))?;
            let first = reader.record()?;
            deltas.push((reader, first));
        }
        Ok(UndoSource { deltas, bytes: layout.tensors.iter().map(|t| t.bytes).sum(), to })
    }
}

impl<'a> Source<'a> for UndoSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn covers(&self, _: usize) -> bool {
        true
    }

    fn may_differ(&self, _: usize, _: Range<u64>) -> bool {
        true
    }

    fn next(&mut self, _: usize, _: u64, piece: Piece, _: Option<Content<'a>>) -> Result<Content<'a>> {
        let mut records = Vec::new();
        for (i, (reader, next)) in self.deltas.iter_mut().enumerate() {
            if let Some(record) = next.take_if(|record| record.piece == piece) {
                records.push((i, record));
                *next = reader.record()?;
            }
        }
        Ok(Content::Undo { records, to: self.to })
    }
}
