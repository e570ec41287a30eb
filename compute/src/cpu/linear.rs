//! Products with foreign weights: y = x Wᵀ + b and dx = dy W.
//!
//! x (t,n) · W (m,n) · y (t,m). A block of W is widened to f32 in a scratch that stays in the
//! second-level cache and is multiplied from there; no f32 copy of a whole weight exists.

use super::gemm::Shared;
use super::kernel::{self, Ahead, Panels, Rows, Vectors};
use super::stored::round_to_pairs;
use super::{Buffer, Weight, simd, with_scratch};
use crate::{Cpu, Dtype, LinearOutput};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of W in one task of `linear`.
const ROWS: usize = 16 * kernel::ROWS;
/// Tokens that are many.
const MANY: usize = 128;
/// Columns of W in one piece for many tokens; half of them for few, where twelve rows and 16 tokens then fill the
/// first-level cache.
const COLS: usize = 512;
/// Rows of W that are asked for before they are read: the memory's latency in time.
const AHEAD: usize = 8;
/// Rows of W, or pairs of them, in one piece of `linear_dx`, and the most columns of one task: the longer a part of a row, the
/// sooner memory answers, as long as a piece fits into the second-level cache.
const DX_DEPTH: usize = 128;
const DX_COLS: usize = 256;
const DX_COLS_OF_PAIRS: usize = 1024;
/// Whole panels of every width.
const DX_WIDTHS: usize = 64;

/// One product of [`linear_group`].
pub struct Output<'a> {
    /// (t,m)
    pub y: &'a mut [f32],
    /// (m,n)
    pub w: &'a Weight,
    /// (m)
    pub bias: Option<&'a Weight>,
}

/// Those of the device's caller.
pub fn outputs<'a>(outputs: &'a mut [LinearOutput<Cpu>]) -> Vec<Output<'a>> {
    outputs.iter_mut().map(|o| Output { y: o.y, w: o.w, bias: o.bias }).collect()
}

/// y (t,m) = x (t,n) Wᵀ + bias of several W with one x.
///
/// Computed as yᵀ = W xᵀ from a transposed x, so that W is read as it lies.
pub fn linear_group(outputs: &mut [Output], x: &[f32], t: usize) {
    let Some(n) = outputs.first().map(|output| output.w.cols()) else { return };
    let tokens = Panels::new(n, t);
    let columns = tokens.of_columns(&x[..t * n], n);
    products(outputs, tokens, &columns, n, read_block, None);
}

/// [`linear_group`] with x rounded to bf16, if W is bf16 and there is something that multiplies pairs of it.
pub fn linear_group_rounded(outputs: &mut [Output], x: &[f32], t: usize, pairs: Option<Vectors>) {
    let fits =
        |output: &Output| output.w.dtype() == Dtype::BF16 && output.w.rows() > 1 && output.w.cols().is_multiple_of(2);
    let pairs = pairs.filter(|_| outputs.iter().all(fits));
    let (Some(vectors), Some(n)) = (pairs, outputs.first().map(|output| output.w.cols() / 2)) else {
        return linear_group(outputs, x, t);
    };
    let mut rounded = Buffer::uninit(t * n);
    rounded.par_chunks_mut(n).zip(x.par_chunks(2 * n)).for_each(|(out, x)| round_to_pairs(x, out));
    let tokens = Panels::of_pairs(vectors, n, t);
    let columns = tokens.of_columns(&rounded, n);
    // Many tokens take a row of W so often that it is read into the first-level cache before.
    let in_place: Option<InPlace> = if t < MANY { Some(Weight::rows_of_pairs) } else { None };
    products(outputs, tokens, &columns, 2 * n, read_block_of_pairs, in_place);
}

/// Rows of W where they lie.
type InPlace = fn(&Weight, usize, usize) -> Option<Rows<'_>>;

/// The products with packed tokens; `read` fills a block of W with elements as the panels want them, of which a row has
/// `tokens.k`, unless they lie so already, where `in_place` finds them.
fn products(
    outputs: &mut [Output],
    tokens: Panels,
    columns: &[f32],
    inputs: usize,
    read: impl Fn(&Weight, usize, usize, usize, usize, &mut [f32]) + Sync,
    in_place: Option<InPlace>,
) {
    let (n, t, tokens) = (tokens.k, tokens.columns, tokens.padded());
    let width = tokens.columns;
    // What is widened for few tokens is used little and has to stay in the first-level cache; for many, the tokens do.
    let (at_once, deep) = if t < MANY { (2 * kernel::ROWS, COLS / 2) } else { (ROWS, COLS) };
    let blocks = |rows: usize| (0..rows).step_by(ROWS);
    let places: Vec<_> = outputs
        .iter_mut()
        .map(|Output { y, w, bias }| {
            assert_eq!(w.cols(), inputs, "weights of one group have one input");
            (Shared::new(&mut y[..t * w.rows()]), *w, *bias)
        })
        .collect();
    let tasks: Vec<_> =
        places.iter().flat_map(|place| blocks(place.1.rows()).map(move |first| (place, first))).collect();
    tasks.into_par_iter().for_each(|((y, w, bias), first)| {
        let (m, rows) = (w.rows(), ROWS.min(w.rows() - first));
        with_scratch(rows * (COLS + width), |scratch| {
            let (w_block, result) = scratch.split_at_mut(rows * COLS);
            fill_bias(result, *bias, first, width);
            let result = Shared::new(result);
            let add = |row: usize, a: Rows, k: Range<usize>| {
                // SAFETY: the scratch is this task's own.
                unsafe { kernel::product(&result, row * width, width, a, tokens, columns, k, true) };
            };
            if let Some(a) = in_place.and_then(|find| find(w, first, rows)) {
                add(0, a, 0..n);
            } else {
                for col in (0..n).step_by(deep) {
                    let cols = deep.min(n - col);
                    for row in (0..rows).step_by(at_once) {
                        let some = at_once.min(rows - row);
                        read(w, first + row, some, col, cols, w_block);
                        add(row, Rows::new(w_block, some, cols), col..col + cols);
                    }
                }
            }
            // Back to rows of tokens, through the scratch that W needs no more.
            // SAFETY: as above.
            let result = unsafe { result.slice(0, rows * width) };
            for token in (0..t).step_by(COLS) {
                let some = COLS.min(t - token);
                simd::transpose(&result[token..], rows, some, width, w_block, rows);
                for (i, line) in w_block.chunks_exact(rows).take(some).enumerate() {
                    // SAFETY: columns first..first + rows of y belong to this task.
                    unsafe { y.slice((token + i) * m + first, rows) }.copy_from_slice(line);
                }
            }
        });
    });
}

