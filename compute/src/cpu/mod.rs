//! The CPU backend: f32 activations in ordinary memory, foreign weights read where they lie.
//!
//! Operations run on the rayon pool of the caller; [`Cpu::run`] provides one of a chosen size.
//! Results depend on the shapes and on the instruction set that `gemm` picks, not on the number of
//! threads: every parallel operation cuts its work into blocks by shape and reduces in order.

mod attention;
mod foreign;
mod gemm;
mod linear;
mod optimizer;
mod pointwise;
pub(crate) mod simd;

pub use foreign::Weight;

use crate::{
    AdamRow, Attention, AttentionGrads, AttentionSaved, Compressed, Device, Factors, Limiter, Moments, Past, Stream,
    Write,
};
use crate::{NORM_FACTOR, NORM_NEXT, NORM_PREVIOUS, NORM_UPDATE};
use std::cell::RefCell;

/// f32 elements on the CPU.
pub type Buffer = Vec<f32>;

/// The CPU as a [`Device`].
pub struct Cpu {
    pool: rayon::ThreadPool,
}

/// The thread pool could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {threads} compute threads: {reason}; lower train.threads or the machine's limits are too tight")]
pub struct PoolError {
    threads: usize,
    reason: String,
}

impl Cpu {
    /// A backend with its own pool; `threads` 0 means one per core.
    pub fn new(threads: usize) -> Result<Cpu, PoolError> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute-{i}")).build();
        Ok(Cpu { pool: pool.map_err(|e| PoolError { threads, reason: e.to_string() })? })
    }

    /// Runs `f` on the pool: operations inside use its threads.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Hands `f` this thread's scratch of `len` elements, of unspecified content. Nested use allocates.
fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut scratch = SCRATCH.take();
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    let result = f(&mut scratch[..len]);
    SCRATCH.replace(scratch);
    result
}

impl Device for Cpu {
    type Buffer = Buffer;
    type Ids = Vec<u32>;
    type Weight = Weight;

