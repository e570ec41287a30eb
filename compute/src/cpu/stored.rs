//! Elements that outlive a step, in f32 or bf16: moments, and keys and values of a context.
//!
//! Arithmetic is f32: whoever reads widens, which is exact, and whoever writes rounds: to the nearest, or, where a small
//! change must not get lost in every step anew, stochastically (`update_pair`).

use super::Buffer;
#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::gemm::Shared;
use super::simd::{self, multiversion};
use crate::random::GROUP;
use crate::{Dtype, Stream};
use std::ops::Range;

/// Elements converted at a time, so that they stay in the first-level cache.
const CHUNK: usize = 512;

/// f32 or bf16 elements on the CPU.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    /// As they are.
    F32(Buffer),
    /// The upper halves of f32.
    Bf16(Vec<u16>),
}

impl From<Buffer> for Stored {
    fn from(buffer: Buffer) -> Stored {
        Stored::F32(buffer)
    }
}

impl Stored {
    /// `len` zeros, in memory whose pages do not exist before they are written.
    ///
    /// Panics on f16, in which nothing is stored.
    pub fn zeros(dtype: Dtype, len: usize) -> Stored {
        match dtype {
            Dtype::F32 => Stored::F32(Buffer::zeros(len)),
            Dtype::BF16 => Stored::Bf16(vec![0; len]),
            Dtype::F16 => panic!("nothing is stored in f16"),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Stored::F32(values) => values.len(),
            Stored::Bf16(values) => values.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Stored::F32(_) => Dtype::F32,
            Stored::Bf16(_) => Dtype::BF16,
        }
    }

    /// Elements from `at` on as f32.
    pub fn read(&self, at: usize, out: &mut [f32]) {
        match self {
            Stored::F32(values) => out.copy_from_slice(&values[at..at + out.len()]),
            Stored::Bf16(values) => widen(&values[at..at + out.len()], out),
        }
    }

    /// Elements from `at` on become these, rounded to the nearest.
    pub fn write(&mut self, at: usize, src: &[f32]) {
        match self {
            Stored::F32(values) => values[at..at + src.len()].copy_from_slice(src),
            Stored::Bf16(values) => round_to_nearest(src, &mut values[at..at + src.len()]),
        }
    }

    /// Elements from `at` on become those of `src` from `src_at` on, of the same type.
    pub fn copy(&mut self, at: usize, src: &Stored, src_at: usize, len: usize) {
        match (self, src) {
            (Stored::F32(dst), Stored::F32(src)) => dst[at..at + len].copy_from_slice(&src[src_at..src_at + len]),
            (Stored::Bf16(dst), Stored::Bf16(src)) => dst[at..at + len].copy_from_slice(&src[src_at..src_at + len]),
            (dst, src) => panic!("{} elements are not {} elements", src.dtype(), dst.dtype()),
        }
    }

    /// A range of elements as f32: where they lie, or widened into `room`.
    pub(super) fn wide<'a>(&'a self, range: Range<usize>, room: &'a mut Vec<f32>) -> &'a [f32] {
        match self {
            Stored::F32(values) => &values[range],
            Stored::Bf16(values) => {
                room.resize(range.len(), 0.0);
                widen(&values[range], room);
                room
            }
        }
    }

    /// A part of it, to be written.
    pub(super) fn part(&mut self, range: Range<usize>) -> StoredMut<'_> {
        match self {
            Stored::F32(values) => StoredMut::F32(&mut values[range]),
            Stored::Bf16(values) => StoredMut::Bf16(&mut values[range]),
        }
    }
}

/// A part of [`Stored`] that one task writes.
pub(super) enum StoredMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [u16]),
}

impl<'a> StoredMut<'a> {
    /// Parts of `len` elements, the last one shorter.
    pub fn chunks(self, len: usize) -> Vec<StoredMut<'a>> {
        match self {
            StoredMut::F32(values) => values.chunks_mut(len).map(StoredMut::F32).collect(),
            StoredMut::Bf16(values) => values.chunks_mut(len).map(StoredMut::Bf16).collect(),
        }
    }
}

