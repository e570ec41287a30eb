//! A CUDA driver on ordinary memory, so that code for a GPU is tested on a machine without one.
//!
//! It is a `libcuda.so` that is opened the way the real one is: the program under test does not know. Allocations are
//! shared memory that other processes open by CUDA IPC handles, kernels are the `.cu` sources compiled by the C++
//! compiler (`kernels/host`), streams record graphs, and misuse gets the error that the driver gives.
//!
//! What it shows: wrong indices, sizes, launches and orders of calls, missing barriers as far as they change what a
//! thread waits for, leaks of uninitialised memory (it is NaN). What it cannot: races between threads, the speed, the
//! rounding of a GPU's `expf`, and anything that the PTX compiler does.
//!
//! Environment, read by the library:
//! - `SIMULATED_CUDA_FAIL=cuLaunchKernel(rms_norm_f32):3=700,cuMemAlloc:10=2`: the third launch of that kernel and the
//!   tenth allocation fail with these errors; those of a broken context stay.
//! - `SIMULATED_CUDA_MEMORY`: bytes of device memory (16 GiB).
//! - `SIMULATED_CUDA_LATE=1`: work runs only when somebody waits for it.
//! - `SIMULATED_CUDA_PAGEABLE=1`: the device reads pageable memory of the host by itself, so that a copy to the device
//!   reads its source when it runs.
//! - `SIMULATED_CUDA_ORDER=reverse`: blocks, warps and lanes run in the opposite order.

use std::ffi::CString;
use std::path::Path;
use std::sync::Once;

/// Where the libraries lie: for the `LD_LIBRARY_PATH` of child processes. The driver is `libcuda.so` and
/// `libcuda.so.1`; `libcublasLt.so.13`, to be loaded after it, multiplies matrices.
pub fn library_dir() -> &'static Path {
    Path::new(env!("OUT_DIR"))
}

/// Whether tests are to use the machine's driver instead: APOLLOD_TEST_DRIVER=real, on a machine with a GPU.
pub fn real() -> bool {
    std::env::var("APOLLOD_TEST_DRIVER").is_ok_and(|driver| driver == "real")
}

/// Loads the driver into this process, before anything looks for CUDA; not if tests are to use the machine's.
///
/// # Panics
/// If it cannot be loaded.
pub fn load() {
    static LOADED: Once = Once::new();
    if real() {
        return;
    }
    LOADED.call_once(|| open("libcuda.so"));
}

/// Loads the library of products as well, which programs do without where it is not.
///
/// # Panics
/// If it cannot be loaded.
pub fn load_blas() {
    static LOADED: Once = Once::new();
    load();
    if !real() {
        LOADED.call_once(|| open("libcublasLt.so.13"));
    }
}

fn open(library: &str) {
    let path = library_dir().join(library);
    let name = CString::new(path.to_str().expect("paths are UTF-8")).expect("paths have no NUL");
    // SAFETY: `name` is a C string. The library has no constructors that need anything, and it stays loaded, so
    // whoever asks for its soname from now on gets this one.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    assert!(!handle.is_null(), "{}: {}", path.display(), last_error());
}

fn last_error() -> String {
    // SAFETY: dlerror gives null or a C string that lives until this thread's next call of these functions.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() { String::new() } else { std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}
