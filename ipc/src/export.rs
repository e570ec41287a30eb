//! Weights in memory that others can open, exported: the server's side, for an engine of our own.
//!
//! [`SharedWeights`] holds every tensor of the model in one allocation, 256-byte aligned: a memfd, sealed against being
//! resized, so that no reader of it can meet SIGBUS, or memory of a GPU. [`SharedWeights::serve`] hands its manifest out over a
//! Unix socket and lends the weights to one trainer at a time.

use crate::cuda::OwnMemory;
use crate::lend::{CONNECTIONS_MAX, Engine, Lender};
use crate::manifest::{Allocation, ManifestTensor, Writer};
use crate::mapping::Mapping;
use crate::{Error, LiveTensor, Manifest, Memory, SafetensorsDir, random_epoch, tied_head_copy};
use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use weight_map::{HfTensor, Packing, Role, ServerTensor, View, WeightMap};

/// Every tensor starts at a multiple of this many bytes.
const ALIGNMENT: u64 = 256;

/// The one allocation.
#[derive(Debug)]
enum Held {
    Host {
        // The descriptor is what `/proc/PID/fd/N` in the manifest names, so it stays open.
        _memory: File,
        mapping: Mapping,
    },
    Cuda(OwnMemory),
}

/// A model's weights in memory that others can open.
#[derive(Debug)]
pub struct SharedWeights {
    held: Held,
    map: WeightMap,
    by_name: HashMap<String, usize>,
    manifest: Manifest,
}

impl SharedWeights {
    /// Loads exactly the tensors in `expected` from the safetensors files of `model_dir`, in their dtype: into memory of
    /// the GPU with the UUID `gpu`, if there is one, and else into shared memory.
    ///
    /// # Errors
    /// The files do not hold exactly these tensors (a head that copies the embedding of a tied model aside);
    /// one of them is of a type that cannot be trained; there is no memory, or no such GPU.
    pub fn load(model_dir: &Path, expected: &[HfTensor], gpu: Option<&str>) -> Result<SharedWeights, Error> {
        SharedWeights::load_checked(model_dir, expected, gpu, |_, _| Ok(()))
    }

    /// [`SharedWeights::load`] that shows every tensor to `check`, by its name in the files and with its bytes, as soon as
    /// it is read.
    ///
    /// # Errors
    /// Those of [`SharedWeights::load`], and of `check`.
    pub fn load_checked<E: From<Error>>(
        model_dir: &Path,
        expected: &[HfTensor],
        gpu: Option<&str>,
        mut check: impl FnMut(&str, &[u8]) -> Result<(), E>,
    ) -> Result<SharedWeights, E> {
        let model_dir = fs::canonicalize(model_dir).map_err(|source| Error::io("find", model_dir, source))?;
        let dir = SafetensorsDir::open(&model_dir)?;
        let (files, in_files) = mapped_files(&dir, expected)?;
        let (map, bytes) = laid_out(&in_files);
        let mut read = |file_view: &View, out: &mut [u8]| {
            let name = &files[file_view.server_tensor].name;
            dir.read_into(name, out)?;
            check(name, out)
        };
        let pairs = map.views.iter().zip(&in_files.views);
        let (held, allocation) = match gpu {
            None => {
                let (memory, mapping, path) = shared_memory(bytes)?;
                for (view, file_view) in pairs {
                    let tensor = mapping.tensor(view);
                    // SAFETY: the memory was made above and nobody else knows of it yet, so this is the only
                    // reference to these bytes, which the mapping holds (Mapping::tensor asserts the range).
                    let out = unsafe { std::slice::from_raw_parts_mut(tensor.host().as_ptr(), tensor.bytes) };
                    read(file_view, out)?;
                }
                let held = Held::Host { _memory: memory, mapping };
                (held, Allocation::File { path, bytes, writable_by: Writer::Trainer })
            }
            Some(uuid) => {
                let memory = OwnMemory::allocate(uuid, bytes)?;
                for (view, file_view) in pairs {
                    let mut tensor = vec![0; view.bytes()];
                    read(file_view, &mut tensor)?;
                    memory.write(view.offset, &tensor)?;
                }
                let allocation = memory.described();
                (Held::Cuda(memory), allocation)
            }
        };
        let manifest = manifest_of(model_dir, &map, allocation)?;
        let by_name = map.views.iter().enumerate().map(|(index, view)| (view.name.clone(), index)).collect();
        Ok(SharedWeights { held, map, by_name, manifest })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.map.views.len()
    }

