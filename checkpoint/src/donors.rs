//! Where the right content of a damaged block may still be.
//!
//! A block's sum says whether content is right, so it does not matter who has it, nor how a copy came to be, nor whether its
//! own header can be read. Looked at, in this order: live weights; copies of the directory, that is those that somebody
//! names and those in `MODEL.generations`; the damaged block itself with one bit turned, 131,072 contents that are hashed
//! in about a second, because a medium or a memory that fails by itself mostly flips one.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use crate::checkpoint::LiveWeights;
use crate::directories;
use crate::disk::{Disk, DiskFile};
use crate::error::{Error, Result};
use crate::generation::{Generation, TensorSum};
use crate::layout::{read_header, tensors_of};
use crate::sums::{self, Sum};

/// Where a repair looks, beside the damaged blocks themselves and `MODEL.generations`.
#[derive(Clone, Copy, Default)]
pub struct Sources<'a> {
    /// Live weights: those blocks of them that are still the generation's. Only read.
    pub live: Option<&'a dyn LiveWeights>,
    /// Copies of the model directory, of this or of any other generation; with `.apollod`, or without as exports are.
    pub copies: &'a [PathBuf],
}

/// Damaged blocks in which one wrong bit is looked for, each for about a second.
const TURNED_MAX: u32 = 32;
/// The longest header in which one is looked for: the time grows with the square of the length.
const TURNED_BYTES_MAX: usize = 32 << 10;

/// All that is looked at.
pub(crate) struct Donors<'a> {
    live: Option<(&'a dyn LiveWeights, HashMap<&'a str, usize>)>,
    pub(crate) copies: Vec<Copy>,
    turns_left: u32,
}

/// A copy of a model directory.
pub(crate) struct Copy {
    pub(crate) dir: PathBuf,
    /// Its safetensors files, by name.
    files: HashMap<String, DiskFile>,
    /// Each tensor's file, first byte in it and length, as far as headers can be read.
    tensors: HashMap<String, (String, u64, u64)>,
}

/// A tensor somewhere.
enum Place<'a> {
    Live(&'a dyn LiveWeights, usize),
    File(&'a DiskFile, u64),
}

impl Place<'_> {
    /// Fills `buf` from byte `at` of the tensor; false if that cannot be read, which is as good as not right.
    fn read(&self, at: u64, buf: &mut [u8]) -> bool {
        match self {
            Place::Live(live, tensor) => {
                live.read(*tensor, at, buf);
                true
            }
            Place::File(file, start) => file.read_at(buf, start + at).is_ok(),
        }
    }
}

