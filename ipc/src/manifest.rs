//! The manifest, version 1: what a server says about its weights.
//!
//! One JSON document per rank. `allocations` are spans of memory, `tensors` lie in them (offset in bytes,
//! shape and strides in elements), `packing` says which tensors of the model a merged one holds. A
//! document is parsed, then validated as a whole; after that every tensor's span lies inside its
//! allocation, which is what the mappings rely on.
//!
//! ```json
//! {"version": 1, "epoch": "32 hex digits", "pid": 4711, "model_dir": "/models/qwen", "rank": 0, "world_size": 1,
//!  "allocations": [{"kind": "file", "path": "/proc/4711/fd/12", "bytes": 1048576}],
//!  "tensors": [{"name": "model.norm.weight", "dtype": "bfloat16", "shape": [1024], "strides": [1],
//!               "allocation": 0, "offset": 0}],
//!  "packing": [{"merged": "model.layers.0.self_attn.qkv_proj.weight", "parts": ["…q_proj.weight", "…"]}],
//!  "server": {"name": "vllm", "version": "0.32.0"}, "controls": ["invalidate", "hold"]}
//! ```
//! On a GPU an allocation is one of the driver's, whole (cuMemGetAddressRange), and `device` the GPU's UUID:
//! ```json
//! {"kind": "cuda_ipc", "handle": "128 hex digits: the 64 bytes from cuIpcGetMemHandle", "bytes": 2097152,
//!  "device": "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"}
//! ```
//! All allocations of a manifest are of one kind, and those of a GPU of one device.

use crate::Control;
use crate::cuda::{handle_bytes, is_uuid};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use weight_map::{Dtype, Packing, ServerTensor};

/// The version that this crate reads and writes.
const VERSION: u64 = 1;
/// Longest document that is read, in bytes.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 64 << 20;

/// What a server says about the weights of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this document: 1.
    pub version: u32,
    /// 32 hex digits, random per load: another epoch is another load, even at the same addresses.
    pub epoch: String,
    /// The process that holds the memory.
    pub pid: u32,
    /// Absolute path of the model directory that was loaded.
    pub model_dir: PathBuf,
    /// Rank of this process in its tensor-parallel group.
    pub rank: u32,
    /// Size of that group; only 1 can be trained.
    pub world_size: u32,
    /// Spans of memory.
    pub allocations: Vec<Allocation>,
    /// Tensors in them.
    pub tensors: Vec<ManifestTensor>,
    /// What merged tensors hold; may be empty.
    #[serde(default)]
    pub packing: Vec<Packing>,
    /// Which server it is, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<Server>,
    /// What its socket can do beyond signs of life.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub controls: Vec<Control>,
}

/// A server program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// Such as `vllm`.
    pub name: String,
    /// Such as `0.32.0`.
    pub version: String,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

/// A span of memory that can be mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Allocation {
    /// A file that is mapped shared: shared memory, a memfd by `/proc/PID/fd/N`, or a staged file.
    File {
        /// Absolute path.
        path: PathBuf,
        /// Bytes of it that belong to the allocation, from its start.
        bytes: u64,
        /// Who may write to it; the trainer unless it says otherwise.
        #[serde(default)]
        writable_by: Writer,
    },
    /// Memory of a GPU, opened by a handle of CUDA's.
    CudaIpc {
        /// From cuIpcGetMemHandle, 64 bytes in hex.
        handle: String,
        /// Size of the driver's allocation.
        bytes: u64,
        /// `GPU-` or `MIG-` and a UUID.
        device: String,
    },
}

impl Allocation {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        match self {
            Allocation::File { bytes, .. } | Allocation::CudaIpc { bytes, .. } => *bytes,
        }
    }

    /// What no two allocations may share.
    fn identity(&self) -> String {
        match self {
            Allocation::File { path, .. } => path.display().to_string(),
            Allocation::CudaIpc { handle, .. } => handle.to_ascii_lowercase(),
        }
    }
}

/// Who may write to an allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writer {
    /// The process that holds the lease.
    #[default]
    Trainer,
    /// Nobody; such memory can be described but not trained.
    Nobody,
}

/// A tensor in an allocation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestTensor {
    /// Name as the server spells it.
    pub name: String,
    /// `F32`, `F16`, `BF16`, or torch's spelling of the same.
    pub dtype: String,
    /// Shape in elements.
    pub shape: Vec<usize>,
    /// Strides in elements.
    pub strides: Vec<usize>,
    /// Index into the allocations.
    pub allocation: usize,
    /// First byte in the allocation.
    pub offset: u64,
}