    /// Whether the expected list was empty.
    pub fn is_empty(&self) -> bool {
        self.map.views.is_empty()
    }

    /// Where each tensor lies, in the order of the expected list.
    pub fn map(&self) -> &WeightMap {
        &self.map
    }

    /// Expected tensor `index`, in place.
    ///
    /// # Panics
    /// If `index` is not below [`SharedWeights::len`].
    pub fn tensor(&self, index: usize) -> LiveTensor<'_> {
        let view = &self.map.views[index];
        match &self.held {
            Held::Host { mapping, .. } => mapping.tensor(view),
            Held::Cuda(memory) => LiveTensor::new(view, Memory::Cuda(memory.base() + view.offset)),
        }
    }

    /// The tensor of this Hugging Face name, in place.
    pub fn find(&self, name: &str) -> Option<LiveTensor<'_>> {
        self.by_name.get(name).map(|&index| self.tensor(index))
    }

    /// What a trainer is told. Valid while this process lives and holds the weights.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The name of this load, 32 hex digits.
    pub fn epoch(&self) -> &str {
        &self.manifest.epoch
    }

    /// Lends the weights out over a Unix socket (mode 0600), from a thread of its own, until the handle is
    /// dropped. A socket that a dead process left behind is replaced. `engine` does what a trainer may ask for;
    /// `Arc::new(())` does nothing.
    ///
    /// # Errors
    /// The path is taken by a living exporter or by something that is no socket, or it is too long.
    pub fn serve(self: &Arc<Self>, socket: &Path, engine: Arc<dyn Engine>) -> Result<ExportHandle, Error> {
        let listener = listen(socket)?;
        let manifest = Manifest { server: engine.server(), controls: engine.controls(), ..self.manifest.clone() };
        let lender = Arc::new(Lender::new(Arc::clone(self), manifest, engine));
        let thread = std::thread::Builder::new()
            .name("weight-export".into())
            .spawn({
                let lender = Arc::clone(&lender);
                let listener = listener.try_clone().map_err(|source| Error::io("serve on", socket, source))?;
                move || lender.accept(&listener)
            })
            .map_err(|source| Error::io("start a thread for", socket, source))?;
        Ok(ExportHandle { socket: socket.to_owned(), listener, lender, thread: Some(thread) })
    }
}

/// The files' tensors as the model's, in expected order; a head that copies the embedding is left out.
fn mapped_files(dir: &SafetensorsDir, expected: &[HfTensor]) -> Result<(Vec<ServerTensor>, WeightMap), Error> {
    let tied = !expected.iter().any(|tensor| tensor.role == Role::Head);
    let copy = tied_head_copy(dir, tied)?;
    let files: Vec<_> =
        dir.server_tensors()?.into_iter().filter(|tensor| copy.as_ref() != Some(&tensor.name)).collect();
    let map = weight_map::map(expected, &files, &[])
        .map_err(|reason| Error::Map { origin: dir.dir().display().to_string(), reason: Box::new(reason) })?;
    // What holds several of them is how servers have it, not what loaders of files look for.
    if let Some(view) =
        map.views.iter().find(|view| files[view.server_tensor].shape.iter().product::<usize>() != view.elements())
    {
        let held = &files[view.server_tensor];
        let reason =
            format!("tensor `{}` is not `{}` alone; save the model again with save_pretrained", held.name, view.name);
        return Err(Error::Unsuitable { path: dir.shards()[held.allocation].path.clone(), reason });
    }
    Ok((files, map))
}

