//! What is refused, and with which words.

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use checkpoint::{Checkpoint, Error};
use common::*;

#[test]
fn a_second_opener_is_refused_and_told_who_holds_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path(), false, 0, 1);
    let (first, _) = Checkpoint::open(dir.path()).unwrap();
    match Checkpoint::open(dir.path()).unwrap_err() {
        Error::Locked { pid, .. } => assert_eq!(pid, std::process::id().to_string()),
        other => panic!("{other}"),
    }
    drop(first);
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn a_linked_shard_is_refused_with_the_way_out_and_export_is_that_way() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (dir.path().join("blobs"), dir.path().join("snapshot"));
    let mut live = make_model(&blobs, false, 0, 2);
    fs::create_dir(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        symlink(blobs.join(name), snapshot.join(name)).unwrap();
    }
    let error = Checkpoint::open(&snapshot).unwrap_err();
    assert!(matches!(error, Error::Symlink { .. }), "{error}");
    assert!(error.to_string().contains("cp -rL"), "{error}");
    assert!(!snapshot.join(".apollod").exists());

    let real = dir.path().join("real");
    let report = checkpoint::export(&snapshot, &real).unwrap();
    assert_eq!((report.generation, report.files), (None, 2));
    let (mut checkpoint, _) = Checkpoint::open(&real).unwrap();
    let blob = files(&blobs);
    live.train(&mut Rng(3), 2);
    sync(&mut checkpoint, &live, 1);
    assert!(files(&blobs) == blob);

    let hard = dir.path().join("hard");
    fs::create_dir(&hard).unwrap();
    fs::hard_link(blobs.join("model.safetensors"), hard.join("model.safetensors")).unwrap();
    let error = Checkpoint::open(&hard).unwrap_err();
    assert!(matches!(error, Error::HardLink { links: 2, .. }), "{error}");
}

#[test]
fn a_live_tensor_that_does_not_fit_the_files_is_named_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let good = make_model(dir.path(), false, 0, 4);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    let before = tree(dir.path());
    let change = |change: &dyn Fn(&mut Live)| {
        let mut live = good.clone();
        live.train(&mut Rng(5), 2);
        change(&mut live);
        live
    };
    let missing = change(&|live| live.tensors[1].name = "model.layers.9.q".into());
    let shape = change(&|live| live.tensors[1].shape = vec![100, 257]);
    let dtype = change(&|live| live.tensors[1].dtype = "F16".into());
    let length = change(&|live| live.tensors[1].bytes += 2);
    let twice = change(&|live| live.tensors[1] = live.tensors[0].clone());
    for (live, tensor, reason) in [
        (missing, "model.layers.9.q", "not in the files"),
        (shape, "up_proj.weight", "[100, 257] live and BF16 [257, 100]"),
        (dtype, "up_proj.weight", "F16 [257, 100] live"),
        (length, "up_proj.weight", "51402 bytes live and 51400"),
        (twice, "embed_tokens.weight", "live twice"),
    ] {
        let error = try_sync(&mut checkpoint, &live, 1).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains(reason), "{error}");
        assert!(tree(dir.path()) == before);
    }
}

#[test]
fn a_flipped_bit_anywhere_in_the_files_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make_model(dir.path(), true, 0, 6);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    live.train(&mut Rng(7), 3);
    sync(&mut checkpoint, &live, 1);
    let current = checkpoint.current().clone();
    assert!(checkpoint::verify(dir.path()).unwrap().is_ok());
    let mut rng = Rng(8);
    println!("seed 8");
    for i in 0..60 {
        let shard = &current.shards[i % 2];
        let path = dir.path().join(&shard.file);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        // Every tenth flip in the header, which is short.
        let end = if i % 10 < 2 { shard.header_bytes } else { shard.bytes };
        let bit = rng.below(end as usize * 8);
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).unwrap();
        let report = checkpoint::verify(dir.path()).unwrap();
        let at = bit as u64 / 8;
        let hit = current.tensors.iter().find(|t| t.shard == i % 2 && (t.offset..t.offset + t.bytes).contains(&at));
        let want = match hit {
            None => format!("{}: its header is damaged", shard.file),
            Some(t) => format!(
                "{}: tensor `{}` is damaged in 1 of its 16 KiB blocks, the first at its bytes {}..{}",
                shard.file,
                t.name,
                (at / 16384 * 16384).max(t.offset) - t.offset,
                ((at / 16384 + 1) * 16384).min(t.offset + t.bytes) - t.offset,
            ),
        };
        let damage: Vec<String> = report.damage.iter().map(|d| d.to_string()).collect();
        assert_eq!(damage, [want], "bit {bit} of {}", shard.file);
        fs::write(&path, &good).unwrap();
    }
}

#[test]
fn files_that_were_replaced_are_refused_at_open_and_at_sync() {
    let dir = tempfile::tempdir().unwrap();
    let live = make_model(dir.path(), false, 0, 9);
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    make_model(dir.path(), false, 8, 9);
    let error = try_sync(&mut checkpoint, &live, 1).unwrap_err();
    assert!(matches!(error, Error::Replaced { generation: 0, .. }), "{error}");
    drop(checkpoint);
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Replaced { .. }), "{error}");
    let report = checkpoint::verify(dir.path()).unwrap();
    assert!(!report.is_ok());
}

#[test]
fn a_header_of_the_same_length_that_is_another_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    make_model(dir.path(), false, 8, 9);
    drop(Checkpoint::open(dir.path()).unwrap());
    let shard = dir.path().join("model.safetensors");
    let good = fs::read(&shard).unwrap();
    // Its last byte: of the same meaning, and yet not the file that was recorded.
    let mut other = good.clone();
    let last = 8 + u64::from_le_bytes(*good.first_chunk().unwrap()) as usize - 1;
    assert_eq!(good[last], b' ');
    other[last] = b'\n';
    fs::write(&shard, other).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Replaced { generation: 0, .. }), "{error}");
    assert!(error.to_string().contains("its header is another one"), "{error}");
    fs::write(&shard, good).unwrap();
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn an_index_cannot_lead_out_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let index = r#"{"weight_map": {"a": "../other.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("`../other.safetensors` is not the name"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    let error = Checkpoint::open(empty.path()).unwrap_err().to_string();
    assert!(error.contains("holds neither"), "{error}");
}

#[test]
fn a_tensor_is_read_by_name_and_never_past_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let live = make_model(dir.path(), true, 0, 10);
    let (checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    let norm = live.index("model.norm.weight");
    let mut buf = [0; 4];
    checkpoint.read_tensor("model.norm.weight", 150, &mut buf).unwrap();
    assert_eq!(buf, live.bytes[norm][150..154]);
    assert!(checkpoint.read_tensor("model.norm.weight", 151, &mut buf).is_err());
    assert!(checkpoint.read_tensor("model.norm", 0, &mut buf).is_err());
}
