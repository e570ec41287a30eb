//! Weights in the memory of a GPU, opened through CUDA IPC.
//!
//! A handle (64 bytes from cuIpcGetMemHandle) stands for one allocation of the driver in the server's process;
//! opened here it is the same memory at an address of our own. The rules are the driver's:
//!
//! - A handle is opened once and closed once (cuIpcCloseMemHandle), never freed: the memory is the server's.
//! - Both happen in the context of the device that the memory is of. Processes count devices differently
//!   (CUDA_VISIBLE_DEVICES), so the device goes by its UUID.
//! - Nothing of ours may still be running on the memory when it is closed: dropping a [`DeviceMemory`] waits
//!   for the device, then closes, then gives the context back. An attachment drops it before its lease ends.
//! - A process that ends without that (the watch on the server ends it at once) leaves the same to the driver.
//!
//! What the driver answers is checked, not believed: an opened allocation is at least as long as the manifest says, as far
//! as the driver tells, lies on the device that the manifest names, and overlaps no other.
//!
//! Addresses of a device are numbers here. Nothing on the host may follow them, and [`Memory::Cuda`] is
//! another type than [`Memory::Host`] for that reason.
//!
//! [`Memory::Cuda`]: crate::Memory::Cuda
//! [`Memory::Host`]: crate::Memory::Host

mod driver;

pub use driver::CudaError;

use crate::{Allocation, Error};
use driver::Context;
use std::fmt;
use std::sync::Arc;
use weight_map::View;

/// Bytes that the driver shares as a whole (CUDA programming guide, "Interprocess Communication").
const SHARED_UNIT: u64 = 2 << 20;

/// A GPU, or an instance of one (MIG), as this process sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its number in this process; another process may count differently.
    pub ordinal: i32,
    /// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, the same in every process. An instance has its own digits.
    pub uuid: String,
    /// Such as `NVIDIA H200`.
    pub name: String,
}

impl fmt::Display for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.ordinal, self.uuid, self.name)
    }
}

impl CudaDevice {
    /// The devices that this process may use, in the driver's order.
    ///
    /// # Errors
    /// There is no driver, or no device for it.
    pub fn all() -> Result<Vec<CudaDevice>, Error> {
        driver::load()?;
        let device = |listed: driver::Listed| CudaDevice {
            ordinal: listed.ordinal,
            uuid: format!("GPU-{}", dashed(&listed.uuid)),
            name: listed.name,
        };
        Ok(driver::devices()?.into_iter().map(device).collect())
    }

    /// The device of this UUID.
    fn find(uuid: &str) -> Result<CudaDevice, Error> {
        let mut devices = CudaDevice::all()?;
        match devices.iter().position(|device| digits(&device.uuid).eq_ignore_ascii_case(digits(uuid))) {
            Some(found) => Ok(devices.swap_remove(found)),
            None => Err(Error::Device {
                wanted: uuid.to_owned(),
                here: devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                visible: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
            }),
        }
    }
}

/// 8-4-4-4-12 hex digits.
fn dashed(uuid: &[u8; 16]) -> String {
    let group = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [0..4, 4..6, 6..8, 8..10, 10..16].map(|range| group(&uuid[range])).join("-")
}

/// A UUID without the word for what it is of: an exporter that asks the driver writes `GPU-` before an instance's
/// digits too, where nvidia-smi writes `MIG-`.
fn digits(uuid: &str) -> &str {
    uuid.split_once('-').map_or(uuid, |(_, digits)| digits)
}

/// Whether it is `GPU-` or `MIG-` and a UUID.
pub(crate) fn is_uuid(uuid: &str) -> bool {
    let Some(digits) = uuid.strip_prefix("GPU-").or_else(|| uuid.strip_prefix("MIG-")) else { return false };
    digits.len() == 36
        && digits.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// The 64 bytes that 128 hex digits stand for.
pub(crate) fn handle_bytes(hex: &str) -> Option<[u8; 64]> {
    let (pairs, []) = hex.as_bytes().as_chunks::<2>() else { return None };
    let mut bytes = [0; 64];
    if pairs.len() != bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = u8::try_from(digit(pair[0])? * 16 + digit(pair[1])?).ok()?;
    }
    Some(bytes)
}

/// An allocation as a manifest describes it.
pub(crate) struct Described<'a> {
    /// 128 hex digits.
    pub(crate) handle: &'a str,
    pub(crate) bytes: u64,
}

/// Allocations of another process on one device, open until this is dropped.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    device: CudaDevice,
    opened: Vec<Opened>,
    context: Arc<Context>,
}

impl DeviceMemory {
    /// Opens every allocation on the device of this UUID. On an error those that were open are closed again.
    pub(crate) fn open(uuid: &str, allocations: &[Described]) -> Result<DeviceMemory, Error> {
        let device = CudaDevice::find(uuid)?;
        let context = Arc::new(Context::retain(device.ordinal)?);
        let mut memory = DeviceMemory { device, opened: Vec::with_capacity(allocations.len()), context };
        for (index, allocation) in allocations.iter().enumerate() {
            let opened = Opened::open(&memory.context, index, allocation)?;
            opened.check(&memory.device, &memory.opened)?;
            memory.opened.push(opened);
        }
        Ok(memory)
    }

