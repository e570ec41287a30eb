//! The model directory as it lies on disk: shards, their headers, and where each tensor is.
//!
//! `model.safetensors`, or the shards that `model.safetensors.index.json` names. Only headers are read
//! here. A shard with a second name (symbolic or hard link) is refused: a write in place would reach it.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use serde::Deserialize;

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::storage::Kind;

/// A longer header is refused, as safetensors does.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) file: String,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// The 8 bytes of its length and the JSON.
    pub(crate) header_bytes: u64,
    pub(crate) header_blake3: String,
}

/// One tensor of the files, or one expert's matrix in a stack of them.
#[derive(Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shard: usize,
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// All shards, and all tensors in the order of shard and offset.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) shards: Vec<Shard>,
    pub(crate) tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    /// The shard of each name as the files have it.
    in_files: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Layout {
    /// Reads the headers of all shards in `dir`.
    pub(crate) fn load(disk: &Disk, dir: &Path) -> Result<Layout> {
        let (files, index) = shard_files(disk, dir)?;
        let mut layout =
            Layout { shards: Vec::new(), tensors: Vec::new(), by_name: HashMap::new(), in_files: HashMap::new() };
        for file in files {
            layout.add_shard(disk, dir, file)?;
        }
        for (name, file) in index {
            if layout.in_files.get(&name).is_none_or(|shard| layout.shards[*shard].file != file) {
                return Err(model(dir, format!("the index says that `{name}` is in {file}, and it is not")));
            }
        }
        Ok(layout)
    }

    /// The index of a tensor by name.
    pub(crate) fn tensor(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    fn add_shard(&mut self, disk: &Disk, dir: &Path, file: String) -> Result<()> {
        let path = dir.join(&file);
        let bytes = refuse_shared(disk, &path)?;
        // A file that cannot be written is found now, not in the middle of a sync.
        disk.open_in_place(&path)?;
        let header = read_header(disk, &path, bytes)?;
        let metadata: Metadata = serde_json::from_slice(&header[8..])
            .map_err(|error| model(&path, format!("its header is no safetensors header: {error}")))?;
        if header.len() as u64 + metadata.data_len() as u64 != bytes {
            let want = header.len() + metadata.data_len();
            return Err(model(&path, format!("it has {bytes} bytes and its header describes {want}")));
        }
        let shard = self.shards.len();
        self.in_files.extend(metadata.offset_keys().into_iter().map(|name| (name, shard)));
        for tensor in tensors_of(&metadata, header.len(), shard) {
            if let Some(other) = self.by_name.insert(tensor.name.clone(), self.tensors.len()) {
                // Of one shard, or of this one.
                let other = self.shards.get(self.tensors[other].shard).map_or(&file, |shard| &shard.file);
                return Err(model(&path, format!("tensor `{}` is also in {other}", tensor.name)));
            }
            self.tensors.push(tensor);
        }
        self.shards.push(Shard {
            file,
            path,
            bytes,
            header_bytes: header.len() as u64,
            header_blake3: blake3::hash(&header).to_hex().to_string(),
        });
        Ok(())
    }
}

/// The tensors of a file in the order of their bytes, after a header of so many bytes with its length.
pub(crate) fn tensors_of(metadata: &Metadata, header_bytes: usize, shard: usize) -> Vec<Tensor> {
    let of_one = |name: String| {
        let info = metadata.info(&name).expect("the name is from the metadata");
        let (offset, bytes) = ((header_bytes + info.data_offsets.0) as u64, info.data_offsets.1 - info.data_offsets.0);
        let parts = match weight_map::unstacked(&name, &info.shape) {
            Some(parts) => parts.into_iter().map(|(name, shape)| (name, shape.to_vec())).collect(),
            None => vec![(name, info.shape.clone())],
        };
        let (dtype, bytes) = (info.dtype.to_string(), (bytes / parts.len()) as u64);
        parts.into_iter().enumerate().map(move |(i, (name, shape))| Tensor {
            name,
            shard,
            dtype: dtype.clone(),
            shape,
            offset: offset + i as u64 * bytes,
            bytes,
        })
    };
    metadata.offset_keys().into_iter().flat_map(of_one).collect()
}

fn model(path: &Path, reason: String) -> Error {
    let path = path.to_path_buf();
    Error::Model { path, reason }
}

/// The shards' names in order, and what the index says about the tensors (nothing for a single file).
fn shard_files(disk: &Disk, dir: &Path) -> Result<(Vec<String>, HashMap<String, String>)> {
    let single = "model.safetensors";
    // The order of transformers: a single file wins over an index.
    if disk.exists(&dir.join(single))? {
        return Ok((vec![single.into()], HashMap::new()));
    }
    let path = dir.join("model.safetensors.index.json");
    if !disk.exists(&path)? {
        let reason = "it holds neither model.safetensors nor model.safetensors.index.json";
        return Err(model(dir, reason.into()));
    }
    let text = disk.read(&path)?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|error| model(&path, format!("it is no safetensors index: {error}")))?;
    let files: BTreeSet<String> = index.weight_map.values().cloned().collect();
    if let Some(file) = files.iter().find(|file| !is_plain_name(file)) {
        let reason = format!("`{file}` is not the name of a file in this directory");
        return Err(model(&path, reason));
    }
    if files.is_empty() {
        return Err(model(&path, "it names no shard".into()));
    }
    Ok((files.into_iter().collect(), index.weight_map))
}

/// True if the name cannot lead out of its directory.
pub(crate) fn is_plain_name(file: &str) -> bool {
    !file.is_empty() && file != "." && file != ".." && !file.contains(['/', '\0'])
}

/// The length of a file that is nobody else's.
fn refuse_shared(disk: &Disk, path: &Path) -> Result<u64> {
    let Some(stat) = disk.stat(path)? else {
        return Err(model(path, "it is not there".into()));
    };
    let path = path.to_path_buf();
    match stat.kind {
        Kind::Symlink => Err(Error::Symlink { path }),
        Kind::File if stat.links == 1 => Ok(stat.bytes),
        Kind::File => Err(Error::HardLink { path, links: stat.links }),
        Kind::Dir | Kind::Other => Err(model(&path, "it is not a regular file".into())),
    }
}

/// The length and the JSON, as they lie in the file.
pub(crate) fn read_header(disk: &Disk, path: &Path, bytes: u64) -> Result<Vec<u8>> {
    let file = disk.open(path)?;
    let mut header = vec![0; 8];
    if bytes < 8 {
        return Err(model(path, "it is shorter than a safetensors header".into()));
    }
    file.read_at(&mut header, 0)?;
    let n = u64::from_le_bytes(header[..8].try_into().expect("8 bytes"));
    if n > HEADER_BYTES_MAX || n > bytes - 8 {
        return Err(model(path, format!("it says that its header has {n} bytes, which cannot be")));
    }
    header.resize(8 + n as usize, 0);
    file.read_at(&mut header[8..], 8)?;
    Ok(header)
}
