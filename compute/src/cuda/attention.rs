//! Attention: how its work is cut into blocks, and the memory that holds the parts.
//!
//! A block has 64 query rows of a kv head (t · heads/kv_heads of them) and part of the keys. The parts are as many as the
//! past's *room* could use: how long it is, only the device knows, and blocks that get no keys end at once.

use super::launch::Launch;
use super::{Buffer, Cuda, Ids};
use crate::{Attention, AttentionGrads, AttentionSaved, Device, Past};

/// Query rows of a block, and keys that it takes at a time.
const TILE: usize = 64;
const THREADS: usize = 256;
/// Columns of dk and dv in one block.
const OWN_COLUMNS: usize = 64;
/// Blocks that one multiprocessor runs at a time.
const BLOCKS_AT_A_TIME: usize = 2;

/// How attention over a window of t rows is cut.
struct Cut<'a> {
    shape: &'a Attention,
    t: usize,
    /// Which kernels, and the columns of their blocks.
    instance: &'static str,
    columns: usize,
    /// Tiles of query rows and of own keys.
    query_tiles: usize,
    own_tiles: usize,
    /// Parts of the keys, and of the query rows for dk and dv.
    key_splits: usize,
    query_splits: usize,
}

impl<'a> Cut<'a> {
    fn of(cuda: &Cuda, past: &Past<Cuda>, t: usize, shape: &'a Attention) -> Cut<'a> {
        let d = shape.head_dim;
        assert!(shape.heads.is_multiple_of(shape.kv_heads), "{} heads, {} kv", shape.heads, shape.kv_heads);
        assert!(past.len.len() > 0, "the length is one element");
        let (instance, columns) = match d {
            _ if !d.is_multiple_of(4) => ("any", 64),
            ..=64 => ("64", 64),
            _ => ("128", 128),
        };
        let room = past.keys.len().min(past.values.len()) / (shape.kv_heads * d);
        let query_tiles = (t * shape.heads / shape.kv_heads).div_ceil(TILE);
        let own_tiles = t.div_ceil(TILE);
        // As many parts as keep every multiprocessor busy once, and no more than there are tiles.
        let busy = BLOCKS_AT_A_TIME * cuda.multiprocessors() / (shape.kv_heads * d.div_ceil(columns));
        let parts = |blocks: usize, tiles: usize| (busy / blocks.max(1)).clamp(1, tiles.max(1));
        Cut {
            shape,
            t,
            instance,
            columns,
            query_tiles,
            own_tiles,
            key_splits: parts(query_tiles, (room + t).div_ceil(TILE)),
            query_splits: parts(own_tiles, query_tiles),
        }
    }

    /// Elements of q, and of the window's keys.
    fn queries(&self) -> usize {
        self.t * self.shape.heads * self.shape.head_dim
    }
    fn own(&self) -> usize {
        self.t * self.shape.kv_heads * self.shape.head_dim
    }

    /// A launch with blocks for every kv head and all columns.
    fn launch<'k>(&self, kernel: &'k str, blocks: usize) -> Launch<'k> {
        Launch::new(kernel).grid(blocks, self.shape.kv_heads, self.shape.head_dim.div_ceil(self.columns)).block(THREADS)
    }

    /// The arguments that all kernels share.
    fn arguments<'k>(&self, launch: Launch<'k>, len: &Ids, scale: bool) -> Launch<'k> {
        let Attention { heads, kv_heads, head_dim, window, scale: factor } = *self.shape;
        assert!(window != Some(0), "a window without the query itself");
        let launch = launch
            .arg(len.ptr())
            .arg(self.t as u32)
            .arg(heads as u32)
            .arg(kv_heads as u32)
            .arg(head_dim as u32)
            .arg(window.map_or(0, |w| w.min(i32::MAX as usize) as u32));
        if scale { launch.arg(factor) } else { launch }
    }
}

/// Room for the parts of a result of `len` elements; none if there is one part, which is the result.
fn parts(cuda: &Cuda, splits: usize, len: usize) -> Buffer {
    cuda.uninit(if splits == 1 { 0 } else { splits * len })
}

