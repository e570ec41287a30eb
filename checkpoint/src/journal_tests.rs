//! Tests of records and of reading damaged journals.

use super::*;
use crate::generation::{Progress, VERSION};
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

fn read_back(dir: &Path, body: Option<&[u8]>) -> Option<Record> {
    let path = dir.join("journal");
    let head = Head { generation: 1, previous: 0, shards: vec![HeadShard { file: "a".into(), bytes: CHUNK * 5 }] };
    let mut writer = Writer::create(&Disk::default(), &path, &head).unwrap();
    body.into_iter().for_each(|body| writer.record(body).unwrap());
    writer.finish(&generation(1)).unwrap();
    let mut reader = Reader::open(&path).unwrap();
    let record = reader.record().unwrap();
    if record.is_some() {
        assert!(reader.record().unwrap().is_none());
    }
    assert_eq!(reader.generation.unwrap().generation, 1);
    record
}

fn generation(number: u64) -> Generation {
    Generation {
        version: VERSION,
        generation: number,
        previous: Some(0),
        rollback_of: None,
        created_unix: 0,
        created: String::new(),
        progress: Progress { loss: Some(0.1), ..Progress::default() },
        blocks_total: 0,
        blocks_changed: 0,
        journal_bytes: 0,
        written_bytes: 0,
        ratio: 0.1,
        state: None,
        sums_blake3: String::new(),
        shards: Vec::new(),
        tensors: Vec::new(),
        seal: String::new(),
        restorable: false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_mixture_of_old_and_new_sectors_becomes_new_and_then_old((piece, old, new, left) in pieces()) {
        let dir = tempfile::tempdir().unwrap();
        let mut encoder = Encoder::new();
        let Some(record) = read_back(dir.path(), encoder.encode(piece, &old, &new)) else {
            prop_assert_eq!(old, new);
            return Ok(());
        };
        let mut crashed = new.clone();
        for (i, sector) in cut(piece.range(), SECTOR).enumerate() {
            if left[i % left.len()] {
                let at = within(&sector, piece.offset);
                crashed[at.clone()].copy_from_slice(&old[at]);
            }
        }
        // Blocks that did not change keep whatever they hold, and here they hold the same.
        record.redo(&mut crashed, false).unwrap();
        prop_assert_eq!(&crashed, &new);
        record.redo(&mut crashed, false).unwrap();
        prop_assert_eq!(&crashed, &new);
        record.undo(&mut crashed).unwrap();
        prop_assert_eq!(&crashed, &old);
    }
}

#[test]
fn a_sector_that_is_neither_old_nor_new_is_refused_with_its_offset() {
    let piece = Piece { shard: 0, width: 2, offset: CHUNK + 136, bytes: 9000 };
    let old = vec![7u8; 9000];
    let new = vec![8u8; 9000];
    let dir = tempfile::tempdir().unwrap();
    let mut encoder = Encoder::new();
    let record = read_back(dir.path(), encoder.encode(piece, &old, &new)).unwrap();
    let mut content = old.clone();
    content[5000] ^= 1;
    let sector = (CHUNK + 136 + 5000) / SECTOR * SECTOR;
    assert_eq!(record.redo(&mut content, false), Err(sector));
    let mut skipped = old.clone();
    skipped[5000] ^= 1;
    assert_eq!(record.redo(&mut skipped, true), Ok(()));
    let differ: Vec<u64> =
        (0..9000).filter(|&i| skipped[i] != new[i]).map(|i| (CHUNK + 136 + i as u64) / SECTOR * SECTOR).collect();
    assert_eq!(differ, [sector; 512]);
}

#[test]
fn a_journal_cut_anywhere_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let piece = Piece { shard: 0, width: 1, offset: 0, bytes: 600 };
    let mut encoder = Encoder::new();
    read_back(dir.path(), encoder.encode(piece, &[1; 600], &[2; 600])).unwrap();
    let whole = std::fs::read(dir.path().join("journal")).unwrap();
    let cut = dir.path().join("cut");
    for n in 0..whole.len() {
        std::fs::write(&cut, &whole[..n]).unwrap();
        let read = Reader::open(&cut).and_then(Reader::scan);
        assert!(matches!(read, Err(Error::Torn { .. })), "cut at {n}: {read:?}");
    }
    std::fs::write(&cut, [&whole[..], &[0]].concat()).unwrap();
    let read = Reader::open(&cut).and_then(Reader::scan);
    assert!(matches!(read, Err(Error::Torn { .. })), "one byte more: {read:?}");
}

#[test]
fn a_sealed_document_with_a_flipped_bit_is_refused() {
    let json = generation(3).to_json();
    Generation::from_json(&json).unwrap();
    for bit in 0..json.len() * 8 {
        let mut flipped = json.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Generation::from_json(&flipped).is_err(), "bit {bit}");
    }
}
