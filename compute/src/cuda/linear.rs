//! Products with foreign weights: y = x Wᵀ + b and dx = Σ dy W.
//!
//! x (t,n) · W (m,n) · y, dy (t,m) · dx (t,n). For bf16 weights the activations are sums of two bf16 (relative error
//! 2^-17) and products are summed in f32; for f32 and f16 weights the arithmetic is f32.
//!
//! Up to [`SKINNY`] rows W is streamed once by a kernel of ours, several weights per launch. What of the work on a tile
//! of outputs is done by other warps and other blocks follows from the shapes ([`plan`]). More rows go through cuBLASLt
//! ([`super::blas`]), or, where it cannot be loaded, in pieces of [`SKINNY`] rows.

use super::launch::Launch;
use super::{Block, Buffer, Cuda, Weight};
use crate::{Dtype, LinearOutput};

/// Rows that the kernels for few rows take.
pub(super) const SKINNY: usize = 64;
/// Weights in one launch.
const GROUP: usize = 4;
/// Tiles that may be shared by blocks: one counter each.
const SHARED_TILES: usize = 4096;
/// Blocks that may share a tile.
const SPLITS_MAX: usize = 32;
/// Elements of k that a block stages for one token, times groups of 8 tokens.
const STAGED: usize = 2048;

/// Bytes of shared memory for them: rows of a token with 32 elements of padding, twice, for the two bf16 of a value.
fn staged_bytes(groups: usize) -> usize {
    2 * 2 * 8 * groups * (STAGED / groups + 32)
}

/// Counters of the blocks that have done their share of a tile: zero between launches.
pub(super) struct Counters(Block);

impl Counters {
    /// Bytes that the caller sets to zero.
    pub const BYTES: usize = 4 * SHARED_TILES;

    pub fn new(zeroed: Block) -> Counters {
        Counters(zeroed)
    }
}

/// `Product` in linear.cu.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Product {
    w: u64,
    bias: u64,
    input: u64,
    output: u64,
    m: u32,
    first: u32,
}

/// `ProductGroup` in linear.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProductGroup {
    of: [Product; GROUP],
    count: u32,
    t: u32,
    n: u32,
    chunks: u32,
    warps_k: u32,
    splits: u32,
    accumulate: u32,
    /// No byte is left out: the struct is passed as bytes.
    unused: u32,
    partial: u64,
    counters: u64,
}

impl ProductGroup {
    fn bytes(&self) -> &[u8] {
        // SAFETY: no padding, as the sizes of its fields say, and no reference outlives the borrow.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<ProductGroup>()) }
    }
}

/// One of the two products.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Forward,
    Backward,
}

impl Direction {
    /// Elements of k that a warp takes at a time.
    fn chunk(self) -> usize {
        match self {
            Direction::Forward => 64,
            Direction::Backward => 32,
        }
    }
    /// Outputs of a warp.
    fn outputs(self) -> usize {
        match self {
            Direction::Forward => 16,
            Direction::Backward => 32,
        }
    }
    /// Elements in a load of the vector path, which rows must be aligned to.
    fn vector(self) -> usize {
        match self {
            Direction::Forward => 8,
            Direction::Backward => 4,
        }
    }
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Plan {
    /// Of a block.
    threads: usize,
    /// Warps that share a tile.
    warps_k: usize,
    /// Blocks that share a tile.
    splits: usize,
    tiles: usize,
}

impl Plan {
    /// Outputs of a block.
    fn width(&self, direction: Direction) -> usize {
        self.threads / 32 / self.warps_k * direction.outputs()
    }
}

/// The cheapest cut of products with `outputs` and k in `chunks`, for `groups` groups of 8 tokens.
///
/// A stream of W wants every multiprocessor busy to the end, which more and smaller shares give; smaller tiles read the
/// activations more often, and shared tiles cost the writing and reading of partial sums, the last of them by one block
/// alone. Costs are in bytes that a multiprocessor moves in its share of the memory's bandwidth: from the caches it gets
/// about twice that, while others are idle a quarter more, and a block's start and the handing over of a tile take about
/// as long as 24 KiB. These are estimates; a benchmark may move them.
fn plan(direction: Direction, outputs: &[usize], chunks: usize, groups: usize, processors: usize) -> Plan {
    const LATENCY: f64 = 24576.0;
    let threads = if groups > 4 { 256 } else { 512 };
    let mut best: Option<(f64, Plan)> = None;
    for warps_k in [1, 2, 4, 8].into_iter().filter(|k| k * direction.chunk() <= STAGED / groups) {
        let plan = Plan { threads, warps_k, splits: 1, tiles: 0 };
        let width = plan.width(direction);
        let tiles: usize = outputs.iter().map(|m| m.div_ceil(width)).sum();
        let most = if tiles > SHARED_TILES { 1 } else { chunks.div_ceil(warps_k).min(SPLITS_MAX) };
        for splits in 1..=most {
            let k = chunks.div_ceil(splits) * direction.chunk();
            let (weights, activations) = ((2 * k * width) as f64, (32 * k * groups) as f64);
            let partial = if splits > 1 { (32 * width * groups) as f64 } else { 0.0 };
            let blocks = tiles * splits;
            let share = blocks as f64 / processors as f64;
            let moved = weights + 0.5 * (activations + partial);
            let busiest = blocks.div_ceil(processors) as f64 * (0.8 * moved + LATENCY);
            let handing_over = if splits > 1 { LATENCY + splits as f64 * partial / 3.0 } else { 0.0 };
            let cost = (share * moved).max(busiest) + handing_over;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, Plan { splits, tiles, ..plan }));
            }
        }
    }
    best.expect("warps_k = 1 is always possible").1
}

