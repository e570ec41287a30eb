//! Journals that are not whole.

mod common;

use std::fs;
use std::path::Path;

use checkpoint::{Checkpoint, CrashAction, CrashPoint, Error, Fault, Recovery};
use common::*;

/// A directory at generation 1 with the journal of generation 2 published and no block written, or some.
fn with_journal(dir: &Path, point: CrashPoint) -> (Live, Live) {
    let mut live = make_model(dir, true, 0, 1);
    let (mut checkpoint, _) = Checkpoint::open(dir).unwrap();
    live.train(&mut Rng(2), 3);
    sync(&mut checkpoint, &live, 1);
    let one = live.clone();
    live.train(&mut Rng(3), 3);
    checkpoint.crash_at(Some(Fault { point, after: 1, action: CrashAction::Stop }));
    if point == CrashPoint::JournalPublished {
        checkpoint.crash_at(Some(Fault { point, after: 0, action: CrashAction::Stop }));
    }
    try_sync(&mut checkpoint, &live, 2).unwrap_err();
    (one, live)
}

fn assert_discarded(dir: &Path, before: &std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>) {
    let (checkpoint, recovery) = Checkpoint::open(dir).unwrap();
    assert!(matches!(recovery, Recovery::Discarded { generation: 1, .. }), "{recovery}");
    assert!(recovery.to_string().contains("torn at byte"), "{recovery}");
    assert_eq!(checkpoint.current().progress, progress(1));
    assert!(!dir.join(".apollod/journal").exists());
    assert!(!dir.join(".apollod/state/2").exists());
    assert!(&files(dir) == before);
}

#[test]
fn a_torn_journal_is_discarded_with_the_files_untouched() {
    let dir = tempfile::tempdir().unwrap();
    with_journal(dir.path(), CrashPoint::JournalPublished);
    let before = files(dir.path());
    let journal = dir.path().join(".apollod/journal");
    let whole = fs::read(&journal).unwrap();
    let mut lengths: Vec<usize> = vec![0, 1, 7, 8, 9, 15, 16, 40, 512, 4096];
    lengths.extend((1..12).map(|back| whole.len() - back * back));
    let mut rng = Rng(4);
    println!("seed 4");
    lengths.extend((0..10).map(|_| rng.below(whole.len())));
    for n in lengths {
        println!("cut to {n} of {}", whole.len());
        fs::write(&journal, &whole[..n]).unwrap();
        assert_discarded(dir.path(), &before);
    }
    for seed in 0..25 {
        println!("flip with seed {seed}");
        let mut bytes = whole.clone();
        let bit = Rng(seed).below(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&journal, bytes).unwrap();
        assert_discarded(dir.path(), &before);
    }
}

#[test]
fn a_journal_damaged_after_blocks_were_written_is_never_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let (_, two) = with_journal(dir.path(), CrashPoint::BlocksPartial);
    let before = tree(dir.path());
    let journal = dir.path().join(".apollod/journal");
    let whole = fs::read(&journal).unwrap();
    let mut bytes = whole.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&journal, &bytes).unwrap();
    match Checkpoint::open(dir.path()).unwrap_err() {
        Error::Stranded { damage, .. } => {
            assert!(damage.contains("model.embed_tokens.weight"), "{damage}");
        }
        other => panic!("{other}"),
    }
    assert!(checkpoint::verify(dir.path()).is_err());
    fs::write(&journal, &whole).unwrap();
    assert!(tree(dir.path()) == before);
    let (checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    assert_files_are(&checkpoint, &two);
}

#[test]
fn a_damaged_journal_of_a_generation_already_published_costs_only_its_undo() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 5);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    live.train(&mut Rng(6), 3);
    checkpoint.crash_at(Some(Fault { point: CrashPoint::GenerationPublished, after: 0, action: CrashAction::Stop }));
    try_sync(&mut checkpoint, &live, 1).unwrap_err();
    drop(checkpoint);
    let journal = dir.path().join(".apollod/journal");
    fs::write(&journal, b"APOLJNL1").unwrap();
    let (mut checkpoint, recovery) = Checkpoint::open(dir.path()).unwrap();
    assert!(matches!(recovery, Recovery::Discarded { generation: 1, .. }), "{recovery}");
    assert_files_are(&checkpoint, &live);
    assert!(matches!(checkpoint.rollback(0), Err(Error::NotRestorable { .. })));
}
