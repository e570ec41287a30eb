//! What changed in weights, found where they lie, and brought to the host.
//!
//! [`Cuda::block_hashes`] reads every weight once, at the speed of its memory, and brings 16 bytes for each block.
//! [`ReadAhead`] brings the parts that are wanted, while whoever wants them works on those before:
//!
//! ```text
//! weights --gather kernel--> staging (device) --copy--> slot (pinned) --> the caller's buffer
//! ```
//! Parts may be many and small, 4 KiB and less: gathered side by side they cross the bus a slot at a time, which is
//! what makes the copies fast.

use super::driver::check;
use super::launch::Launch;
use super::pool::Block;
use super::{Cuda, Weight};
use crate::hash::{Keys, check_block_bytes};
use cudarc::driver::{result, sys};
use std::collections::VecDeque;
use std::ops::Range;

/// Blocks that one launch hashes at most: 16 MiB of hashes.
const HASHES_MAX: u64 = 1 << 20;
/// Fewer than that are not worth a launch.
const HASHES_MIN: u64 = 1 << 10;
/// Blocks that a thread block takes at a time: 8 warps with a run of 8 each, as in `hash.cu`.
const HASHES_OF_BLOCK: u64 = 64;
/// Thread blocks for each multiprocessor; two are resident.
const BLOCKS_OF_MULTIPROCESSOR: usize = 8;

/// Bytes of a slot, which is the longest part too.
const SLOT: usize = 4 << 20;
/// Slots that are filled ahead.
const SLOTS: usize = 4;
/// Bytes that one thread block gathers.
const GATHERED: usize = 16 << 10;
/// Where a part begins in its slot: at a multiple of this, for 16-byte accesses.
const ALIGNMENT: usize = 16;

/// Weights being hashed.
struct Scan<'a> {
    cuda: &'a Cuda,
    tasks: Block,
    keys: Block,
    out: Block,
    weights: usize,
    block_bytes: usize,
    /// Blocks that one launch hashes.
    batch: u64,
    /// Of all weights.
    blocks: u64,
}

impl Scan<'_> {
    fn new<'a>(cuda: &'a Cuda, weights: &[&Weight], block_bytes: usize, keys: &Keys) -> Scan<'a> {
        check_block_bytes(block_bytes);
        let mut blocks = 0u64;
        let mut tasks = Vec::with_capacity(3 * weights.len());
        for weight in weights {
            tasks.extend([weight.ptr(), weight.bytes() as u64, blocks]);
            blocks += weight.bytes().div_ceil(block_bytes) as u64;
        }
        let (tasks, keys) = (cuda.uploaded(&tasks), cuda.uploaded(keys.words()));
        // Fewer at a time on a device that is full.
        let mut batch = blocks.min(HASHES_MAX);
        let out = loop {
            match cuda.try_block(16 * batch as usize) {
                Some(block) => break block,
                None if batch > HASHES_MIN => batch = batch.div_ceil(2),
                None => break cuda.block(16 * batch as usize),
            }
        };
        Scan { cuda, tasks, keys, out, batch, weights: weights.len(), block_bytes, blocks }
    }

    /// First block and the one after the last of each launch.
    fn batches(&self) -> impl Iterator<Item = (u64, u64)> {
        let (batch, blocks) = (self.batch.max(1), self.blocks);
        (0..blocks).step_by(batch as usize).map(move |begin| (begin, blocks.min(begin + batch)))
    }

    /// Queues blocks begin..end, whose hashes go to the start of `out`.
    fn launch(&self, begin: u64, end: u64) {
        let grid = ((end - begin).div_ceil(HASHES_OF_BLOCK) as usize)
            .min(BLOCKS_OF_MULTIPROCESSOR * self.cuda.multiprocessors());
        Launch::new("block_hashes")
            .grid(grid, 1, 1)
            .block(256)
            .arg(self.out.ptr)
            .arg(self.tasks.ptr)
            .arg(self.keys.ptr)
            .arg(self.weights as u32)
            .arg(begin)
            .arg(end)
            .arg(self.block_bytes as u32)
            .run(self.cuda);
    }
}

