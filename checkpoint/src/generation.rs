//! A generation: what the files held at one moment, as a sealed JSON document.
//!
//! `seal`, the last field, is BLAKE3 of the document's bytes without the seal's own 64 digits, so that a
//! flipped bit in it is found too.
//! Documents of generations that can no longer be restored are kept without their tensors.
//!
//! `lineage` chains the documents of a history: two directories with the same one have had the same history up to there, so that
//! a document or a delta of another one is never taken for ours, however much it looks alike.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::journal::Reader;

/// The version of the document that this crate writes and reads.
pub(crate) const VERSION: u32 = 3;

/// Hexadecimal digits of a seal, and what follows them in a document.
const SEAL_LEN: usize = 64;
const AFTER_SEAL: &[u8] = b"\"\n}";

/// The seal of a document's bytes, whatever digits stand in its place; none if it is too short.
fn seal_of(document: &[u8]) -> Option<String> {
    let before = document.len().checked_sub(SEAL_LEN + AFTER_SEAL.len())?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&document[..before]);
    hasher.update(&document[before + SEAL_LEN..]);
    Some(hasher.finalize().to_hex().to_string())
}

/// What a generation says beside the bytes: how far training was.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Sequence number of the last example trained into it; later ones are to be replayed.
    pub cursor: u64,
    /// Optimizer steps.
    pub step: u64,
    /// Examples trained in all.
    pub examples: u64,
    /// Mean loss as last measured, in nats per token.
    pub loss: Option<f32>,
    /// Version of the live weights: counts applied updates.
    pub weight_version: u64,
    /// Epoch of the server whose weights these were: random per load.
    pub epoch: String,
}

impl Progress {
    /// Whether training is where it was: no example was consumed in between, trained or skipped. Who serves the weights
    /// and how their versions are counted may differ.
    pub(crate) fn stands_at(&self, other: &Progress) -> bool {
        let place = |of: &Progress| (of.cursor, of.step, of.examples);
        place(self) == place(other)
    }
}

/// One safetensors file of a generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardSum {
    /// Its name in the model directory.
    pub file: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Bytes of its header, with the 8 bytes of the length.
    pub header_bytes: u64,
    /// BLAKE3 of the header, hexadecimal.
    pub header_blake3: String,
}

/// One tensor of a generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorSum {
    /// Its Hugging Face name.
    pub name: String,
    /// Index of its file in [`Generation::shards`].
    pub shard: usize,
    /// Its dtype as safetensors writes it, such as "BF16".
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where it starts in its file.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 of the BLAKE3 of its blocks of 16 KiB (`sums/G`), hexadecimal.
    pub blake3: String,
}

impl TensorSum {
    /// Where it lies in its file.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

/// The optimizer state of a generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StateSum {
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 of its bytes, hexadecimal.
    pub blake3: String,
}

/// A published generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// Version of this document, 3.
    pub version: u32,
    /// Its number; 0 is the base.
    pub generation: u64,
    /// The one before; none for the base and for adopted files, which have nothing to go back to.
    pub previous: Option<u64>,
    /// The generation whose content this one repeats, if it came from a rollback.
    pub rollback_of: Option<u64>,
    /// When it was made, in seconds since 1970 UTC.
    pub created_unix: u64,
    /// The same, as RFC 3339.
    pub created: String,
    /// How far training was.
    #[serde(flatten)]
    pub progress: Progress,
    /// 4 KiB blocks of the tensors that were compared.
    pub blocks_total: u64,
    /// Those that differed.
    pub blocks_changed: u64,
    /// Length of the journal up to the frame that holds this document.
    pub journal_bytes: u64,
    /// Bytes written into the shards.
    pub written_bytes: u64,
    /// `journal_bytes` over `written_bytes`; 0 if nothing was written.
    pub ratio: f64,
    /// The optimizer state, if there is one.
    pub state: Option<StateSum>,
    /// BLAKE3 of `sums/G`, hexadecimal.
    pub sums_blake3: String,
    /// The files.
    pub shards: Vec<ShardSum>,
    /// All tensors of the files, by shard and offset; empty once it cannot be restored any more.
    pub tensors: Vec<TensorSum>,
    /// BLAKE3 of the lineage of the generation before it and of what this document says of itself, hexadecimal.
    pub lineage: String,
    /// BLAKE3 of this document's bytes without these 64 hexadecimal digits.
    pub seal: String,
    /// True if the files are these or a rollback to it is possible now. Not part of the document.
    #[serde(skip)]
    pub restorable: bool,
    /// What is wrong with its document, of which then nothing but the number is known. Not part of the document.
    #[serde(skip)]
    pub damage: Option<String>,
}

