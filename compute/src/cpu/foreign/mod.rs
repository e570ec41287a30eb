//! Weights in memory that an inference server owns: read where they lie, written in place.
//!
//! Another process reads these bytes while we write them (HOGWILD). Rust has no data race there as
//! long as we touch them by atomics, vector intrinsics or raw copies that the compiler cannot assume
//! anything about; that is what [`load`], [`store`] and `widen_avx2` are for, with AVX-512 `subtract` and `interleave`
//! (`avx512.rs`), and for rows that are multiplied where they lie the loads of `kernel`; nothing else in this crate
//! dereferences a foreign pointer. An element is written whole: a reader sees its old or its new
//! value, never half of each (naturally aligned stores of 2 and 4 bytes, and vector stores, which
//! x86 and Arm split at element boundaries at worst).

mod pairs;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::simd::{self, multiversion};
use super::stored::{round_bf16, rounded_bf16};
use crate::random::GROUP;
use crate::{Dtype, RowOrder, Stream};
use half::slice::HalfFloatSliceExt;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};

/// Elements converted at a time, so that the 16-bit copy stays in the first-level cache.
const CHUNK: usize = 256;

/// A row-major matrix (rows, cols) in foreign memory.
///
/// Rows are counted as the files count them, in every method and in the random numbers of the rounding. Where a
/// server holds them in another order, this type alone knows: a row's address is computed from it, which costs
/// nothing beside the row's conversion, and whoever trains, compares or saves the weight need not care.
pub struct Weight {
    data: NonNull<u8>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    order: RowOrder,
    /// Keeps the memory mapped.
    _owner: Arc<dyn Send + Sync>,
}

/// Memory of a weight that no server holds; zeroed, and only touched by [`load`], [`store`] and `widen_avx2`.
struct Memory(Box<[UnsafeCell<u32>]>);

// SAFETY: the cells are only accessed by `load`, `store` and `widen_avx2`, which are valid from any thread.
unsafe impl Sync for Memory {}

// SAFETY: the pointer is only ever dereferenced by `load`, `store` and `widen_avx2`, whose accesses are valid
// from any thread; `Weight::new` makes its caller promise that the memory outlives the value.
unsafe impl Send for Weight {}
// SAFETY: as above.
unsafe impl Sync for Weight {}

impl Weight {
    /// A view of foreign memory that `owner` keeps mapped.
    ///
    /// # Safety
    /// `data` must stay valid for reads and writes of rows·cols elements as long as `owner` lives,
    /// and no Rust reference to those bytes may exist meanwhile.
    pub unsafe fn new(
        data: NonNull<u8>,
        dtype: Dtype,
        rows: usize,
        cols: usize,
        owner: Arc<dyn Send + Sync>,
    ) -> Weight {
        assert_eq!(data.addr().get() % dtype.size(), 0, "weight is not aligned to its element");
        Weight { data, dtype, rows, cols, order: RowOrder::AsFiles, _owner: owner }
    }

    /// The same memory, whose rows lie in `order`. One row is a vector: there it is its elements that do.
    ///
    /// # Panics
    /// If the rows are no whole heads of the order.
    pub fn ordered(mut self, order: RowOrder) -> Weight {
        let units = if self.rows == 1 { self.cols } else { self.rows };
        assert!(order.fits(units), "{units} rows in {order:?}");
        self.order = order;
        self
    }

    /// A weight in memory of its own, zeroed: for checks, benchmarks and models without a server.
    pub fn zeros(dtype: Dtype, rows: usize, cols: usize) -> Weight {
        let words = (rows * cols * dtype.size()).div_ceil(4).max(1);
        let memory = Arc::new(Memory((0..words).map(|_| UnsafeCell::new(0)).collect()));
        let data = NonNull::new(memory.0[0].get().cast()).expect("a box is not null");
        // SAFETY: the box holds rows·cols elements, is aligned to 4, lives in the Arc, and nobody
        // else can reach it.
        unsafe { Weight::new(data, dtype, rows, cols, memory) }
    }

    /// A weight in memory of its own with these values; 16-bit elements are rounded stochastically
    /// unless the values lie on their grid.
    pub fn from_values(dtype: Dtype, rows: usize, cols: usize, values: &[f32]) -> Weight {
        assert_eq!(values.len(), rows * cols);
        let w = Weight::zeros(dtype, rows, cols);
        for (row, line) in values.chunks_exact(cols.max(1)).enumerate() {
            w.write(row, 0, line, &Stream::rounding(0, 0, 0));
        }
        w
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }

