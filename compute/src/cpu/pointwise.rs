//! Operations that work row by row or element by element, each with its backward.
//!
//! Reductions use a fixed number of partial sums in a fixed order (`simd`).

use super::Weight;
use super::gemm::Shared;
use super::simd::{self, multiversion};
use crate::{Heads, NO_TARGET, Norm};
use rayon::prelude::*;

/// Rows or elements handled by one task where a single one is too little work.
const ROWS_PER_TASK: usize = 8;
const ELEMENTS_PER_TASK: usize = 1 << 14;

/// The elements of a weight of one row.
pub(super) fn vector(w: &Weight) -> Vec<f32> {
    let mut values = vec![0.0; w.cols()];
    w.read(0, 0, &mut values);
    values
}

/// The gain of a norm.
fn gain(w: &Weight, norm: Norm) -> Vec<f32> {
    let mut values = vector(w);
    values.iter_mut().for_each(|w| *w += norm.offset);
    values
}

/// y = x / rms(x) · (w + offset) over `rows` rows; Zhang & Sennrich, "Root mean square layer normalization".
pub fn rms_norm(y: &mut [f32], x: &[f32], w: &Weight, norm: Norm, rows: usize) {
    let n = w.cols();
    let w = gain(w, norm);
    y[..rows * n].par_chunks_mut(n * ROWS_PER_TASK).zip(x[..rows * n].par_chunks(n * ROWS_PER_TASK)).for_each(
        |(y, x)| {
            for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                norm_row(y, x, &w, norm.eps);
            }
        },
    );
}

multiversion! {
    fn norm_row(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        let inv = 1.0 / (simd::dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = x * inv * w;
        }
    }
}

/// With r = 1/rms and w with its offset: dx += r·(dy·w) - x·r³/n·Σ(dy·w·x); dw = Σ_rows dy·x·r.
pub fn rms_norm_backward(dx: &mut [f32], dw: &mut [f32], dy: &[f32], x: &[f32], w: &Weight, norm: Norm, rows: usize) {
    let n = w.cols();
    let w = gain(w, norm);
    let dw = &mut dw[..n];
    dw.fill(0.0);
    for ((dx, dy), x) in dx[..rows * n].chunks_exact_mut(n).zip(dy.chunks_exact(n)).zip(x.chunks_exact(n)) {
        norm_row_backward(dx, dw, dy, x, &w, norm.eps);
    }
}

multiversion! {
    fn norm_row_backward(dx: &mut [f32], dw: &mut [f32], dy: &[f32], x: &[f32], w: &[f32], eps: f32) {
        let n = x.len();
        let inv = 1.0 / (simd::dot(x, x) / n as f32 + eps).sqrt();
        let pull = simd::dot_of_products(dy, w, x) * inv * inv * inv / n as f32;
        for ((((dx, dw), &dy), &x), &w) in dx.iter_mut().zip(dw).zip(dy).zip(x).zip(w) {
            *dx += dy * w * inv - x * pull;
            *dw += dy * x * inv;
        }
    }
}

/// Rotary embedding in the rotate-half layout (Su et al., RoFormer, as Hugging Face stores it).
pub fn rope(x: &mut [f32], table: &[f32], position: usize, t: usize, heads: Heads, inverse: bool) {
    let Heads { count, dim, rotated } = heads;
    let half = rotated / 2;
    x[..t * count * dim].par_chunks_mut(count * dim).enumerate().for_each(|(i, row)| {
        let angles = &table[(position + i) * rotated..][..rotated];
        let (cos, sin) = angles.split_at(half);
        for head in row.chunks_exact_mut(dim) {
            let (a, b) = head[..rotated].split_at_mut(half);
            for j in 0..half {
                let s = if inverse { -sin[j] } else { sin[j] };
                (a[j], b[j]) = (a[j] * cos[j] - b[j] * s, b[j] * cos[j] + a[j] * s);
            }
        }
    });
}

/// h = silu(gate) · up.
pub fn swiglu(h: &mut [f32], gate: &[f32], up: &[f32]) {
    h.par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(gate.par_chunks(ELEMENTS_PER_TASK))
        .zip(up.par_chunks(ELEMENTS_PER_TASK))
        .for_each(|((h, gate), up)| swiglu_piece(h, gate, up));
}

multiversion! {
    pub(super) fn swiglu_piece(h: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
            *h = gate * sigmoid(gate) * up;
        }
    }
}

