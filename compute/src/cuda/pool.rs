//! Device memory that is given and taken back without asking the driver.
//!
//! All work runs on one stream, so a block that is given back may be given out at once: what was queued before uses it
//! before what is queued later. A recording has a pool of its own, since its blocks are used again at every replay;
//! recordings that are never in use together lay their pools over the same blocks.

use super::driver::{Context, describe};
use cudarc::driver::{DriverError, result, sys};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Blocks begin at multiples of this, and so do their sizes; wide enough for every vector access.
const GRANULE: usize = 512;
/// Larger blocks are not given out for less than half their size, except in a recording.
const SMALL: usize = 1 << 20;

/// Memory from the driver, freed when nobody uses it.
struct Slab {
    ptr: sys::CUdeviceptr,
    context: Arc<Context>,
}

impl Drop for Slab {
    fn drop(&mut self) {
        let _ = self.context.bind_for_drop();
        // SAFETY: allocated by `allocate`; the pool that held it is gone, and cuMemFree waits for queued work. An error
        // has nobody to tell: the device is lost then.
        let _ = unsafe { result::free_sync(self.ptr) };
    }
}

/// Free blocks by size, over slabs.
pub(super) struct Pool {
    free: Mutex<BTreeMap<usize, Vec<sys::CUdeviceptr>>>,
    slabs: Arc<Mutex<Vec<(usize, Slab)>>>,
    recording: bool,
    context: Arc<Context>,
}

/// A block in use; goes back to its pool when dropped.
pub(super) struct Block {
    pub ptr: sys::CUdeviceptr,
    bytes: usize,
    pool: Arc<Pool>,
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.pool.free.lock().expect("no holder panics").entry(self.bytes).or_default().push(self.ptr);
        }
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(context: Arc<Context>) -> Pool {
        Pool { free: Mutex::default(), slabs: Arc::default(), recording: false, context }
    }

    /// A pool for a recording; over the memory of another one that will not be in use with it.
    pub fn for_recording(context: Arc<Context>, instead: Option<&Pool>) -> Pool {
        let slabs = instead.map_or_else(Arc::default, |other| other.slabs.clone());
        let mut free: BTreeMap<usize, Vec<sys::CUdeviceptr>> = BTreeMap::new();
        for (bytes, slab) in slabs.lock().expect("no holder panics").iter() {
            free.entry(*bytes).or_default().push(slab.ptr);
        }
        Pool { free: Mutex::new(free), slabs, recording: true, context }
    }

    /// A block of at least `bytes`, content unspecified.
    ///
    /// # Panics
    /// If the device has no more memory.
    pub fn block(self: &Arc<Pool>, bytes: usize) -> Block {
        self.try_block(bytes).unwrap_or_else(|error| panic!("{}", refusal(bytes, error)))
    }

    /// As [`Pool::block`], for who can do without.
    pub fn try_block(self: &Arc<Pool>, bytes: usize) -> Result<Block, DriverError> {
        if bytes == 0 {
            return Ok(Block { ptr: 0, bytes: 0, pool: self.clone() });
        }
        let bytes = bytes.next_multiple_of(GRANULE);
        let (ptr, bytes) = match self.reuse(bytes) {
            Some(found) => found,
            None => (self.grow(bytes)?, bytes),
        };
        Ok(Block { ptr, bytes, pool: self.clone() })
    }

    fn reuse(&self, bytes: usize) -> Option<(sys::CUdeviceptr, usize)> {
        let most = if self.recording { usize::MAX } else { (2 * bytes).max(SMALL) };
        let mut free = self.free.lock().expect("no holder panics");
        let entry = free.range_mut(bytes..=most).next()?;
        let (found, ptr) = (*entry.0, entry.1.pop().expect("lists are never empty"));
        if entry.1.is_empty() {
            free.remove(&found);
        }
        Some((ptr, found))
    }

    fn grow(&self, bytes: usize) -> Result<sys::CUdeviceptr, DriverError> {
        let slab = self.allocate(bytes).or_else(|_| {
            self.give_back();
            self.allocate(bytes)
        })?;
        let ptr = slab.ptr;
        self.slabs.lock().expect("no holder panics").push((bytes, slab));
        Ok(ptr)
    }

    fn allocate(&self, bytes: usize) -> Result<Slab, DriverError> {
        // SAFETY: what is read of it was written before, by the contract of `uninit`.
        unsafe { result::malloc_sync(bytes) }.map(|ptr| Slab { ptr, context: self.context.clone() })
    }

    /// Gives free blocks back to the driver. A recording keeps its own: they are in its kernels' arguments.
    fn give_back(&self) {
        if !self.recording {
            let free = std::mem::take(&mut *self.free.lock().expect("no holder panics"));
            let unused: std::collections::HashSet<sys::CUdeviceptr> = free.into_values().flatten().collect();
            self.slabs.lock().expect("no holder panics").retain(|(_, slab)| !unused.contains(&slab.ptr));
        }
    }

    /// Bytes taken from the driver.
    pub fn bytes(&self) -> usize {
        self.slabs.lock().expect("no holder panics").iter().map(|(bytes, _)| bytes).sum()
    }
}

/// Why there is no block.
fn refusal(bytes: usize, error: DriverError) -> String {
    let mut text = format!("CUDA error {} in cuMemAlloc: wanted {} MiB", describe(error), bytes.div_ceil(1 << 20));
    if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY
        && let Ok((free, total)) = result::mem_get_info()
    {
        text += &format!(
            " of device memory, {} of {} MiB are free; lower train.rank or train.max_tokens, or leave the server less",
            free >> 20,
            total >> 20
        );
    }
    text
}
