//! APOLLO (arXiv:2412.05270, Algorithm 1) and AdamW on gradients that stay in factors.
//!
//! G (m,n) = dyᵀ x over t rows, never formed as a whole. The projected side is the smaller one:
//! big (t, C) with one column per channel, C = max(m,n); small (t, d), d = min(m,n).
//! P (r,d) · R (C,r) = bigᵀ (small Pᵀ), channel-major · exp_avg, exp_avg_sq (C,r) ·
//! N = exp_avg/(sqrt(exp_avg_sq) + eps) · s\[c\] = ‖N_c‖/(‖R_c‖ + 1e-8) · U = G·diag(s) or diag(s)·G.
//!
//! Why low rank is enough: only the norms of the channels are used, never their directions.
//! Two passes: `prepare` writes nothing but s and ‖U‖, so that a step can still be refused;
//! `commit` recomputes R, which is cheap, and writes moments and W, each once. Moments that are stored in bf16 are
//! rounded there; what a step does to W is computed before the rounding.

use super::gemm::Shared;
use super::kernel::{self, Panels, Rows, Vectors};
use super::simd::{self, LANES, multiversion};
use super::stored::{SharedStored, round_to_pairs, update_pair};
use super::{Buffer, Stored, Weight, with_scratch};
use crate::{
    AdamwRows, ApolloCommit, ApolloPrepare, Channels, Compressed, Cpu, Dtype, Factors, Limiter, Moments, NORM_FACTOR,
    NORM_NEXT, NORM_PREVIOUS, NORM_UPDATE, ScaleType, Write,
};
use rayon::prelude::*;
use std::ops::Range;

/// Channels of the compressed step at a time, so few that R of them stays in the first-level cache.
const CHANNELS: usize = 4 * kernel::ROWS;
/// Rows of G in one task, and rows and columns of it formed at a time: whole panels, so few that they stay in the first-level cache.
const TASK_ROWS: usize = 8 * kernel::ROWS;
const PIECE_ROWS: usize = 2 * kernel::ROWS;
const PIECE_COLUMNS: usize = 256;
const _: () = assert!(PIECE_COLUMNS.is_multiple_of(32), "whole panels of every width");

fn channels_of(f: &Factors<Buffer>) -> (usize, usize) {
    (f.m.max(f.n), f.m.min(f.n))
}

/// How factors are multiplied along t: as they are, or rounded to bf16 and in pairs, which is twice as fast where the
/// processor has dot products of them. That is for weights in bf16: what a step does to one is rounded far more coarsely.
#[derive(Clone, Copy)]
struct Along {
    pairs: Option<Vectors>,
    t: usize,
}

impl Along {
    fn new(pairs: Option<Vectors>, c: &Compressed<Buffer>, t: usize) -> Along {
        Along { pairs: pairs.filter(|_| c.weight == Dtype::BF16), t }
    }

    /// Elements that are multiplied.
    fn depth(self) -> usize {
        if self.pairs.is_some() { self.t.div_ceil(2) } else { self.t }
    }

    /// Of a matrix (t, columns).
    fn panels(self, columns: usize) -> Panels {
        match self.pairs {
            None => Panels::new(self.t, columns),
            Some(vectors) => Panels::of_pairs(vectors, self.depth(), columns),
        }
    }

    /// Packs x (t, columns), given as its rows.
    fn packed_rows(self, x: &[f32], columns: usize) -> (Panels, Buffer) {
        let panels = self.panels(columns);
        let x = &x[..self.t * columns];
        let packed = if self.pairs.is_some() { panels.of_pairs_of_rows(x) } else { panels.of_rows(x) };
        (panels, packed)
    }

