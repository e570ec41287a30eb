//! Causal grouped-query attention of t window queries over frozen and own keys, and its backward.
//!
//! h heads · g kv_heads · d head_dim · q (t, h·d) · own k, v (t, g·d) at positions len.. ·
//! past k, v (len, g·d) at positions 0..len · lse (h, t)
//! S = scale·q kᵀ, P = softmax(S) over the keys a query sees, out = P v.
//!
//! Queries are taken in blocks, so that memory is linear in the context: a block's scores are
//! (block, keys it can see). Own and past keys are two segments of one row of scores; past ones may be bf16.
//! Backward computes P again by the same softmax and takes rowsum(P·dP) itself instead of exp(S - lse)
//! and dout·out: a query that sees one key then gets a gradient of exactly 0 instead of rounding noise.

use super::gemm::{Shared, View, product};
use super::{Stored, simd, with_scratch};
use crate::{Attention, AttentionGrads, AttentionSaved, Past};
use rayon::prelude::*;
use std::ops::Range;

/// Queries whose scores are held at a time.
const QUERIES: usize = 64;
/// Past keys or values that are widened at a time: with a head_dim of 128, 64 KiB.
const KEYS: usize = 128;

/// The keys that a block of queries may see: past rows `past..len` and own rows `own..own_end`.
#[derive(Clone, Copy)]
struct Span {
    past: usize,
    len: usize,
    own: usize,
    own_end: usize,
}

impl Span {
    /// For queries first..first + n of the window, after `len` past rows.
    fn of(first: usize, n: usize, len: usize, window: Option<usize>) -> Span {
        let lowest = window.map_or(0, |w| (len + first + 1).saturating_sub(w));
        Span { past: lowest.min(len), len, own: lowest.saturating_sub(len), own_end: first + n }
    }
    fn past_rows(&self) -> usize {
        self.len - self.past
    }
    fn own_rows(&self) -> usize {
        self.own_end - self.own
    }
    fn keys(&self) -> usize {
        self.past_rows() + self.own_rows()
    }
    /// Columns of the scores that query `i` of the window sees.
    fn visible(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let position = self.len + i;
        let lowest = window.map_or(0, |w| (position + 1).saturating_sub(w));
        let column = |p: usize| if p < self.len { p - self.past } else { self.past_rows() + p - self.len - self.own };
        column(lowest)..column(position) + 1
    }
}

/// Keys or values of one kv head as the two segments of a span.
struct Segments<'a> {
    past: PastRows<'a>,
    own: View<'a>,
}

/// Rows of the past, each d elements from `at` on, `stride` apart.
struct PastRows<'a> {
    stored: &'a Stored,
    at: usize,
    rows: usize,
    d: usize,
    stride: usize,
}

impl<'a> Segments<'a> {
    fn of(past: &'a Stored, own: &'a [f32], span: &Span, head: usize, shape: &Attention) -> Segments<'a> {
        let (d, stride) = (shape.head_dim, shape.kv_heads * shape.head_dim);
        let at = |first: usize, rows: usize| if rows == 0 { 0 } else { first * stride + head * d };
        let (past_rows, own_rows) = (span.past_rows(), span.own_rows());
        Segments {
            past: PastRows { stored: past, at: at(span.past, past_rows), rows: past_rows, d, stride },
            own: View::new(&own[at(span.own, own_rows)..], own_rows, d, stride),
        }
    }
}

impl PastRows<'_> {
    /// Hands all rows to `work`, in order, as f32: at once where they are f32, else [`KEYS`] at a time.
    fn each_block(&self, mut work: impl FnMut(Range<usize>, View)) {
        let (rows, d, stride) = (self.rows, self.d, self.stride);
        if let Stored::F32(values) = self.stored {
            return work(0..rows, View::new(&values[self.at..], rows, d, stride));
        }
        let mut block = vec![0.0; KEYS.min(rows) * d];
        for first in (0..rows).step_by(KEYS) {
            let range = first..(first + KEYS).min(rows);
            for (row, out) in range.clone().zip(block.chunks_exact_mut(d)) {
                self.stored.read(self.at + row * stride, out);
            }
            work(range.clone(), View::dense(&block, range.len(), d));
        }
    }
}

