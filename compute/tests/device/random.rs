//! Random inputs from a seed, and the comparison with a tolerance that all tests share.

use crate::machine::Machine;
use compute::{Dtype, Stream, cpu};
use std::sync::Arc;

/// SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014).
pub struct Random {
    state: u64,
}

impl Random {
    /// For one test: the seed of the environment variable TEST_SEED, or a fixed one; it is printed,
    /// which cargo shows when the test fails.
    pub fn new(test: &str) -> Random {
        let seed = std::env::var("TEST_SEED").map_or(20_260_729, |s| s.parse().expect("TEST_SEED is a number"));
        println!("{test}: TEST_SEED={seed}");
        let mut random = Random { state: seed };
        // Another sequence for each test.
        test.bytes().for_each(|b| random.state = random.state.wrapping_mul(257).wrapping_add(b as u64));
        random
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0..n.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Roughly normal with variance 1: the sum of twelve uniform numbers less six.
    pub fn normal(&mut self) -> f32 {
        ((0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0) as f32
    }

    pub fn normals(&mut self, n: usize) -> cpu::Buffer {
        (0..n).map(|_| self.normal()).collect::<Vec<_>>().into()
    }

    pub fn ids(&mut self, n: usize, below: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(below) as u32).collect()
    }

    /// A weight of standard deviation `size`, and its values as the dtype holds them.
    pub fn weight<D: Machine>(
        &mut self,
        device: &Arc<D>,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        size: f32,
    ) -> (D::Weight, Vec<f64>) {
        let w = cpu::Weight::zeros(dtype, rows, cols);
        for row in 0..rows {
            let line: Vec<f32> = (0..cols).map(|_| size * self.normal()).collect();
            w.write(row, 0, &line, &Stream::rounding(1, 2, 3));
        }
        let values = w.values();
        (device.weight(dtype, rows, cols, &values), wide(&values))
    }
}

pub const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// What an output holds before a call that claims to set it.
pub fn poison(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| v as f64).collect()
}

/// Every element within `tolerance` of the wanted one, relative to its size and to the root mean
/// square of all (an element near zero is a sum of terms of that size).
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let rms = (want.iter().map(|v| v * v).sum::<f64>() / want.len().max(1) as f64).sqrt();
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (g as f64 - w).abs();
        // `!(a <= b)` so that a NaN fails.
        let fine = error <= tolerance * (rms + w.abs());
        assert!(fine, "{what}: element {i} of {} is {g:e}, want {w:e} (rms {rms:e})", got.len());
    }
}

/// f32 sums of up to a few thousand terms: 2^-24 · sqrt(terms) is 4e-6 at most.
pub const F32: f64 = 1e-5;
