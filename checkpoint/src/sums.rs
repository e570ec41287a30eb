//! Checksums: BLAKE3 of a tensor, and 8 bytes of BLAKE3 for each of its 64 KiB blocks.
//!
//! `sums/G` holds, for every tensor of the generation in the generation's order, the 64-bit sums of its
//! blocks, little-endian, with nothing between them. Blocks count from the start of the tensor.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::generation::TensorSum;

/// Bytes of a tensor under one sum.
pub(crate) const SUM_BLOCK: usize = 64 << 10;

/// The first 8 bytes of BLAKE3, as a little-endian number.
pub(crate) fn sum8(bytes: &[u8]) -> u64 {
    first8(blake3::hash(bytes))
}

fn first8(hash: blake3::Hash) -> u64 {
    let (first, _) = hash.as_bytes().split_first_chunk().expect("a hash is 32 bytes");
    u64::from_le_bytes(*first)
}

/// The number of sums of a tensor of so many bytes.
pub(crate) fn sum_count(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(SUM_BLOCK as u64)).expect("a tensor fits the address space")
}

/// Both checksums of a tensor that streams by.
pub(crate) struct TensorDigest {
    whole: blake3::Hasher,
    block: blake3::Hasher,
    in_block: usize,
    sums: Vec<u64>,
}

impl TensorDigest {
    pub(crate) fn new() -> TensorDigest {
        TensorDigest { whole: blake3::Hasher::new(), block: blake3::Hasher::new(), in_block: 0, sums: Vec::new() }
    }

    /// Takes the next bytes of the tensor.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(SUM_BLOCK - self.in_block));
            self.block.update(now);
            self.in_block += now.len();
            if self.in_block == SUM_BLOCK {
                self.end_block();
            }
            bytes = later;
        }
    }

    /// BLAKE3 of all bytes in hexadecimal, and the sums of the blocks.
    pub(crate) fn finish(mut self) -> (String, Vec<u64>) {
        if self.in_block > 0 {
            self.end_block();
        }
        (self.whole.finalize().to_hex().to_string(), self.sums)
    }

    fn end_block(&mut self) {
        self.sums.push(first8(self.block.finalize()));
        self.block.reset();
        self.in_block = 0;
    }
}

/// The bytes of a sums file.
pub(crate) fn to_bytes(sums: &[Vec<u64>]) -> Vec<u8> {
    sums.iter().flatten().flat_map(|sum| sum.to_le_bytes()).collect()
}

/// Reads a sums file and checks it against `blake3`, the checksum that the generation holds.
pub(crate) fn load(path: &Path, tensors: &[TensorSum], blake3: &str) -> Result<Vec<Vec<u64>>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let want: usize = tensors.iter().map(|tensor| sum_count(tensor.bytes)).sum();
    if blake3::hash(&bytes).to_hex().as_str() != blake3 || bytes.len() != want * 8 {
        return Err(Error::Document {
            path: path.to_path_buf(),
            reason: "the block sums do not match their checksum".into(),
        });
    }
    let mut all = bytes.as_chunks::<8>().0.iter().map(|sum| u64::from_le_bytes(*sum));
    let split = |tensor: &TensorSum| all.by_ref().take(sum_count(tensor.bytes)).collect();
    Ok(tensors.iter().map(split).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_how_the_bytes_arrive() {
        let bytes: Vec<u8> = (0..SUM_BLOCK * 2 + 77).map(|i| (i % 251) as u8).collect();
        let mut whole = TensorDigest::new();
        whole.update(&bytes);
        let mut pieces = TensorDigest::new();
        for piece in bytes.chunks(1001) {
            pieces.update(piece);
        }
        let (hash, sums) = whole.finish();
        assert_eq!((hash.clone(), sums.clone()), pieces.finish());
        assert_eq!(hash, blake3::hash(&bytes).to_hex().to_string());
        assert_eq!(sums.len(), sum_count(bytes.len() as u64));
        assert_eq!(sums[2], sum8(&bytes[SUM_BLOCK * 2..]));
    }
}
