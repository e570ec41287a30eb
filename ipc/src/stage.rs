//! A live copy of a model directory on tmpfs, for a server that maps its safetensors files, or one GGUF file.
//!
//! The copy is memory, not the model: a server maps the files privately and read-only, the trainer maps
//! them shared and writable, and both see the same pages. The model directory itself is only read here.
//!
//! A marker file says what the directory is. It is written first with `complete: false`, so that an
//! interrupted copy can be recognised and made again, and last with `complete: true`.

use crate::process::{FileSet, mapped_by};
use crate::safetensors_dir::INDEX;
use crate::shard_copy::copy_weights;
use crate::{Error, GGUF_FILE, GgufFile, Lease, SafetensorsDir, random_epoch};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use weight_map::canonical_name;

/// Name of the marker file in a live directory.
pub const STAGE_MARKER: &str = ".apollod-stage.json";
/// Name of the lease file in a live directory.
pub(crate) const STAGE_LEASE: &str = ".apollod.lease";
/// Weights in other formats, which no server of the live copy reads.
const OTHER_WEIGHTS: [&str; 11] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "ggml", "h5", "msgpack", "onnx", "onnx_data"];

/// What a live directory is a copy of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageMarker {
    /// Version of the marker: 1.
    pub version: u32,
    /// Absolute path of the model directory.
    pub model_dir: PathBuf,
    /// 32 hex digits, new with every staging.
    pub epoch: String,
    /// Tensors of the files that were left out because the model ties them to the embedding.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// Whether the copy was finished.
    pub complete: bool,
}

/// What was staged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageReport {
    /// Absolute path of the model directory.
    pub model_dir: PathBuf,
    /// Absolute path of the live copy.
    pub live_dir: PathBuf,
    /// The copy's epoch.
    pub epoch: String,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of files, weights and others.
    pub files: usize,
    /// Bytes of weights.
    pub bytes: u64,
    /// Tensors that were left out because the model ties them to the embedding.
    pub left_out: Vec<String>,
}

impl StageMarker {
    /// Reads the marker of a live directory; None if it has none.
    ///
    /// # Errors
    /// The marker cannot be read or is no marker.
    pub fn read(live_dir: &Path) -> Result<Option<StageMarker>, Error> {
        let path = live_dir.join(STAGE_MARKER);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::io("read", &path, source)),
        };
        let marker: StageMarker = serde_json::from_slice(&text)
            .map_err(|error| refusal(live_dir, format!("its {STAGE_MARKER} is damaged: {error}; stage it anew")))?;
        if marker.version != 1 {
            return Err(refusal(live_dir, format!("its {STAGE_MARKER} has version {}, want 1", marker.version)));
        }
        Ok(Some(marker))
    }

    fn write(&self, live_dir: &Path) -> Result<(), Error> {
        let path = live_dir.join(STAGE_MARKER);
        let text = serde_json::to_vec_pretty(self).expect("a marker is plain data");
        write_whole(&path, &text)
    }
}

