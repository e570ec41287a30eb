//! Products of many rows by cuBLASLt, where it can be loaded: bf16 weights, activations as sums of two bf16, which takes
//! two products, sums and results in f32. Rounding activations to one bf16 takes half the time; the keys and values of a
//! long context that come of it put gradients up to 1.5e-2 off those in f32, on small random models.
//!
//! Row-major matrices are column-major ones transposed: yᵀ (m,t) = W xᵀ with W as its transpose (n,m), dxᵀ (n,t) = Wᵀ dyᵀ.
//! The algorithm for a shape is asked for once and kept. The library is optional: without it, and for shapes that it
//! does not take, the caller has kernels of its own.

use super::launch::Launch;
use super::{Block, Buffer, Cuda, Weight};
use crate::LinearOutput;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Names folders to look for CUDA's libraries in, separated by colons.
const FOLDERS: &str = "APOLLOD_CUDA_LIBRARIES";
/// Where NVIDIA's installer puts them.
const USUAL: &str = "/usr/local/cuda/lib64";
/// Of the library.
const NAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Alignment that tells algorithms nothing more.
const ALIGNMENT_MAX: u64 = 256;

/// The library, opened for one device.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    products: Mutex<HashMap<Shape, Option<Product>>>,
    workspace: Block,
}

/// What an algorithm is chosen by: D (rows, t) = op(W) B (depth, t).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    forward: bool,
    rows: usize,
    depth: usize,
    t: usize,
    /// Of W's address.
    alignment: u32,
}

/// Descriptors and algorithm of a shape; kept to the end of the process.
#[derive(Clone, Copy)]
struct Product {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the library accepts its handles and descriptors from any thread, and does not change descriptors in use.
unsafe impl Send for Product {}
// SAFETY: as above.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created in `open`. An error has nobody to tell.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Opens the library, if this process has not yet: by its name, or from a folder that is named or usual. Whether it is
/// there.
fn is_present() -> bool {
    let named = std::env::var_os(FOLDERS).unwrap_or_default();
    let folders = std::env::split_paths(&named).filter(|folder| folder.is_absolute()).chain([USUAL.into()]);
    let files = folders.flat_map(|folder| NAMES.map(|name| folder.join(name))).filter(|path| path.is_file());
    NAMES.map(PathBuf::from).into_iter().chain(files).any(|path| open(&path))
    // SAFETY: only tries to load the library, under names that the open one has too.
        && unsafe { sys::is_culib_present() }
}

/// Opens a library and leaves it open; whoever asks for its name from now on gets this one.
fn open(path: &Path) -> bool {
    let Ok(name) = CString::new(path.as_os_str().as_encoded_bytes()) else { return false };
    // SAFETY: a C string, and a library whose constructors do what any program with it has them do.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) }.is_null()
}

/// Opens the library that another process has open, if this one finds none: PyTorch brings its own, in a place that only it
/// knows. Without effect after [`Cuda::open`], and where there is none that this user or root alone can write.
pub fn use_library_of(process: u32) {
    if !is_present() {
        let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
        mapped(&maps).into_iter().any(|path| is_trusted(path) && open(path));
    }
}

/// The files among the mappings of a process that have the library's name.
fn mapped(maps: &str) -> Vec<&Path> {
    // A line ends with its file's path, which may hold spaces.
    let mut paths: Vec<&Path> =
        maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..]))).collect();
    paths.retain(|path| path.file_name().is_some_and(|name| NAMES.iter().any(|known| name == *known)));
    paths.dedup();
    paths
}

/// Whether nobody but this user and root could have put it there.
fn is_trusted(path: &Path) -> bool {
    let Ok(file) = path.metadata() else { return false };
    // SAFETY: asks for a number.
    let user = unsafe { libc::geteuid() };
    (file.uid() == 0 || file.uid() == user) && file.mode() & 0o022 == 0
}

