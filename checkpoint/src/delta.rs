//! The difference of two runs of weights, as numbers that are mostly small.
//!
//! w: bytes of an element, 1, 2 or 4 · n: elements · old, new, diff: n·w bytes, little-endian, and a tail of less than w ·
//! planes: one of the numbers' lower 16 bits and, where w = 4, one of their upper 16
//!
//! diff = new - old, wrapping in w bytes: a few ulps for a trained float, because neighbouring floats
//! of one sign are neighbouring integers. z = zigzag(diff): small differences of either sign are small numbers. The
//! tail is taken byte by byte, after the numbers of the first plane.

/// Bytes of an element of a safetensors dtype whose file offset is `offset`: 2 or 4 where arithmetic
/// on whole elements helps and no element can cross a sector, 1 otherwise.
pub(crate) fn width_of(dtype: &str, offset: u64) -> u8 {
    let width = match dtype {
        "BF16" | "F16" | "I16" | "U16" => 2,
        "F32" | "I32" | "U32" => 4,
        _ => 1,
    };
    if offset.is_multiple_of(u64::from(width)) { width } else { 1 }
}

/// One integer width: the operations on it, by hand because std has no trait for them.
macro_rules! element {
    ($module:ident, $unsigned:ty, $signed:ty, $bytes:literal) => {
        mod $module {
            fn get(bytes: &[u8; $bytes]) -> $unsigned {
                <$unsigned>::from_le_bytes(*bytes)
            }

            #[inline(always)]
            pub(super) fn numbers(plane: u32, old: &[u8], new: &[u8], numbers: &mut [u16]) {
                let (old, new) = (old.as_chunks::<$bytes>().0, new.as_chunks::<$bytes>().0);
                for ((out, old), new) in numbers.iter_mut().zip(old).zip(new) {
                    let diff = get(new).wrapping_sub(get(old)) as $signed;
                    let zigzag = ((diff << 1) ^ (diff >> (<$signed>::BITS - 1))) as $unsigned;
                    *out = (u32::from(zigzag) >> (16 * plane)) as u16;
                }
            }

            pub(super) fn diff(lower: &[u16], upper: impl Fn(usize) -> u16, diff: &mut [u8]) {
                for (i, (out, lower)) in diff.as_chunks_mut::<$bytes>().0.iter_mut().zip(lower).enumerate() {
                    let zigzag = (u32::from(*lower) | u32::from(upper(i)) << 16) as $unsigned;
                    *out = ((zigzag >> 1) ^ (zigzag & 1).wrapping_neg()).to_le_bytes();
                }
            }

            pub(super) fn add(base: &mut [u8], diff: &[u8]) {
                let base = base.as_chunks_mut::<$bytes>().0;
                for (base, diff) in base.iter_mut().zip(diff.as_chunks::<$bytes>().0) {
                    *base = get(base).wrapping_add(get(diff)).to_le_bytes();
                }
            }

            pub(super) fn sub(base: &mut [u8], diff: &[u8]) {
                let base = base.as_chunks_mut::<$bytes>().0;
                for (base, diff) in base.iter_mut().zip(diff.as_chunks::<$bytes>().0) {
                    *base = get(base).wrapping_sub(get(diff)).to_le_bytes();
                }
            }
        }
    };
}

element!(one, u8, i8, 1);
element!(two, u16, i16, 2);
element!(four, u32, i32, 4);

/// Planes of elements of a width.
pub(crate) fn planes(width: u8) -> u32 {
    if width == 4 { 2 } else { 1 }
}

/// Numbers in a plane of so many bytes of weights.
pub(crate) fn count(width: u8, plane: u32, bytes: usize) -> usize {
    let (elements, tail) = (bytes / usize::from(width), bytes % usize::from(width));
    if plane == 0 { elements + tail } else { elements }
}

/// The numbers of a plane of new - old, which are [`count`].
pub(crate) fn numbers(width: u8, plane: u32, old: &[u8], new: &[u8], numbers: &mut [u16]) {
    assert!(old.len() == new.len() && numbers.len() == count(width, plane, old.len()));
    let whole = old.len() - old.len() % usize::from(width);
    match width {
        1 => one::numbers(plane, old, new, numbers),
        2 => numbers_16(&old[..whole], &new[..whole], numbers),
        4 => four::numbers(plane, &old[..whole], &new[..whole], numbers),
        _ => panic!("width {width}"),
    }
    if plane == 0 {
        one::numbers(0, &old[whole..], &new[whole..], &mut numbers[whole / usize::from(width)..]);
    }
}

