//! Attaching to a server's weights, and knowing whether it is still there.
//!
//! The order of [`Attachment::open`] is the contract: identity and lease first, then the manifest, the
//! mappings, and the mapping to the model's tensors. Only a complete attachment hands out pointers, so a
//! wrong shape or a missing tensor is refused before the first byte could be written.

use crate::lease::Lease;
use crate::manifest::DOCUMENT_BYTES_MAX;
use crate::mapping::{FileId, Mapping, file_id};
use crate::process::{FileSet, Process, holds, mapped_by};
use crate::protocol::{HELLO, Pong, Refusal, Request, read_line, write_line};
use crate::stage::{STAGE_LEASE, StageMarker};
use crate::{Allocation, Error, GGUF_FILE, GgufFile, Gone, LiveTensor, Manifest, SafetensorsDir, Writer};
use rustix::net::RecvFlags;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::BufReader;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use weight_map::{HfTensor, WeightMap};

/// How long an exporter may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

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

/// Live weights, leased: the mappings, the place of every tensor, and the watch on the server.
#[derive(Debug)]
pub struct Attachment {
    source: Source,
    epoch: String,
    model_dir: PathBuf,
    mappings: Vec<Mapping>,
    map: WeightMap,
    by_name: HashMap<String, usize>,
    server: Mutex<Option<Process>>,
    connection: Option<Mutex<Connection>>,
    staged_files: Option<FileSet>,
    _lease: Option<Lease>,
}

#[derive(Debug)]
struct Connection {
    reader: BufReader<UnixStream>,
    pings: u64,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Closing would do, but not while a child that is being started still has a copy of the descriptor.
        let _ = self.reader.get_ref().shutdown(std::net::Shutdown::Both);
    }
}

/// What one of the three ways in has found, before anything is mapped to the model.
struct Found {
    epoch: String,
    model_dir: PathBuf,
    tensors: Vec<weight_map::ServerTensor>,
    packing: Vec<weight_map::Packing>,
    /// Path and bytes of each allocation.
    allocations: Vec<(PathBuf, u64)>,
    server: Option<Process>,
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
        let mappings = map_allocations(&found)?;
        let mut staged_files = found.staged.then(FileSet::default);
        if let Some(files) = &mut staged_files {
            found.allocations.iter().try_for_each(|(path, _)| files.add(path))?;
        }
        let by_name = map.views.iter().enumerate().map(|(index, view)| (view.name.clone(), index)).collect();
        let attachment = Attachment {
            source: source.clone(),
            epoch: found.epoch,
            model_dir: found.model_dir,
            mappings,
            map,
            by_name,
            server: Mutex::new(found.server),
            connection: found.connection.map(Mutex::new),
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
        self.lock_server().as_ref().map(Process::pid)
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
        self.mappings[view.allocation].tensor(view)
    }

    /// The tensor of this Hugging Face name, in place.
    pub fn find(&self, name: &str) -> Option<LiveTensor<'_>> {
        self.by_name.get(name).map(|&index| self.tensor(index))
    }

    /// Whether the server is there; see [`Attachment::check`].
    pub fn alive(&self) -> bool {
        self.check().is_ok()
    }

    /// Checks that the server still lives and still grants the lease. Two system calls at most, so it can be
    /// called before every write. A staged copy that no server has mapped yet counts as alive.
    ///
    /// # Errors
    /// [`Gone`], which says which server.
    pub fn check(&self) -> Result<(), Gone> {
        if let Some(server) = self.lock_server().as_ref()
            && server.exited()
        {
            return Err(self.gone(Some(server.pid()), "the process has ended"));
        }
        // While a ping holds the connection, the ping is what notices its end.
        if let Some(Ok(connection)) = self.connection.as_ref().map(Mutex::try_lock)
            && is_closed(connection.reader.get_ref())
        {
            return Err(self.gone(self.pid(), "it closed the connection"));
        }
        Ok(())
    }

    /// Asks an exporter for a sign of life, which also notices one that hangs or has loaded other weights.
    /// Other sources are only checked.
    ///
    /// # Errors
    /// [`Gone`] if no answer comes within `timeout`, or one of another epoch.
    pub fn ping(&self, timeout: Duration) -> Result<(), Gone> {
        self.check()?;
        let Some(connection) = &self.connection else { return Ok(()) };
        let mut connection = lock(connection);
        connection.pings += 1;
        let number = connection.pings;
        let silent = |how: String| self.gone(self.pid(), how);
        connection
            .reader
            .get_ref()
            .set_read_timeout(Some(timeout.max(Duration::from_millis(1))))
            .and_then(|()| write_line(connection.reader.get_ref(), &Request::Ping(number)))
            .map_err(|error| silent(format!("it cannot be reached: {error}")))?;
        loop {
            let line = read_line(&mut connection.reader, DOCUMENT_BYTES_MAX)
                .map_err(|error| silent(format!("no answer within {timeout:?}: {error}")))?
                .ok_or_else(|| silent("it closed the connection".into()))?;
            let pong: Pong =
                serde_json::from_slice(&line).map_err(|error| silent(format!("its answer cannot be read: {error}")))?;
            if pong.epoch != self.epoch {
                return Err(silent(format!("it now holds epoch {}, attached was {}", pong.epoch, self.epoch)));
            }
            // Answers to earlier pings that timed out come first.
            if pong.pong == number {
                return Ok(());
            }
        }
    }

    /// Looks again for a server of a staged copy, unless the known one lives. Returns its process id. Other
    /// sources have one server for life.
    ///
    /// # Errors
    /// The processes cannot be listed.
    pub fn refresh_server(&self) -> Result<Option<u32>, Error> {
        let mut server = self.lock_server();
        if let Some(files) = &self.staged_files
            && server.as_ref().is_none_or(Process::exited)
        {
            for pid in mapped_by(files)? {
                if let Some(process) = Process::watch(pid)? {
                    *server = Some(process);
                    break;
                }
            }
        }
        Ok(server.as_ref().filter(|server| !server.exited()).map(Process::pid))
    }

    fn gone(&self, pid: Option<u32>, how: impl Into<String>) -> Gone {
        Gone { pid, source_name: self.source.to_string(), how: how.into() }
    }

    fn lock_server(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        lock(&self.server)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Whether the other end has closed the connection.
fn is_closed(stream: &UnixStream) -> bool {
    let mut byte = [0u8; 1];
    match rustix::net::recv(stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, received)) => received == 0,
        Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => false,
        Err(_) => true,
    }
}