    /// Packs x (t, columns), given as its columns, which lie `stride` apart: at least an even number.
    fn packed_columns(self, mut x: Buffer, columns: usize, stride: usize) -> (Panels, Buffer) {
        let panels = self.panels(columns);
        if self.pairs.is_none() {
            return (panels, panels.of_columns(&x, stride));
        }
        let mut rounded = Buffer::uninit(x.len() / 2);
        self.round(&mut x, stride, &mut rounded, stride / 2);
        (panels, panels.of_columns(&rounded, stride / 2))
    }

    /// xᵀ (c, depth) of x (t, c), on all threads.
    fn transposed(self, x: &[f32], c: usize) -> Buffer {
        const COLUMNS: usize = 1024;
        let (t, depth) = (self.t, self.depth());
        let mut out = Buffer::uninit(depth * c);
        out.par_chunks_mut(COLUMNS * depth).enumerate().for_each(|(block, out)| {
            let (x, n) = (&x[block * COLUMNS..], out.len() / depth);
            if self.pairs.is_none() {
                return simd::transpose(x, t, n, c, out, t);
            }
            with_scratch(n * 2 * depth, |wide| {
                simd::transpose(x, t, n, c, wide, 2 * depth);
                self.round(wide, 2 * depth, out, depth);
            });
        });
        out
    }

    /// Rows of t elements, of which the one after the last counts as 0, become rows of pairs.
    fn round(self, rows: &mut [f32], stride: usize, out: &mut [f32], out_stride: usize) {
        for (row, out) in rows.chunks_exact_mut(stride).zip(out.chunks_exact_mut(out_stride)) {
            row[self.t..2 * self.depth()].fill(0.0);
            round_to_pairs(&row[..2 * self.depth()], out);
        }
    }
}

/// small Pᵀ (t,r) in panels, computed as P smallᵀ, some ranks per task.
fn project(f: &Factors<Buffer>, c: &Compressed<Buffer>, along: Along) -> (Panels, Buffer) {
    const RANKS: usize = 32 * kernel::ROWS;
    let (_, d) = channels_of(f);
    let tokens = Panels::new(d, f.t);
    let small = tokens.of_columns(&f.small()[..f.t * d], d);
    let tokens = tokens.padded();
    let width = tokens.columns;
    let mut columns = Buffer::uninit(c.rank * width);
    columns.par_chunks_mut(RANKS * width).enumerate().for_each(|(block, out)| {
        let ranks = out.len() / width;
        let p = Rows::new(&c.projection[block * RANKS * d..], ranks, d);
        // SAFETY: this task's own part.
        unsafe { kernel::product(&Shared::new(out), 0, width, p, tokens, &small, 0..d, false) };
    });
    along.packed_columns(columns, c.rank, width)
}

/// R of channels first..first + n into `out` (n,r); `big` is the larger factor, transposed.
fn compress(out: &mut [f32], big: &[f32], (ranks, q): &(Panels, Buffer), first: usize, n: usize) {
    let big = Rows::new(&big[first * ranks.k..], n, ranks.k);
    // SAFETY: `out` is borrowed mutably, so nobody else uses it.
    unsafe { kernel::product(&Shared::new(out), 0, ranks.columns, big, *ranks, q, 0..ranks.k, false) };
}

