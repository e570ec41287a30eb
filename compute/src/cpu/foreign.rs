//! Weights in memory that an inference server owns: read where they lie, written in place.
//!
//! Another process reads these bytes while we write them (HOGWILD). Rust has no data race there as
//! long as we touch them by atomics, vector intrinsics or raw copies that the compiler cannot assume
//! anything about; that is what [`load`], [`store`] and `widen_avx2` are for, and nothing else in this crate
//! dereferences a foreign pointer. An element is written whole: a reader sees its old or its new
//! value, never half of each (naturally aligned stores of 2 and 4 bytes, and vector stores, which
//! x86 and Arm split at element boundaries at worst).

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::kernel::{Ahead, Rows};
use super::simd::{self, multiversion};
use super::stored::{round_bf16, rounded_bf16};
use crate::random::{GROUP, LANES};
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

    /// Rows `row..row + rows` of a bf16 matrix as they lie, two elements in the place of each f32, if they lie one after the other.
    pub(super) fn rows_of_pairs(&self, row: usize, rows: usize) -> Option<Rows<'_>> {
        assert!(self.dtype == Dtype::BF16 && self.rows > 1, "pairs are those of a bf16 matrix");
        assert!(row <= self.rows && rows <= self.rows - row, "{row}+{rows} outside {} rows", self.rows);
        (self.order == RowOrder::AsFiles && self.cols.is_multiple_of(2)).then(|| {
            // SAFETY: these rows are in the memory promised to `new` as long as self lives.
            unsafe { Rows::foreign(self.data.add(row * self.cols * 2).as_ptr().cast(), rows, self.cols / 2) }
        })
    }

    /// Row `row` of a bf16 matrix from column `col` on as it lies, two elements in the place of each f32.
    pub(super) fn read_pairs(&self, row: usize, col: usize, out: &mut [f32]) {
        assert!(self.dtype == Dtype::BF16 && self.rows > 1, "pairs are those of a bf16 matrix");
        self.parts(row, col, 2 * out.len(), |base, _| {
            // SAFETY: f32 holds two u16 without padding.
            let halves = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), 2 * out.len()) };
            // SAFETY: `parts` gives a whole row's range for a matrix.
            unsafe { load::<u16>(base, halves) };
        });
    }

    /// `len` elements of rows `row` and `row + 1` of a bf16 matrix from column `col` on, the two of a column in the place of one
    /// f32, the first in its lower half; in pieces as of [`Weight::read_pieces`].
    pub(super) fn read_pairs_of_rows(
        &self,
        row: usize,
        col: usize,
        len: usize,
        out: &mut [f32],
        piece: usize,
        step: usize,
    ) {
        assert!(self.dtype == Dtype::BF16 && self.rows > 1, "pairs are those of a bf16 matrix");
        assert!((1..=CHUNK).contains(&piece), "pieces of {piece}, not of 1 to {CHUNK}");
        let whole = self.interleave_pieces(row, col, len, out, piece, step);
        let (col, len) = (col + whole * piece, len - whole * piece);
        let out = if len > 0 { &mut out[whole * step..] } else { return };
        let (mut first, mut second) = ([0u16; CHUNK], [0u16; CHUNK]);
        // Whole pieces at a time.
        let most = CHUNK / piece * piece;
        for at in (0..len).step_by(most) {
            let n = most.min(len - at);
            for (row, half) in [(row, &mut first), (row + 1, &mut second)] {
                // SAFETY: `parts` gives a whole row's range for a matrix.
                self.parts(row, col + at, n, |base, _| unsafe { load::<u16>(base, &mut half[..n]) });
            }
            let pieces = first[..n].chunks(piece).zip(second[..n].chunks(piece));
            for (i, (first, second)) in pieces.enumerate() {
                interleave(first, second, &mut out[(at / piece + i) * step..][..first.len()]);
            }
        }
    }

    /// The whole pieces of [`Weight::read_pairs_of_rows`] that AVX-512 interleaves at once; how many they were.
    fn interleave_pieces(
        &self,
        row: usize,
        col: usize,
        len: usize,
        out: &mut [f32],
        piece: usize,
        step: usize,
    ) -> usize {
        #[cfg(target_arch = "x86_64")]
        if piece == 2 * LANES && len >= piece && simd::has_avx512() {
            let pieces = len / piece;
            assert!(
                (pieces - 1) * step + piece <= out.len(),
                "{pieces} pieces of {piece}, {step} apart, outside {}",
                out.len()
            );
            let mut rows = [std::ptr::null(); 2];
            for (i, at) in rows.iter_mut().enumerate() {
                self.parts(row + i, col, len, |base, _| *at = base.as_ptr().cast_const().cast::<u16>());
            }
            for i in 0..pieces {
                // SAFETY: `parts` gives a whole row's range for a matrix, of which this is a part, and the piece is in `out`, as
                // asserted; the features were detected.
                unsafe {
                    avx512::interleave(rows[0].add(i * piece), rows[1].add(i * piece), out.as_mut_ptr().add(i * step));
                }
            }
            return pieces;
        }
        0
    }

    /// Asks for the cache lines of `len` elements of row `row` from column `col` on, which are read soon. Rows that
    /// there are not are nobody's mistake.
    pub(super) fn prefetch(&self, row: usize, col: usize, len: usize) {
        #[cfg(target_arch = "x86_64")]
        if row < self.rows {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            const LINE: usize = 64;
            self.parts(row, col, len, |base, range| {
                for at in (0..range.len() * self.dtype.size()).step_by(LINE) {
                    // SAFETY: a prefetch never faults, and this address is in the weight.
                    unsafe { _mm_prefetch(base.as_ptr().add(at).cast::<i8>(), _MM_HINT_T1) };
                }
            });
        }
    }

    /// Asks for rows `row..` from column `col` on, a line of each.
    pub(super) fn ahead(&self, row: usize, col: usize) -> Ahead {
        let at = |row: usize| row * self.cols * self.dtype.size();
        let address = self.data.as_ptr().wrapping_add(at(row) + col * self.dtype.size());
        Ahead { address, of_row: 0, of_column: self.dtype.size(), step: at(1) }
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
    fn interleave(first: &[u16], second: &[u16], out: &mut [f32]) {
        for ((o, &a), &b) in out.iter_mut().zip(first).zip(second) {
            *o = f32::from_bits(a as u32 | (b as u32) << 16);
        }
    }
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
mod tests {
    use super::*;

    #[test]
    fn a_value_on_the_grid_survives_a_write_and_a_read() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let w = Weight::zeros(dtype, 3, 1037);
            let values: Vec<f32> = (0..1037).map(|i| (i as f32 % 64.0 - 32.0) / 8.0).collect();
            w.write(1, 0, &values, &Stream::rounding(1, 2, 3));
            let mut back = vec![0.0; 1037];
            w.read(1, 0, &mut back);
            assert_eq!(back, values, "{dtype}");
            w.read(2, 0, &mut back);
            assert!(back.iter().all(|&v| v == 0.0), "{dtype}: a neighbouring row was written");
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased() {
        // n draws of one value: the mean's standard error is at most ulp / (2 sqrt n).
        let n = 1 << 16;
        let subnormal_f16 = 3.3e-6;
        for (dtype, mantissa) in [(Dtype::BF16, 7), (Dtype::F16, 10)] {
            for value in [1.001_f32, -3.3337, 0.1, 1e-3, -1.0 - 1e-4, subnormal_f16] {
                let w = Weight::zeros(dtype, 1, n);
                w.write(0, 0, &vec![value; n], &Stream::rounding(99, 5, 1));
                let mut back = vec![0.0; n];
                w.read(0, 0, &mut back);
                let mean = back.iter().map(|&v| v as f64).sum::<f64>() / n as f64;
                let floor = if dtype == Dtype::F16 { -14.0 } else { -126.0 };
                let ulp = 2f64.powf((value.abs() as f64).log2().floor().max(floor) - mantissa as f64);
                let error = (mean - value as f64).abs() / ulp;
                println!("{dtype} {value}: mean of {n} writes off by {error:.1e} ulp");
                assert!(error < 5.0 * 0.5 / (n as f64).sqrt(), "{dtype} {value}: off by {error} ulp");
                let mut kinds = back.clone();
                kinds.sort_by(f32::total_cmp);
                kinds.dedup();
                assert_eq!(kinds.len(), 2, "{dtype} {value} became {kinds:?}");
            }
        }
    }

    #[test]
    fn a_finite_value_never_rounds_to_infinity() {
        for (dtype, largest) in [(Dtype::BF16, 3.3895314e38_f32), (Dtype::F16, 65504.0)] {
            let w = Weight::zeros(dtype, 1, 128);
            w.write(0, 0, &[f32::MAX; 128], &Stream::rounding(1, 1, 1));
            let mut back = [0.0; 128];
            w.read(0, 0, &mut back);
            assert!(back.iter().all(|&v| v == largest), "{dtype}: {back:?}");
        }
    }

    #[test]
    fn pieces_are_those_of_the_row_and_nothing_beside_them_is_written() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let w = Weight::zeros(dtype, 3, 101);
            let values: Vec<f32> = (0..101).map(|i| i as f32 - 50.0).collect();
            w.write(1, 0, &values, &Stream::rounding(1, 2, 3));
            for (col, len, piece, step) in
                [(0, 101, 16, 16), (3, 90, 16, 21), (5, 32, 32, 40), (7, 1, 8, 9), (0, 50, 7, 11)]
            {
                // Not one element more than is needed.
                let mut out = vec![f32::NAN; (len - 1) / piece * step + (len - 1) % piece + 1];
                w.read_pieces(1, col, len, &mut out, piece, step);
                for (i, v) in out.iter().enumerate() {
                    match (i / step * piece + i % step, i % step < piece) {
                        (at, true) => assert_eq!(*v, values[col + at], "{dtype} ({col},{len},{piece},{step}) at {i}"),
                        (_, false) => assert!(v.is_nan(), "{dtype} ({col},{len},{piece},{step}): wrote {i}"),
                    }
                }
            }
        }
    }

    #[test]
    fn pairs_of_rows_are_those_of_the_two_rows_and_nothing_beside_them_is_written() {
        let w = Weight::zeros(Dtype::BF16, 3, 701);
        let stream = Stream::rounding(1, 2, 3);
        // On the grid of bf16, so that rounding changes nothing.
        let row = |sign: f32| (0..701).map(|i| sign * (i % 128) as f32).collect::<Vec<f32>>();
        let rows = [row(1.0), row(-1.0)];
        rows.iter().enumerate().for_each(|(i, values)| w.write(1 + i, 0, values, &stream));
        for (col, len, piece, step) in [
            (0, 701, 32, 40),
            (1, 96, 32, 32),
            (4, 31, 32, 40),
            (3, 600, 48, 48),
            (5, 7, 16, 21),
            (1, 300, 256, 300),
            (0, 9, 1, 2),
        ] {
            let mut out = vec![f32::NAN; (len - 1) / piece * step + (len - 1) % piece + 1];
            w.read_pairs_of_rows(1, col, len, &mut out, piece, step);
            for (i, pair) in out.iter().enumerate() {
                let halves = [pair.to_bits() << 16, pair.to_bits() & 0xFFFF_0000].map(f32::from_bits);
                match (i / step * piece + i % step, i % step < piece) {
                    (at, true) => {
                        assert_eq!(halves, [rows[0][col + at], rows[1][col + at]], "({col},{len},{piece}) at {i}")
                    }
                    (_, false) => assert!(pair.is_nan(), "({col},{len},{piece}): wrote {i}"),
                }
            }
        }
    }

    #[test]
    fn a_step_of_many_elements_is_that_of_each() {
        const ROWS: usize = 3;
        const COLS: usize = 1301;
        let (stream, factor, keep) = (Stream::rounding(3, 5, 7), 0.37, 0.99);
        let start: Vec<f32> = (0..ROWS * COLS).map(|i| (i % 251) as f32 - 125.0).collect();
        let u: Vec<f32> = (0..COLS).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        // Row 1 begins at element 1301: the first whole group of random numbers is that from its element 107 on.
        for (col, len) in [(0, COLS), (107, 256), (107, 1000), (106, 700), (235, 255), (3, 1), (1300, 1), (50, 0)] {
            let w = Weight::from_values(Dtype::BF16, ROWS, COLS, &start);
            w.subtract(1, col, &u[..len], factor, keep, &stream);
            let mut want = start.clone();
            let mut random = vec![0; ROWS * COLS];
            stream.fill_u16(0, &mut random);
            for (at, u) in (COLS + col..).zip(&u[..len]) {
                let rounded = rounded_bf16((want[at] - factor * u) * keep, random[at]);
                want[at] = f32::from_bits((rounded as u32) << 16);
            }
            assert_eq!(w.values(), want, "{len} elements from {col} on");
        }
    }

    #[test]
    fn a_step_of_what_is_no_number_leaves_what_each_would() {
        let values = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, -0.0, 1e-45, 1.0];
        let u: Vec<f32> = (0..512).map(|i| values[i % values.len()]).collect();
        let stream = Stream::rounding(3, 5, 7);
        let mut random = [0; 512];
        stream.fill_u16(0, &mut random);
        for factor in [0.0, 1.0, -1.0] {
            let w = Weight::from_values(Dtype::BF16, 1, 512, &[1.0; 512]);
            w.subtract(0, 0, &u, factor, 1.0, &stream);
            for (i, v) in w.values().iter().enumerate() {
                let want = (rounded_bf16(1.0 - factor * u[i], random[i]) as u32) << 16;
                assert_eq!(v.to_bits(), want, "1 - {factor}·{} at {i}", u[i]);
            }
        }
    }

    #[test]
    fn rows_of_pairs_are_those_that_the_files_have() {
        let values: Vec<f32> = (0..12 * 6).map(|i| i as f32).collect();
        let even = Weight::from_values(Dtype::BF16, 12, 6, &values);
        assert!(even.rows_of_pairs(2, 10).is_some() && even.rows_of_pairs(12, 0).is_some());
        let odd = Weight::from_values(Dtype::BF16, 24, 3, &values);
        assert!(odd.rows_of_pairs(0, 24).is_none(), "a pair would lie across two rows");
        let mixed = Weight::zeros(Dtype::BF16, 12, 6).ordered(RowOrder::Interleaved { head_dim: 4 });
        assert!(mixed.rows_of_pairs(0, 12).is_none(), "the rows lie in another order");
    }

    #[test]
    #[should_panic(expected = "2+11 outside 12 rows")]
    fn rows_of_pairs_beyond_the_last_are_refused() {
        Weight::zeros(Dtype::BF16, 12, 6).rows_of_pairs(2, 11);
    }

    #[test]
    #[should_panic(expected = "outside 31")]
    fn pieces_that_do_not_fit_are_refused() {
        Weight::zeros(Dtype::BF16, 2, 64).read_pieces(0, 0, 32, &mut [0.0; 31], 16, 16);
    }

    #[test]
    #[should_panic(expected = "outside (2,8)")]
    fn a_place_that_no_sum_can_hold_is_refused() {
        Weight::zeros(Dtype::F32, 2, 8).read(0, usize::MAX, &mut [0.0; 1]);
    }

    #[test]
    #[should_panic(expected = "outside (2,8)")]
    fn a_write_outside_the_tensor_is_refused() {
        Weight::zeros(Dtype::F32, 2, 8).write(1, 4, &[0.0; 5], &Stream::rounding(1, 1, 1));
    }
}
