//! Weights that a sync is measured with, and what training does to them.
//!
//! Matrices are square, bf16, near normal with standard deviation 0.02. A step moves an element by 3e-5 times a normal
//! number and rounds stochastically: most elements keep their value, few change by more than some ulps, and every
//! block that was trained differs somewhere. How well differences compress depends on that.

use anyhow::{Context, Result, ensure};
use checkpoint::{LiveTensor, LiveWeights};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Bytes that a sync writes or leaves alone together, at multiples of it in the file.
pub const BLOCK: u64 = 4096;
/// Rows and columns of a matrix, and of those of a model too small to have many.
pub const SIDES: [usize; 2] = [4096, 1024];
/// A model of large matrices has as many at least.
const MATRICES_MIN: usize = 16;
const SHARDS_MAX: usize = 4;
/// Standard deviation of the weights, and of a step.
const WEIGHT: f32 = 0.02;
const STEP: f32 = 3e-5;

/// Which elements training moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Pattern {
    /// Blocks of 4 KiB drawn at random.
    Blocks,
    /// Whole tensors drawn at random.
    Tensors,
}

/// One safetensors file of the model.
pub struct Shard {
    /// Its name.
    pub file: String,
    /// Bytes before the first tensor.
    header_bytes: u64,
    /// All of its tensors, as they follow each other in the file.
    pub bytes: Vec<u8>,
}

/// A model's live weights.
pub struct Weights {
    tensors: Vec<LiveTensor>,
    pub shards: Vec<Shard>,
    side: usize,
    seed: u64,
    /// Which matrices the last step wrote.
    written: Vec<bool>,
}

