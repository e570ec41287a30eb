//! Journals that are not whole, files that are of neither generation, and errors on the way to a generation.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::{Checkpoint, Error, Options, Recovery};
use common::failing::{EIO, ENOSPC, Failing, Operation};
use common::*;

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// One thing after the other, so that the same number of changes leads to the same place.
fn options() -> Options {
    Options { threads: 1, ..Options::default() }
}

fn open(dir: &Path) -> (Checkpoint, Recovery) {
    Checkpoint::open_with(dir, options()).unwrap()
}

fn journal(dir: &Path) -> PathBuf {
    dir.join(".apollod/journal")
}

/// Generation 1 of a model, and the weights that generation 2 would have.
struct Scene {
    dir: tempfile::TempDir,
    one: Live,
    two: Live,
    /// The model's files at generation 1.
    files: Files,
}

impl Scene {
    fn new(sharded: bool, seed: u64) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let mut one = make_model(dir.path(), sharded, 0, seed);
        let (mut checkpoint, _) = open(dir.path());
        one.train(&mut Rng(seed + 1), 3);
        sync(&mut checkpoint, &one, 1);
        let mut two = one.clone();
        two.train(&mut Rng(seed + 2), 3);
        let files = files(dir.path());
        Scene { dir, one, two, files }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Ends a sync of generation 2 after so many changes, as a crash does.
    fn stop_after(&self, changes: i64) {
        let storage = Stopping::after(i64::MAX);
        let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), self.path(), options()).unwrap();
        storage.stop_after(changes);
        try_sync(&mut checkpoint, &self.two, 2).unwrap_err();
    }

    /// Ends a sync of generation 2 after the first change that makes this hold.
    fn stop_when(&self, holds: impl Fn(&Path) -> bool) -> i64 {
        (1..)
            .find(|changes| {
                self.stop_after(*changes);
                holds(self.path())
            })
            .unwrap()
    }

    /// A whole segment in the journal, and none of its blocks in the files.
    fn journalled(&self) {
        let first = self.stop_when(|dir| files(dir) != self.files);
        self.stop_after(first - 1);
        assert!(files(self.path()) == self.files);
    }

    /// Every block in the files, no generation published.
    fn written(&self) {
        self.stop_when(|dir| dir.join(".apollod/sums/2").exists());
        assert!(files(self.path()) != self.files);
    }

    /// Generation 2 published, its journal not put away.
    fn published(&self) {
        self.stop_when(|dir| dir.join(".apollod/generations/2.json").exists());
        assert!(journal(self.path()).exists());
    }

    fn put(&self, files: &Files) {
        files.iter().for_each(|(name, bytes)| fs::write(self.path().join(name), bytes).unwrap());
    }
}

/// The bytes with one bit changed, anywhere.
fn flipped(bytes: &[u8], rng: &mut Rng) -> (usize, Vec<u8>) {
    let mut flipped = bytes.to_vec();
    let bit = rng.below(bytes.len() * 8);
    flipped[bit / 8] ^= 1 << (bit % 8);
    (bit / 8, flipped)
}

/// Lengths shorter than `whole`: those of magic and head, the last ones, and some between.
fn lengths(whole: usize, rng: &mut Rng) -> Vec<usize> {
    let mut lengths: Vec<usize> = vec![0, 1, 7, 8, 9, 15, 16, 40, 512, 4096];
    lengths.extend((1..12).map(|back| whole - back * back));
    lengths.extend((0..10).map(|_| rng.below(whole)));
    lengths
}

fn assert_stranded(dir: &Path) -> String {
    match Checkpoint::open_with(dir, options()).unwrap_err() {
        Error::Stranded { generation: 1, damage, .. } => damage,
        other => panic!("{other}"),
    }
}

#[test]
fn a_journal_cut_or_flipped_before_any_block_was_written_leaves_the_files_as_they_are() {
    let scene = Scene::new(true, 10);
    scene.journalled();
    let whole = fs::read(journal(scene.path())).unwrap();
    let mut rng = Rng(13);
    println!("seed 13");
    let cut = lengths(whole.len(), &mut rng).into_iter().map(|n| (n, whole[..n].to_vec())).collect::<Vec<_>>();
    let flips = (0..25).map(|_| flipped(&whole, &mut rng)).collect::<Vec<_>>();
    for (at, bytes) in cut.into_iter().chain(flips) {
        println!("byte {at} of {}", whole.len());
        fs::write(journal(scene.path()), bytes).unwrap();
        fs::write(scene.path().join(".apollod/state/2"), "begun").unwrap();
        let (checkpoint, recovery) = open(scene.path());
        assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
        assert!(recovery.to_string().contains("torn at byte"), "{recovery}");
        assert_eq!(checkpoint.current().progress, progress(1));
        assert!(!journal(scene.path()).exists() && !scene.path().join(".apollod/state/2").exists());
        assert!(files(scene.path()) == scene.files);
    }
}

