//! C (M,N) += A (M,K) · B (K,N) in f32, one tile of C in registers at a time.
//!
//! A lies row by row; B is packed into panels, in which the columns of one tile lie together for each k. A tile has up to
//! [`ROWS`] rows and two vectors of columns: 12 sums, 2 vectors of B and one element of A broadcast fill the 16
//! registers of AVX2, and 8 loads feed 12 multiply-adds, so that the multipliers are what limits it (Goto and van de Geijn,
//! "Anatomy of high-performance matrix multiplication", ACM TOMS 2008; Van Zee and van de Geijn, "BLIS", ACM TOMS 2015).
//! Unlike the `gemm` crate it packs nothing by itself: whoever reads a foreign weight widens it into the layout that is
//! wanted here, and packs what several products share once.
//!
//! Every element of C is one chain of fused multiply-adds in the order of k that starts from what C holds: its bits do not
//! depend on how a product is cut into blocks, nor on the width of the vectors. On x86 without AVX2 they differ: nothing is fused there.
//!
//! Where the processor has dot products of bf16 (VDPBF16PS), the same tiles multiply pairs: an element of A and of B then is
//! two bf16, of neighbouring k, in the place of one f32, and a multiply-add is two. C is f32; its chains go by pairs.

use super::gemm::Shared;
use super::stored::round_to_pairs_of;
use super::{Buffer, simd};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of a tile.
pub const ROWS: usize = 6;

/// A vector of f32.
///
/// # Safety
/// Each function reads or writes what its text says and nothing else.
unsafe trait Lanes: Copy {
    /// Elements.
    const N: usize;
    /// N elements.
    ///
    /// # Safety
    /// The processor has the features of the vector, as for all of these; `from` is valid for reads of N elements.
    unsafe fn load(from: *const f32) -> Self;
    /// One element N times.
    ///
    /// # Safety
    /// `from` is valid for a read of one element, of any alignment.
    unsafe fn splat(from: *const f32) -> Self;
    /// self·b + c.
    ///
    /// # Safety
    /// The processor has the features of the vector.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Writes N elements.
    ///
    /// # Safety
    /// `to` is valid for writes of N elements.
    unsafe fn store(self, to: *mut f32);
}

/// For processors without AVX2.
#[derive(Clone, Copy)]
struct Portable([f32; 8]);

// SAFETY: ordinary loads and stores of 8 elements.
unsafe impl Lanes for Portable {
    const N: usize = 8;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Portable(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Portable([unsafe { from.read_unaligned() }; 8])
    }
    // SAFETY: nothing is asked of the caller: it computes on values.
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        let fused = cfg!(target_arch = "aarch64");
        Portable(std::array::from_fn(|i| match fused {
            true => self.0[i].mul_add(b.0[i], c.0[i]),
            false => self.0[i] * b.0[i] + c.0[i],
        }))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
}

/// Pairs of bf16 for any processor: for tests of what multiplies them.
#[derive(Clone, Copy)]
struct PortablePairs(Portable);

// SAFETY: loads and stores as of Portable.
unsafe impl Lanes for PortablePairs {
    const N: usize = Portable::N;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        PortablePairs(unsafe { Portable::load(from) })
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        PortablePairs(unsafe { Portable::splat(from) })
    }
    // SAFETY: nothing is asked of the caller: it computes on values.
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        let upper = |v: f32| f32::from_bits(v.to_bits() & 0xFFFF_0000);
        let lower = |v: f32| f32::from_bits(v.to_bits() << 16);
        let (a, b, c) = (self.0.0, b.0.0, c.0.0);
        // A product of two bf16 is exact in f32. The processor begins with the upper halves.
        let sum = |i: usize| c[i] + upper(a[i]) * upper(b[i]) + lower(a[i]) * lower(b[i]);
        PortablePairs(Portable(std::array::from_fn(sum)))
    }
    // SAFETY: what is asked of the caller is what Portable asks: `to` is valid for writes of N elements.
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.0.store(to) }
    }
}