    /// Copies bytes `at..at + out.len()`, counted as the files hold the weight; a whole number of elements.
    pub fn read_bytes(&self, at: usize, out: &mut [u8]) {
        for (from, range) in self.pieces(at, out.len()) {
            self.read_piece(from, &mut out[range]);
        }
    }

    /// Writes bytes from `at` on, counted as the files hold the weight; a whole number of elements, each of which
    /// changes as a whole.
    pub fn write_bytes(&self, at: usize, bytes: &[u8]) {
        for (to, range) in self.pieces(at, bytes.len()) {
            self.write_piece(to, &bytes[range]);
        }
    }

    /// Where bytes `at..at + len` of the files lie: the address of each piece, and its range of the `len` bytes.
    fn pieces(&self, at: usize, len: usize) -> impl Iterator<Item = (NonNull<u8>, Range<usize>)> {
        let size = self.dtype.size();
        assert!(at.is_multiple_of(size) && len.is_multiple_of(size), "{at}+{len} bytes cut an element of {size}");
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.bytes()),
            "{at}+{len} outside {} bytes",
            self.bytes()
        );
        // Bytes that lie together in any case.
        let unit = match self.order {
            RowOrder::AsFiles => self.bytes(),
            RowOrder::Interleaved { .. } => self.bytes() / if self.rows == 1 { self.cols } else { self.rows },
        };
        let mut done = 0;
        std::iter::from_fn(move || {
            (done < len).then(|| {
                let (row, within) = ((at + done) / unit, (at + done) % unit);
                let range = done..len.min(done + unit - within);
                done = range.end;
                // SAFETY: the order maps rows to rows, so this is inside the memory promised to `new`.
                (unsafe { self.data.add(self.order.in_server(row) * unit + within) }, range)
            })
        })
    }

    /// `from` is in the weight, and so is the rest of `out`'s length.
    fn read_piece(&self, from: NonNull<u8>, out: &mut [u8]) {
        let size = self.dtype.size();
        let mut elements = [0u32; CHUNK];
        for (i, out) in out.chunks_mut(CHUNK * 4).enumerate() {
            // SAFETY: the caller's range, of which this is a part that ends at an element.
            let from = unsafe { from.add(i * CHUNK * 4) };
            let words = &mut elements[..out.len().div_ceil(4)];
            if size == 4 {
                // SAFETY: as above; out.len() is a multiple of 4.
                unsafe { load::<u32>(from, words) };
            } else {
                // SAFETY: as above; the words hold at least out.len() / 2 halves.
                unsafe {
                    load::<u16>(from, std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), out.len() / 2));
                }
            }
            // SAFETY: the words hold at least out.len() initialised bytes.
            out.copy_from_slice(unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), out.len()) });
        }
    }

    /// `to` is in the weight, and so is the rest of the bytes' length.
    fn write_piece(&self, to: NonNull<u8>, bytes: &[u8]) {
        let size = self.dtype.size();
        let mut elements = [0u32; CHUNK];
        for (i, bytes) in bytes.chunks(CHUNK * 4).enumerate() {
            // SAFETY: the caller's range, of which this is a part that ends at an element.
            let to = unsafe { to.add(i * CHUNK * 4) };
            let words = &mut elements[..bytes.len().div_ceil(4)];
            // SAFETY: the words hold at least bytes.len() bytes, and any bytes are a valid word.
            unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), bytes.len()) }.copy_from_slice(bytes);
            if size == 4 {
                // SAFETY: as above; bytes.len() is a multiple of 4.
                unsafe { store::<u32>(to, words) };
            } else {
                // SAFETY: as above; the words hold at least bytes.len() / 2 halves.
                unsafe { store::<u16>(to, std::slice::from_raw_parts(words.as_ptr().cast(), bytes.len() / 2)) };
            }
        }
    }

    /// All values as f32, row-major.
    pub fn values(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, line) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.read(row, 0, line);
        }
        out
    }

    /// The server's dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Rows, the outputs of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns, the inputs of a matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Runs `part(address, range)` for what lies together of the `len` elements of row `row` from column `col` on.
    fn parts(&self, row: usize, col: usize, len: usize, mut part: impl FnMut(NonNull<u8>, Range<usize>)) {
        let inside = row < self.rows && col <= self.cols && len <= self.cols - col;
        assert!(inside, "({row},{col}+{len}) outside ({},{})", self.rows, self.cols);
        // SAFETY: inside the rows·cols elements promised to `new`, as asserted above and because the order maps
        // rows to rows.
        let at = |element: usize| unsafe { self.data.add(element * self.dtype.size()) };
        match self.order {
            RowOrder::Interleaved { .. } if self.rows == 1 => {
                (0..len).for_each(|i| part(at(self.order.in_server(col + i)), i..i + 1));
            }
            order => part(at(order.in_server(row) * self.cols + col), 0..len),
        }
    }

    /// Row `row` from column `col` on as f32.
    pub fn read(&self, row: usize, col: usize, out: &mut [f32]) {
        self.parts(row, col, out.len(), |base, range| {
            let len = range.len();
            self.read_part(base, len, &mut out[range], len, len);
        });
    }

    /// `len` elements of row `row` of a matrix from column `col` on as f32, in pieces of `piece`, of which piece i goes to
    /// `out[i * step..]`.
    pub(super) fn read_pieces(&self, row: usize, col: usize, len: usize, out: &mut [f32], piece: usize, step: usize) {
        assert!(self.rows > 1 || self.order == RowOrder::AsFiles, "a vector's elements may lie anywhere");
        self.parts(row, col, len, |base, _| self.read_part(base, len, out, piece, step));
    }

    /// Asks for the cache lines of `len` elements of row `row` from column `col` on, which are read soon. Rows that
    /// there are not are nobody's mistake.
    pub(super) fn prefetch(&self, row: usize, col: usize, len: usize) {
        const LINE: usize = 64;
        if row < self.rows {
            self.parts(row, col, len, |base, range| {
                let lines = (0..range.len() * self.dtype.size()).step_by(LINE);
                lines.for_each(|at| simd::prefetch(base.as_ptr().wrapping_add(at)));
            });
        }
    }

    /// `base` is in the weight, and so are the `len` elements from there.
    fn read_part(&self, base: NonNull<u8>, len: usize, out: &mut [f32], piece: usize, step: usize) {
        let Some(last) = len.checked_sub(1) else { return };
        let end = (last / piece).checked_mul(step).and_then(|at| at.checked_add(last % piece));
        assert!(end.is_some_and(|end| end < out.len()), "{len} elements in pieces of {piece} outside {}", out.len());
        #[cfg(target_arch = "x86_64")]
        if self.dtype == Dtype::BF16 && is_x86_feature_detected!("avx2") {
            // SAFETY: avx2 was detected; the caller's range; `out` holds the last element of the last piece, as asserted.
            return unsafe { widen_avx2(base, len, out.as_mut_ptr(), piece, step) };
        }
        for (i, first) in (0..len).step_by(piece).enumerate() {
            // SAFETY: first < len.
            let base = unsafe { base.add(first * self.dtype.size()) };
            self.widen(base, &mut out[i * step..][..piece.min(len - first)]);
        }
    }

    /// `base` is in the weight, and so are the elements of `out` from there.
    fn widen(&self, base: NonNull<u8>, out: &mut [f32]) {
        if self.dtype == Dtype::F32 {
            // SAFETY: the caller's range; f32 is 4 bytes without padding.
            unsafe { load::<u32>(base, bits_mut(out)) };
            return;
        }
        let mut raw = [0u16; CHUNK];
        for (i, chunk) in out.chunks_mut(CHUNK).enumerate() {
            let raw = &mut raw[..chunk.len()];
            // SAFETY: the caller's range, of which this is a part.
            unsafe { load::<u16>(base.add(i * CHUNK * 2), raw) };
            match self.dtype {
                Dtype::BF16 => chunk.iter_mut().zip(&*raw).for_each(|(o, &b)| *o = f32::from_bits((b as u32) << 16)),
                _ => half::slice::HalfBitsSliceExt::reinterpret_cast::<half::f16>(&*raw).convert_to_f32_slice(chunk),
            }
        }
    }

    /// Elements of row `row` from column `col` on become (w - factor·u)·keep, rounded as in [`Weight::write`].
    pub(super) fn subtract(&self, row: usize, col: usize, u: &[f32], factor: f32, keep: f32, stream: &Stream) {
        let first = (row * self.cols + col) as u64;
        self.parts(row, col, u.len(), |base, range| {
            let (first, u) = (first + range.start as u64, &u[range]);
            if self.dtype == Dtype::BF16 {
                // SAFETY: the range is in the weight.
                return unsafe { subtract_bf16(base, first, u, factor, keep, stream) };
            }
            for (i, u) in u.chunks(CHUNK).enumerate() {
                // SAFETY: a part of the range.
                let (base, first) = (unsafe { base.add(i * CHUNK * self.dtype.size()) }, first + (i * CHUNK) as u64);
                let (mut values, n) = ([0.0; CHUNK], u.len());
                let values = &mut values[..n];
                self.read_part(base, n, values, n, n);
                subtract(values, u, factor, keep);
                self.write_part(base, first, values, stream);
            }
        });
    }

    /// Writes `values` into row `row` from column `col` on. 16-bit elements are rounded
    /// stochastically: up with the probability of the share that is cut off, so that the expected
    /// value is the f32 value. The random number of an element depends on `stream` and its index alone.
    pub fn write(&self, row: usize, col: usize, values: &[f32], stream: &Stream) {
        let first = (row * self.cols + col) as u64;
        self.parts(row, col, values.len(), |base, range| {
            self.write_part(base, first + range.start as u64, &values[range], stream);
        });
    }

    /// `base` is in the weight, and so are the elements of `values` from there; the first is element `first`.
    fn write_part(&self, base: NonNull<u8>, first: u64, values: &[f32], stream: &Stream) {
        if self.dtype == Dtype::F32 {
            // SAFETY: the caller's range.
            unsafe { store::<u32>(base, bits(values)) };
            return;
        }
        let (mut raw, mut random) = ([0u16; CHUNK], [0u16; CHUNK]);
        for (i, chunk) in values.chunks(CHUNK).enumerate() {
            let (raw, random) = (&mut raw[..chunk.len()], &mut random[..chunk.len()]);
            let first = first + (i * CHUNK) as u64;
            if self.dtype == Dtype::BF16 {
                round_bf16(chunk, first, stream, raw);
            } else {
                stream.fill_u16(first, random);
                round_f16(chunk, random, raw);
            }
            // SAFETY: the caller's range, of which this is a part.
            unsafe { store::<u16>(base.add(i * CHUNK * 2), raw) };
        }
    }
}