/// One head's part of n rows of a (t, heads·d) buffer.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    n: usize,
    d: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// Rows first..first + n.
    fn of(data: &'a [f32], first: usize, n: usize, head: usize, shape: &Attention) -> Rows<'a> {
        let (d, stride) = (shape.head_dim, shape.heads * shape.head_dim);
        Rows { data: &data[first * stride + head * d..], n, d, stride }
    }
    fn view(&self) -> View<'a> {
        View::new(self.data, self.n, self.d, self.stride)
    }
}

/// scores (n, keys) = scale · a · segmentsᵀ for rows a of one head, computed as keys · aᵀ: the product
/// then walks along the keys as they lie.
fn score(scores: &mut [f32], a: Rows, b: &Segments, span: &Span, scale: f32) {
    let (n, d, keys) = (a.n, a.d, span.keys());
    let (mut columns, mut by_key) = (vec![0.0; d * n], vec![0.0; keys * n]);
    simd::transpose(a.data, n, d, a.stride, &mut columns, n);
    let columns = View::dense(&columns, d, n);
    let (past, own) = by_key.split_at_mut(span.past_rows() * n);
    b.past.each_block(|rows, keys| {
        product(&mut past[rows.start * n..rows.end * n], keys, columns, scale, false);
    });
    product(own, b.own, columns, scale, false);
    simd::transpose(&by_key, keys, n, n, scores, keys);
}

/// out block (n, d) at `at` = p (n, keys) · segments.
///
/// # Safety
/// Nobody else uses the block.
unsafe fn mix(out: &Shared, at: usize, stride: usize, p: &[f32], n: usize, b: &Segments, span: &Span) {
    let keys = span.keys();
    b.past.each_block(|rows, values| {
        let weights = View::new(&p[rows.start..], n, rows.len(), keys);
        // SAFETY: the caller's promise.
        unsafe { out.product(at, stride, weights, values, 1.0, rows.start > 0) };
    });
    let own = View::new(&p[span.past_rows()..], n, span.own_rows(), keys);
    // SAFETY: the caller's promise.
    unsafe { out.product(at, stride, own, b.own, 1.0, span.past_rows() > 0) };
}

/// See [`crate::Device::attention`].
#[allow(clippy::too_many_arguments)]
pub fn attention(
    out: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    past: Past<super::Cpu>,
    t: usize,
    shape: &Attention,
) {
    let group = shape.heads / shape.kv_heads;
    let stride = shape.heads * shape.head_dim;
    let out = Shared::new(&mut out[..t * stride]);
    let lse = Shared::new(&mut lse[..shape.heads * t]);
    let blocks = t.div_ceil(QUERIES);
    (0..shape.heads * blocks).into_par_iter().for_each(|task| {
        let (head, first) = (task / blocks, task % blocks * QUERIES);
        let n = QUERIES.min(t - first);
        let span = Span::of(first, n, past.len[0] as usize, shape.window);
        let keys = Segments::of(past.keys, k, &span, head / group, shape);
        let values = Segments::of(past.values, v, &span, head / group, shape);
        with_scratch(n * span.keys(), |p| {
            score(p, Rows::of(q, first, n, head, shape), &keys, &span, shape.scale);
            // SAFETY: rows first..first + n of this head belong to this task.
            let lse = unsafe { lse.slice(head * t + first, n) };
            for (i, row) in p.chunks_exact_mut(span.keys()).enumerate() {
                lse[i] = softmax(row, span.visible(first + i, shape.window));
            }
            // SAFETY: as above.
            unsafe { mix(&out, first * stride + head * shape.head_dim, stride, p, n, &values, &span) };
        });
    });
}