/// A vector of x86 by its intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! x86_lanes {
    ($vector:ident, $n:literal, $load:ident, $splat:ident, $mul_add:ident, $store:ident) => {
        use std::arch::x86_64::{$load, $mul_add, $splat, $store, $vector};
        // SAFETY: the intrinsics read and write as many elements as they are called for.
        unsafe impl Lanes for $vector {
            const N: usize = $n;
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: the caller's promise.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn splat(from: *const f32) -> Self {
                // SAFETY: the caller's promise.
                unsafe { $splat(from.read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                // SAFETY: the caller's promise.
                unsafe { $mul_add(self, b, c) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: the caller's promise.
                unsafe { $store(to, self) }
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
x86_lanes!(__m256, 8, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_storeu_ps);
#[cfg(target_arch = "x86_64")]
x86_lanes!(__m512, 16, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_storeu_ps);

/// 16 sums of products of bf16, of which an element of A and of B holds two: the lower half that of the even k.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Pairs(__m512);

// SAFETY: loads and stores as of __m512; the dot product computes on values.
#[cfg(target_arch = "x86_64")]
unsafe impl Lanes for Pairs {
    const N: usize = 16;
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Pairs(unsafe { __m512::load(from) })
    }
    #[inline(always)]
    unsafe fn splat(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        Pairs(unsafe { __m512::splat(from) })
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        use std::arch::x86_64::{__m512bh, _mm512_dpbf16_ps};
        use std::mem::transmute;
        // SAFETY: the caller's promise; both types are 64 bytes of anything.
        Pairs(unsafe {
            _mm512_dpbf16_ps(c.0, transmute::<__m512, __m512bh>(self.0), transmute::<__m512, __m512bh>(b.0))
        })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.0.store(to) }
    }
}

/// Which vectors this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// Arrays of 8.
    Portable,
    /// AVX2 with fused multiply-add: 8.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512: 16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with dot products of bf16: 16 sums; elements of A and B are pairs.
    #[cfg(target_arch = "x86_64")]
    Bf16Pairs,
    /// The same on arrays of 8.
    PortablePairs,
}

impl Vectors {
    /// The widest.
    pub fn best() -> Vectors {
        #[cfg(target_arch = "x86_64")]
        {
            if simd::has_avx512() {
                return Vectors::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Vectors::Avx2;
            }
        }
        Vectors::Portable
    }

    /// Those that multiply pairs of bf16, if there are any: twice as fast as the others.
    pub fn of_pairs() -> Option<Vectors> {
        #[cfg(target_arch = "x86_64")]
        if simd::has_avx512() && is_x86_feature_detected!("avx512bf16") {
            return Some(Vectors::Bf16Pairs);
        }
        None
    }

    /// Elements of one vector.
    pub fn lanes(self) -> usize {
        match self {
            Vectors::Portable => Portable::N,
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2 => __m256::N,
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => __m512::N,
            #[cfg(target_arch = "x86_64")]
            Vectors::Bf16Pairs => Pairs::N,
            Vectors::PortablePairs => PortablePairs::N,
        }
    }
}

/// The layout of B (k, columns) in panels of [`Panels::width`] columns: panel j holds its columns for k = 0, for k = 1 and so
/// on. The last one holds anything in the columns that there are not.
#[derive(Clone, Copy, Debug)]
pub struct Panels {
    vectors: Vectors,
    /// Rows of B.
    pub k: usize,
    /// Columns of B.
    pub columns: usize,
}

impl Panels {
    /// For this processor.
    pub fn new(k: usize, columns: usize) -> Panels {
        Panels { vectors: Vectors::best(), k, columns }
    }

    /// For products of pairs of bf16: `k` counts pairs, and elements are f32 in name only.
    pub fn of_pairs(vectors: Vectors, k: usize, columns: usize) -> Panels {
        Panels { vectors, k, columns }
    }

    /// The same for so many columns, whose panels may be some of these.
    pub fn with_columns(self, columns: usize) -> Panels {
        Panels { columns, ..self }
    }

    /// The same for so many rows and columns of B.
    pub fn part(self, k: usize, columns: usize) -> Panels {
        Panels { k, columns, ..self }
    }

    /// Columns of a panel.
    pub fn width(&self) -> usize {
        2 * self.vectors.lanes()
    }

    /// Elements of a panel: element (k, j) of B is element k·width + j % width of panel j / width.
    pub fn step(&self) -> usize {
        self.k * self.width()
    }

    /// Elements of all panels.
    pub fn len(&self) -> usize {
        self.columns.div_ceil(self.width()) * self.step()
    }

    /// The same with the columns that fill up the last vector: for who has room for them in C, and reads none.
    pub fn padded(self) -> Panels {
        self.with_columns(self.columns.next_multiple_of(self.vectors.lanes()))
    }

    /// Packs B, given as its rows.
    pub fn of_rows(&self, b: &[f32]) -> Buffer {
        assert!(b.len() >= self.k * self.columns);
        let (width, columns) = (self.width(), self.columns);
        self.packed(|panel, first| {
            let n = width.min(columns - first);
            panel.chunks_exact_mut(width).zip(b[first..].chunks(columns)).for_each(|(line, b)| copy(line, &b[..n]));
        })
    }

    /// Packs B, given as its columns, which lie `stride` apart.
    pub fn of_columns(&self, b: &[f32], stride: usize) -> Buffer {
        let (width, columns) = (self.width(), self.columns);
        self.packed(|panel, first| {
            let n = width.min(columns - first);
            simd::transpose(&b[first * stride..], n, self.k, stride, panel, width);
        })
    }

    /// Packs pairs: element (k, j) is made of rows 2k and 2k + 1 of `b`, of which the last may be missing and then counts as 0.
    pub fn of_pairs_of_rows(&self, b: &[f32]) -> Buffer {
        assert!(b.len() > (2 * self.k).saturating_sub(2) * self.columns || self.len() == 0);
        let (width, columns) = (self.width(), self.columns);
        self.packed(|panel, first| {
            let n = width.min(columns - first);
            for (line, rows) in panel.chunks_exact_mut(width).zip(b.chunks(2 * columns)) {
                let zeros = [0.0; 2 * MOST_LANES];
                let second = if rows.len() > columns { &rows[columns + first..][..n] } else { &zeros[..n] };
                round_to_pairs_of(&rows[first..][..n], second, line);
            }
        })
    }

    /// Panels that `pack` fills on all threads, each from its first column on.
    fn packed(&self, pack: impl Fn(&mut [f32], usize) + Sync) -> Buffer {
        let mut packed = Buffer::uninit(self.len());
        let panels = packed.par_chunks_mut(self.step().max(1)).enumerate().with_min_len(1 + ALONE / self.step().max(1));
        panels.for_each(|(j, panel)| pack(panel, j * self.width()));
        packed
    }
}

/// Short slices of often the same length.
#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    match (<&mut [f32; 16]>::try_from(&mut *to), <&[f32; 16]>::try_from(from)) {
        (Ok(to), Ok(from)) => *to = *from,
        _ => to[..from.len()].copy_from_slice(from),
    }
}