fn bits(values: &[f32]) -> &[u32] {
    // SAFETY: f32 and u32 have the same size and alignment and every bit pattern is valid.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}
fn bits_mut(values: &mut [f32]) -> &mut [u32] {
    // SAFETY: as in `bits`.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}

multiversion! {
    fn subtract(w: &mut [f32], u: &[f32], factor: f32, keep: f32) {
        for (w, &u) in w.iter_mut().zip(u) {
            *w = (*w - factor * u) * keep;
        }
    }
}

/// [`Weight::subtract`] of bf16 elements, of which the first is element `first`: what a step does to most of a model, in one pass
/// over registers.
///
/// # Safety
/// `base` is valid for reads and writes of `u.len()` elements and aligned to them.
unsafe fn subtract_bf16(base: NonNull<u8>, first: u64, u: &[f32], factor: f32, keep: f32, stream: &Stream) {
    let mut at = 0;
    while at < u.len() {
        let first = first + at as u64;
        // SAFETY: at < u.len().
        let base = unsafe { base.cast::<u16>().add(at) };
        #[cfg(target_arch = "x86_64")]
        if let Some(u) = u[at..].first_chunk()
            && first.is_multiple_of(GROUP as u64)
            && simd::has_avx512()
        {
            // SAFETY: a part of the caller's range; the features were detected.
            unsafe { avx512::subtract(base.as_ptr(), u, factor, keep, stream.group(first / GROUP as u64)) };
            at += u.len();
            continue;
        }
        // To the next group at most.
        let most = GROUP - (first % GROUP as u64) as usize;
        let u = &u[at..u.len().min(at + most)];
        let (mut raw, mut random) = ([0u16; GROUP], [0u16; GROUP]);
        let (raw, random) = (&mut raw[..u.len()], &mut random[..u.len()]);
        // SAFETY: a part of the caller's range.
        unsafe { load::<u16>(base.cast(), raw) };
        stream.fill_u16(first, random);
        subtract_rounded(raw, u, factor, keep, random);
        // SAFETY: as above.
        unsafe { store::<u16>(base.cast(), raw) };
        at += u.len();
    }
}

multiversion! {
    fn subtract_rounded(w: &mut [u16], u: &[f32], factor: f32, keep: f32, random: &[u16]) {
        for ((w, &u), &r) in w.iter_mut().zip(u).zip(random) {
            *w = rounded_bf16((f32::from_bits((*w as u32) << 16) - factor * u) * keep, r);
        }
    }
}

/// f16 has 13 fewer bits of mantissa than f32 and denser subnormals: round between the two
/// neighbours of the value on the f16 grid.
fn round_f16(values: &[f32], random: &[u16], out: &mut [u16]) {
    for ((o, &v), &r) in out.iter_mut().zip(values).zip(random) {
        let magnitude = v.abs().min(65504.0);
        let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-14);
        // 2^(exponent - 10), the distance of neighbours at this magnitude; exact in f32.
        let ulp = f32::from_bits(((exponent - 10 + 127) as u32) << 23);
        let below = (magnitude / ulp).floor();
        let share = magnitude / ulp - below;
        let up = share * 65536.0 > r as f32;
        let rounded = ((below + up as u32 as f32) * ulp).min(65504.0);
        *o = half::f16::from_f32(rounded.copysign(v)).to_bits();
    }
}

/// An element of foreign memory.
trait Element: Copy {
    /// # Safety
    /// `at` is valid and aligned.
    unsafe fn load(at: NonNull<Self>) -> Self;
    /// # Safety
    /// `at` is valid and aligned.
    unsafe fn store(at: NonNull<Self>, value: Self);
}
impl Element for u16 {
    unsafe fn load(at: NonNull<u16>) -> u16 {
        // SAFETY: the caller's promise.
        unsafe { AtomicU16::from_ptr(at.as_ptr()) }.load(Relaxed)
    }
    unsafe fn store(at: NonNull<u16>, value: u16) {
        // SAFETY: the caller's promise.
        unsafe { AtomicU16::from_ptr(at.as_ptr()) }.store(value, Relaxed)
    }
}
impl Element for u32 {
    unsafe fn load(at: NonNull<u32>) -> u32 {
        // SAFETY: the caller's promise.
        unsafe { AtomicU32::from_ptr(at.as_ptr()) }.load(Relaxed)
    }
    unsafe fn store(at: NonNull<u32>, value: u32) {
        // SAFETY: the caller's promise.
        unsafe { AtomicU32::from_ptr(at.as_ptr()) }.store(value, Relaxed)
    }
}

/// Copies foreign elements into `out`.
///
/// # Safety
/// `src` is valid for reads of `out.len()` elements and aligned to them.
unsafe fn load<T: Element>(src: NonNull<u8>, out: &mut [T]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: avx2 was detected; both ranges hold out.len() elements.
        done = unsafe { copy_avx2(src.as_ptr(), out.as_mut_ptr().cast(), size_of_val(out)) } / size_of::<T>();
    }
    for (i, o) in out.iter_mut().enumerate().skip(done) {
        // SAFETY: i < out.len().
        *o = unsafe { T::load(src.cast::<T>().add(i)) };
    }
}