/// What a step moves: ranges of bytes of every matrix.
pub struct Dirty {
    ranges: Vec<Vec<Range<usize>>>,
    /// Blocks, as a sync counts them.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Weights {
    /// Makes about so many bytes of weights.
    pub fn new(bytes: u64, seed: u64) -> Weights {
        let matrix = |side: &usize| (side * side * 2) as u64;
        let large = |side: &usize| bytes >= matrix(side) * MATRICES_MIN as u64;
        let side = SIDES.into_iter().find(large).unwrap_or(SIDES[SIDES.len() - 1]);
        let bytes_each = matrix(&side);
        let count = bytes.div_ceil(bytes_each).max(1) as usize;
        let files = count.min(SHARDS_MAX);
        let first = |shard: usize| count * shard / files;
        let shard = |i: usize| Shard {
            file: format!("model-{:05}-of-{files:05}.safetensors", i + 1),
            header_bytes: 0,
            bytes: vec![0; (first(i + 1) - first(i)) * bytes_each as usize],
        };
        let tensor = |i: usize| LiveTensor {
            name: format!("model.layers.{i:05}.weight"),
            dtype: "BF16".into(),
            shape: vec![side, side],
            bytes: bytes_each,
        };
        let (tensors, shards) = ((0..count).map(tensor).collect(), (0..files).map(shard).collect());
        let mut weights = Weights { tensors, shards, side, seed, written: Vec::new() };
        weights.each_matrix(|i, matrix| {
            let mut rng = Rng::new(seed, 0, i);
            for element in matrix.as_chunks_mut().0 {
                let value = rng.normal() * WEIGHT;
                *element = rng.round(value);
            }
        });
        weights
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// How many moments APOLLO has for these matrices, two for each number of its projected gradient.
    pub fn moments(&self, rank: usize) -> u64 {
        (2 * rank.min(self.side) * self.side * self.tensors.len()) as u64
    }

    /// Name, shape and bytes of the tensors of a shard.
    pub fn tensors_of(&self, shard: usize) -> impl Iterator<Item = (&LiveTensor, &[u8])> {
        let before: usize = self.shards[..shard].iter().map(|shard| shard.bytes.len()).sum();
        let bytes = &self.shards[shard].bytes;
        let each = self.matrix_bytes();
        self.tensors[before / each..].iter().zip(bytes.chunks_exact(each))
    }

    /// The index of a model of more than one file, as Hugging Face writes it.
    pub fn index(&self) -> serde_json::Value {
        let mut map = serde_json::Map::new();
        for (i, shard) in self.shards.iter().enumerate() {
            map.extend(self.tensors_of(i).map(|(tensor, _)| (tensor.name.clone(), shard.file.as_str().into())));
        }
        serde_json::json!({"metadata": {"total_size": self.bytes()}, "weight_map": map})
    }

    /// Learns from the files where their tensors begin: blocks are counted from the start of a file.
    pub fn locate(&mut self, dir: &Path) -> Result<()> {
        for shard in &mut self.shards {
            let path = dir.join(&shard.file);
            let mut length = [0; 8];
            let read = File::open(&path).and_then(|mut file| file.read_exact(&mut length));
            read.with_context(|| format!("read {}", path.display()))?;
            shard.header_bytes = 8 + u64::from_le_bytes(length);
        }
        Ok(())
    }

    /// Fails unless the files hold these weights, byte for byte.
    pub fn check(&self, dir: &Path) -> Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for shard in &self.shards {
            let path = dir.join(&shard.file);
            let mut file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
            let mut compare = || -> std::io::Result<bool> {
                let length = file.metadata()?.len();
                std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(shard.header_bytes))?;
                for chunk in shard.bytes.chunks(buffer.len()) {
                    let read = &mut buffer[..chunk.len()];
                    file.read_exact(read)?;
                    if read != chunk {
                        return Ok(false);
                    }
                }
                Ok(length == shard.header_bytes + shard.bytes.len() as u64)
            };
            let equal = compare().with_context(|| format!("read {}", path.display()))?;
            ensure!(equal, "{} does not hold the weights that were written", path.display());
        }
        Ok(())
    }

    /// Draws what step `step` moves: `share` of the blocks, or of the tensors.
    pub fn draw(&self, step: u64, share: f64, pattern: Pattern) -> Dirty {
        let mut rng = Rng::new(self.seed, step, usize::MAX);
        let blocks: Vec<Vec<Range<usize>>> = (0..self.tensors.len()).map(|i| self.blocks(i)).collect();
        let units = match pattern {
            Pattern::Blocks => blocks.iter().map(Vec::len).sum(),
            Pattern::Tensors => blocks.len(),
        };
        let mut draw = Draw { wanted: ((units as f64 * share).round() as usize).max(1), left: units };
        let choose = |ranges: Vec<Range<usize>>| -> Vec<Range<usize>> {
            match pattern {
                Pattern::Blocks => ranges.into_iter().filter(|_| draw.next(&mut rng)).collect(),
                Pattern::Tensors if draw.next(&mut rng) => ranges,
                Pattern::Tensors => Vec::new(),
            }
        };
        let ranges: Vec<Vec<Range<usize>>> = blocks.into_iter().map(choose).collect();
        let all = || ranges.iter().flatten();
        Dirty { blocks: all().count() as u64, bytes: all().map(|r| r.len() as u64).sum(), ranges }
    }

    /// Trains what `dirty` says.
    pub fn step(&mut self, step: u64, dirty: &Dirty) {
        let seed = self.seed;
        self.each_matrix(|i, matrix| {
            let mut rng = Rng::new(seed, step, i);
            for range in &dirty.ranges[i] {
                for element in matrix[range.clone()].as_chunks_mut().0 {
                    let value = f32::from_bits(u32::from(u16::from_le_bytes(*element)) << 16);
                    let moved = value + rng.normal() * STEP;
                    *element = rng.round(moved);
                }
            }
        });
        self.written = dirty.ranges.iter().map(|ranges| !ranges.is_empty()).collect();
    }

    fn matrix_bytes(&self) -> usize {
        self.side * self.side * 2
    }

    /// The shard of a tensor, and its first byte there without the header.
    fn place(&self, tensor: usize) -> (&Shard, usize) {
        let mut at = tensor * self.matrix_bytes();
        let holds = |shard: &&Shard| {
            let here = at < shard.bytes.len();
            if !here {
                at -= shard.bytes.len();
            }
            here
        };
        let shard = self.shards.iter().find(holds).expect("every tensor is in a shard");
        (shard, at)
    }

    /// A tensor's parts of the blocks of its file.
    fn blocks(&self, tensor: usize) -> Vec<Range<usize>> {
        let (shard, at) = self.place(tensor);
        let start = shard.header_bytes + at as u64;
        let (mut at, end) = (start, start + self.matrix_bytes() as u64);
        let mut blocks = Vec::new();
        while at < end {
            let next = ((at / BLOCK + 1) * BLOCK).min(end);
            blocks.push((at - start) as usize..(next - start) as usize);
            at = next;
        }
        blocks
    }

    /// Calls `work` with the index and the bytes of every matrix, on all cores.
    fn each_matrix(&mut self, work: impl Fn(usize, &mut [u8]) + Sync) {
        let each = self.matrix_bytes();
        let matrices = self.shards.iter_mut().flat_map(|shard| shard.bytes.chunks_exact_mut(each)).enumerate();
        let matrices = Mutex::new(matrices);
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let next = matrices.lock().unwrap_or_else(PoisonError::into_inner).next();
                        let Some((i, matrix)) = next else { break };
                        work(i, matrix);
                    }
                });
            }
        });
    }
}

impl LiveWeights for Weights {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }

    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        let (shard, at) = self.place(tensor);
        let at = at + offset as usize;
        buf.copy_from_slice(&shard.bytes[at..at + buf.len()]);
    }

    /// As much as the daemon's trainer knows: which matrices were written, not where.
    fn written(&self) -> Option<Vec<Vec<Range<u64>>>> {
        let bytes = self.matrix_bytes() as u64;
        Some(self.written.iter().map(|written| if *written { vec![0..bytes] } else { Vec::new() }).collect())
    }
}

/// Draws `wanted` of so many that are left, each with the same chance (Knuth, volume 2, algorithm 3.4.2 S).
struct Draw {
    wanted: usize,
    left: usize,
}

