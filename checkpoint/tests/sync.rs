//! What a sync writes, keeps and reports.

mod common;

use std::path::Path;
use std::time::Duration;

use checkpoint::{Checkpoint, Keep, Options, Recovery};
use common::*;

#[test]
fn live_weights_state_and_progress_come_back_after_a_sync() {
    for (sharded, pad) in [(false, 0), (true, 0), (false, 3), (true, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let mut live = make_model(dir.path(), sharded, pad, 1);
        let (mut checkpoint, recovery) = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(recovery, Recovery::Created);
        assert!(checkpoint.state().unwrap().is_none());
        let mut rng = Rng(2);
        for cursor in 1..=3 {
            live.train(&mut rng, 3);
            let report = sync(&mut checkpoint, &live, cursor);
            assert_eq!(report.generation, cursor);
            assert!(report.blocks_changed > 0 && report.bytes_written > 0);
        }
        drop(checkpoint);
        let (checkpoint, recovery) = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(recovery, Recovery::Clean { generation: 3 });
        assert_files_are(&checkpoint, &live);
        assert_eq!(checkpoint.current().progress, progress(3));
        assert_eq!(read_state(&checkpoint).unwrap(), state_of(3));
        // As it is documented: BLAKE3 of the BLAKE3 of the tensor's bytes in every 16 KiB of the file.
        let first = checkpoint.current().tensors.iter().find(|t| t.name == live.tensors[0].name).unwrap();
        let (head, tail) = live.bytes[0].split_at((16384 - first.offset as usize % 16384) % 16384);
        let blocks = [head].into_iter().chain(tail.chunks(16384)).filter(|block| !block.is_empty());
        let sums: Vec<u8> = blocks.flat_map(|block| *blake3::hash(block).as_bytes()).collect();
        let sum = blake3::hash(&sums).to_hex().to_string();
        let name = &live.tensors[0].name;
        let tensors = &checkpoint.current().tensors;
        assert_eq!(tensors.iter().find(|t| &t.name == name).unwrap().blake3, sum);
    }
}

#[test]
fn only_blocks_that_differ_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 3);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();

    let before = tree(dir.path());
    let nothing = sync(&mut checkpoint, &live, 1);
    assert_eq!((nothing.blocks_changed, nothing.bytes_written), (0, 0));
    let after = tree(dir.path());
    let shard = std::path::Path::new("model.safetensors");
    assert!(before[shard] == after[shard]);

    // One byte in the middle of a large tensor: one block of 4096 bytes.
    live.bytes[0][300_000] ^= 1;
    let one = sync(&mut checkpoint, &live, 2);
    assert_eq!((one.blocks_changed, one.bytes_written), (1, 4096));
    assert!(one.bytes_journal < 8192, "{one}");
    // What is left of the delta are the frame of the generation, and the total checksum.
    let bytes = |path: &str| std::fs::metadata(dir.path().join(".apollod").join(path)).unwrap().len();
    assert_eq!(bytes("history/2.delta"), one.bytes_journal + 16 + bytes("generations/2.json") + 32);

    // The norm is smaller than a block: only its own bytes are written.
    let norm = live.index("model.norm.weight");
    live.bytes[norm][0] ^= 1;
    let small = sync(&mut checkpoint, &live, 3);
    assert!((1..=154).contains(&small.bytes_written), "{small}");
    assert_files_are(&checkpoint, &live);
}

#[test]
fn tensors_that_are_not_live_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let all = make_model(dir.path(), true, 0, 4);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    let mut some = Live { tensors: all.tensors[2..4].to_vec(), bytes: all.bytes[2..4].to_vec() };
    some.train(&mut Rng(5), 2);
    sync(&mut checkpoint, &some, 1);
    let mut want = all;
    want.bytes[2..4].clone_from_slice(&some.bytes);
    assert_files_are(&checkpoint, &want);
}

#[test]
fn progress_is_reported_from_nothing_to_all() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 6);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    live.train(&mut Rng(7), 2);
    let mut seen = Vec::new();
    checkpoint
        .sync(&live, &mut |_| Ok(()), progress(1), &mut |done, total| {
            seen.push((done, total));
        })
        .unwrap();
    let total = live.bytes.iter().map(|b| b.len() as u64).sum::<u64>();
    assert!(seen.is_sorted(), "{seen:?}");
    assert!(seen.len() > 2 && seen.iter().all(|(_, of)| *of == total));
    assert_eq!(seen.last(), Some(&(total, total)));
}