/// Copies the model in `model_dir` to `live_dir`, made if need be, and calls `progress` with the bytes of
/// weights done and in all. Links to weights (a Hugging Face cache) are followed, so the copy has files of
/// its own. Staging again replaces the copy and gives it a new epoch.
///
/// # Errors
/// `live_dir` is the model directory, in it or around it; it holds something else; a server maps it or a
/// trainer leases it; the model is quantized, misaligned or damaged; there is no room.
pub fn stage(model_dir: &Path, live_dir: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<StageReport, Error> {
    let mut place = Place::take(model_dir, live_dir)?;
    place.check_room(place.source.shards().iter().map(|shard| shard.bytes).sum())?;
    copy_weights(&place.source, &place.live_dir, &place.marker.left_out, progress)?;
    let copy = SafetensorsDir::open(&place.live_dir)?;
    copy.server_tensors()?;
    let bytes = copy.tensors().iter().map(|tensor| tensor.bytes).sum();
    place.finish(copy.tensors().len(), copy.shards().len(), bytes)
}

/// As [`stage`], with the weights in one GGUF file of `bytes` bytes, which `write` makes at the path it is given.
///
/// # Errors
/// As [`stage`], and those of `write`; what it has written cannot be trained in place.
pub fn stage_gguf<E: From<Error>>(
    model_dir: &Path,
    live_dir: &Path,
    bytes: u64,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<StageReport, E> {
    let mut place = Place::take(model_dir, live_dir)?;
    place.check_room(bytes)?;
    let path = place.live_dir.join(GGUF_FILE);
    let part = part_of(&path);
    write(&part)?;
    fs::rename(&part, &path).map_err(|source| Error::io("rename to", &path, source))?;
    let tensors = GgufFile::open(&path)?.server_tensors()?.len();
    Ok(place.finish(tensors, 1, bytes)?)
}

/// A live directory in which everything but the weights was staged.
struct Place {
    source: SafetensorsDir,
    live_dir: PathBuf,
    marker: StageMarker,
    small_files: usize,
    _lease: Lease,
}

impl Place {
    fn take(model_dir: &Path, live_dir: &Path) -> Result<Place, Error> {
        let model_dir = fs::canonicalize(model_dir).map_err(|source| Error::io("find", model_dir, source))?;
        let source = SafetensorsDir::open(&model_dir)?;
        let config = read_config(&model_dir)?;
        source.server_tensors()?;
        if let Some(name) = source.expert_alone() {
            let reason = format!(
                "the files hold each expert by itself (`{name}`), and transformers stacks them in memory of its own, where training \
                 would not reach them: serve from a program that calls apollod.export, or with the embedded engine"
            );
            return Err(refusal(live_dir, reason));
        }
        let left_out: Vec<String> = tied_head_copy(&source, config.tied())?.into_iter().collect();

        fs::create_dir_all(live_dir).map_err(|source| Error::io("create", live_dir, source))?;
        let live_dir = fs::canonicalize(live_dir).map_err(|source| Error::io("find", live_dir, source))?;
        check_apart(&model_dir, &live_dir)?;
        check_ours(&model_dir, &live_dir)?;
        let lease = Lease::take(&live_dir.join(STAGE_LEASE))?;
        check_unused(&live_dir)?;

        let marker =
            StageMarker { version: 1, model_dir: model_dir.clone(), epoch: random_epoch()?, left_out, complete: false };
        marker.write(&live_dir)?;
        remove_old_weights(&live_dir)?;
        let small_files = copy_small_files(&model_dir, &live_dir, &marker.left_out)?;
        Ok(Place { source, live_dir, marker, small_files, _lease: lease })
    }

    fn check_room(&self, want: u64) -> Result<(), Error> {
        let room = rustix::fs::statvfs(&self.live_dir).map_err(|error| Error::io("measure", &self.live_dir, error))?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        if free < want {
            return Err(refusal(&self.live_dir, format!("{want} bytes are needed, {free} are free")));
        }
        Ok(())
    }

    fn finish(&mut self, tensors: usize, weight_files: usize, bytes: u64) -> Result<StageReport, Error> {
        self.marker.complete = true;
        self.marker.write(&self.live_dir)?;
        Ok(StageReport {
            model_dir: self.marker.model_dir.clone(),
            live_dir: self.live_dir.clone(),
            epoch: self.marker.epoch.clone(),
            tensors,
            files: self.small_files + weight_files,
            bytes,
            left_out: self.marker.left_out.clone(),
        })
    }
}

/// The name of a head that the files hold although the model ties it to the embedding. Loaders ignore it as
/// long as it equals the embedding; a program that writes trained embeddings back must write it too.
///
/// # Errors
/// It differs from the embedding: loaders would then not tie the two.
pub fn tied_head_copy(dir: &SafetensorsDir, tied: bool) -> Result<Option<String>, Error> {
    let named = |wanted: &str| dir.tensors().iter().find(|tensor| canonical_name(&tensor.name) == wanted);
    let (Some(head), Some(embedding), true) = (named("lm_head.weight"), named("model.embed_tokens.weight"), tied)
    else {
        return Ok(None);
    };
    let same_kind = head.shape == embedding.shape && head.dtype_name == embedding.dtype_name;
    if same_kind && dir.bytes(&head.name)? == dir.bytes(&embedding.name)? {
        return Ok(Some(head.name.clone()));
    }
    Err(Error::Unsuitable {
        path: dir.shards()[head.shard].path.clone(),
        reason: format!(
            "config.json ties the head to the embedding, but `{}` and `{}` differ; set tie_word_embeddings to false or remove `{}` from the files",
            head.name, embedding.name, head.name
        ),
    })
}

fn refusal(live_dir: &Path, reason: String) -> Error {
    Error::Stage { live_dir: live_dir.to_owned(), reason }
}

struct Config(serde_json::Value);

impl Config {
    fn tied(&self) -> bool {
        self.0.get("tie_word_embeddings").and_then(serde_json::Value::as_bool).unwrap_or(false)
    }
}

fn read_config(model_dir: &Path) -> Result<Config, Error> {
    let path = model_dir.join("config.json");
    let text = fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
    let unsuitable = |reason| Error::Unsuitable { path: path.clone(), reason };
    let config: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| unsuitable(format!("not JSON: {error}")))?;
    match config.get("quantization_config") {
        Some(quantization) if !quantization.is_null() => {
            let method = quantization.get("quant_method").and_then(|method| method.as_str()).unwrap_or("unknown");
            Err(unsuitable(format!(
                "the model is quantized (quantization_config, method {method}) and cannot be trained in place; stage the unquantized model"
            )))
        }
        _ => Ok(Config(config)),
    }
}

fn check_apart(model_dir: &Path, live_dir: &Path) -> Result<(), Error> {
    if live_dir.starts_with(model_dir) || model_dir.starts_with(live_dir) {
        let reason = format!(
            "the live copy must lie apart from the model directory {}, which only a sync may write; choose a directory on tmpfs, such as one under /dev/shm",
            model_dir.display()
        );
        return Err(refusal(live_dir, reason));
    }
    Ok(())
}

/// Empty, or an earlier stage of the same model.
fn check_ours(model_dir: &Path, live_dir: &Path) -> Result<(), Error> {
    match StageMarker::read(live_dir)? {
        Some(marker) if marker.model_dir == model_dir => Ok(()),
        Some(marker) => {
            let reason = format!(
                "it is the live copy of another model, {}; remove it or choose another directory",
                marker.model_dir.display()
            );
            Err(refusal(live_dir, reason))
        }
        None => {
            let entries = fs::read_dir(live_dir).map_err(|source| Error::io("list", live_dir, source))?;
            let foreign = entries.flatten().map(|entry| entry.file_name()).find(|name| name != STAGE_LEASE);
            match foreign {
                None => Ok(()),
                Some(name) => Err(refusal(
                    live_dir,
                    format!("it is not empty (it holds {name:?}) and no live copy; choose an empty directory"),
                )),
            }
        }
    }
}

/// No server maps what is about to be replaced: it would go on serving pages that nobody trains.
fn check_unused(live_dir: &Path) -> Result<(), Error> {
    let Ok(files) = files_of(live_dir) else { return Ok(()) };
    let pids = mapped_by(&files)?;
    if pids.is_empty() {
        return Ok(());
    }
    Err(refusal(live_dir, format!("pids {pids:?} serve from it; stop them before staging again")))
}

/// The files of weights of a live directory, to be looked for in other processes.
pub(crate) fn files_of(live_dir: &Path) -> Result<FileSet, Error> {
    let gguf = live_dir.join(GGUF_FILE);
    if gguf.exists() { GgufFile::open(&gguf)?.files() } else { SafetensorsDir::open(live_dir)?.files() }
}

fn remove_old_weights(live_dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(live_dir).map_err(|source| Error::io("list", live_dir, source))?.flatten() {
        let path = entry.path();
        let weights = |extension: &std::ffi::OsStr| ["safetensors", "gguf", "part"].iter().any(|old| extension == *old);
        if path.extension().is_some_and(weights) || path.file_name().is_some_and(|name| name == INDEX) {
            fs::remove_file(&path).map_err(|source| Error::io("remove", &path, source))?;
        }
    }
    Ok(())
}

/// Copies configuration, tokenizer and the like. Returns how many files.
fn copy_small_files(model_dir: &Path, live_dir: &Path, left_out: &[String]) -> Result<usize, Error> {
    let mut files = 0;
    let entries = fs::read_dir(model_dir).map_err(|source| Error::io("list", model_dir, source))?;
    for entry in entries {
        let path = entry.map_err(|source| Error::io("list", model_dir, source))?.path();
        let name = path.file_name().expect("an entry has a name").to_owned();
        let hidden = name.to_string_lossy().starts_with('.');
        let weights = path.extension().is_some_and(|extension| OTHER_WEIGHTS.iter().any(|other| extension == *other));
        let other_index = name.to_string_lossy().ends_with(".index.json") && name != INDEX;
        if hidden || weights || other_index || !path.is_file() {
            continue;
        }
        let mut text = fs::read(&path).map_err(|source| Error::io("read", &path, source))?;
        if name == INDEX && !left_out.is_empty() {
            text = index_without(&path, &text, left_out)?;
        }
        write_whole(&live_dir.join(&name), &text)?;
        files += 1;
    }
    Ok(files)
}

fn index_without(path: &Path, text: &[u8], left_out: &[String]) -> Result<Vec<u8>, Error> {
    let damaged = |reason: String| Error::Safetensors { path: path.to_owned(), reason };
    let mut index: serde_json::Value = serde_json::from_slice(text).map_err(|error| damaged(error.to_string()))?;
    let names = index.get_mut("weight_map").and_then(serde_json::Value::as_object_mut);
    let names = names.ok_or_else(|| damaged("it has no weight_map".into()))?;
    for name in left_out {
        names.shift_remove(name);
    }
    Ok(serde_json::to_vec_pretty(&index).expect("a parsed value can be written"))
}

/// Writes a file under another name first, so that it is never seen half done.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let part = part_of(path);
    fs::write(&part, bytes).map_err(|source| Error::io("write", &part, source))?;
    fs::rename(&part, path).map_err(|source| Error::io("rename to", path, source))
}

pub(crate) fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    name.into()
}