    /// The device that it is of.
    pub(crate) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Where on the device a tensor begins.
    pub(crate) fn address(&self, view: &View) -> u64 {
        let opened = &self.opened[view.allocation];
        let end = view.offset.checked_add(view.bytes() as u64);
        assert!(
            end.is_some_and(|end| end <= opened.bytes),
            "view of {} leaves its allocation: the manifest was not validated",
            view.name
        );
        opened.base + view.offset
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // Nothing may run on memory that is being closed. If the device cannot be waited for, the context is broken:
        // nothing runs in it any more.
        let _ = self.context.enter().and_then(|entered| entered.synchronize());
    }
}

/// One opened allocation; dropping it closes the handle.
#[derive(Debug)]
struct Opened {
    index: usize,
    base: u64,
    bytes: u64,
    context: Arc<Context>,
}

impl Opened {
    fn open(context: &Arc<Context>, index: usize, allocation: &Described) -> Result<Opened, Error> {
        let handle = handle_bytes(allocation.handle).expect("the manifest was validated");
        let base = context.enter()?.open(&handle, &about(index))?;
        Ok(Opened { index, base, bytes: allocation.bytes, context: context.clone() })
    }

    /// Compares what was opened with what was described, and with what is open already.
    fn check(&self, device: &CudaDevice, others: &[Opened]) -> Result<(), Error> {
        let refuse = |reason: String| Err(Error::DeviceMemory { index: self.index, reason });
        let about = about(self.index);
        let entered = self.context.enter()?;
        // What is mapped here comes in the driver's own units: it may begin before the allocation, and be longer.
        if let Some((base, bytes)) = entered.range_of(self.base, &about)? {
            let bytes = (bytes as u64).saturating_sub(self.base.wrapping_sub(base));
            if bytes < self.bytes {
                return refuse(format!("{bytes} bytes long, but the server describes {}", self.bytes));
            }
        }
        let ordinal = entered.device_of(self.base, &about)?;
        if ordinal != device.ordinal {
            return refuse(format!("it lies on device {ordinal}, but the server says {device}"));
        }
        // Tensors are aligned to their elements relative to this.
        if !self.base.is_multiple_of(16) {
            return refuse(format!("it begins at the odd address {:#x}", self.base));
        }
        let overlaps = |other: &&Opened| {
            self.base < other.base.saturating_add(other.bytes) && other.base < self.base.saturating_add(self.bytes)
        };
        if let Some(other) = others.iter().find(overlaps) {
            return refuse(format!("it is the memory of allocation {} under another handle", other.index));
        }
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // What cannot be closed stays open until the process ends, and nobody is here who could do better.
        let _ = self.context.enter().and_then(|entered| entered.close(self.base, &about(self.index)));
    }
}

/// Memory of this process on a device, that another one can open.
#[derive(Debug)]
pub(crate) struct OwnMemory {
    base: u64,
    bytes: u64,
    handle: [u8; 64],
    device: CudaDevice,
    context: Context,
}

impl OwnMemory {
    /// Takes so many bytes on the device of this UUID, in whole units of what a handle shares: a smaller allocation lies in
    /// such a unit together with others, which everybody who opens the handle could read.
    pub(crate) fn allocate(uuid: &str, bytes: u64) -> Result<OwnMemory, Error> {
        let device = CudaDevice::find(uuid)?;
        let context = Context::retain(device.ordinal)?;
        let entered = context.enter()?;
        let base = entered.allocate(bytes.next_multiple_of(SHARED_UNIT) as usize)?;
        let handle = entered.handle(base).inspect_err(|_| drop(entered.free(base)))?;
        drop(entered);
        Ok(OwnMemory { base, bytes, handle, device, context })
    }

    /// Copies bytes to `at`, and waits for it.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let end = at.checked_add(bytes.len() as u64);
        assert!(end.is_some_and(|end| end <= self.bytes), "{at}+{} outside {}", bytes.len(), self.bytes);
        // SAFETY: checked above.
        unsafe { self.context.enter()?.write(self.base + at, bytes) }
    }

    /// Where it begins.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// As a manifest describes it.
    pub(crate) fn described(&self) -> Allocation {
        let handle = self.handle.iter().map(|byte| format!("{byte:02x}")).collect();
        Allocation::CudaIpc { handle, bytes: self.bytes, device: self.device.uuid.clone() }
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        // What cannot be freed goes with the process, and nobody is here who could do better.
        let _ = self.context.enter().and_then(|entered| entered.free(self.base));
    }
}

fn about(index: usize) -> String {
    format!("allocation {index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_dashed_as_nvidia_smi_does() {
        let uuid: [u8; 16] = std::array::from_fn(|i| i as u8);
        let dashed = dashed(&uuid);
        assert_eq!(dashed, "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert!(is_uuid(&format!("GPU-{dashed}")) && is_uuid(&format!("MIG-{dashed}")));
        assert_eq!(digits(&format!("MIG-{dashed}")), dashed);
        for wrong in [
            "",
            "GPU-",
            "0",
            &dashed,
            "GPU-00010203-0405-0607-0809-0a0b0c0d0e0",
            "GPU-0001020304050607-0809-0a0b0c0d0e0f0",
        ] {
            assert!(!is_uuid(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_handle_is_128_hex_digits() {
        let bytes: [u8; 64] = std::array::from_fn(|i| (i * 5) as u8);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(handle_bytes(&hex), Some(bytes));
        assert_eq!(handle_bytes(&hex.to_uppercase()), Some(bytes));
        for wrong in ["", &hex[1..], &hex[2..], &format!("{hex}00"), &hex.replace('f', "g")] {
            assert_eq!(handle_bytes(wrong), None, "{wrong}");
        }
    }
}
