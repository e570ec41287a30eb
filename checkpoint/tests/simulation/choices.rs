//! What is not certain after a crash, and one choice of it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::image::{FileId, Node, Sector};

/// One choice for everything that is not certain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pick {
    /// For each name of [`Choices::names`] the index of a version.
    pub names: Vec<usize>,
    /// For each file of [`Choices::files`].
    pub files: Vec<FilePick>,
}

impl Pick {
    /// True if a sector is torn.
    pub fn is_torn(&self) -> bool {
        self.files.iter().any(|file| file.torn.is_some())
    }
}

/// One choice for one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FilePick {
    /// For each sector of [`FileChoice::sectors`] the index of a version.
    pub sectors: Vec<usize>,
    pub len: usize,
    pub torn: Option<Torn>,
}

/// The sector of this choice begins as one version and ends as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Torn {
    pub sector: usize,
    pub head: usize,
    pub tail: usize,
    pub at: usize,
}

/// What is not certain at a position.
pub struct Choices {
    pub names: Vec<NameChoice>,
    pub files: Vec<FileChoice>,
    /// Files that a certain name leads to.
    pub held: BTreeSet<FileId>,
    pub links: Vec<Link>,
}

/// A rename that is pending: if `from` has its version or a later one, then `to` has.
pub struct Link {
    /// None if the old name is certain to be gone.
    pub from: Option<(usize, usize)>,
    pub to: (usize, usize),
}

pub struct NameChoice {
    pub path: PathBuf,
    pub versions: Vec<Option<Node>>,
}

pub struct FileChoice {
    pub file: FileId,
    /// One of the model's own files.
    pub is_model: bool,
    /// Index of the sector and its different contents, the durable one first.
    pub sectors: Vec<(usize, Vec<Sector>)>,
    /// The lengths that it went through, the durable one first; while it grew, any length in between.
    pub lens: Vec<usize>,
}

impl Choices {
    /// False if a rename would have lost the file.
    pub fn allows(&self, names: &[usize]) -> bool {
        let gone = |from: Option<(usize, usize)>| from.is_none_or(|(name, version)| names[name] >= version);
        self.links.iter().all(|link| !gone(link.from) || names[link.to.0] >= link.to.1)
    }

    /// The choice in which nothing since the last barriers has happened, or everything.
    pub fn extreme(&self, new: bool) -> Pick {
        let names = self.names.iter().map(|name| if new { name.versions.len() - 1 } else { 0 }).collect();
        Pick { names, files: self.files.iter().map(|file| file.extreme(new)).collect() }
    }
}

impl FileChoice {
    /// Nothing written, or everything.
    pub fn extreme(&self, new: bool) -> FilePick {
        let sectors = self.sectors.iter().map(|(_, versions)| if new { versions.len() - 1 } else { 0 }).collect();
        let len = if new { self.lens[self.lens.len() - 1] } else { self.lens[0] };
        FilePick { sectors, len, torn: None }
    }

    /// The longest that it may be.
    pub fn longest(&self) -> usize {
        *self.lens.iter().max().expect("the durable one is there")
    }
}