fn check_user(path: &Path, owner: u32) -> Result<(), Error> {
    let own = rustix::process::geteuid().as_raw();
    if owner == own || owner == 0 { Ok(()) } else { Err(Error::User { path: path.to_owned(), owner, own }) }
}

fn watch(pid: u32, source: &Source) -> Result<Process, Error> {
    let gone = || Gone { pid: Some(pid), source_name: source.to_string(), how: "there is no such process".into() };
    Process::watch(pid)?.ok_or_else(|| gone().into())
}

fn by_socket(socket: &Path, source: &Source) -> Result<Found, Error> {
    let stream = UnixStream::connect(socket).map_err(|error| Error::io("connect to", socket, error))?;
    let peer =
        rustix::net::sockopt::socket_peercred(&stream).map_err(|error| Error::io("ask who serves", socket, error))?;
    check_user(socket, peer.uid.as_raw())?;
    let io = |error| Error::io("talk to", socket, error);
    stream.set_read_timeout(Some(HANDSHAKE)).and_then(|()| stream.set_write_timeout(Some(HANDSHAKE))).map_err(io)?;
    write_line(&stream, &Request::Hello(HELLO)).map_err(io)?;
    let mut reader = BufReader::new(stream);
    let line = read_line(&mut reader, DOCUMENT_BYTES_MAX).map_err(io)?.ok_or_else(|| Error::Protocol {
        socket: socket.to_owned(),
        reason: "it closed the connection without an answer".into(),
    })?;
    if let Ok(refusal) = serde_json::from_slice::<Refusal>(&line) {
        return Err(Error::Refused { socket: socket.to_owned(), reason: refusal.error });
    }
    let manifest = parse(&line, source)?;
    let peer = peer.pid.as_raw_nonzero().get().unsigned_abs();
    if peer != manifest.pid {
        return Err(Error::PeerPid { socket: socket.to_owned(), manifest: manifest.pid, peer });
    }
    let server = watch(manifest.pid, source)?;
    let mut found = described(manifest, source, server)?;
    found.connection = Some(Connection { reader, pings: 0 });
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
    // A manifest outlives its server, and process ids are used again: the process must hold the memory.
    for Allocation::File { path, .. } in &manifest.allocations {
        let mut files = FileSet::default();
        files.add(path)?;
        if !holds(manifest.pid, &files) {
            return Err(Error::Stale { pid: manifest.pid, path: path.clone() });
        }
    }
    let mut found = described(manifest, source, server)?;
    found.lease = Some(lease);
    Ok(found)
}

fn parse(document: &[u8], source: &Source) -> Result<Manifest, Error> {
    Manifest::parse(document).map_err(|reason| Error::Manifest { origin: source.to_string(), reason: Box::new(reason) })
}

fn described(manifest: Manifest, source: &Source, server: Process) -> Result<Found, Error> {
    let tensors = manifest
        .server_tensors()
        .map_err(|reason| Error::Manifest { origin: source.to_string(), reason: Box::new(reason) })?;
    let mut allocations = Vec::with_capacity(manifest.allocations.len());
    for Allocation::File { path, bytes, writable_by } in manifest.allocations {
        if writable_by == Writer::Nobody {
            return Err(Error::Allocation { path, reason: "its server says that nobody may write to it".into() });
        }
        allocations.push((path, bytes));
    }
    Ok(Found {
        epoch: manifest.epoch,
        model_dir: manifest.model_dir,
        tensors,
        packing: manifest.packing,
        allocations,
        server: Some(server),
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
    let (tensors, allocations) = match &gguf {
        Some(gguf) => (gguf.server_tensors()?, vec![(path, gguf.len())]),
        None => {
            let dir = SafetensorsDir::open(live_dir)?;
            let allocations = dir.shards().iter().map(|shard| (shard.path.clone(), shard.bytes)).collect();
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
        connection: None,
        lease: Some(lease),
        staged: true,
        gguf,
    })
}

/// Maps every allocation, none of which may be another one, or a file of the model directory.
fn map_allocations(found: &Found) -> Result<Vec<Mapping>, Error> {
    let model_files = model_files(&found.model_dir)?;
    let mut seen = HashSet::new();
    let mut mappings = Vec::with_capacity(found.allocations.len());
    for (path, bytes) in &found.allocations {
        let (mapping, id) = Mapping::open(path, *bytes)?;
        let refuse = |reason: &str| Err(Error::Allocation { path: path.clone(), reason: reason.to_owned() });
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
