//! A small model with everything that is awkward: tensors that share a sector, that cross chunks, that
//! have odd lengths, 16-bit and 32-bit and other elements, one shard or two, aligned or not.
#![allow(dead_code)] // each test file uses a part of this

pub mod failing;
mod stopping;

#[allow(unused_imports)] // each test file uses a part of this
pub use stopping::Stopping;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Progress, SyncReport};

/// splitmix64, seeded, so that a failing test can be run again.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Weights in memory.
#[derive(Clone)]
pub struct Live {
    pub tensors: Vec<LiveTensor>,
    pub bytes: Vec<Vec<u8>>,
}

impl LiveWeights for Live {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }

    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes[tensor][at..at + buf.len()]);
    }
}

impl Live {
    /// Moves elements of every trained tensor by a few ulps; about one in `rarity`.
    pub fn train(&mut self, rng: &mut Rng, rarity: usize) {
        for (tensor, bytes) in self.tensors.iter().zip(&mut self.bytes) {
            let width = match tensor.dtype.as_str() {
                "BF16" | "F16" => 2,
                "F32" => 4,
                _ => continue,
            };
            for element in bytes.chunks_exact_mut(width) {
                if rng.below(rarity) == 0 {
                    let low = u16::from_le_bytes([element[0], element[1]]);
                    let moved = low.wrapping_add((rng.below(7) as u16).wrapping_sub(3));
                    element[..2].copy_from_slice(&moved.to_le_bytes());
                }
            }
        }
    }

    pub fn index(&self, name: &str) -> usize {
        self.tensors.iter().position(|t| t.name == name).unwrap()
    }
}

/// (name, dtype, shape); large tensors cross chunks of 1 MiB.
pub const TENSORS: [(&str, &str, &[usize]); 6] = [
    ("model.embed_tokens.weight", "BF16", &[611, 1024]),
    ("model.layers.0.mlp.up_proj.weight", "BF16", &[257, 100]),
    ("model.norm.weight", "BF16", &[77]),
    ("model.layers.0.linear_attn.A_log", "F32", &[33, 9]),
    ("model.layers.0.router.weight", "F16", &[513]),
    ("lookup", "U8", &[5001]),
];

/// Makes `dir` a model of one shard or of two; `pad` is spaces after the header, to misalign it.
pub fn make_model(dir: &Path, sharded: bool, pad: usize, seed: u64) -> Live {
    fs::create_dir_all(dir).unwrap();
    let mut rng = Rng(seed);
    let mut live = Live { tensors: Vec::new(), bytes: Vec::new() };
    for (name, dtype, shape) in TENSORS {
        let width = match dtype {
            "U8" => 1,
            "F32" => 4,
            _ => 2,
        };
        let n = shape.iter().product::<usize>() * width;
        live.tensors.push(LiveTensor {
            name: name.into(),
            dtype: dtype.into(),
            shape: shape.to_vec(),
            bytes: n as u64,
        });
        live.bytes.push((0..n).map(|_| rng.next() as u8).collect());
    }
    fs::write(dir.join("config.json"), "{}\n").unwrap();
    if sharded {
        let (a, b) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        write_shard(&dir.join(a), &live, 0..2, pad);
        write_shard(&dir.join(b), &live, 2..6, pad);
        let map: Vec<String> =
            (0..6).map(|i| format!("\"{}\": \"{}\"", TENSORS[i].0, if i < 2 { a } else { b })).collect();
        let index = format!("{{\"metadata\": {{}}, \"weight_map\": {{{}}}}}", map.join(","));
        fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    } else {
        write_shard(&dir.join("model.safetensors"), &live, 0..6, pad);
    }
    live
}

fn write_shard(path: &Path, live: &Live, which: std::ops::Range<usize>, pad: usize) {
    let mut at = 0;
    let mut entries = Vec::new();
    for i in which.clone() {
        let (tensor, end) = (&live.tensors[i], at + live.bytes[i].len());
        entries.push(format!(
            "\"{}\":{{\"dtype\":\"{}\",\"shape\":{:?},\"data_offsets\":[{at},{end}]}}",
            tensor.name, tensor.dtype, tensor.shape
        ));
        at = end;
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    header.push_str(&" ".repeat(pad));
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for i in which {
        file.write_all(&live.bytes[i]).unwrap();
    }
}

/// All files of a model directory but `.apollod`.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            all.insert(path.file_name().unwrap().into(), fs::read(&path).unwrap());
        }
    }
    all
}

/// Everything below a folder, by relative path.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_path_buf();
                all.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    all
}

/// Copies everything below a folder.
pub fn copy_tree(from: &Path, to: &Path) {
    for (name, bytes) in tree(from) {
        let path = to.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

pub fn progress(cursor: u64) -> Progress {
    Progress {
        cursor,
        step: cursor,
        examples: cursor,
        loss: Some(1.0 / (cursor + 3) as f32),
        weight_version: cursor * 2,
        epoch: "3f9c".into(),
    }
}

/// The optimizer state of a cursor.
pub fn state_of(cursor: u64) -> Vec<u8> {
    let mut rng = Rng(cursor);
    (0..10_007).map(|_| rng.next() as u8).collect()
}

pub fn try_sync(checkpoint: &mut Checkpoint, live: &Live, cursor: u64) -> checkpoint::Result<SyncReport> {
    let state = state_of(cursor);
    let mut write = |out: &mut dyn Write| out.write_all(&state);
    checkpoint.sync(live, &mut write, progress(cursor), &mut |_, _| {})
}

pub fn sync(checkpoint: &mut Checkpoint, live: &Live, cursor: u64) -> SyncReport {
    try_sync(checkpoint, live, cursor).unwrap()
}

pub fn read_state(checkpoint: &Checkpoint) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut state = checkpoint.state().unwrap()?;
    state.read_to_end(&mut bytes).unwrap();
    Some(bytes)
}

/// Fails unless the files hold exactly these weights.
pub fn assert_files_are(checkpoint: &Checkpoint, live: &Live) {
    for (tensor, bytes) in live.tensors.iter().zip(&live.bytes) {
        let mut read = vec![0; bytes.len()];
        checkpoint.read_tensor(&tensor.name, 0, &mut read).unwrap();
        assert!(&read == bytes, "{} differs", tensor.name);
    }
    let report = checkpoint.verify().unwrap();
    assert!(report.is_ok(), "{report}");
}

/// An error for a writer that must fail.
pub fn no_space() -> io::Error {
    io::Error::from_raw_os_error(28)
}
