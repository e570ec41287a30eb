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
/// Codes that are appended at once, and the bytes that are written for them.
const APPENDED: usize = 8;
const WORD: usize = 8;
/// Escapes that are taken from a group without asking whether it has any: a branch that is foreseen wrongly costs more than
/// the whole group, and most groups of trained weights have one or none.
const FEW: u32 = 2;

/// Adds as many whole groups as there are, if the processor can; gives what is left.
pub(super) fn add_groups<'a>(packer: &mut Packer, numbers: &'a [u16]) -> &'a [u16] {
    let (groups, rest) = numbers.as_chunks();
    let bits =
        is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("popcnt");
    if !(bits && is_x86_feature_detected!("avx2")) {
        return numbers;
    }
    // SAFETY: the processor has AVX2, BMI1, BMI2 and POPCNT.
    unsafe { add(packer, groups) };
    rest
}

/// The bytes of an array of the same size.
fn vector<T: Copy, const N: usize>(from: &[T; N]) -> __m256i {
    const { assert!(size_of::<[T; N]>() == size_of::<__m256i>()) };
    // SAFETY: of the same size, as asserted, and any bytes are a vector.
    unsafe { std::mem::transmute_copy(from) }
}

#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
fn add(packer: &mut Packer, groups: &[[u16; GROUP]]) {
    let twice = |table: [u8; 16]| vector(&[table, table]);
    let codes = twice(packer.code.codes);
    let lengths = twice(packer.code.lengths);
    let powers = twice(packer.code.lengths.map(|length| 1 << length));
    let escape = _mm256_set1_epi16(ESCAPE as i16);
    let [low_byte, low_half] = [_mm256_set1_epi16(0xff), _mm256_set1_epi64x(0xffff_ffff)];
    let [ones_8, ones_16] = [_mm256_set1_epi8(1), _mm256_set1_epi16(1)];

    let (mut bytes, mut escaped) = (packer.bytes.len(), packer.escapes.len());
    packer.bytes.reserve(groups.len() * GROUP_BYTES + WORD);
    packer.escapes.reserve(groups.len() * GROUP + FEW as usize);
    let (bytes_out, escapes_out) = (packer.bytes.as_mut_ptr(), packer.escapes.as_mut_ptr());
    let (mut rest, mut rest_bits) = (packer.rest, u64::from(packer.rest_bits));
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
            debug_assert!(bytes + WORD <= packer.bytes.capacity());
            // SAFETY: what comes before is of the groups before and a part of this one, each of GROUP_BYTES at most; room was
            // made for all groups and a word.
            unsafe { bytes_out.add(bytes).cast::<[u8; WORD]>().write(rest.to_le_bytes()) };
            rest_bits += bits;
            bytes += (rest_bits / 8) as usize;
            rest >>= rest_bits & !7;
            rest_bits %= 8;
        }
        let mut escapes = _mm256_movemask_epi8(_mm256_cmpeq_epi8(symbols, _mm256_set1_epi8(ESCAPE as i8))) as u32;
        for _ in 0..escapes.count_ones().max(FEW) {
            debug_assert!(escaped < packer.escapes.capacity());
            // SAFETY: there are GROUP escapes in a group at most; room was made for all groups and FEW more.
            unsafe { escapes_out.add(escaped).write(group[escapes.trailing_zeros() as usize % GROUP]) };
            escaped += usize::from(escapes != 0);
            escapes &= escapes.wrapping_sub(1);
        }
    }
    // SAFETY: so many were written, one after the other.
    unsafe {
        packer.bytes.set_len(bytes);
        packer.escapes.set_len(escaped);
    }
    (packer.rest, packer.rest_bits) = (rest, rest_bits as u32);
}

/// The four words of a vector.
fn words(vector: __m256i) -> [u64; GROUP / APPENDED] {
    // SAFETY: of the same size, and any bytes are numbers.
    unsafe { std::mem::transmute(vector) }
}
