//! Products with foreign weights: y = x Wᵀ + b and dx = dy W.
//!
//! x (t,n) · W (m,n) · y (t,m). A block of W is widened to f32 in a scratch that stays in the
//! second-level cache and goes into the product from there; no f32 copy of a whole weight exists.

use super::gemm::{Shared, View};
use super::{Weight, with_scratch};
use rayon::prelude::*;

/// Rows of W in one task of `linear`, and depth of one product.
const ROWS: usize = 256;
/// Columns of W in one piece.
const COLS: usize = 512;

/// y (t,m) = x (t,n) Wᵀ + bias.
pub fn linear(y: &mut [f32], x: &[f32], w: &Weight, bias: Option<&Weight>, t: usize) {
    let (m, n) = (w.rows(), w.cols());
    assert!(y.len() >= t * m && x.len() >= t * n);
    let y = Shared::new(&mut y[..t * m]);
    (0..m.div_ceil(ROWS)).into_par_iter().for_each(|block| {
        let first = block * ROWS;
        let rows = ROWS.min(m - first);
        if let Some(bias) = bias {
            let mut b = [0.0; ROWS];
            bias.read(0, first, &mut b[..rows]);
            for i in 0..t {
                // SAFETY: columns first..first + rows of y belong to this task.
                unsafe { y.slice(i * m + first, rows) }.copy_from_slice(&b[..rows]);
            }
        }
        with_scratch(ROWS * COLS, |scratch| {
            for col in (0..n).step_by(COLS) {
                let cols = COLS.min(n - col);
                read_block(w, first, rows, col, cols, scratch);
                let a = View::new(&x[col..], t, cols, n);
                let b = View::dense(scratch, rows, cols).t();
                // SAFETY: columns first..first + rows of y belong to this task.
                unsafe { y.product(first, m, a, b, 1.0, col > 0 || bias.is_some()) };
            }
        });
    });
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
