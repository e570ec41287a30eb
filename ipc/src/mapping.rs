//! Memory that is shared with a server.
//!
//! `sys` below, `safe` above: a [`Mapping`] owns one MAP_SHARED mapping and never makes a Rust reference
//! into it, because another process reads and writes those bytes at any time. What leaves it is a raw
//! pointer with a lifetime ([`LiveTensor`]), and two plain accessors that go element by element through
//! relaxed atomics.
//!
//! A mapped file that somebody truncates raises SIGBUS on the next touch. That cannot be turned into an
//! error here; run the code that touches live weights in a process that may die.

use crate::Error;
use memmap2::{MmapOptions, MmapRaw};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use weight_map::{Dtype, RowOrder, View};

/// Device and inode: which file it is, whatever its names.
pub(crate) type FileId = (u64, u64);

pub(crate) fn file_id(metadata: &std::fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}

/// One shared, writable mapping of the first bytes of a file.
#[derive(Debug)]
pub(crate) struct Mapping {
    raw: MmapRaw,
}

impl Mapping {
    /// Maps the first `bytes` of the file at `path`, shared and writable.
    pub(crate) fn open(path: &Path, bytes: u64) -> Result<(Mapping, FileId), Error> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| Error::io("open for writing", path, source))?;
        let metadata = file.metadata().map_err(|source| Error::io("inspect", path, source))?;
        let refuse = |reason: String| Err(Error::Allocation { path: path.to_owned(), reason });
        if !metadata.is_file() {
            return refuse("not a regular file or shared memory".into());
        }
        if metadata.len() < bytes {
            return refuse(format!("{} bytes long, but the server describes {bytes}", metadata.len()));
        }
        Ok((Mapping::of(&file, path, bytes)?, file_id(&metadata)))
    }

    /// Maps the first `bytes` of an open file, which must be at least that long.
    pub(crate) fn of(file: &File, path: &Path, bytes: u64) -> Result<Mapping, Error> {
        let len = usize::try_from(bytes)
            .map_err(|_| Error::Allocation { path: path.to_owned(), reason: "too large to be mapped".into() })?;
        let raw =
            MmapOptions::new().len(len).map_raw(file).map_err(|source| Error::io("map into memory", path, source))?;
        Ok(Mapping { raw })
    }

    /// The tensor that `view` describes. The caller's list of views was made for this mapping.
    pub(crate) fn tensor<'a>(&'a self, view: &'a View) -> LiveTensor<'a> {
        let bytes = view.bytes();
        let offset = usize::try_from(view.offset).expect("an offset within a mapping fits usize");
        assert!(
            offset.checked_add(bytes).is_some_and(|end| end <= self.raw.len()),
            "view of {} leaves its mapping: the manifest was not validated",
            view.name
        );
        // SAFETY: offset <= raw.len() was just asserted, so the result stays in or one past the mapping.
        let ptr = unsafe { self.raw.as_mut_ptr().add(offset) };
        let ptr = NonNull::new(ptr).expect("a mapping never starts at null");
        LiveTensor::new(view, Memory::Host(ptr))
    }
}

/// Where a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In this process's address space, aligned to the element size. Dereferenced only through atomics, intrinsics
    /// or assembly, never as a Rust reference or slice.
    Host(NonNull<u8>),
    /// On the GPU that [`crate::Attachment::device`] names: an address of its memory, aligned to the element size,
    /// for its kernels and copies. Nothing on the host may follow it.
    Cuda(u64),
}

/// One tensor of the model in live memory, valid for as long as its owner is borrowed.
///
/// Other processes and threads read and write these bytes at the same time.
#[derive(Clone, Copy, Debug)]
pub struct LiveTensor<'a> {
    /// Hugging Face name.
    pub name: &'a str,
    /// Shape: (rows, cols) or (n,), each row contiguous.
    pub shape: &'a [usize],
    /// Element type.
    pub dtype: Dtype,
    /// Order of the rows; the methods here read and write them as they lie.
    pub row_order: RowOrder,
    /// First byte.
    pub memory: Memory,
    /// Length in bytes.
    pub bytes: usize,
}

// SAFETY: its bytes are there for 'a by an owner that is Sync, and a LiveTensor touches them only on the host and
// only through atomics; other uses of its address are unsafe code that answers for itself.
unsafe impl Send for LiveTensor<'_> {}
// SAFETY: as above; the type has no interior state of its own.
unsafe impl Sync for LiveTensor<'_> {}

impl<'a> LiveTensor<'a> {
    /// What `view` describes, at `memory`.
    pub(crate) fn new(view: &'a View, memory: Memory) -> LiveTensor<'a> {
        let View { name, shape, dtype, row_order, .. } = view;
        LiveTensor { name, shape, dtype: *dtype, row_order: *row_order, memory, bytes: view.bytes() }
    }

    /// The first byte, for code that works on the host.
    ///
    /// # Panics
    /// If the tensor lies on a GPU.
    pub fn host(&self) -> NonNull<u8> {
        match self.memory {
            Memory::Host(ptr) => ptr,
            Memory::Cuda(_) => panic!("`{}` lies on a GPU, where the host can neither read nor write", self.name),
        }
    }

    /// A copy of the bytes as they are now. Every element is whole, the tensor as a whole may be in the
    /// middle of an update.
    ///
    /// # Panics
    /// If the tensor lies on a GPU.
    pub fn read(&self) -> Vec<u8> {
        let size = self.dtype.size();
        let mut out = vec![0; self.bytes];
        for (index, element) in out.chunks_exact_mut(size).enumerate() {
            match self.dtype {
                Dtype::F32 => element.copy_from_slice(&self.word32(index).load(Ordering::Relaxed).to_ne_bytes()),
                Dtype::F16 | Dtype::BF16 => {
                    element.copy_from_slice(&self.word16(index).load(Ordering::Relaxed).to_ne_bytes());
                }
            }
        }
        out
    }

    /// Writes `bytes` from byte `at` on. Every element changes as a whole.
    ///
    /// # Panics
    /// If the range leaves the tensor or cuts an element, or the tensor lies on a GPU.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let size = self.dtype.size();
        assert!(
            at.checked_add(bytes.len()).is_some_and(|end| end <= self.bytes),
            "write of {} bytes at {at} leaves `{}` of {} bytes",
            bytes.len(),
            self.name,
            self.bytes
        );
        assert!(at.is_multiple_of(size) && bytes.len().is_multiple_of(size), "write at {at} cuts an element");
        for (index, element) in bytes.chunks_exact(size).enumerate() {
            let index = at / size + index;
            match *element {
                [a, b, c, d] => self.word32(index).store(u32::from_ne_bytes([a, b, c, d]), Ordering::Relaxed),
                [a, b] => self.word16(index).store(u16::from_ne_bytes([a, b]), Ordering::Relaxed),
                _ => unreachable!("elements have 2 or 4 bytes"),
            }
        }
    }

    fn word16(&self, index: usize) -> &AtomicU16 {
        assert!(index < self.bytes / 2);
        // SAFETY: in bounds by the assertion; aligned because offsets are multiples of the element size
        // (weight_map::map refuses others) and mappings start at a page; `host` gives only mapped memory, and that
        // for the lifetime of self.
        unsafe { AtomicU16::from_ptr(self.host().as_ptr().cast::<u16>().add(index)) }
    }

    fn word32(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.bytes / 4);
        // SAFETY: as in word16; only called for 4-byte elements, whose offsets are multiples of 4.
        unsafe { AtomicU32::from_ptr(self.host().as_ptr().cast::<u32>().add(index)) }
    }
}
