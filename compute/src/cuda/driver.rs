//! The CUDA driver: finding a device, its context, and what a failed call says.
//!
//! The driver is loaded when it is first asked for; without one the program runs, and a device cannot be opened.
//! A context belongs to a device: the *primary* one, which everything in a process shares, so that memory which another
//! part of the process has opened there is memory here.

use cudarc::driver::{DriverError, result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_int};
use std::fmt;

/// Oldest compute capability that the kernels are compiled for: bf16 products of the tensor cores (Ampere).
const CAPABILITY_MIN: (c_int, c_int) = (8, 0);

/// Which device to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// By its place among the devices that this process sees (`CUDA_VISIBLE_DEVICES`).
    Ordinal(usize),
    /// By the identity that every process agrees on: `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
    Uuid(String),
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DeviceName::Ordinal(ordinal) => write!(f, "cuda:{ordinal}"),
            DeviceName::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No driver.
    #[error("the CUDA driver (libcuda.so.1) cannot be loaded; install NVIDIA's driver, or compute on the CPU")]
    NoDriver,
    /// No such device.
    #[error("there is no CUDA device {wanted}; this process sees {seen} (CUDA_VISIBLE_DEVICES decides)")]
    NoDevice {
        /// The name that was asked for.
        wanted: DeviceName,
        /// Those that there are.
        seen: String,
    },
    /// A device that the kernels are not made for.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later")]
    TooOld {
        /// The device.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
    },
    /// A driver that cannot compile the kernels.
    #[error(
        "the CUDA driver {version} cannot load the kernels, which are PTX of CUDA 13.0: {error}; driver 580 or later can"
    )]
    Kernels {
        /// The CUDA version that the driver supports.
        version: String,
        /// Its answer.
        error: String,
    },
    /// Any other call.
    #[error("CUDA error {error} in {call}")]
    Call {
        /// The driver's function.
        call: &'static str,
        /// Its answer.
        error: String,
    },
}

/// `CUDA_ERROR_OUT_OF_MEMORY (2)`.
pub(super) fn describe(error: DriverError) -> String {
    match error.error_name() {
        Ok(name) => format!("{} ({})", name.to_string_lossy(), error.0 as u32),
        Err(_) => format!("{}", error.0 as u32),
    }
}

/// Ends the thread with the driver's answer if it is an error: nothing can be done on this device any more, and a
/// process that goes on would only collect errors that are not the first.
#[track_caller]
pub(super) fn check<T>(result: Result<T, DriverError>, call: &str) -> T {
    result.unwrap_or_else(|error| panic!("CUDA error {} in {call}", describe(error)))
}

/// An open device.
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub name: String,
    pub uuid: String,
    pub multiprocessors: usize,
    /// Whether the device can read the host's pageable memory by itself.
    pub reads_pageable: bool,
}

// SAFETY: the handles are names that the driver accepts from any thread in which the context is current.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub fn open(wanted: &DeviceName) -> Result<Context, OpenError> {
        // SAFETY: only tries to load the driver.
        if !unsafe { sys::is_culib_present() } {
            return Err(OpenError::NoDriver);
        }
        let call = |call| move |error| OpenError::Call { call, error: describe(error) };
        result::init().map_err(call("cuInit"))?;
        let devices = devices()?;
        let found = devices.iter().find(|(ordinal, _, uuid)| match wanted {
            DeviceName::Ordinal(wanted) => ordinal == wanted,
            DeviceName::Uuid(wanted) => digits(uuid) == digits(wanted),
        });
        let Some((_, device, uuid)) = found else {
            let seen: Vec<String> = devices.iter().map(|(i, _, uuid)| format!("cuda:{i} = {uuid}")).collect();
            let seen = if seen.is_empty() { "none".into() } else { seen.join(", ") };
            return Err(OpenError::NoDevice { wanted: wanted.clone(), seen });
        };
        let name = result::device::get_name(*device).map_err(call("cuDeviceGetName"))?;
        let attribute = |attribute| {
            // SAFETY: the driver gave this device.
            unsafe { result::device::get_attribute(*device, attribute) }.map_err(call("cuDeviceGetAttribute"))
        };
        use sys::CUdevice_attribute_enum as A;
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if (major, minor) < CAPABILITY_MIN {
            return Err(OpenError::TooOld { name, major, minor });
        }
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let reads_pageable = attribute(A::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? != 0;
        // SAFETY: the driver gave this device; released in drop.
        let context = unsafe { result::primary_ctx::retain(*device) }.map_err(call("cuDevicePrimaryCtxRetain"))?;
        let context = Context { device: *device, context, name, uuid: uuid.clone(), multiprocessors, reads_pageable };
        context.bind();
        Ok(context)
    }

    /// Makes this the context of the calling thread.
    pub fn bind(&self) {
        // SAFETY: retained until drop.
        check(unsafe { result::ctx::set_current(self.context) }, "cuCtxSetCurrent");
    }
}

