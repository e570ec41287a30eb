//! Attaching to a server's weights, and knowing whether it is still there.
//!
//! The order of [`Attachment::open`] is the contract: identity and lease first, then the manifest, the
//! mappings, and the mapping to the model's tensors. Only a complete attachment hands out pointers, so a
//! wrong shape or a missing tensor is refused before the first byte could be written.

use crate::connection::{Connection, Greeting};
use crate::cuda::{Described, DeviceMemory};
use crate::lease::Lease;
use crate::manifest::DOCUMENT_BYTES_MAX;
use crate::mapping::{FileId, Mapping, file_id};
use crate::process::{FileSet, Process, check_user, holds, mapped_by, wait_for};
use crate::stage::{STAGE_LEASE, StageMarker};
use crate::{
    Allocation, Control, CudaDevice, Error, GGUF_FILE, GgufFile, Gone, LiveTensor, Manifest, Memory, SafetensorsDir,
    Server, Writer,
};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use weight_map::{HfTensor, WeightMap};

/// Where the weights are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The Unix socket of an exporter.
    Socket(PathBuf),
    /// A manifest in a file.
    Manifest(PathBuf),
    /// A live copy of a model directory, made by [`crate::stage`].
    Staged(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Socket(path) => write!(f, "socket {}", path.display()),
            Source::Manifest(path) => write!(f, "manifest {}", path.display()),
            Source::Staged(path) => write!(f, "live copy {}", path.display()),
        }
    }
}

/// Live weights, leased: their memory, the place of every tensor, and the watch on the server.
///
/// Dropped, it lets go of the memory first (on a GPU when nothing runs on it any more) and of the lease after that:
/// the order of the fields.
#[derive(Debug)]
pub struct Attachment {
    source: Source,
    epoch: String,
    model_dir: PathBuf,
    memory: Opened,
    map: WeightMap,
    by_name: HashMap<String, usize>,
    server: Mutex<Option<Arc<Process>>>,
    server_program: Option<Server>,
    controls: Vec<Control>,
    pub(crate) connection: Option<Connection>,
    staged_files: Option<FileSet>,
    _lease: Option<Lease>,
}

/// The memory of the weights, opened.
#[derive(Debug)]
enum Opened {
    /// One mapping per allocation.
    Host(Vec<Mapping>),
    /// On a GPU.
    Cuda(DeviceMemory),
}

/// What one of the three ways in has found, before anything is mapped to the model.
struct Found {
    epoch: String,
    model_dir: PathBuf,
    tensors: Vec<weight_map::ServerTensor>,
    packing: Vec<weight_map::Packing>,
    allocations: Vec<Allocation>,
    server: Option<Process>,
    server_program: Option<Server>,
    controls: Vec<Control>,
    connection: Option<Connection>,
    lease: Option<Lease>,
    staged: bool,
    /// Where the weights are those of llama.cpp.
    gguf: Option<GgufFile>,
}

impl Attachment {
    /// Attaches to `source`, whose server must hold exactly the tensors in `expected`, and takes the lease.
    ///
    /// # Errors
    /// Whatever is not exactly as it should be, by name; no byte of a weight has been written then.
    pub fn open(source: &Source, expected: &[HfTensor]) -> Result<Attachment, Error> {
        let found = match source {
            Source::Socket(path) => by_socket(path, source)?,
            Source::Manifest(path) => by_manifest(path, source)?,
            Source::Staged(path) => by_stage(path)?,
        };
        let mut map = weight_map::map(expected, &found.tensors, &found.packing)
            .map_err(|reason| Error::Map { origin: source.to_string(), reason: Box::new(reason) })?;
        if let Some(gguf) = &found.gguf {
            gguf.order_rows(&mut map)?;
        }
        let memory = open_allocations(&found)?;
        let mut staged_files = found.staged.then(FileSet::default);
        if let Some(files) = &mut staged_files {
            files_of(&found.allocations).try_for_each(|(path, _)| files.add(path))?;
        }
        let by_name = map.views.iter().enumerate().map(|(index, view)| (view.name.clone(), index)).collect();
        let attachment = Attachment {
            source: source.clone(),
            epoch: found.epoch,
            model_dir: found.model_dir,
            memory,
            map,
            by_name,
            server: Mutex::new(found.server.map(Arc::new)),
            server_program: found.server_program,
            controls: found.controls,
            connection: found.connection,
            staged_files,
            _lease: found.lease,
        };
        attachment.refresh_server()?;
        attachment.check()?;
        Ok(attachment)
    }

