//! Damage is put right from wherever the recorded content still is, and from nothing else.

mod common;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, Damage, Error, Options, RepairReport, Sources, TensorSum};
use common::failing::{EIO, Failing, Operation};
use common::*;

const EMBEDDING: &str = "model.embed_tokens.weight";
const FIRST: &str = "model-00001-of-00002.safetensors";

/// A model of two shards with generations 0, 1 and 2, the weights of each, and a place for copies.
struct Scene {
    dir: tempfile::TempDir,
    all: Vec<Live>,
}

impl Scene {
    fn new(seed: u64) -> (Scene, Checkpoint) {
        let dir = tempfile::tempdir().unwrap();
        let mut live = make_model(&dir.path().join("model"), true, 2, seed);
        let (mut checkpoint, _) = Checkpoint::open(&dir.path().join("model")).unwrap();
        let mut all = vec![live.clone()];
        for cursor in 1..=2 {
            // The second changes little.
            live.train(&mut Rng(seed + cursor), if cursor == 2 { 100_000 } else { 2 });
            sync(&mut checkpoint, &live, cursor);
            all.push(live.clone());
        }
        (Scene { dir, all }, checkpoint)
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn copy(&self, name: &str) -> PathBuf {
        let to = self.dir.path().join(name);
        checkpoint::export(&self.model(), &to).unwrap();
        to
    }

    fn newest(&self) -> &Live {
        self.all.last().unwrap()
    }
}

fn tensor(checkpoint: &Checkpoint, name: &str) -> TensorSum {
    checkpoint.current().tensors.iter().find(|tensor| tensor.name == name).unwrap().clone()
}

/// Changes bytes of a file; gives the file as it is then.
fn damage(path: &Path, at: Range<u64>) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    bytes[at.start as usize..at.end as usize].iter_mut().for_each(|byte| *byte = !*byte);
    fs::write(path, &bytes).unwrap();
    bytes
}

fn flip(path: &Path, byte: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[byte as usize] ^= 8;
    fs::write(path, bytes).unwrap();
}

/// What was repaired, from where, and whether all is well.
fn told(report: &RepairReport) -> Vec<(String, u64, String)> {
    report.repaired.iter().map(|done| (done.what.clone(), done.blocks, done.from.clone())).collect()
}

#[test]
fn one_flipped_bit_is_turned_back_without_any_copy() {
    let (scene, mut checkpoint) = Scene::new(1);
    let embedding = tensor(&checkpoint, EMBEDDING);
    flip(&scene.model().join(FIRST), embedding.offset + 40_000);
    let mut next = scene.newest().clone();
    next.train(&mut Rng(9), 2);
    let refused = try_sync(&mut checkpoint, &next, 3).unwrap_err();
    assert!(matches!(refused, Error::Changed { .. }), "{refused}");
    let command = format!("apollod checkpoint repair {}`", scene.model().display());
    assert!(refused.to_string().contains(&command), "{refused}");
    assert!(checkpoint.rollback(1).unwrap_err().to_string().contains(&command));

    let report = checkpoint.repair(&Sources::default()).unwrap();
    let from = "the block itself, in which one bit was flipped";
    assert_eq!(told(&report), [(format!("{FIRST}: tensor `{EMBEDDING}`"), 1, from.into())]);
    assert!(report.damage.is_empty(), "{report}");
    assert_files_are(&checkpoint, scene.newest());
    // What the handle knows of its blocks is true still.
    sync(&mut checkpoint, &next, 3);
    assert_files_are(&checkpoint, &next);
    checkpoint.rollback(1).unwrap();
    assert_files_are(&checkpoint, &scene.all[1]);
}

