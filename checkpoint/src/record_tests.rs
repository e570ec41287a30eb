//! Tests of records: any mixture of old and new sectors, torn ones too, settles to either side.

use super::*;
use proptest::prelude::*;

/// A piece anywhere in a chunk, its old and new content, and for each byte whether a crash left it old
/// (only the choice at a sector's first byte is used).
fn pieces() -> impl Strategy<Value = (Piece, Vec<u8>, Vec<u8>, Vec<bool>)> {
    let widths = prop_oneof![Just(1u8), Just(2), Just(4)];
    (widths, 0u64..40_000, 1usize..20_000).prop_flat_map(|(width, start, bytes)| {
        let offset = CHUNK * 3 + start / u64::from(width) * u64::from(width);
        let piece = Piece { shard: 0, width, offset, bytes: bytes as u32 };
        // Content changes in runs, so that whole blocks stay equal.
        let runs = proptest::collection::vec((0..bytes, 1usize..3000, any::<u8>()), 0..4);
        let old = proptest::collection::vec(any::<u8>(), bytes);
        let left = proptest::collection::vec(any::<bool>(), 64);
        (Just(piece), old, runs, left).prop_map(|(piece, old, runs, left)| {
            let mut new = old.clone();
            for (at, n, add) in runs {
                let end = (at + n).min(new.len());
                new[at..end].iter_mut().for_each(|b| *b = b.wrapping_add(add));
            }
            (piece, old, new, left)
        })
    })
}

/// The change of what differs; none if nothing does.
fn encoded(piece: Piece, old: &[u8], new: &[u8]) -> Option<Change> {
    let mut changed = BlockSet::default();
    for (number, block) in piece.blocks() {
        let at = within(&block, piece.offset);
        if old[at.clone()] != new[at] {
            changed.insert(number);
        }
    }
    (!changed.is_empty()).then(|| Encoder::default().encode(piece, &changed, old, &mut new.to_vec(), Vec::new))
}

/// The record that a change's body is read back as.
fn decoded(change: &Change) -> Record {
    Decoder::default().decode(&change.body, &[CHUNK * 5]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_mixture_of_old_and_new_sectors_settles_to_either_side(
        (piece, old, new, left) in pieces(),
        torn in any::<(usize, usize, bool)>(),
    ) {
        let Some(change) = encoded(piece, &old, &new) else {
            prop_assert_eq!(old, new);
            return Ok(());
        };
        let record = decoded(&change);
        let mut crashed = new.clone();
        let sectors: Vec<_> = cut(piece.range(), SECTOR).map(|sector| within(&sector, piece.offset)).collect();
        for (i, at) in sectors.iter().enumerate() {
            if left[i % left.len()] {
                crashed[at.clone()].copy_from_slice(&old[at.clone()]);
            }
        }
        // One sector is torn, at any byte.
        let at = sectors[torn.0 % sectors.len()].clone();
        let tear = at.start + torn.1 % at.len();
        let (first, second) = if torn.2 { (&old, &new) } else { (&new, &old) };
        crashed[at.start..tear].copy_from_slice(&first[at.start..tear]);
        crashed[tear..at.end].copy_from_slice(&second[tear..at.end]);
        // Blocks that did not change keep whatever they hold, and here they hold the same.
        for (side, want) in [(Side::New, &new), (Side::Old, &old)] {
            let mut content = crashed.clone();
            for _ in 0..2 {
                prop_assert_eq!(record.settle(&mut content, side), Ok(()));
                prop_assert_eq!(&content, want);
            }
        }
        let mut content = new.clone();
        prop_assert_eq!(record.undo(&mut content), Ok(()));
        prop_assert_eq!(&content, &old);
    }

    #[test]
    fn a_change_lists_exactly_what_it_writes((piece, old, new, _) in pieces()) {
        let Some(change) = encoded(piece, &old, &new) else { return Ok(()) };
        let mut written = old.clone();
        let mut from = change.new.as_slice();
        for run in &change.runs {
            let (now, later) = from.split_at((run.end - run.start) as usize);
            written[within(run, piece.offset)].copy_from_slice(now);
            from = later;
        }
        prop_assert!(from.is_empty());
        prop_assert_eq!(&written, &new);
        let blocks: Vec<_> = decoded(&change).changed().collect();
        prop_assert_eq!(blocks.len() as u64, change.blocks);
    }
}

#[test]
fn a_sector_torn_twice_is_mended() {
    let old: Vec<u8> = (0..512u32).map(|i| (i * 37 % 251) as u8).collect();
    let new: Vec<u8> = (0..512u32).map(|i| (i * 91 % 241) as u8).collect();
    for (width, tears) in [(1, 3..5), (2, 7..8), (4, 5..511), (4, 13..14), (2, 1..2)] {
        let piece = Piece { shard: 0, width, offset: CHUNK, bytes: 512 };
        let record = decoded(&encoded(piece, &old, &new).unwrap());
        for (outside, inside) in [(&old, &new), (&new, &old)] {
            let mut torn = outside.clone();
            torn[tears.clone()].copy_from_slice(&inside[tears.clone()]);
            record.settle(&mut torn, Side::Old).unwrap();
            assert!(torn == old, "width {width}, {tears:?}");
        }
    }
}

#[test]
fn a_sector_of_neither_side_is_refused_with_its_offset() {
    let piece = Piece { shard: 0, width: 2, offset: CHUNK + 136, bytes: 9000 };
    let old = vec![7u8; 9000];
    let new = vec![8u8; 9000];
    let record = decoded(&encoded(piece, &old, &new).unwrap());
    let mut content = old.clone();
    content[5000] ^= 1;
    let sector = (CHUNK + 136 + 5000) / SECTOR * SECTOR;
    assert_eq!(record.settle(&mut content, Side::New), Err(sector));
    assert_eq!(record.settle(&mut content, Side::Old), Err(sector));
    let mut skipped = old.clone();
    skipped[5000] ^= 1;
    record.settle_known(&mut skipped, Side::New);
    let differ: Vec<u64> =
        (0..9000).filter(|&i| skipped[i] != new[i]).map(|i| (CHUNK + 136 + i as u64) / SECTOR * SECTOR).collect();
    assert_eq!(differ, [sector; 512]);
    // Undoing in history takes nothing but the new side.
    assert_eq!(record.undo(&mut old.clone()), Err(CHUNK + 136));
}

#[test]
fn a_body_that_does_not_fit_is_refused_with_a_reason() {
    let piece = Piece { shard: 0, width: 2, offset: CHUNK, bytes: 9000 };
    let good = encoded(piece, &[1; 9000], &[2; 9000]).unwrap().body;
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut body = good.clone();
        change(&mut body);
        Decoder::default().decode(&body, &[CHUNK * 2]).unwrap_err()
    };
    assert_eq!(refused(&|body| body.truncate(40)), "a record is too short");
    assert_eq!(refused(&|body| body[0] = 1), "a record names a shard that is not there");
    assert_eq!(refused(&|body| body[2] = 3), "a record is out of range");
    assert_eq!(refused(&|body| body[11] = 9), "a record is out of range");
    assert_eq!(refused(&|body| body[4..8].fill(255)), "a record is out of range");
    assert_eq!(refused(&|body| body[4..8].fill(0)), "a record is out of range");
    assert_eq!(refused(&|body| body.truncate(100)), "a record has too few checksums");
    assert_eq!(refused(&|body| body[16] = 1), "a record does not unpack to its blocks");
    assert_eq!(refused(&|body| body.truncate(good.len() - 1)), "a record does not unpack to its blocks");
}
