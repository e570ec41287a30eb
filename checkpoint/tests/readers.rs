//! Programs that load the model, and syncs of it.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use checkpoint::{Checkpoint, Error, LiveTensor, LiveWeights, Options, Reading, Recovery};
use common::*;

const SHORT: Duration = Duration::from_millis(150);

fn open(dir: &Path) -> Checkpoint {
    let options = Options { readers_wait: SHORT, ..Options::default() };
    Checkpoint::open_with(dir, options).unwrap().0
}

/// Leaves the directory as a crash does that came when a sync of `live` had written into the files.
fn tear(dir: &Path, live: &Live) {
    let before = files(dir);
    for changes in 1.. {
        let storage = Stopping::after(i64::MAX);
        let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), dir, Options::default()).unwrap();
        storage.stop_after(changes);
        try_sync(&mut checkpoint, live, 77).unwrap_err();
        drop(checkpoint);
        if files(dir) != before && dir.join(".apollod/journal").exists() {
            return;
        }
    }
}

#[test]
fn a_sync_and_a_rollback_wait_for_a_reader_and_write_nothing_while_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), true, 0, 1);
    let mut checkpoint = open(dir.path());
    live.train(&mut Rng(2), 9);
    sync(&mut checkpoint, &live, 1);
    let (first, second) = (Reading::begin(dir.path()).unwrap(), Reading::begin(dir.path()).unwrap());
    let before = tree(dir.path());
    live.train(&mut Rng(3), 9);
    for _ in 0..2 {
        let error = try_sync(&mut checkpoint, &live, 2).unwrap_err();
        assert!(matches!(error, Error::Readers { .. }), "{error}");
        assert!(matches!(checkpoint.rollback(0), Err(Error::Readers { .. })));
    }
    assert!(tree(dir.path()) == before);
    first.end().unwrap();
    assert!(try_sync(&mut checkpoint, &live, 2).is_err(), "the second reader is not done");
    // One that ends in time is waited for.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(SHORT / 3);
            second.end().unwrap();
        });
        sync(&mut checkpoint, &live, 2);
    });
    assert_files_are(&checkpoint, &live);
    checkpoint.rollback(1).unwrap();
}

/// Weights that take their time to be read.
struct Slow<'a>(&'a Live, &'a AtomicBool);

impl LiveWeights for Slow<'_> {
    fn tensors(&self) -> &[LiveTensor] {
        self.0.tensors()
    }
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        self.1.store(true, Ordering::Release);
        std::thread::sleep(SHORT);
        self.0.read(tensor, offset, buf);
    }
}

#[test]
fn a_reader_waits_for_a_sync_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), true, 0, 4);
    let mut checkpoint = open(dir.path());
    live.train(&mut Rng(5), 9);
    // One that has not begun its journal yet is waited for too.
    let sync = File::open(dir.path().join(".apollod/readers")).unwrap();
    sync.lock().unwrap();
    assert!(matches!(Reading::begin_within(dir.path(), SHORT), Err(Error::Busy { .. })));
    drop(sync);
    let reading = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let slow = Slow(&live, &reading);
            checkpoint.sync(&slow, &mut |_| Ok(()), progress(1), &mut |_, _| {}).unwrap();
        });
        while !reading.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let too_early = Reading::begin_within(dir.path(), Duration::ZERO);
        assert!(matches!(too_early, Err(Error::Busy { .. })), "{too_early:?}");
        let reader = Reading::begin(dir.path()).unwrap();
        assert_eq!(checkpoint::list(dir.path()).unwrap().last().unwrap().generation, 1);
        reader.end().unwrap();
    });
    assert_files_are(&checkpoint, &live);
}

