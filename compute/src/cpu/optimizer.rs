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
use super::kernel::{self, Panels, Rows};
use super::simd::{self, LANES, multiversion};
use super::stored::{SharedStored, update_pair};
use super::{Buffer, Stored, Weight, with_scratch};
use crate::{
    AdamwRows, ApolloCommit, ApolloPrepare, Channels, Compressed, Cpu, Factors, Limiter, Moments, NORM_FACTOR,
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

/// small Pᵀ (t,r) in panels, computed as P smallᵀ, some ranks per task.
fn project(f: &Factors<Buffer>, c: &Compressed<Buffer>) -> (Panels, Buffer) {
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
    let ranks = Panels::new(f.t, c.rank);
    (ranks, ranks.of_columns(&columns, width))
}

/// R of channels first..first + n into `out` (n,r); `big` is the larger factor, transposed.
fn compress(out: &mut [f32], big: &[f32], (ranks, q): &(Panels, Buffer), first: usize, n: usize) {
    let big = Rows::new(&big[first * ranks.k..], n, ranks.k);
    // SAFETY: `out` is borrowed mutably, so nobody else uses it.
    unsafe { kernel::product(&Shared::new(out), 0, ranks.columns, big, *ranks, q, 0..ranks.k, false) };
}

/// xᵀ (c,t) of x (t,c), on all threads.
fn transposed(x: &[f32], t: usize, c: usize) -> Buffer {
    let mut out = Buffer::uninit(t * c);
    const COLUMNS: usize = 1024;
    out.par_chunks_mut(COLUMNS * t).enumerate().for_each(|(block, out)| {
        simd::transpose(&x[block * COLUMNS..], t, out.len() / t, c, out, t);
    });
    out
}

/// See [`crate::Device::apollo_prepare`]: sets s and returns ‖U‖.
pub fn prepare(tensor: &mut ApolloPrepare<Cpu>) -> f32 {
    let ApolloPrepare { s, at: _, exp_avg, exp_avg_sq, factors: f, compressed: c } = tensor;
    let (channels, _) = channels_of(f);
    let (big, q) = (transposed(f.big(), f.t, channels), project(f, c));
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
    let norm = match c.scale_type {
        ScaleType::Channel => {
            s.iter_mut().zip(&squares).for_each(|(s, [n, r])| *s = scale(*n as f64, *r as f64));
            update_norm(f, Some(&s[..channels]))
        }
        ScaleType::Tensor => {
            let sum = |i: usize| squares.iter().map(|v| v[i] as f64).sum::<f64>();
            s[0] = scale(sum(0), sum(1));
            s[0] * update_norm(f, None)
        }
    };
    let (scaled, s) = match c.scale_type {
        ScaleType::Channel => (&f.big()[..f.t * channels], simd::max_size(&s[..channels])),
        ScaleType::Tensor => (&f.dy[..f.t * f.m], s[0]),
    };
    if simd::max_size(scaled) * s < SCALED { norm } else { f32::NAN }
}

/// `commit` multiplies a factor with s and the step before the other one makes it small again: what it may become at most,
/// with room for a step and for the sum over rows.
const SCALED: f32 = 1e30;

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

/// ‖U‖ for channel scaling s, or ‖G‖ without: ‖U‖² = <A Aᵀ, B Bᵀ> over two (t,t) Gram matrices in
/// f64, clamped at 0, or by forming G block by block where t is so large that this is cheaper.
fn update_norm(f: &Factors<Buffer>, s: Option<&[f32]>) -> f32 {
    // f64 products run at half the rate of f32.
    if 2 * f.t * (f.m + f.n) > f.m * f.n {
        return formed_norm(f, s);
    }
    let (channels, d) = channels_of(f);
    let a = gram(f.big(), f.t, channels, s);
    let b = gram(f.small(), f.t, d, None);
    // `max` would turn a NaN into 0.
    a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>().clamp(0.0, f64::INFINITY).sqrt() as f32
}

/// (t,t) Gram matrix of the columns of x (t,c), each scaled by s, in f64.
fn gram(x: &[f32], t: usize, c: usize, s: Option<&[f32]>) -> Vec<f64> {
    const COLUMNS: usize = 4096;
    let parts: Vec<Vec<f64>> = (0..c.div_ceil(COLUMNS))
        .into_par_iter()
        .map(|block| {
            let first = block * COLUMNS;
            let n = COLUMNS.min(c - first);
            let mut wide = vec![0f64; t * n];
            for (i, row) in wide.chunks_exact_mut(n).enumerate() {
                for (j, v) in row.iter_mut().enumerate() {
                    *v = x[i * c + first + j] as f64 * s.map_or(1.0, |s| s[first + j] as f64);
                }
            }
            gram_f64(&wide, t, n)
        })
        .collect();
    let mut sum = vec![0f64; t * t];
    for part in parts {
        sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
    }
    sum
}

fn gram_f64(x: &[f64], t: usize, n: usize) -> Vec<f64> {
    assert_eq!(x.len(), t * n);
    let mut out = vec![0f64; t * t];
    let (rs, none) = (n as isize, gemm::Parallelism::None);
    let x = x.as_ptr();
    // SAFETY: out is (t,t), x is (t,n) and used as itself and as its transpose.
    unsafe {
        gemm::gemm(
            t,
            t,
            n,
            out.as_mut_ptr(),
            1,
            t as isize,
            false,
            x,
            1,
            rs,
            x,
            rs,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            none,
        )
    };
    out
}

/// G = dyᵀ x, or U, formed piece by piece.
struct Formed {
    /// (m,t)
    dy: Buffer,
    panels: Panels,
    x: Buffer,
}

/// A piece of G: rows and columns.
type Piece = (Range<usize>, Range<usize>);

impl Formed {
    /// `dy` is that of the factors, transposed.
    fn new(f: &Factors<Buffer>, dy: Buffer) -> Formed {
        let panels = Panels::new(f.t, f.n);
        Formed { dy, panels, x: panels.of_rows(f.x) }
    }

    /// Times `step`, and times a factor for each channel.
    fn scaled(mut self, channels: Channels, step: f32, s: Option<&[f32]>) -> Formed {
        let (t, width) = (self.panels.k, self.panels.width());
        for (i, row) in self.dy.chunks_exact_mut(t).enumerate() {
            let factor = match (channels, s) {
                (Channels::Rows, Some(s)) => step * s[i],
                _ => step,
            };
            row.iter_mut().for_each(|v| *v *= factor);
        }
        if let (Channels::Columns, Some(s)) = (channels, s) {
            for (panel, s) in self.x.chunks_exact_mut(self.panels.step()).zip(s.chunks(width)) {
                panel.chunks_exact_mut(width).for_each(|line| line.iter_mut().zip(s).for_each(|(v, s)| *v *= s));
            }
        }
        self
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
    fn each_row(&self, w: &Weight, update: impl Fn(usize, usize, &[f32]) + Sync) {
        assert_eq!((w.rows(), w.cols()), (self.dy.len() / self.panels.k, self.panels.columns));
        self.each_piece(|pieces| {
            with_scratch(PIECE_ROWS * PIECE_COLUMNS, |g| {
                for piece in pieces {
                    let (rows, columns) = &piece;
                    rows.clone().for_each(|row| w.prefetch(row, columns.start, columns.len()));
                    self.form(g, &piece);
                    let lines = g.chunks_exact(columns.len());
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

fn formed_norm(f: &Factors<Buffer>, s: Option<&[f32]>) -> f32 {
    let mut formed = Formed::new(f, transposed(f.dy, f.t, f.m));
    if s.is_some() {
        formed = formed.scaled(f.channels(), 1.0, s);
    }
    let parts: Vec<f64> = formed.each_piece(|pieces| {
        with_scratch(PIECE_ROWS * PIECE_COLUMNS, |g| {
            let squares = pieces.map(|piece| {
                formed.form(g, &piece);
                let formed = &g[..piece.0.len() * piece.1.len()];
                formed.iter().map(|v| (*v as f64).powi(2)).sum::<f64>()
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
pub fn commit(tensor: &mut ApolloCommit<Cpu>, factor: f32) {
    let ApolloCommit { w, s, at: _, exp_avg, exp_avg_sq, factors: f, compressed: c, write } = tensor;
    let (channels, _) = channels_of(f);
    let (big, q) = (transposed(f.big(), f.t, channels), project(f, c));
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
    let (step, per_channel) = match c.scale_type {
        ScaleType::Tensor => (write.step * factor * s[0], None),
        ScaleType::Channel => (write.step * factor, Some(&s[..channels])),
    };
    let dy = match f.channels() {
        Channels::Rows => big,
        Channels::Columns => {
            drop(big);
            transposed(f.dy, f.t, f.m)
        }
    };
    let formed = Formed::new(f, dy).scaled(f.channels(), step, per_channel);
    formed.each_row(w, |row, col, u| w.subtract(row, col, u, 1.0 - write.decay, &write.stream));
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
    Formed::new(f, transposed(f.dy, f.t, f.m)).each_row(w, |row, col, g| {
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
