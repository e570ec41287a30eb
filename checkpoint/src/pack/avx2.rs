//! [`Packer::add`] with vectors of 32 symbols.
//!
//! Codes are bytes, and so are the powers of two of their lengths. c0 + c1·2^l0 is one multiply-add of bytes, the same
//! of two such pairs is one of words, and two such fours are shifted together: 8 codes in at most 56 bits, which
//! are appended to the 7 that may be left of the last.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::Packer;
use super::code::{ESCAPE, LONGEST};

/// Symbols in a vector.
const GROUP: usize = 32;
/// Bytes that their codes take at most.
const GROUP_BYTES: usize = GROUP * LONGEST as usize / 8;
/// Codes that are appended at once.
const APPENDED: usize = 8;

/// Adds as many whole groups as there are, if the processor can; gives what is left.
pub(super) fn add_groups<'a>(packer: &mut Packer, numbers: &'a [u16]) -> &'a [u16] {
    let (groups, rest) = numbers.as_chunks();
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2")) {
        return numbers;
    }
    // SAFETY: the processor has AVX2, BMI1 and BMI2.
    unsafe { add(packer, groups) };
    rest
}

/// The bytes of an array of the same size.
fn vector<T: Copy, const N: usize>(from: &[T; N]) -> __m256i {
    const { assert!(size_of::<[T; N]>() == size_of::<__m256i>()) };
    // SAFETY: of the same size, as asserted, and any bytes are a vector.
    unsafe { std::mem::transmute_copy(from) }
}

#[target_feature(enable = "avx2,bmi1,bmi2")]
fn add(packer: &mut Packer, groups: &[[u16; GROUP]]) {
    let twice = |table: [u8; 16]| vector(&[table, table]);
    let codes = twice(packer.code.codes);
    let lengths = twice(packer.code.lengths);
    let powers = twice(packer.code.lengths.map(|length| 1 << length));
    let escape = _mm256_set1_epi16(ESCAPE as i16);
    let [low_byte, low_half] = [_mm256_set1_epi16(0xff), _mm256_set1_epi64x(0xffff_ffff)];
    let [ones_8, ones_16] = [_mm256_set1_epi8(1), _mm256_set1_epi16(1)];

    let mut at = packer.bytes.len();
    packer.bytes.resize(at + groups.len() * GROUP_BYTES + 8, 0);
    let out = packer.bytes.as_mut_slice();
    let (mut rest, mut rest_bits) = (packer.rest, packer.rest_bits);
    for group in groups {
        let halves = group.as_chunks::<16>().0;
        let [a, b] = [0, 1].map(|half| _mm256_min_epu16(vector(&halves[half]), escape));
        // Packing takes 8 of a, 8 of b, 8 of a, 8 of b.
        let symbols = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(a, b));
        let length = _mm256_shuffle_epi8(lengths, symbols);
        let power = _mm256_shuffle_epi8(powers, symbols);
        // Pairs in 16 bits: multiplied by (1, 2^l0).
        let factors = _mm256_or_si256(_mm256_slli_epi16::<8>(power), _mm256_set1_epi16(1));
        let pair = _mm256_maddubs_epi16(factors, _mm256_shuffle_epi8(codes, symbols));
        let pair_length = _mm256_maddubs_epi16(length, ones_8);
        let pair_power = _mm256_mullo_epi16(_mm256_and_si256(power, low_byte), _mm256_srli_epi16::<8>(power));
        // Fours in 32: multiplied by (1, 2^(l0 + l1)).
        let factors = _mm256_blend_epi16::<0b1010_1010>(ones_16, _mm256_slli_epi32::<16>(pair_power));
        let four = _mm256_madd_epi16(pair, factors);
        let four_length = _mm256_madd_epi16(pair_length, ones_16);
        // Eights in 64.
        let first_length = _mm256_and_si256(four_length, low_half);
        let second = _mm256_sllv_epi64(_mm256_srli_epi64::<32>(four), first_length);
        let eight = _mm256_or_si256(_mm256_and_si256(four, low_half), second);
        let eight_length = _mm256_add_epi64(first_length, _mm256_srli_epi64::<32>(four_length));

        let [eight, eight_length] = [eight, eight_length].map(words);
        for (codes, bits) in eight.into_iter().zip(eight_length) {
            rest |= codes << rest_bits;
            out[at..at + 8].copy_from_slice(&rest.to_le_bytes());
            rest_bits += bits as u32;
            at += (rest_bits / 8) as usize;
            rest >>= rest_bits & !7;
            rest_bits %= 8;
        }
        let mut escapes = _mm256_movemask_epi8(_mm256_cmpeq_epi8(symbols, _mm256_set1_epi8(ESCAPE as i8))) as u32;
        while escapes != 0 {
            packer.escapes.push(group[escapes.trailing_zeros() as usize]);
            escapes &= escapes - 1;
        }
    }
    packer.bytes.truncate(at);
    (packer.rest, packer.rest_bits) = (rest, rest_bits);
}

/// The four words of a vector.
fn words(vector: __m256i) -> [u64; GROUP / APPENDED] {
    // SAFETY: of the same size, and any bytes are numbers.
    unsafe { std::mem::transmute(vector) }
}
