//! Wrappers of the kernels of a layer: what they are given, and on how many threads they run.

use super::launch::Launch;
use super::{Buffer, Cuda, Ids, Weight};
use crate::{Columns, Device, Dtype, Factors, Heads, Norm};

/// Threads of a block, in every kernel here that does not say otherwise.
const THREADS: usize = 256;
/// Rows of a norm that are longer than this have a block each, shorter ones a warp.
const NORM_WARP_MAX: usize = 512;
/// Threads of a block that sums columns, and its columns.
const COLUMN_THREADS: usize = 1024;
const COLUMNS: usize = 32;
/// Logits of a row that a block takes.
const LOSS_SEGMENT: usize = 8192;
/// Parts that a buffer is cut into for a sum over many buffers.
const SUM_PARTS: usize = 16;
/// Buffers of one launch; a grid has at most 65 535 rows.
const SUM_ITEMS: usize = 32_768;

/// The name of a kernel's instance for a dtype.
fn instance(kernel: &str, dtype: Dtype) -> String {
    let suffix = match dtype {
        Dtype::F32 => "f32",
        Dtype::F16 => "f16",
        Dtype::BF16 => "bf16",
    };
    format!("{kernel}_{suffix}")
}

/// The buffers' first `len` elements are there.
#[track_caller]
fn assert_room(buffers: &[(&Buffer, usize)]) {
    for (buffer, len) in buffers {
        assert!(buffer.len() >= *len, "{len} elements of a buffer of {}", buffer.len());
    }
}

/// Blocks of four elements a thread, and a few threads for those left.
fn quads(len: usize) -> usize {
    (len / 4 + len % 4).div_ceil(THREADS)
}

/// See [`crate::Device::embed`].
pub(super) fn embed(cuda: &Cuda, x: &mut Buffer, w: &Weight, ids: &Ids) {
    let n = w.cols();
    assert_room(&[(x, ids.len() * n)]);
    Launch::new(&instance("embed", w.dtype()))
        .grid(ids.len(), n.div_ceil(THREADS), 1)
        .block(THREADS)
        .arg(x.ptr())
        .arg(w.ptr())
        .arg(ids.ptr())
        .arg(n as u32)
        .arg(w.rows() as u32)
        .run(cuda);
}

/// See [`crate::Device::scatter_add_rows`].
pub(super) fn scatter_add_rows(cuda: &Cuda, dst: &mut Buffer, src: &Buffer, index: &Ids, n: usize) {
    assert_room(&[(src, index.len() * n)]);
    Launch::new("scatter_add_rows")
        .grid(index.len(), n.div_ceil(4 * THREADS), 1)
        .block(THREADS)
        .arg(dst.ptr())
        .arg(src.ptr())
        .arg(index.ptr())
        .arg(index.len() as u32)
        .arg(n as u32)
        .arg((dst.len() / n) as u32)
        .run(cuda);
}

/// See [`crate::Device::one_hot`].
pub(super) fn one_hot(cuda: &Cuda, y: &mut Buffer, at: usize, ids: &Ids, m: usize) {
    Launch::new("one_hot")
        .grid(ids.len(), m.div_ceil(THREADS), 1)
        .block(THREADS)
        .arg(y.range(at * m, ids.len() * m))
        .arg(ids.ptr())
        .arg(m as u32)
        .run(cuda);
}

/// See [`crate::Device::sum_rows`].
pub(super) fn sum_rows(cuda: &Cuda, db: &mut Buffer, dy: &Buffer, t: usize, m: usize) {
    assert_room(&[(db, m), (dy, t * m)]);
    Launch::new("sum_rows")
        .grid(m.div_ceil(COLUMNS), 1, 1)
        .block(COLUMN_THREADS)
        .arg(db.ptr())
        .arg(dy.ptr())
        .arg(m as u32)
        .arg(t as u32)
        .run(cuda);
}

/// See [`crate::Device::outer_accumulate`].
pub(super) fn outer_accumulate(cuda: &Cuda, g: &mut Buffer, f: &Factors<Buffer>) {
    const TILE: usize = 16;
    let (t, m, n) = (f.t, f.m, f.n);
    assert_room(&[(g, m * n), (f.dy, t * m), (f.x, t * n)]);
    Launch::new("outer_accumulate")
        .grid(n.div_ceil(TILE), m.div_ceil(TILE), 1)
        .block(TILE * TILE)
        .arg(g.ptr())
        .arg(f.dy.ptr())
        .arg(f.x.ptr())
        .arg(t as u32)
        .arg(m as u32)
        .arg(n as u32)
        .run(cuda);
}

/// See [`crate::Device::add`].
pub(super) fn add(cuda: &Cuda, x: &mut Buffer, y: &Buffer, len: usize) {
    assert_room(&[(x, len), (y, len)]);
    Launch::new("add").grid(quads(len), 1, 1).block(THREADS).arg(x.ptr()).arg(y.ptr()).arg(len as u64).run(cuda);
}