/// See [`crate::Device::apollo_prepare`]: sets s and returns ‖U‖.
pub fn prepare(tensor: &mut ApolloPrepare<Cpu>, pairs: Option<Vectors>) -> f32 {
    let ApolloPrepare { s, at: _, exp_avg, exp_avg_sq, factors: f, compressed: c } = tensor;
    let (channels, _) = channels_of(f);
    let along = Along::new(pairs, c, f.t);
    let (big, q) = (along.transposed(f.big(), channels), project(f, c, along));
    let mut squares = vec![[0.0f32; 2]; channels];
    squares.par_chunks_mut(CHANNELS).enumerate().for_each(|(block, squares)| {
        let first = block * CHANNELS;
        with_scratch(CHANNELS * c.rank, |r| {
            compress(r, &big, &q, first, squares.len());
            let (mut room, mut room_sq) = (Vec::new(), Vec::new());
            for (i, (square, r)) in squares.iter_mut().zip(r.chunks_exact(c.rank)).enumerate() {
                let state = (first + i) * c.rank..(first + i + 1) * c.rank;
                let (m, v) = (exp_avg.wide(state.clone(), &mut room), exp_avg_sq.wide(state, &mut room_sq));
                *square = channel_squares(r, m, v, c.moments);
            }
        });
    });
    // A square that overflows would make s zero, hide in ‖U‖ and stay in exp_avg_sq for ever.
    if squares.iter().flatten().any(|v| !v.is_finite()) {
        return f32::NAN;
    }
    let scale = |n: f64, r: f64| (n.sqrt() / (r.sqrt() + 1e-8)) as f32;
    match c.scale_type {
        ScaleType::Channel => {
            s.iter_mut().zip(&squares).for_each(|(s, [n, r])| *s = scale(*n as f64, *r as f64));
            update_norm(f, along, Some(&s[..channels]))
        }
        ScaleType::Tensor => {
            let sum = |i: usize| squares.iter().map(|v| v[i] as f64).sum::<f64>();
            s[0] = scale(sum(0), sum(1));
            s[0] * update_norm(f, along, None)
        }
    }
}

multiversion! {
    /// (‖N_c‖², ‖R_c‖²) with the moments as this step would leave them.
    fn channel_squares(r: &[f32], exp_avg: &[f32], exp_avg_sq: &[f32], k: Moments) -> [f32; 2] {
        let ((r, r_rest), (m, m_rest), (v, v_rest)) =
            (r.as_chunks::<LANES>(), exp_avg.as_chunks::<LANES>(), exp_avg_sq.as_chunks::<LANES>());
        let (mut n_lanes, mut r_lanes) = ([0.0f32; LANES], [0.0f32; LANES]);
        for ((r, m), v) in r.iter().zip(m).zip(v) {
            for i in 0..LANES {
                n_lanes[i] += normalised(r[i], m[i], v[i], k).powi(2);
                r_lanes[i] += r[i] * r[i];
            }
        }
        let (mut n_sum, mut r_sum) = (simd::fold(n_lanes), simd::fold(r_lanes));
        for ((&r, &m), &v) in r_rest.iter().zip(m_rest).zip(v_rest) {
            n_sum += normalised(r, m, v, k).powi(2);
            r_sum += r * r;
        }
        [n_sum, r_sum]
    }
}

/// N of one element, from the moments as this step would leave them.
#[inline(always)]
fn normalised(r: f32, exp_avg: f32, exp_avg_sq: f32, k: Moments) -> f32 {
    let m = k.beta1 * exp_avg + (1.0 - k.beta1) * r;
    let v = k.beta2 * exp_avg_sq + (1.0 - k.beta2) * (r * r);
    m / (v.sqrt() + k.eps)
}

multiversion! {
    fn update_moments(r: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], k: Moments) {
        for ((&r, m), v) in r.iter().zip(exp_avg).zip(exp_avg_sq) {
            *m = k.beta1 * *m + (1.0 - k.beta1) * r;
            *v = k.beta2 * *v + (1.0 - k.beta2) * (r * r);
        }
    }
}

/// ‖U‖ for channel scaling s, or ‖G‖ without: ‖U‖² = <A Aᵀ, B Bᵀ> over two (t,t) Gram matrices, clamped at 0, or by forming G
/// block by block where t is so large that this is cheaper.
fn update_norm(f: &Factors<Buffer>, along: Along, s: Option<&[f32]>) -> f32 {
    if f.t * (f.m + f.n) > f.m * f.n {
        return formed_norm(f, along, s);
    }
    let (channels, d) = channels_of(f);
    let a = gram(f.big(), f.t, channels, s);
    let b = gram(f.small(), f.t, d, None);
    // `max` would turn a NaN into 0.
    a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>().clamp(0.0, f64::INFINITY).sqrt() as f32
}

