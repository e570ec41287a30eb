//! The few calls of the CUDA driver that an attachment needs, under cudarc's `result` and `sys`.
//!
//! The driver is loaded when the first call is made, never before: a machine without one runs the same
//! program. [`load`] asks whether it is there, because cudarc panics if it is not.
//!
//! An error says which call failed, what the driver calls that, and what to do: most of them are a matter of
//! how two processes were started, which a bare number does not tell.

use crate::Error;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_int;
use sys::cudaError_enum as Code;

/// A call of the CUDA driver that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("CUDA error {name} ({code}) in {call}{}: {advice}", in_brackets(about))]
pub struct CudaError {
    /// The call, such as `cuIpcOpenMemHandle`.
    pub call: &'static str,
    /// What it was about, such as `allocation 3`; may be empty.
    pub about: String,
    /// The driver's name of the error, such as `CUDA_ERROR_INVALID_VALUE`.
    pub name: String,
    /// Its number.
    pub code: u32,
    /// What to do about it.
    pub advice: &'static str,
}

fn in_brackets(about: &str) -> String {
    if about.is_empty() { String::new() } else { format!("({about})") }
}

impl CudaError {
    fn new(call: &'static str, about: &str, error: DriverError) -> CudaError {
        let name = error.error_name().map_or_else(|_| "unknown to the driver".into(), |n| n.to_string_lossy().into());
        CudaError { call, about: about.to_owned(), name, code: error.0 as u32, advice: advice(call, error.0) }
    }
}

/// What an operator can do about an error of a call.
fn advice(call: &str, code: Code) -> &'static str {
    let opening = call == "cuIpcOpenMemHandle";
    match code {
        Code::CUDA_ERROR_INVALID_CONTEXT | Code::CUDA_ERROR_DEVICE_UNAVAILABLE if opening => {
            "the handle is of this very process, or the GPU is in exclusive mode: train from another process, and set \
             the compute mode to default (`nvidia-smi -c 0`)"
        }
        Code::CUDA_ERROR_NOT_SUPPORTED | Code::CUDA_ERROR_NOT_PERMITTED if opening => {
            "CUDA IPC does not work between these two processes: it needs Linux (not WSL), one GPU or one MIG instance \
             for both, and containers that share the IPC and process id namespaces (`--ipc=host --pid=host`)"
        }
        Code::CUDA_ERROR_OUT_OF_MEMORY => {
            "the GPU's memory is full: a context needs some 500 MB and the trainer its own share; leave it room (vLLM: \
             lower --gpu-memory-utilization)"
        }
        Code::CUDA_ERROR_INVALID_VALUE | Code::CUDA_ERROR_INVALID_HANDLE | Code::CUDA_ERROR_MAP_FAILED if opening => {
            "the server's memory cannot be opened by its handle: the server may have ended or loaded again (start it \
             again, so that it makes a new manifest), or the two processes are in containers that do not share the IPC \
             and process id namespaces (`--ipc=host --pid=host`)"
        }
        Code::CUDA_ERROR_NO_DEVICE => {
            "no GPU is visible to this process: look at CUDA_VISIBLE_DEVICES, and in a container at the devices it was \
             given"
        }
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | Code::CUDA_ERROR_STUB_LIBRARY => {
            "the libcuda.so that was found does not belong to the kernel's driver: look at LD_LIBRARY_PATH, or restart \
             after the update of the driver"
        }
        Code::CUDA_ERROR_ECC_UNCORRECTABLE
        | Code::CUDA_ERROR_ILLEGAL_ADDRESS
        | Code::CUDA_ERROR_LAUNCH_FAILED
        | Code::CUDA_ERROR_LAUNCH_TIMEOUT
        | Code::CUDA_ERROR_MISALIGNED_ADDRESS => {
            "something broke this process's use of the GPU for good: the trainer has to be started again"
        }
        _ => "look at `nvidia-smi` and at the kernel's messages (`dmesg | grep NVRM`)",
    }
}

/// Turns the result of `call` about something into ours.
fn check<T>(call: &'static str, about: &str, result: Result<T, DriverError>) -> Result<T, Error> {
    result.map_err(|error| CudaError::new(call, about, error).into())
}

/// Loads the driver and initializes it for this process.
pub(super) fn load() -> Result<(), Error> {
    // SAFETY: loads libraries by the names that the driver has, and runs what they run when they are loaded.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    check("cuInit", "", result::init())
}

/// A device as the driver counts it, its UUID, and its name.
pub(super) struct Listed {
    pub(super) ordinal: i32,
    pub(super) uuid: [u8; 16],
    pub(super) name: String,
}

/// The devices that this process may use; none is not an error.
pub(super) fn devices() -> Result<Vec<Listed>, Error> {
    let count = check("cuDeviceGetCount", "", result::device::get_count())?;
    let listed = |ordinal| {
        let about = format!("device {ordinal}");
        let device = device(ordinal)?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: uuid is one that the call may fill; device is of this driver.
        let told = unsafe { sys::cuDeviceGetUuid_v2(&raw mut uuid, device) };
        check("cuDeviceGetUuid", &about, told.result())?;
        let name = check("cuDeviceGetName", &about, result::device::get_name(device))?;
        Ok(Listed { ordinal, uuid: uuid.bytes.map(|byte| byte as u8), name })
    };
    (0..count).map(listed).collect()
}

fn device(ordinal: i32) -> Result<sys::CUdevice, Error> {
    check("cuDeviceGet", &format!("device {ordinal}"), result::device::get(ordinal))
}