/// Softmax over the visible columns, zero elsewhere; returns the log-sum-exp.
fn softmax(row: &mut [f32], visible: Range<usize>) -> f32 {
    row[..visible.start].fill(0.0);
    row[visible.end..].fill(0.0);
    let seen = &mut row[visible];
    let top = simd::max(seen);
    let sum = simd::exp_in_place(seen, top);
    let inv = 1.0 / sum;
    seen.iter_mut().for_each(|x| *x *= inv);
    top + sum.ln()
}

/// See [`crate::Device::attention_backward`]. dS = P·(dP - rowsum(P·dP)), dP = dout vᵀ,
/// dq = scale·dS k, dk = scale·dSᵀ q, dv = Pᵀ dout; the past gets no gradient.
pub fn attention_backward(
    grads: AttentionGrads<super::Buffer>,
    saved: AttentionSaved<super::Cpu>,
    t: usize,
    shape: &Attention,
) {
    let kv_stride = shape.kv_heads * shape.head_dim;
    grads.dk[..t * kv_stride].fill(0.0);
    grads.dv[..t * kv_stride].fill(0.0);
    let dq = Shared::new(&mut grads.dq[..t * shape.heads * shape.head_dim]);
    let dk = Shared::new(&mut grads.dk[..t * kv_stride]);
    let dv = Shared::new(&mut grads.dv[..t * kv_stride]);
    let group = shape.heads / shape.kv_heads;
    // One task per kv head: its query heads add to the same dk and dv, in order.
    (0..shape.kv_heads).into_par_iter().for_each(|kv_head| {
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..t).step_by(QUERIES) {
                // SAFETY: columns of this kv head and of its query heads belong to this task.
                unsafe { backward_block(&dq, &dk, &dv, &saved, t, shape, head, first) };
            }
        }
    });
}

/// One head's queries first..first + QUERIES.
///
/// # Safety
/// Nobody else uses this head's columns of dq, dk and dv.
#[allow(clippy::too_many_arguments)]
unsafe fn backward_block(
    dq: &Shared,
    dk: &Shared,
    dv: &Shared,
    saved: &AttentionSaved<super::Cpu>,
    t: usize,
    shape: &Attention,
    head: usize,
    first: usize,
) {
    let (d, stride, kv_stride) = (shape.head_dim, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let kv_head = head / (shape.heads / shape.kv_heads);
    let n = QUERIES.min(t - first);
    let span = Span::of(first, n, saved.past.len[0] as usize, shape.window);
    let keys = Segments::of(saved.past.keys, saved.k, &span, kv_head, shape);
    let values = Segments::of(saved.past.values, saved.v, &span, kv_head, shape);
    let q = Rows::of(saved.q, first, n, head, shape);
    let dout = Rows::of(saved.dout, first, n, head, shape);
    with_scratch(2 * n * span.keys(), |scratch| {
        let (p, ds) = scratch.split_at_mut(n * span.keys());
        score(p, q, &keys, &span, shape.scale);
        score(ds, dout, &values, &span, 1.0);
        for (i, (p, ds)) in p.chunks_exact_mut(span.keys()).zip(ds.chunks_exact_mut(span.keys())).enumerate() {
            let visible = span.visible(first + i, shape.window);
            softmax(p, visible.clone());
            let (p, seen) = (&p[visible.clone()], &mut ds[visible.clone()]);
            let delta = simd::dot(p, seen);
            p.iter().zip(seen).for_each(|(p, ds)| *ds = p * (*ds - delta) * shape.scale);
            ds[..visible.start].fill(0.0);
            ds[visible.end..].fill(0.0);
        }
        let own = span.own * kv_stride + kv_head * d;
        let own_columns = |data| View::new(data, n, span.own_rows(), span.keys()).t();
        // SAFETY: the caller's promise; the three products run one after the other on this thread.
        unsafe {
            mix(dq, first * stride + head * d, stride, ds, n, &keys, &span);
            dk.product(own, kv_stride, own_columns(&ds[span.past_rows()..]), q.view(), 1.0, true);
            dv.product(own, kv_stride, own_columns(&p[span.past_rows()..]), dout.view(), 1.0, true);
        }
    });
}