/// Why a manifest is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not the JSON of a manifest.
    #[error("not a manifest: {0}")]
    Json(String),
    /// A version that this program does not read.
    #[error("version {0} is not supported, want 1; install matching versions on both sides")]
    Version(String),
    /// A kind of memory that this program cannot map.
    #[error("allocation {index} is of kind `{kind}`, which cannot be attached here; supported: `file`, `cuda_ipc`")]
    Kind {
        /// Index of the allocation.
        index: usize,
        /// Its kind.
        kind: String,
    },
    /// Memory in two places.
    #[error(
        "the weights lie in {first} and in {other}: only a model that is whole in one place can be trained; serve it \
         without offloading, without a device_map over several GPUs, and with tensor parallel size 1"
    )]
    Places {
        /// Where the first allocation lies.
        first: String,
        /// Where another one does.
        other: String,
    },
    /// A field whose value makes no sense.
    #[error("`{field}` is {value}, want {want}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        want: &'static str,
    },
    /// Tensor parallelism.
    #[error("rank {rank} of {world_size}: a sharded model cannot be trained; serve with tensor parallel size 1")]
    World {
        /// The rank.
        rank: u32,
        /// The size of the group.
        world_size: u32,
    },
    /// Two entries of the same name or path.
    #[error("{what} `{name}` is listed twice")]
    Duplicate {
        /// What is listed.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A tensor of a type that cannot be trained in place.
    #[error("tensor `{name}`: {reason}")]
    Dtype {
        /// The tensor.
        name: String,
        /// Why.
        reason: weight_map::UnknownDtype,
    },
    /// A tensor outside its allocation.
    #[error("tensor `{name}` {shape:?} at byte {offset} does not lie in allocation {allocation}{}", bytes_text(*bytes))]
    Range {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its offset.
        offset: u64,
        /// Index of its allocation.
        allocation: usize,
        /// Size of that allocation, if there is one.
        bytes: Option<u64>,
    },
    /// A tensor whose strides are not as many as its dimensions.
    #[error("tensor `{name}` has shape {shape:?} but strides {strides:?}")]
    Strides {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides.
        strides: Vec<usize>,
    },
    /// A tensor that does not start at a multiple of its element size.
    #[error("tensor `{name}` starts at byte {offset}, which is not a multiple of {dtype}'s {} bytes", dtype.size())]
    Misaligned {
        /// The tensor.
        name: String,
        /// Its offset.
        offset: u64,
        /// Its element type.
        dtype: Dtype,
    },
}

fn bytes_text(bytes: Option<u64>) -> String {
    bytes.map_or(", which is not listed".into(), |bytes| format!(" of {bytes} bytes"))
}

