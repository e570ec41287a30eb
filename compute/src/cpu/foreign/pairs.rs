//! Pairs of bf16 in the place of one f32, as `kernel` multiplies them: two neighbours of a row as they lie, or the two of a column.

#[cfg(target_arch = "x86_64")]
use super::super::avx512;
use super::super::kernel::{Ahead, Rows};
use super::super::simd::{self, multiversion};
use super::{CHUNK, Weight, load};
use crate::random::LANES;
use crate::{Dtype, RowOrder};
use std::ptr::NonNull;

impl Weight {
    /// Rows `row..row + rows` of a bf16 matrix as they lie, two elements in the place of each f32, if they lie one after the other.
    pub(in crate::cpu) fn rows_of_pairs(&self, row: usize, rows: usize) -> Option<Rows<'_>> {
        assert!(self.dtype == Dtype::BF16 && self.rows > 1, "pairs are those of a bf16 matrix");
        assert!(row <= self.rows && rows <= self.rows - row, "{row}+{rows} outside {} rows", self.rows);
        (self.order == RowOrder::AsFiles && self.cols.is_multiple_of(2)).then(|| {
            // SAFETY: these rows are in the memory promised to `new` as long as self lives.
            unsafe { Rows::foreign(self.data.add(row * self.cols * 2).as_ptr().cast(), rows, self.cols / 2) }
        })
    }

    /// Row `row` of a bf16 matrix from column `col` on as it lies, two elements in the place of each f32.
    pub(in crate::cpu) fn read_pairs(&self, row: usize, col: usize, out: &mut [f32]) {
        assert!(self.dtype == Dtype::BF16 && self.rows > 1, "pairs are those of a bf16 matrix");
        // SAFETY: f32 holds two u16 without padding.
        let halves = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), 2 * out.len()) };
        // SAFETY: `place` has so many elements of a row.
        unsafe { load::<u16>(self.place(row, col, halves.len()), halves) };
    }

    /// `len` elements of rows `row` and `row + 1` of a bf16 matrix from column `col` on, the two of a column in the place of one
    /// f32, the first in its lower half; in pieces as of [`Weight::read_pieces`].
    pub(in crate::cpu) fn read_pairs_of_rows(
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
        #[cfg(target_arch = "x86_64")]
        let wide = simd::has_avx512();
        let (mut first, mut second) = ([0u16; CHUNK], [0u16; CHUNK]);
        let rows = [row, row + 1].map(|row| self.place(row, col, len).cast::<u16>());
        for (i, at) in (0..len).step_by(piece).enumerate() {
            let out = &mut out[i * step..][..piece.min(len - at)];
            // SAFETY: `place` has `len` elements of each row.
            let [upper, lower] = rows.map(|row| unsafe { row.add(at) });
            #[cfg(target_arch = "x86_64")]
            if wide && out.len() == 2 * LANES {
                // SAFETY: so many elements are there of each row, and of `out`; the features were detected.
                unsafe { avx512::interleave(upper.as_ptr(), lower.as_ptr(), out.as_mut_ptr()) };
                continue;
            }
            let (first, second) = (&mut first[..out.len()], &mut second[..out.len()]);
            // SAFETY: as above.
            unsafe { (load::<u16>(upper.cast(), first), load::<u16>(lower.cast(), second)) };
            interleave(first, second, out);
        }
    }

    /// Asks for rows `row..` from column `col` on, a line of each.
    pub(in crate::cpu) fn ahead(&self, row: usize, col: usize) -> Ahead {
        let at = |row: usize| row * self.cols * self.dtype.size();
        let address = self.data.as_ptr().wrapping_add(at(row) + col * self.dtype.size());
        Ahead { address, of_row: 0, of_column: self.dtype.size(), step: at(1) }
    }

    /// Where the `len` elements of row `row` of a matrix from column `col` on begin: they lie together.
    fn place(&self, row: usize, col: usize, len: usize) -> NonNull<u8> {
        let mut place = self.data;
        self.parts(row, col, len, |base, _| place = base);
        place
    }
}

multiversion! {
    fn interleave(first: &[u16], second: &[u16], out: &mut [f32]) {
        for ((o, &a), &b) in out.iter_mut().zip(first).zip(second) {
            *o = f32::from_bits(a as u32 | (b as u32) << 16);
        }
    }
}
