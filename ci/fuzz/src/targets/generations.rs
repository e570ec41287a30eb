//! What a sync left in a model directory and a disk may have changed since: documents, sums, states, deltas, a journal.
//!
//! The input replaces one file: the first byte says which and, by its highest bit, whether checksums are made to fit
//! ([`with_seal`], [`with_sums`]), so that what lies behind them is reached too. With a journal the files of the model are
//! those from before it or, by the bit below, those from after it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::OnceLock;

use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Progress};

use super::{framed, with_folder, write};
use crate::Target;

const MODEL: &str = "model.safetensors";
const HEADER: &[u8] = b"{\"a\":{\"dtype\":\"BF16\",\"shape\":[64,70],\"data_offsets\":[0,8960]},\
    \"b\":{\"dtype\":\"F32\",\"shape\":[128],\"data_offsets\":[8960,9472]}}\0";
const FIT: u8 = 0x80;
const AFTER: u8 = 0x40;
const AFTER_SEAL: &[u8] = b"\"\n}";
const SEAL_LEN: usize = 64;
const MAGIC_LEN: usize = 8;

/// Everything below `.apollod`, and the model's file.
pub const GENERATIONS: Target = Target {
    name: "generations",
    accepts: |input| {
        let made = made();
        let Some((&how, content)) = input.split_first() else { return false };
        let names = names(made);
        let name = names[usize::from(how & !(FIT | AFTER)) % names.len()];
        let content = match (how & FIT != 0, name) {
            (false, _) => content.to_vec(),
            (true, name) if name.ends_with(".json") => with_seal(content),
            (true, name) if name == JOURNAL || name.ends_with(".delta") => with_sums(content),
            (true, _) => return false,
        };
        with_folder(|folder| {
            let mut files = made.files.clone();
            let model = usize::from(name != JOURNAL || how & AFTER != 0);
            files.insert(MODEL.into(), made.models[1 + model].clone());
            if name == JOURNAL {
                files.remove(".apollod/generations/2.json");
                files.remove(DELTA);
            }
            files.insert(name.into(), content);
            for (name, bytes) in &files {
                std::fs::create_dir_all(folder.join(name).parent().expect("a folder"))
                    .expect("a temporary folder can be made");
                write(folder, name, bytes);
            }
            open(folder, made, how & FIT == 0)
        })
    },
    seeds: || {
        let made = made();
        let mut seeds = Vec::new();
        for (number, name) in names(made).iter().enumerate() {
            let number = u8::try_from(number).expect("few files");
            let bytes = if *name == JOURNAL { &made.files[DELTA] } else { &made.files[*name] };
            seeds.push([&[number], &bytes[..]].concat());
            if name.ends_with(".json") {
                let document = &bytes[..bytes.len() - SEAL_LEN - AFTER_SEAL.len()];
                assert!(with_seal(document) == *bytes, "another seal than this crate's");
                seeds.push([&[number | FIT], document].concat());
            } else if *name == JOURNAL || name.ends_with(".delta") {
                let frames = without_sums(bytes);
                assert!(with_sums(&frames) == *bytes, "other sums than this crate's");
                seeds.push([&[number | FIT], &frames[..]].concat());
                seeds.push([&[number | FIT | AFTER], &frames[..]].concat());
            }
        }
        seeds
    },
    words: &["HEAD", "RECD", "GENR", "\"generation\": ", "\"previous\": ", "\"tensors\": [", "\"bytes\": ", "null"],
};

const JOURNAL: &str = ".apollod/journal";
const DELTA: &str = ".apollod/history/2.delta";

/// A directory after two syncs.
struct Made {
    files: BTreeMap<String, Vec<u8>>,
    /// The model's file in generations 0, 1 and 2.
    models: Vec<Vec<u8>>,
}

fn made() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| with_folder(|folder| make(folder).expect("a model directory can be made")))
}

/// The files that an input can replace, in a fixed order.
fn names(made: &Made) -> Vec<&str> {
    let below = made.files.keys().map(String::as_str).filter(|name| name.starts_with(".apollod/"));
    below.filter(|name| *name != ".apollod/lock").chain([JOURNAL]).collect()
}

