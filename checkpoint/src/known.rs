//! Which blocks of live weights can differ from the files, without reading them.
//!
//! Weights in a GPU's memory are dear to read, cheap to hash where they are. A sync keeps the hashes of the live
//! weights that it wrote; the next one hashes again and reads only the blocks whose hash is another one.
//! Blocks count from the start of a tensor here, so that a kernel's loads are aligned; the journal's count from the
//! start of the file. Each is compared as it always was: what is not read is taken from the file.
//!
//! Hashes say what a tensor in the files of *one generation* is, so they are kept with its number and with the list of
//! tensors. After a rollback, an adoption, or for another list of trained tensors they are of something else, and
//! everything is read once. Nobody has to remember to forget them. They are in memory only: 16 bytes for 4096.

use std::ops::Range;

use crate::checkpoint::{LiveTensor, LiveWeights};
use crate::piece::BLOCK;

/// Hashes of live weights.
#[derive(Debug)]
pub(crate) struct Hashes {
    tensors: Vec<LiveTensor>,
    /// One for each block of each tensor, tensor by tensor.
    blocks: Vec<u128>,
}

impl Hashes {
    /// Asks for them; none from weights that are read as fast as hashed.
    pub(crate) fn of(live: &dyn LiveWeights) -> Option<Hashes> {
        let blocks = live.block_hashes(BLOCK)?;
        let tensors = live.tensors().to_vec();
        let want: u64 = tensors.iter().map(block_count).sum();
        assert_eq!(blocks.len() as u64, want, "one hash for every block of every tensor");
        Some(Hashes { tensors, blocks })
    }

    /// The blocks whose hash is another one than in `before`; all of them if that was of other tensors.
    fn changed_since(&self, before: &Hashes) -> Option<Changed> {
        if before.tensors != self.tensors {
            return None;
        }
        let blocks = self.blocks.iter().zip(&before.blocks).map(|(now, then)| now != then).collect();
        let mut next = 0;
        let first = |tensor: &LiveTensor| {
            let first = next;
            next += block_count(tensor) as usize;
            first
        };
        Some(Changed { first: self.tensors.iter().map(first).collect(), blocks })
    }
}

fn block_count(tensor: &LiveTensor) -> u64 {
    tensor.bytes.div_ceil(BLOCK)
}

/// Hashes of what the files of one generation hold.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) generation: u64,
    pub(crate) hashes: Hashes,
}

impl Known {
    /// What may differ between live weights and the files of `generation`; none if that is not known.
    pub(crate) fn changed(known: Option<&Known>, generation: u64, now: Option<&Hashes>) -> Option<Changed> {
        let known = known.filter(|known| known.generation == generation)?;
        now?.changed_since(&known.hashes)
    }
}

/// Blocks that have to be read.
#[derive(Debug)]
pub(crate) struct Changed {
    /// Index of each tensor's first block.
    first: Vec<usize>,
    blocks: Vec<bool>,
}

impl Changed {
    /// The parts of a range of a live tensor's bytes that are to be read: ascending, apart, each as long as possible.
    pub(crate) fn within(&self, tensor: usize, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.first[tensor];
        let changed = move |block: u64| self.blocks[first + block as usize];
        let mut at = range.start;
        std::iter::from_fn(move || {
            let end_of = |at: u64| ((at / BLOCK + 1) * BLOCK).min(range.end);
            while at < range.end && !changed(at / BLOCK) {
                at = end_of(at);
            }
            let start = at;
            while at < range.end && changed(at / BLOCK) {
                at = end_of(at);
            }
            (start < at).then_some(start..at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, bytes: u64) -> LiveTensor {
        LiveTensor { name: name.into(), dtype: "BF16".into(), shape: vec![bytes as usize / 2], bytes }
    }

    fn hashes(blocks: Vec<u128>) -> Hashes {
        Hashes { tensors: vec![tensor("a", 4096 * 5 + 2), tensor("b", 10)], blocks }
    }

    #[test]
    fn runs_join_neighbours_and_stay_in_their_range() {
        let before = hashes(vec![1, 2, 3, 4, 5, 6, 7]);
        let changed = hashes(vec![1, 9, 9, 4, 5, 9, 9]).changed_since(&before).unwrap();
        let runs = |tensor, range: Range<u64>| changed.within(tensor, range).collect::<Vec<_>>();
        let end = 4096 * 5 + 2;
        assert_eq!(runs(0, 0..end), [4096..3 * 4096, 5 * 4096..end]);
        assert_eq!(runs(0, 0..5000), [4096..5000]);
        assert_eq!(runs(0, 6000..20000), [6000..3 * 4096]);
        assert_eq!(runs(0, 3 * 4096..5 * 4096), []);
        assert_eq!(runs(1, 0..10), [0..10]);
    }

    #[test]
    fn hashes_count_for_their_generation_and_their_tensors_only() {
        let now = hashes(vec![0; 7]);
        let known = Known { generation: 3, hashes: hashes(vec![0; 7]) };
        assert!(Known::changed(Some(&known), 3, Some(&now)).is_some());
        assert!(Known::changed(Some(&known), 4, Some(&now)).is_none());
        assert!(Known::changed(None, 3, Some(&now)).is_none());
        assert!(Known::changed(Some(&known), 3, None).is_none());
        let mut other = hashes(vec![0; 7]);
        other.tensors[1].name = "c".into();
        assert!(Known::changed(Some(&known), 3, Some(&other)).is_none());
    }
}