/// Lanes of the longest vector.
const MOST_LANES: usize = 16;

/// Elements that are packed faster than another thread is woken.
const ALONE: usize = 1 << 17;

/// Rows of A: `rows` of at least as many elements as are multiplied, `stride` apart.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    data: *const f32,
    len: usize,
    rows: usize,
    stride: usize,
    ahead: Ahead,
    memory: PhantomData<&'a f32>,
}

impl<'a> Rows<'a> {
    /// The first `rows` rows of `data`.
    pub fn new(data: &'a [f32], rows: usize, stride: usize) -> Rows<'a> {
        let ahead = Ahead { address: data.as_ptr().cast(), of_row: 0, of_column: 0, step: 0 };
        Rows { data: data.as_ptr(), len: data.len(), rows, stride, ahead, memory: PhantomData }
    }

    /// Rows one after the other in memory that others may write meanwhile. The next rows are asked for while these are multiplied.
    ///
    /// # Safety
    /// `data` is valid for reads of `rows * stride` elements, of any alignment, for `'a`.
    pub unsafe fn foreign(data: *const f32, rows: usize, stride: usize) -> Rows<'a> {
        // The bytes of the next tile in as many steps as there are of this one, two for each element of a row.
        let ahead = Ahead {
            address: data.wrapping_add(ROWS * stride).cast(),
            of_row: stride * size_of::<f32>(),
            of_column: 0,
            step: ROWS * size_of::<f32>() / 2,
        };
        Rows { data, len: rows * stride, rows, stride, ahead, memory: PhantomData }
    }

