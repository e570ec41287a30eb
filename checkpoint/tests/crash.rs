//! Crashes at every point of a sync, a rollback and a recovery, with everything a crash may leave.

mod common;

use std::fs;
use std::path::Path;

use checkpoint::{Checkpoint, CrashAction, CrashPoint, Error, Fault, Options, Recovery};
use common::*;

fn stop_at(point: CrashPoint, after: u32) -> Fault {
    Fault { point, after, action: CrashAction::Stop }
}

/// Generations 1 and 2 synced, and the weights that generation 3 will have.
struct Scene {
    dir: tempfile::TempDir,
    two: Live,
    three: Live,
}

impl Scene {
    fn new(sharded: bool, pad: usize, seed: u64) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let mut live = make_model(dir.path(), sharded, pad, seed);
        let (mut checkpoint, _) = open(dir.path());
        let mut rng = Rng(seed + 1);
        for cursor in 1..=2 {
            live.train(&mut rng, 3);
            sync(&mut checkpoint, &live, cursor);
        }
        let two = live.clone();
        live.train(&mut rng, 3);
        let three = live;
        Scene { dir, two, three }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Syncs generation 3 up to a crash; false if the point was not reached.
    fn crash(&self, fault: Fault) -> bool {
        let (mut checkpoint, _) = open(self.path());
        checkpoint.crash_at(Some(fault));
        match try_sync(&mut checkpoint, &self.three, 3) {
            Ok(_) => false,
            Err(error) => {
                assert!(is_stop(&error), "{error}");
                let again = try_sync(&mut checkpoint, &self.three, 3).unwrap_err();
                assert!(matches!(again, Error::Unusable { .. }), "{again}");
                assert!(checkpoint.to_string().contains("to be opened again"));
                true
            }
        }
    }

    /// Fails unless the directory is exactly generation 2 or exactly generation 3; gives which.
    fn assert_old_or_new(&self) -> u64 {
        let (checkpoint, _) = open(self.path());
        let generation = checkpoint.current().generation;
        match generation {
            2 => assert_files_are(&checkpoint, &self.two),
            3 => assert_files_are(&checkpoint, &self.three),
            other => panic!("generation {other}"),
        }
        assert_eq!(checkpoint.current().progress, progress(generation));
        assert_eq!(read_state(&checkpoint).unwrap(), state_of(generation));
        drop(checkpoint);
        assert!(checkpoint::verify(self.path()).unwrap().is_ok());
        let names: Vec<String> =
            tree(&self.path().join(".apollod")).keys().map(|name| name.display().to_string()).collect();
        let (g, before) = (generation, generation - 1);
        let mut want = vec![format!("history/{g}.delta"), "lock".into()];
        want.extend([format!("state/{before}"), format!("state/{g}")]);
        want.extend((0..=g).map(|g| format!("generations/{g}.json")));
        want.push(format!("sums/{g}"));
        want.sort();
        assert_eq!(names, want, "left over, or missing");
        generation
    }

    /// Every generation that is said to be restorable is.
    fn assert_rolls_back(&self) {
        let (mut checkpoint, _) = open(self.path());
        checkpoint.rollback(2).unwrap();
        assert_files_are(&checkpoint, &self.two);
    }
}

/// With one generation kept, so that a third sync prunes.
fn options() -> Options {
    Options { keep: 1, fault: None }
}

fn open(dir: &Path) -> (Checkpoint, Recovery) {
    Checkpoint::open_with(dir, options()).unwrap()
}

fn is_stop(error: &Error) -> bool {
    match error {
        Error::Stopped(_) => true,
        Error::Interrupted { source, .. } => is_stop(source),
        _ => false,
    }
}

/// The generation that a crash at a point leads to.
fn leads_to(point: CrashPoint) -> u64 {
    match point >= CrashPoint::JournalPublished {
        true => 3,
        false => 2,
    }
}

