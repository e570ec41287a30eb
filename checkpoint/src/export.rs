//! A copy of a model directory that is exactly one generation, made while syncs go on.
//!
//! A copy made during a sync holds old and new sectors side by side, which is what a crash leaves too, and
//! is repaired in the same way: the deltas of the generations that came while it was made are applied to
//! the copy, and the journal of one that is not finished is undone in it. Then every tensor of the copy is compared
//! with its generation. Only if that fails (a sector torn by the copying itself, a delta already pruned) is the copy
//! made again.

use std::convert::Infallible;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths};
use crate::journal::Reader;
use crate::layout::is_plain_name;
use crate::record::Side;
use crate::recover::rewrite;
use crate::verify::verify_files;

const ATTEMPTS: u32 = 8;
const WAIT: Duration = Duration::from_millis(100);

/// What an export made.
#[derive(Debug, Clone, PartialEq)]
pub struct ExportReport {
    /// The generation that the copy is; none if the directory has no generations yet.
    pub generation: Option<u64>,
    /// Files copied.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Of these, the bytes that were copied: the file system cloned the rest, so that both files share them.
    pub bytes_copied: u64,
    /// Copies made; more than one if syncs overtook the first.
    pub attempts: u32,
    /// Time it took.
    pub seconds: f64,
}

impl fmt::Display for ExportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.generation {
            Some(generation) => write!(f, "generation {generation}")?,
            None => f.write_str("a model without generations")?,
        }
        let (files, bytes, seconds) = (self.files, self.bytes, self.seconds);
        write!(f, ": {files} files, {bytes} bytes, {seconds:.2} s")
    }
}

/// Copies the model directory to `to`, which must not exist, without `.apollod`; links are followed.
/// The copy appears under its name only when it is whole, checked and synced.
pub fn export(model_dir: &Path, to: &Path) -> Result<ExportReport> {
    copy_whole(model_dir, to, false)
}

/// The document of its generation in a copy that has one.
pub(crate) const DOCUMENT: &str = "generation.json";

/// [`export`] with the generation's document as [`DOCUMENT`].
pub(crate) fn export_with_document(model_dir: &Path, to: &Path) -> Result<ExportReport> {
    copy_whole(model_dir, to, true)
}

fn copy_whole(model_dir: &Path, to: &Path, with_document: bool) -> Result<ExportReport> {
    let began = Instant::now();
    let (disk, paths) = (Disk::real(), Paths::new(model_dir));
    let partial = partial_of(model_dir, to)?;
    for attempts in 1..=ATTEMPTS {
        let from = paths.newest(&disk)?;
        let copied = attempt(&disk, &paths, &partial, from.as_ref(), with_document);
        let settled = match copied {
            Ok(settled) => settled,
            Err(error) => {
                // The error that led here is the one to report.
                let _ = fs::remove_dir_all(&partial);
                return Err(error);
            }
        };
        if let Settled::As { generation, count } = settled {
            disk.rename(&partial, to)?;
            disk.sync_dir(partial.parent().unwrap_or(Path::new(".")))?;
            return Ok(ExportReport {
                generation,
                files: count.files,
                bytes: count.bytes,
                bytes_copied: count.bytes_copied,
                attempts,
                seconds: began.elapsed().as_secs_f64(),
            });
        }
        fs::remove_dir_all(&partial).map_err(Error::io("remove", &partial))?;
        std::thread::sleep(WAIT);
    }
    Err(Error::Overtaken { dir: model_dir.to_path_buf(), attempts: ATTEMPTS })
}

/// How a copy turned out.
enum Settled {
    As { generation: Option<u64>, count: Count },
    Overtaken,
}

#[derive(Default)]
struct Count {
    files: u64,
    bytes: u64,
    bytes_copied: u64,
}

/// Where the copy grows, beside its target; refuses targets that would be overwritten or copied too.
fn partial_of(model_dir: &Path, to: &Path) -> Result<PathBuf> {
    let refuse = |reason: &str| Error::Target { path: to.to_path_buf(), reason: reason.into() };
    if fs::symlink_metadata(to).is_ok() {
        return Err(refuse("it exists already"));
    }
    let name = to.file_name().ok_or_else(|| refuse("it has no name"))?;
    let parent = match to.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let parent = parent.canonicalize().map_err(Error::io("find", parent))?;
    let model = model_dir.canonicalize().map_err(Error::io("find", model_dir))?;
    if parent.starts_with(&model) {
        return Err(refuse("it lies inside the model directory"));
    }
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".partial-{}", std::process::id()));
    let partial = parent.join(partial);
    if partial.exists() {
        return Err(refuse("another export to it is under way"));
    }
    Ok(partial)
}