#[test]
fn blocks_are_taken_from_live_weights_only_where_these_have_not_moved() {
    let (scene, mut checkpoint) = Scene::new(2);
    let (embedding, path) = (tensor(&checkpoint, EMBEDDING), scene.model().join(FIRST));
    let mut live = scene.newest().clone();
    // Blocks 1, 2 and 3; the live weights have moved in the second.
    let block = |n: u64| (embedding.offset / 16384 + n) * 16384;
    let bad = damage(&path, block(1) + 16_000..block(3) + 100);
    let moved = live.index(EMBEDDING);
    live.bytes[moved][(block(2) - embedding.offset) as usize + 5] ^= 1;
    let report = checkpoint.repair(&Sources { live: Some(&live), copies: &[] }).unwrap();
    let what = format!("{FIRST}: tensor `{EMBEDDING}`");
    assert_eq!(told(&report), [(what, 2, "the live weights".into())]);
    let left = [block(2) - embedding.offset..block(3) - embedding.offset];
    let [Damage::Tensor { tensor, blocks, .. }] = &report.damage[..] else { panic!("{report}") };
    assert_eq!((tensor.as_str(), &blocks[..]), (EMBEDDING, &left[..]));
    assert!(report.to_string().contains("still damaged: "), "{report}");
    // The one that was not found is as it was; all else is right.
    let (now, at) = (fs::read(&path).unwrap(), block(2) as usize..block(3) as usize);
    assert!(now[at.clone()] == bad[at]);
    let report = checkpoint.repair(&Sources { live: Some(scene.newest()), copies: &[] }).unwrap();
    assert!(report.damage.is_empty() && report.repaired.len() == 1, "{report}");
    assert_files_are(&checkpoint, scene.newest());
}

#[test]
fn a_copy_of_an_earlier_generation_gives_the_blocks_that_are_the_same_since() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let mut live = make_model(&model, true, 2, 3);
    let (mut checkpoint, _) = Checkpoint::open(&model).unwrap();
    let copies = [dir.path().join("copy")];
    checkpoint::export(&model, &copies[0]).unwrap();
    let embedding = live.index(EMBEDDING);
    live.bytes[embedding][20_000] ^= 1;
    sync(&mut checkpoint, &live, 1);
    let offset = tensor(&checkpoint, EMBEDDING).offset;
    let path = model.join(FIRST);
    let good = fs::read(&path).unwrap();
    // Two blocks: one that is the same in the copy, and the one that the sync changed.
    damage(&path, offset + 100_000..offset + 100_100);
    let bad = damage(&path, offset + 20_000..offset + 20_100);
    let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies });
    assert!(matches!(report, Err(Error::Locked { .. })), "somebody has it open: {report:?}");
    drop(checkpoint);
    let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
    let what = format!("{FIRST}: tensor `{EMBEDDING}`");
    assert_eq!(told(&report), [(what, 1, copies[0].display().to_string())]);
    assert_eq!(report.damage.len(), 1, "{report}");
    let now = fs::read(&path).unwrap();
    let at = offset as usize + 20_000;
    assert!(now[at..at + 100] == bad[at..at + 100]);
    assert!(now[at + 60_000..] == good[at + 60_000..]);
}

#[test]
fn a_copy_may_be_cut_into_other_files_or_have_a_damaged_header() {
    let (scene, checkpoint) = Scene::new(4);
    drop(checkpoint);
    let path = scene.model().join(FIRST);
    let good = fs::read(&path).unwrap();
    // The same weights in one file, at other offsets.
    let single = scene.dir.path().join("single");
    make_model(&single, false, 7, 4);
    let (mut other, _) = Checkpoint::open(&single).unwrap();
    sync(&mut other, scene.newest(), 2);
    // The same files, one of them with a header that cannot be read.
    let headless = scene.copy("headless");
    damage(&headless.join(FIRST), 3..40);
    for copy in [single, headless] {
        damage(&path, 500_000..700_000);
        let report = checkpoint::repair(&scene.model(), &Sources { live: None, copies: &[copy] }).unwrap();
        assert!(report.damage.is_empty(), "{report}");
        assert!(fs::read(&path).unwrap() == good);
    }
    let empty = tempfile::tempdir().unwrap();
    let copies = [empty.path().to_path_buf()];
    let error = checkpoint::repair(&scene.model(), &Sources { live: None, copies: &copies }).unwrap_err();
    assert!(error.to_string().contains("holds no safetensors file to repair from"), "{error}");
}