impl Manifest {
    /// Reads and validates a document.
    ///
    /// # Errors
    /// The version and the kinds of memory are looked at first, so that a document of a later version is
    /// refused for that and not for a field that it lacks.
    pub fn parse(document: &[u8]) -> Result<Manifest, ManifestError> {
        let json = |error: serde_json::Error| ManifestError::Json(error.to_string());
        let value: serde_json::Value = serde_json::from_slice(document).map_err(json)?;
        match value.get("version") {
            Some(version) if version.as_u64() == Some(VERSION) => {}
            Some(version) => return Err(ManifestError::Version(version.to_string())),
            None => return Err(ManifestError::Json("it has no version".into())),
        }
        let allocations = value.get("allocations").and_then(|list| list.as_array()).into_iter().flatten();
        for (index, allocation) in allocations.enumerate() {
            match allocation.get("kind").and_then(|kind| kind.as_str()) {
                None | Some("file" | "cuda_ipc") => {}
                Some(kind) => return Err(ManifestError::Kind { index, kind: kind.to_owned() }),
            }
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(json)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checks everything that can be checked without touching memory: identity, ranges, duplicates,
    /// alignment.
    ///
    /// # Errors
    /// The first thing that is wrong, by name.
    pub fn validate(&self) -> Result<(), ManifestError> {
        self.validate_identity()?;
        self.validate_allocations()?;
        let mut names = HashSet::new();
        for tensor in &self.tensors {
            self.validate_tensor(tensor)?;
            if !names.insert(tensor.name.as_str()) {
                return duplicate("tensor", &tensor.name);
            }
        }
        let mut merged = HashSet::new();
        for packing in &self.packing {
            if !merged.insert(packing.merged.as_str()) {
                return duplicate("packing", &packing.merged);
            }
        }
        Ok(())
    }

    fn validate_identity(&self) -> Result<(), ManifestError> {
        if u64::from(self.version) != VERSION {
            return Err(ManifestError::Version(self.version.to_string()));
        }
        if self.epoch.len() != 32 || !self.epoch.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return field("epoch", format!("{:?}", self.epoch), "32 hex digits");
        }
        if self.pid == 0 || i32::try_from(self.pid).is_err() {
            return field("pid", self.pid.to_string(), "a process id");
        }
        if !self.model_dir.is_absolute() {
            return field("model_dir", self.model_dir.display().to_string(), "an absolute path");
        }
        if self.world_size != 1 || self.rank != 0 {
            return Err(ManifestError::World { rank: self.rank, world_size: self.world_size });
        }
        Ok(())
    }

    fn validate_allocations(&self) -> Result<(), ManifestError> {
        let mut identities = HashSet::new();
        for allocation in &self.allocations {
            match allocation {
                Allocation::File { path, .. } if !path.is_absolute() => {
                    return field("allocations.path", path.display().to_string(), "an absolute path");
                }
                Allocation::CudaIpc { handle, .. } if handle_bytes(handle).is_none() => {
                    return field("allocations.handle", format!("{handle:?}"), "128 hex digits");
                }
                Allocation::CudaIpc { device, .. } if !is_uuid(device) => {
                    return field("allocations.device", format!("{device:?}"), "`GPU-` or `MIG-` and a UUID");
                }
                _ => {}
            }
            let bytes = allocation.bytes();
            if bytes == 0 || isize::try_from(bytes).is_err() {
                return field("allocations.bytes", bytes.to_string(), "a size above 0 that can be mapped");
            }
            let identity = allocation.identity();
            if identities.contains(&identity) {
                return duplicate("allocation", &identity);
            }
            identities.insert(identity);
        }
        let mut places = self.allocations.iter().map(place);
        if let Some(first) = places.next()
            && let Some(other) = places.find(|other| *other != first)
        {
            return Err(ManifestError::Places { first, other });
        }
        Ok(())
    }

    fn validate_tensor(&self, tensor: &ManifestTensor) -> Result<(), ManifestError> {
        let ManifestTensor { name, shape, strides, offset, allocation, .. } = tensor;
        let dtype = dtype_of(tensor)?;
        if strides.len() != shape.len() {
            return Err(ManifestError::Strides { name: name.clone(), shape: shape.clone(), strides: strides.clone() });
        }
        let bytes = self.allocations.get(*allocation).map(Allocation::bytes);
        let end = span_bytes(shape, strides, dtype).and_then(|span| offset.checked_add(span));
        if !matches!((end, bytes), (Some(end), Some(bytes)) if end <= bytes) {
            return Err(ManifestError::Range {
                name: name.clone(),
                shape: shape.clone(),
                offset: *offset,
                allocation: *allocation,
                bytes,
            });
        }
        if !offset.is_multiple_of(dtype.size() as u64) {
            return Err(ManifestError::Misaligned { name: name.clone(), offset: *offset, dtype });
        }
        Ok(())
    }

    /// The tensors as [`weight_map::map`] takes them.
    ///
    /// # Errors
    /// A dtype that cannot be trained in place.
    pub fn server_tensors(&self) -> Result<Vec<ServerTensor>, ManifestError> {
        self.tensors
            .iter()
            .map(|tensor| {
                Ok(ServerTensor {
                    name: tensor.name.clone(),
                    dtype: dtype_of(tensor)?,
                    shape: tensor.shape.clone(),
                    strides: tensor.strides.clone(),
                    allocation: tensor.allocation,
                    offset: tensor.offset,
                })
            })
            .collect()
    }
}

/// Where an allocation lies.
fn place(allocation: &Allocation) -> String {
    match allocation {
        Allocation::File { .. } => "the machine's memory".into(),
        Allocation::CudaIpc { device, .. } => device.to_ascii_lowercase().replacen("gpu-", "GPU-", 1),
    }
}

fn field<T>(field: &'static str, value: String, want: &'static str) -> Result<T, ManifestError> {
    Err(ManifestError::Field { field, value, want })
}

fn duplicate<T>(what: &'static str, name: &str) -> Result<T, ManifestError> {
    Err(ManifestError::Duplicate { what, name: name.to_owned() })
}

fn dtype_of(tensor: &ManifestTensor) -> Result<Dtype, ManifestError> {
    tensor.dtype.parse().map_err(|reason| ManifestError::Dtype { name: tensor.name.clone(), reason })
}

/// Bytes from the first element to the end of the last one that the strides reach; None beyond 64 bits.
fn span_bytes(shape: &[usize], strides: &[usize], dtype: Dtype) -> Option<u64> {
    if shape.contains(&0) {
        return Some(0);
    }
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |last, (&n, &stride)| last.checked_add((n - 1).checked_mul(stride)?))?;
    u64::try_from(last.checked_add(1)?.checked_mul(dtype.size())?).ok()
}
