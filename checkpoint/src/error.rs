//! What can go wrong, said with what, where, and what to do.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::storage::{RealStorage, Storage};

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Every way in which a checkpoint operation fails. None of them leaves the files between generations.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// The operation, as a verb.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An fsync failed. What is on the disk is unknown and the call is never retried.
    #[error("cannot sync {}: {source}; the kernel may have dropped the data, so this checkpoint must be opened again (restart the process; see the kernel's log for the disk)", path.display())]
    Sync {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file system is full, found while writing.
    #[error("no space left on the file system of {} ({free} bytes free): {source}; the weights are unchanged; free some space, or lower the number of generations kept", path.display())]
    Full {
        /// The file that was being written.
        path: PathBuf,
        /// Bytes free for this user now.
        free: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The file system has less room than this sync will need by estimate.
    #[error("a sync in {} needs about {need} bytes and {free} are free: {} bytes are missing; the weights are unchanged; free some space, or lower the number of generations kept", dir.display(), need.saturating_sub(*free))]
    TooLittleSpace {
        /// The `.apollod` folder.
        dir: PathBuf,
        /// Bytes needed by estimate: journal, optimizer state, sums.
        need: u64,
        /// Bytes free for this user.
        free: u64,
    },
    /// Another process, or another opener in this one, holds the lock.
    #[error("{} is in use by process {pid}: stop it, or let it do the work", dir.display())]
    Locked {
        /// The model directory.
        dir: PathBuf,
        /// What the lock file says, a process id.
        pid: String,
    },
    /// A shard is a symbolic link, as in a Hugging Face cache, where others share the blob behind it.
    #[error("{} is a symbolic link to a file that others may share, and a sync would change it for all of them: make a real copy with `cp -rL` or `apollod checkpoint export`, and use the copy", path.display())]
    Symlink {
        /// The shard.
        path: PathBuf,
    },
    /// A shard has several names.
    #[error("{} has {links} hard links, and a sync would change the file under all of its names: make a real copy with `cp -rL` or `apollod checkpoint export`, and use the copy", path.display())]
    HardLink {
        /// The shard.
        path: PathBuf,
        /// The number of its names.
        links: u64,
    },
    /// The directory holds no safetensors model, or its index or a header is not valid.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor that was asked for or that is live does not fit the files.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What differs.
        reason: String,
    },
    /// The files are not those of the current generation, by size, name or header.
    #[error("{} is not the file of generation {generation}: {reason}; put the right file back (`apollod checkpoint repair {} --from COPY` does where only its header is damaged), or remove {}/.apollod to begin anew with the files as they are", path.display(), folder(path), folder(path))]
    Replaced {
        /// The shard.
        path: PathBuf,
        /// The current generation.
        generation: u64,
        /// What differs.
        reason: String,
    },
    /// A tensor in the files is not what the current generation recorded.
    #[error("tensor `{tensor}` in {} is not that of generation {generation}: a disk flipped bits of the file, or someone else wrote into it; nothing was written over it. `apollod checkpoint verify {}` names every damaged block and `apollod checkpoint repair {}` puts them right from the live weights or a copy; only if the file was changed on purpose, `apollod checkpoint adopt {}` takes it as it is", path.display(), folder(path), folder(path), folder(path))]
    Changed {
        /// The tensor.
        tensor: String,
        /// The shard.
        path: PathBuf,
        /// The current generation.
        generation: u64,
    },
    /// A sector is neither its old nor its new content.
    #[error("{}, tensor `{tensor}`, byte {offset} of the file: the sector is neither of generation {previous} nor of generation {generation}: someone else changed the file or the disk failed; the journal is kept; put the file of either generation back and open again, or have it repaired from a copy with `apollod checkpoint repair {} --from COPY`", path.display(), folder(path))]
    Foreign {
        /// The shard.
        path: PathBuf,
        /// The tensor in it.
        tensor: String,
        /// Where in the file.
        offset: u64,
        /// The generation before.
        previous: u64,
        /// The journalled generation.
        generation: u64,
    },
    /// A journal or delta does not check.
    #[error("{}: torn at byte {byte}: {reason}", path.display())]
    Torn {
        /// The journal or delta.
        path: PathBuf,
        /// Where reading stopped.
        byte: u64,
        /// What did not check.
        reason: String,
    },
    /// A damaged journal, and files that are no generation.
    #[error(
        "{reason}; and the files are not of generation {generation} either ({damage}): the weights lie between two generations; the journal is kept; have them repaired from a copy with `apollod checkpoint repair --from COPY`, or put the files of a known generation back (a copy made by export), remove the journal, and open again"
    )]
    Stranded {
        /// What is wrong with the journal.
        reason: String,
        /// The current generation.
        generation: u64,
        /// The first thing that does not check.
        damage: String,
    },
    /// A generation's document cannot be read.
    #[error("{}: {reason}; `apollod checkpoint repair {}` brings it back from the history or, with --from, from a copy that has .apollod; without either, removing {}/.apollod begins anew with the files as they are", path.display(), model.display(), model.display())]
    Generation {
        /// The document.
        path: PathBuf,
        /// The model directory.
        model: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A journal, delta or sums are not those of this directory, or a document is of another version.
    #[error("{}: {reason}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The optimizer state does not check.
    #[error("optimizer state {} of generation {generation}: {reason}; put it back from a copy that has .apollod (`apollod checkpoint repair {} --from COPY`), go back to an earlier generation (`apollod checkpoint rollback {} --to N`), or go on with the weights as they are and a fresh state (`apollod checkpoint adopt {}`)", path.display(), model.display(), model.display(), model.display())]
    State {
        /// The file.
        path: PathBuf,
        /// The model directory.
        model: PathBuf,
        /// Its generation.
        generation: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// Rollback to something that is not there any more.
    #[error("generation {generation} cannot be restored: {reason}; restorable are {restorable:?}")]
    NotRestorable {
        /// The one asked for.
        generation: u64,
        /// Why not.
        reason: String,
        /// The ones that can be restored.
        restorable: Vec<u64>,
    },
    /// The deltas did not lead back to what the generation recorded.
    #[error(
        "undoing to generation {generation} does not give back tensor `{tensor}`: a delta in history is damaged; the files are as before"
    )]
    History {
        /// The one asked for.
        generation: u64,
        /// The tensor that differs.
        tensor: String,
    },
    /// A delta of the history does not check.
    #[error("{reason}; the generations before it cannot be restored unless it is put back from a copy that has .apollod (`apollod checkpoint repair {} --from COPY`); the files are as before", model.display())]
    Delta {
        /// What is wrong with which delta.
        reason: String,
        /// The model directory.
        model: PathBuf,
    },
    /// An error in the middle of a sync, after which the files could not be brought back at once.
    #[error("{source}; generation {generation} was under way: open the checkpoint again to undo or finish it")]
    Interrupted {
        /// The generation that was being written.
        generation: u64,
        /// The error.
        source: Box<Error>,
    },
    /// An earlier failure made this handle unusable.
    #[error("this checkpoint must be opened again before further work, because: {reason}")]
    Unusable {
        /// The earlier failure.
        reason: String,
    },
    /// A journal waits, so the files may lie between two generations.
    #[error("{} holds the journal of a sync that is under way or waits for recovery: try again, or undo or finish it with `apollod checkpoint recover {}`", dir.display(), dir.display())]
    Busy {
        /// The model directory.
        dir: PathBuf,
    },
    /// Syncs followed each other while the files were checked.
    #[error("{} was written by one sync after another while it was checked, so that nothing can be said of what looked damaged: check again while none is under way", dir.display())]
    Unsteady {
        /// The model directory.
        dir: PathBuf,
    },
    /// Somebody loads the model, and goes on for longer than a sync waits.
    #[error("another program has been loading the model in {} for {waited:?}, and would get a mixture of generations: nothing was written, try again when it is done", dir.display())]
    Readers {
        /// The model directory.
        dir: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A model was read without the lock, and a sync came in between.
    #[error("the model in {} was written while it was loaded, and may be a mixture of generations: load it again", dir.display())]
    Overwritten {
        /// The model directory.
        dir: PathBuf,
    },
    /// The target of an export cannot be used.
    #[error("cannot export to {}: {reason}", path.display())]
    Target {
        /// The target.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Files that are to be copied or rolled back do not check, and no sync explains it.
    #[error(
        "{damage}; the files are not of generation {generation}, and `apollod checkpoint repair` puts right what the live weights or a copy still have"
    )]
    Source {
        /// The current generation.
        generation: u64,
        /// The first thing that does not check.
        damage: String,
    },
    /// There is no room for a directory of a generation.
    #[error("a copy of the model in {} needs {need} bytes and {free} are free: free {} bytes, or set sync.mode = \"in_place\"", dir.display(), need.saturating_sub(*free))]
    NoRoom {
        /// Where the copy would be.
        dir: PathBuf,
        /// Bytes of the model's files.
        need: u64,
        /// Bytes free for this user.
        free: u64,
    },
    /// Syncs overtook every attempt to copy.
    #[error("cannot export {}: syncs overtook {attempts} copies; sync less often, keep more generations, or copy to a faster place", dir.display())]
    Overtaken {
        /// The model directory.
        dir: PathBuf,
        /// Copies that were made and thrown away.
        attempts: u32,
    },
}

/// The model directory that a shard lies in, for commands.
fn folder(shard: &Path) -> std::path::Display<'_> {
    shard.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")).display()
}

impl Error {
    /// An I/O error at `path`; a full file system gets its own variant.
    pub(crate) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
        move |source| {
            let path = path.to_path_buf();
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
                let free = RealStorage.free_bytes(path.parent().unwrap_or(&path)).unwrap_or(0);
                return Error::Full { path, free, source };
            }
            Error::Io { what, path, source }
        }
    }
}
