//! Damage put right from content that has the recorded sum.
//!
//! A generation records BLAKE3 of every 16 KiB block, of every header, of its optimizer state and of its own document. So
//! content is known to be right whoever has it ([`Sources`]), and nothing else is ever written. A delta has sums of its own,
//! and ends with the document of its generation: one from a copy is right if it is whole and that document has our lineage.
//! A document from a copy is ours if what is here came after it, or if it has the sums of what is here of its generation.
//!
//! # Why it needs no journal
//!
//! A repaired block is only ever the content that the current generation has there. A crash in the midst of its write leaves
//! sectors that are damaged as before or right, so the block is as damaged as it was, or less, and is found and written
//! again: writing it twice, or only its end, comes to the same. No other byte changes, so the files are never of a
//! generation that they were not of before. What was written is synced before it is reported as repaired.
//!
//! A journal that a crash left is dealt with first, as every opener does. Where that stops at damage ([`Error::Foreign`],
//! [`Error::Stranded`]) blocks are repaired to the current generation, which the journal leads back to: to undo what is
//! already undone changes nothing. Then it is tried again.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::checkpoint::{Checkpoint, Options, open_state, take_lock};
use crate::disk::{Disk, DiskFile};
use crate::donors::Donors;
use crate::error::{Error, Result};
use crate::export::DOCUMENT;
use crate::generation::{Generation, Paths, TensorSum};
use crate::journal::Reader;
use crate::layout::Layout;
use crate::readers::keep_out;
use crate::recover;
use crate::sums::{self, Sum};
use crate::verify::{Damage, verify_files};
use crate::verify_history::{Earlier, earlier, verify_history, whole_delta};

pub use crate::donors::Sources;

/// Something that a repair put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    /// The file, and the tensor in it.
    pub what: String,
    /// Its blocks of 16 KiB that were damaged; 0 for what has none.
    pub blocks: u64,
    /// Where the right content was.
    pub from: String,
}

impl fmt::Display for Repaired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Repaired { what, blocks, from } = self;
        match blocks {
            0 => write!(f, "{what}: from {from}"),
            1 => write!(f, "{what}: 1 block of 16 KiB from {from}"),
            blocks => write!(f, "{what}: {blocks} blocks of 16 KiB from {from}"),
        }
    }
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepairReport {
    /// The generation that the files are, where nothing is damaged any more.
    pub generation: u64,
    /// What was put right.
    pub repaired: Vec<Repaired>,
    /// What is damaged still: its content was nowhere.
    pub damage: Vec<Damage>,
}

impl fmt::Display for RepairReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}: ", self.generation)?;
        match (self.repaired.len(), self.damage.len()) {
            (0, 0) => f.write_str("all checksums match, nothing to repair")?,
            (repaired, 0) => write!(f, "{repaired} repaired, all checksums match now")?,
            (repaired, left) => write!(f, "{repaired} repaired, {left} still damaged")?,
        }
        self.repaired.iter().try_for_each(|repaired| write!(f, "\n  repaired: {repaired}"))?;
        self.damage.iter().try_for_each(|damage| write!(f, "\n  still damaged: {damage}"))
    }
}

impl Checkpoint {
    /// Puts right what is damaged of the current generation and of documents, deltas and states of earlier ones, where the right
    /// content is found. Programs that load the model are waited for.
    pub fn repair(&mut self, sources: &Sources) -> Result<RepairReport> {
        self.usable()?;
        let (disk, paths, wait) = self.place();
        let _readers = keep_out(disk, paths, wait)?;
        let done = Repair::open(disk, paths, sources).and_then(|mut repair| {
            repair.documents()?;
            repair.generation(self.current())
        });
        if let Err(error @ Error::Sync { .. }) = &done {
            self.give_up(error);
        }
        done
    }
}