/// Hands the elements of a pair of moments to `update` as f32, some at a time with the place of the first, and keeps what
/// it leaves: bf16 rounded stochastically, each moment by its own of `streams`. The first element here is element `first`
/// of the tensor, by which its random number is counted.
pub(super) fn update_pair(
    (a, b): (StoredMut, StoredMut),
    first: usize,
    streams: &[Stream; 2],
    mut update: impl FnMut(usize, &mut [f32], &mut [f32]),
) {
    match (a, b) {
        (StoredMut::F32(a), StoredMut::F32(b)) => update(0, a, b),
        (StoredMut::Bf16(a), StoredMut::Bf16(b)) => {
            let (mut wide_a, mut wide_b) = ([0.0; CHUNK], [0.0; CHUNK]);
            for (i, (a, b)) in a.chunks_mut(CHUNK).zip(b.chunks_mut(CHUNK)).enumerate() {
                let (at, n) = (i * CHUNK, a.len());
                let (wide_a, wide_b) = (&mut wide_a[..n], &mut wide_b[..n]);
                widen(a, wide_a);
                widen(b, wide_b);
                update(at, wide_a, wide_b);
                for ((wide, out), stream) in [(wide_a, a), (wide_b, b)].into_iter().zip(streams) {
                    round_bf16(wide, (first + at) as u64, stream, out);
                }
            }
        }
        _ => panic!("both moments of a tensor have one type"),
    }
}

/// [`Stored`] whose parts several tasks write.
#[derive(Clone, Copy)]
pub(super) enum SharedStored<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, u16>),
}

impl<'a> SharedStored<'a> {
    pub fn new(stored: &'a mut Stored) -> SharedStored<'a> {
        match stored {
            Stored::F32(values) => SharedStored::F32(Shared::new(values)),
            Stored::Bf16(values) => SharedStored::Bf16(Shared::new(values)),
        }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No other task uses an overlapping part while this one lives.
    pub unsafe fn part(&self, at: usize, len: usize) -> StoredMut<'a> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                SharedStored::F32(values) => StoredMut::F32(values.slice(at, len)),
                SharedStored::Bf16(values) => StoredMut::Bf16(values.slice(at, len)),
            }
        }
    }
}

multiversion! {
    fn widen(src: &[u16], out: &mut [f32]) {
        for (o, &v) in out.iter_mut().zip(src) {
            *o = f32::from_bits((v as u32) << 16);
        }
    }
}

multiversion! {
    /// Pairs of bf16, rounded to the nearest, each in the place of one f32: the lower half is the first of the two.
    pub(super) fn round_to_pairs(src: &[f32], out: &mut [f32]) {
        for (o, pair) in out.iter_mut().zip(src.as_chunks::<2>().0) {
            *o = f32::from_bits(nearest(pair[0]) | nearest(pair[1]) << 16);
        }
    }
}

multiversion! {
    /// As [`round_to_pairs`], of elements that lie apart: `first` are the lower halves, `second` the upper ones.
    pub(super) fn round_to_pairs_of(first: &[f32], second: &[f32], out: &mut [f32]) {
        for ((o, &a), &b) in out.iter_mut().zip(first).zip(second) {
            *o = f32::from_bits(nearest(a) | nearest(b) << 16);
        }
    }
}

/// The nearest bf16: ties go to the even one. A finite value never becomes infinite, and what is not a number stays none.
#[inline(always)]
fn nearest(v: f32) -> u32 {
    let bits = v.to_bits();
    let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7FFF_FFFF);
    let rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16;
    let finite = rounded.min(0x7F7F);
    // Of infinity and of no number the upper half, in which no number keeps a bit.
    let odd = (magnitude >> 16) | ((magnitude > 0x7F80_0000) as u32) << 6;
    sign | if magnitude >= 0x7F80_0000 { odd } else { finite }
}

multiversion! {
    fn round_to_nearest(src: &[f32], out: &mut [u16]) {
        for (o, &v) in out.iter_mut().zip(src) {
            *o = nearest(v) as u16;
        }
    }
}

/// Each value as [`rounded_bf16`] with its random number; the first is element `first`.
pub(crate) fn round_bf16(values: &[f32], first: u64, stream: &Stream, out: &mut [u16]) {
    let mut random = [0; GROUP];
    let mut at = 0;
    while at < values.len() {
        let first = first + at as u64;
        let (values, out) = (&values[at..], &mut out[at..]);
        #[cfg(target_arch = "x86_64")]
        if let (Some(values), Some(out)) = (values.first_chunk(), out.first_chunk_mut())
            && first.is_multiple_of(GROUP as u64)
            && simd::has_avx512()
        {
            // SAFETY: the features were detected.
            unsafe { avx512::round(values, stream.group(first / GROUP as u64), out) };
            at += values.len();
            continue;
        }
        // To the next group at most.
        let n = values.len().min(GROUP - (first % GROUP as u64) as usize);
        stream.fill_u16(first, &mut random[..n]);
        round_with(&values[..n], &random[..n], &mut out[..n]);
        at += n;
    }
}

multiversion! {
    fn round_with(values: &[f32], random: &[u16], out: &mut [u16]) {
        for ((o, &v), &r) in out.iter_mut().zip(values).zip(random) {
            *o = rounded_bf16(v, r);
        }
    }
}

