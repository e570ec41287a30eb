//! Which blocks of live weights can differ from the files, without reading them.
//!
//! Weights in a GPU's memory are dear to read, cheap to hash where they are. A sync keeps the hashes of the live
//! weights that it wrote; the next one hashes again and reads only the blocks whose hash is another one.
//! Blocks count from the start of a tensor here, so that a kernel's loads are aligned; the journal's count from the
//! start of the file. Each is compared as it always was: what is not read is taken from the file.
//!
//! Weights in this machine's memory are as dear to hash as to compare. Who trains them can tell what was written since
//! the last sync, and only that is read.
//!
//! Both say what a tensor in the files of *one generation* is, so they are kept with its number and with the list of
//! tensors. After a rollback, an adoption, or for another list of trained tensors they are of something else, and
//! everything is read once. Nobody has to remember to forget them. Hashes are in memory only: 16 bytes for 4096.

use std::ops::Range;

use crate::checkpoint::{LiveTensor, LiveWeights};
use crate::piece::BLOCK;

/// What is known of live weights that equal the files of one generation.
#[derive(Debug)]
pub(crate) struct Known {
    generation: u64,
    tensors: Vec<LiveTensor>,
    /// One for each block of each tensor, tensor by tensor; none from weights that are read as fast as hashed.
    hashes: Option<Vec<u128>>,
}

impl Known {
    /// Asks for the hashes of live weights that equal the files of `generation`, or are about to.
    pub(crate) fn of(live: &dyn LiveWeights, generation: u64) -> Known {
        let (tensors, hashes) = (live.tensors().to_vec(), live.block_hashes(BLOCK));
        if let Some(hashes) = &hashes {
            let want: u64 = tensors.iter().map(block_count).sum();
            assert_eq!(hashes.len() as u64, want, "one hash for every block of every tensor");
        }
        Known { generation, tensors, hashes }
    }

    /// What differs in `live`, whose next generation `self` is of, from `before`, if that is of the generation `current`
    /// and of the same tensors: blocks whose hash is another one, or that were written since.
    pub(crate) fn changed_since(
        &self,
        before: Option<&Known>,
        current: u64,
        live: &dyn LiveWeights,
    ) -> Option<Changed> {
        let before = before.filter(|before| before.generation == current && before.tensors == self.tensors)?;
        match (&before.hashes, &self.hashes) {
            (Some(before), Some(now)) => {
                Some(Changed::new(&self.tensors, now.iter().zip(before).map(|(now, then)| now != then).collect()))
            }
            _ => live.written().map(|written| Changed::of_ranges(&self.tensors, &written)),
        }
    }
}

fn block_count(tensor: &LiveTensor) -> u64 {
    tensor.bytes.div_ceil(BLOCK)
}

/// Blocks that have to be read.
#[derive(Debug)]
pub(crate) struct Changed {
    /// Index of each tensor's first block.
    first: Vec<usize>,
    blocks: Vec<bool>,
}

impl Changed {
    fn new(tensors: &[LiveTensor], blocks: Vec<bool>) -> Changed {
        let mut next = 0;
        let first = |tensor: &LiveTensor| {
            let first = next;
            next += block_count(tensor) as usize;
            first
        };
        Changed { first: tensors.iter().map(first).collect(), blocks }
    }

    /// True if no block has to be read.
    pub(crate) fn is_empty(&self) -> bool {
        !self.blocks.contains(&true)
    }

    /// The blocks that ranges of bytes of each tensor lie in.
    fn of_ranges(tensors: &[LiveTensor], ranges: &[Vec<Range<u64>>]) -> Changed {
        assert_eq!(ranges.len(), tensors.len(), "what was written of every tensor");
        let count: u64 = tensors.iter().map(block_count).sum();
        let mut changed = Changed::new(tensors, vec![false; count as usize]);
        for ((tensor, first), ranges) in tensors.iter().zip(&changed.first).zip(ranges) {
            for range in ranges.iter().filter(|range| range.start != range.end) {
                let fits = range.start < range.end && range.end <= tensor.bytes;
                assert!(fits, "{range:?} of the {} bytes of {}", tensor.bytes, tensor.name);
                let blocks = (range.start / BLOCK) as usize..=((range.end - 1) / BLOCK) as usize;
                changed.blocks[first + blocks.start()..=first + blocks.end()].fill(true);
            }
        }
        changed
    }

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

    fn tensors() -> Vec<LiveTensor> {
        vec![tensor("a", 4096 * 5 + 2), tensor("b", 10)]
    }

    fn runs(changed: &Changed, tensor: usize, range: Range<u64>) -> Vec<Range<u64>> {
        changed.within(tensor, range).collect()
    }

    #[test]
    fn runs_join_neighbours_and_stay_in_their_range() {
        let changed = Changed::new(&tensors(), vec![false, true, true, false, false, true, true]);
        let end = 4096 * 5 + 2;
        assert_eq!(runs(&changed, 0, 0..end), [4096..3 * 4096, 5 * 4096..end]);
        assert_eq!(runs(&changed, 0, 0..5000), [4096..5000]);
        assert_eq!(runs(&changed, 0, 6000..20000), [6000..3 * 4096]);
        assert_eq!(runs(&changed, 0, 3 * 4096..5 * 4096), []);
        assert_eq!(runs(&changed, 1, 0..10), [0..10]);
    }

    #[test]
    fn written_ranges_take_every_block_that_they_touch() {
        let written = [vec![4095..4097, 4096 * 5..4096 * 5, 4096 * 5 + 1..4096 * 5 + 2], vec![]];
        let changed = Changed::of_ranges(&tensors(), &written);
        let end = 4096 * 5 + 2;
        assert_eq!(runs(&changed, 0, 0..end), [0..2 * 4096, 5 * 4096..end]);
        assert_eq!(runs(&changed, 1, 0..10), []);
    }

    /// Weights with hashes, or of which it is known what was written.
    struct Live {
        tensors: Vec<LiveTensor>,
        hashes: Option<Vec<u128>>,
        written: Option<Vec<Vec<Range<u64>>>>,
    }

    impl LiveWeights for Live {
        fn tensors(&self) -> &[LiveTensor] {
            &self.tensors
        }
        fn read(&self, _: usize, _: u64, _: &mut [u8]) {}
        fn block_hashes(&self, _: u64) -> Option<Vec<u128>> {
            self.hashes.clone()
        }
        fn written(&self) -> Option<Vec<Vec<Range<u64>>>> {
            self.written.clone()
        }
    }

    #[test]
    fn what_is_known_counts_for_its_generation_and_its_tensors_only() {
        let (hashes, nothing) = (Some(vec![0; 7]), Some(vec![vec![], vec![]]));
        for (hashes, written) in [(hashes, None), (None, nothing)] {
            let mut live = Live { tensors: tensors(), hashes, written };
            let (known, now) = (Known::of(&live, 3), Known::of(&live, 4));
            let changed = now.changed_since(Some(&known), 3, &live).unwrap();
            assert_eq!(runs(&changed, 0, 0..4096 * 5 + 2), []);
            assert!(now.changed_since(Some(&known), 4, &live).is_none());
            assert!(now.changed_since(None, 3, &live).is_none());
            live.tensors[1].name = "c".into();
            assert!(Known::of(&live, 4).changed_since(Some(&known), 3, &live).is_none());
        }
        let live = Live { tensors: tensors(), hashes: None, written: None };
        let known = Known::of(&live, 3);
        assert!(
            Known::of(&live, 4).changed_since(Some(&known), 3, &live).is_none(),
            "nothing is known of what was written"
        );
    }
}