/// (t,t) Gram matrix of the columns of x (t,c), each scaled by s: sums in f64 of products of some columns in f32.
fn gram(x: &[f32], t: usize, c: usize, s: Option<&[f32]>) -> Vec<f64> {
    const COLUMNS: usize = 512;
    const BLOCKS: usize = 8;
    let blocks: Vec<_> = (0..c).step_by(COLUMNS).map(|first| first..c.min(first + COLUMNS)).collect();
    let parts: Vec<Vec<f64>> = blocks
        .par_chunks(BLOCKS)
        .map(|blocks| {
            let mut sums = vec![0f64; t * t];
            with_scratch(t * (COLUMNS + t), |scratch| {
                let (scaled, products) = scratch.split_at_mut(t * COLUMNS);
                for block in blocks {
                    let n = block.len();
                    for (scaled, x) in scaled.chunks_exact_mut(n).zip(x.chunks_exact(c)).take(t) {
                        scaled.copy_from_slice(&x[block.clone()]);
                        s.iter().for_each(|s| multiply(scaled, &s[block.clone()]));
                    }
                    let (rows, panels) = (Rows::new(scaled, t, n), Panels::new(n, t));
                    let packed = panels.of_columns(scaled, n);
                    // SAFETY: `products` is borrowed mutably, so nobody else uses it.
                    unsafe { kernel::product(&Shared::new(products), 0, t, rows, panels, &packed, 0..n, false) };
                    sums.iter_mut().zip(&*products).for_each(|(sum, product)| *sum += *product as f64);
                }
            });
            sums
        })
        .collect();
    let mut sum = vec![0f64; t * t];
    for part in parts {
        sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
    }
    sum
}

/// G = dyᵀ x, formed piece by piece.
struct Formed {
    /// (m, depth)
    dy: Buffer,
    panels: Panels,
    x: Buffer,
}

/// A piece of G: rows and columns.
type Piece = (Range<usize>, Range<usize>);

impl Formed {
    /// `dy` is that of the factors, transposed.
    fn new(f: &Factors<Buffer>, along: Along, dy: Buffer) -> Formed {
        let (panels, x) = along.packed_rows(f.x, f.n);
        Formed { dy, panels, x }
    }

    /// The pieces of rows `first..first + rows`.
    fn pieces(&self, first: usize, rows: usize) -> impl Iterator<Item = Piece> {
        let (end, n) = (first + rows, self.panels.columns);
        let rows = (first..end).step_by(PIECE_ROWS).map(move |first| first..(first + PIECE_ROWS).min(end));
        let columns = move || (0..n).step_by(PIECE_COLUMNS).map(move |first| first..(first + PIECE_COLUMNS).min(n));
        rows.flat_map(move |rows| columns().map(move |columns| (rows.clone(), columns)))
    }

    /// What `work` makes of each piece and its place, by tasks of [`TASK_ROWS`] in order.
    fn each_piece<R: Send>(&self, work: impl Fn(&mut dyn Iterator<Item = Piece>) -> R + Sync) -> Vec<R> {
        let m = self.dy.len() / self.panels.k;
        let task = |block: usize| work(&mut self.pieces(block * TASK_ROWS, TASK_ROWS.min(m - block * TASK_ROWS)));
        (0..m.div_ceil(TASK_ROWS)).into_par_iter().map(task).collect()
    }

    /// Hands each row of each piece to `update`, with the place of its first element in `w`, which is asked for before.
    fn each_row(&self, w: &Weight, update: impl Fn(usize, usize, &mut [f32]) + Sync) {
        assert_eq!((w.rows(), w.cols()), (self.dy.len() / self.panels.k, self.panels.columns));
        self.each_piece(|pieces| {
            with_scratch(PIECE_ROWS * PIECE_COLUMNS, |g| {
                for piece in pieces {
                    let (rows, columns) = &piece;
                    rows.clone().for_each(|row| w.prefetch(row, columns.start, columns.len()));
                    self.form(g, &piece);
                    let lines = g.chunks_exact_mut(columns.len());
                    rows.clone().zip(lines).for_each(|(row, g)| update(row, columns.start, g));
                }
            });
        });
    }

