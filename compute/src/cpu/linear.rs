//! Products with foreign weights: y = x Wᵀ + b and dx = dy W.
//!
//! x (t,n) · W (m,n) · y (t,m). A block of W is widened to f32 in a scratch that stays in the
//! second-level cache and goes into the product from there; no f32 copy of a whole weight exists.

use super::gemm::{Shared, View, product};
use super::{Weight, simd, with_scratch};
use rayon::prelude::*;

/// Rows of W in one task of `linear`, and depth of one product of `linear_dx`.
const ROWS: usize = 256;
/// Columns of W in one piece.
const COLS: usize = 512;

/// y (t,m) = x (t,n) Wᵀ + bias.
///
/// Computed as yᵀ = W xᵀ from a transposed x: the product then walks along W as it lies and packs
/// nothing, which is four times as fast for few rows.
pub fn linear(y: &mut [f32], x: &[f32], w: &Weight, bias: Option<&Weight>, t: usize) {
    let (m, n) = (w.rows(), w.cols());
    assert!(y.len() >= t * m && x.len() >= t * n);
    let mut columns = vec![0.0; n * t];
    simd::transpose(x, t, n, n, &mut columns, t);
    let y = Shared::new(&mut y[..t * m]);
    (0..m.div_ceil(ROWS)).into_par_iter().for_each(|block| {
        let first = block * ROWS;
        let rows = ROWS.min(m - first);
        with_scratch(ROWS * COLS + rows * t, |scratch| {
            let (w_block, result) = scratch.split_at_mut(ROWS * COLS);
            fill_bias(result, bias, first, t);
            for col in (0..n).step_by(COLS) {
                let cols = COLS.min(n - col);
                read_block(w, first, rows, col, cols, w_block);
                let a = View::dense(w_block, rows, cols);
                let b = View::dense(&columns[col * t..], cols, t);
                product(result, a, b, 1.0, true);
            }
            // Back to rows of tokens, through the scratch that W needs no more.
            for token in (0..t).step_by(COLS) {
                let tokens = COLS.min(t - token);
                simd::transpose(&result[token..], rows, tokens, t, w_block, rows);
                for (i, line) in w_block.chunks_exact(rows).take(tokens).enumerate() {
                    // SAFETY: columns first..first + rows of y belong to this task.
                    unsafe { y.slice((token + i) * m + first, rows) }.copy_from_slice(line);
                }
            }
        });
    });
}

/// Every row of `out` (rows, t) becomes its bias, or 0 without one.
fn fill_bias(out: &mut [f32], bias: Option<&Weight>, first: usize, t: usize) {
    out.fill(0.0);
    if let Some(bias) = bias {
        let mut values = [0.0; ROWS];
        let values = &mut values[..out.len() / t];
        bias.read(0, first, values);
        out.chunks_exact_mut(t).zip(values).for_each(|(row, b)| row.fill(*b));
    }
}

/// dx (t,n) = dy (t,m) W, or += if `accumulate`.
pub fn linear_dx(dx: &mut [f32], dy: &[f32], w: &Weight, t: usize, accumulate: bool) {
    let (m, n) = (w.rows(), w.cols());
    assert!(dx.len() >= t * n && dy.len() >= t * m);
    let dx = Shared::new(&mut dx[..t * n]);
    // Half the width of a forward block, so that a hidden size of 1024 still makes four tasks.
    let width = COLS / 2;
    (0..n.div_ceil(width)).into_par_iter().for_each(|block| {
        let first = block * width;
        let cols = width.min(n - first);
        with_scratch(ROWS * width, |scratch| {
            for row in (0..m).step_by(ROWS) {
                let rows = ROWS.min(m - row);
                read_block(w, row, rows, first, cols, scratch);
                let a = View::new(&dy[row..], t, rows, m);
                let b = View::dense(scratch, rows, cols);
                // SAFETY: columns first..first + cols of dx belong to this task.
                unsafe { dx.product(first, n, a, b, 1.0, accumulate || row > 0) };
            }
        });
    });
}

/// Widens W\[row..row + rows, col..col + cols\] into the front of `out`, dense.
fn read_block(w: &Weight, row: usize, rows: usize, col: usize, cols: usize, out: &mut [f32]) {
    for (i, line) in out.chunks_exact_mut(cols).take(rows).enumerate() {
        w.read(row + i, col, line);
    }
}