    /// The same with other memory that is asked for.
    pub fn asking(self, ahead: Ahead) -> Rows<'a> {
        Rows { ahead, ..self }
    }
}

/// Cache lines that are asked for while a product is computed, because what comes next needs them: two for each k, `step` bytes
/// apart, from an address that depends on the tile. Any address will do.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// For row 0 and column 0.
    pub address: *const u8,
    /// Bytes for each row of A before the tile.
    pub of_row: usize,
    /// Bytes for each column of B before the tile.
    pub of_column: usize,
    /// Bytes from one line to the next.
    pub step: usize,
}

/// The block of C (a.rows, b.columns) at element `at`, rows `stride` apart, gets a · b\[k\] added, or becomes it. The columns of A
/// are those `k` of the rows of B.
///
/// # Safety
/// No other task uses an element of the block meanwhile.
#[allow(clippy::too_many_arguments)]
pub unsafe fn product(
    c: &Shared,
    at: usize,
    stride: usize,
    a: Rows,
    b: Panels,
    packed: &[f32],
    k: Range<usize>,
    accumulate: bool,
) {
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    assert!(k.start <= k.end && k.end <= b.k && packed.len() >= b.len(), "product outside its panels");
    assert!((a.rows - 1) * a.stride + k.len() <= a.len, "product outside its rows");
    let c = c.pointer(at, (a.rows - 1) * stride + b.columns);
    let work = Work { c, stride, a, b, packed, k, accumulate };
    match b.vectors {
        // SAFETY: the block is in `c`, rows and panels hold what is read, as asserted.
        Vectors::Portable => unsafe { work.run::<Portable>() },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Vectors::best` has seen the features.
        Vectors::Avx2 => unsafe { avx2(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Vectors::Avx512 => unsafe { avx512(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Vectors::of_pairs` has seen the features.
        Vectors::Bf16Pairs => unsafe { bf16_pairs(work) },
        // SAFETY: as above.
        Vectors::PortablePairs => unsafe { work.run::<PortablePairs>() },
    }
}

/// # Safety
/// As for [`Work::run`]; the processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(work: Work) {
    // SAFETY: the caller's promise.
    unsafe { work.run::<__m256>() }
}

/// # Safety
/// As for [`Work::run`]; the processor has what [`simd::has_avx512`] looks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512(work: Work) {
    // SAFETY: the caller's promise.
    unsafe { work.run::<__m512>() }
}

/// # Safety
/// As for [`Work::run`]; the processor has what [`Vectors::of_pairs`] looks for.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn bf16_pairs(work: Work) {
    // SAFETY: the caller's promise.
    unsafe { work.run::<Pairs>() }
}

struct Work<'a> {
    c: *mut f32,
    stride: usize,
    a: Rows<'a>,
    b: Panels,
    packed: &'a [f32],
    k: Range<usize>,
    accumulate: bool,
}

/// Most elements of a tile.
const TILE: usize = ROWS * 2 * MOST_LANES;

impl Work<'_> {
    /// # Safety
    /// The processor has what V needs; C, rows and panels hold what [`product`] asserts.
    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let tiles = self.a.rows.div_ceil(ROWS);
        let width = self.b.width();
        for column in (0..self.b.columns).step_by(width) {
            let columns = width.min(self.b.columns - column);
            let panel = self.packed[column / width * self.b.step() + self.k.start * width..].as_ptr();
            for tile in 0..tiles {
                // Tiles of nearly the same number of rows: a single row left over would wait for its own sums.
                let (first, end) = (self.a.rows * tile / tiles, self.a.rows * (tile + 1) / tiles);
                // Inside the rows that `product` has seen.
                let rows = self.a.data.wrapping_add(first * self.a.stride);
                let ask = &self.a.ahead;
                let ahead = ask.address.wrapping_add(first * ask.of_row + column * ask.of_column);
                let block =
                    Block { k: self.k.len(), a: rows, a_stride: self.a.stride, b: panel, ahead, ahead_step: ask.step };
                // SAFETY: the caller's promise: the tile's first element is in C.
                unsafe {
                    let c = self.c.add(first * self.stride + column);
                    if columns.is_multiple_of(V::N) {
                        block.tile::<V>(end - first, columns / V::N, c, self.stride, self.accumulate);
                    } else {
                        self.part::<V>(&block, end - first, columns, c);
                    }
                }
            }
        }
    }

    /// A tile of `n` columns of C, which are no whole vectors, by way of a buffer.
    ///
    /// # Safety
    /// As for [`Work::run`]; c is the tile's first element.
    #[inline(always)]
    unsafe fn part<V: Lanes>(&self, block: &Block, rows: usize, n: usize, c: *mut f32) {
        let (mut whole, vectors) = ([0.0; TILE], n.div_ceil(V::N));
        let width = vectors * V::N;
        for i in 0..if self.accumulate { rows } else { 0 } {
            // SAFETY: these rows of C have n elements here, and n < width.
            unsafe { std::ptr::copy_nonoverlapping(c.add(i * self.stride), whole[i * width..].as_mut_ptr(), n) };
        }
        // SAFETY: the buffer holds ROWS rows of the widest panel.
        unsafe { block.tile::<V>(rows, vectors, whole.as_mut_ptr(), width, self.accumulate) };
        for i in 0..rows {
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(whole[i * width..].as_ptr(), c.add(i * self.stride), n) };
        }
    }
}