impl Generation {
    /// One without a state, tensors or files, written by nobody.
    pub(crate) fn empty(number: u64) -> Generation {
        Generation {
            version: VERSION,
            generation: number,
            previous: None,
            rollback_of: None,
            created_unix: 0,
            created: String::new(),
            progress: Progress::default(),
            blocks_total: 0,
            blocks_changed: 0,
            journal_bytes: 0,
            written_bytes: 0,
            ratio: 0.0,
            state: None,
            sums_blake3: String::new(),
            shards: Vec::new(),
            tensors: Vec::new(),
            lineage: String::new(),
            seal: String::new(),
            restorable: false,
            damage: None,
        }
    }

    /// One whose document cannot be read.
    fn damaged(number: u64, error: &Error) -> Generation {
        Generation { damage: Some(error.to_string()), ..Generation::empty(number) }
    }

    /// Its lineage after one with `before`; the base comes after none, "".
    pub(crate) fn lineage_after(&self, before: &str) -> String {
        let Generation { generation, previous, rollback_of, created_unix, progress, state, sums_blake3, .. } = self;
        let said = (before, generation, previous, rollback_of, created_unix, progress, state, sums_blake3);
        blake3::hash(&serde_json::to_vec(&said).expect("plain values")).to_hex().to_string()
    }

    /// Whether it came after exactly this one.
    pub(crate) fn is_after(&self, before: &Generation) -> bool {
        self.generation == before.generation + 1 && self.lineage == self.lineage_after(&before.lineage)
    }

    /// The document's bytes, sealed anew.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut sealed = self.clone();
        sealed.seal = "0".repeat(SEAL_LEN);
        sealed.seal = seal_of(&sealed.text()).unwrap_or_default();
        sealed.text()
    }

    /// Parses and checks the seal; the error says what is wrong.
    pub(crate) fn from_json(bytes: &[u8]) -> std::result::Result<Generation, Unreadable> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let damaged = |error| Unreadable::Damaged(format!("no generation: {error}"));
        let Versioned { version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version != VERSION {
            return Err(Unreadable::Version(version));
        }
        let generation: Generation = serde_json::from_slice(bytes).map_err(damaged)?;
        if seal_of(bytes).as_ref() != Some(&generation.seal) {
            return Err(Unreadable::Damaged("it does not match its seal: a bit flipped, or someone edited it".into()));
        }
        Ok(generation)
    }

    fn text(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a generation has no maps with other keys")
    }

    /// Total bytes of its tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }
}

/// Why a document is not read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// Another build wrote it.
    Version(u32),
    /// It is not what was written.
    Damaged(String),
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unreadable::Version(version) => write!(
                f,
                "it has version {version} and this program reads version {VERSION}; removing .apollod begins anew with \
                 the files as they are"
            ),
            Unreadable::Damaged(reason) => f.write_str(reason),
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(damage) = &self.damage {
            return write!(f, "generation {} · {damage}", self.generation);
        }
        let Progress { cursor, step, examples, loss, .. } = &self.progress;
        write!(
            f,
            "generation {} · {} · cursor {cursor} · step {step} · {examples} examples",
            self.generation, self.created
        )?;
        if let Some(loss) = loss {
            write!(f, " · loss {loss:.4}")?;
        }
        if let Some(to) = self.rollback_of {
            write!(f, " · rollback to {to}")?;
        }
        write!(
            f,
            " · {} of {} blocks changed · journal {} bytes ({:.1}%)",
            self.blocks_changed,
            self.blocks_total,
            self.journal_bytes,
            self.ratio * 100.0
        )?;
        if !self.restorable {
            write!(f, " · not restorable")?;
        }
        Ok(())
    }
}

/// Where everything of one model directory lies.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) model: PathBuf,
    pub(crate) root: PathBuf,
}

impl Paths {
    pub(crate) fn new(model: &Path) -> Paths {
        Paths { model: model.to_path_buf(), root: model.join(".apollod") }
    }