fn make(folder: &Path) -> checkpoint::Result<Made> {
    let data: Vec<u8> = (0..9472).map(|i| (i * 7 % 251) as u8).collect();
    let mut models = vec![framed(&[], &[HEADER, &data].concat())];
    write(folder, MODEL, &models[0]);
    let (mut open, _) = Checkpoint::open(folder)?;
    for step in 1..=2 {
        let progress = Progress { cursor: step, step, examples: step, epoch: "e".into(), ..Progress::default() };
        let mut state = |out: &mut dyn io::Write| out.write_all(&[step as u8; 100]);
        open.sync(&Live::after(&data, step), &mut state, progress, &mut |_, _| {})?;
        models.push(std::fs::read(folder.join(MODEL)).expect("it was just written"));
    }
    drop(open);
    let mut files = BTreeMap::new();
    collect(folder, folder, &mut files);
    Ok(Made { files, models })
}

fn collect(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).expect("it was just made").flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            let name = path.strip_prefix(root).expect("it is below").to_str().expect("plain names").to_owned();
            files.insert(name, std::fs::read(&path).expect("it was just written"));
        }
    }
}

/// Recovers. Returns whether that is possible. Damage that no checksum was made to fit may be refused, but what is opened
/// is a whole generation, and one that there was.
fn open(folder: &Path, made: &Made, judged: bool) -> bool {
    let _ = checkpoint::list(folder);
    // Beside a journal it waits for the sync that would end it.
    if !folder.join(JOURNAL).exists() {
        let _ = checkpoint::verify(folder);
    }
    let Ok((mut open, _)) = Checkpoint::open(folder) else { return false };
    let _ = open.verify();
    let _ = open.state().map(|state| state.map(|mut state| io::copy(&mut state, &mut io::sink())));
    if judged {
        let now = std::fs::read(folder.join(MODEL)).expect("it is there");
        let number = open.current().generation;
        assert!(made.models.get(number as usize) == Some(&now), "the model's file is not that of generation {number}");
    }
    let _ = open.rollback(0);
    true
}

/// A document that ends where its seal begins, sealed.
fn with_seal(document: &[u8]) -> Vec<u8> {
    let seal = blake3::hash(&[document, AFTER_SEAL].concat()).to_hex();
    [document, seal.as_bytes(), AFTER_SEAL].concat()
}

/// The frames of a journal, each with its sum, and the total over these: what [`without_sums`] took away.
fn with_sums(frames: &[u8]) -> Vec<u8> {
    let (magic, mut rest) = frames.split_at(frames.len().min(MAGIC_LEN));
    let (mut out, mut total) = (magic.to_vec(), blake3::Hasher::new());
    while let Some((head, body)) = rest.split_first_chunk::<8>() {
        let wanted = u32::from_le_bytes(*head.last_chunk().expect("4 of 8 bytes")) as usize;
        let (body, later) = body.split_at(wanted.min(body.len()));
        let frame = [&head[..4], &(body.len() as u32).to_le_bytes(), body].concat();
        let sum = twox_hash::XxHash3_64::oneshot(&frame).to_le_bytes();
        out.extend(&frame);
        out.extend(sum);
        total.update(&sum);
        rest = later;
    }
    out.extend(total.finalize().as_bytes());
    out
}

fn without_sums(journal: &[u8]) -> Vec<u8> {
    let (magic, mut rest) = journal[..journal.len() - 32].split_at(MAGIC_LEN);
    let mut out = magic.to_vec();
    while let Some(head) = rest.first_chunk::<8>() {
        let n = u32::from_le_bytes(*head.last_chunk().expect("4 of 8 bytes")) as usize;
        out.extend(&rest[..8 + n]);
        rest = &rest[8 + n + 8..];
    }
    out
}

/// Live weights some steps after the base.
struct Live {
    tensors: Vec<LiveTensor>,
    data: Vec<u8>,
}

impl Live {
    fn after(base: &[u8], steps: u64) -> Live {
        let tensor = |name: &str, dtype: &str, shape: &[usize], bytes| LiveTensor {
            name: name.into(),
            dtype: dtype.into(),
            shape: shape.into(),
            bytes,
        };
        let moved = |(at, byte): (usize, &u8)| if at % 3 == 0 { byte.wrapping_add(steps as u8) } else { *byte };
        Live {
            tensors: vec![tensor("a", "BF16", &[64, 70], 8960), tensor("b", "F32", &[128], 512)],
            data: base.iter().enumerate().map(moved).collect(),
        }
    }
}

impl LiveWeights for Live {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }

    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        let at = offset as usize + if tensor == 0 { 0 } else { 8960 };
        buf.copy_from_slice(&self.data[at..at + buf.len()]);
    }
}
