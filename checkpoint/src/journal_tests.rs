//! Tests of reading damaged journals and documents.

use super::*;
use crate::generation::Progress;
use crate::piece::{BlockSet, CHUNK, Piece};
use crate::record::Encoder;

fn generation(number: u64) -> Generation {
    let progress = Progress { loss: Some(0.1), ..Progress::default() };
    Generation { previous: Some(0), progress, ratio: 0.1, ..Generation::empty(number) }
}

/// A journal of two records.
fn journal(disk: &Disk, path: &Path) -> Vec<u8> {
    let head = Head { generation: 1, previous: 0, shards: vec![HeadShard { file: "a".into(), bytes: CHUNK * 5 }] };
    let mut writer = Writer::create(disk, path, &head).unwrap();
    let mut changed = BlockSet::default();
    changed.insert(0);
    for offset in [0, CHUNK] {
        let piece = Piece { shard: 0, width: 1, offset, bytes: 600 };
        writer
            .record(&Encoder::default().encode(piece, &changed, &[1; 600], &mut vec![2; 600], Vec::new).body)
            .unwrap();
    }
    writer.finish(&generation(1)).unwrap();
    std::fs::read(path).unwrap()
}

fn scan(disk: &Disk, path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).unwrap();
    Reader::open(disk, path).and_then(Reader::scan)
}

#[test]
fn a_journal_cut_anywhere_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = (Disk::real(), dir.path().join("journal"));
    let whole = journal(&disk, &path);
    scan(&disk, &path, &whole).unwrap();
    for n in 0..whole.len() {
        let read = scan(&disk, &path, &whole[..n]);
        match read {
            // What is read at once: the body of a frame as far as it goes, and beside it 32 bytes at the most.
            Err(Error::Torn { byte, .. }) => assert!(n as u64 - byte < 32, "cut at {n}: torn at byte {byte}"),
            read => panic!("cut at {n}: {read:?}"),
        }
    }
    let read = scan(&disk, &path, &[&whole[..], &[0]].concat());
    assert!(matches!(read, Err(Error::Torn { .. })), "one byte more: {read:?}");
}

#[test]
fn what_is_torn_says_where_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = (Disk::real(), dir.path().join("journal"));
    let whole = journal(&disk, &path);
    let head = 16 + u32::from_le_bytes(*whole[12..].first_chunk().unwrap()) as usize;
    let long = |body: u32| [&whole[..12], &body.to_le_bytes()].concat();
    let mut flipped = whole.clone();
    flipped[head] ^= 1;
    for (bytes, at, why) in [
        (whole[..5].to_vec(), 0, "it ends too early"),
        (whole[1..].to_vec(), 8, "it does not begin as a journal"),
        (
            b"APOLJNL3".to_vec(),
            8,
            "it is of another version of apollod: its format is APOLJNL3, this one reads APOLJNL4",
        ),
        (long(BODY_MAX + 1), 16, "a frame is longer than a frame can be"),
        (long(BODY_MAX), 16, "it ends inside a frame"),
        (whole[..head - 3].to_vec(), head - 3, "it ends inside a frame"),
        (whole[..head + 7].to_vec(), head, "it ends too early"),
        (flipped, head + 8, "a frame does not match its checksum"),
    ] {
        match scan(&disk, &path, &bytes) {
            Err(Error::Torn { byte, reason, .. }) => assert_eq!((byte, reason.as_str()), (at as u64, why)),
            other => panic!("{why}: {other:?}"),
        }
    }
}

#[test]
fn a_journal_of_which_every_frame_is_whole_and_one_is_missing_or_out_of_order_is_torn() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, path) = (Disk::real(), dir.path().join("journal"));
    let whole = journal(&disk, &path);
    let (magic, mut rest) = whole.split_at(8);
    let mut frames = Vec::new();
    while rest.len() > 32 {
        let body = u32::from_le_bytes(*rest[4..].first_chunk().unwrap()) as usize;
        let (frame, more) = rest.split_at(8 + body + 8);
        frames.push(frame);
        rest = more;
    }
    let [head, first, second, end] = frames[..] else { panic!("{} frames", frames.len()) };
    let of = |frames: &[&[u8]]| [magic, &frames.concat(), rest].concat();
    scan(&disk, &path, &of(&[head, first, second, end])).unwrap();
    for frames in [&[head, first, end][..], &[head, second, first, end], &[head, first, first, end]] {
        let read = scan(&disk, &path, &of(frames));
        assert!(matches!(read, Err(Error::Torn { .. })), "{read:?}");
    }
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
