//! What a disk may hold after a crash, as `checkpoint/src/storage.rs` assumes it: every change since the last barrier
//! of its file or folder, each made or not.
//!
//! [`Medium`] follows the operations of a log. At any position it knows of every sector, length and name all values
//! that a crash may leave; a [`Pick`] chooses one of each, and [`Medium::image`] is the disk after that crash.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::choices::{Choices, FileChoice, FilePick, Link, NameChoice, Pick, Torn};
use crate::image::{Blob, FileId, Image, Key, Names, Node, SECTOR, Sector};

/// One operation that changed something, or a barrier. Names are as they were when the file was opened.
#[derive(Debug, Clone)]
pub enum Op {
    Write {
        file: FileId,
        path: Arc<Path>,
        at: usize,
        bytes: Arc<[u8]>,
    },
    SetLen {
        file: FileId,
        path: Arc<Path>,
        bytes: usize,
    },
    Sync {
        file: FileId,
        path: Arc<Path>,
    },
    /// An fsync that said EIO: some of it may be on the disk, and no later fsync writes the rest.
    SyncFailed {
        file: FileId,
        path: Arc<Path>,
    },
    Create {
        path: PathBuf,
        node: Node,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
    SyncDir {
        dir: PathBuf,
    },
    SyncDirFailed {
        dir: PathBuf,
    },
}

impl Op {
    /// True if it makes something durable; the states that a crash may leave grow until the next one.
    pub fn is_barrier(&self) -> bool {
        matches!(self, Op::Sync { .. } | Op::SyncFailed { .. } | Op::SyncDir { .. } | Op::SyncDirFailed { .. })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        match self {
            Op::Write { path, .. } | Op::SetLen { path, .. } | Op::Sync { path, .. } | Op::SyncFailed { path, .. } => {
                path
            }
            Op::Create { path, .. } | Op::Remove { path } => path,
            Op::Rename { from, .. } => from,
            Op::SyncDir { dir } | Op::SyncDirFailed { dir } => dir,
        }
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = self.path().display();
        match self {
            Op::Write { at, bytes, .. } => write!(f, "write {path} {at}+{}", bytes.len()),
            Op::SetLen { bytes, .. } => write!(f, "set_len {path} {bytes}"),
            Op::Sync { .. } => write!(f, "sync {path}"),
            Op::SyncFailed { .. } => write!(f, "sync {path}: EIO"),
            Op::Create { node: Node::Dir, .. } => write!(f, "create_dir {path}"),
            Op::Create { .. } => write!(f, "create {path}"),
            Op::Rename { to, .. } => write!(f, "rename {path} to {}", to.display()),
            Op::Remove { .. } => write!(f, "remove {path}"),
            Op::SyncDir { .. } => write!(f, "sync_dir {path}"),
            Op::SyncDirFailed { .. } => write!(f, "sync_dir {path}: EIO"),
        }
    }
}
#[derive(Debug, Clone)]
struct Dirty {
    /// Contents since the last barrier, oldest first.
    versions: Vec<Sector>,
    /// An fsync failed since it was written: no later one makes it durable.
    stuck: bool,
}

#[derive(Debug, Clone)]
struct File {
    /// The content that is certain; it counts up to `durable_len`.
    durable: Arc<Blob>,
    durable_len: usize,
    live: Arc<Blob>,
    dirty: BTreeMap<usize, Dirty>,
    /// Lengths since the last barrier, oldest first.
    lens: Vec<usize>,
    lens_stuck: bool,
}

#[derive(Debug, Clone)]
struct Name {
    /// What it stood for since the last barrier, each with the number of the operation; the first is durable.
    versions: Vec<(u64, Option<Node>)>,
    /// The last operation that a barrier of its folder covers.
    synced: u64,
}

impl Name {
    fn live(&self) -> Option<Node> {
        self.versions.last().expect("never empty").1
    }
}

/// All states that a crash may leave.
#[derive(Debug, Clone)]
pub struct Medium {
    files: Vec<File>,
    names: Names<Name>,
    /// Pending renames by number.
    renames: BTreeMap<u64, (PathBuf, PathBuf)>,
    clock: u64,
    /// False for a disk that will not crash: saves the versions.
    track: bool,
}
fn sector_of(bytes: &[u8], index: usize) -> Sector {
    let mut sector = [0; SECTOR];
    let from = (index * SECTOR).min(bytes.len());
    let part = &bytes[from..(from + SECTOR).min(bytes.len())];
    sector[..part.len()].copy_from_slice(part);
    sector
}

impl Medium {
    /// A disk at rest.
    pub fn new(image: &Image, track: bool) -> Medium {
        let file = |bytes: &Arc<Blob>| File {
            durable: bytes.clone(),
            durable_len: bytes.len(),
            live: bytes.clone(),
            dirty: BTreeMap::new(),
            lens: Vec::new(),
            lens_stuck: false,
        };
        let name = |node: &Node| Name { versions: vec![(0, Some(*node))], synced: 0 };
        Medium {
            files: image.files.iter().map(file).collect(),
            names: image.names.iter().map(|(path, node)| (path.clone(), name(node))).collect(),
            renames: BTreeMap::new(),
            clock: 0,
            track,
        }
    }

