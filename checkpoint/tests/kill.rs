//! A process that dies at any of its operations in the middle of a sync, and the next one that opens the directory.

mod common;

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use checkpoint::{Checkpoint, Options};
use common::*;

const DIR: &str = "CHECKPOINT_TEST_DIR";
const AT: &str = "CHECKPOINT_TEST_DIES_AT";

fn weights(dir: &Path) -> [Live; 3] {
    let base = make_model(dir, true, 1, 11);
    let mut one = base.clone();
    one.train(&mut Rng(12), 3);
    let mut two = one.clone();
    two.train(&mut Rng(13), 3);
    [base, one, two]
}

fn options() -> Options {
    Options { segment: 300_000, threads: 2, ..Options::default() }
}

/// The child's part: to sync generation 2, and to die on the way.
fn die(dir: &Path, at: i64) {
    let scratch = tempfile::tempdir().unwrap();
    let [_, _, two] = weights(scratch.path());
    let (mut checkpoint, _) = Checkpoint::open_on(Stopping::aborting_after(at), dir, options()).unwrap();
    try_sync(&mut checkpoint, &two, 2).unwrap();
}

/// Runs itself as the process that dies, one operation later each time, until it gets to the end.
#[test]
fn a_process_that_dies_at_any_operation_leaves_exactly_the_old_or_the_new_generation() {
    if let (Ok(dir), Ok(at)) = (env::var(DIR), env::var(AT)) {
        return die(Path::new(&dir), at.parse().unwrap());
    }
    let name = "a_process_that_dies_at_any_operation_leaves_exactly_the_old_or_the_new_generation";
    let mut outcomes = [0; 2];
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let [base, one, two] = weights(dir.path());
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        assert_files_are(&checkpoint, &base);
        sync(&mut checkpoint, &one, 1);
        drop(checkpoint);
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", name])
            .env(DIR, dir.path())
            .env(AT, at.to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        let died = child.status.signal() == Some(6);
        assert!(died || child.status.success(), "operation {at}: {} {said}", child.status);

        let (checkpoint, recovery) = Checkpoint::open(dir.path()).unwrap();
        println!("{at}: {recovery}");
        let generation = checkpoint.current().generation;
        let live = match generation {
            1 => &one,
            2 => &two,
            other => panic!("operation {at}: generation {other}"),
        };
        assert_files_are(&checkpoint, live);
        assert_eq!(read_state(&checkpoint).unwrap(), state_of(generation));
        assert_eq!(checkpoint.current().progress, progress(generation));
        outcomes[generation as usize - 1] += 1;
        if !died {
            assert_eq!(generation, 2);
            break;
        }
    }
    assert!(outcomes[0] > 10 && outcomes[1] > 3, "{outcomes:?}");
}