#[test]
fn directories_of_generations_are_looked_at_by_themselves() {
    let (scene, checkpoint) = Scene::new(5);
    let published = checkpoint.publish().unwrap().path;
    drop(checkpoint);
    let path = scene.model().join(FIRST);
    let good = fs::read(&path).unwrap();
    damage(&path, 100_000..200_000);
    let report = checkpoint::repair(&scene.model(), &Sources::default()).unwrap();
    assert!(report.damage.is_empty(), "{report}");
    assert_eq!(told(&report)[0].2, published.canonicalize().unwrap().display().to_string());
    assert!(fs::read(&path).unwrap() == good);
}

#[test]
fn a_damaged_header_is_repaired_although_it_keeps_the_directory_from_being_opened() {
    let (scene, checkpoint) = Scene::new(6);
    drop(checkpoint);
    let path = scene.model().join(FIRST);
    let good = fs::read(&path).unwrap();
    let copies = [scene.copy("copy")];
    // A bit of it, of the same meaning or of none, and so much that a copy is needed.
    let last = 8 + u64::from_le_bytes(*good.first_chunk().unwrap()) - 1;
    for (bytes, copies) in [(last..last, &[][..]), (9..9, &[]), (1..60, &copies[..])] {
        match bytes.is_empty() {
            true => flip(&path, bytes.start),
            false => drop(damage(&path, bytes.clone())),
        }
        Checkpoint::open(&scene.model()).unwrap_err();
        let report = checkpoint::repair(&scene.model(), &Sources { live: None, copies }).unwrap();
        assert_eq!(told(&report)[0].0, format!("{FIRST}: its header"), "{bytes:?}");
        assert!(report.damage.is_empty() && fs::read(&path).unwrap() == good, "{bytes:?}: {report}");
        Checkpoint::open(&scene.model()).unwrap();
    }
}

#[test]
fn a_generation_whose_document_is_damaged_is_listed_and_passed_by_and_comes_back_from_its_delta() {
    for damaged in 0..=2 {
        let (scene, checkpoint) = Scene::new(7);
        drop(checkpoint);
        let document = scene.model().join(format!(".apollod/generations/{damaged}.json"));
        let good = fs::read(&document).unwrap();
        flip(&document, 700);
        let listed = checkpoint::list(&scene.model()).unwrap();
        let of = &listed[damaged as usize];
        let said = of.damage.clone().unwrap();
        assert!(said.contains(&format!("apollod checkpoint repair {}", scene.model().display())), "{said}");
        assert!(of.to_string().contains(&said) && !of.restorable && of.generation == damaged);
        let others: Vec<u64> = listed.iter().filter(|of| of.damage.is_none()).map(|of| of.generation).collect();
        assert_eq!(others.len(), 2);
        assert!(damaged == 2 || listed.iter().all(|of| of.restorable == others.contains(&of.generation)));
        // Nobody needs it to go on, unless it is the current one.
        match Checkpoint::open(&scene.model()) {
            Err(error) => {
                assert!(damaged == 2 && matches!(error, Error::Generation { .. }), "{error}");
                assert!(error.to_string().contains("apollod checkpoint repair"), "{error}");
            }
            Ok((mut checkpoint, _)) => {
                assert!(damaged < 2);
                let error = checkpoint.rollback(damaged).unwrap_err().to_string();
                assert!(error.contains("apollod checkpoint repair"), "{error}");
                let other = 1 - damaged;
                checkpoint.rollback(other).unwrap();
                assert_files_are(&checkpoint, &scene.all[other as usize]);
            }
        }
        let report = checkpoint::repair(&scene.model(), &Sources::default()).unwrap();
        if damaged == 0 {
            // The base has no delta that ends in its document.
            assert!(report.repaired.is_empty() && report.damage.len() == 1, "{report}");
            continue;
        }
        assert!(report.damage.is_empty(), "{report}");
        assert_eq!(told(&report)[0].0, document.display().to_string());
        assert!(fs::read(&document).unwrap() == good);
        Checkpoint::open(&scene.model()).unwrap();
    }
}