/// The kernel of a norm for rows of w's length, and its blocks.
fn norm_launch(kernel: &str, w: &Weight, rows: usize) -> (String, usize) {
    let (size, rows_of_block) = if w.cols() <= NORM_WARP_MAX { ("head", THREADS / 32) } else { ("hidden", 1) };
    (instance(&format!("{kernel}_{size}"), w.dtype()), rows.div_ceil(rows_of_block))
}

/// See [`crate::Device::rms_norm`].
pub(super) fn rms_norm(cuda: &Cuda, y: &mut Buffer, x: &Buffer, w: &Weight, norm: Norm, rows: usize) {
    assert_room(&[(y, rows * w.cols()), (x, rows * w.cols())]);
    let (kernel, blocks) = norm_launch("rms_norm", w, rows);
    Launch::new(&kernel)
        .grid(blocks, 1, 1)
        .block(THREADS)
        .arg(y.ptr())
        .arg(x.ptr())
        .arg(w.ptr())
        .arg(norm.eps)
        .arg(norm.offset)
        .arg(w.cols() as u32)
        .arg(rows as u32)
        .run(cuda);
}

/// See [`crate::Device::rms_norm_backward`].
#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm_backward(
    cuda: &Cuda,
    dx: &mut Buffer,
    dw: &mut Buffer,
    dy: &Buffer,
    x: &Buffer,
    w: &Weight,
    norm: Norm,
    rows: usize,
) {
    let n = w.cols();
    assert_room(&[(dx, rows * n), (dw, n), (dy, rows * n), (x, rows * n)]);
    let inverse = cuda.uninit(rows);
    let (kernel, blocks) = norm_launch("rms_norm_backward", w, rows);
    Launch::new(&kernel)
        .grid(blocks, 1, 1)
        .block(THREADS)
        .arg(dx.ptr())
        .arg(inverse.ptr())
        .arg(dy.ptr())
        .arg(x.ptr())
        .arg(w.ptr())
        .arg(norm.eps)
        .arg(norm.offset)
        .arg(n as u32)
        .arg(rows as u32)
        .run(cuda);
    Launch::new("rms_norm_dw")
        .grid(n.div_ceil(COLUMNS), 1, 1)
        .block(COLUMN_THREADS)
        .arg(dw.ptr())
        .arg(dy.ptr())
        .arg(x.ptr())
        .arg(inverse.ptr())
        .arg(n as u32)
        .arg(rows as u32)
        .run(cuda);
}

/// See [`crate::Device::rope`].
pub(super) fn rope(cuda: &Cuda, x: &mut Buffer, table: &Buffer, position: &Ids, t: usize, heads: Heads, inverse: bool) {
    let Heads { count, dim, rotated } = heads;
    assert_room(&[(x, t * count * dim), (table, rotated)]);
    assert!(position.len() > 0, "the first position is one element");
    Launch::new("rope")
        .grid((t * count * (rotated / 2)).div_ceil(THREADS), 1, 1)
        .block(THREADS)
        .arg(x.ptr())
        .arg(table.ptr())
        .arg(position.ptr())
        .arg(t as u32)
        .arg(count as u32)
        .arg(dim as u32)
        .arg(rotated as u32)
        .arg((table.len() / rotated) as u32)
        .arg(if inverse { -1f32 } else { 1f32 })
        .run(cuda);
}

/// See [`crate::Device::copy_columns`].
pub(super) fn copy_columns(
    cuda: &Cuda,
    dst: &mut Buffer,
    to: Columns,
    src: &Buffer,
    from: Columns,
    columns: usize,
    rows: usize,
) {
    let Some(before) = rows.checked_sub(1).filter(|_| columns > 0) else { return };
    Launch::new("copy_columns")
        .grid((rows * columns).div_ceil(THREADS), 1, 1)
        .block(THREADS)
        .arg(dst.range(to.first, before * to.of + columns))
        .arg(to.of as u32)
        .arg(src.range(from.first, before * from.of + columns))
        .arg(from.of as u32)
        .arg(columns as u32)
        .arg((rows * columns) as u64)
        .run(cuda);
}

/// See [`crate::Device::sigmoid_gate`].
pub(super) fn sigmoid_gate(cuda: &Cuda, h: &mut Buffer, x: &Buffer, gate: &Buffer, len: usize) {
    assert_room(&[(h, len), (x, len), (gate, len)]);
    Launch::new("sigmoid_gate")
        .grid(len.div_ceil(THREADS), 1, 1)
        .block(THREADS)
        .arg(h.ptr())
        .arg(x.ptr())
        .arg(gate.ptr())
        .arg(len as u64)
        .run(cuda);
}

