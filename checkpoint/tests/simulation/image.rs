//! A disk at rest: names and contents.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Deref;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Bytes that a disk writes whole, or tears once.
pub const SECTOR: usize = 512;
pub type Sector = [u8; SECTOR];
/// Index of a file's content; a name is not the file.
pub type FileId = usize;

/// A content, which knows its checksum once somebody asked.
#[derive(Debug, Default)]
pub struct Blob {
    bytes: Vec<u8>,
    hash: OnceLock<[u8; 32]>,
}

impl Blob {
    pub fn new(bytes: Vec<u8>) -> Arc<Blob> {
        Arc::new(Blob { bytes, hash: OnceLock::new() })
    }

    pub fn hash(&self) -> &[u8; 32] {
        self.hash.get_or_init(|| *blake3::hash(&self.bytes).as_bytes())
    }

    /// The content for changing it; others keep it as it is.
    pub fn edit(blob: &mut Arc<Blob>) -> &mut Vec<u8> {
        let blob = Arc::make_mut(blob);
        blob.hash.take();
        &mut blob.bytes
    }
}

impl Clone for Blob {
    fn clone(&self) -> Blob {
        Blob { bytes: self.bytes.clone(), hash: OnceLock::new() }
    }
}

impl Deref for Blob {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

/// A path that is compared byte by byte, which is much faster than part by part.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(OsString);

impl Key {
    pub fn path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// True if it is directly in the folder.
    pub fn is_in(&self, dir: &Path) -> bool {
        let rest = self.0.as_encoded_bytes().strip_prefix(dir.as_os_str().as_encoded_bytes());
        rest.and_then(|rest| rest.strip_prefix(b"/")).is_some_and(|name| !name.contains(&b'/'))
    }
}

impl From<&Path> for Key {
    fn from(path: &Path) -> Key {
        Key(path.into())
    }
}

impl Borrow<OsStr> for Key {
    fn borrow(&self) -> &OsStr {
        &self.0
    }
}

/// Something for each name.
pub type Names<T> = BTreeMap<Key, T>;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Dir,
    File(FileId),
}
/// A disk at rest: names and contents. Two names may share a content.
#[derive(Debug, Clone, Default)]
pub struct Image {
    pub names: Names<Node>,
    pub files: Vec<Arc<Blob>>,
}

impl Image {
    /// What a name stands for.
    pub fn node(&self, path: &Path) -> Option<Node> {
        self.names.get(path.as_os_str()).copied()
    }

    /// Adds a file, and the folders above it.
    pub fn put(&mut self, path: &Path, bytes: Vec<u8>) {
        for dir in path.ancestors().skip(1).filter(|dir| *dir != Path::new("")) {
            self.names.insert(dir.into(), Node::Dir);
        }
        self.names.insert(path.into(), Node::File(self.files.len()));
        self.files.push(Blob::new(bytes));
    }

    /// A file's content.
    pub fn get(&self, path: &Path) -> Option<&Arc<Blob>> {
        match self.node(path)? {
            Node::Dir => None,
            Node::File(file) => Some(&self.files[file]),
        }
    }

    /// A checksum of everything that can be reached by a name but `except`; which names share a content counts.
    pub fn hash(&self, except: Option<&Path>) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut first: BTreeMap<FileId, usize> = BTreeMap::new();
        for (i, (path, node)) in self.names.iter().filter(|(path, _)| Some(path.path()) != except).enumerate() {
            hasher.update(path.0.as_encoded_bytes()).update(&[0]);
            let Node::File(file) = node else { continue };
            match *first.entry(*file).or_insert(i) {
                same if same < i => hasher.update(&[2]).update(&(same as u64).to_le_bytes()),
                _ => hasher.update(&[1]).update(self.files[*file].hash()),
            };
        }
        *hasher.finalize().as_bytes()
    }
}