    /// What a name stands for now, as a program sees it.
    pub fn node(&self, path: &Path) -> Option<Node> {
        self.names.get(path.as_os_str())?.live()
    }

    /// All names with something behind them, as a program sees them.
    pub fn live_names(&self) -> impl Iterator<Item = (&Key, Node)> {
        self.names.iter().filter_map(|(path, name)| Some((path, name.live()?)))
    }

    /// The content as a program sees it.
    pub fn content(&self, file: FileId) -> &[u8] {
        &self.files[file].live
    }

    /// What a program sees: what is there if nothing crashes.
    pub fn live(&self) -> Image {
        Image {
            names: self.live_names().map(|(path, node)| (path.clone(), node)).collect(),
            files: self.files.iter().map(|file| file.live.clone()).collect(),
        }
    }

    /// A new content without a name.
    pub fn add_file(&mut self) -> FileId {
        let none = Blob::new(Vec::new());
        self.files.push(File {
            durable: none.clone(),
            durable_len: 0,
            live: none,
            dirty: BTreeMap::new(),
            lens: Vec::new(),
            lens_stuck: false,
        });
        self.files.len() - 1
    }

    /// Follows one operation.
    pub fn apply(&mut self, op: &Op) {
        self.clock += 1;
        match op {
            Op::Write { file, at, bytes, .. } => {
                while self.files.len() <= *file {
                    self.add_file();
                }
                let track = self.track;
                self.files[*file].write(*at, bytes, track);
            }
            Op::SetLen { file, bytes, .. } => {
                let track = self.track;
                self.files[*file].set_len(*bytes, track);
            }
            Op::Sync { file, .. } => self.files[*file].sync(),
            Op::SyncFailed { file, .. } => self.files[*file].sync_failed(),
            Op::Create { path, node } => {
                if let Node::File(file) = node {
                    while self.files.len() <= *file {
                        self.add_file();
                    }
                }
                self.set_name(path, Some(*node));
            }
            Op::Remove { path } => self.set_name(path, None),
            Op::Rename { from, to } => {
                let node = self.node(from);
                self.set_name(from, None);
                self.set_name(to, node);
                if self.track {
                    self.renames.insert(self.clock, (from.clone(), to.clone()));
                }
            }
            Op::SyncDir { dir } => {
                let clock = self.clock;
                self.in_dir(dir).for_each(|name| name.synced = clock);
                self.settle();
            }
            // Names are kept by the file system itself, which gives up or tries again: nothing is durable yet.
            Op::SyncDirFailed { .. } => {}
        }
    }

    fn set_name(&mut self, path: &Path, node: Option<Node>) {
        let clock = self.clock;
        let name = self.names.entry(path.into()).or_insert(Name { versions: vec![(0, None)], synced: 0 });
        if !self.track {
            name.versions.clear();
        }
        name.versions.push((clock, node));
    }

    fn in_dir<'a>(&'a mut self, dir: &'a Path) -> impl Iterator<Item = &'a mut Name> {
        self.names.iter_mut().filter(move |(path, _)| path.is_in(dir)).map(|(_, name)| name)
    }

    /// Makes certain what barriers cover. A rename between two folders waits for both.
    fn settle(&mut self) {
        let waits = |seq: u64| {
            let Some((from, to)) = self.renames.get(&seq) else { return false };
            self.names[from.as_os_str()].synced < seq || self.names[to.as_os_str()].synced < seq
        };
        let mut forced = Vec::new();
        for (path, name) in self.names.iter().filter(|(_, name)| name.versions.len() > 1) {
            let before =
                name.versions.iter().skip(1).take_while(|(seq, _)| *seq <= name.synced && !waits(*seq)).count();
            forced.push((path.clone(), before));
        }
        for (path, last) in forced {
            self.names.get_mut(&path).expect("just seen").versions.drain(..last);
        }
        let pending = |path: &PathBuf, seq: u64| self.names[path.as_os_str()].versions[0].0 < seq;
        let done = |seq: u64, (from, to): &(PathBuf, PathBuf)| !pending(from, seq) && !pending(to, seq);
        let done: Vec<u64> =
            self.renames.iter().filter(|(seq, names)| done(**seq, names)).map(|(seq, _)| *seq).collect();
        done.iter().for_each(|seq| drop(self.renames.remove(seq)));
    }

