//! Every flipped bit of what is kept is found and named.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{Checkpoint, Error, Options, verify};
use common::*;

/// A model with generations 0..=3, of which 0 is too far back to be restored.
fn model(dir: &Path, seed: u64) {
    let mut live = make_model(dir, true, 3, seed);
    let keep = checkpoint::Keep { generations: 2, ..Default::default() };
    let (mut checkpoint, _) = Checkpoint::open_with(dir, checkpoint::Options { keep, ..Default::default() }).unwrap();
    for cursor in 1..=3 {
        live.train(&mut Rng(seed + cursor), 9);
        sync(&mut checkpoint, &live, cursor);
    }
    assert_eq!(fs::read_dir(dir.join(".apollod/history")).unwrap().count(), 2);
}

/// What verify says: its report, or its error.
fn said(dir: &Path) -> String {
    match verify(dir) {
        Ok(report) => report.damage.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_flipped_bit_anywhere_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let seed = std::env::var("TEST_SEED").map_or(71, |seed| seed.parse().unwrap());
    println!("TEST_SEED={seed}");
    model(dir, seed);
    let whole = verify(dir).unwrap();
    assert!(whole.is_ok(), "{whole}");
    assert!(whole.to_string().contains("2 earlier generations, "), "{whole}");
    let tensors = checkpoint::list(dir).unwrap().pop().unwrap();
    let kept = tree(dir).into_keys().filter(|name| {
        let name = name.to_str().unwrap();
        name.ends_with(".safetensors")
            || (name.starts_with(".apollod/") && !name.ends_with("lock") && !name.ends_with("readers"))
    });
    let mut rng = Rng(seed);
    let mut kinds = 0;
    for name in kept {
        kinds += 1;
        let path = dir.join(&name);
        let good = fs::read(&path).unwrap();
        for _ in 0..12 {
            let (byte, bit) = (rng.below(good.len()), rng.below(8));
            let mut bad = good.clone();
            bad[byte] ^= 1 << bit;
            fs::write(&path, bad).unwrap();
            let said = said(dir);
            let place = format!("{}, byte {byte}, bit {bit}: {said:?}", name.display());
            // A report of an earlier generation's file has the path as the system writes it.
            assert!(said.contains(name.to_str().unwrap()) && !said.contains('\n'), "{place}");
            let shard = tensors.shards.iter().position(|shard| Path::new(&shard.file) == name);
            let here = |t: &&checkpoint::TensorSum| {
                Some(t.shard) == shard && (t.offset..t.offset + t.bytes).contains(&(byte as u64))
            };
            if let Some(tensor) = tensors.tensors.iter().find(here) {
                assert!(said.contains(&format!("tensor `{}` is damaged in 1 of", tensor.name)), "{place}");
                let block = said.rsplit_once(" at its bytes ").unwrap().1.split_once("..").unwrap();
                let block = block.0.parse().unwrap()..block.1.parse().unwrap();
                assert!(block.contains(&(byte as u64 - tensor.offset)) && block.end - block.start <= 16384, "{place}");
            }
        }
        fs::write(&path, good).unwrap();
    }
    // Two shards, sums, three states, two deltas, four documents.
    assert_eq!(kinds, 12);
    assert!(verify(dir).unwrap().is_ok());
}

#[test]
fn what_a_rollback_needs_and_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    model(dir, 81);
    for name in [".apollod/history/2.delta", ".apollod/history/3.delta", ".apollod/state/2", ".apollod/state/1"] {
        let good = fs::read(dir.join(name)).unwrap();
        fs::remove_file(dir.join(name)).unwrap();
        let said = said(dir);
        assert!(said.starts_with(&format!("{}: it is missing; generation", dir.join(name).display())), "{said}");
        fs::write(dir.join(name), good).unwrap();
    }
    // A delta under another's name checks in itself.
    fs::copy(dir.join(".apollod/history/3.delta"), dir.join(".apollod/history/2.delta")).unwrap();
    assert!(said(dir).contains("it is the delta of generation 3; generation"), "{}", said(dir));
}

#[test]
fn damage_of_the_history_does_not_keep_the_current_generation_from_being_used() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 91);
    fs::write(dir.path().join(".apollod/history/3.delta"), "damaged").unwrap();
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    assert!(checkpoint.verify().unwrap().is_ok());
    assert!(matches!(checkpoint.rollback(2), Err(Error::Delta { .. })));
    assert!(!verify(dir.path()).unwrap().is_ok());
}

#[test]
fn what_syncs_remove_meanwhile_is_not_taken_for_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), true, 0, 95);
    let keep = checkpoint::Keep { generations: 1, ..Default::default() };
    let options = Options { keep, ..Options::default() };
    let (mut checkpoint, _) = Checkpoint::open_with(dir.path(), options).unwrap();
    let ended = AtomicBool::new(false);
    let verified = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut rng = Rng(96);
            for cursor in 1..=150 {
                live.train(&mut rng, 3);
                sync(&mut checkpoint, &live, cursor);
            }
            ended.store(true, Ordering::SeqCst);
        });
        let mut verified = 0;
        while !ended.load(Ordering::SeqCst) {
            match verify(dir.path()) {
                Ok(report) => assert!(report.is_ok(), "{report}"),
                Err(Error::Busy { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            verified += 1;
        }
        verified
    });
    println!("{verified} times");
    assert!(verified > 0);
}
