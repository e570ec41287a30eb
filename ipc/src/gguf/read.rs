//! Reading the header of a GGUF file.
//!
//! A length is checked against the bytes that are left before anything of that length is read or allocated.

use super::{ALIGNMENT, ALIGNMENT_KEY, GgufValue, MAGIC, dtype_of};
use crate::Error;
use crate::process::FileSet;
use crate::safetensors_dir::contiguous;
use memmap2::Mmap;
use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use weight_map::{Dtype, ServerTensor, WeightMap};

/// Longest header that is read, in bytes; a vocabulary of a million tokens takes 50 MB.
const HEADER_BYTES_MAX: usize = 1 << 30;
/// Dimensions that ggml knows.
const DIMENSIONS_MAX: u32 = 4;
/// Longest array of metadata: a vocabulary has some 10⁵ tokens and as many merges, and each element costs 32 bytes here.
const ARRAY_LEN_MAX: usize = 1 << 22;

/// One tensor in a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name as llama.cpp spells it.
    pub name: String,
    /// Shape as the safetensors files have it: (rows, cols) or (n,), the reverse of the file's.
    pub shape: Vec<usize>,
    /// ggml's number of the element type.
    pub type_id: u32,
    /// First byte, from the start of the file.
    pub offset: u64,
}

/// A GGUF file, header read and checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    metadata: Vec<(String, GgufValue)>,
    tensors: Vec<GgufTensor>,
}