#[test]
fn a_trained_matrix_takes_a_fraction_of_its_bytes_in_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 8);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    // Seven differences, equally likely, in every second element: 0.5·log2(7) + 1 bits of 16 = 0.15.
    live.train(&mut Rng(9), 2);
    let report = sync(&mut checkpoint, &live, 1);
    let ratio = report.bytes_journal as f64 / report.bytes_written as f64;
    println!("{report}; ratio {ratio:.3}");
    assert!((0.10..0.25).contains(&ratio), "{ratio}");
}

#[test]
fn generations_further_back_than_kept_are_listed_and_not_restorable() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 10);
    let keep = Options { keep: Keep { generations: 2, ..Keep::default() }, ..Options::default() };
    let (mut checkpoint, _) = Checkpoint::open_with(dir.path(), keep).unwrap();
    let mut rng = Rng(11);
    for cursor in 1..=5 {
        live.train(&mut rng, 9);
        sync(&mut checkpoint, &live, cursor);
    }
    // Each is told once, by whoever removed what led back to it.
    assert_eq!(checkpoint.take_pruned(), [0, 1, 2]);
    assert!(checkpoint.take_pruned().is_empty());
    let listed = checkpoint::list(dir.path()).unwrap();
    let restorable: Vec<bool> = listed.iter().map(|g| g.restorable).collect();
    assert_eq!(restorable, [false, false, false, true, true, true]);
    assert!(listed[2].tensors.is_empty() && listed[2].progress == progress(2));
    assert!(listed[1].to_string().contains("not restorable"), "{}", listed[1]);
    let names: Vec<String> = tree(&dir.path().join(".apollod"))
        .keys()
        .map(|name| name.display().to_string())
        .filter(|name| !name.starts_with("generations"))
        .collect();
    let want = ["history/4.delta", "history/5.delta", "lock", "readers"];
    assert_eq!(names, [&want[..], &["state/3", "state/4", "state/5", "sums/5"]].concat());
    let error = checkpoint.rollback(2).unwrap_err().to_string();
    assert!(error.contains("[3, 4, 5]"), "{error}");
}

fn restorable(dir: &Path) -> Vec<u64> {
    let listed = checkpoint::list(dir).unwrap();
    listed.iter().filter(|g| g.restorable).map(|g| g.generation).collect()
}

#[test]
fn who_knows_no_bounds_removes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let live = make_model(dir.path(), false, 0, 17);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    for cursor in 1..=9 {
        sync(&mut checkpoint, &live, cursor);
    }
    drop(checkpoint);
    drop(Checkpoint::open(dir.path()).unwrap());
    assert_eq!(restorable(dir.path()), Vec::from_iter(0..=9));
}

#[test]
fn history_is_bounded_by_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 12);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    let mut rng = Rng(13);
    for cursor in 1..=4 {
        live.train(&mut rng, 9);
        sync(&mut checkpoint, &live, cursor);
    }
    assert_eq!(restorable(dir.path()), [0, 1, 2, 3, 4]);
    drop(checkpoint);
    let file = |name: &str| std::fs::metadata(dir.path().join(".apollod").join(name)).unwrap().len();
    // To go back to 2 takes the deltas of 4 and 3 and the state of 2; that of 3 is there to go back to 3.
    let bytes = ["history/4.delta", "history/3.delta", "state/3", "state/2"].map(file).iter().sum();
    let open = |bytes: u64| {
        let keep = Options { keep: Keep { bytes, ..Keep::default() }, ..Options::default() };
        let pruned = Checkpoint::open_with(dir.path(), keep).unwrap().0.take_pruned();
        (restorable(dir.path()), pruned)
    };
    assert_eq!(open(bytes), (vec![2, 3, 4], vec![0, 1]));
    assert_eq!(open(bytes - 1), (vec![3, 4], vec![2]));
    assert_eq!(open(0), (vec![3, 4], vec![]), "the last sync can be taken back");
}

#[test]
fn history_is_bounded_by_its_age_at_syncs_and_two_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), false, 0, 14);
    let keep = Keep { generations: 9, age: Duration::from_secs(1), ..Keep::default() };
    let options = Options { keep, ..Options::default() };
    let (mut checkpoint, _) = Checkpoint::open_with(dir.path(), options.clone()).unwrap();
    for cursor in 1..=3 {
        live.train(&mut Rng(15), 9);
        sync(&mut checkpoint, &live, cursor);
    }
    std::thread::sleep(Duration::from_millis(2100));
    live.train(&mut Rng(16), 9);
    sync(&mut checkpoint, &live, 4);
    assert_eq!(restorable(dir.path()), [2, 3, 4]);
    drop(checkpoint);
    let (mut checkpoint, _) = Checkpoint::open_with(dir.path(), options).unwrap();
    assert_eq!(restorable(dir.path()), [2, 3, 4], "an open removes nothing for its age");
    sync(&mut checkpoint, &live, 5);
    assert_eq!(restorable(dir.path()), [4, 5]);
}