impl Blas {
    /// The library with `workspace` of [`Blas::workspace_bytes`]; none if there is no library, no memory for it, or it refuses to work.
    pub fn open(workspace: impl FnOnce(usize) -> Option<Block>) -> Option<Blas> {
        let handle = is_present().then(result::create_handle)?.ok()?;
        let Some(workspace) = workspace(WORKSPACE_BYTES) else {
            // SAFETY: created above. An error has nobody to tell.
            let _ = unsafe { result::destroy_handle(handle) };
            return None;
        };
        Some(Blas { handle, products: Mutex::default(), workspace })
    }

    fn product(&self, shape: Shape) -> Option<Product> {
        let mut products = self.products.lock().expect("no holder panics");
        // A shape that is refused once is refused again.
        *products.entry(shape).or_insert_with(|| Product::new(self.handle, shape).ok())
    }

    /// D = op(W) B, or D += if `accumulate`. False, and nothing is queued, if the library does not take the shape.
    fn multiply(&self, shape: Shape, [w, b, d]: [u64; 3], accumulate: bool, stream: CUstream) -> bool {
        let Some(product) = self.product(shape) else { return false };
        let (alpha, beta) = (1.0f32, accumulate as u32 as f32);
        // SAFETY: layouts are those of the caller's matrices, who answers for their addresses; the workspace is used in
        // the order of the one stream.
        let queued = unsafe {
            result::matmul(
                self.handle,
                product.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                w as *const c_void,
                product.w,
                b as *const c_void,
                product.b,
                d as *const c_void,
                product.d,
                d as *mut c_void,
                product.d,
                &product.algorithm,
                self.workspace.ptr as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        };
        if let Err(error) = queued {
            panic!("cuBLASLt error {error} in cublasLtMatmul: ({}, {}) x {} rows", shape.rows, shape.depth, shape.t);
        }
        true
    }
}

impl Product {
    fn new(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Product, result::CublasError> {
        let Shape { forward, rows, depth, t, alignment } = shape;
        let (bf16, f32) = (sys::cudaDataType::CUDA_R_16BF, sys::cudaDataType::CUDA_R_32F);
        let operation = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?;
        // `cublasOperation_t`, which is not among the bindings: 0 as it lies, 1 transposed.
        let transposed = forward as i32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: a descriptor of ours and a value of the attribute's type.
        unsafe {
            let (at, size) = ((&raw const transposed).cast(), size_of_val(&transposed));
            result::set_matmul_desc_attribute(operation, attribute, at, size)?;
        }
        // As it lies, column by column: (n,m), n being the depth of a forward and the rows of a backward product.
        let (w_rows, w_cols) = if forward { (depth, rows) } else { (rows, depth) };
        let layout = |dtype, rows: usize, cols: usize| {
            result::create_matrix_layout(dtype, rows as u64, cols as u64, rows as i64)
        };
        let (w, b, d) = (layout(bf16, w_rows, w_cols)?, layout(bf16, depth, t)?, layout(f32, rows, t)?);
        let preference = result::create_matmul_pref()?;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        // SAFETY: a descriptor of ours and values of the attributes' types; all descriptors are alive.
        let algorithm = unsafe {
            let bytes = WORKSPACE_BYTES;
            let (at, size) = ((&raw const bytes).cast(), size_of_val(&bytes));
            result::set_matmul_pref_attribute(preference, P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, at, size)?;
            let (at, size) = ((&raw const alignment).cast(), size_of_val(&alignment));
            result::set_matmul_pref_attribute(preference, P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, at, size)?;
            let found = result::get_matmul_algo_heuristic(handle, operation, w, b, d, d, preference);
            let _ = result::destroy_matmul_pref(preference);
            found?.algo
        };
        Ok(Product { operation, w, b, d, algorithm })
    }
}

fn shape(w: &Weight, t: usize, forward: bool) -> Shape {
    let (rows, depth) = if forward { (w.rows(), w.cols()) } else { (w.cols(), w.rows()) };
    let alignment = (1 << w.ptr().trailing_zeros().min(63)).min(ALIGNMENT_MAX) as u32;
    Shape { forward, rows, depth, t, alignment }
}

/// The first `len` activations as sums of two bf16.
fn split(cuda: &Cuda, x: &Buffer, len: usize) -> [Block; 2] {
    let [upper, lower] = [cuda.block(2 * len), cuda.block(2 * len)];
    let blocks = len.div_ceil(4 * 256).min(16 * cuda.multiprocessors());
    Launch::new("activations_bf16")
        .grid(blocks, 1, 1)
        .block(256)
        .arg(upper.ptr)
        .arg(lower.ptr)
        .arg(x.ptr())
        .arg(len as u64)
        .run(cuda);
    [upper, lower]
}

/// The library, where it may be used: not while work is recorded, when it may be unable to choose an algorithm.
fn usable(cuda: &Cuda) -> Option<&Blas> {
    cuda.blas.as_ref().filter(|_| !cuda.is_recording())
}

/// y (t,m) = x (t,n) Wᵀ + bias for weights of one x; false if nothing was done.
pub(super) fn forward(cuda: &Cuda, outputs: &[&LinearOutput<Cuda>], x: &Buffer, t: usize) -> bool {
    let Some(blas) = usable(cuda) else { return false };
    if outputs.iter().any(|o| blas.product(shape(o.w, t, true)).is_none()) {
        return false;
    }
    let [upper, lower] = split(cuda, x, t * outputs[0].w.cols());
    for LinearOutput { y, w, bias } in outputs {
        assert!(blas.multiply(shape(w, t, true), [w.ptr(), lower.ptr, y.ptr()], false, cuda.stream.0));
        assert!(blas.multiply(shape(w, t, true), [w.ptr(), upper.ptr, y.ptr()], true, cuda.stream.0));
        if let Some(bias) = bias {
            Launch::new("add_bias_bf16")
                .grid(w.rows().div_ceil(256), t, 1)
                .block(256)
                .arg(y.ptr())
                .arg(bias.ptr())
                .arg(w.rows() as u32)
                .run(cuda);
        }
    }
    true
}

/// dx (t,n) = Σ dy (t,m) W, or dx += if `accumulate`; false if nothing was done.
pub(super) fn backward(cuda: &Cuda, dx: &Buffer, inputs: &[(&Buffer, &Weight)], t: usize, accumulate: bool) -> bool {
    let Some(blas) = usable(cuda) else { return false };
    if inputs.iter().any(|(_, w)| blas.product(shape(w, t, false)).is_none()) {
        return false;
    }
    for (i, (dy, w)) in inputs.iter().enumerate() {
        let [upper, lower] = split(cuda, dy, t * w.rows());
        let add = accumulate || i > 0;
        assert!(blas.multiply(shape(w, t, false), [w.ptr(), lower.ptr, dx.ptr()], add, cuda.stream.0));
        assert!(blas.multiply(shape(w, t, false), [w.ptr(), upper.ptr, dx.ptr()], true, cuda.stream.0));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_of_another_process_is_found_among_its_mappings() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 12   /a b/nvidia/cu13/lib/libcublasLt.so.13\n\
                    7f01-7f02 r--p 00001000 08:01 12   /a b/nvidia/cu13/lib/libcublasLt.so.13\n\
                    7f02-7f03 r--p 00000000 08:01 13   /a b/nvidia/cu13/lib/libcublas.so.13\n\
                    7f03-7f04 rw-p 00000000 00:00 0    [heap]\n7f04-7f05 rw-p 00000000 00:00 0\n\
                    7f05-7f06 r--p 00000000 08:01 14   /b/libcublasLt.so.13 (deleted)\n";
        assert_eq!(mapped(maps), [Path::new("/a b/nvidia/cu13/lib/libcublasLt.so.13")]);
    }

    #[test]
    fn a_library_that_others_can_write_is_not_opened() {
        use std::os::unix::fs::PermissionsExt;
        let file = std::env::temp_dir().join(format!("apollod-library-{}", std::process::id()));
        std::fs::write(&file, "").unwrap();
        for (mode, trusted) in [(0o755, true), (0o644, true), (0o664, false), (0o646, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(is_trusted(&file), trusted, "{mode:o}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(!is_trusted(&file));
    }
}