/// dup = dh·silu(g); dgate = dh·up·σ(g)·(1 + g·(1 - σ(g))).
pub fn swiglu_backward(dgate: &mut [f32], dup: &mut [f32], dh: &[f32], gate: &[f32], up: &[f32]) {
    dgate
        .par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(dup.par_chunks_mut(ELEMENTS_PER_TASK))
        .zip(dh.par_chunks(ELEMENTS_PER_TASK))
        .zip(gate.par_chunks(ELEMENTS_PER_TASK).zip(up.par_chunks(ELEMENTS_PER_TASK)))
        .for_each(|(((dgate, dup), dh), (gate, up))| swiglu_backward_piece(dgate, dup, dh, gate, up));
}

multiversion! {
    fn swiglu_backward_piece(dgate: &mut [f32], dup: &mut [f32], dh: &[f32], gate: &[f32], up: &[f32]) {
        for ((((dgate, dup), &dh), &gate), &up) in dgate.iter_mut().zip(dup).zip(dh).zip(gate).zip(up) {
            let s = sigmoid(gate);
            *dup = dh * gate * s;
            *dgate = dh * up * s * (1.0 + gate * (1.0 - s));
        }
    }
}

multiversion! {
    /// Gradients dy of silu(p) become those of p, in its place.
    pub(super) fn silu_slope(p: &mut [f32], dy: &[f32]) {
        for (p, &dy) in p.iter_mut().zip(dy) {
            let s = sigmoid(*p);
            *p = dy * s * (1.0 + *p * (1.0 - s));
        }
    }
}

multiversion! {
    /// h = x·σ(gate).
    pub fn sigmoid_gate(h: &mut [f32], x: &[f32], gate: &[f32]) {
        for ((h, &x), &gate) in h.iter_mut().zip(x).zip(gate) {
            *h = x * sigmoid(gate);
        }
    }
}

multiversion! {
    /// dx = dh·σ(g); dgate = dh·x·σ(g)·(1 - σ(g)).
    pub fn sigmoid_gate_backward(dx: &mut [f32], dgate: &mut [f32], dh: &[f32], x: &[f32], gate: &[f32]) {
        for ((((dx, dgate), &dh), &x), &gate) in dx.iter_mut().zip(dgate).zip(dh).zip(x).zip(gate) {
            let s = sigmoid(gate);
            *dx = dh * s;
            *dgate = dh * x * s * (1.0 - s);
        }
    }
}

#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + simd::exp(-x))
}

/// Rows of logits become scale·(softmax - onehot(target)); losses\[i\] = log Σ exp - logit\[target\]. Rows without
/// target: zeros and 0.
pub fn cross_entropy(losses: &mut [f32], logits: &mut [f32], targets: &[u32], v: usize, scale: f32) {
    let t = targets.len();
    losses[..t].par_iter_mut().zip(logits[..t * v].par_chunks_mut(v)).zip(targets).for_each(
        |((loss, row), &target)| {
            if target == NO_TARGET {
                row.fill(0.0);
                *loss = 0.0;
                return;
            }
            let target = target as usize;
            let top = simd::max(row);
            let chosen = row[target];
            // Parts in f32, their sum in f64: a vocabulary has up to some hundred thousand tokens.
            let sum: f64 = row.chunks_mut(1024).map(|part| simd::exp_in_place(part, top) as f64).sum();
            *loss = (sum.ln() + (top - chosen) as f64) as f32;
            let inv = (scale as f64 / sum) as f32;
            row.iter_mut().for_each(|x| *x *= inv);
            row[target] -= scale;
        },
    );
}

/// db = Σ_rows dy.
pub fn sum_rows(db: &mut [f32], dy: &[f32], t: usize, m: usize) {
    db[..m].fill(0.0);
    for row in dy[..t * m].chunks_exact(m) {
        for (b, d) in db.iter_mut().zip(row) {
            *b += d;
        }
    }
}

/// Number of values that are infinite or NaN.
pub fn count_nonfinite(x: &[f32]) -> f32 {
    x.par_chunks(ELEMENTS_PER_TASK).map(|c| c.iter().filter(|v| !v.is_finite()).count()).sum::<usize>() as f32
}

/// Sum of squares, in f64.
pub fn sum_squares(x: &[f32]) -> f32 {
    let square = |v: &f32| (*v as f64) * (*v as f64);
    let parts: Vec<f64> = x.par_chunks(ELEMENTS_PER_TASK).map(|c| c.iter().map(square).sum()).collect();
    parts.iter().sum::<f64>() as f32
}

/// x\[i\] = row ids\[i\] of w.
pub fn embed(x: &mut [f32], w: &Weight, ids: &[u32]) {
    let n = w.cols();
    let x = Shared::new(&mut x[..ids.len() * n]);
    ids.par_iter().enumerate().for_each(|(i, &id)| {
        // SAFETY: row i of x belongs to this task.
        w.read(id as usize, 0, unsafe { x.slice(i * n, n) });
    });
}
