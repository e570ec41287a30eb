//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011), so that any element of any step can be drawn alone, on any device, in any order.
//!
//! key (2 words) = seed and purpose · counter (4 words) = block (64 bits), step, tensor
//!
//! Why not a sequential generator: a step must replay bit for bit after a crash, with another number
//! of threads, and on a GPU.

use crate::cpu::simd::multiversion;
use crate::cpu::stored::round_bf16;

pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Blocks whose halves are handed out side by side: the order of the 16-bit numbers.
pub(crate) const LANES: usize = 16;
/// 16-bit numbers in [`LANES`] blocks.
pub(crate) const GROUP: usize = LANES * 8;

/// The generator itself: four random words from a key and a counter.
pub struct Philox;

impl Philox {
    /// Ten rounds.
    pub fn block(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
        let c = counter.map(|w| [w as u64]);
        rounds(key, c).map(|w| w[0] as u32)
    }
}

/// Ten rounds on `N` counters side by side. Words are the lower halves of 64 bits, and what stands above is nobody's:
/// so the multiplication of a vector's even 32-bit lanes takes them as they are, without a shuffle in any round.
#[inline(always)]
fn rounds<const N: usize>(mut key: [u32; 2], mut c: [[u64; N]; 4]) -> [[u64; N]; 4] {
    const WORD: u64 = u32::MAX as u64;
    for _ in 0..10 {
        let mut next = [[0; N]; 4];
        for i in 0..N {
            let a = MULTIPLIERS[0] as u64 * (c[0][i] & WORD);
            let b = MULTIPLIERS[1] as u64 * (c[2][i] & WORD);
            next[0][i] = (b >> 32) ^ c[1][i] ^ key[0] as u64;
            next[1][i] = b;
            next[2][i] = (a >> 32) ^ c[3][i] ^ key[1] as u64;
            next[3][i] = a;
        }
        c = next;
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

/// What random numbers are for; numbers of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Rounding = 1,
    Projection = 2,
    FirstMoment = 3,
    SecondMoment = 4,
}

/// The random numbers of one purpose, step and tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
    step: u32,
    tensor: u32,
}

impl Stream {
    fn new(seed: u64, purpose: Purpose, step: u64, tensor: usize) -> Stream {
        let key = [seed as u32, (seed >> 32) as u32 ^ (purpose as u32) << 24];
        Stream { key, step: step as u32, tensor: tensor as u32 }
    }

    /// For the stochastic rounding of a tensor's write in a step.
    pub fn rounding(seed: u64, step: u64, tensor: usize) -> Stream {
        Stream::new(seed, Purpose::Rounding, step, tensor)
    }

    /// For the rounding of the moments that belong to a write with this stream of [`Stream::rounding`].
    pub fn of_moments(&self) -> [Stream; 2] {
        let stream = |purpose: Purpose| {
            let other = (Purpose::Rounding as u32 ^ purpose as u32) << 24;
            Stream { key: [self.key[0], self.key[1] ^ other], ..*self }
        };
        [stream(Purpose::FirstMoment), stream(Purpose::SecondMoment)]
    }

    /// For the `refresh`-th projection of all tensors whose smaller dimension is `dim`.
    pub fn projection(seed: u64, refresh: u64, dim: usize) -> Stream {
        Stream::new(seed, Purpose::Projection, refresh, dim)
    }

    /// Key, step and tensor, as kernels take them.
    pub(crate) fn words(&self) -> [u32; 4] {
        [self.key[0], self.key[1], self.step, self.tensor]
    }

    fn block(&self, index: u64) -> [u32; 4] {
        Philox::block(self.key, [index as u32, (index >> 32) as u32, self.step, self.tensor])
    }

    /// Which [`GROUP`] 16-bit numbers those of elements `index * GROUP..` are.
    pub(crate) fn group(&self, index: u64) -> Group {
        Group { key: self.key, step: self.step, tensor: self.tensor, index }
    }

