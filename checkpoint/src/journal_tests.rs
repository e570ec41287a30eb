//! Tests of reading damaged journals and documents.

use super::*;
use crate::generation::{Progress, VERSION};
use crate::piece::{BlockSet, CHUNK, Piece};
use crate::record::Encoder;

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

#[test]
fn a_journal_cut_anywhere_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let disk = Disk::real();
    let head = Head { generation: 1, previous: 0, shards: vec![HeadShard { file: "a".into(), bytes: CHUNK * 5 }] };
    let mut writer = Writer::create(&disk, &path, &head).unwrap();
    let piece = Piece { shard: 0, width: 1, offset: 0, bytes: 600 };
    let mut changed = BlockSet::default();
    changed.insert(0);
    writer.record(&Encoder::new().encode(piece, &changed, &[1; 600], &[2; 600]).body).unwrap();
    writer.finish(&generation(1)).unwrap();
    let whole = std::fs::read(&path).unwrap();
    Reader::open(&disk, &path).and_then(Reader::scan).unwrap();
    let cut = dir.path().join("cut");
    for n in 0..whole.len() {
        std::fs::write(&cut, &whole[..n]).unwrap();
        let read = Reader::open(&disk, &cut).and_then(Reader::scan);
        assert!(matches!(read, Err(Error::Torn { .. })), "cut at {n}: {read:?}");
    }
    std::fs::write(&cut, [&whole[..], &[0]].concat()).unwrap();
    let read = Reader::open(&disk, &cut).and_then(Reader::scan);
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
