//! APOLLO and AdamW on gradients that stay in factors: kernels/apollo.cu and adamw.cu over all tensors of a model.
//!
//! Symbols and shapes as there. A call makes an array of tasks, one per tensor, uploads it with the number of each
//! task's first tile, and launches each kernel once over the tiles of all.

use super::launch::Launch;
use super::{Block, Buffer, Cuda, Weight};
use crate::{
    AdamwRows, ApolloCommit, ApolloPrepare, Channels, Compressed, Dtype, Factors, Limiter, Moments, NORM_SLOTS,
    ScaleType, Stream as RandomStream, Write,
};

/// Rows and ranks in a tile of `apollo_project`.
const PROJECT: (usize, usize) = (32, 64);
/// Channels in a tile of `apollo_scaling` and `apollo_moments`.
const CHANNELS: usize = 32;
/// Rows of a tile of a Gram matrix.
const GRAM: usize = 32;
/// Columns of a factor that one block of `apollo_gram` takes, for a matrix of one tile.
const GRAM_COLUMNS: usize = 1024;
/// Rows and columns in a tile of `apollo_write_f16` and `apollo_write_bf16`.
const WRITE: (usize, usize) = (128, 1024);
/// Rows and columns in a tile of the kernels that form G plainly.
const FORMED: usize = 64;
/// Elements in a tile of `adamw_rows`.
const ADAMW: usize = 1024;

/// `ApolloTask` in apollo.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct ApolloTask {
    x: u64,
    dy: u64,
    projection: u64,
    q: u64,
    squares: u64,
    grams: u64,
    exp_avg: u64,
    exp_avg_sq: u64,
    s: u64,
    norms: u64,
    w: u64,
    m: u32,
    n: u32,
    t: u32,
    rank: u32,
    per_tensor: u32,
    gram_columns: u32,
    decay: [f32; 3],
    step: f32,
    keep: f32,
    dtype: u32,
    stream: [u32; 4],
}

/// `LimitTask` in apollo.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct LimitTask {
    at: u32,
    growth: f32,
    floor: f32,
}

/// `AdamwTask` in adamw.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdamwTask {
    w: u64,
    rows: u64,
    g: u64,
    exp_avg: u64,
    exp_avg_sq: u64,
    n: u32,
    count: u32,
    keep: f32,
    dtype: u32,
    stream: [u32; 4],
}

/// `AdamRow` in adamw.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdamRow {
    row: u32,
    slot: u32,
    step: f32,
}

/// As tasks.cuh numbers them.
pub(super) fn dtype_number(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 2,
    }
}

fn upload<T: Copy>(cuda: &Cuda, values: &[T]) -> Block {
    let block = cuda.block(size_of_val(values));
    // SAFETY: the block has room for them.
    unsafe { cuda.upload(block.ptr, values) };
    block
}

/// Number of each task's first tile, on the device, and the number of all tiles.
struct Tiles {
    first: Block,
    all: usize,
}

impl Tiles {
    fn new(cuda: &Cuda, tiles: impl Iterator<Item = usize>) -> Tiles {
        let mut all = 0;
        let first: Vec<u32> = tiles.map(|n| (all, all += n).0 as u32).collect();
        Tiles { first: upload(cuda, &first), all }
    }

    /// Launches a kernel whose first arguments are tasks, first tiles and the number of tasks.
    fn launch<'a>(&self, kernel: &'a str, tasks: u64, count: usize) -> Launch<'a> {
        Launch::new(kernel).grid(self.all, 1, 1).block(256).arg(tasks).arg(self.first.ptr).arg(count as u32)
    }
}

/// p (r,d) ~ N(0, 1/r).
pub(super) fn normal_projection(cuda: &Cuda, p: &mut Buffer, rank: usize, dim: usize, stream: RandomStream) {
    let len = rank * dim;
    assert!(p.len() >= len);
    let [key0, key1, step, tensor] = stream.words();
    Launch::new("normal_projection")
        .grid(len.div_ceil(4 * 256), 1, 1)
        .block(256)
        .arg(p.ptr())
        .arg(len as u64)
        .arg(1.0 / (rank as f32).sqrt())
        .arg(key0)
        .arg(key1)
        .arg(step)
        .arg(tensor)
        .run(cuda);
}