impl Cuda {
    /// The hash of every block of every weight, weight by weight: [`crate::hash::block_hashes`] of its bytes. Waits.
    ///
    /// # Panics
    /// If a block is not a multiple of 16 bytes, or longer than [`crate::hash::BLOCK_BYTES_MAX`].
    pub fn block_hashes(&self, weights: &[&Weight], block_bytes: usize, keys: &Keys) -> Vec<u128> {
        let scan = Scan::new(self, weights, block_bytes, keys);
        let mut hashes = vec![0u128; scan.blocks as usize];
        for (begin, end) in scan.batches() {
            scan.launch(begin, end);
            // SAFETY: `out` has 16 bytes for each of these blocks, of which the kernel wrote all.
            unsafe { self.download(&mut hashes[begin as usize..end as usize], scan.out.ptr) };
        }
        hashes
    }

    /// How long the device takes to hash these weights, in ms; the hashes stay there and are not kept.
    pub fn scan_ms(&self, weights: &[&Weight], block_bytes: usize, keys: &Keys) -> f64 {
        let scan = Scan::new(self, weights, block_bytes, keys);
        self.timed(|| {
            for (begin, end) in scan.batches() {
                scan.launch(begin, end);
            }
        })
    }

    /// Begins to bring parts of weights, each a range of a weight's bytes, to the host. Nothing may write the weights
    /// before the last part has come.
    ///
    /// # Panics
    /// If a part leaves its weight, or is longer than 4 MiB.
    ///
    /// On a device without memory for it, each part is copied when it is asked for.
    pub fn read_ahead<'a>(&'a self, parts: impl IntoIterator<Item = (&'a Weight, Range<usize>)>) -> ReadAhead<'a> {
        let place = |(weight, range): (&Weight, Range<usize>)| {
            assert!(range.start <= range.end && range.end <= weight.bytes(), "{range:?} outside {}", weight.bytes());
            // The kernel copies pairs of bytes; weights begin and end at even addresses.
            let (start, end) = (range.start / 2 * 2, range.end.next_multiple_of(2));
            assert!(end - start <= SLOT, "a part of {} bytes, at most {SLOT}", range.len());
            Part { from: weight.ptr() + start as u64, bytes: end - start, skip: range.start - start, len: range.len() }
        };
        let parts: VecDeque<Part> = parts.into_iter().map(place).collect();
        let slots = SLOTS.min(parts.len());
        let mut ahead = ReadAhead { cuda: self, parts, filled: VecDeque::new() };
        for slot in (0..slots).map_while(|_| Slot::new(self)) {
            ahead.fill(slot);
        }
        ahead
    }

    /// A copy in device memory.
    fn uploaded(&self, words: &[u64]) -> Block {
        let block = self.block(8 * words.len());
        // SAFETY: allocated for as many.
        unsafe { self.upload(block.ptr, words) };
        block
    }
}

/// A part of a weight.
struct Part {
    /// An even address.
    from: u64,
    /// An even number, with up to one byte more at either end than was asked for.
    bytes: usize,
    /// The first of `len` bytes that were asked for.
    skip: usize,
    len: usize,
}

/// Pinned memory that parts are copied to, by way of as much device memory.
struct Slot {
    pinned: *mut u8,
    staging: Block,
    copied: sys::CUevent,
    /// Where each part in it begins, and how long it is.
    parts: VecDeque<(usize, usize)>,
}

// SAFETY: pinned memory and events belong to the process, and whoever uses them binds the context first.
unsafe impl Send for Slot {}

impl Slot {
    /// None where there is no memory for it.
    fn new(cuda: &Cuda) -> Option<Slot> {
        let staging = cuda.try_block(SLOT)?;
        // SAFETY: freed by `ReadAhead`. Not write-combined: the host reads it.
        let pinned = unsafe { result::malloc_host(SLOT, 0) }.ok()?.cast();
        let copied = check(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING), "cuEventCreate");
        Some(Slot { pinned, staging, copied, parts: VecDeque::new() })
    }
}

