//! Processes: whether one lives, and which ones use a file.
//!
//! A pidfd names a process for as long as it is held, so a recycled process id is never mistaken for the
//! server. Who uses a file is read from `/proc`: processes that cannot be read are not ours to train with.

use crate::Error;
use crate::mapping::{FileId, file_id};
use crate::stage::files_of;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Files to look for in other processes. By identity, and by path because some file systems (overlays)
/// show another device in `/proc/PID/maps` than `stat` does.
#[derive(Debug, Default)]
pub(crate) struct FileSet {
    ids: HashSet<FileId>,
    paths: HashSet<PathBuf>,
}

impl FileSet {
    /// Adds the file at `path`, which must exist.
    pub(crate) fn add(&mut self, path: &Path) -> Result<(), Error> {
        let metadata = fs::metadata(path).map_err(|source| Error::io("inspect", path, source))?;
        self.ids.insert(file_id(&metadata));
        // Anonymous memory has no path of its own; its identity is enough.
        self.paths.extend(fs::canonicalize(path));
        Ok(())
    }

    fn contains(&self, map: &MapLine) -> bool {
        self.ids.contains(&map.file) || self.paths.contains(Path::new(&map.path))
    }
}

/// A running process that is watched.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    /// Watches `pid`; None if there is no such process.
    pub(crate) fn watch(pid: u32) -> Result<Option<Process>, Error> {
        let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        match pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => {
                let process = Process { pid, pidfd };
                Ok((!process.exited()).then_some(process))
            }
            Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(Error::io("watch", Path::new(&format!("/proc/{pid}")), error)),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the process has ended, or is about to.
    pub(crate) fn exited(&self) -> bool {
        wait_for(Some(self), None, Duration::ZERO)
    }

    /// Whether its first thread is ending or has ended (proc_pid_stat(5), field 9, PF_EXITING; field 3). The kernel says
    /// so on the way into exit, before it takes the memory down, which for a large server takes 100 ms and more; a
    /// pidfd and sockets tell only after that. Not to be read is no evidence: the pidfd decides.
    fn is_dying(&self) -> bool {
        const PF_EXITING: u64 = 4;
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else { return false };
        // The name of the program may hold anything, brackets too.
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
        let state = fields.next();
        let flags: Option<u64> = fields.nth(5).and_then(|flags| flags.parse().ok());
        matches!(state, Some("Z" | "X")) || flags.is_some_and(|flags| flags & PF_EXITING != 0)
    }
}

/// How often a process that is waited for is looked at.
const GLANCE: Duration = Duration::from_millis(10);

/// Waits until the process has ended or the other end of the socket has closed it, at most for `timeout`; whether
/// either is so.
pub(crate) fn wait_for(process: Option<&Process>, socket: Option<&UnixStream>, timeout: Duration) -> bool {
    let mut fds: Vec<PollFd> = process.map(|process| PollFd::new(&process.pidfd, PollFlags::IN)).into_iter().collect();
    // A socket that was shut down says so without a byte being read.
    fds.extend(socket.map(|socket| PollFd::new(socket, PollFlags::RDHUP)));
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut fds, Timespec::try_from(left.min(GLANCE)).ok().as_ref()) {
            Ok(0) if process.is_some_and(Process::is_dying) => return true,
            Ok(0) if left > GLANCE => {}
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            // A descriptor that cannot be polled proves nothing about the server: fail closed.
            Err(_) => return true,
        }
    }
}

/// Weights are only taken from this user or root.
pub(crate) fn check_user(path: &Path, owner: u32) -> Result<(), Error> {
    let own = rustix::process::geteuid().as_raw();
    if owner == own || owner == 0 { Ok(()) } else { Err(Error::User { path: path.to_owned(), owner, own }) }
}

/// Processes that use the weights of `live_dir`, safetensors or GGUF: those that have a file mapped, then those that
/// only have one open. Leaves out this process, trainers (which map the files shared and writable) and
/// processes whose `/proc` entries cannot be read.
///
/// # Errors
/// `live_dir` holds no readable weights, or `/proc` cannot be listed.
pub fn servers_of(live_dir: &Path) -> Result<Vec<u32>, Error> {
    let files = files_of(live_dir)?;
    let mut mapped = mapped_by(&files)?;
    let open: Vec<u32> = others()?.into_iter().filter(|pid| !mapped.contains(pid) && has_open(*pid, &files)).collect();
    mapped.extend(open);
    Ok(mapped)
}

/// Other processes that have one of the files mapped as a server does, in order of their ids.
pub(crate) fn mapped_by(files: &FileSet) -> Result<Vec<u32>, Error> {
    Ok(others()?.into_iter().filter(|pid| has_mapped(*pid, files)).collect())
}

/// Whether `pid` has any of the files mapped or open.
pub(crate) fn holds(pid: u32, files: &FileSet) -> bool {
    has_open(pid, files) || maps_of(pid).iter().any(|map| files.contains(map))
}

fn others() -> Result<Vec<u32>, Error> {
    let proc = Path::new("/proc");
    let entries = fs::read_dir(proc).map_err(|source| Error::io("list", proc, source))?;
    let own = std::process::id();
    let mut pids: Vec<u32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != own)
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

struct MapLine {
    file: FileId,
    path: String,
    shared_writable: bool,
}

fn has_mapped(pid: u32, files: &FileSet) -> bool {
    maps_of(pid).iter().any(|map| !map.shared_writable && files.contains(map))
}

fn has_open(pid: u32, files: &FileSet) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    entries
        .flatten()
        .any(|entry| fs::metadata(entry.path()).is_ok_and(|metadata| files.ids.contains(&file_id(&metadata))))
}

fn maps_of(pid: u32) -> Vec<MapLine> {
    let text = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().filter_map(parse_map_line).collect()
}

/// `7f12a000-7f13a000 rw-s 00000000 00:1c 4711   /dev/shm/live/model.safetensors`
fn parse_map_line(line: &str) -> Option<MapLine> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let flags = fields.next()?;
    let (major, minor) = fields.nth(1)?.split_once(':')?;
    let inode: u64 = fields.next()?.parse().ok()?;
    let device = rustix::fs::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let path = fields.collect::<Vec<_>>().join(" ");
    Some(MapLine { file: (device, inode), path, shared_writable: flags.contains('w') && flags.ends_with('s') })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps_gives_the_file_and_how_it_is_mapped() {
        let line = parse_map_line("7f12a000-7f13a000 rw-s 00001000 08:1c 4711   /tmp/a file (deleted)").unwrap();
        assert_eq!(line.file, (rustix::fs::makedev(8, 0x1c), 4711));
        assert_eq!(line.path, "/tmp/a file (deleted)");
        assert!(line.shared_writable);
        assert!(!parse_map_line("1-2 rw-p 0 00:00 0").unwrap().shared_writable);
        assert!(parse_map_line("nonsense").is_none());
    }

    #[test]
    fn a_process_that_never_was_is_not_watched() {
        assert!(Process::watch(u32::MAX).unwrap().is_none());
        assert!(Process::watch(0).unwrap().is_none());
        let own = Process::watch(std::process::id()).unwrap().unwrap();
        assert!(!own.exited());
    }
}
