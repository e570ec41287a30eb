//! A process that dies at every point of a sync, and the next one that opens the directory.

mod common;

use std::env;
use std::path::Path;
use std::process::Command;

use checkpoint::{Checkpoint, CrashAction, CrashPoint, Fault};
use common::*;

const DIR: &str = "CHECKPOINT_TEST_DIR";
const POINT: &str = "APOLLOD_CRASH_AT";

fn weights(dir: &Path) -> [Live; 3] {
    let base = make_model(dir, true, 1, 11);
    let mut one = base.clone();
    one.train(&mut Rng(12), 3);
    let mut two = one.clone();
    two.train(&mut Rng(13), 3);
    [base, one, two]
}

/// The child's part: sync generation 2 and die on the way.
fn die(dir: &Path, point: CrashPoint) {
    let scratch = tempfile::tempdir().unwrap();
    let [_, _, two] = weights(scratch.path());
    let (mut checkpoint, _) = Checkpoint::open(dir).unwrap();
    checkpoint.crash_at(Some(Fault { point, after: 0, action: CrashAction::Abort }));
    let result = try_sync(&mut checkpoint, &two, 2);
    panic!("still alive: {result:?}");
}

/// Runs itself as the process that dies.
#[test]
fn a_process_killed_at_any_point_leaves_exactly_the_old_or_the_new_generation() {
    if let (Ok(dir), Ok(point)) = (env::var(DIR), env::var(POINT)) {
        die(Path::new(&dir), point.parse().unwrap());
    }
    let name = "a_process_killed_at_any_point_leaves_exactly_the_old_or_the_new_generation";
    // PrunePartial is reached because the sums of generation 1 go.
    for point in CrashPoint::ALL {
        let dir = tempfile::tempdir().unwrap();
        let [base, one, two] = weights(dir.path());
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        assert_files_are(&checkpoint, &base);
        sync(&mut checkpoint, &one, 1);
        drop(checkpoint);
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", name])
            .env(DIR, dir.path())
            .env(POINT, point.name())
            .output()
            .unwrap();
        use std::os::unix::process::ExitStatusExt;
        let said = String::from_utf8_lossy(&child.stdout);
        assert_eq!(child.status.signal(), Some(6), "{point}: {said}");

        let (checkpoint, recovery) = Checkpoint::open(dir.path()).unwrap();
        println!("{point}: {recovery}");
        let (generation, live) = match point >= CrashPoint::JournalPublished {
            true => (2, &two),
            false => (1, &one),
        };
        assert_eq!(checkpoint.current().generation, generation, "{point}");
        assert_files_are(&checkpoint, live);
        assert_eq!(read_state(&checkpoint).unwrap(), state_of(generation));
    }
}
