//! Hostile surroundings: shards that change under an open checkpoint, links, media that are full, read-only or cannot be
//! read, clocks that jump, and fifty openers at once. DESIGN.md has the list.

mod common;

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use checkpoint::{Checkpoint, Error, Keep, LiveTensor, LiveWeights, Options, Recovery};
use common::failing::{EACCES, EIO, EROFS, Failing, Operation};
use common::*;

const SECOND: &str = "model-00002-of-00002.safetensors";

/// A segment for each megabyte, so that blocks are written before all is compared.
fn options() -> Options {
    Options { segment: 1, threads: 1, ..Options::default() }
}

fn open_on(storage: &Arc<Failing>, dir: &Path) -> checkpoint::Result<(Checkpoint, Recovery)> {
    Checkpoint::open_on(storage.clone(), dir, options())
}

fn trained(live: &Live, seed: u64) -> Live {
    let mut live = live.clone();
    live.train(&mut Rng(seed), 3);
    live
}

/// Takes away whatever is there by that name.
fn clear(path: &Path) {
    if path.is_dir() {
        fs::remove_dir(path).unwrap()
    } else {
        let _ = fs::remove_file(path);
    }
}

type Meddle = fn(&Path);

/// What somebody else may do to a shard, and what is then said of it.
const MEDDLES: [(&str, Meddle, &str); 10] = [
    ("cut in half", |path| resize(path, |bytes| bytes / 2), "bytes and its header describes"),
    ("cut in its header", |path| resize(path, |_| 100), "which cannot be"),
    ("emptied", |path| resize(path, |_| 0), "shorter than a safetensors header"),
    ("grown", |path| resize(path, |bytes| bytes + 1), "bytes and its header describes"),
    ("removed", |path| fs::remove_file(path).unwrap(), "it is not there"),
    ("replaced by another model's", |path| replace(path, 8, 77), "is not the file of generation"),
    ("replaced by other weights", |path| replace(path, 0, 78), "someone else wrote into it"),
    ("replaced by a link", to_link, "is a symbolic link"),
    ("given a second name", |path| fs::hard_link(path, path.with_extension("other")).unwrap(), "has 2 hard links"),
    ("replaced by a folder", to_folder, "is not a regular file"),
];

fn resize(path: &Path, bytes: impl Fn(u64) -> u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(bytes(file.metadata().unwrap().len())).unwrap();
}

/// The second shard of a model that another training made, renamed over this one.
fn replace(path: &Path, pad: usize, seed: u64) {
    let other = tempfile::tempdir_in(path.parent().unwrap()).unwrap();
    make_model(other.path(), true, pad, seed);
    fs::rename(other.path().join(SECOND), path).unwrap();
}

fn to_link(path: &Path) {
    let aside = path.with_extension("other");
    fs::rename(path, &aside).unwrap();
    symlink(aside, path).unwrap();
}

fn to_folder(path: &Path) {
    fs::remove_file(path).unwrap();
    fs::create_dir(path).unwrap();
}

#[test]
fn a_shard_that_is_not_what_it_was_stops_a_sync_and_a_rollback_with_nothing_written() {
    for (what, meddle, reason) in MEDDLES {
        for synced in [false, true] {
            println!("{what}, {}", if synced { "between two syncs" } else { "between open and sync" });
            let dir = tempfile::tempdir().unwrap();
            let base = make_model(dir.path(), true, 0, 1);
            let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
            if synced {
                sync(&mut checkpoint, &trained(&base, 2), 1);
            }
            let shard = dir.path().join(SECOND);
            let good = fs::read(&shard).unwrap();
            meddle(&shard);
            let before = tree(dir.path());
            let next = trained(&base, 3);
            let errors = [try_sync(&mut checkpoint, &next, 2).map(drop), checkpoint.rollback(0).map(drop)];
            for error in errors.map(|result| result.unwrap_err().to_string()) {
                assert!(error.contains(reason) && error.contains(SECOND), "{error}");
            }
            assert!(tree(dir.path()) == before, "something was written");
            clear(&shard.with_extension("other"));
            clear(&shard);
            fs::write(&shard, &good).unwrap();
            sync(&mut checkpoint, &next, 2);
            assert_files_are(&checkpoint, &next);
        }
    }
}