    /// What is not certain now. Files that no name may reach are left out.
    pub fn choices(&self) -> Choices {
        let mut index = BTreeMap::new();
        let mut names = Vec::new();
        for (path, name) in self.names.iter().filter(|(_, name)| name.versions.len() > 1) {
            index.insert(path.path(), names.len());
            let versions = name.versions.iter().map(|(_, node)| *node).collect();
            names.push(NameChoice { path: path.path().into(), versions });
        }
        let position =
            |path: &PathBuf, seq: u64| self.names[path.as_os_str()].versions.iter().position(|(at, _)| *at >= seq);
        let mut links = Vec::new();
        for (seq, (from, to)) in &self.renames {
            // A name that is not among the choices is certain, and has passed the rename.
            let place = |path: &PathBuf| Some((*index.get(path.as_path())?, position(path, *seq)?));
            links.extend(place(to).map(|to| Link { from: place(from), to }));
        }
        let certain = self.names.values().filter(|name| name.versions.len() == 1);
        let held = certain.filter_map(|name| match name.versions[0].1 {
            Some(Node::File(file)) => Some(file),
            _ => None,
        });
        let held = held.collect();
        let (mut reachable, mut is_model) = (vec![false; self.files.len()], vec![false; self.files.len()]);
        for (path, name) in &self.names {
            for (_, node) in &name.versions {
                let Some(Node::File(file)) = node else { continue };
                reachable[*file] = true;
                is_model[*file] |= path.path().extension().is_some_and(|extension| extension == "safetensors");
            }
        }
        let open = self.files.iter().enumerate().filter(|(i, file)| reachable[*i] && !file.is_certain());
        let files = open
            .map(|(i, file)| file.choice(i, is_model[i]))
            .filter(|file| !file.sectors.is_empty() || file.lens.len() > 1);
        Choices { names, files: files.collect(), held, links }
    }

    /// The disk after a crash that left this.
    pub fn image(&self, choices: &Choices, pick: &Pick) -> Image {
        let mut names = Names::new();
        let mut picked = choices.names.iter().zip(&pick.names).peekable();
        for (path, name) in &self.names {
            let node = match picked.next_if(|(choice, _)| choice.path == path.path()) {
                Some((choice, version)) => choice.versions[*version],
                None => name.versions[0].1,
            };
            let parent = path.path().parent().filter(|parent| parent.as_os_str().len() > 1);
            if let Some(node) = node.filter(|_| parent.is_none_or(|parent| names.contains_key(parent.as_os_str()))) {
                names.insert(path.clone(), node);
            }
        }
        let mut files: Vec<Arc<Blob>> = self.files.iter().map(File::certain).collect();
        for (choice, pick) in choices.files.iter().zip(&pick.files) {
            files[choice.file] = Blob::new(self.files[choice.file].picked(choice, pick));
        }
        Image { names, files }
    }

    /// A pick in words.
    pub fn describe(&self, choices: &Choices, pick: &Pick) -> String {
        let mut text = String::new();
        for (name, version) in choices.names.iter().zip(&pick.names) {
            let of = name.versions.len() - 1;
            let is = match name.versions[*version] {
                Some(Node::File(file)) => format!("content {file}"),
                Some(Node::Dir) => "a folder".into(),
                None => "not there".into(),
            };
            writeln!(text, "  {}: version {version} of {of}: {is}", name.path.display()).expect("a string");
        }
        for (choice, pick) in choices.files.iter().zip(&pick.files) {
            let mut runs: Vec<(usize, usize, usize, usize)> = Vec::new();
            for ((sector, versions), version) in choice.sectors.iter().zip(&pick.sectors) {
                match runs.last_mut() {
                    Some((_, end, v, of)) if *end == *sector && v == version && *of == versions.len() - 1 => *end += 1,
                    _ => runs.push((*sector, sector + 1, *version, versions.len() - 1)),
                }
            }
            let runs: Vec<String> =
                runs.iter().map(|(from, to, version, of)| format!("{from}..{to} version {version} of {of}")).collect();
            let path = self
                .names
                .iter()
                .find(|(_, name)| name.versions.iter().any(|(_, node)| *node == Some(Node::File(choice.file))));
            let path = path.map_or("?".into(), |(path, _)| path.path().display().to_string());
            writeln!(text, "  content {} ({path}): {} bytes, sectors {}", choice.file, pick.len, runs.join(", "))
                .expect("a string");
            if let Some(torn) = pick.torn {
                let (sector, _) = choice.sectors[torn.sector];
                writeln!(text, "    sector {sector} torn at {}: version {}, then {}", torn.at, torn.head, torn.tail)
                    .expect("a string");
            }
        }
        text
    }
}

impl File {
    fn is_certain(&self) -> bool {
        self.dirty.is_empty() && self.lens.is_empty()
    }