    /// What it is attached to.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The name of this load of the weights, 32 hex digits. A staged copy keeps its epoch when the server
    /// is started again, because its weights stay.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// The server's process id. None for a staged copy that no server has mapped so far.
    pub fn pid(&self) -> Option<u32> {
        self.server().map(|server| server.pid())
    }

    /// The server's program, where its manifest names it.
    pub fn server_program(&self) -> Option<&Server> {
        self.server_program.as_ref()
    }

    /// What the server can be asked for; nothing without a socket.
    pub fn controls(&self) -> &[Control] {
        &self.controls
    }

    /// The model directory that was loaded.
    pub fn model_dir(&self) -> &Path {
        &self.model_dir
    }

    /// Where each expected tensor lies, in the order of the expected list.
    pub fn map(&self) -> &WeightMap {
        &self.map
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.map.views.len()
    }

    /// Whether the expected list was empty.
    pub fn is_empty(&self) -> bool {
        self.map.views.is_empty()
    }

    /// Expected tensor `index`, in place.
    ///
    /// # Panics
    /// If `index` is not below [`Attachment::len`].
    pub fn tensor(&self, index: usize) -> LiveTensor<'_> {
        let view = &self.map.views[index];
        match &self.memory {
            Opened::Host(mappings) => mappings[view.allocation].tensor(view),
            Opened::Cuda(memory) => LiveTensor::new(view, Memory::Cuda(memory.address(view))),
        }
    }

    /// The GPU that the weights lie on; none if they lie in the machine's memory.
    pub fn device(&self) -> Option<&CudaDevice> {
        match &self.memory {
            Opened::Host(_) => None,
            Opened::Cuda(memory) => Some(memory.device()),
        }
    }

    /// The tensor of this Hugging Face name, in place.
    pub fn find(&self, name: &str) -> Option<LiveTensor<'_>> {
        self.by_name.get(name).map(|&index| self.tensor(index))
    }

    /// Whether the server is there; see [`Attachment::check`].
    pub fn alive(&self) -> bool {
        self.check().is_ok()
    }

    /// Checks that the server still lives and still grants the lease. A few system calls, so it can be
    /// called before every write. A staged copy that no server has mapped yet counts as alive.
    ///
    /// # Errors
    /// [`Gone`], which says which server.
    pub fn check(&self) -> Result<(), Gone> {
        if let Some(server) = self.server()
            && server.exited()
        {
            return Err(self.gone(Some(server.pid()), "the process has ended"));
        }
        if self.connection.as_ref().is_some_and(Connection::is_closed) {
            return Err(self.gone(self.pid(), "it closed the connection"));
        }
        Ok(())
    }

    /// Sleeps until the server is gone, at most for `timeout`; see [`Attachment::check`]. Other threads may use the
    /// attachment meanwhile.
    ///
    /// # Errors
    /// [`Gone`], within a millisecond or so of its end.
    pub fn watch(&self, timeout: Duration) -> Result<(), Gone> {
        wait_for(self.server().as_deref(), self.connection.as_ref().map(Connection::stream), timeout);
        self.check()
    }

    /// Looks again for a server of a staged copy, unless the known one lives. Returns its process id. Other
    /// sources have one server for life.
    ///
    /// # Errors
    /// The processes cannot be listed.
    pub fn refresh_server(&self) -> Result<Option<u32>, Error> {
        let mut server = self.lock_server();
        if let Some(files) = &self.staged_files
            && server.as_deref().is_none_or(Process::exited)
        {
            for pid in mapped_by(files)? {
                if let Some(process) = Process::watch(pid)? {
                    *server = Some(Arc::new(process));
                    break;
                }
            }
        }
        Ok(server.as_deref().filter(|server| !server.exited()).map(Process::pid))
    }

    pub(crate) fn gone(&self, pid: Option<u32>, how: impl Into<String>) -> Gone {
        Gone { pid, source_name: self.source.to_string(), how: how.into() }
    }

    fn server(&self) -> Option<Arc<Process>> {
        self.lock_server().clone()
    }

    fn lock_server(&self) -> std::sync::MutexGuard<'_, Option<Arc<Process>>> {
        self.server.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn watch(pid: u32, source: &Source) -> Result<Process, Error> {
    let gone = || Gone { pid: Some(pid), source_name: source.to_string(), how: "there is no such process".into() };
    Process::watch(pid)?.ok_or_else(|| gone().into())
}

