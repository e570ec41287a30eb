//! A bound on the memory that an input may make a parser take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What a run may hold at once: so much, and so many bytes for each byte of its input.
const BYTES: usize = 64 << 20;
const BYTES_PER_BYTE: usize = 64;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(usize::MAX);

/// While it lives, memory beyond the bound ends the process, as memory that the system does not have would.
pub struct Bounds(());

impl Bounds {
    /// The bound for a run on this input. One at a time.
    pub fn of(input: &[u8]) -> Bounds {
        MOST.store(HELD.load(Relaxed) + BYTES + BYTES_PER_BYTE * input.len(), Relaxed);
        Bounds(())
    }
}

impl Drop for Bounds {
    fn drop(&mut self) {
        MOST.store(usize::MAX, Relaxed);
    }
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn take(bytes: usize) {
    let held = HELD.fetch_add(bytes, Relaxed).saturating_add(bytes);
    if held > MOST.load(Relaxed) {
        // Saying so takes memory too.
        MOST.store(usize::MAX, Relaxed);
        eprintln!("{bytes} bytes more make {held}: out of proportion to the input");
        std::process::abort();
    }
}

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}
