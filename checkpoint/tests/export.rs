//! Copies made while syncs go on.

mod common;

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use checkpoint::{Checkpoint, Error, Options};
use common::*;

const SYNCS: usize = 20;

/// Fails unless `copy` is a model with exactly these weights and nothing of `.apollod`.
fn assert_copy_is(copy: &Path, live: &Live) {
    assert!(!copy.join(".apollod").exists());
    assert!(copy.join("config.json").exists());
    let scratch = tempfile::tempdir().unwrap();
    let again = scratch.path().join("copy");
    copy_tree(copy, &again);
    let (checkpoint, _) = Checkpoint::open(&again).unwrap();
    assert_files_are(&checkpoint, live);
}

#[test]
fn an_export_during_syncs_is_always_exactly_one_generation() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let mut live = make_model(&model, true, 0, 1);
    let (mut checkpoint, _) = Checkpoint::open(&model).unwrap();
    let mut rng = Rng(2);
    let mut all = vec![live.clone()];
    for _ in 0..SYNCS {
        live.train(&mut rng, 4);
        all.push(live.clone());
    }
    let done = AtomicBool::new(false);
    let reports = std::thread::scope(|scope| {
        let exporter = scope.spawn(|| {
            let mut reports = Vec::new();
            while !done.load(Ordering::Acquire) {
                let to = dir.path().join(format!("copy-{}", reports.len()));
                reports.push(checkpoint::export(&model, &to));
            }
            reports
        });
        for (cursor, live) in all.iter().enumerate().skip(1) {
            sync(&mut checkpoint, live, cursor as u64);
        }
        done.store(true, Ordering::Release);
        exporter.join().unwrap()
    });
    let mut generations = Vec::new();
    for (i, report) in reports.into_iter().enumerate() {
        let report = report.unwrap();
        println!("{report}, {} attempts", report.attempts);
        let generation = report.generation.unwrap();
        let copy = dir.path().join(format!("copy-{i}"));
        assert_copy_is(&copy, &all[generation as usize]);
        generations.push(generation);
    }
    assert!(generations.is_sorted());
    generations.dedup();
    assert!(generations.len() > 2, "syncs came between: {generations:?}");
    let left = fs::read_dir(dir.path()).unwrap();
    let partial = left.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("partial")
    });
    assert_eq!(partial.count(), 0);
}

#[test]
fn an_export_of_a_directory_whose_sync_was_cut_short_is_a_whole_generation() {
    let mut seen = [0, 0];
    for changes in (0..).step_by(3) {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        let base = make_model(&model, true, 0, 3);
        drop(Checkpoint::open(&model).unwrap());
        let mut live = base.clone();
        live.train(&mut Rng(4), 3);
        let disk = Stopping::after(i64::MAX);
        let options = Options { segment: 4096, ..Options::default() };
        let (mut checkpoint, _) = Checkpoint::open_on(disk.clone(), &model, options).unwrap();
        disk.stop_after(changes);
        let whole = try_sync(&mut checkpoint, &live, 1).is_ok();
        drop(checkpoint);
        let before = tree(&model);
        let to = dir.path().join("copy");
        let report = checkpoint::export(&model, &to).unwrap();
        let generation = report.generation.unwrap();
        assert_copy_is(&to, if generation == 0 { &base } else { &live });
        assert!(tree(&model) == before);
        seen[generation as usize] += 1;
        if whole {
            break;
        }
    }
    println!("exports of generation 0 and 1: {seen:?}");
    assert!(seen[0] > 5 && seen[1] > 1, "{seen:?}");
}

#[test]
fn a_damaged_source_is_not_exported() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    make_model(&model, false, 0, 5);
    drop(Checkpoint::open(&model).unwrap());
    let shard = model.join("model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[400_000] ^= 2;
    fs::write(&shard, bytes).unwrap();
    let to = dir.path().join("copy");
    let error = checkpoint::export(&model, &to).unwrap_err();
    assert!(matches!(error, Error::Source { generation: 0, .. }), "{error}");
    assert!(error.to_string().contains("embed_tokens"), "{error}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn an_export_overwrites_nothing_and_does_not_copy_itself() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    make_model(&model, false, 0, 6);
    let exists = checkpoint::export(&model, dir.path()).unwrap_err();
    assert!(matches!(exists, Error::Target { .. }), "{exists}");
    let inside = checkpoint::export(&model, &model.join("copy")).unwrap_err();
    assert!(matches!(inside, Error::Target { .. }), "{inside}");
}
