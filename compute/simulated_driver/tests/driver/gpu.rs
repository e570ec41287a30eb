//! A context, a stream and the test kernels; memory that is written and read back.

use cudarc::driver::sys::{self, CUdeviceptr, CUresult};
use std::ffi::{CString, c_void};
use std::process::{Command, Output};

/// Set in a child process.
const CHILD: &str = "SIMULATED_DRIVER_CHILD";

pub struct Gpu {
    pub stream: sys::CUstream,
    pub module: sys::CUmodule,
}

/// `Ok` or the number of the error.
pub fn code(result: CUresult) -> Result<(), u32> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(result as u32) }
}

#[track_caller]
pub fn ok(result: CUresult) {
    assert_eq!(result, CUresult::CUDA_SUCCESS);
}

impl Gpu {
    pub fn open() -> Gpu {
        simulated_driver::load();
        let (mut context, mut stream, mut module) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: every pointer is to a live variable of the type that the function writes.
        unsafe {
            assert!(sys::is_culib_present());
            ok(sys::cuInit(0));
            ok(sys::cuDevicePrimaryCtxRetain(&mut context, 0));
            ok(sys::cuCtxSetCurrent(context));
            ok(sys::cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32));
            ok(sys::cuModuleLoadData(&mut module, c"//".as_ptr().cast()));
        }
        Gpu { stream, module }
    }

    pub fn alloc(&self, bytes: usize) -> Result<CUdeviceptr, u32> {
        let mut at = 0;
        // SAFETY: writes one pointer.
        code(unsafe { sys::cuMemAlloc_v2(&mut at, bytes) }).map(|()| at)
    }

    pub fn free(&self, at: CUdeviceptr) -> Result<(), u32> {
        // SAFETY: the caller uses `at` no more.
        code(unsafe { sys::cuMemFree_v2(at) })
    }

    pub fn upload<T: Copy>(&self, values: &[T]) -> CUdeviceptr {
        let at = self.alloc(size_of_val(values)).expect("memory");
        self.write(at, values);
        at
    }

    pub fn write<T: Copy>(&self, at: CUdeviceptr, values: &[T]) {
        // SAFETY: the slice is as long as is said; the driver checks the other end.
        ok(unsafe { sys::cuMemcpyHtoDAsync_v2(at, values.as_ptr().cast(), size_of_val(values), self.stream) });
    }

    pub fn read<T: Copy + Default>(&self, at: CUdeviceptr, count: usize) -> Vec<T> {
        let mut out = vec![T::default(); count];
        // SAFETY: as in `write`; tests read types for which every bit pattern is valid.
        ok(unsafe { sys::cuMemcpyDtoHAsync_v2(out.as_mut_ptr().cast(), at, size_of_val(&out[..]), self.stream) });
        self.synchronize().expect("the copy");
        out
    }

    pub fn synchronize(&self) -> Result<(), u32> {
        // SAFETY: the stream is alive.
        code(unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    pub fn function(&self, name: &str) -> Result<sys::CUfunction, u32> {
        let (mut function, name) = (std::ptr::null_mut(), CString::new(name).expect("no NUL"));
        // SAFETY: the module is loaded and the name a C string.
        code(unsafe { sys::cuModuleGetFunction(&mut function, self.module, name.as_ptr()) }).map(|()| function)
    }

    /// Launches with one dimension of blocks and threads. Arguments are 8 bytes that begin with the value.
    pub fn launch(&self, name: &str, blocks: u32, threads: u32, shared: u32, arguments: &[u64]) -> Result<(), u32> {
        self.launch_grid(name, [blocks, 1, 1], threads, shared, arguments)
    }

    pub fn launch_grid(
        &self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        arguments: &[u64],
    ) -> Result<(), u32> {
        let function = self.function(name)?;
        let mut pointers: Vec<*mut c_void> =
            arguments.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast()).collect();
        let [x, y, z] = grid;
        // SAFETY: the tests pass the kernel's parameters.
        code(unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                shared,
                self.stream,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }
}

/// A float as the argument of a launch.
pub fn float(value: f32) -> u64 {
    value.to_bits() as u64
}

/// Runs `body` in a child process, which is this test alone with the environment changed, and gives back how it ended;
/// in the child itself, `None`.
pub fn in_child(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) -> Option<Output> {
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        body();
        return None;
    }
    let run = Command::new(std::env::current_exe().expect("a test is a program"))
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, test)
        .envs(environment.iter().copied())
        .output()
        .expect("a child starts");
    let said = String::from_utf8_lossy(&run.stdout);
    println!("{said}{}", String::from_utf8_lossy(&run.stderr));
    assert!(said.contains("running 1 test"), "no test is named {test}");
    Some(run)
}

/// As [`in_child`], for a body that must succeed.
pub fn passes_in_child(test: &str, environment: &[(&str, &str)], body: impl FnOnce()) {
    if let Some(run) = in_child(test, environment, body) {
        assert!(run.status.success(), "{}", run.status);
    }
}
