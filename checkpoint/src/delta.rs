//! The difference of two runs of weights, in a form that compresses.
//!
//! w: bytes of an element, 1, 2 or 4 · n: elements · old, new, diff: n·w bytes, little-endian ·
//! planes: n·w bytes, byte 0 of every element, then byte 1 of every element, …
//!
//! diff = new - old, wrapping in w bytes: a few ulps for a trained float, because neighbouring floats
//! of one sign are neighbouring integers. planes = bytes of zigzag(diff): small differences of either sign
//! become small numbers, so that all planes but the lowest are nearly all zero. Measured on weights as
//! `apollod bench sync` makes them (256 MiB, zstd level 1): 51 MB where plain differences take 67 MB.
//! Bytes after the last whole element are taken one by one.

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

            pub(super) fn planes(old: &[u8], new: &[u8], planes: &mut [u8]) {
                let (old, new) = (old.as_chunks::<$bytes>().0, new.as_chunks::<$bytes>().0);
                for (plane, out) in planes.chunks_exact_mut(old.len().max(1)).enumerate() {
                    for ((out, old), new) in out.iter_mut().zip(old).zip(new) {
                        let diff = get(new).wrapping_sub(get(old)) as $signed;
                        let zigzag = ((diff << 1) ^ (diff >> (<$signed>::BITS - 1))) as $unsigned;
                        *out = (zigzag >> (8 * plane)) as u8;
                    }
                }
            }

            pub(super) fn diff(planes: &[u8], diff: &mut [u8]) {
                let out = diff.as_chunks_mut::<$bytes>().0;
                out.fill([0; $bytes]);
                for (plane, bytes) in planes.chunks_exact(out.len().max(1)).enumerate() {
                    for (out, byte) in out.iter_mut().zip(bytes) {
                        out[plane] = *byte;
                    }
                }
                for out in out {
                    let zigzag = get(out);
                    let diff = (zigzag >> 1) ^ (zigzag & 1).wrapping_neg();
                    *out = diff.to_le_bytes();
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

/// The planes of new - old. All three have the same length; `width` is 1, 2 or 4.
pub(crate) fn to_planes(width: u8, old: &[u8], new: &[u8], planes: &mut [u8]) {
    assert!(old.len() == new.len() && old.len() == planes.len());
    let whole = old.len() - old.len() % usize::from(width);
    let (body, tail) = planes.split_at_mut(whole);
    match width {
        1 => one::planes(&old[..whole], &new[..whole], body),
        2 => two::planes(&old[..whole], &new[..whole], body),
        4 => four::planes(&old[..whole], &new[..whole], body),
        _ => panic!("width {width}"),
    }
    one::planes(&old[whole..], &new[whole..], tail);
}

/// The differences in the order of the elements, from their planes.
pub(crate) fn from_planes(width: u8, planes: &[u8], diff: &mut [u8]) {
    assert_eq!(planes.len(), diff.len());
    let whole = diff.len() - diff.len() % usize::from(width);
    let (body, tail) = diff.split_at_mut(whole);
    match width {
        1 => one::diff(&planes[..whole], body),
        2 => two::diff(&planes[..whole], body),
        4 => four::diff(&planes[..whole], body),
        _ => panic!("width {width}"),
    }
    one::diff(&planes[whole..], tail);
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
            let mut planes = vec![0; old.len()];
            let mut diff = vec![0; old.len()];
            to_planes(width, &old, &new, &mut planes);
            from_planes(width, &planes, &mut diff);
            let mut walked = old.clone();
            add(width, &mut walked, &diff);
            prop_assert_eq!(&walked, &new);
            sub(width, &mut walked, &diff);
            prop_assert_eq!(&walked, &old);
        }
    }

    #[test]
    fn a_step_of_one_ulp_down_touches_only_the_lowest_plane() {
        let old = 0x3f80_u16.to_le_bytes().repeat(4);
        let new = 0x3f7f_u16.to_le_bytes().repeat(4);
        let mut planes = vec![9; 8];
        to_planes(2, &old, &new, &mut planes);
        assert_eq!(planes, [1, 1, 1, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn an_element_that_could_cross_a_sector_is_taken_byte_by_byte() {
        assert_eq!(width_of("BF16", 136), 2);
        assert_eq!(width_of("BF16", 137), 1);
        assert_eq!(width_of("F32", 138), 1);
        assert_eq!(width_of("F64", 136), 1);
    }
}