/// Parts of weights on their way to the host.
pub struct ReadAhead<'a> {
    cuda: &'a Cuda,
    /// Not on their way yet.
    parts: VecDeque<Part>,
    /// On their way, in order; the first may have come.
    filled: VecDeque<Slot>,
}

impl ReadAhead<'_> {
    /// Waits for the next part and copies it to `out`.
    ///
    /// # Panics
    /// If there is none, or it has another length.
    pub fn next(&mut self, out: &mut [u8]) {
        let Some(slot) = self.filled.front_mut() else {
            // There was no memory for a single slot.
            let Part { from, skip, len, .. } = self.parts.pop_front().expect("no part is left");
            assert_eq!(out.len(), len, "the next part has {len} bytes");
            // SAFETY: the part lies in its weight (`read_ahead`).
            return unsafe { self.cuda.download(out, from + skip as u64) };
        };
        let (at, len) = slot.parts.pop_front().expect("a slot is given back when it is empty");
        assert_eq!(out.len(), len, "the next part has {len} bytes");
        self.cuda.context.bind();
        // SAFETY: recorded by `fill`.
        check(unsafe { result::event::synchronize(slot.copied) }, "cuEventSynchronize");
        // SAFETY: at + len <= SLOT by `fill`; the copy into the slot is done, and nobody else has the memory.
        unsafe { std::ptr::copy_nonoverlapping(slot.pinned.add(at), out.as_mut_ptr(), len) };
        if slot.parts.is_empty() {
            let slot = self.filled.pop_front().expect("looked at above");
            self.fill(slot);
        }
    }

    /// Sets as many parts as fit on their way into a slot, or frees it if there are no more.
    fn fill(&mut self, mut slot: Slot) {
        let (mut end, mut tasks) = (0, Vec::new());
        while let Some(part) = self.parts.pop_front_if(|part| end + part.bytes <= SLOT) {
            for at in (0..part.bytes).step_by(GATHERED) {
                let bytes = GATHERED.min(part.bytes - at);
                tasks.extend([part.from + at as u64, slot.staging.ptr + (end + at) as u64, bytes as u64]);
            }
            slot.parts.push_back((end + part.skip, part.len));
            end = (end + part.bytes).next_multiple_of(ALIGNMENT);
        }
        if slot.parts.is_empty() {
            self.free(slot);
            return;
        }
        let cuda = self.cuda;
        let on_device = cuda.uploaded(&tasks);
        Launch::new("gather_bytes").grid(tasks.len() / 3, 1, 1).block(256).arg(on_device.ptr).run(cuda);
        // SAFETY: the slot is ours alone until its event; SLOT bytes at either end, of which `end` were gathered.
        let pinned = unsafe { std::slice::from_raw_parts_mut(slot.pinned, end.min(SLOT)) };
        // SAFETY: as above.
        check(unsafe { result::memcpy_dtoh_async(pinned, slot.staging.ptr, cuda.stream.0) }, "cuMemcpyDtoHAsync");
        // SAFETY: event and stream live.
        check(unsafe { result::event::record(slot.copied, cuda.stream.0) }, "cuEventRecord");
        self.filled.push_back(slot);
    }

    fn free(&self, slot: Slot) {
        if self.cuda.context.bind_for_drop().is_err() {
            return;
        }
        // SAFETY: nothing is on its way into the slot: it is new, has come, or the stream was waited for. An error has
        // nobody to tell.
        let _ = unsafe { (result::event::destroy(slot.copied), result::free_host(slot.pinned.cast())) };
    }
}

impl Drop for ReadAhead<'_> {
    fn drop(&mut self) {
        if self.filled.is_empty() || self.cuda.context.bind_for_drop().is_err() {
            return;
        }
        // SAFETY: the stream lives. If it cannot be waited for nothing runs in it any more.
        let _ = unsafe { result::stream::synchronize(self.cuda.stream.0) };
        while let Some(slot) = self.filled.pop_front() {
            self.free(slot);
        }
    }
}
