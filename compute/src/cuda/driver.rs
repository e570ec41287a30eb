//! The CUDA driver: finding a device, its context, and what a failed call says.
//!
//! The driver is loaded when it is first asked for; without one the program runs, and a device cannot be opened.
//! A context belongs to a device: the *primary* one, which everything in a process shares, so that memory which another
//! part of the process has opened there is memory here.

use cudarc::driver::{DriverError, result, sys};
use std::ffi::{CStr, c_int};
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
    #[error("the CUDA driver (libcuda.so.1) cannot be loaded; install NVIDIA's driver, or set train.device = \"cpu\"")]
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
            DeviceName::Uuid(wanted) => uuid == wanted,
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
        // SAFETY: the driver gave this device; released in drop.
        let context = unsafe { result::primary_ctx::retain(*device) }.map_err(call("cuDevicePrimaryCtxRetain"))?;
        let context = Context { device: *device, context, name, uuid: uuid.clone(), multiprocessors };
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

/// The kernel that begins in a line of PTX, if one does.
fn kernel_of_line(line: &str) -> Option<&str> {
    line.strip_prefix(".visible .entry ")?.split('(').next()
}

/// The kernels, compiled for the open device.
pub(super) struct Module(sys::CUmodule);

// SAFETY: as for `Context`.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Compiles PTX for the device of the current context, which takes seconds the first time; the driver keeps the
    /// result on disk.
    pub fn load(ptx: &CStr) -> Result<Module, OpenError> {
        // SAFETY: a string that ends with a zero, as PTX must.
        let module = unsafe { result::module::load_data(ptx.as_ptr().cast()) };
        let module =
            module.map_err(|error| OpenError::Kernels { version: driver_version(), error: describe(error) })?;
        let module = Module(module);
        for kernel in ptx.to_str().expect("PTX is ASCII").lines().filter_map(kernel_of_line) {
            let call = |error| OpenError::Call { call: "cuFuncLoad", error: describe(error) };
            module.function(kernel).map_err(call)?;
        }
        Ok(module)
    }

    /// The kernel of this name, loaded. All are when the module is: by default the driver brings a kernel to the device
    /// when it is first launched, which may wait for the device, allocate, and so end a recording.
    pub fn function(&self, name: &str) -> Result<sys::CUfunction, DriverError> {
        let c_name = std::ffi::CString::new(name).expect("no zeros in the name of a kernel");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.0, c_name) }?;
        // SAFETY: the driver gave this function.
        unsafe { sys::cuFuncLoad(function) }.result()?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: nothing of ours launches its kernels any more. An error has nobody to tell.
        let _ = unsafe { result::module::unload(self.0) };
    }
}