impl ApolloTask {
    /// What both passes have in common; scratch and the rest are still to be set.
    fn new(
        f: &Factors<Buffer>,
        c: &Compressed<Buffer>,
        [exp_avg, exp_avg_sq, s]: [&Buffer; 3],
        norms: &Buffer,
        at: usize,
    ) -> ApolloTask {
        let (channels, dim) = (f.m.max(f.n), f.m.min(f.n));
        assert!(f.x.len() >= f.t * f.n && f.dy.len() >= f.t * f.m && c.projection.len() >= c.rank * dim);
        assert!(exp_avg.len() >= channels * c.rank && exp_avg_sq.len() >= channels * c.rank);
        let per_tensor = c.scale_type == ScaleType::Tensor;
        assert!(s.len() >= if per_tensor { 1 } else { channels } && norms.len() >= at + NORM_SLOTS);
        debug_assert_eq!(f.channels() == Channels::Rows, f.m >= f.n);
        ApolloTask {
            x: f.x.ptr(),
            dy: f.dy.ptr(),
            projection: c.projection.ptr(),
            exp_avg: exp_avg.ptr(),
            exp_avg_sq: exp_avg_sq.ptr(),
            s: s.ptr(),
            norms: norms.ptr() + 4 * at as u64,
            m: f.m as u32,
            n: f.n as u32,
            t: f.t as u32,
            rank: c.rank as u32,
            per_tensor: per_tensor as u32,
            decay: [c.moments.beta1, c.moments.beta2, c.moments.eps],
            ..ApolloTask::default()
        }
    }

    fn channels(&self) -> usize {
        self.m.max(self.n) as usize
    }
    fn dim(&self) -> usize {
        self.m.min(self.n) as usize
    }
    fn project_tiles(&self) -> usize {
        (self.t as usize).div_ceil(PROJECT.0) * (self.rank as usize).div_ceil(PROJECT.1)
    }
    fn channel_tiles(&self) -> usize {
        self.channels().div_ceil(CHANNELS)
    }
    /// Tiles of the lower triangle of a (t,t) matrix.
    fn gram_pairs(&self) -> usize {
        let tiles = (self.t as usize).div_ceil(GRAM);
        tiles * (tiles + 1) / 2
    }
    fn gram_tiles(&self) -> usize {
        let columns = self.gram_columns as usize;
        (self.channels().div_ceil(columns) + self.dim().div_ceil(columns)) * self.gram_pairs()
    }
    /// Whether whole blocks of random numbers and vectors of 8 bytes fit the rows of W.
    fn write_is_regular(&self) -> bool {
        self.dtype != dtype_number(Dtype::F32) && self.n.is_multiple_of(128) && self.w.is_multiple_of(8)
    }
    fn write_tiles(&self) -> usize {
        let (m, n) = (self.m as usize, self.n as usize);
        match self.write_is_regular() {
            true => m.div_ceil(WRITE.0) * n.div_ceil(WRITE.1),
            false => m.div_ceil(FORMED) * n.div_ceil(FORMED),
        }
    }
}

/// Scratch for q of all tasks, and the kernel that makes it: q = small Pᵀ.
fn project(cuda: &Cuda, tasks: &mut [ApolloTask]) -> Block {
    let len: usize = tasks.iter().map(|t| (t.t * t.rank) as usize).sum();
    // Each begins at a multiple of four elements, for vector loads.
    let scratch = cuda.block(4 * (len + 4 * tasks.len()));
    let mut at = scratch.ptr;
    for task in tasks {
        task.q = at;
        at += 4 * u64::from(task.t * task.rank).next_multiple_of(4);
    }
    scratch
}

