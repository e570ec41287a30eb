//! f32 elements in memory that is used again.
//!
//! A step makes and drops a few hundred buffers. Fresh memory costs a page fault and a page of zeros for every 4 KiB, and its
//! return an interruption of all threads, which together took a tenth of a step.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Elements that are kept for later at most: 64 MiB, what a layer of a long context takes.
const KEPT: usize = 16 << 20;
/// Buffers that are shorter are left to the allocator.
const SHORT: usize = 1 << 10;
/// Zeros that are longer are not written.
const LONG: usize = 1 << 18;

/// Memory of dropped buffers, by its length.
#[derive(Default)]
struct Free {
    blocks: BTreeMap<usize, Vec<Vec<f32>>>,
    elements: usize,
}

static FREE: Mutex<Free> = Mutex::new(Free { blocks: BTreeMap::new(), elements: 0 });

/// f32 elements on the CPU; its memory is kept for the next one.
pub struct Buffer {
    /// At least `len` elements.
    block: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// `len` elements of unspecified content.
    pub(crate) fn uninit(len: usize) -> Buffer {
        let mut buffer = Buffer { block: Buffer::block(len), len };
        if cfg!(debug_assertions) {
            // Tests find who relies on what is there.
            buffer.fill(f32::NAN);
        }
        buffer
    }

    fn block(len: usize) -> Vec<f32> {
        if len < SHORT {
            return vec![0.0; len];
        }
        let class = class(len);
        let kept = FREE.lock().expect("no holder panics").take(class);
        // What made room is returned to the system here, with the lock open.
        kept.unwrap_or_else(|_made_room| vec![0.0; class])
    }

    /// `len` zeros. Long ones, which are moments, are fresh memory: its pages do not exist before they are written.
    pub(crate) fn zeros(len: usize) -> Buffer {
        if len > LONG {
            return vec![0.0; len].into();
        }
        let mut buffer = Buffer::uninit(len);
        buffer.fill(0.0);
        buffer
    }
}

impl Free {
    /// A block of this length, or else what has to go for a new one, the longest first: kept memory that nobody asks for
    /// does not stand beside what is in use.
    fn take(&mut self, class: usize) -> Result<Vec<f32>, Vec<Vec<f32>>> {
        if let Some(block) = self.pop(class) {
            return Ok(block);
        }
        let (mut gone, mut room) = (Vec::new(), 0);
        while room < class {
            let Some(longest) = self.blocks.last_key_value().map(|(len, _)| *len) else { break };
            gone.extend(self.pop(longest));
            room += longest;
        }
        Err(gone)
    }

    fn pop(&mut self, class: usize) -> Option<Vec<f32>> {
        let blocks = self.blocks.get_mut(&class)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.blocks.remove(&class);
        }
        self.elements -= class;
        block
    }

    /// Keeps a block, or gives it back.
    fn keep(&mut self, block: Vec<f32>) -> Option<Vec<f32>> {
        let len = block.len();
        if len != class(len) || self.elements + len > KEPT {
            return Some(block);
        }
        self.elements += len;
        self.blocks.entry(len).or_default().push(block);
        None
    }
}

/// The length of the memory for `len` elements: at most an eighth more, so that windows of about one length share it.
fn class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.next_multiple_of(step)
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let block = std::mem::take(&mut self.block);
        if block.len() >= SHORT {
            // What is not kept is returned to the system after the lock.
            let _not_kept = FREE.lock().expect("no holder panics").keep(block);
        }
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(block: Vec<f32>) -> Buffer {
        Buffer { len: block.len(), block }
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
        // A length that no other test uses.
        const LEN: usize = 77_777;
        let (mut first, mut second) = (Buffer::uninit(LEN), Buffer::uninit(LEN));
        first.fill(1.0);
        second.fill(7.0);
        assert!(first.iter().all(|&v| v == 1.0));
        let at = first.as_ptr();
        drop(first);
        let again = Buffer::uninit(LEN - 1);
        assert_eq!((again.as_ptr(), again.len()), (at, LEN - 1), "a little shorter");
        drop(second);
        assert!(Buffer::zeros(LEN).iter().all(|&v| v == 0.0), "what was used before is not zero by itself");
    }

    #[test]
    fn what_is_kept_has_a_bound_and_makes_room() {
        const LEN: usize = 1 << 20;
        let mut free = Free::default();
        let refused = (0..200).filter_map(|_| free.keep(vec![0.0; LEN])).count();
        assert_eq!((free.elements, refused), (KEPT, 200 - KEPT / LEN));
        assert_eq!(free.take(LEN).map(|block| block.len()).ok(), Some(LEN));
        assert!(free.keep(vec![0.0; LEN / 2]).is_none());
        // Another length: the longest go for it, as many as it takes.
        let gone = free.take(2 * LEN + LEN / 8 * 2).expect_err("there is none");
        assert_eq!(gone.iter().map(Vec::len).collect::<Vec<_>>(), [LEN; 3]);
        let kept = free.blocks.values().flatten().map(Vec::len).sum::<usize>();
        assert_eq!((kept, free.elements), (KEPT - 4 * LEN + LEN / 2, kept));
        assert!(free.take(KEPT).is_err() && free.elements == 0, "all of it, and no more is asked");
    }

    #[test]
    fn a_class_wastes_an_eighth_at_most() {
        for len in (0..5000).chain([1 << 20, (1 << 20) + 1, 151_936 * 32]) {
            let class = class(len);
            assert!(class >= len && class - len <= len / 8 + 1, "{len}: {class}");
        }
    }
}