/// A device's primary context, which this process keeps alive as long as this value does. Others in the process
/// may hold it too: the driver counts.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: a context's handle may be used by any thread (CUDA driver API, "Context Management"); what is done here
// with it makes it current in the calling thread alone.
unsafe impl Send for Context {}
// SAFETY: as above; the value itself never changes.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of a device.
    pub(super) fn retain(ordinal: i32) -> Result<Context, Error> {
        let device = device(ordinal)?;
        // SAFETY: device is of this driver; the release is in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) };
        let context = check("cuDevicePrimaryCtxRetain", &format!("device {ordinal}"), context)?;
        Ok(Context { device, context })
    }

    /// Makes it the calling thread's context until the value is dropped.
    pub(super) fn enter(&self) -> Result<Entered, Error> {
        let before = check("cuCtxGetCurrent", "", result::ctx::get_current())?;
        // SAFETY: the context is retained while self lives, and `Entered` takes it back before that ends.
        check("cuCtxSetCurrent", "", unsafe { result::ctx::set_current(self.context) })?;
        Ok(Entered { before: before.unwrap_or(std::ptr::null_mut()) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `retain`. A failure leaves the context to the end of the process.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// The calling thread's context is another one for as long as this lives; it stays in its thread.
#[derive(Debug)]
pub(super) struct Entered {
    before: sys::CUcontext,
}

impl Entered {
    /// Waits for everything that this process has asked of the device.
    pub(super) fn synchronize(&self) -> Result<(), Error> {
        check("cuCtxSynchronize", "", result::ctx::synchronize())
    }

    /// Opens another process's allocation; the first byte of it as this process's device addresses it.
    pub(super) fn open(&self, handle: &[u8; 64], about: &str) -> Result<u64, Error> {
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as std::ffi::c_char) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut base = 0;
        // SAFETY: base is one word that the call may fill; a handle of nothing is an error of the call.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut base, handle, flags) };
        check("cuIpcOpenMemHandle", about, opened.result())?;
        Ok(base)
    }

    /// Gives an opened allocation back. Nothing may use its addresses any more.
    pub(super) fn close(&self, base: u64, about: &str) -> Result<(), Error> {
        // SAFETY: `base` came from `open`; the driver refuses anything else.
        check("cuIpcCloseMemHandle", about, unsafe { sys::cuIpcCloseMemHandle(base) }.result())
    }

    /// Takes memory of the device, content unspecified.
    pub(super) fn allocate(&self, bytes: usize) -> Result<u64, Error> {
        // SAFETY: whoever asks for it writes every byte before it is read; freed by `free`.
        check("cuMemAlloc", &format!("{bytes} bytes"), unsafe { result::malloc_sync(bytes) })
    }

    /// Gives it back.
    pub(super) fn free(&self, base: u64) -> Result<(), Error> {
        // SAFETY: `base` came from `allocate`; the driver refuses anything else.
        check("cuMemFree", "", unsafe { result::free_sync(base) })
    }

    /// Copies bytes to an address of the device, and waits until they are there: the driver's call returns as soon as it
    /// has read them, and neither another stream nor another process waits for the rest of it.
    ///
    /// # Safety
    /// There is an allocation of at least as many bytes.
    pub(super) unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        check("cuMemcpyHtoD", "", unsafe { result::memcpy_htod_sync(address, bytes) })?;
        self.synchronize()
    }

    /// What another process opens an allocation by.
    pub(super) fn handle(&self, base: u64) -> Result<[u8; 64], Error> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: handle is one that the call may fill; an address of nothing is an error of the call.
        check("cuIpcGetMemHandle", "", unsafe { sys::cuIpcGetMemHandle(&raw mut handle, base) }.result())?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// First byte and size of the allocation that an address lies in; none where the driver does not say that of memory
    /// which another process has allocated.
    pub(super) fn range_of(&self, address: u64, about: &str) -> Result<Option<(u64, usize)>, Error> {
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: base and bytes are words that the call may fill; an address of nothing is an error of it.
        let range = unsafe { sys::cuMemGetAddressRange_v2(&raw mut base, &raw mut bytes, address) };
        if matches!(range, Code::CUDA_ERROR_INVALID_VALUE | Code::CUDA_ERROR_NOT_FOUND | Code::CUDA_ERROR_NOT_SUPPORTED)
        {
            return Ok(None);
        }
        check("cuMemGetAddressRange", about, range.result())?;
        Ok(Some((base, bytes)))
    }

    /// The device whose memory an address is of.
    pub(super) fn device_of(&self, address: u64, about: &str) -> Result<i32, Error> {
        let mut ordinal: c_int = -1;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        // SAFETY: this attribute is written as an int, and ordinal is one.
        let told = unsafe { sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address) };
        check("cuPointerGetAttribute", about, told.result())?;
        Ok(ordinal)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: it was this thread's context before; whoever made it current keeps it. A failure leaves ours,
        // which is retained for longer than that.
        let _ = unsafe { result::ctx::set_current(self.before) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_call_name_number_and_what_to_do() {
        let code = Code::CUDA_ERROR_INVALID_VALUE;
        let error = CudaError {
            call: "cuIpcOpenMemHandle",
            about: "allocation 3".into(),
            name: "CUDA_ERROR_INVALID_VALUE".into(),
            code: code as u32,
            advice: advice("cuIpcOpenMemHandle", code),
        };
        let text = error.to_string();
        let start = "CUDA error CUDA_ERROR_INVALID_VALUE (1) in cuIpcOpenMemHandle(allocation 3): the server's memory";
        assert!(text.starts_with(start) && text.contains("--ipc=host"), "{text}");
        assert_ne!(advice("cuInit", code), error.advice, "only the opening has to do with two processes");
    }
}