/// First pass, see [`crate::Device::apollo_prepare`].
pub(super) fn prepare(cuda: &Cuda, norms: &mut Buffer, tensors: &mut [ApolloPrepare<Cuda>]) {
    let mut tasks: Vec<ApolloTask> = tensors
        .iter()
        .map(|p| {
            let task = ApolloTask::new(&p.factors, &p.compressed, [p.exp_avg, p.exp_avg_sq, p.s], norms, p.at);
            // Where t is large there are many pairs of tiles, and a block need not be small.
            ApolloTask { gram_columns: (GRAM_COLUMNS * task.gram_pairs()) as u32, ..task }
        })
        .collect();
    let _q = project(cuda, &mut tasks);
    let squares = cuda.block(8 * tasks.iter().map(ApolloTask::channels).sum::<usize>());
    let grams = cuda.block(8 * GRAM * GRAM * tasks.iter().map(ApolloTask::gram_tiles).sum::<usize>());
    let (mut squares_at, mut grams_at) = (squares.ptr, grams.ptr);
    for task in &mut tasks {
        (task.squares, task.grams) = (squares_at, grams_at);
        squares_at += 8 * task.channels() as u64;
        grams_at += (8 * GRAM * GRAM * task.gram_tiles()) as u64;
    }
    let on_device = upload(cuda, &tasks);
    let launch = |kernel: &str, tiles: fn(&ApolloTask) -> usize| {
        Tiles::new(cuda, tasks.iter().map(tiles)).launch(kernel, on_device.ptr, tasks.len()).run(cuda);
    };
    launch("apollo_project", ApolloTask::project_tiles);
    launch("apollo_scaling", ApolloTask::channel_tiles);
    launch("apollo_gram", ApolloTask::gram_tiles);
    Launch::new("apollo_norm").grid(tasks.len(), 1, 1).block(GRAM * GRAM).arg(on_device.ptr).run(cuda);
}

/// See [`crate::Device::limit`].
pub(super) fn limit(cuda: &Cuda, norms: &mut Buffer, limiters: &[(usize, Limiter)]) {
    let task = |(at, limiter): &(usize, Limiter)| {
        assert!(norms.len() >= at + NORM_SLOTS);
        let floor = limiter.floor * limiter.expected;
        LimitTask { at: *at as u32, growth: limiter.growth.unwrap_or(0.0), floor }
    };
    let tasks: Vec<LimitTask> = limiters.iter().map(task).collect();
    let on_device = upload(cuda, &tasks);
    Launch::new("apollo_limit")
        .grid(tasks.len().div_ceil(256), 1, 1)
        .block(256)
        .arg(norms.ptr())
        .arg(on_device.ptr)
        .arg(tasks.len() as u32)
        .run(cuda);
}

/// Second pass, see [`crate::Device::apollo_commit`].
pub(super) fn commit(cuda: &Cuda, norms: &mut Buffer, tensors: &mut [ApolloCommit<Cuda>]) {
    let mut tasks: Vec<ApolloTask> = tensors
        .iter()
        .map(|c| {
            assert_eq!((c.w.rows(), c.w.cols()), (c.factors.m, c.factors.n));
            let buffers = [&*c.exp_avg, &*c.exp_avg_sq, c.s];
            ApolloTask {
                w: c.w.ptr(),
                step: c.write.step,
                keep: 1.0 - c.write.decay,
                dtype: dtype_number(c.w.dtype()),
                stream: c.write.stream.words(),
                ..ApolloTask::new(&c.factors, &c.compressed, buffers, norms, c.at)
            }
        })
        .collect();
    let _q = project(cuda, &mut tasks);
    // A kernel writes what lies together in the array.
    let path = |task: &ApolloTask| if task.write_is_regular() { task.dtype } else { 0 };
    tasks.sort_by_key(path);
    let on_device = upload(cuda, &tasks);
    let launch = |kernel: &str, tiles: fn(&ApolloTask) -> usize| {
        Tiles::new(cuda, tasks.iter().map(tiles)).launch(kernel, on_device.ptr, tasks.len()).run(cuda);
    };
    launch("apollo_project", ApolloTask::project_tiles);
    launch("apollo_moments", ApolloTask::channel_tiles);
    let mut first = 0;
    for part in tasks.chunk_by(|a, b| path(a) == path(b)) {
        let kernel = match path(&part[0]) {
            0 => "apollo_write_any",
            1 => "apollo_write_f16",
            _ => "apollo_write_bf16",
        };
        let at = on_device.ptr + (first * size_of::<ApolloTask>()) as u64;
        Tiles::new(cuda, part.iter().map(ApolloTask::write_tiles)).launch(kernel, at, part.len()).run(cuda);
        first += part.len();
    }
}