/// [`Checkpoint::repair`] of a directory that nobody has open, also where its damage keeps it from being opened.
///
/// Errors: no generations, the lock is taken, a copy that is none, or the system's. What could not be repaired is in the report.
pub fn repair(model_dir: &Path, sources: &Sources) -> Result<RepairReport> {
    let (disk, paths) = (Disk::real(), Paths::new(model_dir));
    if paths.numbers(&disk)?.is_empty() && paths.missing(&disk)?.is_none() {
        let reason = "it has no generations, so there are no checksums to repair by".into();
        return Err(Error::Model { path: model_dir.to_path_buf(), reason });
    }
    let _lock = take_lock(&disk, &paths)?;
    let _readers = keep_out(&disk, &paths, Options::default().readers_wait)?;
    for dir in paths.dirs() {
        disk.create_dir(&dir)?;
    }
    let mut repair = Repair::open(&disk, &paths, sources)?;
    repair.documents()?;
    let recovered = recover_journal(&disk, &paths);
    if recovered.is_err() {
        // Most of what differs was half written, which is no flipped bit.
        repair.donors.turn_nothing();
    }
    let current = paths.newest(&disk)?.expect("there are generations");
    let mut report = repair.generation(&current)?;
    if recovered.is_err()
        && let Err(error) = recover_journal(&disk, &paths)
    {
        report.damage.push(Damage::Other { reason: error.to_string() });
    }
    Ok(report)
}

/// Deals with a journal, if there is one.
fn recover_journal(disk: &Disk, paths: &Paths) -> Result<()> {
    if !paths.is_torn(disk)? {
        return Ok(());
    }
    let layout = Layout::load(disk, &paths.model)?;
    recover::recover(disk, paths, &layout).map(drop)
}

/// A repair under way.
struct Repair<'a> {
    disk: &'a Disk,
    paths: &'a Paths,
    donors: Donors<'a>,
    repaired: Vec<Repaired>,
}