fn by_socket(socket: &Path, source: &Source) -> Result<Found, Error> {
    let Greeting { connection, manifest, peer } = Connection::open(socket)?;
    let manifest = parse(&manifest, source)?;
    if peer != manifest.pid {
        return Err(Error::PeerPid { socket: socket.to_owned(), manifest: manifest.pid, peer });
    }
    let server = watch(manifest.pid, source)?;
    let controls = manifest.controls.clone();
    let mut found = described(manifest, source, server)?;
    // Only a socket can be asked.
    (found.connection, found.controls) = (Some(connection), controls);
    Ok(found)
}

fn by_manifest(path: &Path, source: &Source) -> Result<Found, Error> {
    let metadata = std::fs::metadata(path).map_err(|error| Error::io("inspect", path, error))?;
    check_user(path, metadata.uid())?;
    if metadata.len() > DOCUMENT_BYTES_MAX {
        return Err(Error::Allocation { path: path.to_owned(), reason: "too long for a manifest".into() });
    }
    let mut lease = path.as_os_str().to_owned();
    lease.push(STAGE_LEASE);
    let lease = Lease::take(Path::new(&lease))?;
    let document = std::fs::read(path).map_err(|error| Error::io("read", path, error))?;
    let manifest = parse(&document, source)?;
    let server = watch(manifest.pid, source)?;
    let mut found = described(manifest, source, server)?;
    found.lease = Some(lease);
    Ok(found)
}

fn parse(document: &[u8], source: &Source) -> Result<Manifest, Error> {
    Manifest::parse(document).map_err(|reason| Error::Manifest { origin: source.to_string(), reason: Box::new(reason) })
}

fn described(manifest: Manifest, source: &Source, server: Process) -> Result<Found, Error> {
    // A manifest in a file outlives its server, and process ids are used again; one from a socket may name any file.
    // (A handle of CUDA's says itself whose memory it is, and the driver knows whether that is still there.)
    for (path, _) in files_of(&manifest.allocations) {
        let mut files = FileSet::default();
        files.add(path)?;
        if !holds(manifest.pid, &files) {
            return Err(Error::Stale { pid: manifest.pid, path: path.to_owned() });
        }
    }
    let tensors = manifest
        .server_tensors()
        .map_err(|reason| Error::Manifest { origin: source.to_string(), reason: Box::new(reason) })?;
    for allocation in &manifest.allocations {
        match allocation {
            Allocation::File { path, writable_by: Writer::Nobody, .. } => {
                let reason = "its server says that nobody may write to it".into();
                return Err(Error::Allocation { path: path.clone(), reason });
            }
            Allocation::CudaIpc { .. } if manifest.pid == std::process::id() => {
                return Err(Error::OwnMemory { pid: manifest.pid });
            }
            Allocation::File { .. } | Allocation::CudaIpc { .. } => {}
        }
    }
    Ok(Found {
        epoch: manifest.epoch,
        model_dir: manifest.model_dir,
        tensors,
        packing: manifest.packing,
        allocations: manifest.allocations,
        server: Some(server),
        server_program: manifest.server,
        controls: Vec::new(),
        connection: None,
        lease: None,
        staged: false,
        gguf: None,
    })
}

