//! The devices that the daemon computes on, and how weights come to lie on them.

use crate::bench::{self, Rates};
use anyhow::{Context, Result, bail};
use compute::cuda::DeviceName;
use compute::hash::Keys;
use compute::{Cpu, Cuda, Device, Dtype, RowOrder, cpu, cuda};
use ipc::{Attachment, LiveTensor, Memory, SharedWeights};
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use weight_map::matrix_shape;

/// Copies the next of some ranges of bytes, in their order.
pub type ReadNext<'a> = Box<dyn FnMut(&mut [u8]) + Send + 'a>;

/// A device that the daemon can train on.
pub trait Backend: Device {
    /// The weights of a server whose memory is this device's, in the model's order.
    fn attached(device: &Arc<Self>, attachment: &Arc<Attachment>) -> Vec<Self::Weight>;
    /// The weights that the embedded engine serves from this device's memory, in the model's order.
    fn shared(device: &Arc<Self>, weights: &Arc<SharedWeights>) -> Vec<Self::Weight>;
    /// The UUID, of a GPU.
    fn gpu(&self) -> Option<&str>;
    /// A hash of every block of every weight, weight by weight, where that is cheaper than to read them: with the keys
    /// that the seed stands for.
    fn block_hashes(&self, _weights: &[&Self::Weight], _block_bytes: usize, _seed: u64) -> Option<Vec<u128>> {
        None
    }
    /// Reads these ranges of bytes, one with each call, so that later ones are under way meanwhile; none where reading
    /// is as fast as anything.
    fn read_ahead<'a>(&'a self, _parts: Vec<(&'a Self::Weight, Range<usize>)>) -> Option<ReadNext<'a>> {
        None
    }
    /// A weight in memory of its own, zeroed.
    fn weight(device: &Arc<Self>, dtype: Dtype, rows: usize, cols: usize) -> Self::Weight;
    /// What it is, for people.
    fn describe(&self) -> String;
    /// How far results of a layer with such weights may be from a reference with the same weights, relative.
    fn tolerance(dtype: Dtype) -> f64;
    /// Bytes of its memory that are in use: of this process on a CPU, of everybody on a GPU.
    fn memory_in_use(&self) -> u64;
    /// What it can do at best, measured now.
    fn rates(device: &Arc<Self>) -> Rates;
}

impl Backend for Cpu {
    fn attached(_: &Arc<Cpu>, attachment: &Arc<Attachment>) -> Vec<cpu::Weight> {
        // SAFETY: the tensor's bytes were checked against its mapping when it was attached; the Arc holds the mapping.
        let weight = |i| unsafe { in_host_memory(&attachment.tensor(i), attachment.clone()) };
        (0..attachment.len()).map(weight).collect()
    }
    fn shared(_: &Arc<Cpu>, weights: &Arc<SharedWeights>) -> Vec<cpu::Weight> {
        // SAFETY: the Arc holds the shared memory that the tensor lies in.
        let weight = |i| unsafe { in_host_memory(&weights.tensor(i), weights.clone()) };
        (0..weights.len()).map(weight).collect()
    }
    fn gpu(&self) -> Option<&str> {
        None
    }
    fn weight(_: &Arc<Cpu>, dtype: Dtype, rows: usize, cols: usize) -> cpu::Weight {
        cpu::Weight::zeros(dtype, rows, cols)
    }
    fn describe(&self) -> String {
        format!("CPU, {} threads", self.threads())
    }
    fn tolerance(_: Dtype) -> f64 {
        1e-4
    }
    fn memory_in_use(&self) -> u64 {
        bench::rss_anon().unwrap_or(0)
    }
    fn rates(device: &Arc<Cpu>) -> Rates {
        bench::cpu_rates(device)
    }
}

impl Backend for Cuda {
    fn attached(_: &Arc<Cuda>, attachment: &Arc<Attachment>) -> Vec<cuda::Weight> {
        // SAFETY: the tensor's bytes were checked against its allocation when it was attached; the Arc holds that open.
        let weight = |i| unsafe { in_device_memory(&attachment.tensor(i), attachment.clone()) };
        (0..attachment.len()).map(weight).collect()
    }
    fn shared(_: &Arc<Cuda>, weights: &Arc<SharedWeights>) -> Vec<cuda::Weight> {
        // SAFETY: the Arc holds the allocation that the tensor lies in.
        let weight = |i| unsafe { in_device_memory(&weights.tensor(i), weights.clone()) };
        (0..weights.len()).map(weight).collect()
    }
    fn gpu(&self) -> Option<&str> {
        Some(self.uuid())
    }
    fn block_hashes(&self, weights: &[&cuda::Weight], block_bytes: usize, seed: u64) -> Option<Vec<u128>> {
        Some(Cuda::block_hashes(self, weights, block_bytes, &Keys::new(seed)))
    }
    fn read_ahead<'a>(&'a self, parts: Vec<(&'a cuda::Weight, Range<usize>)>) -> Option<ReadNext<'a>> {
        let mut ahead = Cuda::read_ahead(self, parts);
        Some(Box::new(move |out| ahead.next(out)))
    }
    fn weight(device: &Arc<Cuda>, dtype: Dtype, rows: usize, cols: usize) -> cuda::Weight {
        cuda::Weight::zeros(device, dtype, rows, cols)
    }
    fn describe(&self) -> String {
        format!("{}, {}", self.name(), self.uuid())
    }
    fn tolerance(dtype: Dtype) -> f64 {
        if dtype == Dtype::BF16 { 1e-2 } else { 1e-4 }
    }
    fn memory_in_use(&self) -> u64 {
        let (free, total) = self.memory_info();
        (total - free) as u64
    }
    fn rates(device: &Arc<Cuda>) -> Rates {
        bench::gpu_rates(device)
    }
}

/// A tensor in the machine's memory as a weight.
///
/// # Safety
/// `owner` keeps the tensor's bytes mapped, and nobody makes references into them.
unsafe fn in_host_memory(live: &LiveTensor, owner: Arc<dyn Send + Sync>) -> cpu::Weight {
    let (rows, cols) = matrix_shape(live.shape);
    // SAFETY: the caller's promise.
    unsafe { cpu::Weight::new(live.host(), live.dtype, rows, cols, owner) }.ordered(live.row_order)
}

/// A tensor in a GPU's memory as a weight.
///
/// # Safety
/// `owner` keeps the tensor's bytes allocated, or opened.
unsafe fn in_device_memory(live: &LiveTensor, owner: Arc<dyn Send + Sync>) -> cuda::Weight {
    let (rows, cols) = matrix_shape(live.shape);
    let Memory::Cuda(address) = live.memory else { unreachable!("all weights of a server lie on one device") };
    assert_eq!(live.row_order, RowOrder::AsFiles, "kernels take rows as they come");
    // SAFETY: the caller's promise.
    unsafe { cuda::Weight::new(address, live.dtype, rows, cols, owner) }
}

/// A device as an operator names it: `cpu`, `cuda`, `cuda:1` or `GPU-…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The processor.
    Cpu,
    /// A GPU.
    Cuda(DeviceName),
}

impl FromStr for DeviceChoice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<DeviceChoice> {
        Ok(match text {
            "cpu" => DeviceChoice::Cpu,
            "cuda" => DeviceChoice::Cuda(DeviceName::Ordinal(0)),
            uuid if uuid.starts_with("GPU-") || uuid.starts_with("MIG-") => {
                DeviceChoice::Cuda(DeviceName::Uuid(uuid.into()))
            }
            text => match text.strip_prefix("cuda:") {
                Some(ordinal) => DeviceChoice::Cuda(DeviceName::Ordinal(
                    ordinal.parse().with_context(|| format!("`{ordinal}` is no number of a device"))?,
                )),
                None => bail!("`{text}` names no device; want cpu, cuda, cuda:1 or GPU-… as `nvidia-smi -L` prints it"),
            },
        })
    }
}