impl Context {
    /// As `bind`, for destructors: an error has nobody to tell.
    pub fn bind_for_drop(&self) -> Result<(), DriverError> {
        // SAFETY: retained until drop.
        unsafe { result::ctx::set_current(self.context) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `open`, and nothing of ours uses it any more. An error has nobody to tell.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Ordinal, device and UUID of each device.
fn devices() -> Result<Vec<(usize, sys::CUdevice, String)>, OpenError> {
    let call = |call| move |error| OpenError::Call { call, error: describe(error) };
    let count = match result::device::get_count() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        count => count.map_err(call("cuDeviceGetCount"))?,
    };
    let device = |ordinal: c_int| {
        let device = result::device::get(ordinal).map_err(call("cuDeviceGet"))?;
        let uuid = result::device::get_uuid(device).map_err(call("cuDeviceGetUuid"))?;
        Ok((ordinal as usize, device, format_uuid(&uuid.bytes.map(|b| b as u8))))
    };
    (0..count).map(device).collect()
}

/// A UUID without the word for what it is of, which the driver does not say: nvidia-smi writes `MIG-` before the digits of an
/// instance.
fn digits(uuid: &str) -> &str {
    uuid.split_once('-').map_or(uuid, |(_, digits)| digits)
}

/// As `nvidia-smi -L` writes it.
fn format_uuid(bytes: &[u8; 16]) -> String {
    let hex = |range: std::ops::Range<usize>| bytes[range].iter().map(|b| format!("{b:02x}")).collect::<String>();
    format!("GPU-{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16))
}

/// The driver's CUDA version, such as 13.0.
fn driver_version() -> String {
    let mut version = 0;
    // SAFETY: writes one integer.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) }.result();
    known.map_or_else(|_| "(unknown)".into(), |()| format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// The kernels, compiled for the open device, by their names.
pub(super) struct Module {
    module: sys::CUmodule,
    functions: HashMap<String, sys::CUfunction>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles PTX for the device of the current context, which takes seconds the first time; the driver keeps the
    /// result on disk. All kernels are loaded now: the driver would otherwise compile and load at a first launch, where
    /// an error is no reason not to open the device any more, and which may be one that is recorded.
    pub fn load(ptx: &str) -> Result<Module, OpenError> {
        let refused = |call: String| {
            move |error| OpenError::Kernels {
                version: driver_version(),
                error: format!("{} in {call}", describe(error)),
            }
        };
        let source = CString::new(ptx).expect("PTX has no zeros");
        // SAFETY: a string that ends with a zero, as PTX must.
        let module = unsafe { result::module::load_data(source.as_ptr().cast()) };
        let mut loaded =
            Module { module: module.map_err(refused("cuModuleLoadData".into()))?, functions: HashMap::new() };
        for name in kernel_names(ptx) {
            let c_name = CString::new(name).expect("no zeros in the name of a kernel");
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(loaded.module, c_name) };
            let function = function.map_err(refused(format!("cuModuleGetFunction({name})")))?;
            // SAFETY: the driver gave this function.
            unsafe { sys::cuFuncLoad(function) }.result().map_err(refused(format!("cuFuncLoad({name})")))?;
            loaded.functions.insert(name.into(), function);
        }
        Ok(loaded)
    }

    /// The kernel of this name.
    pub fn function(&self, name: &str) -> sys::CUfunction {
        *self.functions.get(name).unwrap_or_else(|| panic!("no kernel is called {name}"))
    }
}

/// The kernels that PTX defines.
fn kernel_names(ptx: &str) -> impl Iterator<Item = &str> {
    ptx.lines()
        .filter_map(|line| line.strip_prefix(".visible .entry "))
        .map(|rest| rest.trim_end_matches(['(', ')', ' ']))
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: nothing of ours launches its kernels any more. An error has nobody to tell.
        let _ = unsafe { result::module::unload(self.module) };
    }
}