/// Weights that do something when one of their tensors from here on is read first.
struct Meddling<'a> {
    live: &'a Live,
    from: usize,
    meddle: &'a (dyn Fn() + Sync),
    done: AtomicBool,
}

impl LiveWeights for Meddling<'_> {
    fn tensors(&self) -> &[LiveTensor] {
        self.live.tensors()
    }
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        if tensor >= self.from && !self.done.swap(true, Ordering::SeqCst) {
            (self.meddle)();
        }
        self.live.read(tensor, offset, buf);
    }
}

fn sync_meddled(checkpoint: &mut Checkpoint, live: &Live, from: usize, meddle: &(dyn Fn() + Sync)) -> Error {
    let live = Meddling { live, from, meddle, done: AtomicBool::new(false) };
    let write = &mut |out: &mut dyn Write| out.write_all(&state_of(2));
    checkpoint.sync(&live, write, progress(2), &mut |_, _| {}).unwrap_err()
}

#[test]
fn a_shard_cut_in_the_middle_of_a_sync_is_said_and_what_was_written_is_undone() {
    // Before any of its blocks was written, and after: then they lie in what is cut off.
    for (from, bytes, at_once) in [(2, 3000, true), (4, 100, false)] {
        let dir = tempfile::tempdir().unwrap();
        let base = make_model(dir.path(), true, 0, 10);
        let one = trained(&base, 11);
        let (mut checkpoint, _) = Checkpoint::open_with(dir.path(), options()).unwrap();
        sync(&mut checkpoint, &one, 1);
        let (whole, two) = (tree(dir.path()), trained(&one, 12));
        let shard = dir.path().join(SECOND);
        let good = fs::read(&shard).unwrap();

        let error = sync_meddled(&mut checkpoint, &two, from, &|| resize(&shard, |_| bytes));
        assert!(error.to_string().contains(SECOND), "{error}");
        assert!(fs::metadata(&shard).unwrap().len() < good.len() as u64);
        assert_eq!(checkpoint.unusable().is_none(), at_once, "{error}");
        if !at_once {
            // The journal stays until the file is back.
            drop(checkpoint);
            assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains(SECOND));
            fs::write(&shard, &good).unwrap();
            (checkpoint, _) = Checkpoint::open_with(dir.path(), options()).unwrap();
        }
        fs::write(&shard, &good).unwrap();
        assert!(tree(dir.path()) == whole);
        sync(&mut checkpoint, &two, 2);
        assert_files_are(&checkpoint, &two);
    }
}

#[test]
fn a_block_that_a_second_writer_changed_is_named_with_tensor_and_file() {
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 20);
    let one = trained(&base, 21);
    let (mut checkpoint, _) = Checkpoint::open_with(dir.path(), options()).unwrap();
    sync(&mut checkpoint, &one, 1);
    let current = checkpoint.current().clone();
    for tensor in current.tensors.iter().filter(|tensor| tensor.dtype != "U8") {
        let file = dir.path().join(&current.shards[tensor.shard].file);
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        bad[(tensor.offset + tensor.bytes / 2) as usize] ^= 1;
        fs::write(&file, &bad).unwrap();
        let before = tree(dir.path());
        match try_sync(&mut checkpoint, &trained(&one, 22), 2).unwrap_err() {
            Error::Changed { tensor: named, path, generation: 1 } => {
                assert_eq!((named, path), (tensor.name.clone(), file.clone()))
            }
            other => panic!("{other}"),
        }
        assert!(tree(dir.path()) == before, "blocks of the segments before are undone");
        fs::write(&file, &good).unwrap();
    }
    sync(&mut checkpoint, &trained(&one, 22), 2);
    assert_files_are(&checkpoint, &trained(&one, 22));
}

