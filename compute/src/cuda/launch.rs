//! Launching a kernel by its name.

use super::Cuda;
use super::driver::{check, describe};
use cudarc::driver::{result, sys};
use std::ffi::c_void;

/// Dynamic shared memory that a kernel may have without asking, in bytes.
const SHARED_DEFAULT: usize = 48 << 10;

/// A launch being put together: arguments in the order of the kernel's parameters.
#[must_use = "nothing is queued before `run`"]
pub(super) struct Launch<'a> {
    kernel: &'a str,
    grid: (u32, u32, u32),
    block: u32,
    shared: usize,
    /// Each argument's bytes, in whole words of 8.
    values: Vec<u64>,
    /// Where each begins.
    starts: Vec<usize>,
}

/// A value that is passed by its bytes.
pub(super) trait Arg: Copy {
    /// In the low bytes of a word.
    fn word(self) -> u64;
}

macro_rules! arg {
    ($($type:ty),*) => {$(
        impl Arg for $type {
            fn word(self) -> u64 {
                self.to_ne_bytes().iter().enumerate().fold(0, |word, (i, b)| word | (*b as u64) << (8 * i))
            }
        }
    )*};
}
arg!(u64, u32, i32, f32);

impl<'a> Launch<'a> {
    /// A launch of one block of one thread.
    pub fn new(kernel: &'a str) -> Launch<'a> {
        Launch { kernel, grid: (1, 1, 1), block: 1, shared: 0, values: Vec::new(), starts: Vec::new() }
    }

    /// Blocks. None at all: nothing is launched.
    pub fn grid(self, x: usize, y: usize, z: usize) -> Launch<'a> {
        Launch { grid: (x as u32, y as u32, z as u32), ..self }
    }

    /// Threads of a block.
    pub fn block(self, threads: usize) -> Launch<'a> {
        Launch { block: threads as u32, ..self }
    }

    /// Bytes of dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Launch<'a> {
        Launch { shared: bytes, ..self }
    }

    /// The next argument: a device pointer or a scalar of the parameter's own type.
    pub fn arg(mut self, value: impl Arg) -> Launch<'a> {
        self.starts.push(self.values.len());
        self.values.push(value.word());
        self
    }

    /// The next argument: a struct by value, as its bytes lie in memory.
    pub fn bytes(mut self, value: &[u8]) -> Launch<'a> {
        self.starts.push(self.values.len());
        for chunk in value.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.values.push(u64::from_ne_bytes(word));
        }
        self
    }

    /// Queues it.
    ///
    /// # Panics
    /// If the driver refuses it, which is a mistake of ours or an error of an earlier launch.
    pub fn run(mut self, cuda: &Cuda) {
        if self.grid.0 == 0 || self.grid.1 == 0 || self.grid.2 == 0 {
            return;
        }
        let function = cuda.function(self.kernel);
        if self.shared > SHARED_DEFAULT {
            use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED_MAX;
            // SAFETY: a function of the loaded module.
            let set = unsafe { result::function::set_function_attribute(function, SHARED_MAX, self.shared as i32) };
            check(set, "cuFuncSetAttribute");
        }
        let base = self.values.as_mut_ptr();
        // SAFETY: every start is an index into the values.
        let mut arguments: Vec<*mut c_void> = self.starts.iter().map(|&at| unsafe { base.add(at) }.cast()).collect();
        // SAFETY: the module is loaded; the arguments are copied before this returns; that they fit the kernel's
        // parameters and that its pointers stay valid is what each wrapper answers for.
        let launched = unsafe {
            result::launch_kernel(
                function,
                self.grid,
                (self.block, 1, 1),
                self.shared as u32,
                cuda.stream.0,
                &mut arguments,
            )
        };
        if let Err(error) = launched {
            panic!(
                "CUDA error {} in cuLaunchKernel({}): grid {:?}, block {}, {} bytes of shared memory",
                describe(error),
                self.kernel,
                self.grid,
                self.block,
                self.shared
            );
        }
    }
}
