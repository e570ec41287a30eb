//! What a program that loads the model must find: the files against the current generation, as they are read.
//!
//! A loader reads every byte anyway, and may look at each tensor while it is in the core's cache: BLAKE3 of the blocks on
//! all cores. The header of each shard is looked at before, because it says which bytes are which tensor's.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::disk::Disk;
use crate::error::Result;
use crate::generation::{Generation, Paths, TensorSum};
use crate::sums::{self, Sum};
use crate::verify::Damage;

/// Blocks that are worth a thread: 4 MiB of them.
const BLOCKS_PER_THREAD_MIN: usize = 256;

/// The current generation of a directory; none if it never had one. Its content may be under way: that is what
/// [`crate::Reading`] is for.
///
/// Errors: a damaged document.
pub fn current(model_dir: &Path) -> Result<Option<Generation>> {
    Paths::new(model_dir).newest(&Disk::real())
}

/// The tensors of a generation, to be compared with what is read.
#[derive(Debug)]
pub struct Expected {
    dir: PathBuf,
    generation: Generation,
    by_name: HashMap<String, usize>,
    threads: usize,
}

/// What was read is not what the generation recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unexpected {
    /// The model directory.
    pub dir: PathBuf,
    /// The current generation.
    pub generation: u64,
    /// What differs.
    pub damage: Damage,
}

impl fmt::Display for Unexpected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Unexpected { dir, generation, damage } = self;
        let dir = dir.display();
        write!(
            f,
            "{dir} is not as generation {generation} recorded it: {damage}; `apollod checkpoint verify {dir}` names every \
             damaged block and `apollod checkpoint repair {dir}` puts them right from live weights, MODEL.generations or a \
             copy (--from); only if the file was changed on purpose, `apollod checkpoint adopt {dir}` takes it as it is"
        )
    }
}

impl std::error::Error for Unexpected {}

impl Expected {
    /// What `model_dir` should hold; none if it never had a generation, and so no checksums.
    ///
    /// Errors: a damaged document.
    pub fn of(model_dir: &Path) -> Result<Option<Expected>> {
        let Some(generation) = current(model_dir)? else { return Ok(None) };
        let by_name =
            generation.tensors.iter().enumerate().map(|(index, tensor)| (tensor.name.clone(), index)).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Some(Expected { dir: model_dir.to_path_buf(), generation, by_name, threads }))
    }

    /// Compares the length and the header of every shard.
    ///
    /// Errors: a file that cannot be read. The inner result is what was found.
    pub fn check_headers(&self) -> Result<std::result::Result<(), Unexpected>> {
        let disk = Disk::real();
        for shard in &self.generation.shards {
            let (path, file) = (self.dir.join(&shard.file), shard.file.clone());
            let bytes = disk.stat(&path)?.map(|stat| stat.bytes);
            if bytes != Some(shard.bytes) {
                let is = bytes.map_or("it is not there".into(), |is| format!("it has {is} bytes, not {}", shard.bytes));
                return Ok(Err(self.unexpected(Damage::File { file, reason: is })));
            }
            let mut header = vec![0; shard.header_bytes as usize];
            disk.open(&path)?.read_at(&mut header, 0)?;
            if blake3::hash(&header).to_hex().as_str() != shard.header_blake3 {
                return Ok(Err(self.unexpected(Damage::Header { file })));
            }
        }
        Ok(Ok(()))
    }

    /// Compares a whole tensor's bytes.
    ///
    /// Errors: they are not the generation's, or it has no such tensor.
    pub fn check(&self, name: &str, bytes: &[u8]) -> std::result::Result<(), Unexpected> {
        let tensor = self.by_name.get(name).map(|&index| &self.generation.tensors[index]);
        let matches =
            |tensor: &&TensorSum| tensor.bytes == bytes.len() as u64 && self.root(tensor, bytes) == tensor.blake3;
        if tensor.filter(matches).is_some() {
            return Ok(());
        }
        let file = tensor.map_or_else(String::new, |tensor| self.generation.shards[tensor.shard].file.clone());
        Err(self.unexpected(Damage::Tensor { file, tensor: name.into(), blocks: Vec::new() }))
    }

    fn unexpected(&self, damage: Damage) -> Unexpected {
        Unexpected { dir: self.dir.clone(), generation: self.generation.generation, damage }
    }

    /// The checksum of a tensor's bytes. Blocks are those of its place in its file.
    fn root(&self, tensor: &TensorSum, bytes: &[u8]) -> String {
        let place = tensor.range();
        let blocks: Vec<_> = sums::blocks(place.clone())
            .map(|b| (b.start - place.start) as usize..(b.end - place.start) as usize)
            .collect();
        let mut all: Vec<Sum> = vec![[0; 32]; blocks.len()];
        let all_blocks = blocks.len();
        let share = all_blocks.div_ceil(self.threads).max(BLOCKS_PER_THREAD_MIN);
        std::thread::scope(|scope| {
            for (blocks, sums) in blocks.chunks(share).zip(all.chunks_mut(share)) {
                let work = move || {
                    for (block, sum) in blocks.iter().zip(sums) {
                        *sum = sums::sum(&bytes[block.clone()]);
                    }
                };
                match blocks.len() == all_blocks {
                    true => work(),
                    false => drop(scope.spawn(work)),
                }
            }
        });
        sums::root(&all)
    }
}
