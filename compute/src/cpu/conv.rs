//! A causal depthwise convolution with SiLU behind it, and its backward.
//!
//! x, y (t,C) · before (K-1,C), the inputs of the tokens before · w (C,K) · p = Σ_j w\[c,j\]·x\[i-K+1+j,c\] · y = p·σ(p)

use super::gemm::Shared;
use super::pointwise::{silu_slope, swiglu_piece, vector};
use super::simd::multiversion;
use super::{Weight, with_scratch};
use crate::Convolution;
use rayon::prelude::*;

/// Channels of one task.
const CHANNELS: usize = 256;

/// What a task reads: some channels of all inputs, those before included, and of the weights.
struct Part<'a> {
    x: &'a [f32],
    before: &'a [f32],
    /// (K, C)
    w: &'a [f32],
    width: usize,
    channels: usize,
    first: usize,
    n: usize,
}

impl Part<'_> {
    /// The inputs that element j of the window of token i sees.
    fn input(&self, i: usize, j: usize) -> &[f32] {
        let (of, row) = match (i + j).checked_sub(self.width - 1) {
            Some(row) => (self.x, row),
            None => (self.before, i + j),
        };
        &of[row * self.channels + self.first..][..self.n]
    }

    fn weights(&self, j: usize) -> &[f32] {
        &self.w[j * self.channels + self.first..][..self.n]
    }

    /// p of token i.
    fn sum(&self, i: usize, out: &mut [f32]) {
        out.fill(0.0);
        for j in 0..self.width {
            add_products(out, self.input(i, j), self.weights(j));
        }
    }
}

/// Calls `work` for each part of the channels, on all threads.
fn each_part(x: &[f32], before: &[f32], w: &Weight, shape: Convolution, work: impl Fn(&Part) + Sync) {
    let Convolution { channels, width } = shape;
    assert_eq!((w.rows(), w.cols()), (1, channels * width), "weights of a convolution");
    let flat = vector(w);
    let by_place: Vec<f32> = (0..width).flat_map(|j| flat[j..].iter().step_by(width)).copied().collect();
    (0..channels.div_ceil(CHANNELS)).into_par_iter().for_each(|block| {
        let first = block * CHANNELS;
        work(&Part { x, before, w: &by_place, width, channels, first, n: CHANNELS.min(channels - first) });
    });
}

/// See [`crate::Device::causal_conv`].
pub fn causal_conv(y: &mut [f32], x: &[f32], before: &[f32], w: &Weight, t: usize, shape: Convolution) {
    let y = Shared::new(&mut y[..t * shape.channels]);
    each_part(x, before, w, shape, |part| {
        with_scratch(2 * part.n, |scratch| {
            let (sum, one) = scratch.split_at_mut(part.n);
            one.fill(1.0);
            for i in 0..t {
                part.sum(i, sum);
                // SAFETY: these channels of y belong to this task.
                swiglu_piece(unsafe { y.slice(i * part.channels + part.first, part.n) }, sum, one);
            }
        });
    });
}

/// See [`crate::Device::causal_conv_backward`].
#[allow(clippy::too_many_arguments)]
pub fn causal_conv_backward(
    dx: &mut [f32],
    dw: &mut [f32],
    dy: &[f32],
    x: &[f32],
    before: &[f32],
    w: &Weight,
    t: usize,
    shape: Convolution,
) {
    let Convolution { channels, width } = shape;
    let (dx, dw) = (Shared::new(&mut dx[..t * channels]), Shared::new(&mut dw[..channels * width]));
    each_part(x, before, w, shape, |part| {
        with_scratch((t + width) * part.n, |scratch| {
            let (dp, sums) = scratch.split_at_mut(t * part.n);
            sums.fill(0.0);
            for (i, dp) in dp.chunks_exact_mut(part.n).enumerate() {
                part.sum(i, dp);
                silu_slope(dp, &dy[i * channels + part.first..][..part.n]);
                for j in 0..width {
                    add_products(&mut sums[j * part.n..][..part.n], dp, part.input(i, j));
                }
            }
            for i in 0..t {
                // SAFETY: these channels of dx belong to this task.
                let dx = unsafe { dx.slice(i * channels + part.first, part.n) };
                dx.fill(0.0);
                // Token i is element j of the window of token i + K - 1 - j.
                for j in (width - 1).saturating_sub(t - 1 - i)..width {
                    add_products(dx, &dp[(i + width - 1 - j) * part.n..][..part.n], part.weights(j));
                }
            }
            // SAFETY: as above.
            let dw = unsafe { dw.slice(part.first * width, part.n * width) };
            for (c, dw) in dw.chunks_exact_mut(width).enumerate() {
                dw.iter_mut().enumerate().for_each(|(j, dw)| *dw = sums[j * part.n + c]);
            }
        });
    });
}

multiversion! {
    fn add_products(out: &mut [f32], a: &[f32], b: &[f32]) {
        out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out += a * b);
    }
}