/// bf16 is the upper half of an f32: add 16 random bits below the cut, then cut. A finite value
/// never becomes infinite: the largest finite bf16 takes its place.
#[inline(always)]
pub(super) fn rounded_bf16(v: f32, random: u16) -> u16 {
    let bits = v.to_bits();
    let sign = (bits >> 16) & 0x8000;
    let magnitude = ((bits & 0x7FFF_FFFF) + random as u32) >> 16;
    (magnitude.min(0x7F7F) | sign) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_the_nearest_is_that_of_half() {
        let values = [
            0.0,
            -0.0,
            1.0,
            -(1.0 + 1.0 / 256.0),
            1.0 + 3.0 / 256.0,
            1.001,
            3.4e38,
            -3.3e38,
            1e-40,
            1e-45,
            0.1,
            f32::INFINITY,
        ];
        let mut random = [0u16; 4096];
        Stream::rounding(5, 1, 0).fill_u16(0, &mut random);
        let any = random.as_chunks::<2>().0.iter().map(|w| f32::from_bits((w[0] as u32) << 16 | w[1] as u32));
        for v in any.chain(values) {
            let mut out = [0];
            round_to_nearest(&[v], &mut out);
            let (got, want) = (half::bf16::from_bits(out[0]), half::bf16::from_f32(v));
            match (want.is_nan(), v.is_finite() && want.is_infinite()) {
                (true, _) => assert!(got.is_nan(), "{v}"),
                (_, true) => assert_eq!(got, half::bf16::MAX.copysign(want)),
                _ => assert_eq!(got.to_bits(), want.to_bits(), "{v}"),
            }
        }
    }

    #[test]
    fn a_pair_in_bf16_is_rounded_up_as_often_as_it_should_be_and_anew_in_each_step() {
        const N: usize = 1 << 14;
        // A quarter of the way from 1 to the next bf16, 1 + 2^-7.
        let value = 1.0 + 0.25 / 128.0;
        let round = |step: u64| {
            let (mut a, mut b) = (Stored::zeros(Dtype::BF16, N), Stored::zeros(Dtype::BF16, N));
            let streams = Stream::rounding(1, step, 0).of_moments();
            update_pair((a.part(0..N), b.part(0..N)), 0, &streams, |_, a, b| {
                a.fill(value);
                b.fill(value);
            });
            [a, b].map(|stored| {
                let mut values = vec![0.0; N];
                stored.read(0, &mut values);
                assert!(values.iter().all(|&v| v == 1.0 || v == 1.0 + 1.0 / 128.0));
                values.iter().map(|&v| v > 1.0).collect::<Vec<_>>()
            })
        };
        let [a, b] = round(1);
        let [again, _] = round(2);
        for ups in [&a, &b, &again] {
            let share = ups.iter().filter(|up| **up).count() as f64 / N as f64;
            // Five standard errors at N are 0.017.
            assert!((share - 0.25).abs() < 0.017, "{share}");
        }
        assert!(a != b && a != again, "every moment of every step has random numbers of its own");
    }

    #[test]
    fn many_elements_are_rounded_as_each_is() {
        let stream = Stream::rounding(2, 8, 1);
        let values: Vec<f32> = (0..2000).map(|i| (i as f32 * 0.3).tan()).chain([f32::NAN, f32::MAX, -0.0]).collect();
        let mut random = vec![0; 4000];
        stream.fill_u16(0, &mut random);
        for (first, len) in [(0, 2003), (1, 2002), (128, 256), (127, 700), (384, 255), (5, 0)] {
            let mut got = vec![0; len];
            round_bf16(&values[..len], first, &stream, &mut got);
            let each = values[..len].iter().zip(&random[first as usize..]).map(|(v, r)| rounded_bf16(*v, *r));
            assert_eq!(got, each.collect::<Vec<_>>(), "{len} from {first} on");
        }
    }

    #[test]
    fn a_random_number_belongs_to_an_element_and_not_to_a_part() {
        const N: usize = 3000;
        let streams = Stream::rounding(9, 4, 2).of_moments();
        let values: Vec<f32> = (0..N).map(|i| (i as f32).sqrt()).collect();
        let stored = |parts: &[Range<usize>]| {
            let (mut a, mut b) = (Stored::zeros(Dtype::BF16, N), Stored::zeros(Dtype::BF16, N));
            for part in parts {
                let pair = (a.part(part.clone()), b.part(part.clone()));
                update_pair(pair, part.start, &streams, |at, a, b| {
                    a.copy_from_slice(&values[part.start + at..][..a.len()]);
                    b.copy_from_slice(a);
                });
            }
            (a, b)
        };
        assert_eq!(stored(&[0..N]), stored(&[0..7, 7..600, 600..N]));
    }
}