/// Work that is the same on every device.
pub trait OnDevice {
    /// What comes of it.
    type Output;
    /// Does it.
    fn on<D: Backend>(self, device: Arc<D>) -> Self::Output;
}

impl DeviceChoice {
    /// Opens the device and does the work there. `threads` are the CPU's; 0 is one per core.
    pub fn run<W, T>(&self, threads: usize, work: W) -> Result<T>
    where
        W: OnDevice<Output = Result<T>>,
    {
        match self {
            DeviceChoice::Cpu => work.on(Arc::new(Cpu::new(threads)?)),
            DeviceChoice::Cuda(name) => work.on(Arc::new(Cuda::open(name)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_others_name_them() {
        let parse = |text: &str| text.parse::<DeviceChoice>().map_err(|error| format!("{error:#}"));
        let cuda = |ordinal| Ok(DeviceChoice::Cuda(DeviceName::Ordinal(ordinal)));
        assert_eq!(parse("cpu"), Ok(DeviceChoice::Cpu));
        assert_eq!((parse("cuda"), parse("cuda:3")), (cuda(0), cuda(3)));
        let uuid = "GPU-01234567-89ab-cdef-0123-456789abcdef";
        assert_eq!(parse(uuid), Ok(DeviceChoice::Cuda(DeviceName::Uuid(uuid.into()))));
        let instance = uuid.replace("GPU", "MIG");
        assert_eq!(parse(&instance), Ok(DeviceChoice::Cuda(DeviceName::Uuid(instance.clone()))));
        assert!(parse("gpu").unwrap_err().contains("cuda:1"), "{:?}", parse("gpu"));
        assert!(parse("cuda:one").unwrap_err().contains("`one`"), "{:?}", parse("cuda:one"));
    }
}