impl<'a> Repair<'a> {
    fn open(disk: &'a Disk, paths: &'a Paths, sources: &Sources<'a>) -> Result<Repair<'a>> {
        let donors = Donors::open(disk, &paths.model, sources)?;
        Ok(Repair { disk, paths, donors, repaired: Vec::new() })
    }

    fn note(&mut self, what: String, blocks: u64, from: String) {
        match self.repaired.iter_mut().find(|repaired| repaired.what == what && repaired.from == from) {
            Some(repaired) => repaired.blocks += blocks,
            None => self.repaired.push(Repaired { what, blocks, from }),
        }
    }

    /// Documents of generations: they end the deltas, and lie beside copies. One that is of no use any more goes. From the newest
    /// on, so that each has a later one to answer to.
    fn documents(&mut self) -> Result<()> {
        let (disk, paths) = (self.disk, self.paths);
        let mut numbers: BTreeSet<u64> = paths.numbers(disk)?.into_iter().chain(paths.missing(disk)?).collect();
        let newest = numbers.last().copied();
        while let Some(number) = numbers.pop_last() {
            if Some(number) == newest || disk.exists(&paths.delta(number + 1))? || disk.exists(&paths.state(number))? {
                self.mend_document(number)?;
            } else if !self.bring_back(number)? && matches!(paths.load(disk, number), Err(Error::Generation { .. })) {
                let path = paths.generation(number);
                if disk.remove(&path)? {
                    disk.sync_dir(path.parent().expect("it lies in a folder"))?;
                    self.note(path.display().to_string(), 0, "nowhere, and removed: nothing leads back to it".into());
                }
            }
            // What it came from, of which there may be no trace.
            numbers
                .extend(paths.load(disk, number).ok().filter(|of| !of.tensors.is_empty()).and_then(|of| of.previous));
        }
        Ok(())
    }

    /// Brings back a generation of which nothing is here, if a copy has all of it: the document last, which says that it is there.
    fn bring_back(&mut self, number: u64) -> Result<bool> {
        let Err(Error::Generation { .. }) = self.paths.load(self.disk, number) else { return Ok(true) };
        let Some((document, _)) = self.document(number).filter(|_| self.delta_of(number + 1).is_some()) else {
            return Ok(false);
        };
        if document.state.is_some() && self.state_of(&document).is_none() {
            return Ok(false);
        }
        self.delta(number + 1)?;
        self.state(&document)?;
        self.mend_document(number)
    }

    /// Whether a document is whole, or is now.
    fn mend_document(&mut self, number: u64) -> Result<bool> {
        let Err(Error::Generation { .. }) = self.paths.load(self.disk, number) else { return Ok(true) };
        let Some((document, from)) = self.document(number) else { return Ok(false) };
        let path = self.paths.generation(number);
        self.disk.replace(&path, &document.to_json())?;
        self.note(path.display().to_string(), 0, from);
        Ok(true)
    }

    /// A whole document of a generation, from anywhere.
    fn document(&self, number: u64) -> Option<(Generation, String)> {
        for path in [self.paths.delta(number), self.paths.journal()] {
            let read = Reader::open(self.disk, &path).and_then(Reader::last);
            if let Some(document) = read.ok().filter(|document| document.generation == number) {
                return Some((document, path.display().to_string()));
            }
        }
        for copy in self.copies() {
            for path in [copy.generation(number), copy.model.join(DOCUMENT)] {
                let read = self.disk.read(&path).ok().and_then(|bytes| Generation::from_json(&bytes).ok());
                // One without tensors is of a copy that has let go of it, and no help to who wants it.
                let whole = read.filter(|document| document.generation == number && !document.tensors.is_empty());
                if let Some(document) = whole.filter(|document| self.is_ours(document, &copy)) {
                    return Some((document, path.display().to_string()));
                }
            }
        }
        None
    }

    /// What is known here of a generation.
    fn here(&self, number: u64) -> Option<Generation> {
        let of_delta = || Reader::open(self.disk, &self.paths.delta(number)).and_then(Reader::last).ok();
        self.paths.load(self.disk, number).ok().or_else(of_delta).filter(|document| document.generation == number)
    }

    /// Whether a copy's document is that of our generation of its number. What is damaged here says nothing against it.
    fn is_ours(&self, document: &Generation, copy: &Paths) -> bool {
        let number = document.generation;
        if number > 0 && self.here(number - 1).is_some_and(|before| !document.is_after(&before)) {
            return false;
        }
        // By the first later one that is known here; the copy knows those between.
        let mut before = document.clone();
        loop {
            if let Some(after) = self.here(before.generation + 1) {
                return after.is_after(&before);
            }
            match copy.load(self.disk, before.generation + 1) {
                Ok(after) if after.is_after(&before) => before = after,
                _ => break,
            }
        }
        // Or by what is here of it; of the current generation where the copy leads up to one of its number.
        let of = if self.is_newest(before.generation) { &before } else { document };
        let sums = self.disk.read(&self.paths.sums(of.generation)).ok();
        if sums.is_some_and(|sums| blake3::hash(&sums).to_hex().as_str() == of.sums_blake3) {
            return true;
        }
        let state = of.state.is_some() && open_state(self.disk, self.paths, of).is_ok();
        if !self.is_newest(of.generation) {
            return state;
        }
        // The files are to be its own: all of them, or most with the state as well.
        let (here, all) = (of.tensors.iter().filter(|tensor| self.is_here(of, tensor)).count(), of.tensors.len());
        here > 0 && (here == all || state && 2 * here >= all)
    }

    fn is_newest(&self, number: u64) -> bool {
        let last = self.paths.numbers(self.disk).ok().and_then(|numbers| numbers.last().copied());
        last.max(self.paths.missing(self.disk).ok().flatten()).is_none_or(|last| last <= number)
    }

    /// Whether the files hold a tensor as a document has it.
    fn is_here(&self, of: &Generation, tensor: &TensorSum) -> bool {
        let shard = of.shards.get(tensor.shard).map(|shard| self.paths.model.join(&shard.file));
        let file = shard.and_then(|path| self.disk.open(&path).ok());
        let sums = file.and_then(|file| sums::of_file(&file, tensor.range()).ok());
        sums.is_some_and(|sums| sums::root(&sums) == tensor.blake3)
    }

    /// Everything of the current generation; then what is damaged still, here and in the history.
    fn generation(&mut self, current: &Generation) -> Result<RepairReport> {
        self.refuse_other_files(current)?;
        let sums = self.sums(current);
        for shard in 0..current.shards.len() {
            self.shard(current, shard, &sums)?;
        }
        self.write_sums(current, &sums)?;
        self.state(current)?;
        self.history(current)?;
        let mut damage = verify_files(self.disk, self.paths, &self.paths.model, current, true)?.damage;
        damage.extend(verify_history(self.disk, self.paths, current)?.0);
        Ok(RepairReport { generation: current.generation, repaired: std::mem::take(&mut self.repaired), damage })
    }

    /// Refuses files of which several tensors are others than those of a generation whose block sums are not there, as only those of
    /// the current one are: they are more likely those of a later one that was lost than damaged.
    fn refuse_other_files(&self, current: &Generation) -> Result<()> {
        let number = current.generation;
        // A journal explains it: blocks of a sync that was cut short.
        if self.disk.exists(&self.paths.sums(number))? || self.paths.is_torn(self.disk)? {
            return Ok(());
        }
        let others = current.tensors.iter().filter(|tensor| !self.is_here(current, tensor)).count();
        if others <= 1 {
            return Ok(());
        }
        let (of, path) = (current.tensors.len(), self.paths.generation(number));
        let reason = format!(
            "the block sums of generation {number} are missing, and {others} of {of} tensors in the files are not its own: \
             probably a later one was current and is lost; no weights were written. If there was no later one, put sums/{number} \
             back from a copy and repair again; else put .apollod back from a copy that has it, or take the files as they are \
             with `apollod checkpoint adopt {}`",
            self.paths.model.display()
        );
        Err(Error::Document { path, reason })
    }

    /// Documents, deltas and states of earlier generations, each of which may lead to one that was out of reach.
    fn history(&mut self, current: &Generation) -> Result<()> {
        let mut reached = 0;
        loop {
            let all = earlier(self.disk, self.paths, current)?;
            for Earlier { number, .. } in &all {
                self.delta(number + 1)?;
                self.mend_document(*number)?;
                if let Ok(document) = self.paths.load(self.disk, *number) {
                    self.state(&document)?;
                }
            }
            if all.len() == reached {
                return Ok(());
            }
            reached = all.len();
        }
    }

    /// The block sums of every tensor, as far as they are known: recorded, or of content that has the tensor's checksum.
    fn sums(&self, current: &Generation) -> Vec<Option<Vec<Sum>>> {
        if let Ok(sums) = sums::load(self.disk, self.paths, current) {
            return sums.into_iter().map(Some).collect();
        }
        let of_tensor = |tensor: &TensorSum| {
            let path = self.paths.model.join(&current.shards[tensor.shard].file);
            let here = self.disk.open(&path).and_then(|file| sums::of_file(&file, tensor.range())).ok();
            here.filter(|sums| sums::root(sums) == tensor.blake3).or_else(|| self.donors.sums_of(current, tensor))
        };
        current.tensors.iter().map(of_tensor).collect()
    }

    /// A shard's header and blocks. A file that is not there or has another length is left to who can copy it.
    fn shard(&mut self, current: &Generation, number: usize, sums: &[Option<Vec<Sum>>]) -> Result<()> {
        let shard = &current.shards[number];
        let path = self.paths.model.join(&shard.file);
        if self.disk.stat(&path)?.is_none_or(|stat| stat.bytes != shard.bytes) {
            return Ok(());
        }
        let file = self.disk.open_in_place(&path)?;
        let mut written = self.header(&file, current, number)?;
        for (tensor, sums) in current.tensors.iter().zip(sums).filter(|(tensor, _)| tensor.shard == number) {
            let is = sums::of_file(&file, tensor.range())?;
            let Some(want) = sums else { continue };
            for ((block, is), want) in sums::blocks(tensor.range()).zip(&is).zip(want) {
                if is == want {
                    continue;
                }
                let mut content = vec![0; (block.end - block.start) as usize];
                file.read_at(&mut content, block.start)?;
                if let Some(from) = self.donors.find(current, tensor, &block, want, &mut content) {
                    file.write_at(&content, block.start)?;
                    self.note(format!("{}: tensor `{}`", shard.file, tensor.name), 1, from);
                    written = true;
                }
            }
        }
        if written { file.sync() } else { Ok(()) }
    }

    fn header(&mut self, file: &DiskFile, current: &Generation, number: usize) -> Result<bool> {
        let shard = &current.shards[number];
        let mut header = vec![0; shard.header_bytes as usize];
        file.read_at(&mut header, 0)?;
        let Ok(want) = blake3::Hash::from_hex(&shard.header_blake3) else { return Ok(false) };
        if blake3::hash(&header) == want {
            return Ok(false);
        }
        let Some(from) = self.donors.find_header(&shard.file, want.as_bytes(), &mut header) else { return Ok(false) };
        file.write_at(&header, 0)?;
        self.note(format!("{}: its header", shard.file), 0, from);
        Ok(true)
    }

    /// `sums/G`, where it is damaged and all sums are known. Damaged as it is, it can be written over.
    fn write_sums(&mut self, current: &Generation, sums: &[Option<Vec<Sum>>]) -> Result<()> {
        if sums::load(self.disk, self.paths, current).is_ok() {
            return Ok(());
        }
        let Some(all) = sums.iter().cloned().collect::<Option<Vec<_>>>() else { return Ok(()) };
        let (path, bytes) = (self.paths.sums(current.generation), sums::to_bytes(&all));
        if blake3::hash(&bytes).to_hex().as_str() == current.sums_blake3 {
            self.put(&path, &mut &bytes[..], Path::new("the weights"))?;
        }
        Ok(())
    }

    /// The optimizer state of a generation, from a copy with `.apollod`.
    fn state(&mut self, of: &Generation) -> Result<()> {
        if of.state.is_none() || open_state(self.disk, self.paths, of).is_ok() {
            return Ok(());
        }
        match self.state_of(of) {
            Some((mut state, from)) => self.put(&self.paths.state(of.generation), &mut state, &from),
            None => Ok(()),
        }
    }

    /// A whole state of a generation in a copy.
    fn state_of(&self, of: &Generation) -> Option<(impl io::Read + use<>, PathBuf)> {
        let path = self.paths.state(of.generation);
        let whole = |copy: &Paths| {
            let from = copy.state(of.generation);
            Some((open_state(self.disk, copy, of).ok().filter(|_| !same_file(&from, &path))?, from))
        };
        self.copies().iter().find_map(whole)
    }

    /// The delta of a generation, from a copy with `.apollod`.
    fn delta(&mut self, number: u64) -> Result<()> {
        if whole_delta(self.disk, self.paths, number).is_ok() {
            return Ok(());
        }
        let Some(from) = self.delta_of(number) else { return Ok(()) };
        self.put(&self.paths.delta(number), &mut self.disk.open(&from)?, &from)
    }

    /// A whole delta in a copy that ends with our generation of its number: with the same lineage, it begins with ours too.
    fn delta_of(&self, number: u64) -> Option<PathBuf> {
        let document = self.here(number)?;
        let ours = |copy: &Paths| {
            let path = copy.delta(number);
            whole_delta(self.disk, copy, number).ok()?;
            let last = Reader::open(self.disk, &path).and_then(Reader::last).ok()?;
            (last.lineage == document.lineage && !same_file(&path, &self.paths.delta(number))).then_some(path)
        };
        self.copies().iter().find_map(ours)
    }

    /// `.apollod` of the copies.
    fn copies(&self) -> Vec<Paths> {
        self.donors.copies.iter().map(|copy| Paths::new(&copy.dir)).collect()
    }

    /// Writes a whole file in the place of a damaged or missing one, which goes first: a name of ours may be a link to what is
    /// not. A crash leaves it missing or as damaged as it was.
    fn put(&mut self, path: &Path, whole: &mut dyn io::Read, from: &Path) -> Result<()> {
        self.disk.remove(path)?;
        let mut file = self.disk.create(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match whole.read(&mut buffer).map_err(Error::io("read", from))? {
                0 => break,
                n => io::Write::write_all(&mut file, &buffer[..n]).map_err(Error::io("write", path))?,
            }
        }
        file.sync()?;
        self.disk.sync_dir(path.parent().expect("it lies in a folder"))?;
        self.note(path.display().to_string(), 0, from.display().to_string());
        Ok(())
    }
}

/// Whether two names are of one file, which read well once and is no source for itself.
fn same_file(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
    id(a).is_some() && id(a) == id(b)
}