#[test]
fn a_hugging_face_cache_is_refused_with_the_way_out_and_stays_as_it_is() {
    let cache = tempfile::tempdir().unwrap();
    let (made, blobs) = (cache.path().join("made"), cache.path().join("blobs"));
    let snapshot = cache.path().join("snapshots/5f1bd4a0");
    let base = make_model(&made, true, 0, 30);
    fs::create_dir(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (i, name) in files(&made).into_keys().enumerate() {
        let blob = format!("{i:064x}");
        fs::rename(made.join(&name), blobs.join(&blob)).unwrap();
        symlink(Path::new("../../blobs").join(blob), snapshot.join(name)).unwrap();
    }
    let before = tree(cache.path());
    match Checkpoint::open(&snapshot).unwrap_err() {
        Error::Symlink { path } => assert!(path.starts_with(&snapshot)),
        other => panic!("{other}"),
    }
    assert!(tree(cache.path()) == before, "the cache is not as it was");

    // The link of a shard alone, and a snapshot that is reached by a link itself, which is no harm.
    let copy = cache.path().join("copy");
    checkpoint::export(&snapshot, &copy).unwrap();
    symlink(&copy, cache.path().join("link")).unwrap();
    let (mut checkpoint, _) = Checkpoint::open(&cache.path().join("link")).unwrap();
    sync(&mut checkpoint, &trained(&base, 31), 1);
    assert_files_are(&checkpoint, &trained(&base, 31));
    assert!(files(&blobs).into_iter().all(|(name, bytes)| before[&Path::new("blobs").join(name)] == bytes));
}

#[test]
fn a_read_only_directory_is_said_at_open_and_at_sync_and_nothing_is_written() {
    for errno in [EROFS, EACCES] {
        let dir = tempfile::tempdir().unwrap();
        let base = make_model(dir.path(), true, 0, 40);
        let storage = Failing::new();
        let refused = |error: Error| match &error {
            Error::Io { source, .. } if source.raw_os_error() == Some(errno) => {}
            _ => panic!("{error}"),
        };
        storage.seal(errno);
        refused(open_on(&storage, dir.path()).unwrap_err());
        assert!(!dir.path().join(".apollod").exists());
        storage.mend();
        let (mut checkpoint, _) = open_on(&storage, dir.path()).unwrap();
        sync(&mut checkpoint, &trained(&base, 41), 1);

        let before = tree(dir.path());
        storage.seal(errno);
        refused(try_sync(&mut checkpoint, &trained(&base, 42), 2).unwrap_err());
        refused(checkpoint.rollback(0).unwrap_err());
        assert_files_are(&checkpoint, &trained(&base, 41));
        drop(checkpoint);
        refused(open_on(&storage, dir.path()).unwrap_err());
        assert!(tree(dir.path()) == before);

        // In the middle of a sync, as when the kernel has met an error of the disk.
        storage.mend();
        let (mut checkpoint, _) = open_on(&storage, dir.path()).unwrap();
        let error = sync_meddled(&mut checkpoint, &trained(&base, 42), 2, &|| storage.seal(errno));
        assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        drop(checkpoint);
        storage.mend();
        let (checkpoint, recovery) = open_on(&storage, dir.path()).unwrap();
        assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
        assert_files_are(&checkpoint, &trained(&base, 41));
        drop(checkpoint);
        assert!(tree(dir.path()) == before);
    }
}

#[test]
fn a_file_system_that_is_full_at_any_byte_keeps_the_generation_and_takes_the_next_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 50);
    let (one, two) = (trained(&base, 51), trained(&base, 52));
    let storage = Failing::new();
    let (mut checkpoint, _) = open_on(&storage, dir.path()).unwrap();
    sync(&mut checkpoint, &one, 1);
    let before = tree(dir.path());
    let (mut at_once, mut at_open) = (0, 0);
    for room in (0..).map(|n| n * 60_000) {
        storage.leave_room(room);
        let error = match try_sync(&mut checkpoint, &two, 2) {
            Ok(_) => break,
            Err(error) => error,
        };
        assert!(error.to_string().contains("no space left on the file system of"), "{error}");
        storage.mend();
        if checkpoint.unusable().is_none() {
            at_once += 1;
        } else {
            // No room for taking the blocks back either.
            at_open += 1;
            drop(checkpoint);
            let (again, recovery) = open_on(&storage, dir.path()).unwrap();
            assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
            checkpoint = again;
        }
        assert!(tree(dir.path()) == before, "{room} bytes");
    }
    assert_files_are(&checkpoint, &two);
    println!("undone at once {at_once} times, by the next open {at_open} times");
    assert!(at_once > 0 && at_open > 0);
}

