//! Weights in device memory that an inference server owns: read where they lie, written in place.

use super::Cuda;
use super::driver::check;
use crate::Dtype;
use cudarc::driver::{result, sys};
use std::sync::Arc;

/// A row-major matrix (rows, cols) in foreign device memory.
///
/// Kernels of another process read it while ours write (HOGWILD): an element is naturally aligned and written whole, so
/// a reader sees its old or its new value.
pub struct Weight {
    ptr: sys::CUdeviceptr,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// Keeps the memory open.
    _owner: Arc<dyn Send + Sync>,
}

/// Memory of a weight that no server holds.
struct Memory {
    ptr: sys::CUdeviceptr,
    cuda: Arc<Cuda>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = self.cuda.context.bind_for_drop();
        // SAFETY: allocated in `Weight::zeros`. An error has nobody to tell.
        let _ = unsafe { result::free_sync(self.ptr) };
    }
}

impl Weight {
    /// A view of foreign memory that `owner` keeps open.
    ///
    /// # Safety
    /// `ptr` must be valid device memory of rows·cols elements on the device that uses it, as long as `owner` lives.
    pub unsafe fn new(ptr: u64, dtype: Dtype, rows: usize, cols: usize, owner: Arc<dyn Send + Sync>) -> Weight {
        assert_eq!(ptr as usize % dtype.size(), 0, "weight is not aligned to its element");
        Weight { ptr, dtype, rows, cols, _owner: owner }
    }

    /// A weight in memory of its own, zeroed: for checks, benchmarks and models without a server.
    pub fn zeros(cuda: &Arc<Cuda>, dtype: Dtype, rows: usize, cols: usize) -> Weight {
        let bytes = rows * cols * dtype.size();
        cuda.context.bind();
        // SAFETY: set to zero before anybody reads it; freed by `Memory`.
        let ptr = check(unsafe { result::malloc_sync(bytes.max(1)) }, "cuMemAlloc");
        // SAFETY: the allocation above.
        check(unsafe { result::memset_d8_async(ptr, 0, bytes, cuda.stream.0) }, "cuMemsetD8Async");
        // SAFETY: the memory lives in its owner.
        unsafe { Weight::new(ptr, dtype, rows, cols, Arc::new(Memory { ptr, cuda: cuda.clone() })) }
    }

    /// Where it lies.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }
    /// The server's element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Rows, the outputs of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }

    /// The address of bytes `at..at + len`, which are whole elements.
    pub(super) fn range(&self, at: usize, len: usize) -> sys::CUdeviceptr {
        let size = self.dtype.size();
        assert!(at.is_multiple_of(size) && len.is_multiple_of(size), "{at}+{len} bytes cut an element of {size}");
        assert!(at.checked_add(len).is_some_and(|end| end <= self.bytes()), "{at}+{len} outside {}", self.bytes());
        self.ptr + at as u64
    }
}