impl Draw {
    fn next(&mut self, rng: &mut Rng) -> bool {
        let taken = rng.below(self.left) < self.wanted;
        self.left -= 1;
        self.wanted -= usize::from(taken);
        taken
    }
}

/// xorshift64*.
pub struct Rng(u64);

impl Rng {
    /// Its own numbers for every step and matrix (the mixing function of splitmix64).
    pub fn new(seed: u64, step: u64, matrix: usize) -> Rng {
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for part in [seed, step, matrix as u64] {
            state = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
            state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            state ^= state >> 31;
        }
        Rng(state | 1)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.bits()) * limit as u128) >> 64) as usize
    }

    /// Near normal with standard deviation 1: the sum of eight uniform numbers.
    fn normal(&mut self) -> f32 {
        let sum16 = |bits: u64| (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
        let sum = sum16(self.bits()) + sum16(self.bits());
        // Each has a mean of 65535 / 2 and a variance of 65536² / 12.
        (sum as f32 - 4.0 * 65535.0) / (65536.0 * (8.0f32 / 12.0).sqrt())
    }

    /// bf16, up or down with the chance that makes the mean exact.
    fn round(&mut self, value: f32) -> [u8; 2] {
        let bits = value.to_bits().wrapping_add(self.bits() as u32 & 0xffff);
        ((bits >> 16) as u16).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten matrices in four files whose tensors begin at an odd place.
    fn small() -> Weights {
        let mut weights = Weights::new(10 << 21, 7);
        weights.shards.iter_mut().for_each(|shard| shard.header_bytes = 808);
        weights
    }

    fn copy(weights: &Weights) -> Vec<Vec<u8>> {
        weights.shards.iter().map(|shard| shard.bytes.clone()).collect()
    }

    /// Blocks of the files in which old and new differ.
    fn changed(weights: &Weights, old: &[Vec<u8>]) -> u64 {
        let mut changed = 0;
        for i in 0..weights.tensors.len() {
            let mut new = vec![0; weights.matrix_bytes()];
            weights.read(i, 0, &mut new);
            let (shard, at) = weights.place(i);
            let file = weights.shards.iter().position(|other| other.file == shard.file).unwrap();
            let blocks = weights.blocks(i);
            changed += blocks.iter().filter(|r| old[file][at + r.start..at + r.end] != new[(*r).clone()]).count();
        }
        changed as u64
    }

    #[test]
    fn a_step_moves_the_share_of_blocks_that_was_asked_for() {
        let mut weights = small();
        // A matrix of 2 MiB lies in 513 blocks, because it begins inside one.
        let draw = weights.draw(1, 0.1, Pattern::Blocks);
        assert_eq!(draw.blocks, 513);
        assert_ne!(draw.ranges, weights.draw(2, 0.1, Pattern::Blocks).ranges);
        assert_eq!(draw.ranges, weights.draw(1, 0.1, Pattern::Blocks).ranges);
        let before = copy(&weights);
        weights.step(1, &draw);
        // The few elements of a block that a tensor's end cuts off may all keep their values.
        assert!((513 - 20..=513).contains(&changed(&weights, &before)), "{}", changed(&weights, &before));
    }

    #[test]
    fn whole_tensors_move_and_the_others_stay() {
        let mut weights = small();
        let before = copy(&weights);
        let draw = weights.draw(1, 0.3, Pattern::Tensors);
        assert_eq!((draw.blocks, draw.bytes), (3 * 513, 3 << 21));
        weights.step(1, &draw);
        assert!((3 * 513 - 6..=3 * 513).contains(&changed(&weights, &before)));
    }

    #[test]
    fn everything_moves_by_little() {
        let mut weights = small();
        let before = copy(&weights);
        let value = |bytes: &[u8]| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16));
        let values = |shards: &[Vec<u8>]| shards.iter().flat_map(|s| s.chunks_exact(2).map(value)).collect::<Vec<_>>();
        let draw = weights.draw(1, 1.0, Pattern::Blocks);
        assert_eq!(draw.bytes, weights.bytes());
        weights.step(1, &draw);
        let (old, new) = (values(&before), values(&copy(&weights)));
        let n = old.len() as f64;
        let sd = |values: &mut dyn Iterator<Item = f64>| (values.map(|v| v * v).sum::<f64>() / n).sqrt();
        let weight = sd(&mut old.iter().copied());
        assert!((weight - 0.02).abs() < 1e-4, "{weight}");
        let moved = old.iter().zip(&new).filter(|(old, new)| old != new).count() as f64 / n;
        assert!((0.1..0.6).contains(&moved), "{moved}");
        // Rounding adds its own noise and no bias: magnitudes grow or shrink by less than 6 standard deviations of a mean.
        let step = sd(&mut old.iter().zip(&new).map(|(old, new)| new - old));
        assert!((3e-5..1e-4).contains(&step), "{step}");
        let bias = old.iter().zip(&new).map(|(old, new)| (new - old) * old.signum()).sum::<f64>() / n;
        assert!(bias.abs() < 6.0 * step / n.sqrt(), "{bias}");
    }
}
