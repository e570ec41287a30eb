//! Why an attachment, a stage or an export was refused. Nothing was written to any weight.
//!
//! Each message is complete in itself: it contains the words of its cause, so causes are plain fields and
//! not `source()`, which would print them twice.

use crate::{CudaError, ManifestError};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The server whose weights were attached is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the inference server{} attached through {source_name} is gone: {how}; nothing more is written to its weights", pid_text(*pid))]
pub struct Gone {
    /// Its process id, where one is known.
    pub pid: Option<u32>,
    /// What it was attached through.
    pub source_name: String,
    /// How that was seen.
    pub how: String,
}

fn pid_text(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// Why a server did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Its manifest does not offer it, or there is no socket to ask on.
    #[error("the server does not offer `{request}`")]
    NotOffered {
        /// The request.
        request: &'static str,
    },
    /// It said no.
    #[error("the server refused `{request}`: {reason}")]
    Refused {
        /// The request.
        request: &'static str,
        /// In the server's words.
        reason: String,
    },
    /// The running step of the engine did not end.
    #[error("the engine's running step did not end within {waited:?}; nothing is held")]
    Busy {
        /// How long it was waited for.
        waited: Duration,
    },
    /// No answer in time; a late one will be skipped.
    #[error("the server did not answer `{request}` within {patience:?}")]
    TimedOut {
        /// The request.
        request: &'static str,
        /// How long it was waited for.
        patience: Duration,
    },
    /// An answer that is none.
    #[error("the server's answer to `{request}` makes no sense: {reason}")]
    Babble {
        /// The request.
        request: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It is not there any more.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// What can go wrong on the way to another process's weights.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried, as a verb phrase.
        action: String,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        error: std::io::Error,
    },

    /// The manifest is not one that can be trusted with writes.
    #[error("manifest from {origin}: {reason}")]
    Manifest {
        /// The socket or file that it came from.
        origin: String,
        /// What is wrong with it.
        reason: Box<ManifestError>,
    },

    /// The server's tensors are not the model's.
    #[error("{origin}: {reason}")]
    Map {
        /// What was attached.
        origin: String,
        /// Which tensor, and what to do.
        reason: Box<weight_map::Error>,
    },

    /// The exporter answered the handshake with an error.
    #[error("the exporter at {} does not lend the weights: {reason}", socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// The exporter's words.
        reason: String,
    },

    /// The exporter does not speak the protocol.
    #[error("the exporter at {} broke the protocol: {reason}", socket.display())]
    Protocol {
        /// The socket.
        socket: PathBuf,
        /// What it did.
        reason: String,
    },

    /// The socket's peer is not the process in the manifest.
    #[error(
        "the manifest at {} names pid {manifest}, but the socket belongs to pid {peer}; the exporter must serve its own memory, in the process id namespace of the trainer",
        socket.display()
    )]
    PeerPid {
        /// The socket.
        socket: PathBuf,
        /// The process in the manifest.
        manifest: u32,
        /// The process at the other end.
        peer: u32,
    },

    /// Memory offered by another user.
    #[error("{} belongs to user {owner}, the trainer runs as user {own}; weights are only taken from the same user or root", path.display())]
    User {
        /// The socket or file.
        path: PathBuf,
        /// Who offers it.
        owner: u32,
        /// Who we are.
        own: u32,
    },

    /// Somebody else trains these weights.
    #[error("the weights at {} are leased{}: another trainer has them, and only one at a time may write", path.display(), holder(*pid))]
    Leased {
        /// The lease file, or the socket.
        path: PathBuf,
        /// Who holds it, if it says.
        pid: Option<u32>,
    },

    /// The server is not there, or not any more.
    #[error(transparent)]
    Gone(#[from] Gone),

    /// The manifest in a file is of an earlier server.
    #[error("pid {pid} does not hold {}, which its manifest names: start the server again, so that it makes a new one", path.display())]
    Stale {
        /// The process in the manifest.
        pid: u32,
        /// The memory that it should hold.
        path: PathBuf,
    },

    /// Memory that may not be mapped for writing.
    #[error("allocation {}: {reason}", path.display())]
    Allocation {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// Weights in a GPU's memory, and no way to a GPU.
    #[error(
        "the weights lie in a GPU's memory, and there is no CUDA driver (libcuda.so.1) here: run the daemon on the \
         server's machine, and in a container give it the driver and the GPU (`--gpus`)"
    )]
    NoDriver,

    /// The device that holds the weights is not one of this process's.
    #[error(
        "the weights lie on {wanted}, which is not among the GPUs of this process ({}){}; a GPU goes by its UUID: let \
         CUDA_VISIBLE_DEVICES of the daemon contain the server's GPU, or the very MIG instance that the server was given",
        if here.is_empty() { "none" } else { here },
        visible.as_ref().map(|list| format!(", where CUDA_VISIBLE_DEVICES={list}")).unwrap_or_default()
    )]
    Device {
        /// The UUID in the manifest.
        wanted: String,
        /// The devices that there are.
        here: String,
        /// CUDA_VISIBLE_DEVICES, if it is set.
        visible: Option<String>,
    },

    /// An allocation that was opened and is not what its manifest says.
    #[error("allocation {index}: {reason}; nothing was written")]
    DeviceMemory {
        /// Index of the allocation.
        index: usize,
        /// What is wrong with it.
        reason: String,
    },

    /// The weights are this process's own.
    #[error("the weights lie in this very process (pid {pid}): memory of a GPU can only be opened by another process")]
    OwnMemory {
        /// This process.
        pid: u32,
    },

    /// The CUDA driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),

    /// A model directory without weights that can be read.
    #[error("{} holds no weights: looked for model.safetensors and model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },

    /// A safetensors file, or the index of several, that is damaged.
    #[error("{}: {reason}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which tensor.
        reason: String,
    },

    /// A GGUF file that is damaged, or of a kind that cannot be read.
    #[error("{}: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong, and in which entry or tensor.
        reason: String,
    },

    /// A model that cannot be trained in place.
    #[error("{}: {reason}", path.display())]
    Unsuitable {
        /// The file that says so.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },

    /// A directory that may not become a stage, or is none.
    #[error("{}: {reason}", live_dir.display())]
    Stage {
        /// The live directory.
        live_dir: PathBuf,
        /// Why, and what to do.
        reason: String,
    },

    /// A socket path that is taken.
    #[error("cannot serve on {}: {reason}", socket.display())]
    Socket {
        /// The path.
        socket: PathBuf,
        /// Why.
        reason: String,
    },
}

impl Error {
    pub(crate) fn io(action: &str, path: &Path, error: impl Into<std::io::Error>) -> Self {
        Error::Io { action: action.to_owned(), path: path.to_owned(), error: error.into() }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" by pid {pid}")).unwrap_or_default()
}
