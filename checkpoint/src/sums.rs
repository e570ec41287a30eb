//! Checksums of tensors: BLAKE3 of every block of 16 KiB, and BLAKE3 of those as the tensor's own.
//!
//! A sync then hashes only blocks that differ, and a check names the block that is damaged. `sums/G` holds, for every
//! tensor of the generation in the generation's order, the 32 bytes of each of its blocks, with nothing between them:
//! 0.2% of the weights. Blocks lie at multiples of 16 KiB of the file and are cut to the tensor.

use std::ops::Range;

use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths, TensorSum};
use crate::piece::{CHUNK, cut};

/// Bytes of a tensor under one sum. A chunk is a whole number of them.
pub(crate) const SUM_BLOCK: u64 = 16 << 10;

/// BLAKE3 of a block.
pub(crate) type Sum = [u8; 32];

/// What a handle knows of the blocks that it wrote itself: XXH3 of them, which takes a quarter of BLAKE3's time. It tells
/// as well whether somebody else has changed one by accident; on purpose is for `verify`. In memory only: 8 bytes for
/// 16 KiB, as a number that is 0 where nothing is known.
#[derive(Debug, Clone)]
pub(crate) struct Quick(Vec<Vec<u64>>);

impl Quick {
    /// Nothing is known of the blocks of these tensors.
    pub(crate) fn unknown(tensors: &[TensorSum]) -> Quick {
        Quick(tensors.iter().map(|tensor| vec![0; count(&tensor.range())]).collect())
    }

    /// Notes the sum of a block.
    pub(crate) fn set(&mut self, tensor: usize, block: usize, sum: u64) {
        self.0[tensor][block] = sum;
    }

    /// The sum of a block; none if it is not known.
    pub(crate) fn get(&self, tensor: usize, block: usize) -> Option<u64> {
        Some(self.0[tensor][block]).filter(|sum| *sum != 0)
    }
}

/// The quick sum of a block.
pub(crate) fn quick_sum(block: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(block)
}

/// The blocks of a tensor that lies at `range` of its file.
pub(crate) fn blocks(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    cut(range, SUM_BLOCK)
}

/// How many blocks there are in a range of a file.
pub(crate) fn count(range: &Range<u64>) -> usize {
    match range.is_empty() {
        true => 0,
        false => ((range.end - 1) / SUM_BLOCK - range.start / SUM_BLOCK + 1) as usize,
    }
}

/// The sum of a block.
pub(crate) fn sum(block: &[u8]) -> Sum {
    *blake3::hash(block).as_bytes()
}

/// The checksum of a tensor from those of its blocks, in hexadecimal.
pub(crate) fn root(sums: &[Sum]) -> String {
    blake3::hash(sums.as_flattened()).to_hex().to_string()
}

/// The sums of a range of a file, as it is.
pub(crate) fn of_file(file: &DiskFile, range: Range<u64>) -> Result<Vec<Sum>> {
    let mut sums = Vec::with_capacity(count(&range));
    let mut buf = Vec::new();
    for chunk in cut(range, CHUNK) {
        buf.resize((chunk.end - chunk.start) as usize, 0);
        file.read_at(&mut buf, chunk.start)?;
        let base = chunk.start;
        sums.extend(blocks(chunk).map(|b| sum(&buf[(b.start - base) as usize..(b.end - base) as usize])));
    }
    Ok(sums)
}

/// The length of a generation's sums file.
pub(crate) fn bytes(generation: &Generation) -> u64 {
    let blocks: usize = generation.tensors.iter().map(|tensor| count(&tensor.range())).sum();
    (blocks * size_of::<Sum>()) as u64
}

/// The bytes of a sums file.
pub(crate) fn to_bytes(sums: &[Vec<Sum>]) -> Vec<u8> {
    sums.iter().flat_map(|sums| sums.as_flattened()).copied().collect()
}

/// Reads the sums of a generation and checks them against the checksum in its document.
pub(crate) fn load(disk: &Disk, paths: &Paths, generation: &Generation) -> Result<Vec<Vec<Sum>>> {
    let path = paths.sums(generation.generation);
    let bytes = disk.read(&path)?;
    let counts = generation.tensors.iter().map(|tensor| count(&tensor.range()));
    let (mut all, rest) = bytes.as_chunks::<32>();
    let whole = rest.is_empty() && all.len() == counts.clone().sum::<usize>();
    if !whole || blake3::hash(&bytes).to_hex().as_str() != generation.sums_blake3 {
        return Err(Error::Document { path, reason: "the block sums do not match their checksum".into() });
    }
    let mut next = |n| {
        let (now, later) = all.split_at(n);
        all = later;
        now.to_vec()
    };
    Ok(counts.map(&mut next).collect())
}

/// The sums of a generation; made anew from the files, if they are the generation's, when `sums/G` is damaged.
pub(crate) fn load_or_rebuild(disk: &Disk, paths: &Paths, generation: &Generation) -> Result<Vec<Vec<Sum>>> {
    load(disk, paths, generation).or_else(|_| {
        let rebuild = |tensor: &TensorSum| {
            let path = paths.model.join(&generation.shards[tensor.shard].file);
            let sums = of_file(&disk.open(&path)?, tensor.range())?;
            if root(&sums) != tensor.blake3 {
                let (tensor, generation) = (tensor.name.clone(), generation.generation);
                return Err(Error::Changed { tensor, path, generation });
            }
            Ok(sums)
        };
        generation.tensors.iter().map(rebuild).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_lie_at_multiples_in_the_file_and_are_counted_as_they_are_cut() {
        for (range, want) in
            [(0..0, 0), (5..5, 0), (5..6, 1), (0..SUM_BLOCK, 1), (1..SUM_BLOCK + 1, 2), (100..70_000, 5)]
        {
            assert_eq!(count(&range), want, "{range:?}");
            assert_eq!(blocks(range).count(), want);
        }
    }
}