/// Every row of `out` (rows, width) becomes its bias, or 0 without one.
fn fill_bias(out: &mut [f32], bias: Option<&Weight>, first: usize, width: usize) {
    out.fill(0.0);
    if let Some(bias) = bias {
        let mut values = [0.0; ROWS];
        let values = &mut values[..out.len() / width];
        bias.read(0, first, values);
        out.chunks_exact_mut(width).zip(values).for_each(|(row, b)| row.fill(*b));
    }
}

/// dx (t,n) = dy (t,m) W, or += if `accumulate`.
pub fn linear_dx(dx: &mut [f32], dy: &[f32], w: &Weight, t: usize, accumulate: bool) {
    assert!(dy.len() >= t * w.rows());
    let panels = Panels::new(w.rows(), w.cols());
    // Two tasks for each thread: the bits do not depend on it.
    let wide = w.cols().div_ceil(2 * rayon::current_num_threads()).min(DX_COLS);
    products_dx(
        dx,
        dy,
        t,
        panels,
        wide,
        accumulate,
        |k, col| w.ahead(k, col),
        |k, col, cols, out, panels| {
            w.read_pieces(k, col, cols, out, panels.width(), panels.step());
        },
    );
}

/// [`linear_dx`] with dy rounded to bf16, if W is bf16 and there is something that multiplies pairs of it.
pub fn linear_dx_rounded(dx: &mut [f32], dy: &[f32], w: &Weight, t: usize, accumulate: bool, pairs: Option<Vectors>) {
    let m = w.rows();
    let Some(vectors) = pairs.filter(|_| w.dtype() == Dtype::BF16 && m.is_multiple_of(2)) else {
        return linear_dx(dx, dy, w, t, accumulate);
    };
    let mut rounded = Buffer::uninit(t * m / 2);
    round_to_pairs(&dy[..t * m], &mut rounded);
    let panels = Panels::of_pairs(vectors, m / 2, w.cols());
    let wide = w.cols().div_ceil(rayon::current_num_threads()).min(DX_COLS_OF_PAIRS);
    products_dx(
        dx,
        &rounded,
        t,
        panels,
        wide,
        accumulate,
        |k, col| w.ahead(2 * k, col),
        |k, col, cols, out, panels| {
            w.read_pairs_of_rows(2 * k, col, cols, out, panels.width(), panels.step());
        },
    );
}

/// dx = dy · B, of which `read` fills a line of panels: its k, first column and number of columns, where it begins, and the
/// panels; `ahead` is what the next piece needs, from its k and column on. dy has `b.k` elements a row; a task takes `wide` columns,
/// or a few more.
#[allow(clippy::too_many_arguments)]
fn products_dx(
    dx: &mut [f32],
    dy: &[f32],
    t: usize,
    b: Panels,
    wide: usize,
    accumulate: bool,
    ahead: impl Fn(usize, usize) -> Ahead + Sync,
    read: impl Fn(usize, usize, usize, &mut [f32], Panels) + Sync,
) {
    let (depth, n, wide) = (b.k, b.columns, wide.next_multiple_of(DX_WIDTHS));
    assert!(dx.len() >= t * n);
    let dx = Shared::new(&mut dx[..t * n]);
    (0..n).step_by(wide).collect::<Vec<_>>().into_par_iter().for_each(|first| {
        let cols = wide.min(n - first);
        with_scratch(b.part(DX_DEPTH, cols).len(), |packed| {
            for start in (0..depth).step_by(DX_DEPTH) {
                let panels = b.part(DX_DEPTH.min(depth - start), cols);
                for k in 0..panels.k {
                    read(start + k, first, cols, &mut packed[k * panels.width()..], panels);
                }
                let a = Rows::new(&dy[start..], t, depth).asking(ahead(start + panels.k, first));
                // SAFETY: columns first..first + cols of dx belong to this task.
                unsafe { kernel::product(&dx, first, n, a, panels, packed, 0..panels.k, accumulate || start > 0) };
            }
        });
    });
}

/// Widens W\[row..row + rows, col..col + cols\] into the front of `out`, dense.
fn read_block(w: &Weight, row: usize, rows: usize, col: usize, cols: usize, out: &mut [f32]) {
    for (i, line) in out.chunks_exact_mut(cols).take(rows).enumerate() {
        w.prefetch(row + i + AHEAD, col, cols);
        w.read(row + i, col, line);
    }
}

/// As [`read_block`], unwidened: `col` and `cols` count pairs.
fn read_block_of_pairs(w: &Weight, row: usize, rows: usize, col: usize, cols: usize, out: &mut [f32]) {
    for (i, line) in out.chunks_exact_mut(cols).take(rows).enumerate() {
        w.prefetch(row + i + AHEAD, 2 * col, 2 * cols);
        w.read_pairs(row + i, 2 * col, line);
    }
}
