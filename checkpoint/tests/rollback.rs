//! Going back to an earlier generation.

mod common;

use std::fs;

use checkpoint::{Checkpoint, Error};
use common::*;

/// A model with generations 1..=4; gives the live weights of each, the base first.
fn four_generations(dir: &std::path::Path, seed: u64) -> (Checkpoint, Vec<Live>) {
    let mut live = make_model(dir, true, 2, seed);
    let (mut checkpoint, _) = Checkpoint::open(dir).unwrap();
    let mut rng = Rng(seed + 1);
    let mut all = vec![live.clone()];
    for cursor in 1..=4 {
        // The third changes little, so that deltas do not cover the same pieces.
        live.train(&mut rng, if cursor == 3 { 50_000 } else { 2 });
        sync(&mut checkpoint, &live, cursor);
        all.push(live.clone());
    }
    (checkpoint, all)
}

#[test]
fn rollback_restores_files_state_and_cursor_of_every_kept_generation() {
    for to in 0..=3 {
        let dir = tempfile::tempdir().unwrap();
        let (mut checkpoint, all) = four_generations(dir.path(), 20);
        let want = checkpoint::list(dir.path()).unwrap()[to as usize].clone();
        let report = checkpoint.rollback(to).unwrap();
        assert_eq!((report.to, report.sync.generation), (to, 5));
        assert_files_are(&checkpoint, &all[to as usize]);
        let now = checkpoint.current();
        assert_eq!(now.rollback_of, Some(to));
        assert_eq!(now.progress, want.progress);
        assert_eq!(now.tensors, want.tensors);
        let state = (to > 0).then(|| state_of(to));
        assert_eq!(read_state(&checkpoint), state);
    }
}

#[test]
fn a_rollback_to_the_current_generation_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let (mut checkpoint, all) = four_generations(dir.path(), 25);
    let before = checkpoint.current().clone();
    let report = checkpoint.rollback(4).unwrap();
    assert!(report.sync.unchanged && report.sync.generation == 4, "{report}");
    assert!(checkpoint.current() == &before && checkpoint.generations().unwrap().len() == 5);
    assert_files_are(&checkpoint, &all[4]);
    // It is a promise about files and state all the same.
    let state = dir.path().join(".apollod/state/4");
    let good = fs::read(&state).unwrap();
    fs::write(&state, "damaged").unwrap();
    assert!(matches!(checkpoint.rollback(4).unwrap_err(), Error::State { .. }));
    fs::write(&state, good).unwrap();
    let path = dir.path().join("model-00001-of-00002.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes[700_000] ^= 4;
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(checkpoint.rollback(4).unwrap_err(), Error::Changed { .. }));
}

#[test]
fn a_rollback_can_be_rolled_back() {
    let dir = tempfile::tempdir().unwrap();
    let (mut checkpoint, all) = four_generations(dir.path(), 30);
    checkpoint.rollback(2).unwrap();
    let mut live = all[2].clone();
    live.train(&mut Rng(31), 4);
    sync(&mut checkpoint, &live, 6);
    checkpoint.rollback(4).unwrap();
    assert_files_are(&checkpoint, &all[4]);
    assert_eq!(checkpoint.current().progress, progress(4));
    drop(checkpoint);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    checkpoint.rollback(6).unwrap();
    assert_files_are(&checkpoint, &live);
}

#[test]
fn a_damaged_delta_stops_a_rollback_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (mut checkpoint, all) = four_generations(dir.path(), 40);
    let path = dir.path().join(".apollod/history/2.delta");
    let whole = fs::read(&path).unwrap();
    let mut rng = Rng(41);
    for _ in 0..20 {
        let mut bytes = whole.clone();
        let bit = rng.below(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, bytes).unwrap();
        let error = checkpoint.rollback(1).unwrap_err();
        assert!(matches!(error, Error::Delta { .. }), "bit {bit}: {error}");
        assert!(error.to_string().contains("2.delta") && error.to_string().contains("repair"), "{error}");
        assert_files_are(&checkpoint, &all[4]);
    }
}

#[test]
fn a_file_that_someone_changed_stops_a_rollback_and_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (mut checkpoint, all) = four_generations(dir.path(), 50);
    let path = dir.path().join("model-00001-of-00002.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes[700_000] ^= 4;
    fs::write(&path, &bytes).unwrap();
    let named = |error: Error| match error {
        Error::Changed { tensor, .. } => assert_eq!(tensor, all[0].tensors[0].name),
        other => panic!("{other}"),
    };
    named(checkpoint.rollback(3).unwrap_err());
    named(try_sync(&mut checkpoint, &all[1], 9).unwrap_err());
    assert!(fs::read(&path).unwrap() == bytes);

    // The way on: accept the files as they are.
    let adopted = checkpoint.adopt(progress(9)).unwrap();
    assert_eq!((adopted.generation, adopted.previous), (5, None));
    assert!(checkpoint.verify().unwrap().is_ok());
    assert!(matches!(checkpoint.rollback(4), Err(Error::NotRestorable { .. })));
    sync(&mut checkpoint, &all[1], 10);
    assert_files_are(&checkpoint, &all[1]);
    checkpoint.rollback(5).unwrap();
    assert!(fs::read(&path).unwrap() == bytes);
}

#[test]
fn a_damaged_optimizer_state_is_refused_and_found() {
    let dir = tempfile::tempdir().unwrap();
    let (checkpoint, _) = four_generations(dir.path(), 60);
    let path = dir.path().join(".apollod/state/4");
    let mut bytes = fs::read(&path).unwrap();
    bytes[1234] ^= 16;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(checkpoint.state().map(drop), Err(Error::State { generation: 4, .. })));
    let report = checkpoint.verify().unwrap();
    assert!(report.to_string().contains("state/4"), "{report}");
}