    /// A piece of G, dense, into the front of `out`.
    fn form(&self, out: &mut [f32], (rows, columns): &Piece) {
        let t = self.panels.k;
        let dy = Rows::new(&self.dy[rows.start * t..], rows.len(), t);
        // A piece begins at a whole panel, and those before it have all their columns.
        let panels = self.panels.with_columns(columns.len());
        // SAFETY: `out` is borrowed mutably, so nobody else uses it.
        unsafe {
            let x = &self.x[columns.start * t..];
            kernel::product(&Shared::new(out), 0, columns.len(), dy, panels, x, 0..t, false)
        };
    }
}

fn formed_norm(f: &Factors<Buffer>, along: Along, s: Option<&[f32]>) -> f32 {
    let formed = Formed::new(f, along, along.transposed(f.dy, f.m));
    let scale = |row: usize, column: usize| match (s, f.channels()) {
        (None, _) => 1.0,
        (Some(s), Channels::Rows) => s[row] as f64,
        (Some(s), Channels::Columns) => s[column] as f64,
    };
    let parts: Vec<f64> = formed.each_piece(|pieces| {
        with_scratch(PIECE_ROWS * PIECE_COLUMNS, |g| {
            let squares = pieces.map(|piece| {
                formed.form(g, &piece);
                let lines = piece.0.zip(g.chunks_exact(piece.1.len()));
                let squares = lines.flat_map(|(row, line)| {
                    piece.1.clone().zip(line).map(move |(column, g)| (*g as f64 * scale(row, column)).powi(2))
                });
                squares.sum::<f64>()
            });
            squares.sum()
        })
    });
    parts.iter().sum::<f64>().sqrt() as f32
}

/// See [`crate::Device::limit`].
pub fn limit(norms: &mut [f32], at: usize, limiter: Limiter) {
    let (previous, update) = (norms[at + NORM_PREVIOUS], norms[at + NORM_UPDATE]);
    let growth = match limiter.growth {
        Some(limit) if previous > 0.0 => (update / (previous + 1e-8)).max(limit) / limit,
        _ => 1.0,
    };
    norms[at + NORM_FACTOR] = 1.0 / growth;
    let floor = limiter.floor * limiter.expected;
    norms[at + NORM_NEXT] = if update > 0.0 { (update / growth).max(floor) } else { previous };
}

/// See [`crate::Device::apollo_commit`]; `factor` is the limiter's.
pub fn commit(tensor: &mut ApolloCommit<Cpu>, factor: f32, pairs: Option<Vectors>) {
    let ApolloCommit { w, s, at: _, exp_avg, exp_avg_sq, factors: f, compressed: c, write } = tensor;
    let (channels, _) = channels_of(f);
    let along = Along::new(pairs, c, f.t);
    let (big, q) = (along.transposed(f.big(), channels), project(f, c, along));
    let (len, block) = (channels * c.rank, CHANNELS * c.rank);
    let streams = write.stream.of_moments();
    let blocks = exp_avg.part(0..len).chunks(block).into_par_iter().zip(exp_avg_sq.part(0..len).chunks(block));
    blocks.enumerate().for_each(|(i, moments)| {
        let first = i * CHANNELS;
        let n = CHANNELS.min(channels - first);
        with_scratch(n * c.rank, |r| {
            compress(r, &big, &q, first, n);
            update_pair(moments, first * c.rank, &streams, |at, exp_avg, exp_avg_sq| {
                update_moments(&r[at..at + exp_avg.len()], exp_avg, exp_avg_sq, c.moments);
            });
        });
    });
    let dy = match f.channels() {
        Channels::Rows => big,
        Channels::Columns => {
            drop(big);
            along.transposed(f.dy, f.m)
        }
    };
    let (step, keep) = (write.step * factor, 1.0 - write.decay);
    Formed::new(f, along, dy).each_row(w, |row, col, g| {
        let step = match (c.scale_type, f.channels()) {
            (ScaleType::Tensor, _) => step * s[0],
            (ScaleType::Channel, Channels::Rows) => step * s[row],
            (ScaleType::Channel, Channels::Columns) => {
                multiply(g, &s[col..col + g.len()]);
                step
            }
        };
        w.subtract(row, col, g, step, keep, &write.stream);
    });
}