/// The addresses of buffers as the next arguments.
fn pointers<'k, 'b>(launch: Launch<'k>, buffers: impl IntoIterator<Item = &'b Buffer>) -> Launch<'k> {
    buffers.into_iter().fold(launch, |launch, buffer| launch.arg(buffer.ptr()))
}

/// See [`crate::Device::attention`].
#[allow(clippy::too_many_arguments)]
pub(super) fn attention(
    cuda: &Cuda,
    out: &mut Buffer,
    lse: &mut Buffer,
    q: &Buffer,
    k: &Buffer,
    v: &Buffer,
    past: Past<Cuda>,
    t: usize,
    shape: &Attention,
) {
    let cut = Cut::of(cuda, &past, t, shape);
    let rows = shape.heads * t;
    assert!(out.len() >= cut.queries() && q.len() >= cut.queries() && lse.len() >= rows, "buffers of {t} queries");
    assert!(k.len() >= cut.own() && v.len() >= cut.own(), "buffers of {t} keys");
    let (sums, stats) = (parts(cuda, cut.key_splits, cut.queries()), parts(cuda, cut.key_splits, 2 * rows));
    let name = format!("attention_{}", cut.instance);
    let launch = cut.launch(&name, cut.query_tiles * cut.key_splits);
    let launch = pointers(launch, [&*out, lse, &sums, &stats, q, k, v, past.keys, past.values]);
    cut.arguments(launch, past.len, true).arg(cut.key_splits as u32).run(cuda);
    if cut.key_splits > 1 {
        // A warp takes a row.
        let launch = Launch::new("attention_combine").grid((32 * rows).div_ceil(THREADS), 1, 1).block(THREADS);
        let launch = pointers(launch, [&*out, lse, &sums, &stats]);
        cut.arguments(launch, past.len, false).arg(cut.key_splits as u32).run(cuda);
    }
}

/// See [`crate::Device::attention_backward`].
pub(super) fn attention_backward(
    cuda: &Cuda,
    grads: AttentionGrads<Buffer>,
    saved: AttentionSaved<Cuda>,
    t: usize,
    shape: &Attention,
) {
    let AttentionGrads { dq, dk, dv } = grads;
    let AttentionSaved { dout, out, lse, q, k, v, past } = saved;
    let cut = Cut::of(cuda, &past, t, shape);
    let (queries, own) = (cut.queries(), cut.own());
    assert!([&*dq, dout, out, q].iter().all(|b| b.len() >= queries), "buffers of {t} queries");
    assert!([&*dk, &*dv, k, v].iter().all(|b| b.len() >= own), "buffers of {t} keys");
    assert!(lse.len() >= shape.heads * t, "log-sum-exp of {t} queries");
    let dq_parts = parts(cuda, cut.key_splits, queries);
    let [dk_parts, dv_parts] = [(); 2].map(|()| parts(cuda, cut.query_splits, own));
    let name = format!("attention_backward_{}", cut.instance);
    let blocks = cut.query_tiles * cut.key_splits + cut.own_tiles * cut.query_splits * (cut.columns / OWN_COLUMNS);
    let outputs = [&*dq, &*dk, &*dv, &dq_parts, &dk_parts, &dv_parts];
    let launch = pointers(cut.launch(&name, blocks), outputs);
    let launch = pointers(launch, [dout, out, lse, q, k, v, past.keys, past.values]);
    let run = |launch: Launch| launch.arg(cut.key_splits as u32).arg(cut.query_splits as u32).run(cuda);
    run(cut.arguments(launch, past.len, true));
    if cut.key_splits > 1 || cut.query_splits > 1 {
        let blocks = (queries + 2 * own).div_ceil(THREADS);
        let launch = pointers(Launch::new("attention_backward_combine").grid(blocks, 1, 1).block(THREADS), outputs);
        run(cut.arguments(launch, past.len, false));
    }
}