impl GgufFile {
    /// Reads the header.
    ///
    /// # Errors
    /// The file is truncated or its header lies; it is of another byte order, version or a part of a split model.
    pub fn open(path: &Path) -> Result<GgufFile, Error> {
        let file = File::open(path).map_err(|source| Error::io("open", path, source))?;
        // SAFETY: mapped read-only; headers are only read before a server starts, and data through `bytes`, whose
        // caller answers for nobody changing them meanwhile.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io("map into memory", path, source))?;
        let damaged = |reason| Error::Gguf { path: path.to_owned(), reason };
        let (metadata, tensors) = parse(&map).map_err(damaged)?;
        let file = GgufFile { path: path.to_owned(), map, metadata, tensors };
        match file.get("split.count").and_then(GgufValue::as_u64) {
            Some(parts) if parts > 1 => Err(damaged(format!(
                "it is one of {parts} parts of a split model; merge them with `llama-gguf-split --merge`"
            ))),
            _ => Ok(file),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// Whether it is empty, which no GGUF file is.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The metadata in the file's order.
    pub fn metadata(&self) -> &[(String, GgufValue)] {
        &self.metadata
    }

    /// The value of a key of the metadata.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The tensors in the file's order.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The bytes of a part of the file. For files that nobody writes to meanwhile; live weights are read through an
    /// attachment.
    ///
    /// # Panics
    /// If the range leaves the file.
    pub fn bytes(&self, offset: u64, len: usize) -> &[u8] {
        &self.map[offset as usize..][..len]
    }

    /// `general.architecture`, such as `llama` or `qwen3`.
    ///
    /// # Errors
    /// It has none.
    pub fn architecture(&self) -> Result<&str, Error> {
        self.get("general.architecture")
            .and_then(GgufValue::as_str)
            .ok_or_else(|| self.unsuitable("its metadata have no general.architecture".into()))
    }

    /// The value of a key of the architecture, `llama.` or the like before it.
    ///
    /// # Errors
    /// The file says no architecture.
    pub fn architecture_value(&self, key: &str) -> Result<Option<&GgufValue>, Error> {
        Ok(self.get(&format!("{}.{key}", self.architecture()?)))
    }

    /// The tensors as a server that maps the file holds them: allocation 0 is the file.
    ///
    /// # Errors
    /// A tensor of a type that cannot be trained, by name.
    pub fn server_tensors(&self) -> Result<Vec<ServerTensor>, Error> {
        self.tensors
            .iter()
            .map(|tensor| {
                let dtype = dtype_of(tensor.type_id).map_err(|found| {
                    self.unsuitable(format!(
                        "tensor `{}` is of type {found}, which cannot be trained in place; convert the model with `--outtype bf16` (f16, f32), unquantized",
                        tensor.name
                    ))
                })?;
                Ok(ServerTensor {
                    name: tensor.name.clone(),
                    dtype,
                    strides: contiguous(&tensor.shape).expect("counted when the header was read"),
                    shape: tensor.shape.clone(),
                    allocation: 0,
                    offset: tensor.offset,
                })
            })
            .collect()
    }

    /// Notes in `map`, which was made from [`GgufFile::server_tensors`], in which order llama.cpp holds the rows.
    ///
    /// # Errors
    /// The metadata do not say how long a head is, or the tensors contradict them.
    pub fn order_rows(&self, map: &mut WeightMap) -> Result<(), Error> {
        // Its other dense architectures rotate as Hugging Face does.
        if self.architecture()? != "llama" {
            return Ok(());
        }
        let number = |key: &str| Ok::<_, Error>(self.architecture_value(key)?.and_then(GgufValue::as_u64));
        let head_dim =
            match (number("attention.key_length")?, number("embedding_length")?, number("attention.head_count")?) {
                (Some(head_dim), _, _) => head_dim,
                (None, Some(hidden), Some(heads)) if heads > 0 => hidden / heads,
                _ => return Err(self.unsuitable("its metadata do not say how long a head is".into())),
            };
        let head_dim = usize::try_from(head_dim).unwrap_or(0);
        map.interleave_heads(head_dim).map_err(|reason| self.unsuitable(reason.to_string()))
    }

    /// The file, to be looked for in other processes.
    pub(crate) fn files(&self) -> Result<FileSet, Error> {
        let mut files = FileSet::default();
        files.add(&self.path)?;
        Ok(files)
    }

    fn unsuitable(&self, reason: String) -> Error {
        Error::Unsuitable { path: self.path.clone(), reason }
    }
}

type Header = (Vec<(String, GgufValue)>, Vec<GgufTensor>);

/// The bytes of a header that were not read yet.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn parse(file: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { bytes: &file[..file.len().min(HEADER_BYTES_MAX)], at: 0 };
    if cursor.take(4)? != MAGIC {
        return Err("it does not begin with `GGUF`, so it is no GGUF file".into());
    }
    match cursor.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err("it was written for big-endian machines; convert the model again on this one".into());
        }
        version => return Err(format!("GGUF version {version}, want 2 or 3; convert the model again")),
    }
    let (tensors, entries) = (cursor.u64()?, cursor.u64()?);
    // A key, a type and a byte; a name, no dimension, a type and an offset.
    let (entries, tensors) = (cursor.count(entries, 13, "metadata entries")?, cursor.count(tensors, 24, "tensors")?);
    let metadata = metadata(&mut cursor, entries)?;
    let alignment = match metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
        None => ALIGNMENT,
        Some((_, GgufValue::U32(n))) if n.is_power_of_two() && *n >= 8 => (*n).into(),
        Some((_, value)) => return Err(format!("{ALIGNMENT_KEY} is {value:?}, want a power of 2 from 8 on")),
    };
    let mut tensors = descriptions(&mut cursor, tensors)?;
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    for tensor in &mut tensors {
        place(tensor, data_start, alignment, file.len() as u64)?;
    }
    Ok((metadata, tensors))
}

fn metadata(cursor: &mut Cursor, entries: usize) -> Result<Vec<(String, GgufValue)>, String> {
    let (mut metadata, mut seen) = (Vec::new(), HashSet::new());
    for _ in 0..entries {
        let key = cursor.name("a metadata key")?;
        let type_id = cursor.u32()?;
        let value = cursor.value(type_id).map_err(|reason| format!("metadata `{key}`: {reason}"))?;
        if !seen.insert(key.clone()) {
            return Err(format!("metadata `{key}` comes twice"));
        }
        metadata.push((key, value));
    }
    Ok(metadata)
}

