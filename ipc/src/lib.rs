//! The way to weights that another process holds: manifest, attach, lease, liveness.
//!
//! Two ways in:
//! - a server exports its weights ([`SharedWeights`], or any program that writes the [`Manifest`]) as
//!   shared memory or as memory of a GPU (CUDA IPC), and says over a Unix socket or in a file what lies where;
//! - [`stage`] makes a live copy of a model directory on tmpfs, and a server that maps its safetensors
//!   files then reads the very pages that are trained; [`stage_gguf`] makes one for llama.cpp.
//!
//! Either way [`Attachment::open`] checks everything before it hands out the first pointer: the manifest,
//! the ranges, the mapping to the model's tensors ([`weight_map::map`]), that the server lives, and that
//! no other trainer holds the lease. An attachment then knows, cheaply, whether the server is still there
//! ([`Attachment::check`], [`Attachment::watch`]): nothing is to be written after it is gone. A server with a
//! socket can be asked to forget what it computed with older weights ([`Attachment::invalidate`]), to stand still
//! for a moment ([`Attachment::hold`]) and to compute log-probabilities ([`Attachment::score`]).
//!
//! What cannot be prevented here: a file that somebody truncates under a mapping raises SIGBUS in whoever
//! touches the missing pages. Shared memory made by [`SharedWeights`] is sealed against that; a staged
//! file is not. The trainer is a process of its own for this reason.

mod attach;
mod connection;
mod control;
mod cuda;
mod error;
mod export;
mod gguf;
mod lease;
mod lend;
mod manifest;
mod mapping;
mod process;
mod protocol;
mod safetensors_dir;
mod shard_copy;
mod stage;

pub use attach::{Attachment, Source};
pub use control::Hold;
pub use cuda::{CudaDevice, CudaError};
pub use error::{ControlError, Error, Gone};
pub use export::{ExportHandle, SharedWeights};
pub use gguf::{GGUF_FILE, GgufFile, GgufLayout, GgufTensor, GgufValue, NewTensor};
pub use lease::Lease;
pub use lend::Engine;
pub use manifest::{Allocation, Manifest, ManifestError, ManifestTensor, Server, Writer};
pub use mapping::{LiveTensor, Memory};
pub use process::servers_of;
pub use protocol::{Control, Invalidation};
pub use safetensors_dir::{FileTensor, SafetensorsDir, Shard};
pub use stage::{STAGE_MARKER, StageMarker, StageReport, stage, stage_gguf, tied_head_copy};

/// 128 random bits in hex: the name of one load of the weights.
///
/// # Errors
/// `/dev/urandom` cannot be read.
pub fn random_epoch() -> Result<String, Error> {
    use std::io::Read;
    let path = std::path::Path::new("/dev/urandom");
    let mut bits = [0u8; 16];
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut bits))
        .map_err(|source| Error::io("read random bits from", path, source))?;
    Ok(bits.iter().map(|byte| format!("{byte:02x}")).collect())
}