/// All files under `.apollod` but the lock, which says whose it is.
fn held(model: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for folder in ["generations", "history", "state", "sums"] {
        let Ok(entries) = fs::read_dir(model.join(".apollod").join(folder)) else { continue };
        files.extend(entries.map(|entry| entry.unwrap().path()).map(|path| (path.clone(), fs::read(path).unwrap())));
    }
    files.sort();
    files
}

#[test]
fn a_missing_document_is_noticed_and_comes_back_and_nobody_removes_what_belongs_to_it() {
    for missing in 0..=2u64 {
        let (scene, checkpoint) = Scene::new(21 + missing);
        drop(checkpoint);
        let model = scene.model();
        let copies = [scene.dir.path().join("backup")];
        copy_tree(&model, &copies[0]);
        let whole = held(&model);
        fs::remove_file(model.join(format!(".apollod/generations/{missing}.json"))).unwrap();
        let without = held(&model);

        let listed = checkpoint::list(&model).unwrap();
        assert_eq!(listed.len(), 3);
        let said = listed[missing as usize].damage.clone().unwrap();
        assert!(said.contains("missing") && said.contains("apollod checkpoint repair"), "{said}");
        match (missing, checkpoint::verify(&model), Checkpoint::open(&model)) {
            (2, Err(Error::Generation { .. }), Err(Error::Generation { .. })) => {}
            (0 | 1, Ok(report), Ok(_)) => assert!(report.damage.len() == 1, "{report}"),
            (_, verified, opened) => panic!("without {missing}: {verified:?}, {opened:?}"),
        }
        assert!(held(&model) == without, "something was removed");

        let sources = Sources { live: None, copies: if missing == 0 { &copies } else { &[] } };
        let report = checkpoint::repair(&model, &sources).unwrap();
        assert!(report.damage.is_empty() && report.repaired.len() == 1, "{report}");
        assert!(held(&model) == whole);
    }
}

#[test]
fn where_all_documents_are_missing_the_files_do_not_become_generation_0() {
    for kept in [u64::MAX, 0] {
        let (scene, checkpoint) = Scene::new(25);
        drop(checkpoint);
        let model = scene.model();
        let keep = checkpoint::Keep { generations: kept, ..Default::default() };
        drop(Checkpoint::open_with(&model, Options { keep, ..Options::default() }).unwrap());
        let copies = [scene.dir.path().join("backup")];
        copy_tree(&model, &copies[0]);
        let whole = held(&model);
        // With no history, also where an old document is left of which nothing else is.
        for left in [&[][..], &[0, 1]] {
            if kept > 0 && !left.is_empty() {
                continue;
            }
            for number in (0..=2).filter(|number| !left.contains(number)) {
                fs::remove_file(model.join(format!(".apollod/generations/{number}.json"))).unwrap();
            }
            if left.is_empty() {
                fs::remove_dir(model.join(".apollod/generations")).unwrap();
            }
            let without = held(&model);
            let opened = Checkpoint::open(&model).unwrap_err();
            assert!(matches!(opened, Error::Generation { .. }), "{opened}");
            let listed = checkpoint::list(&model).unwrap();
            let newest = listed.last().unwrap();
            assert!(newest.generation == 2 && newest.damage.clone().unwrap().contains("missing"), "{newest}");
            assert!(checkpoint::verify(&model).is_err() && held(&model) == without, "something was removed");
            let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
            assert!(report.damage.is_empty() && report.generation == 2, "{report}");
            copy_tree(&copies[0].join(".apollod/generations"), &model.join(".apollod/generations"));
            assert!(held(&model) == whole);
        }
    }
}