/// See [`crate::Device::sigmoid_gate_backward`].
pub(super) fn sigmoid_gate_backward(
    cuda: &Cuda,
    dx: &mut Buffer,
    dgate: &mut Buffer,
    dh: &Buffer,
    x: &Buffer,
    gate: &Buffer,
    len: usize,
) {
    assert_room(&[(dx, len), (dgate, len), (dh, len), (x, len), (gate, len)]);
    Launch::new("sigmoid_gate_backward")
        .grid(len.div_ceil(THREADS), 1, 1)
        .block(THREADS)
        .arg(dx.ptr())
        .arg(dgate.ptr())
        .arg(dh.ptr())
        .arg(x.ptr())
        .arg(gate.ptr())
        .arg(len as u64)
        .run(cuda);
}

/// See [`crate::Device::swiglu`].
pub(super) fn swiglu(cuda: &Cuda, h: &mut Buffer, gate: &Buffer, up: &Buffer, len: usize) {
    assert_room(&[(h, len), (gate, len), (up, len)]);
    Launch::new("swiglu")
        .grid(quads(len), 1, 1)
        .block(THREADS)
        .arg(h.ptr())
        .arg(gate.ptr())
        .arg(up.ptr())
        .arg(len as u64)
        .run(cuda);
}

/// See [`crate::Device::swiglu_backward`].
pub(super) fn swiglu_backward(
    cuda: &Cuda,
    dgate: &mut Buffer,
    dup: &mut Buffer,
    dh: &Buffer,
    gate: &Buffer,
    up: &Buffer,
    len: usize,
) {
    assert_room(&[(dgate, len), (dup, len), (dh, len), (gate, len), (up, len)]);
    Launch::new("swiglu_backward")
        .grid(quads(len), 1, 1)
        .block(THREADS)
        .arg(dgate.ptr())
        .arg(dup.ptr())
        .arg(dh.ptr())
        .arg(gate.ptr())
        .arg(up.ptr())
        .arg(len as u64)
        .run(cuda);
}

/// See [`crate::Device::cross_entropy`].
pub(super) fn cross_entropy(
    cuda: &Cuda,
    losses: &mut Buffer,
    logits: &mut Buffer,
    targets: &Ids,
    v: usize,
    scale: &Buffer,
) {
    let (t, pieces) = (targets.len(), v.div_ceil(LOSS_SEGMENT));
    assert_room(&[(losses, t), (logits, t * v), (scale, 1)]);
    let stats = cuda.uninit(2 * t * pieces);
    Launch::new("cross_entropy_stats")
        .grid(pieces, t, 1)
        .block(THREADS)
        .arg(stats.ptr())
        .arg(logits.ptr())
        .arg(targets.ptr())
        .arg(v as u32)
        .run(cuda);
    Launch::new("cross_entropy_gradient")
        .grid(pieces, t, 1)
        .block(THREADS)
        .arg(losses.ptr())
        .arg(logits.ptr())
        .arg(stats.ptr())
        .arg(targets.ptr())
        .arg(scale.ptr())
        .arg(v as u32)
        .run(cuda);
}

/// A sum in f64 for each of `SUM_PARTS` parts of each item, two words of the buffer each.
fn sum_parts(cuda: &Cuda, kernel: &str, items: &[(&Buffer, usize)]) -> Buffer {
    assert_room(items);
    let list: Vec<[u64; 2]> = items.iter().map(|(buffer, len)| [buffer.ptr(), *len as u64]).collect();
    let on_device = cuda.uninit(4 * list.len());
    // SAFETY: an item is two words of 8 bytes, an element of the buffer 4 bytes.
    unsafe { cuda.upload(on_device.ptr(), &list) };
    let parts = cuda.uninit(2 * SUM_PARTS * items.len());
    Launch::new(kernel).grid(SUM_PARTS, items.len(), 1).block(THREADS).arg(parts.ptr()).arg(on_device.ptr()).run(cuda);
    parts
}

/// See [`crate::Device::count_nonfinite`].
pub(super) fn count_nonfinite(cuda: &Cuda, counter: &mut Buffer, at: usize, items: &[(&Buffer, usize)]) {
    for items in items.chunks(SUM_ITEMS) {
        let parts = sum_parts(cuda, "count_nonfinite_parts", items);
        Launch::new("count_nonfinite_total")
            .block(THREADS)
            .arg(counter.range(at, 1))
            .arg(parts.ptr())
            .arg((SUM_PARTS * items.len()) as u32)
            .run(cuda);
    }
}

/// See [`crate::Device::sum_squares`].
pub(super) fn sum_squares(cuda: &Cuda, out: &mut Buffer, items: &[(&Buffer, usize)]) {
    for (chunk, items) in items.chunks(SUM_ITEMS).enumerate() {
        let parts = sum_parts(cuda, "sum_squares_parts", items);
        Launch::new("sum_squares_total")
            .grid(items.len().div_ceil(THREADS), 1, 1)
            .block(THREADS)
            .arg(out.range(chunk * SUM_ITEMS, items.len()))
            .arg(parts.ptr())
            .arg(items.len() as u32)
            .arg(SUM_PARTS as u32)
            .run(cuda);
    }
}