    fn certain(&self) -> Arc<Blob> {
        match self.durable.len() == self.durable_len {
            true => self.durable.clone(),
            false => {
                let mut bytes = self.durable.to_vec();
                bytes.resize(self.durable_len, 0);
                Blob::new(bytes)
            }
        }
    }

    fn write(&mut self, at: usize, bytes: &[u8], track: bool) {
        if bytes.is_empty() {
            return;
        }
        let end = at + bytes.len();
        let before = self.live.len();
        let live = Blob::edit(&mut self.live);
        if end > before {
            live.resize(end, 0);
        }
        live[at..end].copy_from_slice(bytes);
        if !track {
            return;
        }
        if end > before {
            self.lens.push(end);
            self.lens_stuck = false;
        }
        (at / SECTOR..end.div_ceil(SECTOR)).for_each(|sector| self.touch(sector));
    }

    fn set_len(&mut self, bytes: usize, track: bool) {
        let before = self.live.len();
        Blob::edit(&mut self.live).resize(bytes, 0);
        if !track || bytes == before {
            return;
        }
        self.lens.push(bytes);
        self.lens_stuck = false;
        (bytes / SECTOR..before.div_ceil(SECTOR)).for_each(|sector| self.touch(sector));
    }

    /// The live content of a sector is one more version.
    fn touch(&mut self, sector: usize) {
        let now = sector_of(&self.live, sector);
        match self.dirty.get_mut(&sector) {
            Some(dirty) => {
                dirty.stuck = false;
                if dirty.versions.last() != Some(&now) {
                    dirty.versions.push(now);
                }
            }
            None if sector_of(&self.durable, sector) == now => {}
            None => drop(self.dirty.insert(sector, Dirty { versions: vec![now], stuck: false })),
        }
    }

    fn sync(&mut self) {
        if !self.lens_stuck && self.dirty.values().all(|dirty| !dirty.stuck) {
            self.durable = self.live.clone();
            self.durable_len = self.live.len();
            self.dirty.clear();
            self.lens.clear();
            return;
        }
        let durable = Blob::edit(&mut self.durable);
        self.dirty.retain(|sector, dirty| {
            if !dirty.stuck {
                let (from, to) = (sector * SECTOR, (sector + 1) * SECTOR);
                durable.resize(durable.len().max(to), 0);
                durable[from..to].copy_from_slice(dirty.versions.last().expect("never empty"));
            }
            dirty.stuck
        });
        if !self.lens_stuck {
            self.durable_len = self.live.len();
            self.lens.clear();
        }
    }

    fn sync_failed(&mut self) {
        self.dirty.values_mut().for_each(|dirty| dirty.stuck = true);
        self.lens_stuck = !self.lens.is_empty();
    }

    fn choice(&self, file: FileId, is_model: bool) -> FileChoice {
        let mut sectors = Vec::new();
        for (sector, dirty) in &self.dirty {
            let mut versions = vec![sector_of(&self.durable, *sector)];
            for version in &dirty.versions {
                // The newest keeps its place at the end.
                if let Some(same) = versions.iter().position(|known| known == version) {
                    versions.remove(same);
                }
                versions.push(*version);
            }
            if versions.len() > 1 {
                sectors.push((*sector, versions));
            }
        }
        let lens = [self.durable_len].iter().chain(&self.lens).copied().collect();
        FileChoice { file, is_model, sectors, lens }
    }

    fn picked(&self, choice: &FileChoice, pick: &FilePick) -> Vec<u8> {
        let mut bytes = self.durable.to_vec();
        let whole = choice.longest().max(bytes.len()).div_ceil(SECTOR) * SECTOR;
        bytes.resize(whole, 0);
        for ((sector, versions), version) in choice.sectors.iter().zip(&pick.sectors) {
            bytes[sector * SECTOR..(sector + 1) * SECTOR].copy_from_slice(&versions[*version]);
        }
        if let Some(Torn { sector, head, tail, at }) = pick.torn {
            let (sector, versions) = &choice.sectors[sector];
            let from = sector * SECTOR;
            bytes[from..from + at].copy_from_slice(&versions[head][..at]);
            bytes[from + at..from + SECTOR].copy_from_slice(&versions[tail][at..]);
        }
        bytes.truncate(pick.len);
        bytes
    }
}