/// Those of elements of 16 bits, by the widest vectors there are: most weights are of them.
fn numbers_16(old: &[u8], new: &[u8], numbers: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn avx2(old: &[u8], new: &[u8], numbers: &mut [u16]) {
            two::numbers(0, old, new, numbers);
        }
        // SAFETY: the processor has AVX2.
        #[allow(unsafe_code)]
        return unsafe { avx2(old, new, numbers) };
    }
    two::numbers(0, old, new, numbers);
}

/// The difference, from its planes.
pub(crate) fn from_planes(width: u8, planes: &[Vec<u16>], diff: &mut [u8]) {
    let whole = diff.len() - diff.len() % usize::from(width);
    let (body, tail) = diff.split_at_mut(whole);
    let (elements, rest) = planes[0].split_at(whole / usize::from(width));
    match width {
        1 => one::diff(elements, |_| 0, body),
        2 => two::diff(elements, |_| 0, body),
        4 => four::diff(elements, |i| planes[1][i], body),
        _ => panic!("width {width}"),
    }
    one::diff(rest, |_| 0, tail);
}

/// base += diff: old becomes new.
pub(crate) fn add(width: u8, base: &mut [u8], diff: &[u8]) {
    assert_eq!(base.len(), diff.len());
    let whole = base.len() - base.len() % usize::from(width);
    match width {
        1 => one::add(&mut base[..whole], &diff[..whole]),
        2 => two::add(&mut base[..whole], &diff[..whole]),
        4 => four::add(&mut base[..whole], &diff[..whole]),
        _ => panic!("width {width}"),
    }
    one::add(&mut base[whole..], &diff[whole..]);
}

/// base -= diff: new becomes old.
pub(crate) fn sub(width: u8, base: &mut [u8], diff: &[u8]) {
    assert_eq!(base.len(), diff.len());
    let whole = base.len() - base.len() % usize::from(width);
    match width {
        1 => one::sub(&mut base[..whole], &diff[..whole]),
        2 => two::sub(&mut base[..whole], &diff[..whole]),
        4 => four::sub(&mut base[..whole], &diff[..whole]),
        _ => panic!("width {width}"),
    }
    one::sub(&mut base[whole..], &diff[whole..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn width() -> impl Strategy<Value = u8> {
        prop_oneof![Just(1u8), Just(2), Just(4)]
    }

    fn pair() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        (0usize..3000).prop_flat_map(|n| {
            let bytes = || proptest::collection::vec(any::<u8>(), n);
            (bytes(), bytes())
        })
    }

    proptest! {
        #[test]
        fn difference_leads_from_old_to_new_and_back((old, new) in pair(), width in width()) {
            let plane = |plane| {
                let mut plane_numbers = vec![0; count(width, plane, old.len())];
                numbers(width, plane, &old, &new, &mut plane_numbers);
                plane_numbers
            };
            let mut diff = vec![0; old.len()];
            from_planes(width, &(0..planes(width)).map(plane).collect::<Vec<_>>(), &mut diff);
            let mut walked = old.clone();
            add(width, &mut walked, &diff);
            prop_assert_eq!(&walked, &new);
            sub(width, &mut walked, &diff);
            prop_assert_eq!(&walked, &old);
        }
    }

    #[test]
    fn a_step_of_some_ulps_is_a_small_number() {
        let (old, new) = (0x3f80_u16.to_le_bytes(), [0x3f7f_u16, 0x3f83].map(u16::to_le_bytes));
        let mut down_and_up = [9; 2];
        numbers(2, 0, &old.repeat(2), new.as_flattened(), &mut down_and_up);
        assert_eq!(down_and_up, [1, 6]);
        // With a tail, which lies in the first plane.
        let (old, new) = (1.5f32.to_bits().to_le_bytes(), (1.5f32.to_bits() - 40_000).to_le_bytes());
        let (old, new) = ([&old[..], &[3, 5]].concat(), [&new[..], &[3, 4]].concat());
        let (mut lower, mut upper) = ([9; 3], [9; 1]);
        numbers(4, 0, &old, &new, &mut lower);
        numbers(4, 1, &old, &new, &mut upper);
        assert_eq!((lower, upper), ([(79_999 & 0xffff) as u16, 0, 1], [1]));
    }

    #[test]
    fn an_element_that_could_cross_a_sector_is_taken_byte_by_byte() {
        assert_eq!(width_of("BF16", 136), 2);
        assert_eq!(width_of("BF16", 137), 1);
        assert_eq!(width_of("F32", 138), 1);
        assert_eq!(width_of("F64", 136), 1);
    }
}