impl<'a> Donors<'a> {
    /// Opens the copies.
    ///
    /// Errors: one that was named is not there or holds no safetensors file.
    pub(crate) fn open(disk: &Disk, model: &Path, sources: &Sources<'a>) -> Result<Donors<'a>> {
        let mut copies = Vec::new();
        for dir in sources.copies {
            let copy = Copy::open(disk, dir)?;
            if copy.files.is_empty() {
                let reason = "it holds no safetensors file to repair from".into();
                return Err(Error::Model { path: dir.clone(), reason });
            }
            copies.push(copy);
        }
        for dir in directories::all(model)? {
            copies.extend(Copy::open(disk, &dir).ok());
        }
        let live = sources.live.map(|live| {
            let named = live.tensors().iter().enumerate().map(|(i, tensor)| (tensor.name.as_str(), i));
            (live, named.collect())
        });
        Ok(Donors { live, copies, turns_left: TURNED_MAX })
    }

    /// From now on looks for no turned bits.
    pub(crate) fn turn_nothing(&mut self) {
        self.turns_left = 0;
    }

    /// Puts the right content of a block of the file in the place of the damaged one; says where it was.
    pub(crate) fn find(
        &mut self,
        of: &Generation,
        tensor: &TensorSum,
        block: &std::ops::Range<u64>,
        want: &Sum,
        content: &mut [u8],
    ) -> Option<String> {
        let mut found = vec![0; content.len()];
        for (place, name) in self.places(of, tensor) {
            if place.read(block.start - tensor.offset, &mut found) && &sums::sum(&found) == want {
                content.copy_from_slice(&found);
                return Some(name);
            }
        }
        self.turn_one_bit(content, want)
    }

    /// The same for the header of a shard.
    pub(crate) fn find_header(&mut self, file: &str, want: &Sum, content: &mut [u8]) -> Option<String> {
        let mut found = vec![0; content.len()];
        for copy in &self.copies {
            let read = copy.files.get(file).is_some_and(|file| file.read_at(&mut found, 0).is_ok());
            if read && &sums::sum(&found) == want {
                content.copy_from_slice(&found);
                return Some(copy.dir.display().to_string());
            }
        }
        self.turn_one_bit(content, want)
    }

    /// The block sums of a tensor of which only its own checksum is known, from wherever all of it is right.
    pub(crate) fn sums_of(&self, of: &Generation, tensor: &TensorSum) -> Option<Vec<Sum>> {
        let mut buf = Vec::new();
        self.places(of, tensor).into_iter().find_map(|(place, _)| {
            let sum = |block: std::ops::Range<u64>| {
                buf.resize((block.end - block.start) as usize, 0);
                place.read(block.start - tensor.offset, &mut buf).then(|| sums::sum(&buf))
            };
            let all: Option<Vec<Sum>> = sums::blocks(tensor.range()).map(sum).collect();
            all.filter(|all| sums::root(all) == tensor.blake3)
        })
    }

    /// Wherever a tensor may be, with words for it.
    fn places(&self, of: &Generation, tensor: &TensorSum) -> Vec<(Place<'_>, String)> {
        let mut places = Vec::new();
        if let Some((live, named)) = &self.live
            && let Some(i) = named.get(tensor.name.as_str())
            && live.tensors()[*i].bytes == tensor.bytes
        {
            places.push((Place::Live(*live, *i), "the live weights".into()));
        }
        let recorded = &of.shards[tensor.shard].file;
        for copy in &self.copies {
            let said = copy.tensors.get(&tensor.name).filter(|(_, _, bytes)| *bytes == tensor.bytes);
            let said = said.map(|(file, at, _)| (file, *at));
            // Where the generation has it too, for a copy whose header is what is damaged.
            let mut tried = [said, Some((recorded, tensor.offset))];
            if tried[0] == tried[1] {
                tried[0] = None;
            }
            for (file, at) in tried.into_iter().flatten() {
                if let Some(file) = copy.files.get(file) {
                    places.push((Place::File(file, at), copy.dir.display().to_string()));
                }
            }
        }
        places
    }

    fn turn_one_bit(&mut self, content: &mut [u8], want: &Sum) -> Option<String> {
        if self.turns_left == 0 || content.len() > TURNED_BYTES_MAX {
            return None;
        }
        self.turns_left -= 1;
        for at in 0..content.len() {
            for bit in 0..8 {
                content[at] ^= 1 << bit;
                if &sums::sum(content) == want {
                    return Some("the block itself, in which one bit was flipped".into());
                }
                content[at] ^= 1 << bit;
            }
        }
        None
    }
}

impl Copy {
    fn open(disk: &Disk, dir: &Path) -> Result<Copy> {
        let mut copy = Copy { dir: dir.to_path_buf(), files: HashMap::new(), tensors: HashMap::new() };
        for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
            let path = entry.map_err(Error::io("list", dir))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if !name.ends_with(".safetensors") {
                continue;
            }
            let bytes = fs::metadata(&path).map_err(Error::io("read", &path))?.len();
            copy.files.insert(name.into(), disk.open(&path)?);
            let header = read_header(disk, &path, bytes).unwrap_or_default();
            // A header that is damaged says nothing; tensors are then looked for where they were recorded.
            let Some(Ok(metadata)) = header.get(8..).map(serde_json::from_slice::<Metadata>) else { continue };
            for tensor in tensors_of(&metadata, header.len(), 0) {
                copy.tensors.insert(tensor.name, (name.to_owned(), tensor.offset, tensor.bytes));
            }
        }
        Ok(copy)
    }
}