#[test]
fn a_journal_damaged_after_blocks_were_written_is_kept_and_its_prefix_is_all_that_is_undone() {
    let scene = Scene::new(true, 20);
    scene.written();
    let torn = files(scene.path());
    let whole = fs::read(journal(scene.path())).unwrap();
    let mut rng = Rng(23);
    println!("seed 23");
    let mut damaged = lengths(whole.len(), &mut rng).into_iter().map(|n| (n, whole[..n].to_vec())).collect::<Vec<_>>();
    damaged.extend((0..10).map(|_| flipped(&whole, &mut rng)));
    for (at, bytes) in damaged {
        println!("byte {at} of {}", whole.len());
        fs::write(journal(scene.path()), &bytes).unwrap();
        let damage = assert_stranded(scene.path());
        assert!(damage.contains("tensor `"), "{damage}");
        assert!(fs::read(journal(scene.path())).unwrap() == bytes, "the journal is not as it was");
        let now = files(scene.path());
        if at < 512 {
            assert!(now == torn, "nothing in the journal was whole, and the files are not as they were");
        }
        for (name, now) in &now {
            let sides = torn[name].iter().zip(&scene.files[name]);
            assert!(now.iter().zip(sides).all(|(now, (new, old))| now == new || now == old), "{}", name.display());
        }
        // With the journal as it was, all of it is undone, whatever the attempts before have undone.
        fs::write(journal(scene.path()), &whole).unwrap();
        let (checkpoint, recovery) = open(scene.path());
        assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
        assert_files_are(&checkpoint, &scene.one);
        scene.put(&torn);
    }
}

#[test]
fn the_way_out_of_a_stranded_directory_is_the_one_that_the_error_names() {
    let scene = Scene::new(false, 30);
    scene.written();
    fs::write(journal(scene.path()), "no journal").unwrap();
    assert_stranded(scene.path());
    scene.put(&scene.files);
    fs::remove_file(journal(scene.path())).unwrap();
    let (mut checkpoint, recovery) = open(scene.path());
    assert_eq!(recovery, Recovery::Clean { generation: 1 });
    sync(&mut checkpoint, &scene.two, 2);
    assert_files_are(&checkpoint, &scene.two);
}

#[test]
fn a_damaged_journal_of_a_generation_already_published_costs_only_its_undo() {
    for damage in 0..3 {
        let scene = Scene::new(damage == 1, 40);
        scene.published();
        let mut bytes = fs::read(journal(scene.path())).unwrap();
        let middle = bytes.len() / 2;
        match damage {
            0 => bytes.truncate(8),
            1 => bytes.truncate(middle),
            _ => bytes[middle] ^= 1,
        }
        fs::write(journal(scene.path()), bytes).unwrap();
        let (mut checkpoint, recovery) = open(scene.path());
        assert!(matches!(recovery, Recovery::Undone { generation: 2, .. }), "{recovery}");
        assert!(!journal(scene.path()).exists());
        assert_files_are(&checkpoint, &scene.two);
        assert_eq!(read_state(&checkpoint).unwrap(), state_of(2));
        assert!(matches!(checkpoint.rollback(1), Err(Error::NotRestorable { .. })));
        // From here on history begins anew.
        sync(&mut checkpoint, &scene.one, 3);
        checkpoint.rollback(2).unwrap();
        assert_files_are(&checkpoint, &scene.two);
    }
}

#[test]
fn a_damaged_journal_of_a_published_generation_is_kept_where_the_files_are_damaged_too() {
    let scene = Scene::new(false, 50);
    scene.published();
    fs::write(journal(scene.path()), "APOLJNL4").unwrap();
    let shard = scene.path().join("model.safetensors");
    let good = fs::read(&shard).unwrap();
    let mut bad = good.clone();
    bad[600_000] ^= 1;
    fs::write(&shard, &bad).unwrap();
    match Checkpoint::open(scene.path()).unwrap_err() {
        Error::Stranded { generation: 2, damage, .. } => assert!(damage.contains(&scene.two.tensors[0].name)),
        other => panic!("{other}"),
    }
    assert!(journal(scene.path()).exists() && fs::read(&shard).unwrap() == bad);
    fs::write(&shard, &good).unwrap();
    assert_files_are(&open(scene.path()).0, &scene.two);
}

