//! The pass over the files and the new content that fills the journal, with memory for one chunk.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::commit::{Draft, tensor_sum};
use crate::delta::width_of;
use crate::disk::{CrashPoint, Disk};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, TensorSum};
use crate::journal::{self, Encoder, Piece, Writer};
use crate::layout::{Shard, Tensor};
use crate::source::Source;
use crate::sums::{self, TensorDigest};

/// The state of the pass.
pub(crate) struct Stream<'a> {
    disk: &'a mut Disk,
    paths: &'a Paths,
    current: &'a Generation,
    writer: &'a mut Writer,
    pub(crate) encoder: Encoder,
    old: Vec<u8>,
    new: Vec<u8>,
    done: u64,
}

impl<'a> Stream<'a> {
    pub(crate) fn new(
        disk: &'a mut Disk,
        paths: &'a Paths,
        current: &'a Generation,
        writer: &'a mut Writer,
    ) -> Stream<'a> {
        Stream { disk, paths, current, writer, encoder: Encoder::new(), old: Vec::new(), new: Vec::new(), done: 0 }
    }

    /// Tensors and block sums of the new generation.
    pub(crate) fn tensors(
        &mut self,
        draft: &Draft,
        source: &mut dyn Source,
        done: &mut dyn FnMut(u64),
    ) -> Result<(Vec<TensorSum>, Vec<Vec<u64>>)> {
        let mut tensors = Vec::new();
        let mut before = None;
        let mut block_sums = Vec::new();
        let mut open: Option<(usize, File)> = None;
        for (i, tensor) in draft.layout.tensors.iter().enumerate() {
            if !source.covers(i) {
                let before = match &mut before {
                    Some(before) => before,
                    unread => unread.insert(self.sums_before()?),
                };
                tensors.push(self.current.tensors[i].clone());
                block_sums.push(before[i].clone());
                continue;
            }
            let shard = &draft.layout.shards[tensor.shard];
            let file = match open.take_if(|(index, _)| *index == tensor.shard) {
                Some((_, file)) => file,
                None => File::open(&shard.path).map_err(Error::io("open", &shard.path))?,
            };
            let (hash, sums) = self.tensor(i, tensor, shard, &file, source, done)?;
            if let Some(expect) = draft.expect.filter(|e| e.tensors[i].blake3 != hash) {
                return Err(Error::History { generation: expect.generation, tensor: tensor.name.clone() });
            }
            open = Some((tensor.shard, file));
            tensors.push(tensor_sum(tensor, hash));
            block_sums.push(sums);
        }
        Ok((tensors, block_sums))
    }

    /// The block sums of the current generation, of which tensors that are not covered keep theirs.
    fn sums_before(&self) -> Result<Vec<Vec<u64>>> {
        let path = self.paths.sums(self.current.generation);
        sums::load(&path, &self.current.tensors, &self.current.sums_blake3)
    }

    /// One tensor: its records, and the checksums of its new content.
    fn tensor(
        &mut self,
        index: usize,
        tensor: &Tensor,
        shard: &Shard,
        file: &File,
        source: &mut dyn Source,
        done: &mut dyn FnMut(u64),
    ) -> Result<(String, Vec<u64>)> {
        let mut was = blake3::Hasher::new();
        let mut digest = TensorDigest::new();
        let width = width_of(&tensor.dtype, tensor.offset);
        let end = tensor.offset + tensor.bytes;
        for range in journal::cut(tensor.offset..end, journal::CHUNK) {
            let n = (range.end - range.start) as usize;
            self.old.resize(n, 0);
            self.new.resize(n, 0);
            file.read_exact_at(&mut self.old, range.start).map_err(Error::io("read", &shard.path))?;
            let piece = Piece {
                shard: u16::try_from(tensor.shard).expect("a model has fewer than 65536 shards"),
                width,
                offset: range.start,
                bytes: n as u32,
            };
            let at = range.start - tensor.offset;
            source.fill(index, at, piece, &self.old, &mut self.new)?;
            was.update(&self.old);
            digest.update(&self.new);
            if let Some(body) = self.encoder.encode(piece, &self.old, &self.new) {
                self.writer.record(body)?;
                let path = self.paths.journal_tmp();
                self.disk.reached(CrashPoint::JournalPartial, &path)?;
            }
            self.done += n as u64;
            done(self.done);
        }
        if was.finalize().to_hex().as_str() != self.current.tensors[index].blake3 {
            return Err(Error::Changed {
                tensor: tensor.name.clone(),
                path: shard.path.clone(),
                generation: self.current.generation,
            });
        }
        Ok(digest.finish())
    }
}
