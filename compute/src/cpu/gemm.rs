//! Matrix products of f32 views by the `gemm` crate (AVX-512, AVX2 or portable, chosen at run time).
//!
//! Each call runs on one thread. Parallel operations cut their output into blocks whose sizes depend
//! on the shapes alone, so that results do not depend on the number of threads.

use std::marker::PhantomData;

/// A strided view of f32 values: element (i,j) is data\[i·row_stride + j·col_stride\].
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major (rows, cols) matrix whose rows lie `stride` elements apart.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> View<'a> {
        assert!(rows == 0 || cols == 0 || (rows - 1) * stride + cols <= data.len(), "view outside its buffer");
        View { data, rows, cols, row_stride: stride, col_stride: 1 }
    }
    /// A dense row-major (rows, cols) matrix.
    pub fn dense(data: &'a [f32], rows: usize, cols: usize) -> View<'a> {
        View::new(data, rows, cols, cols)
    }
    /// The transpose.
    pub fn t(self) -> View<'a> {
        View {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            data: self.data,
        }
    }
}

/// A buffer that the tasks of one parallel operation write at disjoint places.
#[derive(Clone, Copy)]
pub struct Shared<'a, T = f32> {
    data: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: `Shared` borrows its buffer mutably for 'a; the unsafe methods that hand out parts of it
// make the caller promise that parts in use at the same time do not overlap.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Borrows `buffer` for a parallel operation.
    pub fn new(buffer: &'a mut [T]) -> Shared<'a, T> {
        Shared { data: buffer.as_mut_ptr(), len: buffer.len(), owner: PhantomData }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No other task uses an overlapping part while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, at: usize, len: usize) -> &'a mut [T] {
        // SAFETY: inside the buffer, which is borrowed for 'a; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(at, len), len) }
    }

    /// Element `at`, with as many as `len` from there inside the buffer.
    pub fn pointer(&self, at: usize, len: usize) -> *mut T {
        assert!(at + len <= self.len, "{at}+{len} outside a buffer of {}", self.len);
        // SAFETY: inside the buffer as asserted.
        unsafe { self.data.add(at) }
    }
}

impl Shared<'_> {
    /// The (a.rows, b.cols) block at element `at` with rows `stride` apart becomes scale·a·b, or
    /// has it added if `accumulate`.
    ///
    /// # Safety
    /// No other task uses an element of the block meanwhile.
    pub unsafe fn product(&self, at: usize, stride: usize, a: View, b: View, scale: f32, accumulate: bool) {
        assert_eq!(a.cols, b.rows, "inner dimensions differ");
        if a.rows == 0 || b.cols == 0 {
            return;
        }
        assert!(at + (a.rows - 1) * stride + b.cols <= self.len, "product outside its buffer");
        // SAFETY: a and b are inside their slices by construction, the block inside the buffer by
        // the assertion above, and nobody else uses it by the caller's promise.
        unsafe {
            gemm::gemm(
                a.rows,
                b.cols,
                a.cols,
                self.data.add(at),
                1,
                stride as isize,
                accumulate,
                a.data.as_ptr(),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr(),
                b.col_stride as isize,
                b.row_stride as isize,
                1.0,
                scale,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

/// out (a.rows, b.cols), dense, = scale·a·b, or += if `accumulate`, on this thread.
pub fn product(out: &mut [f32], a: View, b: View, scale: f32, accumulate: bool) {
    let stride = b.cols;
    // SAFETY: `out` is borrowed mutably, so nobody else uses it.
    unsafe { Shared::new(out).product(0, stride, a, b, scale, accumulate) }
}