#[test]
fn deltas_and_states_of_the_history_come_back_from_a_copy_with_its_own_folder() {
    for gone in [false, true] {
        let (mut scene, mut checkpoint) = Scene::new(30);
        let mut live = scene.newest().clone();
        live.train(&mut Rng(31), 5);
        sync(&mut checkpoint, &live, 3);
        scene.all.push(live);
        drop(checkpoint);
        let (model, copies) = (scene.model(), [scene.dir.path().join("backup")]);
        copy_tree(&model, &copies[0]);
        let whole = held(&model);
        for file in ["history/2.delta", "state/1"] {
            let path = model.join(".apollod").join(file);
            if gone { fs::remove_file(path).unwrap() } else { flip(&path, 700) }
        }
        let verified = checkpoint::verify(&model).unwrap();
        let lost: Vec<(u64, u64)> = verified
            .damage
            .iter()
            .filter_map(|damage| match damage {
                Damage::History { oldest, newest, .. } => Some((*oldest, *newest)),
                _ => None,
            })
            .collect();
        assert_eq!((lost, verified.damage.len()), (vec![(0, 1), (1, 1)], 2), "{verified}");
        let (mut checkpoint, _) = Checkpoint::open(&model).unwrap();
        let refused = checkpoint.rollback(0).unwrap_err().to_string();
        assert!(gone || refused.contains("apollod checkpoint repair"), "{refused}");
        // What does not need it can be restored.
        assert_files_are(&checkpoint, scene.newest());
        drop(checkpoint);

        let alone = checkpoint::repair(&model, &Sources::default()).unwrap();
        assert!(alone.repaired.is_empty() && alone.damage == verified.damage, "{alone}");
        // A copy of another history with the same numbers is no help.
        let (other, handle) = Scene::new(32);
        drop(handle);
        let others = [other.model()];
        let foreign = checkpoint::repair(&model, &Sources { live: None, copies: &others }).unwrap();
        assert!(foreign.repaired.iter().all(|done| done.what.ends_with("state/1")), "{foreign}");
        assert!(foreign.damage.iter().any(|damage| damage.to_string().contains("2.delta")), "{foreign}");

        let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
        assert!(report.damage.is_empty(), "{report}");
        assert!(held(&model) == whole);
        let (mut checkpoint, _) = Checkpoint::open(&model).unwrap();
        checkpoint.rollback(1).unwrap();
        assert_files_are(&checkpoint, &scene.all[1]);
    }
}

#[test]
fn the_first_delta_comes_back_too_although_the_directory_was_used_without_it() {
    let (scene, checkpoint) = Scene::new(40);
    drop(checkpoint);
    let (model, copies) = (scene.model(), [scene.dir.path().join("backup")]);
    copy_tree(&model, &copies[0]);
    let whole = held(&model);
    fs::remove_file(model.join(".apollod/history/1.delta")).unwrap();
    drop(Checkpoint::open(&model).unwrap());
    let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
    assert!(report.damage.is_empty() && report.repaired.len() == 1, "{report}");
    assert!(held(&model) == whole);
}

/// A scene of which so many earlier generations are kept, and a copy of it.
fn kept(seed: u64, generations: u64) -> (Scene, PathBuf) {
    let (scene, checkpoint) = Scene::new(seed);
    drop(checkpoint);
    let keep = checkpoint::Keep { generations, ..Default::default() };
    drop(Checkpoint::open_with(&scene.model(), Options { keep, ..Options::default() }).unwrap());
    let backup = scene.dir.path().join("backup");
    copy_tree(&scene.model(), &backup);
    (scene, backup)
}

