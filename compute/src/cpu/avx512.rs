//! What a step does to most elements of a model, written for AVX-512 by hand: a group of random numbers stays in registers until it has
//! rounded the elements that it belongs to. Every function gives the bits of its portable twin.

use crate::random::{GROUP, Group, LANES, MULTIPLIERS, WEYL};
use std::arch::x86_64::*;

/// Groups that are rounded at a time: the rounds of one wait for each other, those of several do not.
pub const AT_ONCE: usize = 2;
/// Vectors of their elements.
const VECTORS: usize = AT_ONCE * GROUP / LANES;

/// The random words of [`AT_ONCE`] groups from `group` on, of which each holds the numbers of two vectors of elements: see [`number`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn words(group: Group) -> [__m512i; VECTORS / 2] {
    /// a ^ b ^ c.
    const XOR: i32 = 0x96;
    // No closures in here: they would be functions of their own, without these features.
    let multipliers = [_mm512_set1_epi64(MULTIPLIERS[0] as i64), _mm512_set1_epi64(MULTIPLIERS[1] as i64)];
    let (step, tensor) = (_mm512_set1_epi64(group.step as i64), _mm512_set1_epi64(group.tensor as i64));
    // Eight counters in a vector, words in the lower halves of 64 bits.
    let mut halves = [[[_mm512_setzero_si512(); 4]; 2]; AT_ONCE];
    let mut first = group.index * LANES as u64;
    for counters in halves.as_flattened_mut() {
        let index = _mm512_add_epi64(_mm512_set1_epi64(first as i64), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        *counters = [index, _mm512_srli_epi64::<32>(index), step, tensor];
        first += 8;
    }
    let mut key = group.key;
    for _ in 0..10 {
        let keys = [_mm512_set1_epi64(key[0] as i64), _mm512_set1_epi64(key[1] as i64)];
        for c in halves.as_flattened_mut() {
            let a = _mm512_mul_epu32(multipliers[0], c[0]);
            let b = _mm512_mul_epu32(multipliers[1], c[2]);
            *c = [
                _mm512_ternarylogic_epi64::<XOR>(_mm512_srli_epi64::<32>(b), c[1], keys[0]),
                b,
                _mm512_ternarylogic_epi64::<XOR>(_mm512_srli_epi64::<32>(a), c[3], keys[1]),
                a,
            ];
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let mut words = [_mm512_setzero_si512(); VECTORS / 2];
    for (words, [low, high]) in words.as_chunks_mut::<4>().0.iter_mut().zip(&halves) {
        for (word, (low, high)) in words.iter_mut().zip(low.iter().zip(high)) {
            *word = _mm512_permutex2var_epi32(*low, even, *high);
        }
    }
    words
}

/// The random numbers of vector `i`: lower halves of a word, then the upper ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn number(words: &[__m512i; VECTORS / 2], i: usize) -> __m512i {
    match i % 2 {
        0 => _mm512_and_si512(words[i / 2], _mm512_set1_epi32(0xFFFF)),
        _ => _mm512_srli_epi32::<16>(words[i / 2]),
    }
}

/// Values to bf16, rounded with the numbers of their groups.
///
/// # Safety
/// The processor has what [`super::simd::has_avx512`] looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn round(values: &[f32; AT_ONCE * GROUP], group: Group, out: &mut [u16; AT_ONCE * GROUP]) {
    let words = words(group);
    for i in 0..VECTORS {
        // SAFETY: elements 16i.. of both.
        unsafe {
            let value = _mm512_loadu_ps(values.as_ptr().add(i * LANES));
            _mm256_storeu_si256(out.as_mut_ptr().add(i * LANES).cast(), rounded_bf16(value, number(&words, i)));
        }
    }
}

/// w = (w - factor·u)·keep of the elements of groups, rounded with their numbers.
///
/// # Safety
/// `w` is valid for reads and writes of as many bf16 elements; the processor has what [`super::simd::has_avx512`] looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn subtract(w: *mut u16, u: &[f32; AT_ONCE * GROUP], factor: f32, keep: f32, group: Group) {
    let (factor, keep) = (_mm512_set1_ps(factor), _mm512_set1_ps(keep));
    let words = words(group);
    for i in 0..VECTORS {
        // SAFETY: elements 16i.. of both.
        unsafe {
            let (w, u) = (w.add(i * LANES).cast::<__m256i>(), _mm512_loadu_ps(u.as_ptr().add(i * LANES)));
            let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(w)));
            let value = _mm512_sub_ps(_mm512_castsi512_ps(wide), _mm512_mul_ps(factor, u));
            _mm256_storeu_si256(w, rounded_bf16(_mm512_mul_ps(value, keep), number(&words, i)));
        }
    }
}

/// [`super::stored::rounded_bf16`] of 16 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn rounded_bf16(value: __m512, random: __m512i) -> __m256i {
    let bits = _mm512_castps_si512(value);
    let magnitude = _mm512_add_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFF_FFFF)), random);
    let magnitude = _mm512_min_epu32(_mm512_srli_epi32::<16>(magnitude), _mm512_set1_epi32(0x7F7F));
    let sign = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(0x8000));
    _mm512_cvtepi32_epi16(_mm512_or_si512(magnitude, sign))
}

/// 32 elements of each of two rows, the two of a column in the place of one f32, the first in its lower half.
///
/// # Safety
/// Both rows are valid for reads of 32 bf16 elements of any alignment, `out` for writes of 32 f32; the processor has what
/// [`super::simd::has_avx512`] looks for.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn interleave(first: *const u16, second: *const u16, out: *mut f32) {
    // SAFETY: the caller's promise.
    let (a, b) = unsafe { (_mm512_loadu_si512(first.cast()), _mm512_loadu_si512(second.cast())) };
    // Columns 8q to 8q + 3 and 8q + 4 to 8q + 7 of each quarter q.
    let (lower, upper) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
    let (left, right) = (_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
    // SAFETY: the caller's promise.
    unsafe {
        _mm512_storeu_si512(out.cast(), _mm512_permutex2var_epi64(lower, left, upper));
        _mm512_storeu_si512(out.add(16).cast(), _mm512_permutex2var_epi64(lower, right, upper));
    }
}
