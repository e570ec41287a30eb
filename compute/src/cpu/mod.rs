//! The CPU backend: f32 activations in ordinary memory, foreign weights read where they lie.
//!
//! Operations run on the rayon pool of the caller; [`Device::run`] provides one of a chosen size.
//! Results depend on the shapes and on the instruction set, not on the number of threads: sums are taken in an
//! order that the shapes give, or, in the products of `kernel`, in an order that no cut changes.

mod attention;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod buffer;
mod conv;
mod delta;
mod foreign;
mod gemm;
mod kernel;
mod linear;
mod optimizer;
mod pointwise;
pub(crate) mod simd;
pub(crate) mod stored;

pub use buffer::Buffer;
pub use foreign::Weight;
pub use stored::Stored;

use crate::{
    AdamwRows, ApolloCommit, ApolloPrepare, Attention, AttentionGrads, AttentionSaved, Columns, Convolution,
    DeltaGrads, DeltaInputs, DeltaRule, Device, Dtype, Factors, Heads, Limiter, LinearOutput, Moments, NORM_FACTOR,
    NORM_NEXT, NORM_PREVIOUS, NORM_UPDATE, Norm, Past, Stream, Write,
};
use rayon::prelude::*;
use std::cell::RefCell;

/// The CPU as a [`Device`].
pub struct Cpu {
    threads: rayon::ThreadPool,
    /// What multiplies pairs of bf16, where that is done.
    pairs: Option<kernel::Vectors>,
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
        let pool = pool.map_err(|e| PoolError { threads, reason: e.to_string() })?;
        Ok(Cpu { threads: pool, pairs: kernel::Vectors::of_pairs() })
    }

    /// The same without dot products of bf16, even if the processor has them: every product then takes its factors as they are.
    pub fn without_pairs(self) -> Cpu {
        Cpu { pairs: None, ..self }
    }

    /// The same as if the processor had dot products of bf16, slowly: for tests of what rounds its factors there.
    pub fn with_portable_pairs(self) -> Cpu {
        Cpu { pairs: Some(kernel::Vectors::PortablePairs), ..self }
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
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
    type Stored = Stored;
    type Ids = Vec<u32>;
    type Weight = Weight;
    /// Nothing is recorded: queueing costs nothing here, and padding would cost time.
    type Graph = std::convert::Infallible;

    fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.threads.install(f)
    }
    fn synchronize(&self) {}
    fn bucket(&self, _: usize) -> Option<usize> {
        None
    }
    fn record(&self, _: Option<&Self::Graph>, _: &mut dyn FnMut()) -> Self::Graph {
        unreachable!("no window is padded for recording on a CPU")
    }
    fn replay(&self, graph: &Self::Graph) {
        match *graph {}
    }

    fn zeros(&self, len: usize) -> Buffer {
        Buffer::zeros(len)
    }
    fn uninit(&self, len: usize) -> Buffer {
        Buffer::uninit(len)
    }
    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }
    fn ids(&self, ids: &[u32]) -> Vec<u32> {
        ids.to_vec()
    }
    fn write_ids(&self, dst: &mut Vec<u32>, ids: &[u32]) {
        dst[..ids.len()].copy_from_slice(ids);
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
    fn dtype(&self, w: &Weight) -> Dtype {
        w.dtype()
    }
    fn weight_values(&self, w: &Weight) -> Vec<f32> {
        w.values()
    }
    fn read_weight(&self, w: &Weight, at: usize, out: &mut [u8]) {
        w.read_bytes(at, out);
    }
    fn write_weight(&self, w: &Weight, at: usize, bytes: &[u8]) {
        w.write_bytes(at, bytes);
    }
    fn copy(&self, dst: &mut Buffer, dst_at: usize, src: &Buffer, src_at: usize, len: usize) {
        dst[dst_at..dst_at + len].copy_from_slice(&src[src_at..src_at + len]);
    }

    fn stores(&self, dtype: Dtype) -> bool {
        dtype != Dtype::F16
    }
    fn stored(&self, dtype: Dtype, len: usize) -> Stored {
        Stored::zeros(dtype, len)
    }
    fn stored_len(&self, stored: &Stored) -> usize {
        stored.len()
    }
    fn stored_dtype(&self, stored: &Stored) -> Dtype {
        stored.dtype()
    }
    fn store(&self, dst: &mut Stored, dst_at: usize, src: &Buffer, len: usize) {
        dst.write(dst_at, &src[..len]);
    }
    fn copy_stored(&self, dst: &mut Stored, dst_at: usize, src: &Stored, src_at: usize, len: usize) {
        dst.copy(dst_at, src, src_at, len);
    }
    fn read_stored(&self, src: &Stored, at: usize, dst: &mut [f32]) {
        src.read(at, dst);
    }
    fn write_stored(&self, dst: &mut Stored, at: usize, src: &[f32]) {
        dst.write(at, src);
    }

    fn embed(&self, x: &mut Buffer, w: &Weight, ids: &Vec<u32>) {
        pointwise::embed(x, w, ids);
    }
    fn linear(&self, y: &mut Buffer, x: &Buffer, w: &Weight, bias: Option<&Weight>, t: usize) {
        linear::linear_group(&mut [linear::Output { y, w, bias }], x, t);
    }
    fn linear_group(&self, outputs: &mut [LinearOutput<Cpu>], x: &Buffer, t: usize) {
        linear::linear_group(&mut linear::outputs(outputs), x, t);
    }
    fn linear_group_rounded(&self, outputs: &mut [LinearOutput<Cpu>], x: &Buffer, t: usize) {
        linear::linear_group_rounded(&mut linear::outputs(outputs), x, t, self.pairs);
    }
    fn linear_dx(&self, dx: &mut Buffer, dy: &Buffer, w: &Weight, t: usize, accumulate: bool) {
        linear::linear_dx(dx, dy, w, t, accumulate);
    }
    fn linear_dx_group_rounded(&self, dx: &mut Buffer, inputs: &[(&Buffer, &Weight)], t: usize) {
        for (i, (dy, w)) in inputs.iter().enumerate() {
            linear::linear_dx_rounded(dx, dy, w, t, i > 0, self.pairs);
        }
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

    fn copy_columns(&self, dst: &mut Buffer, to: Columns, src: &Buffer, from: Columns, columns: usize, rows: usize) {
        for row in 0..rows {
            let (to, from) = (row * to.of + to.first, row * from.of + from.first);
            dst[to..to + columns].copy_from_slice(&src[from..from + columns]);
        }
    }
    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, w: &Weight, norm: Norm, rows: usize) {
        pointwise::rms_norm(y, x, w, norm, rows);
    }
    fn rms_norm_backward(
        &self,
        dx: &mut Buffer,
        dw: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        w: &Weight,
        norm: Norm,
        rows: usize,
    ) {
        pointwise::rms_norm_backward(dx, dw, dy, x, w, norm, rows);
    }
    fn rope(&self, x: &mut Buffer, table: &Buffer, position: &Vec<u32>, t: usize, heads: Heads, inverse: bool) {
        pointwise::rope(x, table, position[0] as usize, t, heads, inverse);
    }
    fn attention(
        &self,
        out: &mut Buffer,
        lse: &mut Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        past: Past<Cpu>,
        t: usize,
        shape: &Attention,
    ) {
        attention::attention(out, lse, q, k, v, past, t, shape);
    }
    fn attention_backward(
        &self,
        grads: AttentionGrads<Buffer>,
        saved: AttentionSaved<Cpu>,
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
    fn sigmoid_gate(&self, h: &mut Buffer, x: &Buffer, gate: &Buffer, len: usize) {
        pointwise::sigmoid_gate(&mut h[..len], &x[..len], &gate[..len]);
    }
    fn sigmoid_gate_backward(
        &self,
        dx: &mut Buffer,
        dgate: &mut Buffer,
        dh: &Buffer,
        x: &Buffer,
        gate: &Buffer,
        len: usize,
    ) {
        pointwise::sigmoid_gate_backward(&mut dx[..len], &mut dgate[..len], &dh[..len], &x[..len], &gate[..len]);
    }
    fn causal_conv(&self, y: &mut Buffer, x: &Buffer, before: &Buffer, w: &Weight, t: usize, shape: Convolution) {
        conv::causal_conv(y, x, before, w, t, shape);
    }
    fn causal_conv_backward(
        &self,
        dx: &mut Buffer,
        dw: &mut Buffer,
        dy: &Buffer,
        x: &Buffer,
        before: &Buffer,
        w: &Weight,
        t: usize,
        shape: Convolution,
    ) {
        conv::causal_conv_backward(dx, dw, dy, x, before, w, t, shape);
    }
    fn delta_rule(
        &self,
        out: &mut Buffer,
        next: Option<&mut Buffer>,
        inputs: DeltaInputs<Cpu>,
        t: usize,
        shape: &DeltaRule,
    ) {
        delta::delta_rule(out, next.map(|next| &mut next[..]), &inputs, t, shape);
    }
    fn delta_rule_backward(
        &self,
        grads: DeltaGrads<Buffer>,
        dout: &Buffer,
        inputs: DeltaInputs<Cpu>,
        t: usize,
        shape: &DeltaRule,
    ) {
        delta::delta_rule_backward(grads, dout, &inputs, t, shape);
    }
    fn cross_entropy(&self, losses: &mut Buffer, logits: &mut Buffer, targets: &Vec<u32>, v: usize, scale: &Buffer) {
        pointwise::cross_entropy(losses, logits, targets, v, scale[0]);
    }

    fn count_nonfinite(&self, counter: &mut Buffer, at: usize, items: &[(&Buffer, usize)]) {
        counter[at] += items.iter().map(|(x, len)| pointwise::count_nonfinite(&x[..*len])).sum::<f32>();
    }
    fn sum_squares(&self, out: &mut Buffer, items: &[(&Buffer, usize)]) {
        out.iter_mut().zip(items).for_each(|(out, (x, len))| *out = pointwise::sum_squares(&x[..*len]));
    }
    fn normal_projection(&self, p: &mut Buffer, rank: usize, dim: usize, stream: Stream) {
        const CHUNK: usize = 4096;
        let sigma = 1.0 / (rank as f32).sqrt();
        p[..rank * dim].par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
            stream.fill_normal((i * CHUNK) as u64, sigma, out);
        });
    }
    fn apollo_prepare(&self, norms: &mut Buffer, tensors: &mut [ApolloPrepare<Cpu>]) {
        // Whole tensors side by side: threads that wait for each other's parts of one would sleep and wake at every part.
        let updates: Vec<f32> = tensors.par_iter_mut().map(|tensor| optimizer::prepare(tensor, self.pairs)).collect();
        tensors.iter().zip(updates).for_each(|(tensor, norm)| norms[tensor.at + NORM_UPDATE] = norm);
    }
    fn limit(&self, norms: &mut Buffer, limiters: &[(usize, Limiter)]) {
        limiters.iter().for_each(|(at, limiter)| optimizer::limit(norms, *at, *limiter));
    }
    fn apollo_commit(&self, norms: &mut Buffer, tensors: &mut [ApolloCommit<Cpu>]) {
        tensors.par_iter_mut().for_each(|tensor| {
            let factor = norms[tensor.at + NORM_FACTOR];
            optimizer::commit(tensor, factor, self.pairs);
        });
        tensors.iter().for_each(|tensor| norms[tensor.at + NORM_PREVIOUS] = norms[tensor.at + NORM_NEXT]);
    }
    fn adamw_factors(
        &self,
        w: &Weight,
        exp_avg: &mut Stored,
        exp_avg_sq: &mut Stored,
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
    fn one_hot(&self, y: &mut Buffer, at: usize, ids: &Vec<u32>, m: usize) {
        y[at * m..][..ids.len() * m].fill(0.0);
        ids.iter().enumerate().for_each(|(i, &id)| y[(at + i) * m + id as usize] = 1.0);
    }
    fn adamw_rows(&self, tensors: &mut [AdamwRows<Cpu>], moments: Moments) {
        tensors.iter_mut().for_each(|tensor| optimizer::adamw_rows(tensor, moments));
    }
}