#[test]
fn a_document_of_another_history_is_not_taken_for_ours() {
    let ((scene, backup), (other, _)) = (kept(50, 1), kept(51, 1));
    let model = scene.model();
    let whole = held(&model);
    fs::remove_file(model.join(".apollod/generations/1.json")).unwrap();
    let without = held(&model);
    let others = [other.model()];
    let foreign = checkpoint::repair(&model, &Sources { live: None, copies: &others }).unwrap();
    assert!(foreign.repaired.is_empty() && foreign.damage[0].to_string().contains("1.json"), "{foreign}");
    assert!(held(&model) == without);
    let copies = [other.model(), backup];
    let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
    assert!(report.damage.is_empty() && held(&model) == whole, "{report}");
}

#[test]
fn a_document_and_the_delta_after_it_are_missed_and_come_back_together() {
    let (scene, backup) = kept(52, 1);
    let (model, copies) = (scene.model(), [backup]);
    let whole = held(&model);
    for file in ["generations/1.json", "history/2.delta"] {
        fs::remove_file(model.join(".apollod").join(file)).unwrap();
    }
    let without = held(&model);
    assert!(!checkpoint::verify(&model).unwrap().is_ok());
    drop(Checkpoint::open(&model).unwrap());
    assert!(held(&model) == without, "something was removed");
    let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
    assert!(report.damage.is_empty() && held(&model) == whole, "{report}");
}

#[test]
fn without_history_an_earlier_document_is_never_taken_for_the_current_one() {
    for case in ["a journal that says nothing", "older sums", "nothing else", "a journal that was begun"] {
        let (scene, backup) = kept(53, 0);
        let (model, copies) = (scene.model(), [backup]);
        let (own, good) = (model.join(".apollod"), files(&model));
        let whole = held(&model);
        match case {
            "a journal that says nothing" => fs::write(own.join("journal"), "").unwrap(),
            "older sums" => drop(fs::copy(own.join("sums/2"), own.join("sums/1")).unwrap()),
            "nothing else" => {}
            _ => {
                let mut next = scene.newest().clone();
                next.train(&mut Rng(54), 3);
                for changes in 1.. {
                    let storage = Stopping::after(i64::MAX);
                    let options = Options { threads: 1, ..Options::default() };
                    let (mut open, _) = Checkpoint::open_on(storage.clone(), &model, options).unwrap();
                    storage.stop_after(changes);
                    try_sync(&mut open, &next, 3).unwrap_err();
                    if files(&model) != good {
                        break;
                    }
                }
            }
        }
        fs::remove_file(own.join("generations/2.json")).unwrap();
        let without = held(&model);
        let error = Checkpoint::open(&model).unwrap_err();
        assert!(matches!(error, Error::Generation { .. }) && error.to_string().contains("2.json"), "{case}: {error}");
        assert!(held(&model) == without, "{case}: something was removed");
        let report = checkpoint::repair(&model, &Sources { live: None, copies: &copies }).unwrap();
        assert!(report.damage.is_empty() && files(&model) == good, "{case}: {report}");
        drop(Checkpoint::open(&model).unwrap());
        assert!(held(&model) == whole, "{case}");
    }
}

#[test]
fn a_sync_does_not_remove_the_delta_that_alone_has_a_document() {
    let (scene, _) = kept(55, 1);
    let keep = checkpoint::Keep { generations: 1, ..Default::default() };
    let options = Options { keep, ..Options::default() };
    let (mut checkpoint, _) = Checkpoint::open_with(&scene.model(), options).unwrap();
    fs::remove_file(scene.model().join(".apollod/generations/2.json")).unwrap();
    let mut next = scene.newest().clone();
    next.train(&mut Rng(56), 3);
    sync(&mut checkpoint, &next, 3);
    assert!(!scene.model().join(".apollod/history/2.delta").exists());
    checkpoint.rollback(2).unwrap();
    assert_files_are(&checkpoint, scene.newest());
}