    fn zeros(&self, len: usize) -> Buffer {
        vec![0.0; len]
    }
    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }
    fn ids(&self, ids: &[u32]) -> Vec<u32> {
        ids.to_vec()
    }
    fn write(&self, dst: &mut Buffer, at: usize, src: &[f32]) {
        dst[at..at + src.len()].copy_from_slice(src);
    }
    fn read(&self, src: &Buffer, at: usize, dst: &mut [f32]) {
        dst.copy_from_slice(&src[at..at + dst.len()]);
    }
    fn shape(&self, w: &Weight) -> (usize, usize) {
        (w.rows(), w.cols())
    }
    fn weight_values(&self, w: &Weight) -> Vec<f32> {
        w.values()
    }
    fn copy(&self, dst: &mut Buffer, dst_at: usize, src: &Buffer, src_at: usize, len: usize) {
        dst[dst_at..dst_at + len].copy_from_slice(&src[src_at..src_at + len]);
    }

    fn embed(&self, x: &mut Buffer, w: &Weight, ids: &Vec<u32>) {
        pointwise::embed(x, w, ids);
    }
    fn linear(&self, y: &mut Buffer, x: &Buffer, w: &Weight, bias: Option<&Weight>, t: usize) {
        linear::linear(y, x, w, bias, t);
    }
    fn linear_dx(&self, dx: &mut Buffer, dy: &Buffer, w: &Weight, t: usize, accumulate: bool) {
        linear::linear_dx(dx, dy, w, t, accumulate);
    }
    fn sum_rows(&self, db: &mut Buffer, dy: &Buffer, t: usize, m: usize) {
        pointwise::sum_rows(db, dy, t, m);
    }
    fn outer_accumulate(&self, g: &mut Buffer, f: &Factors<Buffer>) {
        let (dy, x) = (gemm::View::dense(f.dy, f.t, f.m).t(), gemm::View::dense(f.x, f.t, f.n));
        gemm::product(&mut g[..f.m * f.n], dy, x, 1.0, true);
    }
    fn add(&self, x: &mut Buffer, y: &Buffer, len: usize) {
        x[..len].iter_mut().zip(&y[..len]).for_each(|(x, y)| *x += y);
    }

    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, w: &Weight, eps: f32, rows: usize) {
        pointwise::rms_norm(y, x, w, eps, rows);
    }
    fn rms_norm_backward(
        &self,
        dx: &mut Buffer,
        dw: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        w: &Weight,
        eps: f32,
        rows: usize,
    ) {
        pointwise::rms_norm_backward(dx, dw, dy, x, w, eps, rows);
    }
    fn rope(
        &self,
        x: &mut Buffer,
        table: &Buffer,
        position: usize,
        t: usize,
        heads: usize,
        head_dim: usize,
        inverse: bool,
    ) {
        pointwise::rope(x, table, position, t, heads, head_dim, inverse);
    }
    fn attention(
        &self,
        out: &mut Buffer,
        lse: &mut Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        past: Past<Buffer>,
        t: usize,
        shape: &Attention,
    ) {
        attention::attention(out, lse, q, k, v, past, t, shape);
    }
    fn attention_backward(
        &self,
        grads: AttentionGrads<Buffer>,
        saved: AttentionSaved<Buffer>,
        t: usize,
        shape: &Attention,
    ) {
        attention::attention_backward(grads, saved, t, shape);
    }
    fn swiglu(&self, h: &mut Buffer, gate: &Buffer, up: &Buffer, len: usize) {
        pointwise::swiglu(&mut h[..len], &gate[..len], &up[..len]);
    }
    fn swiglu_backward(
        &self,
        dgate: &mut Buffer,
        dup: &mut Buffer,
        dh: &Buffer,
        gate: &Buffer,
        up: &Buffer,
        len: usize,
    ) {
        pointwise::swiglu_backward(&mut dgate[..len], &mut dup[..len], &dh[..len], &gate[..len], &up[..len]);
    }
    fn cross_entropy(&self, losses: &mut Buffer, logits: &mut Buffer, targets: &Vec<u32>, v: usize, scale: f32) {
        pointwise::cross_entropy(losses, logits, targets, v, scale);
    }

    fn count_nonfinite(&self, counter: &mut Buffer, at: usize, x: &Buffer, len: usize) {
        counter[at] += pointwise::count_nonfinite(&x[..len]);
    }
    fn normal_projection(&self, p: &mut Buffer, rank: usize, dim: usize, stream: Stream) {
        use rayon::prelude::*;
        const CHUNK: usize = 4096;
        let sigma = 1.0 / (rank as f32).sqrt();
        p[..rank * dim].par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
            stream.fill_normal((i * CHUNK) as u64, sigma, out);
        });
    }
    fn apollo_prepare(
        &self,
        s: &mut Buffer,
        norms: &mut Buffer,
        at: usize,
        exp_avg: &Buffer,
        exp_avg_sq: &Buffer,
        f: &Factors<Buffer>,
        c: &Compressed<Buffer>,
    ) {
        optimizer::prepare(s, norms, at, exp_avg, exp_avg_sq, f, c);
    }
    fn limit(&self, norms: &mut Buffer, at: usize, limiter: Limiter) {
        let (previous, update) = (norms[at + NORM_PREVIOUS], norms[at + NORM_UPDATE]);
        let growth = match limiter.growth {
            Some(limit) if previous > 0.0 => (update / (previous + 1e-8)).max(limit) / limit,
            _ => 1.0,
        };
        norms[at + NORM_FACTOR] = 1.0 / growth;
        let floor = limiter.floor * limiter.expected;
        norms[at + NORM_NEXT] = if update > 0.0 { (update / growth).max(floor) } else { previous };
    }
    fn apollo_commit(
        &self,
        w: &Weight,
        norms: &mut Buffer,
        at: usize,
        s: &Buffer,
        exp_avg: &mut Buffer,
        exp_avg_sq: &mut Buffer,
        f: &Factors<Buffer>,
        c: &Compressed<Buffer>,
        write: Write,
    ) {
        optimizer::commit(w, norms, at, s, exp_avg, exp_avg_sq, f, c, write);
    }
    fn adamw_factors(
        &self,
        w: &Weight,
        exp_avg: &mut Buffer,
        exp_avg_sq: &mut Buffer,
        f: &Factors<Buffer>,
        moments: Moments,
        write: Write,
    ) {
        optimizer::adamw_factors(w, exp_avg, exp_avg_sq, f, moments, write);
    }
    fn scatter_add_rows(&self, dst: &mut Buffer, src: &Buffer, index: &Vec<u32>, n: usize) {
        for (&row, src) in index.iter().zip(src.chunks_exact(n)) {
            dst[row as usize * n..][..n].iter_mut().zip(src).for_each(|(d, s)| *d += s);
        }
    }
    fn adamw_rows(
        &self,
        w: &Weight,
        rows: &[AdamRow],
        g: &Buffer,
        exp_avg: &mut Buffer,
        exp_avg_sq: &mut Buffer,
        moments: Moments,
        write: Write,
    ) {
        optimizer::adamw_rows(w, rows, g, exp_avg, exp_avg_sq, moments, write);
    }
}