#[test]
fn a_journal_of_another_generation_or_of_other_files_is_refused_and_kept() {
    let (of, other_files) = (Scene::new(false, 60), Scene::new(true, 60));
    of.written();
    other_files.written();
    let refused = |scene: &Scene, bytes: &[u8], reason: &str| {
        let before = files(scene.path());
        fs::write(journal(scene.path()), bytes).unwrap();
        let error = Checkpoint::open(scene.path()).unwrap_err();
        assert!(matches!(error, Error::Document { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
        assert!(fs::read(journal(scene.path())).unwrap() == bytes && files(scene.path()) == before);
    };
    let foreign = fs::read(journal(other_files.path())).unwrap();
    let own = fs::read(journal(of.path())).unwrap();
    refused(&of, &foreign, "of other files than those of generation 1");
    fs::write(journal(of.path()), own).unwrap();
    let (mut checkpoint, _) = open(of.path());
    sync(&mut checkpoint, &of.two, 2);
    drop(checkpoint);
    for earlier in [1, 2] {
        let delta = fs::read(of.path().join(format!(".apollod/history/{earlier}.delta"))).unwrap();
        if earlier == 1 {
            refused(&of, &delta, "it is of generation 1 and the files are of generation 2");
        } else {
            // That of the current generation is its own journal, which the crash of a rename may leave.
            fs::write(journal(of.path()), delta).unwrap();
            assert_eq!(open(of.path()).1, Recovery::Finished { generation: 2 });
        }
    }

    let without = tempfile::tempdir().unwrap();
    make_model(without.path(), false, 0, 60);
    fs::create_dir(without.path().join(".apollod")).unwrap();
    for (bytes, reason) in [
        (&foreign[..], "generations/1.json: it is missing"),
        (b"none", "there is a journal and no document of the generation before it"),
    ] {
        fs::write(journal(without.path()), bytes).unwrap();
        let error = Checkpoint::open(without.path()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert!(journal(without.path()).exists());
    }
}

#[test]
fn a_sector_that_is_neither_old_nor_new_is_named_and_the_journal_kept() {
    for sharded in [false, true] {
        let scene = Scene::new(sharded, 70);
        scene.written();
        let (name, torn) =
            files(scene.path()).into_iter().find(|(name, _)| name.to_string_lossy().contains("model")).unwrap();
        let (shard, kept) = (scene.path().join(&name), fs::read(journal(scene.path())).unwrap());
        // In the first tensor of the file, and in the last one that is trained.
        let last = if sharded { (1, torn.len() - 1000) } else { (4, torn.len() - scene.two.bytes[5].len() - 100) };
        for (wanted, at) in [(0, 600_000), last] {
            fs::write(journal(scene.path()), &kept).unwrap();
            let mut bad = torn.clone();
            bad[at] ^= 1;
            fs::write(&shard, &bad).unwrap();
            let error = Checkpoint::open_with(scene.path(), options()).unwrap_err();
            let said = error.to_string();
            match error {
                Error::Foreign { path, tensor, offset, previous: 1, generation: 2 } => {
                    assert_eq!((path, tensor), (shard.clone(), scene.two.tensors[wanted].name.clone()));
                    assert_eq!(offset, at as u64 / 512 * 512);
                    assert!(said.contains(&format!("byte {offset} of the file")), "{said}");
                }
                other => panic!("{other}"),
            }
            assert!(fs::read(journal(scene.path())).unwrap() == kept);
            assert_eq!(fs::read(&shard).unwrap()[at], bad[at]);
            // The file of either generation is put back, as the error says.
            for back in [&torn, &scene.files[&name]] {
                fs::write(journal(scene.path()), &kept).unwrap();
                fs::write(&shard, back).unwrap();
                let (checkpoint, recovery) = open(scene.path());
                assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
                assert_files_are(&checkpoint, &scene.one);
            }
        }
    }
}

/// Generation 1 on a storage that fails on demand.
fn on_failing(scene: &Scene) -> (Arc<Failing>, Checkpoint) {
    let storage = Failing::new();
    let (checkpoint, _) = Checkpoint::open_on(storage.clone(), scene.path(), options()).unwrap();
    (storage, checkpoint)
}

#[test]
fn an_error_before_the_generation_is_published_leaves_everything_as_it_was() {
    use Operation::{Create, Read, Write};
    let shard = "model-00001-of-00002.safetensors";
    for (operation, path, errno) in [
        (Create, "state/2", ENOSPC),
        (Write, "state/2", ENOSPC),
        (Write, "state/2", EIO),
        (Create, "journal", EIO),
        (Write, "journal", ENOSPC),
        (Write, "journal", EIO),
        (Read, shard, EIO),
        // From here on all blocks are in the files.
        (Create, "sums/2", ENOSPC),
        (Write, "sums/2", EIO),
    ] {
        let scene = Scene::new(true, 80);
        let (storage, mut checkpoint) = on_failing(&scene);
        let before = tree(scene.path());
        storage.fail(operation, path, errno);
        let error = try_sync(&mut checkpoint, &scene.two, 2).unwrap_err();
        println!("{error}");
        match errno {
            ENOSPC => assert!(matches!(error, Error::Full { .. }), "{error}"),
            _ => assert!(matches!(error, Error::Io { .. }), "{error}"),
        }
        assert!(error.to_string().contains(path), "{error}");
        storage.mend();
        assert!(tree(scene.path()) == before, "{operation:?} of {path}");
        assert!(checkpoint.unusable().is_none());
        // The same handle goes on.
        assert_eq!(sync(&mut checkpoint, &scene.two, 2).generation, 2);
        assert_files_are(&checkpoint, &scene.two);
    }
}

#[test]
fn an_optimizer_state_that_cannot_be_written_stops_the_sync() {
    let scene = Scene::new(true, 90);
    let (mut checkpoint, _) = open(scene.path());
    let before = tree(scene.path());
    for given in [0, 5000] {
        let mut write = |out: &mut dyn std::io::Write| {
            out.write_all(&state_of(2)[..given])?;
            Err(no_space())
        };
        let error = checkpoint.sync(&scene.two, &mut write, progress(2), &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Full { .. }) && error.to_string().contains("state/2"), "{error}");
        assert!(tree(scene.path()) == before);
    }
    sync(&mut checkpoint, &scene.two, 2);
    assert_files_are(&checkpoint, &scene.two);
}

#[test]
fn a_failed_fsync_is_never_retried_by_the_same_handle() {
    // The folders in which names become durable too; what follows the rename to 2.json leads to generation 2.
    let before = ["state/2", "journal", ".apollod", "model-00002-of-00002.safetensors", "state", "sums/2", "sums"];
    let after = ["generations", "history"];
    for (path, generation) in before.map(|path| (path, 1)).into_iter().chain(after.map(|path| (path, 2))) {
        let scene = Scene::new(true, 100);
        let (storage, mut checkpoint) = on_failing(&scene);
        storage.fail(Operation::Sync, path, EIO);
        let error = try_sync(&mut checkpoint, &scene.two, 2).unwrap_err();
        assert!(matches!(error, Error::Interrupted { generation: 2, .. }), "{path}: {error}");
        assert!(error.to_string().contains("opened again"), "{path}: {error}");
        storage.mend();
        let left = tree(scene.path());
        let again = try_sync(&mut checkpoint, &scene.two, 2).unwrap_err();
        assert!(matches!(again, Error::Unusable { .. }), "{path}: {again}");
        assert!(matches!(checkpoint.rollback(0), Err(Error::Unusable { .. })));
        assert!(matches!(checkpoint.adopt(progress(2)), Err(Error::Unusable { .. })));
        assert!(tree(scene.path()) == left, "{path}: a handle that refuses has written");
        drop(checkpoint);
        let (checkpoint, _) = open(scene.path());
        assert_eq!(checkpoint.current().generation, generation, "{path}");
        assert_files_are(&checkpoint, if generation == 1 { &scene.one } else { &scene.two });
    }
}

#[test]
fn an_adoption_that_may_have_happened_says_that_it_was_under_way() {
    let scene = Scene::new(false, 120);
    let (storage, mut checkpoint) = on_failing(&scene);
    storage.fail(Operation::Sync, "generations", EIO);
    let error = checkpoint.adopt(progress(2)).unwrap_err();
    assert!(matches!(error, Error::Interrupted { generation: 2, .. }), "{error}");
    assert!(matches!(checkpoint.adopt(progress(2)), Err(Error::Unusable { .. })));
    drop(checkpoint);
    assert_eq!(open(scene.path()).0.current().generation, 2, "its name was there");
}

/// After an fsync that failed, a page can read as it should be and not be on the disk.
#[test]
fn recovery_writes_also_what_reads_as_old() {
    let scene = Scene::new(false, 110);
    scene.written();
    scene.put(&scene.files);
    let shard = scene.path().join("model.safetensors");
    let modified = || fs::metadata(&shard).unwrap().modified().unwrap();
    let before = modified();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (_, recovery) = open(scene.path());
    assert!(matches!(recovery, Recovery::Undone { generation: 1, .. }), "{recovery}");
    assert!(modified() > before && fs::read(&shard).unwrap() == scene.files[Path::new("model.safetensors")]);
}

/// It is not the end of a journal that was cut short, which could be removed.
#[test]
fn an_error_of_the_disk_while_a_journal_is_read_ends_the_open_and_changes_nothing() {
    for published in [false, true] {
        let scene = Scene::new(true, 130);
        match published {
            true => scene.published(),
            false => scene.journalled(),
        }
        let before = tree(scene.path());
        let storage = Failing::new();
        storage.fail(Operation::Read, "journal", EIO);
        let error = Checkpoint::open_on(storage.clone(), scene.path(), options()).unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("journal"), "{error}");
        let lock = Path::new(".apollod/lock");
        let after = tree(scene.path());
        assert!(before.iter().filter(|(name, _)| *name != lock).eq(after.iter().filter(|(name, _)| *name != lock)));
        storage.mend();
        drop(Checkpoint::open_on(storage, scene.path(), options()).unwrap());
        assert_files_are(&open(scene.path()).0, if published { &scene.two } else { &scene.one });
    }
}

/// Not only of its first: an error is neither the journal's end nor damage.
#[test]
fn an_error_of_the_disk_at_any_read_of_a_journal_ends_the_open_and_loses_nothing() {
    for published in [false, true] {
        for passes in 1.. {
            let scene = Scene::new(true, 150);
            match published {
                true => scene.published(),
                false => scene.journalled(),
            }
            let storage = Failing::new();
            storage.fail_after(passes, Operation::Read, "journal", EIO);
            match Checkpoint::open_on(storage.clone(), scene.path(), options()) {
                Ok(_) => {
                    assert!(!storage.has_failed(), "an error at read {passes} was passed over");
                    break;
                }
                Err(error) => assert!(matches!(error, Error::Io { .. }), "read {passes}: {error}"),
            }
            storage.mend();
            drop(Checkpoint::open_on(storage, scene.path(), options()).unwrap());
            assert_files_are(&open(scene.path()).0, if published { &scene.two } else { &scene.one });
        }
    }
}

/// The handle knows how many records it has begun to write, and must find as many to take back.
#[test]
fn a_journal_damaged_while_its_blocks_are_written_is_not_taken_for_undone() {
    let scene = Scene::new(true, 140);
    let storage = Failing::new();
    let small = Options { segment: 1, ..options() };
    let (mut checkpoint, _) = Checkpoint::open_on(storage.clone(), scene.path(), small).unwrap();
    storage.fail(Operation::Create, "sums/2", EIO);
    // In the first record, behind the head.
    let damage = || {
        let file = fs::OpenOptions::new().read(true).write(true).open(journal(scene.path())).unwrap();
        let mut head = [0; 4];
        file.read_exact_at(&mut head, 12).unwrap();
        file.write_all_at(b"damage", 16 + u64::from(u32::from_le_bytes(head)) + 30).unwrap();
    };
    let mut write = |out: &mut dyn std::io::Write| out.write_all(&state_of(2));
    let mut report = |_, _| {
        if files(scene.path()) != scene.files {
            damage();
        }
    };
    let error = checkpoint.sync(&scene.two, &mut write, progress(2), &mut report).unwrap_err();
    assert!(matches!(error, Error::Interrupted { generation: 2, .. }), "{error}");
    assert!(checkpoint.unusable().is_some() && journal(scene.path()).exists());
    drop(checkpoint);
    storage.mend();
    assert_stranded(scene.path());
}