#[test]
fn a_crash_at_any_point_leaves_exactly_the_old_or_the_new_generation() {
    for (i, point) in CrashPoint::ALL.into_iter().enumerate() {
        for after in [0, 1, 3] {
            let scene = Scene::new(i % 2 == 0, i % 3, 100);
            if !scene.crash(stop_at(point, after)) {
                assert!(after > 0, "{point} is never reached");
                continue;
            }
            assert_eq!(scene.assert_old_or_new(), leads_to(point), "{point}+{after}");
            scene.assert_rolls_back();
        }
    }
}

#[test]
fn recovering_twice_is_recovering_once() {
    for point in CrashPoint::ALL {
        let scene = Scene::new(true, 0, 200);
        assert!(scene.crash(stop_at(point, 0)));
        let (first, recovery) = open(scene.path());
        drop(first);
        let after_once = tree(scene.path());
        let (second, clean) = open(scene.path());
        drop(second);
        let generation = leads_to(point);
        assert_eq!(clean, Recovery::Clean { generation }, "{point} after {recovery}");
        assert!(tree(scene.path()) == after_once, "{point}");
    }
}

#[test]
fn a_crash_inside_recovery_changes_nothing() {
    let again = CrashPoint::ALL.into_iter().filter(|point| *point > CrashPoint::JournalPublished);
    for inside in again {
        for after in [0, 2] {
            let scene = Scene::new(true, 1, 300);
            assert!(scene.crash(stop_at(CrashPoint::BlocksPartial, 1)));
            let options = Options { fault: Some(stop_at(inside, after)), ..options() };
            match Checkpoint::open_with(scene.path(), options) {
                Ok(_) => assert!(after > 0, "{inside} is never reached"),
                Err(error) => assert!(is_stop(&error), "{error}"),
            }
            assert_eq!(scene.assert_old_or_new(), 3, "{inside}+{after}");
        }
    }
}

#[test]
fn a_first_use_that_is_cut_short_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let live = make_model(dir.path(), false, 0, 400);
    let options = Options { fault: Some(stop_at(CrashPoint::Pruned, 0)), ..options() };
    assert!(Checkpoint::open_with(dir.path(), options).is_err());
    fs::remove_file(dir.path().join(".apollod/generations/0.json")).unwrap();
    let (checkpoint, recovery) = open(dir.path());
    assert_eq!(recovery, Recovery::Created);
    assert_files_are(&checkpoint, &live);
}

/// Power loss: between the first pwrite and the fdatasync any set of sectors may have reached the disk.
#[test]
fn any_mixture_of_old_and_new_sectors_is_finished() {
    for seed in 500..512 {
        println!("seed {seed}");
        let scene = Scene::new(seed % 2 == 0, seed as usize % 4, seed);
        let old = files(scene.path());
        assert!(scene.crash(stop_at(CrashPoint::BlocksWritten, 0)));
        let mut rng = Rng(seed);
        for (name, new) in files(scene.path()) {
            let mut mixed = new.clone();
            for (i, sector) in mixed.chunks_mut(512).enumerate() {
                if rng.below(2) == 0 {
                    sector.copy_from_slice(&old[&name][i * 512..i * 512 + sector.len()]);
                }
            }
            fs::write(scene.path().join(name), mixed).unwrap();
        }
        assert_eq!(scene.assert_old_or_new(), 3);
    }
}

/// A page can read as new and not be on the disk after an fsync that failed: recovery writes it again.
#[test]
fn recovery_writes_also_what_reads_as_new() {
    let scene = Scene::new(false, 0, 600);
    assert!(scene.crash(stop_at(CrashPoint::BlocksWritten, 0)));
    let shard = scene.path().join("model.safetensors");
    let before = fs::metadata(&shard).unwrap().modified().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (_, recovery) = open(scene.path());
    assert_eq!(recovery, Recovery::Finished { generation: 3 });
    assert!(fs::metadata(&shard).unwrap().modified().unwrap() > before);
}