/// y (t,m) = x (t,n) Wᵀ + bias, for several weights of the same n.
pub(super) fn linear_group(cuda: &Cuda, outputs: &mut [LinearOutput<Cuda>], x: &Buffer, t: usize) {
    for LinearOutput { y, w, bias } in outputs.iter() {
        assert_eq!(w.cols(), outputs[0].w.cols(), "weights of one x");
        assert!(y.len() >= t * w.rows() && x.len() >= t * w.cols());
        if let Some(bias) = bias {
            assert_eq!((bias.dtype(), bias.rows() * bias.cols()), (w.dtype(), w.rows()), "bias of a weight");
        }
    }
    if t == 0 {
        return;
    }
    let (skinny, plain): (Vec<&LinearOutput<Cuda>>, _) = outputs.iter().partition(|o| o.w.dtype() == Dtype::BF16);
    for o in plain {
        let (m, n) = (o.w.rows(), o.w.cols());
        let bias = o.bias.map_or(0, Weight::ptr);
        plain_product(cuda, o.y.ptr(), x.ptr(), o.w, bias, [t, n, m], [1, n], false);
    }
    if skinny.is_empty() {
        return;
    }
    let n = skinny[0].w.cols();
    if t > SKINNY && super::blas::forward(cuda, &skinny, x, t) {
        return;
    }
    for top in (0..t).step_by(SKINNY) {
        let rows = SKINNY.min(t - top);
        for group in skinny.chunks(GROUP) {
            let products: Vec<Product> = group
                .iter()
                .map(|o| Product {
                    w: o.w.ptr(),
                    bias: o.bias.map_or(0, Weight::ptr),
                    input: x.ptr() + (4 * top * n) as u64,
                    output: o.y.ptr() + (4 * top * o.w.rows()) as u64,
                    m: o.w.rows() as u32,
                    first: 0,
                })
                .collect();
            skinny_product(cuda, Direction::Forward, &products, rows, n, false);
        }
    }
}

/// dx (t,n) = Σ dy (t,m) W over pairs (dy, W), or dx += if `accumulate`.
pub(super) fn linear_dx_group(cuda: &Cuda, dx: &mut Buffer, inputs: &[(&Buffer, &Weight)], t: usize, accumulate: bool) {
    for (dy, w) in inputs {
        assert_eq!(w.cols(), inputs[0].1.cols(), "weights of one dx");
        assert!(dx.len() >= t * w.cols() && dy.len() >= t * w.rows());
    }
    if t == 0 {
        return;
    }
    let mut accumulate = accumulate;
    let (skinny, plain): (Vec<_>, Vec<_>) = inputs.iter().partition(|(_, w)| w.dtype() == Dtype::BF16);
    for (dy, w) in plain {
        let (m, n) = (w.rows(), w.cols());
        plain_product(cuda, dx.ptr(), dy.ptr(), w, 0, [t, m, n], [n, 1], accumulate);
        accumulate = true;
    }
    if skinny.is_empty() {
        return;
    }
    let n = skinny[0].1.cols();
    if t > SKINNY && super::blas::backward(cuda, dx, &skinny, t, accumulate) {
        return;
    }
    for group in skinny.chunks(GROUP) {
        for top in (0..t).step_by(SKINNY) {
            let rows = SKINNY.min(t - top);
            let products: Vec<Product> = group
                .iter()
                .map(|(dy, w)| Product {
                    w: w.ptr(),
                    bias: 0,
                    input: dy.ptr() + (4 * top * w.rows()) as u64,
                    output: dx.ptr() + (4 * top * n) as u64,
                    m: w.rows() as u32,
                    first: 0,
                })
                .collect();
            skinny_product(cuda, Direction::Backward, &products, rows, n, accumulate);
        }
        accumulate = true;
    }
}