#[test]
fn too_little_room_is_said_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 60);
    let storage = Failing::new();
    let (mut checkpoint, _) = open_on(&storage, dir.path()).unwrap();
    let before = tree(dir.path());
    storage.say_free(1000);
    match try_sync(&mut checkpoint, &trained(&base, 61), 1).unwrap_err() {
        Error::TooLittleSpace { need, free: 1000, .. } => assert!(need > 1000),
        other => panic!("{other}"),
    }
    assert!(tree(dir.path()) == before);
    storage.mend();
    sync(&mut checkpoint, &trained(&base, 61), 1);
}

#[test]
fn a_file_system_without_hints_gets_the_same_bytes_by_the_same_syncs() {
    let run = |hints: bool| {
        let dir = tempfile::tempdir().unwrap();
        let base = make_model(dir.path(), true, 0, 70);
        let storage = Failing::new();
        storage.set_clock(1_750_000_000);
        if hints {
            storage.take_hints();
        }
        let (mut checkpoint, _) = open_on(&storage, dir.path()).unwrap();
        sync(&mut checkpoint, &trained(&base, 71), 1);
        checkpoint.rollback(0).unwrap();
        drop(checkpoint);
        let relative = |path: PathBuf| path.strip_prefix(dir.path()).unwrap().to_path_buf();
        (tree(dir.path()), storage.synced().into_iter().map(relative).collect::<Vec<_>>())
    };
    let ((with, synced_with), (without, synced_without)) = (run(true), run(false));
    assert!(with == without);
    assert_eq!(synced_with, synced_without);
    for shard in ["model-00001-of-00002.safetensors", SECOND] {
        let syncs = synced_without.iter().filter(|path| path.ends_with(shard)).count();
        assert_eq!(syncs, 2, "{shard}: one for the sync, one for the rollback");
    }
}

/// The simulation takes one thread, in which everything happens in one order.
#[test]
fn with_any_number_of_threads_a_sync_makes_every_shard_durable_or_fails() {
    for threads in [1, 2, 5] {
        let dir = tempfile::tempdir().unwrap();
        let base = make_model(dir.path(), true, 0, 70);
        let storage = Failing::new();
        let open = || Checkpoint::open_on(storage.clone(), dir.path(), Options { threads, ..options() }).unwrap().0;
        let syncs_of = |shard: &str| storage.synced().iter().filter(|path| path.ends_with(shard)).count();
        sync(&mut open(), &trained(&base, 71), 1);
        for shard in ["model-00001-of-00002.safetensors", SECOND] {
            assert_eq!(syncs_of(shard), 1, "{threads} threads, {shard}");
        }
        for shard in ["model-00001-of-00002.safetensors", SECOND] {
            let mut checkpoint = open();
            storage.fail(Operation::Sync, shard, EIO);
            let error = try_sync(&mut checkpoint, &trained(&base, 72), 2).unwrap_err();
            assert!(matches!(error, Error::Interrupted { generation: 2, .. }), "{threads} threads: {error}");
            let told = error.to_string();
            assert!(told.contains("cannot sync") && told.contains(shard), "{threads} threads: {told}");
            assert_eq!(checkpoint::current(dir.path()).unwrap().unwrap().generation, 1);
            storage.mend();
        }
    }
}