/// What the tiles of one panel and one group of rows are made of.
struct Block {
    k: usize,
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    ahead: *const u8,
    ahead_step: usize,
}

impl Block {
    /// # Safety
    /// The processor has what V needs; `rows` rows of A and the panel hold k elements and lines; c holds `rows` rows of so many vectors.
    #[inline(always)]
    unsafe fn tile<V: Lanes>(&self, rows: usize, vectors: usize, c: *mut f32, stride: usize, accumulate: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            match (rows, vectors) {
                (1, 2) => self.sums::<V, 1, 2>(c, stride, accumulate),
                (2, 2) => self.sums::<V, 2, 2>(c, stride, accumulate),
                (3, 2) => self.sums::<V, 3, 2>(c, stride, accumulate),
                (4, 2) => self.sums::<V, 4, 2>(c, stride, accumulate),
                (5, 2) => self.sums::<V, 5, 2>(c, stride, accumulate),
                (6, 2) => self.sums::<V, 6, 2>(c, stride, accumulate),
                (1, 1) => self.sums::<V, 1, 1>(c, stride, accumulate),
                (2, 1) => self.sums::<V, 2, 1>(c, stride, accumulate),
                (3, 1) => self.sums::<V, 3, 1>(c, stride, accumulate),
                (4, 1) => self.sums::<V, 4, 1>(c, stride, accumulate),
                (5, 1) => self.sums::<V, 5, 1>(c, stride, accumulate),
                (6, 1) => self.sums::<V, 6, 1>(c, stride, accumulate),
                _ => unreachable!("a tile has 1 to {ROWS} rows of one or two vectors"),
            }
        }
    }

    /// # Safety
    /// As for [`Block::tile`], with R rows of C vectors.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)] // Indices are what unrolls.
    unsafe fn sums<V: Lanes, const R: usize, const C: usize>(&self, c: *mut f32, stride: usize, accumulate: bool) {
        let zeros = [0f32; MOST_LANES];
        // SAFETY: the caller's promise; `zeros` is as long as the longest vector.
        unsafe {
            let mut sums = [[V::load(zeros.as_ptr()); C]; R];
            if accumulate {
                for i in 0..R {
                    for j in 0..C {
                        sums[i][j] = V::load(c.add(i * stride + j * V::N));
                    }
                }
            }
            let rows: [*const f32; R] = std::array::from_fn(|i| self.a.add(i * self.a_stride));
            let mut ahead = self.ahead;
            for k in 0..self.k {
                for _ in 0..2 {
                    simd::prefetch(ahead);
                    ahead = ahead.wrapping_add(self.ahead_step);
                }
                let line = self.b.add(k * 2 * V::N);
                let columns: [V; C] = std::array::from_fn(|j| V::load(line.add(j * V::N)));
                for i in 0..R {
                    let x = V::splat(rows[i].add(k));
                    for j in 0..C {
                        sums[i][j] = x.mul_add(columns[j], sums[i][j]);
                    }
                }
            }
            for i in 0..R {
                for j in 0..C {
                    sums[i][j].store(c.add(i * stride + j * V::N));
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
