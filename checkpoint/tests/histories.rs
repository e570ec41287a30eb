//! Repairs from copies of other histories, and of other moments of the same: nothing is taken that is not ours, nothing that is
//! ours is refused, and nobody removes what a copy could bring back.

mod common;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Error, Keep, Options, RepairReport, Sources};
use common::failing::{EIO, Failing, Operation};
use common::*;

/// A model with as many generations after the base as asked for, each with its weights.
struct History {
    dir: tempfile::TempDir,
    all: Vec<Live>,
    /// Of what is trained next.
    seed: u64,
}

impl History {
    fn new(seed: u64, generations: u64, kept: u64) -> History {
        let dir = tempfile::tempdir().unwrap();
        let all = vec![make_model(&dir.path().join("model"), true, 2, seed)];
        let mut history = History { dir, all, seed };
        history.go_on(generations, kept);
        history
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn path(&self, file: &str) -> PathBuf {
        self.model().join(".apollod").join(file)
    }

    /// So many syncs, of which so many earlier generations are kept.
    fn go_on(&mut self, generations: u64, kept: u64) {
        let (mut checkpoint, _) = Checkpoint::open_with(&self.model(), keeping(kept)).unwrap();
        for _ in 0..generations {
            let mut live = self.all.last().unwrap().clone();
            self.seed += 1;
            live.train(&mut Rng(self.seed), 3);
            let cursor = checkpoint.current().generation + 1;
            sync(&mut checkpoint, &live, cursor);
            self.all.push(live);
        }
    }

    fn copy(&self, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        copy_tree(&self.model(), &to);
        to
    }

    fn repair(&self, copies: &[&Path]) -> checkpoint::Result<RepairReport> {
        let copies: Vec<PathBuf> = copies.iter().map(|copy| copy.to_path_buf()).collect();
        checkpoint::repair(&self.model(), &Sources { live: None, copies: &copies })
    }

    /// Repairs all there is to repair, and is as it was in `whole`.
    fn mends(&self, copies: &[&Path], whole: &Path, what: &str) {
        let report = self.repair(copies).unwrap();
        assert!(report.damage.is_empty(), "{what}: {report}");
        assert!(held(&self.model()) == held(whole), "{what}: not as before");
        assert!(checkpoint::verify(&self.model()).unwrap().is_ok(), "{what}");
    }
}

fn keeping(generations: u64) -> Options {
    Options { keep: Keep { generations, ..Keep::default() }, ..Options::default() }
}

/// The weights, and all files under `.apollod` but the lock, which says whose it is.
fn held(model: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all: Vec<_> = files(model).into_iter().collect();
    for folder in ["generations", "history", "state", "sums"] {
        let Ok(entries) = fs::read_dir(model.join(".apollod").join(folder)) else { continue };
        let read = |path: PathBuf| (path.strip_prefix(model).unwrap().to_path_buf(), fs::read(&path).unwrap());
        all.extend(entries.map(|entry| read(entry.unwrap().path())));
    }
    all.sort();
    all.into_iter()
        .map(|(path, bytes)| (path.strip_prefix(model).map(Path::to_path_buf).unwrap_or(path), bytes))
        .collect()
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[100] ^= 8;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_copy_that_has_let_go_of_a_generation_is_no_help_and_does_no_harm() {
    let mut history = History::new(1, 2, 0);
    let backup = history.copy("backup");
    history.go_on(1, 0);
    let newer = history.copy("newer");
    fs::remove_dir_all(history.model()).unwrap();
    copy_tree(&backup, &history.model());
    fs::remove_file(history.path("generations/2.json")).unwrap();
    let without = held(&history.model());
    let error = history.repair(&[&newer]).unwrap_err();
    assert!(matches!(error, Error::Generation { .. }) && error.to_string().contains("2.json"), "{error}");
    assert!(held(&history.model()) == without, "something was written");
    history.mends(&[&newer, &backup], &backup, "the newer copy first");

    // Of a longer history that is kept here, from a copy that keeps less.
    let mut history = History::new(2, 3, u64::MAX);
    let backup = history.copy("backup");
    history.go_on(0, 1);
    let thin = history.copy("thin");
    fs::remove_dir_all(history.model()).unwrap();
    copy_tree(&backup, &history.model());
    for (file, delta) in [("generations/0.json", None), ("generations/1.json", Some("history/1.delta"))] {
        [Some(file), delta].into_iter().flatten().for_each(|file| fs::remove_file(history.path(file)).unwrap());
        assert!(!history.repair(&[&thin]).unwrap().damage.is_empty());
        history.mends(&[&thin, &backup], &backup, file);
    }
}

#[test]
fn a_delta_of_another_history_that_ends_alike_is_not_taken() {
    let history = History::new(3, 2, u64::MAX);
    let other = history.copy("other");
    for (model, first) in [(history.model(), 1), (other.clone(), 0)] {
        let (mut checkpoint, _) = Checkpoint::open(&model).unwrap();
        checkpoint.rollback(first).unwrap();
        checkpoint.rollback(2).unwrap();
    }
    let backup = history.copy("backup");
    fs::remove_file(history.path("history/4.delta")).unwrap();
    let without = held(&history.model());
    let report = history.repair(&[&other]).unwrap();
    assert!(report.repaired.is_empty() && !report.damage.is_empty(), "{report}");
    assert!(held(&history.model()) == without);
    history.mends(&[&other, &backup], &backup, "beside the right copy");
    // Nor its document, though all that it has sums of is alike.
    for file in ["generations/4.json", "history/4.delta"] {
        fs::remove_file(history.path(file)).unwrap();
    }
    let without = held(&history.model());
    let error = history.repair(&[&other]).unwrap_err();
    assert!(error.to_string().contains("4.json") && held(&history.model()) == without, "{error}");
    history.mends(&[&other, &backup], &backup, "both");
    let (mut checkpoint, _) = Checkpoint::open(&history.model()).unwrap();
    checkpoint.rollback(3).unwrap();
    assert_files_are(&checkpoint, &history.all[1]);
}

#[test]
fn what_a_sync_that_was_undone_leaves_is_not_taken_for_a_generation() {
    let history = History::new(4, 2, u64::MAX);
    let mut next = history.all[2].clone();
    next.train(&mut Rng(5), 3);
    // The last moment at which there are a journal, a state and sums of what is not published.
    let mut torn = 0;
    for changes in 1.. {
        let storage = Stopping::after(i64::MAX);
        let options = Options { threads: 1, ..Options::default() };
        let (mut open, _) = Checkpoint::open_on(storage.clone(), &history.model(), options).unwrap();
        storage.stop_after(changes);
        let done = try_sync(&mut open, &next, 3);
        drop(open);
        if done.is_ok() {
            break;
        }
        if !["journal", "state/3"].iter().all(|file| history.path(file).exists()) {
            continue;
        }
        torn += 1;
        let cut = history.copy("cut");
        fs::remove_file(history.path("sums/2")).unwrap();
        match history.repair(&[]) {
            Ok(report) => assert!(report.generation >= 2 && report.damage.is_empty(), "{changes}: {report}"),
            Err(error) => panic!("{changes}: {error}"),
        }
        let published = cut.join(".apollod/generations/3.json").exists();
        for _ in 0..2 {
            let (opened, _) = Checkpoint::open(&history.model()).unwrap();
            assert_eq!(opened.current().generation, if published { 3 } else { 2 }, "{changes}");
        }
        fs::remove_dir_all(history.model()).unwrap();
        fs::rename(&cut, history.model()).unwrap();
    }
    assert!(torn > 3, "{torn}");
}

#[test]
fn a_document_is_ours_although_what_lies_beside_it_is_damaged_too() {
    for beside in ["sums/2", "state/2"] {
        let history = History::new(6, 2, 0);
        let backup = history.copy("backup");
        for file in ["generations/2.json", beside] {
            flip(&history.path(file));
        }
        history.mends(&[&backup], &backup, beside);
    }
    // A tensor of the files as well.
    let history = History::new(66, 2, 0);
    let backup = history.copy("backup");
    let damaged = ["generations/2.json", "sums/2"].map(|file| history.path(file));
    for path in damaged.iter().chain([&history.model().join("model-00002-of-00002.safetensors")]) {
        let mut bytes = fs::read(path).unwrap();
        let end = bytes.len() - 200;
        bytes[end] ^= 8;
        fs::write(path, bytes).unwrap();
    }
    history.mends(&[&backup], &backup, "2.json, sums/2 and a tensor");
    // Of adopted files there is no state: then the files say what they are.
    let history = History::new(7, 1, 0);
    {
        let (mut checkpoint, _) = Checkpoint::open(&history.model()).unwrap();
        checkpoint.adopt(progress(9)).unwrap();
    }
    let backup = history.copy("backup");
    for file in ["generations/2.json", "sums/2"] {
        flip(&history.path(file));
    }
    history.mends(&[&backup], &backup, "adopted");
    // In the midst of a history.
    let history = History::new(8, 3, u64::MAX);
    let backup = history.copy("backup");
    for file in ["generations/2.json", "history/2.delta", "state/2"] {
        flip(&history.path(file));
    }
    history.mends(&[&backup], &backup, "2.json, 2.delta, state/2");
}

#[test]
fn a_document_of_another_model_or_of_a_branch_is_not_taken() {
    let history = History::new(9, 2, u64::MAX);
    let (backup, other) = (history.copy("backup"), History::new(10, 2, u64::MAX));
    fs::remove_file(history.path("generations/0.json")).unwrap();
    let report = history.repair(&[&other.model()]).unwrap();
    assert!(report.repaired.is_empty() && !report.damage.is_empty(), "{report}");
    history.mends(&[&other.model(), &backup], &backup, "0.json");
    // A branch: the same until 2, and another 3.
    let mut branch = History::new(9, 2, 0);
    fs::remove_dir_all(branch.model()).unwrap();
    copy_tree(&backup, &branch.model());
    (branch.seed, branch.all) = (77, history.all.clone());
    branch.go_on(1, 0);
    let mut ours = history;
    ours.go_on(1, 0);
    let backup = ours.copy("later");
    fs::remove_file(ours.path("generations/3.json")).unwrap();
    let without = held(&ours.model());
    let error = ours.repair(&[&branch.model()]).unwrap_err();
    assert!(error.to_string().contains("3.json") && held(&ours.model()) == without, "{error}");
    ours.mends(&[&branch.model(), &backup], &backup, "3.json");
}

#[test]
fn an_open_keeps_what_a_copy_makes_useful_again() {
    for damage in ["removed", "flipped"] {
        let history = History::new(11, 4, u64::MAX);
        let backup = history.copy("backup");
        let document = history.path("generations/2.json");
        if damage == "flipped" {
            flip(&document)
        } else {
            fs::remove_file(document).unwrap()
        }
        fs::remove_file(history.path("history/2.delta")).unwrap();
        let without = held(&history.model());
        drop(Checkpoint::open(&history.model()).unwrap());
        assert!(held(&history.model()) == without, "{damage}: something was removed");
        history.mends(&[&backup], &backup, damage);
        let (mut checkpoint, _) = Checkpoint::open(&history.model()).unwrap();
        checkpoint.rollback(1).unwrap();
        assert_files_are(&checkpoint, &history.all[1]);
    }
}

#[test]
fn the_oldest_generation_comes_back_although_there_is_no_trace_of_it() {
    let history = History::new(20, 3, u64::MAX);
    let backup = history.copy("backup");
    for file in ["generations/0.json", "history/1.delta"] {
        fs::remove_file(history.path(file)).unwrap();
    }
    history.mends(&[&backup], &backup, "0.json and 1.delta");
    // Nor of the one after it: each is known by a later one.
    for file in ["generations/0.json", "generations/1.json", "history/1.delta"] {
        fs::remove_file(history.path(file)).unwrap();
    }
    history.mends(&[&backup], &backup, "0.json, 1.json and 1.delta");
    // One without a state, before a current one whose document is lost.
    let mut history = History::new(21, 1, u64::MAX);
    Checkpoint::open(&history.model()).unwrap().0.rollback(0).unwrap();
    history.all.push(history.all[0].clone());
    history.go_on(1, u64::MAX);
    let backup = history.copy("backup");
    flip(&history.path("generations/2.json"));
    for file in ["generations/3.json", "history/3.delta"] {
        fs::remove_file(history.path(file)).unwrap();
    }
    history.mends(&[&backup], &backup, "2.json, 3.json and 3.delta");
}

#[test]
fn a_twin_with_the_same_optimizer_state_is_not_taken_for_ours() {
    let history = History::new(22, 2, 1);
    let base = history.copy("base");
    let branch = |seed: u64| {
        let mut branch = History::new(22, 0, 1);
        fs::remove_dir_all(branch.model()).unwrap();
        copy_tree(&base, &branch.model());
        (branch.seed, branch.all) = (seed, history.all.clone());
        branch.go_on(2, 1);
        branch
    };
    let (ours, twin) = (branch(100), branch(200));
    let backup = ours.copy("backup");
    for file in ["generations/3.json", "generations/4.json", "history/4.delta"] {
        flip(&ours.path(file));
    }
    let without = held(&ours.model());
    ours.repair(&[&twin.model()]).unwrap_err();
    assert!(held(&ours.model()) == without, "something was written");
    ours.mends(&[&twin.model(), &backup], &backup, "both");
}

#[test]
fn documents_of_an_earlier_version_are_named_as_such_and_stay() {
    let history = History::new(23, 2, 0);
    for number in 0..3 {
        fs::write(history.path(&format!("generations/{number}.json")), br#"{"version": 2, "generation": 1}"#).unwrap();
    }
    let without = held(&history.model());
    let opened = Checkpoint::open(&history.model()).unwrap_err().to_string();
    let repaired = history.repair(&[]).unwrap_err().to_string();
    for said in [opened, repaired] {
        assert!(said.contains("version 2") && said.contains("removing .apollod"), "{said}");
    }
    assert!(held(&history.model()) == without, "something was removed");
}

#[test]
fn a_sync_that_is_undone_at_once_leaves_nothing_whenever_it_dies() {
    let history = History::new(24, 2, u64::MAX);
    let mut next = history.all[2].clone();
    next.train(&mut Rng(25), 3);
    let before = history.copy("before");
    for changes in 1..400 {
        let storage = Stopping::after(i64::MAX);
        let options = Options { threads: 1, ..Options::default() };
        let (mut open, _) = Checkpoint::open_on(storage.clone(), &history.model(), options).unwrap();
        storage.stop_after(changes);
        let mut state =
            |out: &mut dyn Write| out.write_all(b"begun").and(Err(io::Error::other("the optimizer has failed")));
        open.sync(&next, &mut state, progress(3), &mut |_, _| {}).unwrap_err();
        drop(open);
        if !storage.stopped() {
            assert!(changes > 5 && !history.path("state/3").exists());
            return;
        }
        fs::remove_file(history.path("sums/2")).unwrap();
        let report = history.repair(&[]).unwrap();
        assert!(report.generation == 2 && report.damage.is_empty(), "{changes}: {report}");
        fs::remove_dir_all(history.model()).unwrap();
        copy_tree(&before, &history.model());
    }
    panic!("it never ran to its end");
}

#[test]
fn a_journal_without_a_head_hides_no_generation() {
    let history = History::new(12, 2, u64::MAX);
    let backup = history.copy("backup");
    for file in ["generations/2.json", "history/2.delta"] {
        fs::remove_file(history.path(file)).unwrap();
    }
    fs::write(history.path("journal"), "").unwrap();
    fs::write(history.path("state/3"), "begun").unwrap();
    let without = held(&history.model());
    let error = Checkpoint::open(&history.model()).unwrap_err().to_string();
    assert!(error.contains("2.json") && error.contains("sums/2"), "{error}");
    assert!(held(&history.model()) == without, "something was removed");
    let report = history.repair(&[&backup]).unwrap();
    assert!(report.damage.is_empty() && report.generation == 2, "{report}");
    drop(Checkpoint::open(&history.model()).unwrap());
    assert!(held(&history.model()) == held(&backup));
}

#[test]
fn whole_files_are_not_repaired_to_an_earlier_generation() {
    let history = History::new(13, 1, u64::MAX);
    let older = history.copy("older");
    let mut history = history;
    history.go_on(1, u64::MAX);
    for file in ["generations/2.json", "history/2.delta", "state/2", "sums/2"] {
        fs::remove_file(history.path(file)).unwrap();
    }
    let without = held(&history.model());
    let error = history.repair(&[&older]).unwrap_err().to_string();
    assert!(error.contains("a later one") && error.contains("checkpoint adopt"), "{error}");
    assert!(held(&history.model()) == without, "something was written");
    // Both ways that it names: the files as they are, or those of the generation whose sums are put back.
    let other = history.copy("other");
    Checkpoint::open(&history.model()).unwrap().0.adopt(progress(3)).unwrap();
    assert!(checkpoint::verify(&history.model()).unwrap().is_ok());
    let (adopted, _) = Checkpoint::open(&history.model()).unwrap();
    assert_files_are(&adopted, &history.all[2]);
    fs::create_dir_all(other.join(".apollod/sums")).unwrap();
    fs::copy(older.join(".apollod/sums/1"), other.join(".apollod/sums/1")).unwrap();
    let report = checkpoint::repair(&other, &Sources { live: None, copies: &[older] }).unwrap();
    assert!(report.damage.is_empty(), "{report}");
    assert_files_are(&Checkpoint::open(&other).unwrap().0, &history.all[1]);
}

#[test]
fn a_delta_that_cannot_be_read_now_is_not_removed_with_the_document_that_it_alone_has() {
    let mut history = History::new(14, 2, 1);
    fs::remove_file(history.path("generations/2.json")).unwrap();
    let storage = Failing::new();
    // Opening needs the document; so it is removed while the directory is open.
    let backup = history.copy("backup");
    let delta = Checkpoint::open_with(&history.model(), keeping(1)).map(drop);
    assert!(matches!(delta, Err(Error::Generation { .. })), "{delta:?}");
    history.repair(&[]).unwrap();
    let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), &history.model(), keeping(1)).unwrap();
    fs::remove_file(history.path("generations/2.json")).unwrap();
    storage.fail(Operation::Read, "history/2.delta", EIO);
    let mut next = history.all[2].clone();
    next.train(&mut Rng(15), 3);
    sync(&mut checkpoint, &next, 3);
    assert!(storage.has_failed(), "nothing read it");
    let warnings = checkpoint.take_warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("2.delta"), "{warnings:?}");
    assert!(history.path("history/2.delta").exists(), "the last to have the document is gone");
    storage.mend();
    drop(checkpoint);
    let (mut checkpoint, _) = Checkpoint::open_with(&history.model(), keeping(1)).unwrap();
    checkpoint.rollback(2).unwrap();
    assert_files_are(&checkpoint, &history.all[2]);
    drop(backup);
    history.all.clear();
}