#[test]
fn a_damaged_document_that_nothing_leads_back_to_keeps_nobody_from_working_and_goes() {
    let (scene, checkpoint) = Scene::new(8);
    drop(checkpoint);
    let keep = Options { keep: checkpoint::Keep { generations: 1, ..Default::default() }, ..Options::default() };
    drop(Checkpoint::open_with(&scene.model(), keep.clone()).unwrap());
    let document = scene.model().join(".apollod/generations/0.json");
    flip(&document, 100);
    let (mut checkpoint, _) = Checkpoint::open_with(&scene.model(), keep).unwrap();
    let mut next = scene.newest().clone();
    next.train(&mut Rng(81), 9);
    sync(&mut checkpoint, &next, 3);
    assert!(checkpoint.generations().unwrap()[0].damage.is_some());
    let report = checkpoint.repair(&Sources::default()).unwrap();
    assert!(report.damage.is_empty() && told(&report)[0].2.contains("removed"), "{report}");
    assert!(!document.exists());
    assert_eq!(checkpoint.generations().unwrap().len(), 3);
}

#[test]
fn optimizer_states_come_back_from_a_copy_with_its_own_folder() {
    let (scene, checkpoint) = Scene::new(9);
    drop(checkpoint);
    let copies = [scene.dir.path().join("backup")];
    copy_tree(&scene.model(), &copies[0]);
    let states = [1, 2].map(|n| scene.model().join(format!(".apollod/state/{n}")));
    for state in &states {
        damage(state, 100..2000);
    }
    let without = checkpoint::repair(&scene.model(), &Sources::default()).unwrap();
    assert!(without.repaired.is_empty() && without.damage.len() == 2, "{without}");
    let said = without.damage[0].to_string();
    let dir = scene.model();
    for command in ["repair", "rollback", "adopt"] {
        assert!(said.contains(&format!("apollod checkpoint {command} {}", dir.display())), "{said}");
    }
    let report = checkpoint::repair(&dir, &Sources { live: None, copies: &copies }).unwrap();
    assert!(report.damage.is_empty() && report.repaired.len() == 2, "{report}");
    assert_eq!(fs::read(&states[1]).unwrap(), state_of(2));
}

#[test]
fn block_sums_that_are_damaged_too_are_made_again_from_whatever_is_whole() {
    let (scene, checkpoint) = Scene::new(10);
    let offset = tensor(&checkpoint, EMBEDDING).offset;
    drop(checkpoint);
    let sums = scene.model().join(".apollod/sums/2");
    let good = (fs::read(&sums).unwrap(), files(&scene.model()));
    damage(&sums, 0..40);
    damage(&scene.model().join(FIRST), offset + 50_000..offset + 51_000);
    let lost = checkpoint::repair(&scene.model(), &Sources::default()).unwrap();
    assert!(lost.repaired.is_empty() && lost.damage.len() == 2, "{lost}");
    let live = Sources { live: Some(scene.newest()), copies: &[] };
    let report = checkpoint::repair(&scene.model(), &live).unwrap();
    assert!(report.damage.is_empty() && report.repaired.len() == 2, "{report}");
    assert!((fs::read(&sums).unwrap(), files(&scene.model())) == good);
}

