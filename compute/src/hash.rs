//! Hashes of blocks of weights, as `kernels/hash.cu` computes them where the weights lie: the same bit for bit.
//!
//! w_0, w_1, …: a block's 32-bit words, little-endian, its last 16 bytes filled up with zeros · k_p: key pair p.
//! H_t = Σ_p (a_p + k_{p+t}.0)·(b_p + k_{p+t}.1) mod 2⁶⁴ for t = 0, 1 over pairs of neighbouring words (NH of UMAC,
//! twice; the sums in brackets mod 2³²). The 16-byte piece i holds pairs 16·(i mod 32) + 2·(i div 32) and the next:
//! the order in which 32 lanes take the pieces.
//!
//! Two contents of one block agree in both with a probability of at most 2⁻⁶⁴ over the keys (Black and others, CRYPTO
//! 1999). Whoever knows the keys can make collisions: this finds changes, it does not authenticate.

/// Longest block, in bytes.
pub const BLOCK_BYTES_MAX: usize = 4096;

/// Key pairs of a block: 512 pairs of words, and one more for the second sum.
const PAIRS: usize = BLOCK_BYTES_MAX / 8 + 1;

/// What the blocks are hashed with. Hashes of different keys cannot be compared.
#[derive(Clone)]
pub struct Keys([u64; PAIRS]);

impl Keys {
    /// Keys of a seed, the same on every machine.
    pub fn new(seed: u64) -> Keys {
        Keys(std::array::from_fn(|pair| splitmix64(seed, pair as u64)))
    }

    /// Each pair as one number, its first key in the lower half.
    pub(crate) fn words(&self) -> &[u64] {
        &self.0
    }
}

/// Number `index` of the sequence of splitmix64 from `seed`.
fn splitmix64(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The hash of every block of `block_bytes` bytes; the last block is as long as what is left.
///
/// # Panics
/// If a block is not a multiple of 16 bytes, or longer than [`BLOCK_BYTES_MAX`].
pub fn block_hashes(bytes: &[u8], block_bytes: usize, keys: &Keys) -> Vec<u128> {
    check_block_bytes(block_bytes);
    bytes.chunks(block_bytes).map(|block| block_hash(block, keys)).collect()
}

/// Refuses blocks that the kernel does not take.
pub(crate) fn check_block_bytes(block_bytes: usize) {
    assert!(
        block_bytes.is_multiple_of(16) && (16..=BLOCK_BYTES_MAX).contains(&block_bytes),
        "blocks of {block_bytes} bytes: want a multiple of 16 of at most {BLOCK_BYTES_MAX}"
    );
}

fn block_hash(block: &[u8], keys: &Keys) -> u128 {
    let mut h = [0u64; 2];
    for (i, piece) in block.chunks(16).enumerate() {
        let mut words = [0u32; 4];
        for (at, byte) in piece.iter().enumerate() {
            words[at / 4] |= u32::from(*byte) << (8 * (at % 4));
        }
        let first = 16 * (i % 32) + 2 * (i / 32);
        for (t, h) in h.iter_mut().enumerate() {
            for pair in 0..2 {
                let key = keys.0[first + pair + t];
                let a = words[2 * pair].wrapping_add(key as u32);
                let b = words[2 * pair + 1].wrapping_add((key >> 32) as u32);
                *h = h.wrapping_add(u64::from(a) * u64::from(b));
            }
        }
    }
    u128::from(h[0]) | u128::from(h[1]) << 64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_block_and_every_swap_of_two_words_changes_its_hash() {
        let block: Vec<u8> = (0..BLOCK_BYTES_MAX).map(|i| (splitmix64(7, i as u64) >> 24) as u8).collect();
        let keys = Keys::new(1);
        let hash = block_hash(&block, &keys);
        for at in 0..8 * block.len() {
            let mut other = block.clone();
            other[at / 8] ^= 1 << (at % 8);
            let other = block_hash(&other, &keys);
            assert!(other as u64 != hash as u64 && other >> 64 != hash >> 64, "bit {at}");
        }
        for at in (0..block.len() - 4).step_by(4) {
            let mut other = block.clone();
            other[at..at + 8].rotate_left(4);
            assert_ne!(block_hash(&other, &keys), hash, "words at byte {at}");
        }
    }

    #[test]
    fn a_difference_that_cancels_under_one_seed_does_not_under_others() {
        // (a + k.0)·(b + k.1) does not depend on b where a = -k.0, which whoever knows the seed can arrange.
        let seed = 11;
        let mut block = vec![0u8; 64];
        block[..4].copy_from_slice(&(splitmix64(seed, 0) as u32).wrapping_neg().to_le_bytes());
        let mut other = block.clone();
        other[4] = 1;
        let lower = |block: &[u8], seed| block_hash(block, &Keys::new(seed)) as u64;
        assert_eq!(lower(&block, seed), lower(&other, seed), "the construction is not what this test thinks");
        let keys = Keys::new(seed);
        assert_ne!(block_hash(&block, &keys), block_hash(&other, &keys), "the second sum has other keys");
        let collisions = (100..1000).filter(|&seed| lower(&block, seed) == lower(&other, seed)).count();
        assert_eq!(collisions, 0, "expected in 900 draws of 2⁻³² each: none");
    }

    #[test]
    fn blocks_are_cut_from_the_start() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        let keys = Keys::new(3);
        let hashes = block_hashes(&bytes, 4096, &keys);
        assert_eq!(hashes.len(), 3);
        assert_eq!(hashes[2], block_hash(&bytes[8192..], &keys));
        assert_eq!(hashes[1], block_hashes(&bytes[4096..8192], 4096, &keys)[0]);
        assert_eq!(block_hashes(&[], 16, &keys), []);
    }
}
