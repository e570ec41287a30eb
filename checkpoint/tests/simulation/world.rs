//! What is true whatever the disk does: the weights after each example, and the generations that were made of them.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{Checkpoint, Error, Keep, LiveTensor, LiveWeights, Options, Progress, Result, Storage};

use crate::common::Rng;
use crate::disk::{SimulatedDisk, model_dir};
use crate::image::{Blob, Image, Node};

/// Weights in memory, tensor by tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    tensors: Arc<Vec<LiveTensor>>,
    pub bytes: Vec<Vec<u8>>,
}

impl LiveWeights for Weights {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }

    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes[tensor][at..at + buf.len()]);
    }
}

/// A tensor of a model: dtype, elements, shard.
pub type TensorShape = (&'static str, usize, usize);

/// What a model looks like.
#[derive(Debug, Clone)]
pub struct Shape {
    pub tensors: Vec<TensorShape>,
    /// Each header ends so many bytes after a multiple of so many: (multiple, bytes).
    pub align: (usize, usize),
    /// Bytes of optimizer state.
    pub state: usize,
    /// One element in this many changes with an example.
    pub rarity: usize,
    pub options: Options,
}

/// A model and its training: deterministic from a seed.
#[derive(Debug, Clone)]
pub struct World {
    pub seed: u64,
    pub shape: Shape,
    headers: Vec<Vec<u8>>,
    /// The tensors of each shard.
    placed: Vec<Vec<usize>>,
    pub base: Weights,
}

/// Everything on one thread, so that a seed gives the same log each time.
pub fn options(generations: u64, segment: u64) -> Options {
    let keep = Keep { generations, ..Keep::default() };
    Options { keep, segment, threads: 1, ..Options::default() }
}

fn width(dtype: &str) -> usize {
    match dtype {
        "U8" => 1,
        "F32" => 4,
        _ => 2,
    }
}

fn shard_name(shard: usize, of: usize) -> String {
    match of {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{of:05}.safetensors", shard + 1),
    }
}

impl World {
    pub fn new(seed: u64, shape: Shape) -> World {
        let mut rng = Rng(seed);
        let mut tensors = Vec::new();
        let mut bytes: Vec<Vec<u8>> = Vec::new();
        let shards = shape.tensors.iter().map(|(_, _, shard)| shard + 1).max().expect("a model has tensors");
        let mut placed = vec![Vec::new(); shards];
        for (i, (dtype, elements, shard)) in shape.tensors.iter().enumerate() {
            let n = elements * width(dtype);
            let (dtype, shape) = (dtype.to_string(), vec![*elements]);
            tensors.push(LiveTensor { name: format!("t{i}"), dtype, shape, bytes: n as u64 });
            bytes.push((0..n).map(|_| rng.next() as u8).collect());
            placed[*shard].push(i);
        }
        let headers = placed.iter().map(|inside| header(&tensors, inside, shape.align)).collect();
        World { seed, shape, headers, placed, base: Weights { tensors: Arc::new(tensors), bytes } }
    }

    /// The model's directory before anybody opened it.
    pub fn image(&self) -> Image {
        let mut image = Image::default();
        for (path, bytes) in self.files(&self.base) {
            image.put(&path, bytes);
        }
        let of = self.headers.len();
        if of > 1 {
            let shards =
                self.placed.iter().enumerate().flat_map(|(shard, inside)| inside.iter().map(move |i| (i, shard)));
            let map: Vec<String> = shards.map(|(i, shard)| format!("\"t{i}\":\"{}\"", shard_name(shard, of))).collect();
            let index = format!("{{\"metadata\":{{}},\"weight_map\":{{{}}}}}", map.join(","));
            image.put(&model_dir().join("model.safetensors.index.json"), index.into_bytes());
        }
        image
    }

    /// The files that hold these weights.
    pub fn files(&self, weights: &Weights) -> BTreeMap<PathBuf, Vec<u8>> {
        let shard = |(shard, inside): (usize, &Vec<usize>)| {
            let mut bytes = self.headers[shard].clone();
            inside.iter().for_each(|i| bytes.extend_from_slice(&weights.bytes[*i]));
            (model_dir().join(shard_name(shard, self.headers.len())), bytes)
        };
        self.placed.iter().enumerate().map(shard).collect()
    }

    /// Trains examples on weights. What an example does depends on its number alone.
    pub fn train(&self, weights: &mut Weights, examples: RangeInclusive<u64>) {
        for example in examples {
            let mut rng = Rng(self.seed ^ example.wrapping_mul(0x2545_f491_4f6c_dd1d));
            for (tensor, bytes) in weights.tensors.iter().zip(&mut weights.bytes) {
                let width = width(&tensor.dtype);
                for element in bytes.chunks_exact_mut(width) {
                    if self.shape.rarity == 1 || rng.below(self.shape.rarity) == 0 {
                        let mut number = [0; 4];
                        number[..width].copy_from_slice(element);
                        let moved = u32::from_le_bytes(number).wrapping_add(1 + rng.below(5) as u32);
                        element.copy_from_slice(&moved.to_le_bytes()[..width]);
                    }
                }
            }
        }
    }

    /// The optimizer state at a cursor.
    pub fn state(&self, cursor: u64) -> Vec<u8> {
        let mut rng = Rng(self.seed ^ (cursor << 32));
        (0..self.shape.state).map(|_| rng.next() as u8).collect()
    }

    /// Opens the directory on a disk.
    pub fn open(&self, disk: &SimulatedDisk) -> Result<Checkpoint> {
        let storage: Arc<dyn Storage> = Arc::new(disk.clone());
        Checkpoint::open_on(storage, &model_dir(), self.shape.options.clone()).map(|(checkpoint, _)| checkpoint)
    }
}

fn header(tensors: &[LiveTensor], inside: &[usize], (multiple, beside): (usize, usize)) -> Vec<u8> {
    let mut at = 0;
    let mut entries = Vec::new();
    for tensor in inside.iter().map(|i| &tensors[*i]) {
        let end = at + tensor.bytes;
        let (name, dtype, shape) = (&tensor.name, &tensor.dtype, &tensor.shape);
        entries.push(format!("\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}"));
        at = end;
    }
    let mut text = format!("{{{}}}", entries.join(","));
    while (8 + text.len()) % multiple != beside {
        text.push(' ');
    }
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn progress(cursor: u64) -> Progress {
    Progress {
        cursor,
        step: cursor,
        examples: cursor,
        loss: Some(1.0 / (cursor + 3) as f32),
        weight_version: cursor * 2,
        epoch: "3f9c".into(),
    }
}

/// A generation as the test knows it.
#[derive(Debug, Clone)]
pub struct Known {
    pub generation: u64,
    pub progress: Progress,
    pub weights: Weights,
    pub state: Option<Vec<u8>>,
    /// True if the files are as the generation says: false where somebody else changed them since.
    pub clean: bool,
    /// The weights are those that training its examples once gives.
    pub replayable: bool,
}

/// What is done to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Opened, and nothing else.
    Open,
    /// So many examples are trained and synced.
    Sync(u64),
    Rollback(u64),
    /// Somebody changed a byte of a file, and it is adopted.
    Adopt,
}

/// All generations that were made, and the current one.
#[derive(Debug, Clone)]
pub struct History {
    pub world: Arc<World>,
    pub known: BTreeMap<u64, Known>,
    pub current: u64,
}

impl History {
    pub fn new(world: World) -> History {
        let base = Known {
            generation: 0,
            progress: Progress::default(),
            weights: world.base.clone(),
            state: None,
            clean: true,
            replayable: true,
        };
        History { world: Arc::new(world), known: BTreeMap::from([(0, base)]), current: 0 }
    }

    pub fn now(&self) -> &Known {
        &self.known[&self.current]
    }

    /// The generation that a step makes; none if it makes none.
    pub fn next(&self, step: Step) -> Option<Known> {
        let (now, generation) = (self.now(), self.current + 1);
        match step {
            Step::Open => None,
            Step::Sync(examples) => {
                let cursor = now.progress.cursor + examples;
                let mut weights = now.weights.clone();
                self.world.train(&mut weights, now.progress.cursor + 1..=cursor);
                let state = Some(self.world.state(cursor));
                Some(Known { generation, progress: progress(cursor), weights, state, clean: true, ..now.clone() })
            }
            // It is that already.
            Step::Rollback(to) if to == self.current => None,
            Step::Rollback(to) => Some(Known { generation, ..self.known[&to].clone() }),
            Step::Adopt => Some(Known { generation, state: None, clean: true, replayable: false, ..now.clone() }),
        }
    }

    /// Somebody changes a byte in the files of the current generation.
    pub fn meddle(&mut self, image: &mut Image, rng: &mut Rng) {
        let now = self.known.get_mut(&self.current).expect("the current one");
        let tensor = rng.below(now.weights.bytes.len());
        let at = rng.below(now.weights.bytes[tensor].len());
        now.weights.bytes[tensor][at] ^= 1 << rng.below(8);
        (now.clean, now.replayable) = (false, false);
        self.write_files(image);
    }

    /// The current generation is this again, and so are its files.
    pub fn put_back(&mut self, image: &mut Image, known: Known) {
        self.known.insert(self.current, known);
        self.write_files(image);
    }

    fn write_files(&self, image: &mut Image) {
        for (path, bytes) in self.world.files(&self.now().weights) {
            let Some(Node::File(file)) = image.node(&path) else { panic!("{} is a file", path.display()) };
            image.files[file] = Blob::new(bytes);
        }
    }

    /// Does a step on an open checkpoint.
    pub fn run(&self, checkpoint: &mut Checkpoint, step: Step) -> Result<()> {
        let Some(next) = self.next(step) else { return Ok(()) };
        match step {
            Step::Open => Ok(()),
            Step::Sync(_) => {
                let state = next.state.as_ref().expect("a sync has one");
                let mut write = |out: &mut dyn Write| out.write_all(state);
                checkpoint.sync(&next.weights, &mut write, next.progress.clone(), &mut |_, _| {}).map(drop)
            }
            Step::Rollback(to) => checkpoint.rollback(to).map(drop),
            Step::Adopt => checkpoint.adopt(next.progress.clone()).map(drop),
        }
    }

    /// Takes over a generation that a step made.
    pub fn advance(&mut self, next: Known) {
        self.current = next.generation;
        self.known.insert(next.generation, next);
    }
}

/// Fails unless an open checkpoint is exactly a generation: files, progress, optimizer state, checksums.
pub fn expect_known(
    world: &World,
    checkpoint: &Checkpoint,
    disk: &SimulatedDisk,
    known: &Known,
) -> std::result::Result<(), String> {
    let now = checkpoint.current();
    let image = disk.live();
    for (path, bytes) in world.files(&known.weights) {
        let is = image.get(&path).ok_or(format!("{} is gone", path.display()))?;
        if let Some(at) = is.iter().zip(&bytes).position(|(is, want)| is != want) {
            return Err(format!("{} differs at byte {at} from generation {}", path.display(), known.generation));
        }
        if is.len() != bytes.len() {
            return Err(format!("{} has {} bytes", path.display(), is.len()));
        }
    }
    if now.progress != known.progress {
        return Err(format!(
            "generation {} with progress {:?}, not {:?}",
            now.generation, now.progress, known.progress
        ));
    }
    let read = |error: &dyn std::fmt::Display| format!("the optimizer state: {error}");
    let mut state = None;
    if let Some(mut reader) = checkpoint.state().map_err(|error| read(&error))? {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).map_err(|error| read(&error))?;
        state = Some(bytes);
    }
    if state != known.state {
        return Err(format!("the optimizer state is not that of generation {}", known.generation));
    }
    let report = checkpoint.verify().map_err(|error| format!("verify: {error}"))?;
    if report.is_ok() != known.clean {
        return Err(format!("verify says: {report}"));
    }
    Ok(())
}

/// True if an error leaves it open which generation the files are.
pub fn is_uncertain(error: &Error) -> bool {
    matches!(error, Error::Interrupted { .. })
}