fn attempt(
    disk: &Disk,
    paths: &Paths,
    partial: &Path,
    from: Option<&Generation>,
    with_document: bool,
) -> Result<Settled> {
    let mut count = Count::default();
    copy_tree(&paths.model, partial, true, &mut count)?;
    let Some(from) = from else {
        // Nobody wrote in place, unless the first open came while this was copied.
        return Ok(match paths.newest(disk)? {
            None => Settled::As { generation: None, count },
            Some(_) => Settled::Overtaken,
        });
    };
    let target = catch_up(disk, paths, partial, from)?;
    if verify_files(disk, paths, partial, &target, false)?.is_ok() {
        if with_document {
            let path = partial.join(DOCUMENT);
            fs::write(&path, target.to_json()).map_err(Error::io("write", &path))?;
        }
        sync_tree(disk, partial)?;
        let generation = Some(target.generation);
        return Ok(Settled::As { generation, count });
    }
    let moved = disk.exists(&paths.journal())? || paths.newest(disk)?.as_ref() != Some(from);
    let source = verify_files(disk, paths, &paths.model, from, false)?;
    match source.damage.first() {
        Some(damage) if !moved => Err(Error::Source { generation: from.generation, damage: damage.to_string() }),
        _ => Ok(Settled::Overtaken),
    }
}

/// Brings the copy to one generation after `from`, as far as the deltas go: gives it.
fn catch_up(disk: &Disk, paths: &Paths, copy: &Path, from: &Generation) -> Result<Generation> {
    let mut target = from.clone();
    loop {
        let next = target.generation + 1;
        let journal = open_delta(disk, &paths.journal(), next)?;
        // The journal may have become history since.
        if let Some(mut delta) = open_delta(disk, &paths.delta(next), next)? {
            match settle(disk, &mut delta, copy, Side::New) {
                Ok(()) => target = delta.generation.take().expect("all records are read"),
                // The check that follows decides.
                Err(Error::Torn { .. }) => return Ok(target),
                Err(error) => return Err(error),
            }
        } else {
            if let Some(mut journal) = journal {
                match settle(disk, &mut journal, copy, Side::Old) {
                    // It ends where its writer is.
                    Ok(()) | Err(Error::Torn { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            return Ok(target);
        }
    }
}

/// A delta or journal, if it is there and of this generation.
fn open_delta(disk: &Disk, path: &Path, number: u64) -> Result<Option<Reader>> {
    match Reader::open(disk, path) {
        Ok(reader) if reader.head.generation == number => Ok(Some(reader)),
        Ok(_) | Err(Error::Torn { .. }) => Ok(None),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives the blocks of a delta one side's content in the copy.
fn settle(disk: &Disk, delta: &mut Reader, copy: &Path, side: Side) -> Result<()> {
    let mut files: Vec<Option<DiskFile>> = delta.head.shards.iter().map(|_| None).collect();
    while let Some(record) = delta.record()? {
        let shard = usize::from(record.piece.shard);
        let file = match &mut files[shard] {
            Some(file) => file,
            closed => {
                let name = &delta.head.shards[shard].file;
                if !is_plain_name(name) {
                    let reason = format!("it names `{name}`, which is no file of this directory");
                    return Err(Error::Document { path: copy.to_path_buf(), reason });
                }
                closed.insert(disk.open_in_place(&copy.join(name))?)
            }
        };
        // A sector of a still later generation is foreign to this delta and settled by that one.
        let settled = rewrite(file, &record, |content| {
            record.settle_known(content, side);
            Ok::<(), Infallible>(())
        });
        let Ok(()) = settled?;
    }
    Ok(())
}

fn copy_tree(from: &Path, to: &Path, top: bool, count: &mut Count) -> Result<()> {
    fs::create_dir(to).map_err(Error::io("create", to))?;
    let entries = fs::read_dir(from).map_err(Error::io("list", from))?;
    for entry in entries {
        let entry = entry.map_err(Error::io("list", from))?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if top && entry.file_name() == ".apollod" {
            continue;
        }
        let stat = fs::metadata(&source).map_err(Error::io("read", &source))?;
        if stat.is_dir() {
            copy_tree(&source, &target, false, count)?;
        } else {
            count.files += 1;
            count.bytes += stat.len();
            if !cloned(&source, &target)? {
                count.bytes_copied += fs::copy(&source, &target).map_err(Error::io("copy", &source))?;
            }
        }
    }
    Ok(())
}

/// Makes a file that shares the blocks of another, where the file system can.
fn cloned(source: &Path, target: &Path) -> Result<bool> {
    let from = File::open(source).map_err(Error::io("open", source))?;
    let to = File::create_new(target).map_err(Error::io("create", target))?;
    Ok(rustix::fs::ioctl_ficlone(&to, &from).is_ok())
}

/// The largest file that an export copies, and the bytes of all.
pub(crate) fn size(dir: &Path) -> Result<(Option<PathBuf>, u64)> {
    let (mut largest, mut total, mut open) = (None, 0, vec![dir.to_path_buf()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = entry.map_err(Error::io("list", &folder))?.path();
            let stat = fs::metadata(&path).map_err(Error::io("read", &path))?;
            if stat.is_file() {
                total += stat.len();
                largest = largest.max(Some((stat.len(), path)));
            } else if path != dir.join(".apollod") {
                open.push(path);
            }
        }
    }
    Ok((largest.map(|(_, path)| path), total))
}

fn sync_tree(disk: &Disk, dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let path = entry.path();
        if path.is_dir() {
            sync_tree(disk, &path)?;
        } else {
            let file = File::open(&path).map_err(Error::io("open", &path))?;
            let synced = file.sync_all();
            synced.map_err(|source| Error::Sync { path, source })?;
        }
    }
    disk.sync_dir(dir)
}