#[test]
fn a_sector_that_is_neither_old_nor_new_is_named_and_the_journal_kept() {
    let scene = Scene::new(false, 0, 700);
    assert!(scene.crash(stop_at(CrashPoint::BlocksPartial, 0)));
    let shard = scene.path().join("model.safetensors");
    let good = fs::read(&shard).unwrap();
    let mut bad = good.clone();
    bad[600_000] ^= 1;
    fs::write(&shard, &bad).unwrap();
    let error = Checkpoint::open_with(scene.path(), options()).unwrap_err();
    match error {
        Error::Foreign { tensor, offset, .. } => {
            assert_eq!(tensor, scene.two.tensors[0].name);
            assert_eq!(offset, 600_000 / 512 * 512);
        }
        other => panic!("{other}"),
    }
    fs::write(&shard, &good).unwrap();
    assert_eq!(scene.assert_old_or_new(), 3);
}

#[test]
fn an_error_before_the_journal_counts_leaves_everything_as_it_was() {
    let errnos = [(CrashPoint::StateWritten, 28), (CrashPoint::JournalPartial, 28)];
    for (point, errno) in errnos.into_iter().chain([(CrashPoint::JournalPartial, 5)]) {
        let scene = Scene::new(true, 0, 800);
        let (mut checkpoint, _) = open(scene.path());
        let before = tree(scene.path());
        let action = CrashAction::Errno(errno);
        let fault = Fault { point, after: 0, action };
        checkpoint.crash_at(Some(fault));
        let error = try_sync(&mut checkpoint, &scene.three, 3).unwrap_err();
        match errno {
            28 => assert!(matches!(error, Error::Full { .. }), "{error}"),
            _ => assert!(matches!(error, Error::Io { .. }), "{error}"),
        }
        assert!(tree(scene.path()) == before, "{point}");
        // The same handle goes on once there is space.
        checkpoint.crash_at(None);
        assert_eq!(sync(&mut checkpoint, &scene.three, 3).generation, 3);
        drop(checkpoint);
        assert_eq!(scene.assert_old_or_new(), 3);
    }
}

#[test]
fn an_optimizer_state_that_cannot_be_written_stops_the_sync() {
    let scene = Scene::new(true, 0, 850);
    let (mut checkpoint, _) = open(scene.path());
    let before = tree(scene.path());
    let error = checkpoint.sync(&scene.three, &mut |_| Err(no_space()), progress(3), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("state/3"), "{error}");
    assert!(tree(scene.path()) == before);
}

#[test]
fn a_failed_fsync_is_never_retried_by_the_same_handle() {
    for point in [CrashPoint::StateSynced, CrashPoint::JournalSynced, CrashPoint::ShardsSynced] {
        let scene = Scene::new(true, 0, 900);
        let (mut checkpoint, _) = open(scene.path());
        let action = CrashAction::Errno(5);
        checkpoint.crash_at(Some(Fault { point, after: 0, action }));
        let error = try_sync(&mut checkpoint, &scene.three, 3).unwrap_err();
        assert!(error.to_string().contains("opened again"), "{error}");
        checkpoint.crash_at(None);
        let again = try_sync(&mut checkpoint, &scene.three, 3).unwrap_err();
        assert!(matches!(again, Error::Unusable { .. }), "{again}");
        assert!(matches!(checkpoint.rollback(2), Err(Error::Unusable { .. })));
        drop(checkpoint);
        assert_eq!(scene.assert_old_or_new(), leads_to(point), "{point}");
    }
}

#[test]
fn a_crash_at_any_point_of_a_rollback_leaves_the_old_or_the_restored_generation() {
    for point in CrashPoint::ALL {
        let scene = Scene::new(true, 3, 1000);
        let (mut checkpoint, _) = open(scene.path());
        sync(&mut checkpoint, &scene.three, 3);
        checkpoint.crash_at(Some(stop_at(point, 0)));
        let error = checkpoint.rollback(2).unwrap_err();
        assert!(is_stop(&error), "{error}");
        drop(checkpoint);
        let (checkpoint, _) = open(scene.path());
        let (generation, live, cursor) = match point >= CrashPoint::JournalPublished {
            true => (4, &scene.two, 2),
            false => (3, &scene.three, 3),
        };
        assert_eq!(checkpoint.current().generation, generation, "{point}");
        assert_files_are(&checkpoint, live);
        assert_eq!(checkpoint.current().progress, progress(cursor));
        assert_eq!(read_state(&checkpoint).unwrap(), state_of(cursor));
    }
}
