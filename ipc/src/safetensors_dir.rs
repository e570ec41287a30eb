//! The safetensors files of a model directory: which tensor lies where in which file.
//!
//! A file is 8 bytes of header length n (little endian), n bytes of JSON, then the data that the JSON's
//! `data_offsets` cut up without holes. Only headers are read here; [`SafetensorsDir::bytes`] maps a file
//! read-only when it is first asked for. The header is parsed by hand rather than by the `safetensors`
//! crate because a refusal must name the tensor and its type (the crate knows neither duplicates nor types
//! that are newer than it is), and because its check of the total length can overflow.

use crate::Error;
use crate::process::FileSet;
use memmap2::Mmap;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use weight_map::{Dtype, ServerTensor, UnknownDtype, unstacked};

/// The name of an unsharded model's file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The name of the index of a sharded model.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Longest header that is read, in bytes (the format's own limit).
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes of the length field.
const LENGTH_BYTES: u64 = 8;

/// One safetensors file.
#[derive(Debug)]
pub struct Shard {
    /// Its path; may be a link.
    pub path: PathBuf,
    /// Its name in the directory.
    pub file_name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where its data begin: 8 + the header's length.
    pub data_start: u64,
    file: File,
    map: OnceLock<Mmap>,
}

impl Shard {
    /// The bytes of the JSON header.
    pub(crate) fn header(&self) -> Result<Vec<u8>, Error> {
        let mut header = vec![0; (self.data_start - LENGTH_BYTES) as usize];
        self.file.read_exact_at(&mut header, LENGTH_BYTES).map_err(|source| Error::io("read", &self.path, source))?;
        Ok(header)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// One tensor in a file, or one expert's matrix in a stack of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTensor {
    /// Name in the file; of an expert's matrix that which it would have alone.
    pub name: String,
    /// Index of the shard.
    pub shard: usize,
    /// Element type as the file spells it; see [`FileTensor::dtype`].
    pub dtype_name: String,
    /// Shape; always row-contiguous.
    pub shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl FileTensor {
    /// The element type, if it is one that can be trained.
    ///
    /// # Errors
    /// Any other type, by name.
    pub fn dtype(&self) -> Result<Dtype, UnknownDtype> {
        self.dtype_name.parse()
    }
}

/// The safetensors files of a directory, headers read and checked.
#[derive(Debug)]
pub struct SafetensorsDir {
    dir: PathBuf,
    shards: Vec<Shard>,
    tensors: Vec<FileTensor>,
    by_name: HashMap<String, usize>,
    /// Those of the files, stacks as a whole.
    in_files: Vec<FileTensor>,
}

impl SafetensorsDir {
    /// Reads the headers of `model.safetensors`, or of the files that `model.safetensors.index.json`
    /// lists. Links are followed.
    ///
    /// # Errors
    /// Neither is there; a file is truncated or its header lies; the index and the files disagree; two
    /// files hold the same tensor.
    pub fn open(dir: &Path) -> Result<SafetensorsDir, Error> {
        let mut this = SafetensorsDir {
            dir: dir.to_owned(),
            shards: vec![],
            tensors: vec![],
            by_name: HashMap::new(),
            in_files: Vec::new(),
        };
        if dir.join(SINGLE).exists() {
            this.add_shard(SINGLE)?;
        } else if dir.join(INDEX).exists() {
            let index = read_index(&dir.join(INDEX))?;
            let mut names: Vec<&String> = index.values().collect();
            names.sort_unstable();
            names.dedup();
            for name in names {
                this.add_shard(name)?;
            }
            this.check_index(&index)?;
        } else {
            return Err(Error::NoWeights { dir: dir.to_owned() });
        }
        Ok(this)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files, in order of their names.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The tensors, file by file in order of their offsets.
    pub fn tensors(&self) -> &[FileTensor] {
        &self.tensors
    }

    /// As the files have them: the experts of a stack as one tensor.
    pub(crate) fn in_files(&self) -> &[FileTensor] {
        &self.in_files
    }

    /// The tensor of this name.
    pub fn find(&self, name: &str) -> Option<&FileTensor> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The bytes of a tensor, from a read-only mapping of its file. For directories that nobody writes
    /// to meanwhile; live weights are read through an attachment.
    ///
    /// # Errors
    /// There is no such tensor, or its file cannot be mapped.
    pub fn bytes(&self, name: &str) -> Result<&[u8], Error> {
        let tensor = self.known(name)?;
        let shard = &self.shards[tensor.shard];
        let map = match shard.map.get() {
            Some(map) => map,
            None => {
                // SAFETY: the file is opened by us and read-only; the caller answers for nobody changing it
                // meanwhile, as the documentation demands.
                let map = unsafe { Mmap::map(&shard.file) }
                    .map_err(|source| Error::io("map into memory", &shard.path, source))?;
                shard.map.get_or_init(|| map)
            }
        };
        let range = usize::try_from(tensor.offset).ok().zip(usize::try_from(tensor.offset + tensor.bytes).ok());
        range
            .and_then(|(start, end)| map.get(start..end))
            .ok_or_else(|| damaged(&shard.path, format!("it was truncated after `{name}` was found in it")))
    }

    /// Copies the bytes of a tensor into `out`, which has its length.
    ///
    /// # Errors
    /// There is no such tensor, or its file cannot be read.
    pub fn read_into(&self, name: &str, out: &mut [u8]) -> Result<(), Error> {
        let tensor = self.known(name)?;
        assert_eq!(out.len() as u64, tensor.bytes, "room for `{name}`");
        let shard = &self.shards[tensor.shard];
        shard.file.read_exact_at(out, tensor.offset).map_err(|source| Error::io("read", &shard.path, source))
    }

    /// The tensors as a server that maps these files holds them: allocation i is shard i.
    ///
    /// # Errors
    /// A tensor of a type that cannot be trained, or one that does not start at a multiple of its element
    /// size.
    pub fn server_tensors(&self) -> Result<Vec<ServerTensor>, Error> {
        self.tensors
            .iter()
            .map(|tensor| {
                let path = &self.shards[tensor.shard].path;
                let unsuitable = |reason| Error::Unsuitable { path: path.clone(), reason };
                let dtype = tensor.dtype().map_err(|error| unsuitable(format!("tensor `{}`: {error}", tensor.name)))?;
                if !tensor.offset.is_multiple_of(dtype.size() as u64) {
                    return Err(unsuitable(format!(
                        "tensor `{}` starts at byte {}, which is not a multiple of {dtype}'s {} bytes, so it cannot be mapped in place; save the model again with save_pretrained, which aligns it",
                        tensor.name, tensor.offset, dtype.size()
                    )));
                }
                Ok(ServerTensor {
                    name: tensor.name.clone(),
                    dtype,
                    shape: tensor.shape.clone(),
                    strides: contiguous(&tensor.shape).expect("the header's check counted them"),
                    allocation: tensor.shard,
                    offset: tensor.offset,
                })
            })
            .collect()
    }

    /// A matrix of an expert that the files hold by itself, not in a stack.
    pub(crate) fn expert_alone(&self) -> Option<&str> {
        let names = self.in_files.iter().map(|tensor| tensor.name.as_str());
        names.filter(|name| !weight_map::is_other_part(name)).find(|name| weight_map::stack_of(name).is_some())
    }

    /// The files, to be looked for in other processes.
    pub(crate) fn files(&self) -> Result<FileSet, Error> {
        let mut files = FileSet::default();
        for shard in &self.shards {
            files.add(&shard.path)?;
        }
        Ok(files)
    }

    fn known(&self, name: &str) -> Result<&FileTensor, Error> {
        self.find(name).ok_or_else(|| damaged(&self.dir, format!("no file holds a tensor `{name}`")))
    }

    fn add_shard(&mut self, file_name: &str) -> Result<(), Error> {
        let path = self.dir.join(file_name);
        let file = File::open(&path).map_err(|source| Error::io("open", &path, source))?;
        let bytes = file.metadata().map_err(|source| Error::io("inspect", &path, source))?.len();
        let (data_start, entries) = read_header(&file, &path, bytes)?;
        for (name, entry) in entries {
            let whole = FileTensor {
                shard: self.shards.len(),
                offset: data_start + entry.data_offsets.0,
                bytes: entry.data_offsets.1 - entry.data_offsets.0,
                dtype_name: entry.dtype,
                shape: entry.shape,
                name,
            };
            self.in_files.push(whole.clone());
            self.add_tensors(&path, file_name, apart(whole))?;
        }
        self.shards.push(Shard {
            path,
            file_name: file_name.to_owned(),
            bytes,
            data_start,
            file,
            map: OnceLock::new(),
        });
        Ok(())
    }

    fn add_tensors(&mut self, path: &Path, file_name: &str, tensors: Vec<FileTensor>) -> Result<(), Error> {
        for tensor in tensors {
            if let Some(before) = self.by_name.insert(tensor.name.clone(), self.tensors.len()) {
                // Of a shard before, or of this one.
                let other = self.shards.get(self.tensors[before].shard).map_or(file_name, |shard| &shard.file_name);
                return Err(damaged(path, format!("tensor `{}` is in {other} as well", tensor.name)));
            }
            self.tensors.push(tensor);
        }
        Ok(())
    }

    fn check_index(&self, index: &BTreeMap<String, String>) -> Result<(), Error> {
        let path = self.dir.join(INDEX);
        let shards: HashMap<&str, usize> = self.in_files.iter().map(|tensor| (&*tensor.name, tensor.shard)).collect();
        for (name, file_name) in index {
            let held = shards.get(name.as_str()).is_some_and(|shard| self.shards[*shard].file_name == *file_name);
            if !held {
                return Err(damaged(&path, format!("it places `{name}` in {file_name}, which does not hold it")));
            }
        }
        match self.in_files.iter().find(|tensor| !index.contains_key(&tensor.name)) {
            Some(stray) => {
                let file_name = &self.shards[stray.shard].file_name;
                Err(damaged(&path, format!("it does not list `{}`, which lies in {file_name}", stray.name)))
            }
            None => Ok(()),
        }
    }
}

/// The experts' matrices of a stack, or the tensor itself.
fn apart(tensor: FileTensor) -> Vec<FileTensor> {
    let Some(parts) = unstacked(&tensor.name, &tensor.shape) else { return vec![tensor] };
    let bytes = tensor.bytes / parts.len() as u64;
    let part = |(i, (name, shape)): (usize, (String, [usize; 2]))| FileTensor {
        name,
        shape: shape.to_vec(),
        offset: tensor.offset + i as u64 * bytes,
        bytes,
        ..tensor.clone()
    };
    parts.into_iter().enumerate().map(part).collect()
}

/// The strides of a tensor without gaps. None if they are too large to count: the size of a tensor bounds them, but not
/// where a dimension is 0.
pub(crate) fn contiguous(shape: &[usize]) -> Option<Vec<usize>> {
    let mut strides = vec![1usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].checked_mul(shape[axis])?;
    }
    Some(strides)
}

fn damaged(path: &Path, reason: String) -> Error {
    Error::Safetensors { path: path.to_owned(), reason }
}

/// Tensor name -> file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(path).map_err(|source| Error::io("read", path, source))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| damaged(path, error.to_string()))?;
    for (name, file_name) in &index.weight_map {
        let plain = Path::new(file_name).file_name().is_some_and(|plain| plain == file_name.as_str());
        if !plain {
            return Err(damaged(path, format!("it places `{name}` in {file_name:?}, which is no plain file name")));
        }
    }
    if index.weight_map.is_empty() {
        return Err(damaged(path, "its weight_map is empty".into()));
    }
    Ok(index.weight_map)
}

/// A tensor as the header describes it.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The tensors of a header in order of their offsets, and where the data begin.
fn read_header(file: &File, path: &Path, file_bytes: u64) -> Result<(u64, Vec<(String, Entry)>), Error> {
    let read = |source| Error::io("read", path, source);
    if file_bytes < LENGTH_BYTES {
        return Err(damaged(path, format!("{file_bytes} bytes long, too short for a safetensors file")));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(read)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > file_bytes - LENGTH_BYTES {
        return Err(damaged(
            path,
            format!("header of {length} bytes in a file of {file_bytes}; it is truncated or no safetensors file"),
        ));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, LENGTH_BYTES).map_err(read)?;
    let data_start = LENGTH_BYTES + length;
    let entries = parse_header(&header, file_bytes - data_start).map_err(|reason| damaged(path, reason))?;
    Ok((data_start, entries))
}

/// Parses and checks a header whose data are `data_bytes` long: no holes, no overlaps, sizes that follow
/// from type and shape.
fn parse_header(header: &[u8], data_bytes: u64) -> Result<Vec<(String, Entry)>, String> {
    let mut json = serde_json::Deserializer::from_slice(header);
    let mut entries = json.deserialize_map(HeaderVisitor).map_err(|error| format!("header: {error}"))?;
    json.end().map_err(|error| format!("header: {error}"))?;
    entries.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let mut at = 0;
    for (name, entry) in &entries {
        let (start, end) = entry.data_offsets;
        if start != at || end < start || end > data_bytes {
            return Err(format!(
                "tensor `{name}` claims bytes {start} to {end}, want a start at {at} and an end within the {data_bytes} bytes of data; the file is truncated or damaged"
            ));
        }
        check_size(name, entry)?;
        at = end;
    }
    if at != data_bytes {
        return Err(format!("the header describes {at} bytes of data, the file holds {data_bytes}"));
    }
    Ok(entries)
}

fn check_size(name: &str, entry: &Entry) -> Result<(), String> {
    let bytes = entry.data_offsets.1 - entry.data_offsets.0;
    let elements = entry.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(u64::try_from(n).ok()?));
    let strides = contiguous(&entry.shape);
    let size: u64 = match entry.dtype.as_str() {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
        "U16" | "I16" | "F16" | "BF16" => 2,
        "U32" | "I32" | "F32" => 4,
        "U64" | "I64" | "F64" | "C64" => 8,
        // A type that this code does not know: its bytes are within the file, nobody will read them.
        _ if elements.is_some() && strides.is_some() => return Ok(()),
        _ => 0,
    };
    if strides.is_some() && elements.and_then(|elements| elements.checked_mul(size)) == Some(bytes) {
        return Ok(());
    }
    Err(format!("tensor `{name}` of {} {:?} cannot have {bytes} bytes", entry.dtype, entry.shape))
}

/// Collects the header's entries, refusing a name that comes twice.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<(String, Entry)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensor names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(serde::de::Error::custom(format!("`{name}` comes twice")));
            }
            if name == "__metadata__" {
                map.next_value::<HashMap<String, String>>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(entries)
    }
}
