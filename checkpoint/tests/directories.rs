//! `MODEL.generations`: whole directories beside a model, and the link that names the last.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use checkpoint::{Checkpoint, Error};
use common::*;

/// What the weights of a generation are.
fn weights(dir: &Path, generation: u64) -> Live {
    let mut live = make_model(dir, true, 0, 1);
    (1..=generation).for_each(|n| live.train(&mut Rng(n), 9));
    live
}

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Files of a directory without its document.
fn model_files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = files(dir);
    all.remove(Path::new("generation.json")).expect("every directory has its document");
    all
}

/// All tensors of a directory, one after the other.
fn contents(dir: &Path) -> Vec<u8> {
    let shards = files(dir).into_iter().filter(|(name, _)| name.extension().is_some_and(|end| end == "safetensors"));
    shards
        .flat_map(|(_, file)| file[8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize..].to_vec())
        .collect()
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        make_model(&place.model(), true, 0, 1);
        place
    }
    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }
    fn root(&self) -> PathBuf {
        self.dir.path().join("model.generations")
    }
    fn current(&self) -> PathBuf {
        fs::read_link(self.root().join("current")).unwrap()
    }
}

#[test]
fn every_generation_gets_a_directory_and_the_link_names_the_last() {
    let place = Place::new();
    let mut live = make_model(&place.model(), true, 0, 1);
    fs::write(place.model().join("tokenizer.json"), "{}").unwrap();
    let (mut checkpoint, _) = Checkpoint::open(&place.model()).unwrap();
    let mut contents = Vec::new();
    for generation in 0..=3 {
        if generation > 0 {
            live.train(&mut Rng(generation), 9);
            sync(&mut checkpoint, &live, generation);
        }
        let published = checkpoint.publish().unwrap();
        println!("{published}");
        assert_eq!((published.generation, place.current()), (generation, PathBuf::from(generation.to_string())));
        assert!(model_files(&published.path) == files(&place.model()));
        let document = fs::read(place.model().join(format!(".apollod/generations/{generation}.json"))).unwrap();
        assert!(fs::read(published.path.join("generation.json")).unwrap() == document);
        contents.push(tree(&published.path));
        // Who opened the one before finds it whole.
        for (n, content) in contents.iter().enumerate().skip(generation.saturating_sub(1) as usize) {
            assert!(&tree(&place.root().join(n.to_string())) == content);
        }
    }
    assert_eq!(names(&place.root()), ["2", "3", "current"]);
    let again = checkpoint.publish().unwrap();
    assert_eq!((again.generation, again.bytes_copied), (3, 0));
    assert_eq!(names(&place.root()), ["2", "3", "current"]);
    checkpoint.rollback(1).unwrap();
    let published = checkpoint.publish().unwrap();
    assert_eq!(published.generation, 4);
    assert!(
        model_files(&published.path)
            .iter()
            .eq(contents[1].iter().filter(|(name, _)| !name.ends_with("generation.json")))
    );
}

#[test]
fn what_a_crash_left_is_removed_or_used_and_what_is_not_ours_stays() {
    let place = Place::new();
    let mut live = make_model(&place.model(), true, 0, 1);
    let (mut checkpoint, _) = Checkpoint::open(&place.model()).unwrap();
    checkpoint.publish().unwrap();
    live.train(&mut Rng(1), 9);
    sync(&mut checkpoint, &live, 1);
    let root = place.root();
    // In the middle of a copy, before the switch with a directory that is not this generation's, in the switch.
    fs::create_dir_all(root.join(".1.partial-77/sub")).unwrap();
    fs::create_dir(root.join("1")).unwrap();
    fs::write(root.join("1/model-00001-of-00002.safetensors"), "half").unwrap();
    symlink("1", root.join("current.tmp")).unwrap();
    fs::write(root.join("notes.txt"), "mine").unwrap();
    fs::create_dir(root.join("best")).unwrap();
    checkpoint.publish().unwrap();
    assert_eq!(names(&root), ["0", "1", "best", "current", "notes.txt"]);
    assert!(model_files(&root.join("1")) == files(&place.model()));

    // After the directory was made and before the switch: it is used as it is.
    live.train(&mut Rng(2), 9);
    sync(&mut checkpoint, &live, 2);
    checkpoint.publish().unwrap();
    fs::remove_file(root.join("current")).unwrap();
    symlink("1", root.join("current")).unwrap();
    assert_eq!(checkpoint.publish().unwrap().bytes_copied, 0);
    assert_eq!((place.current(), names(&root).len()), (PathBuf::from("2"), 5));

    // The same numbers of another history.
    drop(checkpoint);
    fs::remove_dir_all(place.model().join(".apollod")).unwrap();
    let (mut checkpoint, _) = Checkpoint::open(&place.model()).unwrap();
    for cursor in 1..=2 {
        live.train(&mut Rng(cursor + 5), 9);
        sync(&mut checkpoint, &live, cursor);
    }
    let error = checkpoint.publish().unwrap_err();
    assert!(matches!(error, Error::Target { .. }) && error.to_string().contains("another history"), "{error}");
    assert_eq!(place.current(), Path::new("2"));
}

/// The child of the next test: publishes generation after generation until it is killed.
#[test]
#[ignore = "run by the test of kills"]
fn child() {
    let Some(model) = std::env::var_os("APOLLOD_TEST_MODEL_DIR").map(PathBuf::from) else { return };
    let (mut checkpoint, _) = Checkpoint::open(&model).unwrap();
    checkpoint.publish().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let mut live = weights(scratch.path(), checkpoint.current().generation);
    loop {
        let next = checkpoint.current().generation + 1;
        live.train(&mut Rng(next), 9);
        sync(&mut checkpoint, &live, next);
        checkpoint.publish().unwrap();
    }
}

#[test]
fn whenever_it_is_killed_the_link_names_a_whole_generation() {
    let place = Place::new();
    let seed = std::env::var("TEST_SEED").map_or(3, |seed| seed.parse().unwrap());
    println!("TEST_SEED={seed}");
    let mut rng = Rng(seed);
    let mut seen = 0;
    // On a slow disk it takes more of them to get somewhere.
    for kills in 0..300 {
        if kills >= 20 && seen > 5 {
            break;
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child"])
            .env("APOLLOD_TEST_MODEL_DIR", place.model())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(30 + rng.next() % 170));
        child.kill().unwrap();
        child.wait().unwrap();
        if !place.root().join("current").exists() {
            continue;
        }
        let generation: u64 = place.current().to_str().unwrap().parse().unwrap();
        assert!(generation >= seen, "{generation} after {seen}");
        seen = generation;
        let scratch = tempfile::tempdir().unwrap();
        let want = weights(scratch.path(), generation).bytes.concat();
        assert!(contents(&place.root().join("current")) == want, "generation {generation} is not whole");
    }
    assert!(seen > 5, "{seen} generations: the test did not test");
    let (checkpoint, _) = Checkpoint::open(&place.model()).unwrap();
    checkpoint.publish().unwrap();
    assert!(names(&place.root()).len() <= 3, "{:?}", names(&place.root()));
    assert!(model_files(&place.root().join("current")) == files(&place.model()));
}
