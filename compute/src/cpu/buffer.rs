//! f32 elements in memory that is used again.
//!
//! A step makes and drops a few hundred buffers. Fresh memory costs a page fault and a page of zeros for every 4 KiB, and its
//! return an interruption of all threads, which together took a tenth of a step.

use std::collections::HashMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// Elements that are kept for later at most: 128 MiB, a layer of a long context or a few of its window.
const KEPT: usize = 32 << 20;
/// Buffers that are shorter are left to the allocator.
const SHORT: usize = 1 << 10;

/// Memory of dropped buffers, by its length.
#[derive(Default)]
pub(super) struct Pool(Mutex<Free>);

#[derive(Default)]
struct Free {
    blocks: HashMap<usize, Vec<Vec<f32>>>,
    elements: usize,
}

/// f32 elements on the CPU; its memory goes back to its pool.
pub struct Buffer {
    /// At least `len` elements.
    block: Vec<f32>,
    len: usize,
    pool: Option<Arc<Pool>>,
}

impl Pool {
    /// `len` elements of unspecified content.
    pub fn take(self: &Arc<Pool>, len: usize) -> Buffer {
        let class = class(len);
        let mut free = self.0.lock().expect("no holder panics");
        let block = free.blocks.get_mut(&class).and_then(Vec::pop);
        if block.is_some() {
            free.elements -= class;
        }
        drop(free);
        let block = block.unwrap_or_else(|| vec![0.0; class]);
        Buffer { block, len, pool: Some(self.clone()) }
    }

    /// `len` zeros. Long ones are fresh memory, whose pages do not exist before they are written.
    pub fn zeros(self: &Arc<Pool>, len: usize) -> Buffer {
        if len > KEPT / 64 {
            return Buffer { block: vec![0.0; len], len, pool: Some(self.clone()) };
        }
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    fn give_back(&self, block: Vec<f32>) {
        let len = block.len();
        let mut free = self.0.lock().expect("no holder panics");
        if len >= SHORT && len == class(len) && free.elements + len <= KEPT {
            free.elements += len;
            free.blocks.entry(len).or_default().push(block);
        }
    }
}

/// The length of the memory for `len` elements: at most an eighth more, so that windows of about one length share it.
fn class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.next_multiple_of(step)
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.give_back(std::mem::take(&mut self.block));
        }
    }
}

/// Memory that no pool has to have back.
impl From<Vec<f32>> for Buffer {
    fn from(block: Vec<f32>) -> Buffer {
        Buffer { len: block.len(), block, pool: None }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.block[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.block[..self.len]
    }
}

impl<'a> IntoIterator for &'a Buffer {
    type Item = &'a f32;
    type IntoIter = std::slice::Iter<'a, f32>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Buffer {
        self.to_vec().into()
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Buffer) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_never_by_two() {
        let pool = Arc::new(Pool::default());
        let first = pool.take(100_000);
        let at = first.as_ptr();
        let mut second = pool.take(100_000);
        assert_ne!(second.as_ptr(), at);
        drop(first);
        second.fill(7.0);
        let again = pool.take(99_999);
        assert_eq!((again.as_ptr(), again.len()), (at, 99_999), "a little shorter");
        drop(second);
        assert!(pool.zeros(100_000).iter().all(|&v| v == 0.0), "what was used before is not zero by itself");
    }

    #[test]
    fn what_is_kept_has_a_bound() {
        let pool = Arc::new(Pool::default());
        let many: Vec<Buffer> = (0..200).map(|_| pool.take(1 << 20)).collect();
        drop(many);
        let free = pool.0.lock().unwrap();
        assert_eq!(free.elements, KEPT);
        assert_eq!(free.blocks.values().flatten().map(Vec::len).sum::<usize>(), KEPT);
    }

    #[test]
    fn a_class_wastes_an_eighth_at_most() {
        for len in (0..5000).chain([1 << 20, (1 << 20) + 1, 151_936 * 32]) {
            let class = class(len);
            assert!(class >= len && class - len <= len / 8 + 1, "{len}: {class}");
        }
    }
}