/// The tensors' descriptions, with offsets from the start of the data.
fn descriptions(cursor: &mut Cursor, count: usize) -> Result<Vec<GgufTensor>, String> {
    let (mut tensors, mut seen) = (Vec::new(), HashSet::new());
    for _ in 0..count {
        let name = cursor.name("a tensor's name")?;
        let of = |reason: String| format!("tensor `{name}`: {reason}");
        let dimensions = cursor.u32().map_err(of)?;
        if dimensions > DIMENSIONS_MAX {
            return Err(of(format!("{dimensions} dimensions, want at most {DIMENSIONS_MAX}")));
        }
        let mut shape = (0..dimensions)
            .map(|_| cursor.u64().and_then(|n| usize::try_from(n).map_err(|_| format!("a dimension of {n}"))))
            .collect::<Result<Vec<_>, _>>()
            .map_err(of)?;
        shape.reverse();
        let (type_id, offset) = (cursor.u32().map_err(of)?, cursor.u64().map_err(of)?);
        if !seen.insert(name.clone()) {
            return Err(of("it comes twice".into()));
        }
        tensors.push(GgufTensor { name, shape, type_id, offset });
    }
    Ok(tensors)
}

/// Makes a tensor's offset one from the start of the file, if its data lie in the file.
fn place(tensor: &mut GgufTensor, data_start: u64, alignment: u64, file_bytes: u64) -> Result<(), String> {
    let elements = tensor.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64));
    let bounded = contiguous(&tensor.shape).is_some();
    // A type that cannot be trained is refused by name later on; its bytes are not read.
    let size = dtype_of(tensor.type_id).map_or(0, |dtype: Dtype| dtype.size() as u64);
    let start = data_start.checked_add(tensor.offset).filter(|start| *start <= file_bytes && bounded);
    let end = start.zip(elements.and_then(|n| n.checked_mul(size))).and_then(|(start, bytes)| start.checked_add(bytes));
    match (start, end) {
        (Some(start), Some(end)) if end <= file_bytes && tensor.offset.is_multiple_of(alignment) => {
            tensor.offset = start;
            Ok(())
        }
        _ => Err(format!(
            "tensor `{}` {:?} at offset {} leaves the file of {file_bytes} bytes or is not aligned to {alignment} bytes; the file is truncated or damaged",
            tensor.name, tensor.shape, tensor.offset
        )),
    }
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let left = self.bytes.len() - self.at;
        if len > left {
            return Err(format!(
                "the header wants {len} bytes at byte {}, where {left} are left; it is truncated or damaged",
                self.at
            ));
        }
        self.at += len;
        Ok(&self.bytes[self.at - len..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things that take `least` bytes each.
    fn count(&self, count: u64, least: usize, what: &str) -> Result<usize, String> {
        let left = self.bytes.len() - self.at;
        usize::try_from(count)
            .ok()
            .filter(|count| *count <= left / least)
            .ok_or_else(|| format!("the header claims {count} {what} in {left} bytes; it is truncated or damaged"))
    }

    fn string(&mut self) -> Result<&'a [u8], String> {
        let len = self.u64()?;
        let len = self.count(len, 1, "bytes of text")?;
        self.take(len)
    }

    fn name(&mut self, what: &str) -> Result<String, String> {
        let bytes = self.string().map_err(|reason| format!("{what}: {reason}"))?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} at byte {} is not UTF-8", self.at))
    }

    fn value(&mut self, type_id: u32) -> Result<GgufValue, String> {
        Ok(match type_id {
            0 => GgufValue::U8(u8::from_le_bytes(self.array()?)),
            1 => GgufValue::I8(i8::from_le_bytes(self.array()?)),
            2 => GgufValue::U16(u16::from_le_bytes(self.array()?)),
            3 => GgufValue::I16(i16::from_le_bytes(self.array()?)),
            4 => GgufValue::U32(self.u32()?),
            5 => GgufValue::I32(i32::from_le_bytes(self.array()?)),
            6 => GgufValue::F32(f32::from_le_bytes(self.array()?)),
            7 => GgufValue::Bool(self.array::<1>()? != [0]),
            8 => GgufValue::String(self.string()?.to_vec()),
            9 => {
                let (of, len) = (self.u32()?, self.u64()?);
                if of == 9 {
                    return Err("an array of arrays, which llama.cpp does not know either".into());
                }
                let len = self.count(len, 1, "elements of an array")?;
                if len > ARRAY_LEN_MAX {
                    return Err(format!("an array of {len} elements; {ARRAY_LEN_MAX} are read at most"));
                }
                GgufValue::Array(of, (0..len).map(|_| self.value(of)).collect::<Result<_, _>>()?)
            }
            10 => GgufValue::U64(self.u64()?),
            11 => GgufValue::I64(i64::from_le_bytes(self.array()?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("unknown type {other}")),
        })
    }
}