fn by_stage(live_dir: &Path) -> Result<Found, Error> {
    let refuse = |reason: &str| Error::Stage { live_dir: live_dir.to_owned(), reason: reason.to_owned() };
    if StageMarker::read(live_dir)?.is_none() {
        return Err(refuse("it is no live copy; make one with `apollod stage MODEL LIVE` and serve from that"));
    }
    // The lease comes before the marker counts: staging holds it too.
    let lease = Lease::take(&live_dir.join(STAGE_LEASE))?;
    let marker = StageMarker::read(live_dir)?
        .filter(|marker| marker.complete)
        .ok_or_else(|| refuse("its staging was interrupted; stage it again"))?;
    let path = live_dir.join(GGUF_FILE);
    let gguf = path.exists().then(|| GgufFile::open(&path)).transpose()?;
    let file = |path: PathBuf, bytes| Allocation::File { path, bytes, writable_by: Writer::Trainer };
    let (tensors, allocations) = match &gguf {
        Some(gguf) => (gguf.server_tensors()?, vec![file(path, gguf.len())]),
        None => {
            let dir = SafetensorsDir::open(live_dir)?;
            let allocations = dir.shards().iter().map(|shard| file(shard.path.clone(), shard.bytes)).collect();
            (dir.server_tensors()?, allocations)
        }
    };
    Ok(Found {
        epoch: marker.epoch,
        model_dir: marker.model_dir,
        tensors,
        packing: Vec::new(),
        allocations,
        server: None,
        server_program: None,
        controls: Vec::new(),
        connection: None,
        lease: Some(lease),
        staged: true,
        gguf,
    })
}

/// Path and bytes of the allocations that are files.
fn files_of(allocations: &[Allocation]) -> impl Iterator<Item = (&Path, u64)> {
    allocations.iter().filter_map(|allocation| match allocation {
        Allocation::File { path, bytes, .. } => Some((path.as_path(), *bytes)),
        Allocation::CudaIpc { .. } => None,
    })
}

/// Opens every allocation; a valid manifest has them all in one place.
fn open_allocations(found: &Found) -> Result<Opened, Error> {
    let mut device = None;
    let mut handles = Vec::new();
    for allocation in &found.allocations {
        if let Allocation::CudaIpc { handle, bytes, device: uuid } = allocation {
            device = Some(uuid);
            handles.push(Described { handle, bytes: *bytes });
        }
    }
    match device {
        Some(uuid) => DeviceMemory::open(uuid, &handles).map(Opened::Cuda),
        None => map_files(found).map(Opened::Host),
    }
}

/// Maps every file, none of which may be another one, or a file of the model directory.
fn map_files(found: &Found) -> Result<Vec<Mapping>, Error> {
    let model_files = model_files(&found.model_dir)?;
    let mut seen = HashSet::new();
    let mut mappings = Vec::with_capacity(found.allocations.len());
    for (path, bytes) in files_of(&found.allocations) {
        let (mapping, id) = Mapping::open(path, bytes)?;
        let refuse = |reason: &str| Err(Error::Allocation { path: path.to_owned(), reason: reason.to_owned() });
        if !seen.insert(id) {
            return refuse("the same memory is listed under two paths");
        }
        if model_files.contains(&id) {
            return refuse(
                "it is a file of the model directory, which only a sync may write; serve a live copy (`apollod stage MODEL LIVE`)",
            );
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn model_files(model_dir: &Path) -> Result<HashSet<FileId>, Error> {
    let entries =
        std::fs::read_dir(model_dir).map_err(|source| Error::io("list the model directory", model_dir, source))?;
    Ok(entries.flatten().filter_map(|entry| std::fs::metadata(entry.path()).ok()).map(|m| file_id(&m)).collect())
}