#[test]
fn what_readers_load_while_syncs_go_on_is_always_one_generation() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), true, 0, 6);
    let mut checkpoint = Checkpoint::open(dir.path()).unwrap().0;
    let (done, loads, began) = (AtomicBool::new(false), AtomicUsize::new(0), Instant::now());
    let mut loaded = Vec::new();
    let mut generations = vec![files(dir.path())];
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut loaded = Vec::new();
            while !done.load(Ordering::Acquire) {
                let reading = Reading::begin(dir.path()).unwrap();
                // Small pieces, so that a sync that did not wait would be seen.
                let first = files(dir.path());
                std::thread::sleep(Duration::from_millis(2));
                assert!(files(dir.path()) == first, "written while it was read");
                reading.end().unwrap();
                loaded.push(first);
                loads.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            loaded
        });
        // On a busy machine the reader may find every moment between two syncs too short.
        for cursor in 1.. {
            live.train(&mut Rng(cursor), 50);
            sync(&mut checkpoint, &live, cursor);
            generations.push(files(dir.path()));
            let loads = loads.load(Ordering::Relaxed);
            if cursor >= 25 && loads > 3 || began.elapsed() > Duration::from_secs(60) {
                break;
            }
        }
        done.store(true, Ordering::Release);
        loaded = reader.join().unwrap();
    });
    assert!(loaded.len() > 3, "{} loads", loaded.len());
    assert!(loaded.iter().all(|one| generations.contains(one)));
}

#[test]
fn what_a_crash_left_is_recovered_before_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 7);
    let mut checkpoint = open(dir.path());
    live.train(&mut Rng(8), 9);
    sync(&mut checkpoint, &live, 1);
    drop(checkpoint);
    let mut next = live.clone();
    next.train(&mut Rng(11), 9);
    tear(dir.path(), &next);

    // A reader that was there before keeps recovery out, and its journal stays.
    let before = tree(dir.path());
    let there = File::open(dir.path().join(".apollod/readers")).unwrap();
    there.lock_shared().unwrap();
    let options = Options { readers_wait: SHORT, ..Options::default() };
    assert!(matches!(Checkpoint::open_with(dir.path(), options), Err(Error::Readers { .. })));
    assert!(same_but_lock(tree(dir.path()), before));
    drop(there);

    // Somebody has the right to recover, and has not done it.
    let writer = File::open(dir.path().join(".apollod/lock")).unwrap();
    writer.lock().unwrap();
    let error = Reading::begin_within(dir.path(), SHORT).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }) && error.to_string().contains("apollod checkpoint recover"), "{error}");
    drop(writer);

    let reading = Reading::begin(dir.path()).unwrap();
    assert!(matches!(reading.recovered(), Some(Recovery::Undone { generation: 1, .. })), "{reading:?}");
    reading.end().unwrap();
    assert_files_are(&open(dir.path()), &live);
}

fn same_but_lock(a: impl IntoIterator<Item = Entry>, b: impl IntoIterator<Item = Entry>) -> bool {
    let but_lock = |(name, _): &Entry| !name.ends_with("lock");
    a.into_iter().filter(but_lock).eq(b.into_iter().filter(but_lock))
}

type Entry = (std::path::PathBuf, Vec<u8>);

#[test]
fn a_directory_without_a_lock_is_read_and_a_sync_in_between_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 9);
    let before = tree(dir.path());
    let reading = Reading::begin(dir.path()).unwrap();
    assert!(tree(dir.path()) == before, "a reader writes nothing");
    // The first open writes nothing into the files either.
    let mut checkpoint = open(dir.path());
    reading.end().unwrap();

    fs::remove_file(dir.path().join(".apollod/readers")).unwrap();
    let (quiet, overtaken) = (Reading::begin(dir.path()).unwrap(), Reading::begin(dir.path()).unwrap());
    quiet.end().unwrap();
    live.train(&mut Rng(10), 9);
    sync(&mut checkpoint, &live, 1);
    assert!(matches!(overtaken.end(), Err(Error::Overwritten { .. })));
    drop(checkpoint);

    let reading = Reading::begin(dir.path()).unwrap();
    reading.end().unwrap();
    live.train(&mut Rng(12), 9);
    tear(dir.path(), &live);
    fs::remove_file(dir.path().join(".apollod/readers")).unwrap();
    assert!(matches!(Reading::begin_within(dir.path(), SHORT), Err(Error::Busy { .. })));
}