    pub(crate) fn dirs(&self) -> [PathBuf; 4] {
        ["state", "sums", "generations", "history"].map(|name| self.root.join(name))
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// The file whose lock keeps syncs and those who load the model apart.
    pub(crate) fn readers(&self) -> PathBuf {
        self.root.join("readers")
    }

    /// Whether a sync is being written, or a crash left one half written.
    pub(crate) fn is_torn(&self, disk: &Disk) -> Result<bool> {
        disk.exists(&self.journal())
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    pub(crate) fn state(&self, generation: u64) -> PathBuf {
        self.root.join(format!("state/{generation}"))
    }

    pub(crate) fn sums(&self, generation: u64) -> PathBuf {
        self.root.join(format!("sums/{generation}"))
    }

    pub(crate) fn generation(&self, generation: u64) -> PathBuf {
        self.root.join(format!("generations/{generation}.json"))
    }

    pub(crate) fn delta(&self, generation: u64) -> PathBuf {
        self.root.join(format!("history/{generation}.delta"))
    }

    /// Reads one generation's document.
    pub(crate) fn load(&self, disk: &Disk, generation: u64) -> Result<Generation> {
        let path = self.generation(generation);
        let read = match disk.exists(&path)? {
            true => Ok(disk.read(&path)?),
            false => Err(Unreadable::Damaged(self.missed(disk, generation)?)),
        };
        let parsed = read.and_then(|bytes| Generation::from_json(&bytes)).and_then(|parsed| {
            if parsed.generation == generation {
                return Ok(parsed);
            }
            Err(Unreadable::Damaged(format!("it is the document of {}", parsed.generation)))
        });
        parsed.map_err(|unreadable| match unreadable {
            Unreadable::Version(_) => Error::Document { path, reason: unreadable.to_string() },
            Unreadable::Damaged(reason) => Error::Generation { path, model: self.model.clone(), reason },
        })
    }

    /// What is wrong where a document is not there, and why there should be one.
    fn missed(&self, disk: &Disk, generation: u64) -> Result<String> {
        let delta = |number| self.delta(number);
        let traces = [delta(generation), delta(generation + 1), self.sums(generation), self.state(generation)];
        for trace in traces {
            if disk.exists(&trace)? {
                let trace = trace.display();
                return Ok(format!(
                    "it is missing, and {trace} says that there was one (remove that if it never belonged here)"
                ));
            }
        }
        Ok("it is missing, and there was one: that before it is of a generation that was let go of".into())
    }

    /// The numbers of all generations, ascending: those that have a document, and those that must have one, because there is
    /// the delta between them, as there is of published ones alone.
    pub(crate) fn numbers(&self, disk: &Disk) -> Result<Vec<u64>> {
        let mut numbers = disk.numbers(&self.root.join("generations"), ".json")?;
        let deltas = disk.numbers(&self.root.join("history"), ".delta")?;
        numbers.extend(deltas.iter().flat_map(|&number| [number.saturating_sub(1), number]));
        numbers.sort_unstable();
        numbers.dedup();
        Ok(numbers)
    }

    /// The current generation: the one with the highest number.
    ///
    /// Errors: its document is damaged or missing, and so it is not known what the files are.
    pub(crate) fn newest(&self, disk: &Disk) -> Result<Option<Generation>> {
        let numbers = self.numbers(disk)?;
        if let Some(missing) = self.missing(disk)? {
            return self.load(disk, missing).map(Some);
        }
        numbers.last().map(|newest| self.load(disk, *newest)).transpose()
    }

    /// The current generation, if it has neither a document nor a delta, and something else says that there was one: the journal
    /// of the sync after it, block sums and states, which are removed when a newer generation has its document, or a newest
    /// document without tensors, which are taken out for the same reason.
    pub(crate) fn missing(&self, disk: &Disk) -> Result<Option<u64>> {
        let newest = self.numbers(disk)?.last().copied();
        let thin = newest.filter(|newest| self.load(disk, *newest).is_ok_and(|newest| newest.tensors.is_empty()));
        let after_thin = thin.map(|thin| thin + 1);
        let torn = self.is_torn(disk)?;
        if torn && let Ok(journal) = Reader::open(disk, &self.journal()) {
            let before = journal.head.previous;
            return Ok(Some(before).filter(|before| newest.is_none_or(|newest| *before > newest)).or(after_thin));
        }
        let sums = disk.numbers(&self.root.join("sums"), "")?;
        let states = disk.numbers(&self.root.join("state"), "")?;
        // A sync that was cut short before its journal had a head leaves a state that belongs to nothing.
        let held = sums.last().or(states.last().filter(|_| !torn)).copied();
        Ok(match newest {
            // A first use that was cut short leaves the sums of generation 0.
            None => held.filter(|held| *held > 0),
            Some(newest) => {
                let alone = |held: &u64| *held > newest && !sums.contains(&newest);
                held.filter(alone).or(after_thin)
            }
        })
    }

    /// All generations, oldest first, each with whether it can be restored. One whose document cannot be read is there
    /// with what is wrong with it.
    pub(crate) fn list(&self, disk: &Disk) -> Result<Vec<Generation>> {
        let read = |number| self.load(disk, number).unwrap_or_else(|error| Generation::damaged(number, &error));
        let numbers = self.numbers(disk)?.into_iter().chain(self.missing(disk)?);
        let mut all: Vec<Generation> = numbers.map(read).collect();
        let mut reachable = true;
        for generation in all.iter_mut().rev() {
            let state = generation.state.is_none() || disk.exists(&self.state(generation.generation))?;
            generation.restorable = reachable && state && !generation.tensors.is_empty();
            // A delta says by itself what it leads back to: the document of a generation between is not needed.
            let leads_back = generation.previous.is_some() || generation.damage.is_some();
            reachable &= leads_back && disk.exists(&self.delta(generation.generation))?;
        }
        Ok(all)
    }
}

/// RFC 3339 in UTC. The days are turned into a date as in Hinnant's `civil_from_days`: years begin in
/// March, so that the day of leap years comes last.
pub(crate) fn rfc3339(unix: u64) -> String {
    let (days, second) = (unix / 86_400, unix % 86_400);
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // From `date -u -d @N +%FT%TZ`.
        for (unix, want) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_798_761_600, "2027-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix), want);
        }
    }
}