#[test]
fn a_clock_that_jumps_keeps_generations_in_order_and_costs_a_few_of_the_oldest() {
    const DAY: u64 = 86_400;
    const YEAR: u64 = 365 * DAY;
    const NOW: u64 = 1_750_000_000;
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 80);
    let storage = Failing::new();
    storage.set_clock(NOW);
    let keep = Keep { age: Duration::from_secs(30 * DAY), ..Keep::default() };
    let options = Options { keep, ..Options::default() };
    let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), dir.path(), options.clone()).unwrap();
    let mut all = vec![live.clone()];
    // The clock at each sync, and the oldest generation that can be restored after it.
    let right = |days: u64| NOW + days * DAY;
    let clocks = [
        (right(1), 0),
        (right(2), 0),
        (right(3) - 20 * YEAR, 0),
        (0, 0),
        (right(4), 0),
        (right(5) + 30 * YEAR, 2),
        (u64::MAX, 4),
        // Generation 4, the oldest now, says that it was made in 1970.
        (right(6), 5),
        (right(7) - 40 * YEAR, 5),
        (right(8), 5),
    ];
    for (i, (now, oldest)) in clocks.into_iter().enumerate() {
        storage.set_clock(now);
        live.train(&mut Rng(81 + i as u64), 30);
        all.push(live.clone());
        sync(&mut checkpoint, &live, i as u64 + 1);
        // Opened again at that time, as a daemon that is restarted by whoever sets the clock.
        drop(checkpoint);
        let recovery;
        (checkpoint, recovery) = Checkpoint::open_on(storage.clone(), dir.path(), options.clone()).unwrap();
        assert_eq!(recovery, Recovery::Clean { generation: i as u64 + 1 });
        let listed = checkpoint.generations().unwrap();
        let numbers: Vec<u64> = listed.iter().map(|generation| generation.generation).collect();
        assert_eq!(numbers, (0..=i as u64 + 1).collect::<Vec<_>>());
        assert!(listed.last().unwrap().created_unix == now && listed.iter().all(|one| !one.to_string().is_empty()));
        let restorable: Vec<u64> = listed.iter().filter(|one| one.restorable).map(|one| one.generation).collect();
        assert_eq!(restorable, (oldest..=i as u64 + 1).collect::<Vec<_>>(), "at {now}");
    }
    assert!(checkpoint::verify(dir.path()).unwrap().is_ok());
    checkpoint.rollback(5).unwrap();
    assert_files_are(&checkpoint, &all[5]);
}

#[test]
fn what_cannot_be_read_is_said_by_name_and_nothing_is_touched() {
    use Operation::{List, Read};
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 90);
    let (one, two) = (trained(&base, 91), trained(&base, 92));
    let storage = Stopping::after(i64::MAX);
    let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), dir.path(), options()).unwrap();
    sync(&mut checkpoint, &one, 1);
    drop(checkpoint);
    // A crash with a journal that is whole so far, and blocks in the files.
    let storage_of_crash = Failing::new();
    let (mut checkpoint, _) = open_on(&storage_of_crash, dir.path()).unwrap();
    storage_of_crash.fail(Operation::Sync, SECOND, EIO);
    try_sync(&mut checkpoint, &two, 2).unwrap_err();
    drop(checkpoint);
    let before = tree(dir.path());
    let unreadable = [
        (Read, "journal", "journal"),
        (Read, "generations/1.json", "generations/1.json"),
        (List, "generations", "generations"),
        (Read, SECOND, SECOND),
    ];
    for (operation, path, named) in unreadable {
        let storage = Failing::new();
        storage.fail(operation, path, EIO);
        let error = open_on(&storage, dir.path()).unwrap_err();
        assert!(matches!(&error, Error::Io { source, .. } if source.raw_os_error() == Some(EIO)), "{error}");
        assert!(error.to_string().contains(named), "{error}");
        let now = tree(dir.path());
        for (name, bytes) in before.iter().filter(|(name, _)| !name.ends_with("lock")) {
            assert!(now.get(name) == Some(bytes), "{path}: {} is not as it was", name.display());
        }
    }
    let (checkpoint, recovery) = Checkpoint::open(dir.path()).unwrap();
    assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
    assert_files_are(&checkpoint, &one);
}