/// See [`crate::Device::adamw_factors`].
pub(super) fn adamw_factors(
    cuda: &Cuda,
    w: &Weight,
    exp_avg: &mut Buffer,
    exp_avg_sq: &mut Buffer,
    f: &Factors<Buffer>,
    moments: Moments,
    write: Write,
) {
    assert_eq!((w.rows(), w.cols()), (f.m, f.n));
    assert!(exp_avg.len() >= f.m * f.n && exp_avg_sq.len() >= f.m * f.n);
    assert!(f.x.len() >= f.t * f.n && f.dy.len() >= f.t * f.m);
    let launch = Launch::new("adamw_factors")
        .grid(f.m.div_ceil(FORMED) * f.n.div_ceil(FORMED), 1, 1)
        .block(256)
        .arg(w.ptr())
        .arg(dtype_number(w.dtype()))
        .arg(exp_avg.ptr())
        .arg(exp_avg_sq.ptr())
        .arg(f.x.ptr())
        .arg(f.dy.ptr())
        .arg(f.t as u32)
        .arg(f.m as u32)
        .arg(f.n as u32)
        .arg(moments.beta1)
        .arg(moments.beta2)
        .arg(moments.eps)
        .arg(write.step)
        .arg(1.0 - write.decay);
    write.stream.words().into_iter().fold(launch, Launch::arg).run(cuda);
}

/// See [`crate::Device::adamw_rows`].
pub(super) fn adamw_rows(cuda: &Cuda, tensors: &mut [AdamwRows<Cuda>], moments: Moments) {
    let rows: Vec<AdamRow> =
        tensors.iter().flat_map(|t| t.rows).map(|r| AdamRow { row: r.row, slot: r.slot, step: r.step }).collect();
    let rows = upload(cuda, &rows);
    let mut rows_at = rows.ptr;
    let mut tasks = Vec::with_capacity(tensors.len());
    for tensor in tensors.iter() {
        let n = tensor.w.cols();
        let slots = tensor.rows.iter().map(|r| r.slot as usize + 1).max().unwrap_or(0);
        assert!(
            tensor.g.len() >= tensor.rows.len() * n && tensor.rows.iter().all(|r| (r.row as usize) < tensor.w.rows())
        );
        assert!(tensor.exp_avg.len() >= slots * n && tensor.exp_avg_sq.len() >= slots * n);
        tasks.push(AdamwTask {
            w: tensor.w.ptr(),
            rows: rows_at,
            g: tensor.g.ptr(),
            exp_avg: tensor.exp_avg.ptr(),
            exp_avg_sq: tensor.exp_avg_sq.ptr(),
            n: n as u32,
            count: tensor.rows.len() as u32,
            keep: 1.0 - tensor.write.decay,
            dtype: dtype_number(tensor.w.dtype()),
            stream: tensor.write.stream.words(),
        });
        rows_at += (size_of::<AdamRow>() * tensor.rows.len()) as u64;
    }
    let on_device = upload(cuda, &tasks);
    let tiles = tasks.iter().map(|task| (task.count as usize * task.n as usize).div_ceil(ADAMW));
    Tiles::new(cuda, tiles)
        .launch("adamw_rows", on_device.ptr, tasks.len())
        .arg(moments.beta1)
        .arg(moments.beta2)
        .arg(moments.eps)
        .run(cuda);
}