/// The same tensors one after the other in one allocation, and its size in bytes.
fn laid_out(held: &WeightMap) -> (WeightMap, u64) {
    let mut map = held.clone();
    let mut end = 0;
    for (index, view) in map.views.iter_mut().enumerate() {
        view.server_tensor = index;
        view.allocation = 0;
        view.offset = end;
        end = (end + view.bytes() as u64).next_multiple_of(ALIGNMENT);
    }
    (map, end.max(ALIGNMENT))
}

/// Sealed shared memory of this size, mapped, and the path under which others find it.
fn shared_memory(bytes: u64) -> Result<(File, Mapping, PathBuf), Error> {
    let name = Path::new("memfd:apollod-weights");
    let io = |action: &str, error: rustix::io::Errno| Error::io(action, name, error);
    let memory = memfd_create("apollod-weights", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|error| io("create", error))?;
    rustix::fs::ftruncate(&memory, bytes).map_err(|error| io("size", error))?;
    fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|error| io("seal", error))?;
    let memory = File::from(memory);
    let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()));
    let mapping = Mapping::of(&memory, &path, bytes)?;
    Ok((memory, mapping, path))
}

fn manifest_of(model_dir: PathBuf, map: &WeightMap, allocation: Allocation) -> Result<Manifest, Error> {
    let tensors = map
        .views
        .iter()
        .map(|view| ManifestTensor {
            name: view.name.clone(),
            dtype: view.dtype.to_string(),
            shape: view.shape.clone(),
            strides: (0..view.shape.len()).map(|axis| view.shape[axis + 1..].iter().product()).collect(),
            allocation: 0,
            offset: view.offset,
        })
        .collect();
    Ok(Manifest {
        version: 1,
        epoch: random_epoch()?,
        pid: std::process::id(),
        model_dir,
        rank: 0,
        world_size: 1,
        allocations: vec![allocation],
        tensors,
        packing: Vec::<Packing>::new(),
        server: None,
        controls: Vec::new(),
    })
}

/// A listening socket that only this user can open, from the moment it exists.
fn listen(path: &Path) -> Result<UnixListener, Error> {
    let refuse = |reason: String| Error::Socket { socket: path.to_owned(), reason };
    let address = SocketAddrUnix::new(path).map_err(|error| {
        refuse(format!("{error}; a socket path has at most 107 bytes, this one has {}", path.as_os_str().len()))
    })?;
    remove_stale(path)?;
    let io = |error: rustix::io::Errno| Error::io("serve on", path, error);
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).map_err(io)?;
    // On Linux the mode of the descriptor becomes that of the file that bind makes.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(io)?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT) => return Err(refuse("its folder is not there: create it first".into())),
        Err(rustix::io::Errno::ADDRINUSE) => return Err(refuse("another process has just taken it".into())),
        Err(error) => return Err(io(error)),
    }
    rustix::net::listen(&socket, CONNECTIONS_MAX as i32).map_err(io)?;
    Ok(socket.into())
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<(), Error> {
    let refuse = |reason: &str| Err(Error::Socket { socket: path.to_owned(), reason: reason.to_owned() });
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::io("inspect", path, source)),
    };
    if !metadata.file_type().is_socket() {
        return refuse("there is something else than a socket; choose another path");
    }
    match UnixStream::connect(path) {
        Ok(_) => refuse("a living exporter serves on it; stop that one or choose another path"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| Error::io("remove the stale socket", path, source))
        }
        Err(source) => Err(Error::io("probe", path, source)),
    }
}

/// A running export. Dropping it ends every connection and removes the socket.
#[derive(Debug)]
pub struct ExportHandle {
    socket: PathBuf,
    listener: UnixListener,
    lender: Arc<Lender>,
    thread: Option<JoinHandle<()>>,
}

impl ExportHandle {
    /// The path of the socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process that has the lease.
    pub fn leased_by(&self) -> Option<u32> {
        self.lender.leased_by()
    }
}

impl Drop for ExportHandle {
    fn drop(&mut self) {
        self.lender.stop();
        // Best effort on the way out.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = fs::remove_file(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