/// One launch for up to four weights, t <= 64.
fn skinny_product(cuda: &Cuda, direction: Direction, products: &[Product], t: usize, n: usize, accumulate: bool) {
    let vector = direction.vector();
    let aligned = n.is_multiple_of(vector) && products.iter().all(|p| p.w.is_multiple_of(2 * vector as u64));
    let (groups, suffix) = match t.div_ceil(8) {
        _ if !aligned => (8, "any"),
        1 => (1, "t8"),
        2 => (2, "t16"),
        3..=4 => (4, "t32"),
        _ => (8, "t64"),
    };
    let ms: Vec<usize> = products.iter().map(|p| p.m as usize).collect();
    let (outputs, chunks) = match direction {
        Direction::Forward => (ms.clone(), n.div_ceil(direction.chunk())),
        Direction::Backward => (vec![n], ms.iter().map(|m| m.div_ceil(direction.chunk())).sum()),
    };
    let plan = plan(direction, &outputs, chunks, groups, cuda.multiprocessors());
    let width = plan.width(direction);
    let mut of = [Product::default(); GROUP];
    let mut first = 0;
    for (slot, product) in of.iter_mut().zip(products) {
        *slot = Product { first: first as u32, ..*product };
        first += match direction {
            Direction::Forward => (product.m as usize).div_ceil(width),
            Direction::Backward => (product.m as usize).div_ceil(direction.chunk()),
        };
    }
    let partial = cuda.block(if plan.splits > 1 { plan.tiles * plan.splits * width * 32 * groups } else { 0 });
    let group = ProductGroup {
        of,
        count: products.len() as u32,
        t: t as u32,
        n: n as u32,
        chunks: chunks as u32,
        warps_k: plan.warps_k as u32,
        splits: plan.splits as u32,
        accumulate: accumulate as u32,
        unused: 0,
        partial: partial.ptr,
        counters: cuda.counters.0.ptr,
    };
    let name = match direction {
        Direction::Forward => format!("linear_bf16_{suffix}"),
        Direction::Backward => format!("linear_dx_bf16_{suffix}"),
    };
    Launch::new(&name)
        .grid(plan.tiles, plan.splits, 1)
        .block(plan.threads)
        .shared(staged_bytes(groups))
        .bytes(group.bytes())
        .run(cuda);
}

/// out (t, outputs) = in (t, depth) B in f32 arithmetic, `shape` = \[t, depth, outputs\]; `strides` of W by k and output.
#[allow(clippy::too_many_arguments)]
fn plain_product(
    cuda: &Cuda,
    out: u64,
    input: u64,
    w: &Weight,
    bias: u64,
    shape: [usize; 3],
    strides: [usize; 2],
    accumulate: bool,
) {
    let [t, depth, outputs] = shape;
    let name = match w.dtype() {
        Dtype::F32 => "product_f32",
        Dtype::F16 => "product_f16",
        Dtype::BF16 => unreachable!("bf16 weights have kernels of their own"),
    };
    Launch::new(name)
        .grid(outputs.div_ceil(64), t.div_ceil(32), 1)
        .block(256)
        .arg(out)
        .arg(input)
        .arg(w.ptr())
        .arg(bias)
        .arg(t as u32)
        .arg(depth as u32)
        .arg(outputs as u32)
        .arg(strides[0] as u32)
        .arg(strides[1] as u32)
        .arg(accumulate as u32)
        .run(cuda);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_fits_what_the_kernels_have() {
        for direction in [Direction::Forward, Direction::Backward] {
            for groups in [1, 2, 4, 8] {
                for outputs in [&[1][..], &[16, 7, 300], &[4096, 1024, 1024], &[12288, 12288], &[151_936]] {
                    for chunks in [1, 2, 7, 64, 768] {
                        let plan = plan(direction, outputs, chunks, groups, 132);
                        let what = format!("{outputs:?} {chunks} chunks, {groups} groups: {plan:?}");
                        assert!(plan.splits <= chunks && plan.warps_k * plan.width(direction) > 0, "{what}");
                        assert!(plan.splits == 1 || plan.tiles <= SHARED_TILES, "{what}");
                        assert_eq!(
                            plan.tiles,
                            outputs.iter().map(|m| m.div_ceil(plan.width(direction))).sum(),
                            "{what}"
                        );
                        // Half of the warps of a tile leave their sums where the activations were.
                        let sums =
                            if plan.warps_k > 1 { plan.threads / 64 * direction.outputs() * 8 * groups } else { 0 };
                        assert!(4 * sums <= staged_bytes(groups), "{what}");
                        assert!(STAGED / groups / direction.chunk() >= plan.warps_k, "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_products_of_large_models_use_most_of_a_gpu() {
        // (outputs, k): q, k, v; o; gate and up; down of an 8B model.
        let forward = [(&[4096, 1024, 1024][..], 4096), (&[4096], 4096), (&[12288, 12288], 4096), (&[4096], 12288)];
        for (outputs, k) in forward {
            let plan = plan(Direction::Forward, outputs, k / 64, 4, 132);
            let blocks = plan.tiles * plan.splits;
            let used = blocks as f64 / (blocks.div_ceil(132) * 132) as f64;
            println!("{outputs:?} x {k}: {plan:?} uses {used:.2}");
            assert!(used > 0.7, "{outputs:?} x {k}: {plan:?} uses {used:.2}");
        }
        for (n, m) in [(4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096)] {
            let plan = plan(Direction::Backward, &[n], m / 32, 4, 132);
            let blocks = plan.tiles * plan.splits;
            let used = blocks as f64 / (blocks.div_ceil(132) * 132) as f64;
            println!("dx {n} from {m}: {plan:?} uses {used:.2}");
            assert!(used > 0.7, "dx {n} from {m}: {plan:?} uses {used:.2}");
        }
    }
}
