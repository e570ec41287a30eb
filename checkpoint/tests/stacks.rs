//! Experts whose matrices the files stack: each is a tensor of its own to whoever trains, saves, verifies and repairs.

mod common;

use std::fs;
use std::path::Path;

use checkpoint::{Checkpoint, LiveTensor, Sources, repair, verify};
use common::*;

const EXPERTS: usize = 3;
const MODULE: &str = "model.layers.0.mlp.experts";

/// A model in two shards whose stacks lie in the second, and its weights by expert.
fn make(dir: &Path) -> Live {
    let mut rng = Rng(5);
    let mut live = Live { tensors: Vec::new(), bytes: Vec::new() };
    let mut add = |name: String, shape: &[usize]| {
        let bytes: Vec<u8> = (0..2 * shape.iter().product::<usize>()).map(|_| rng.next() as u8).collect();
        live.tensors.push(LiveTensor { name, dtype: "BF16".into(), shape: shape.to_vec(), bytes: bytes.len() as u64 });
        live.bytes.push(bytes);
    };
    add("model.norm.weight".into(), &[77]);
    for expert in 0..EXPERTS {
        add(format!("{MODULE}.{expert}.gate_proj.weight"), &[17, 95]);
        add(format!("{MODULE}.{expert}.up_proj.weight"), &[17, 95]);
    }
    for expert in 0..EXPERTS {
        add(format!("{MODULE}.{expert}.down_proj.weight"), &[95, 17]);
    }
    fs::create_dir_all(dir).unwrap();
    let bytes = live.bytes.concat();
    let (norm, half) = (2 * 77, 2 * EXPERTS * 2 * 17 * 95);
    let entry = |name: &str, shape: &[usize], range: std::ops::Range<usize>| {
        format!(
            "\"{name}\":{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{},{}]}}",
            range.start, range.end
        )
    };
    let file = |name: &str, entries: &[String], data: &[u8]| {
        let mut header = format!("{{{}}}", entries.join(","));
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        let whole = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
        fs::write(dir.join(name), whole).unwrap();
    };
    let [a, b] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (gate_up, down) = (format!("{MODULE}.gate_up_proj"), format!("{MODULE}.down_proj"));
    file(a, &[entry("model.norm.weight", &[77], 0..norm)], &bytes[..norm]);
    let stacks =
        [entry(&gate_up, &[EXPERTS, 2 * 17, 95], 0..half), entry(&down, &[EXPERTS, 95, 17], half..bytes.len() - norm)];
    file(b, &stacks, &bytes[norm..]);
    let index =
        [("model.norm.weight", a), (&gate_up, b), (&down, b)].map(|(name, file)| format!("\"{name}\":\"{file}\""));
    fs::write(dir.join("model.safetensors.index.json"), format!("{{\"weight_map\":{{{}}}}}", index.join(","))).unwrap();
    live
}

#[test]
fn experts_are_saved_into_their_stacks() {
    let dir = tempfile::tempdir().unwrap();
    let mut live = make(dir.path());
    let before = files(dir.path());
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    for cursor in 1..4 {
        live.train(&mut Rng(cursor), 9);
        sync(&mut checkpoint, &live, cursor);
        assert_files_are(&checkpoint, &live);
    }
    // The headers are as they were, and the data are the tensors one after the other.
    let after = files(dir.path());
    let stacks = Path::new("model-00002-of-00002.safetensors");
    let data = live.bytes[1..].concat();
    let header = after[stacks].len() - data.len();
    assert_eq!(after[stacks][..header], before[stacks][..header]);
    assert_eq!(after[stacks][header..], data);
}

#[test]
fn a_flipped_bit_in_a_stack_is_named_by_its_expert_and_put_right_from_a_copy() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut live = make(dir.path());
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    live.train(&mut Rng(1), 9);
    sync(&mut checkpoint, &live, 1);
    drop(checkpoint);
    copy_tree(dir.path(), other.path());
    let path = dir.path().join("model-00002-of-00002.safetensors");
    let good = fs::read(&path).unwrap();
    let header = good.len() - live.bytes[1..].concat().len();
    for (i, expert) in live.tensors[1..].iter().enumerate() {
        let start = header + live.bytes[1..][..i].concat().len();
        let mut bad = good.clone();
        // More than one bit, which a repair would find by itself.
        bad[start + 1000..start + 1003].iter_mut().for_each(|byte| *byte ^= 0x55);
        fs::write(&path, &bad).unwrap();
        let said = verify(dir.path()).unwrap().to_string();
        assert!(said.contains(&expert.name), "{}: {said}", expert.name);
        let copies = [other.path().to_path_buf()];
        repair(dir.path(), &Sources { copies: &copies, ..Default::default() }).unwrap();
        assert!(fs::read(&path).unwrap() == good, "{}", expert.name);
    }
}