#[test]
fn an_optimizer_state_that_cannot_be_read_is_said_and_an_earlier_generation_can_be_restored() {
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 100);
    let storage = Failing::new();
    let (mut checkpoint, _) = open_on(&storage, dir.path()).unwrap();
    sync(&mut checkpoint, &trained(&base, 101), 1);
    sync(&mut checkpoint, &trained(&base, 102), 2);
    storage.fail(Operation::Read, "state/2", EIO);
    let error = checkpoint.state().map(drop).unwrap_err();
    assert!(error.to_string().contains("state/2") && error.to_string().contains("os error 5"), "{error}");
    checkpoint.rollback(1).unwrap();
    assert_files_are(&checkpoint, &trained(&base, 101));
    assert_eq!(read_state(&checkpoint).unwrap(), state_of(1));
}

#[test]
fn a_folder_in_the_place_of_a_file_is_said_and_left_alone() {
    for name in ["journal", "lock", "readers", "generations/2.json", "generations/2.json.tmp", "state/2", "sums/2"] {
        let dir = tempfile::tempdir().unwrap();
        let base = make_model(dir.path(), true, 0, 110);
        let one = trained(&base, 111);
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        sync(&mut checkpoint, &one, 1);
        let before = files(dir.path());
        let folder = dir.path().join(".apollod").join(name);
        clear(&folder);
        fs::create_dir(&folder).unwrap();
        // The handle that is there already, unless it holds what was replaced; then a new one.
        if name != "lock" {
            let error = try_sync(&mut checkpoint, &trained(&one, 112), 2).unwrap_err();
            assert!(error.to_string().contains(name), "{name}: {error}");
        }
        drop(checkpoint);
        let said = match Checkpoint::open(dir.path()) {
            Err(error) => error.to_string(),
            // It is in the way of the next sync, and of nothing else.
            Ok((mut checkpoint, _)) => {
                assert!(["state/2", "sums/2"].contains(&name), "{name}");
                checkpoint.take_warnings().concat()
            }
        };
        assert!(said.contains(name), "{name}: {said}");
        // A sync that came as far as to its name has all blocks in the files, and waits in its journal.
        let waits = dir.path().join(".apollod/journal").is_file();
        assert!(folder.is_dir() && waits == name.starts_with("generations"), "{name}");
        assert!(waits || files(dir.path()) == before, "{name}");
        fs::remove_dir(&folder).unwrap();
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        assert_files_are(&checkpoint, &one);
        sync(&mut checkpoint, &trained(&one, 112), 2);
    }
}

#[test]
fn what_cannot_be_removed_is_told_and_keeps_nothing_else_from_going() {
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 115);
    let keep = checkpoint::Keep { generations: 1, ..Default::default() };
    let storage = Failing::new();
    let options = Options { keep, ..Options::default() };
    let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), dir.path(), options).unwrap();
    sync(&mut checkpoint, &trained(&base, 116), 1);
    sync(&mut checkpoint, &trained(&base, 117), 2);
    storage.fail(Operation::Remove, "history/2.delta", EIO);
    sync(&mut checkpoint, &trained(&base, 118), 3);
    let own = dir.path().join(".apollod");
    assert!(checkpoint.take_warnings().concat().contains("2.delta") && own.join("history/2.delta").exists());
    assert!(!own.join("state/1").exists() && !own.join("sums/2").exists());
    assert_eq!(checkpoint.current().generation, 3);
    storage.mend();
    sync(&mut checkpoint, &trained(&base, 119), 4);
    assert!(checkpoint.take_warnings().is_empty() && !own.join("history/2.delta").exists());
    checkpoint.rollback(3).unwrap();
    assert_files_are(&checkpoint, &trained(&base, 118));
}

const OPENERS: usize = 50;

/// A pid that is nobody's, in a lock that a dead process has left.
fn stale_lock(dir: &Path) {
    fs::create_dir(dir.join(".apollod")).unwrap();
    fs::write(dir.join(".apollod/lock"), "4194999\n").unwrap();
}