multiversion! {
    fn multiply(x: &mut [f32], y: &[f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x *= y);
    }
}

multiversion! {
    /// AdamW (Loshchilov & Hutter, arXiv:1711.05101) with bias correction in the step.
    fn adamw(w: &mut [f32], g: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32], k: Moments, step: f32, keep: f32) {
        for i in 0..g.len() {
            exp_avg[i] = k.beta1 * exp_avg[i] + (1.0 - k.beta1) * g[i];
            exp_avg_sq[i] = k.beta2 * exp_avg_sq[i] + (1.0 - k.beta2) * (g[i] * g[i]);
            w[i] = (w[i] - step * exp_avg[i] / (exp_avg_sq[i].sqrt() + k.eps)) * keep;
        }
    }
}

/// See [`crate::Device::adamw_factors`].
pub fn adamw_factors(
    w: &Weight,
    exp_avg: &mut Stored,
    exp_avg_sq: &mut Stored,
    f: &Factors<Buffer>,
    moments: Moments,
    write: Write,
) {
    assert!(exp_avg.len() >= f.m * f.n && exp_avg_sq.len() >= f.m * f.n);
    let (exp_avg, exp_avg_sq) = (SharedStored::new(exp_avg), SharedStored::new(exp_avg_sq));
    let streams = write.stream.of_moments();
    let along = Along { pairs: None, t: f.t };
    Formed::new(f, along, along.transposed(f.dy, f.m)).each_row(w, |row, col, g| {
        let at = row * f.n + col;
        // SAFETY: these elements of the moments belong to the task that writes the same ones of W.
        let pair = unsafe { (exp_avg.part(at, g.len()), exp_avg_sq.part(at, g.len())) };
        let mut line = [0.0; PIECE_COLUMNS];
        let line = &mut line[..g.len()];
        w.read(row, col, line);
        update_pair(pair, at, &streams, |at, m, v| {
            let (line, g) = (&mut line[at..at + m.len()], &g[at..at + m.len()]);
            adamw(line, g, m, v, moments, write.step, 1.0 - write.decay);
        });
        w.write(row, col, line, &write.stream);
    });
}

/// See [`crate::Device::adamw_rows`].
pub fn adamw_rows(tensor: &mut AdamwRows<Cpu>, moments: Moments) {
    let AdamwRows { w, rows, g, exp_avg, exp_avg_sq, write } = tensor;
    let (n, streams) = (w.cols(), write.stream.of_moments());
    let mut line = vec![0.0; n];
    for (r, g) in rows.iter().zip(g.chunks_exact(n)) {
        let state = r.slot as usize * n..(r.slot as usize + 1) * n;
        w.read(r.row as usize, 0, &mut line);
        let pair = (exp_avg.part(state.clone()), exp_avg_sq.part(state.clone()));
        update_pair(pair, state.start, &streams, |at, m, v| {
            let (line, g) = (&mut line[at..at + m.len()], &g[at..at + m.len()]);
            adamw(line, g, m, v, moments, r.step, 1.0 - write.decay);
        });
        w.write(r.row as usize, 0, &line, &write.stream);
    }
}