#[test]
fn a_journal_that_recovery_stops_at_is_dealt_with_after_the_repair() {
    for stranded in [false, true] {
        let (scene, checkpoint) = Scene::new(11);
        let offset = tensor(&checkpoint, EMBEDDING).offset;
        drop(checkpoint);
        let copies = [scene.copy("copy")];
        let (good, path) = (files(&scene.model()), scene.model().join(FIRST));
        let mut next = scene.newest().clone();
        next.train(&mut Rng(12), 3);
        // A sync that ends after its first write into the files.
        for changes in 1.. {
            let (storage, threads) = (Stopping::after(i64::MAX), 1);
            let options = Options { threads, ..Options::default() };
            let (mut open, _) = Checkpoint::open_on(storage.clone(), &scene.model(), options).unwrap();
            storage.stop_after(changes);
            try_sync(&mut open, &next, 3).unwrap_err();
            if files(&scene.model()) != good {
                break;
            }
        }
        let journal = scene.model().join(".apollod/journal");
        match stranded {
            true => fs::write(&journal, "no journal").unwrap(),
            false => drop(damage(&path, offset + 600..offset + 700)),
        }
        let error = Checkpoint::open(&scene.model()).unwrap_err();
        let want =
            if stranded { matches!(error, Error::Stranded { .. }) } else { matches!(error, Error::Foreign { .. }) };
        assert!(want && error.to_string().contains("apollod checkpoint repair"), "{error}");

        let without = checkpoint::repair(&scene.model(), &Sources::default()).unwrap();
        assert!(!without.damage.is_empty() && journal.exists(), "{without}");
        let report = checkpoint::repair(&scene.model(), &Sources { live: None, copies: &copies }).unwrap();
        assert!(report.damage.is_empty() && !journal.exists(), "{report}");
        assert!(files(&scene.model()) == good);
        let (checkpoint, recovery) = Checkpoint::open(&scene.model()).unwrap();
        assert_eq!(recovery, checkpoint::Recovery::Clean { generation: 2 });
        assert_files_are(&checkpoint, scene.newest());
    }
}

#[test]
fn a_repair_cut_short_at_any_moment_leaves_blocks_that_are_damaged_as_before_or_right() {
    let (scene, checkpoint) = Scene::new(13);
    drop(checkpoint);
    let path = scene.model().join(FIRST);
    let good = fs::read(&path).unwrap();
    let (copies, mut partly) = ([scene.copy("copy")], false);
    let sources = Sources { live: None, copies: &copies };
    let bad = damage(&path, 300_000..400_000);
    flip(&scene.model().join(".apollod/generations/1.json"), 50);
    for changes in 0.. {
        let storage = Stopping::after(i64::MAX);
        let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), &scene.model(), Options::default()).unwrap();
        storage.stop_after(changes);
        let done = checkpoint.repair(&sources);
        drop(checkpoint);
        let now = fs::read(&path).unwrap();
        let sides = bad.iter().zip(&good);
        assert!(now.iter().zip(sides).all(|(now, (bad, good))| now == bad || now == good));
        partly |= now != bad && now != good;
        if done.is_ok() {
            break;
        }
    }
    assert!(partly, "no end fell between two writes");
    let report = checkpoint::repair(&scene.model(), &sources).unwrap();
    assert!(report.damage.is_empty() && fs::read(&path).unwrap() == good, "{report}");
}

#[test]
fn what_is_repaired_is_synced_and_a_sync_that_fails_ends_the_handle() {
    let (scene, checkpoint) = Scene::new(14);
    drop(checkpoint);
    let path = scene.model().join(FIRST);
    let good = fs::read(&path).unwrap();
    damage(&path, 300_000..310_000);
    let live = Sources { live: Some(scene.newest()), copies: &[] };
    let storage = Failing::new();
    let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), &scene.model(), Options::default()).unwrap();
    storage.fail(Operation::Sync, FIRST, EIO);
    let error = checkpoint.repair(&live).unwrap_err();
    assert!(matches!(error, Error::Sync { .. }), "{error}");
    assert!(checkpoint.unusable().is_some());
    drop(checkpoint);
    // What reads as right may not be on the disk: whoever repairs again, after a restart, finds out what is there.
    let (mut checkpoint, _) = Checkpoint::open(&scene.model()).unwrap();
    assert!(checkpoint.repair(&live).unwrap().damage.is_empty());
    assert!(fs::read(&path).unwrap() == good);
}