#[test]
fn of_fifty_threads_that_open_at_once_one_wins_and_the_others_are_told_who() {
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 120);
    stale_lock(dir.path());
    let (begin, end) = (Barrier::new(OPENERS), Barrier::new(OPENERS));
    let (begin, end, dir) = (&begin, &end, dir.path());
    let opened: Vec<checkpoint::Result<Recovery>> = std::thread::scope(|scope| {
        let opener = || {
            begin.wait();
            let opened = Checkpoint::open(dir);
            end.wait();
            opened.map(|(_, recovery)| recovery)
        };
        let threads: Vec<_> = (0..OPENERS).map(|_| scope.spawn(opener)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (won, lost): (Vec<_>, Vec<_>) = opened.into_iter().partition(Result::is_ok);
    assert_eq!(won.into_iter().map(Result::unwrap).collect::<Vec<_>>(), [Recovery::Created]);
    for error in lost.into_iter().map(Result::unwrap_err) {
        match error {
            Error::Locked { pid, .. } => assert_eq!(pid, std::process::id().to_string()),
            other => panic!("{other}"),
        }
    }
    assert_files_are(&Checkpoint::open(dir).unwrap().0, &base);
}

#[test]
fn who_has_the_lock_and_has_not_said_so_yet_is_not_mistaken_for_who_had_it_before() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path(), true, 0, 140);
    stale_lock(dir.path());
    let lock = dir.path().join(".apollod/lock");
    let file = fs::File::open(&lock).unwrap();
    file.lock().unwrap();
    std::thread::scope(|scope| {
        let opened = scope.spawn(|| Checkpoint::open(dir.path()));
        std::thread::sleep(Duration::from_millis(20));
        fs::write(&lock, "7\n").unwrap();
        match opened.join().unwrap().unwrap_err() {
            Error::Locked { pid, .. } => assert_eq!(pid, "7"),
            other => panic!("{other}"),
        }
    });
}

#[test]
fn the_folder_of_an_opener_that_died_is_made_durable_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path(), true, 0, 150);
    fs::create_dir(dir.path().join(".apollod")).unwrap();
    let storage = Failing::new();
    open_on(&storage, dir.path()).unwrap();
    assert!(storage.synced().iter().any(|folder| folder == dir.path()), "{:?}", storage.synced());
}

const DIR: &str = "CHECKPOINT_TEST_DIR";

/// The child's part: opens when it is told to, says what came of it, and holds on until its input ends.
fn open_when_told(dir: &Path) {
    let mut told = std::io::stdin().lines();
    println!("\nready");
    told.next();
    let opened = Checkpoint::open(dir);
    match &opened {
        Ok(_) => println!("won"),
        Err(Error::Locked { pid, .. }) => println!("held by {pid}"),
        Err(other) => println!("{other}"),
    }
    told.next();
}

/// Runs itself as the processes.
#[test]
fn of_fifty_processes_that_open_at_once_one_wins_and_the_others_are_told_who() {
    if let Ok(dir) = env::var(DIR) {
        return open_when_told(Path::new(&dir));
    }
    let name = "of_fifty_processes_that_open_at_once_one_wins_and_the_others_are_told_who";
    let dir = tempfile::tempdir().unwrap();
    let base = make_model(dir.path(), true, 0, 130);
    stale_lock(dir.path());
    let start = || {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", name, "--nocapture"]).env(DIR, dir.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut children: Vec<Child> = (0..OPENERS).map(|_| start()).collect();
    let mut outputs: Vec<_> =
        children.iter_mut().map(|child| BufReader::new(child.stdout.take().unwrap()).lines()).collect();
    for output in &mut outputs {
        assert!(output.any(|line| line.unwrap() == "ready"));
    }
    for child in &mut children {
        child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }
    let said: Vec<String> = outputs.iter_mut().map(|output| output.next().unwrap().unwrap()).collect();
    let winner = said.iter().position(|said| said == "won").unwrap_or_else(|| panic!("{said:?}"));
    let held = format!("held by {}", children[winner].id());
    for (i, said) in said.iter().enumerate() {
        assert!(i == winner || *said == held, "{said}, and {} has it", children[winner].id());
    }
    for child in &mut children {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    assert_files_are(&Checkpoint::open(dir.path()).unwrap().0, &base);
}