#[test]
fn what_is_let_go_of_is_not_missed_afterwards() {
    // Its document comes from a delta that goes, and its own delta has gone with it.
    let history = History::new(16, 4, u64::MAX);
    fs::remove_file(history.path("generations/2.json")).unwrap();
    drop(Checkpoint::open_with(&history.model(), keeping(1)).unwrap());
    assert!(history.path("generations/2.json").exists());
    let verified = checkpoint::verify(&history.model()).unwrap();
    assert!(verified.is_ok(), "{verified}");
    // Its document is damaged, and a copy has it as it was, but not what led back to it.
    let mut history = History::new(17, 1, 0);
    let older = history.copy("older");
    history.go_on(1, 0);
    flip(&history.path("generations/1.json"));
    let report = history.repair(&[&older]).unwrap();
    assert!(report.damage.is_empty() && !history.path("generations/1.json").exists(), "{report}");
    assert!(checkpoint::verify(&history.model()).unwrap().is_ok());
}

#[test]
fn a_name_of_ours_that_is_a_link_is_replaced_and_not_followed() {
    let history = History::new(18, 1, u64::MAX);
    let (backup, other) = (history.copy("backup"), history.dir.path().join("other"));
    fs::write(&other, "of somebody else").unwrap();
    fs::remove_file(history.path("sums/1")).unwrap();
    std::os::unix::fs::symlink(&other, history.path("sums/1")).unwrap();
    history.mends(&[&backup], &backup, "sums/1");
    assert_eq!(fs::read_to_string(&other).unwrap(), "of somebody else");
}

#[test]
fn a_rollback_to_a_generation_whose_state_is_lost_says_what_helps() {
    let history = History::new(19, 2, u64::MAX);
    flip(&history.path("state/1"));
    let (mut checkpoint, _) = Checkpoint::open(&history.model()).unwrap();
    let error = checkpoint.rollback(1).unwrap_err().to_string();
    assert!(error.contains("state/1") && !error.contains("adopt"), "{error}");
    drop(checkpoint);
    fs::remove_file(history.path("state/2")).unwrap();
    let (checkpoint, _) = Checkpoint::open(&history.model()).unwrap();
    let error = checkpoint.state().map(drop).unwrap_err().to_string();
    assert!(error.contains("state/2") && error.contains("missing") && error.contains("--from COPY"), "{error}");
}