    /// Fills `out` with the 16-bit numbers of elements `first..`: element e is half h = (e % 128) / 16
    /// of block 16·(e / 128) + e % 16, half 2w + 1 being the upper half of word w.
    pub fn fill_u16(&self, first: u64, out: &mut [u16]) {
        let mut group = first / GROUP as u64;
        let mut skip = (first % GROUP as u64) as usize;
        let mut rest = out;
        while !rest.is_empty() {
            let n = (GROUP - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(n);
            if let Ok(whole) = <&mut [u16; GROUP]>::try_from(&mut *now) {
                fill_group(self.group(group), whole);
            } else {
                let mut whole = [0; GROUP];
                fill_group(self.group(group), &mut whole);
                now.copy_from_slice(&whole[skip..skip + n]);
            }
            (rest, skip, group) = (later, 0, group + 1);
        }
    }

    /// Rounds values to bf16 stochastically; the first is element `first`.
    pub fn round_to_bf16(&self, first: u64, values: &mut [f32]) {
        let mut rounded = vec![0; values.len()];
        round_bf16(values, first, self, &mut rounded);
        values.iter_mut().zip(rounded).for_each(|(v, r)| *v = f32::from_bits((r as u32) << 16));
    }

    /// Fills `out` with N(0, sigma²) numbers `first..` by Box-Muller: four per block, computed in
    /// f64 and rounded, so that they are the same on every machine with a correct libm to 1 ulp.
    pub fn fill_normal(&self, first: u64, sigma: f32, out: &mut [f32]) {
        let mut at = first;
        let mut rest = out;
        while !rest.is_empty() {
            let skip = (at % 4) as usize;
            let four = normals(self.block(at / 4));
            let n = (4 - skip).min(rest.len());
            let (now, later) = rest.split_at_mut(n);
            for (o, z) in now.iter_mut().zip(&four[skip..]) {
                *o = sigma * *z as f32;
            }
            (rest, at) = (later, at + n as u64);
        }
    }
}

/// Four standard normal numbers from four uniform words.
fn normals(words: [u32; 4]) -> [f64; 4] {
    let pair = |a: u32, b: u32| {
        let radius = (-2.0 * ((a as f64 + 0.5) / 4294967296.0).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * (b as f64 / 4294967296.0)).sin_cos();
        (radius * cos, radius * sin)
    };
    let (a, b) = pair(words[0], words[1]);
    let (c, d) = pair(words[2], words[3]);
    [a, b, c, d]
}

/// A group of [`GROUP`] 16-bit numbers, not drawn yet.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    pub key: [u32; 2],
    pub step: u32,
    pub tensor: u32,
    pub index: u64,
}

multiversion! {
    fn fill_group(group: Group, out: &mut [u16; GROUP]) {
        // So many that four words of each fit into the registers of AVX2.
        const AT_ONCE: usize = 8;
        for first in (0..LANES).step_by(AT_ONCE) {
            let block = |lane: usize| group.index * LANES as u64 + (first + lane) as u64;
            let (low, high) = (std::array::from_fn(block), std::array::from_fn(|lane| block(lane) >> 32));
            let words = rounds(group.key, [low, high, [group.step as u64; AT_ONCE], [group.tensor as u64; AT_ONCE]]);
            for half in 0..8 {
                for lane in 0..AT_ONCE {
                    out[half * LANES + first + lane] = (words[half / 2][lane] >> (16 * (half % 2))) as u16;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(Philox::block([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(Philox::block([u32::MAX; 2], [u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            Philox::block([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn a_number_does_not_depend_on_where_a_fill_starts() {
        let stream = Stream::rounding(7, 3, 11);
        let mut all = [0; 1000];
        stream.fill_u16(0, &mut all);
        for (first, n) in [(1, 5), (127, 3), (128, 128), (300, 700), (999, 1)] {
            let mut part = vec![0; n];
            stream.fill_u16(first as u64, &mut part);
            assert_eq!(part, all[first..first + n], "from {first}");
        }
        let mut normal = [0.0; 100];
        stream.fill_normal(0, 1.0, &mut normal);
        let mut part = [0.0; 9];
        stream.fill_normal(31, 1.0, &mut part);
        assert_eq!(part, normal[31..40]);
    }

    #[test]
    fn normal_numbers_have_the_moments_of_a_normal_distribution() {
        let mut z = vec![0.0; 1 << 18];
        Stream::projection(1, 0, 1024).fill_normal(0, 1.0, &mut z);
        let n = z.len() as f64;
        let moment = |k: i32| z.iter().map(|&v| (v as f64).powi(k)).sum::<f64>() / n;
        // Standard errors at n = 2^18: 0.002, 0.003, 0.0075, 0.019; five of each.
        assert!(moment(1).abs() < 0.01, "{}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.015, "{}", moment(2));
        assert!(moment(3).abs() < 0.04, "{}", moment(3));
        assert!((moment(4) - 3.0).abs() < 0.1, "{}", moment(4));
    }
}