/// Copies `values` into foreign memory.
///
/// # Safety
/// `dst` is valid for writes of `values.len()` elements and aligned to them.
unsafe fn store<T: Element>(dst: NonNull<u8>, values: &[T]) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: avx2 was detected; both ranges hold values.len() elements.
        done = unsafe { copy_avx2(values.as_ptr().cast(), dst.as_ptr(), size_of_val(values)) } / size_of::<T>();
    }
    for (i, &v) in values.iter().enumerate().skip(done) {
        // SAFETY: i < values.len().
        unsafe { T::store(dst.cast::<T>().add(i), v) };
    }
}

/// Widens `len` bf16 elements, in pieces of `piece` that begin `step` apart in `out`.
///
/// # Safety
/// `src` is valid for reads of `len` elements and aligned to them, `out` for writes of the pieces; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn widen_avx2(src: NonNull<u8>, len: usize, mut out: *mut f32, piece: usize, step: usize) {
    use std::arch::x86_64::*;
    const N: usize = 8;
    let src = src.cast::<u16>();
    let mut first = 0;
    while first < len {
        let n = piece.min(len - first);
        // SAFETY: first + i + N <= first + n <= len; out points to a piece of n.
        unsafe {
            let mut i = 0;
            while i + N <= n {
                let raw = _mm_loadu_si128(src.add(first + i).as_ptr().cast::<__m128i>());
                let wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
                _mm256_storeu_ps(out.add(i), _mm256_castsi256_ps(wide));
                i += N;
            }
            while i < n {
                *out.add(i) = f32::from_bits((u16::load(src.add(first + i)) as u32) << 16);
                i += 1;
            }
        }
        first += n;
        out = out.wrapping_add(step);
    }
}

/// Copies the whole 32-byte pieces of `len` bytes and returns how many bytes that were.
///
/// # Safety
/// Both ranges are valid for `len` bytes; the processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_avx2(src: *const u8, dst: *mut u8, len: usize) -> usize {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_storeu_si256};
    let whole = len / 32 * 32;
    let mut at = 0;
    while at < whole {
        // SAFETY: at + 32 <= whole <= len.
        unsafe {
            let v = _mm256_loadu_si256(src.add(at).cast::<__m256i>());
            _mm256_storeu_si256(dst.add(at).cast::<__m256i>(), v);
        }
        at += 32;
    }
    whole
}

#[cfg(test)]
mod tests;
