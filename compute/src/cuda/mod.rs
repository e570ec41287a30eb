//! The CUDA backend: f32 activations in device memory, foreign weights read where they lie.
//!
//! Kernels are `compute/kernels/*.cu`, embedded as PTX and compiled by the driver when a device is opened. Everything is
//! queued on one stream and nothing waits but [`Device::read`], [`Device::read_weight`] and [`Device::synchronize`].
//! Results do not depend on the order in which blocks run: partial sums are added in a fixed order.
//!
//! An error of the driver ends the thread with one line that names call and error. It is sticky: the process that it
//! happens in can do nothing more on this device, and its parent starts another.

mod attention;
mod blas;
mod conv;
mod delta;
mod driver;
mod graph;
mod hash;
mod launch;
mod layers;
mod linear;
mod optimizer;
mod pool;
mod weight;

pub use blas::use_library_of;
pub use driver::{DeviceName, OpenError};
pub use graph::Graph;
pub use hash::ReadAhead;
pub use weight::Weight;

use crate::{
    AdamwRows, ApolloCommit, ApolloPrepare, Attention, AttentionGrads, AttentionSaved, Columns, Convolution,
    DeltaGrads, DeltaInputs, DeltaRule, Device, Dtype, Factors, Heads, Limiter, LinearOutput, Moments, Norm, Past,
    Stream as RandomStream, Write,
};
use cudarc::driver::{result, sys};
use driver::{Context, Module, check};
use pool::{Block, Pool};
use std::sync::{Arc, Mutex};

/// The kernels, compiled by nvcc 13.0 for compute capability 8.0; `ci/kernels.py` makes it.
const PTX: &str = include_str!("../../kernels/apollod.ptx");
/// Rows of the longest window that is recorded. Longer ones go through cuBLASLt, which from CUDA 13.3 on cannot choose an
/// algorithm while a stream records.
const BUCKET_MAX: usize = linear::SKINNY;
/// Rows of the shortest.
const BUCKET_MIN: usize = 8;

/// A GPU as a [`Device`].
pub struct Cuda {
    stream: Stream,
    module: Module,
    /// Of what is being recorded, if anything is.
    pool: Mutex<Option<Arc<Pool>>>,
    general: Arc<Pool>,
    counters: linear::Counters,
    blas: Option<blas::Blas>,
    /// Last, because everything above needs it to the end.
    context: Arc<Context>,
}

/// The stream that everything is queued on.
struct Stream(sys::CUstream);

// SAFETY: a name that the driver accepts from any thread in which the context is current; it orders what several threads
// queue.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `Cuda::open`; the driver finishes what is queued. An error has nobody to tell.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // What is dropped with it asks the driver for its end, perhaps in a thread that never computed. An error has
        // nobody to tell.
        let _ = self.context.bind_for_drop();
    }
}

/// f32 elements in device memory.
pub struct Buffer {
    block: Block,
    len: usize,
}

impl Buffer {
    /// Where it lies.
    pub(crate) fn ptr(&self) -> u64 {
        self.block.ptr
    }
    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    /// The address of `len` elements from `at` on.
    fn range(&self, at: usize, len: usize) -> u64 {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "{at}+{len} outside {} elements", self.len);
        self.block.ptr + 4 * at as u64
    }
}

/// Unsigned integers in device memory.
pub struct Ids {
    block: Block,
    len: usize,
}

impl Ids {
    /// Where they lie.
    pub(crate) fn ptr(&self) -> u64 {
        self.block.ptr
    }
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Cuda {
    /// Opens a device and compiles the kernels for it.
    ///
    /// # Errors
    /// There is no driver or no such device, or it cannot run the kernels.
    pub fn open(name: &DeviceName) -> Result<Cuda, OpenError> {
        let context = Arc::new(Context::open(name)?);
        let module = Module::load(PTX)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| OpenError::Call { call: "cuStreamCreate", error: driver::describe(error) })?;
        let stream = Stream(stream);
        let general = Arc::new(Pool::new(context.clone()));
        let counters = general
            .try_block(linear::Counters::BYTES)
            .map_err(|error| OpenError::Call { call: "cuMemAlloc", error: driver::describe(error) })?;
        // SAFETY: the block has as many bytes.
        unsafe { result::memset_d8_async(counters.ptr, 0, linear::Counters::BYTES, stream.0) }
            .map_err(|error| OpenError::Call { call: "cuMemsetD8Async", error: driver::describe(error) })?;
        let blas = blas::Blas::open(|bytes| general.try_block(bytes).ok());
        Ok(Cuda {
            stream,
            module,
            pool: Mutex::new(None),
            general,
            counters: linear::Counters::new(counters),
            blas,
            context,
        })
    }

    /// The device's name, such as `NVIDIA H200`.
    pub fn name(&self) -> &str {
        &self.context.name
    }
    /// Its identity, `GPU-…`.
    pub fn uuid(&self) -> &str {
        &self.context.uuid
    }
    /// Bytes of device memory taken from the driver, recordings not counted.
    pub fn memory_bytes(&self) -> usize {
        self.general.bytes()
    }
    /// Free and total bytes of the device's memory.
    pub fn memory_info(&self) -> (usize, usize) {
        self.context.bind();
        check(result::mem_get_info(), "cuMemGetInfo")
    }

    fn function(&self, name: &str) -> sys::CUfunction {
        self.context.bind();
        self.module.function(name)
    }

    /// `bytes` of device memory, content unspecified.
    fn block(&self, bytes: usize) -> Block {
        self.current_pool().block(bytes)
    }

    /// As [`Cuda::block`], for who can do without.
    fn try_block(&self, bytes: usize) -> Option<Block> {
        self.current_pool().try_block(bytes).ok()
    }

    fn current_pool(&self) -> Arc<Pool> {
        self.context.bind();
        let recording = self.pool.lock().expect("no holder panics").clone();
        recording.unwrap_or_else(|| self.general.clone())
    }

    /// How long the device takes for what `work` queues, in ms. Waits.
    pub fn timed(&self, work: impl FnOnce()) -> f64 {
        self.context.bind();
        let event = || {
            let event = result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT);
            check(event, "cuEventCreate")
        };
        let (start, end) = (event(), event());
        // SAFETY: event and stream are alive.
        let record = |event| check(unsafe { result::event::record(event, self.stream.0) }, "cuEventRecord");
        record(start);
        work();
        record(end);
        self.synchronize();
        // SAFETY: both were recorded and have happened.
        let ms = check(unsafe { result::event::elapsed(start, end) }, "cuEventElapsedTime");
        for event in [start, end] {
            // SAFETY: created above, and nobody waits for it.
            check(unsafe { result::event::destroy(event) }, "cuEventDestroy");
        }
        f64::from(ms)
    }

    /// Whether what is queued is recorded and not done.
    fn is_recording(&self) -> bool {
        self.pool.lock().expect("no holder panics").is_some()
    }

    /// Multiprocessors of the device.
    pub(crate) fn multiprocessors(&self) -> usize {
        self.context.multiprocessors
    }

    /// Queues a copy from the host, which has read the source when it returns.
    ///
    /// # Safety
    /// `dst` is device memory of as many bytes.
    unsafe fn upload<T: Copy>(&self, dst: u64, src: &[T]) {
        assert!(!self.is_recording(), "the host writes into a recording");
        self.context.bind();
        if !src.is_empty() {
            // SAFETY: the caller's promise. A device that cannot read pageable memory leaves it to the driver, which has
            // done it when it returns; for one that can, the copy is waited for.
            check(unsafe { result::memcpy_htod_async(dst, src, self.stream.0) }, "cuMemcpyHtoDAsync");
            if self.context.reads_pageable {
                self.synchronize();
            }
        }
    }

    /// Waits for all that was queued, and copies to the host.
    ///
    /// # Safety
    /// `src` is device memory of as many bytes.
    unsafe fn download<T: Copy>(&self, dst: &mut [T], src: u64) {
        self.context.bind();
        if !dst.is_empty() {
            // SAFETY: the caller's promise; the stream is waited for before `dst` is used.
            check(unsafe { result::memcpy_dtoh_async(dst, src, self.stream.0) }, "cuMemcpyDtoHAsync");
        }
        self.synchronize();
    }
}

impl Device for Cuda {
    type Buffer = Buffer;
    /// Always f32: the kernels know no other.
    type Stored = Buffer;
    type Ids = Ids;
    type Weight = Weight;
    type Graph = Graph;

    fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.context.bind();
        f()
    }
    fn synchronize(&self) {
        self.context.bind();
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { result::stream::synchronize(self.stream.0) }, "cuStreamSynchronize");
    }
    fn bucket(&self, t: usize) -> Option<usize> {
        (t <= BUCKET_MAX).then(|| t.next_power_of_two().max(BUCKET_MIN))
    }
    fn record(&self, instead: Option<&Graph>, work: &mut dyn FnMut()) -> Graph {
        self.record_graph(instead, work)
    }
    fn replay(&self, graph: &Graph) {
        self.replay_graph(graph);
    }

    fn zeros(&self, len: usize) -> Buffer {
        let buffer = self.uninit(len);
        if len > 0 {
            // SAFETY: the block has at least `len` words.
            check(unsafe { sys::cuMemsetD32Async(buffer.ptr(), 0, len, self.stream.0) }.result(), "cuMemsetD32Async");
        }
        buffer
    }
    fn uninit(&self, len: usize) -> Buffer {
        Buffer { block: self.block(4 * len), len }
    }
    fn len(&self, buffer: &Buffer) -> usize {
        buffer.len()
    }
    fn ids(&self, ids: &[u32]) -> Ids {
        let mut on_device = Ids { block: self.block(4 * ids.len()), len: ids.len() };
        self.write_ids(&mut on_device, ids);
        on_device
    }
    fn write_ids(&self, dst: &mut Ids, ids: &[u32]) {
        assert!(ids.len() <= dst.len(), "{} ids into {}", ids.len(), dst.len());
        // SAFETY: checked above.
        unsafe { self.upload(dst.ptr(), ids) };
    }
    fn write(&self, dst: &mut Buffer, at: usize, src: &[f32]) {
        // SAFETY: `range` checks.
        unsafe { self.upload(dst.range(at, src.len()), src) };
    }
    fn read(&self, src: &Buffer, at: usize, dst: &mut [f32]) {
        // SAFETY: `range` checks.
        unsafe { self.download(dst, src.range(at, dst.len())) };
    }
    fn shape(&self, w: &Weight) -> (usize, usize) {
        (w.rows(), w.cols())
    }
    fn dtype(&self, w: &Weight) -> Dtype {
        w.dtype()
    }
    fn weight_values(&self, w: &Weight) -> Vec<f32> {
        let mut bytes = vec![0; w.bytes()];
        self.read_weight(w, 0, &mut bytes);
        crate::widen(w.dtype(), &bytes)
    }
    fn read_weight(&self, w: &Weight, at: usize, out: &mut [u8]) {
        // SAFETY: `range` checks.
        unsafe { self.download(out, w.range(at, out.len())) };
    }
    fn write_weight(&self, w: &Weight, at: usize, bytes: &[u8]) {
        // SAFETY: `range` checks.
        unsafe { self.upload(w.range(at, bytes.len()), bytes) };
    }
    fn copy(&self, dst: &mut Buffer, dst_at: usize, src: &Buffer, src_at: usize, len: usize) {
        self.context.bind();
        let (dst, src) = (dst.range(dst_at, len), src.range(src_at, len));
        if len > 0 {
            // SAFETY: `range` checks; two buffers do not overlap.
            check(unsafe { result::memcpy_dtod_async(dst, src, 4 * len, self.stream.0) }, "cuMemcpyDtoDAsync");
        }
    }

    fn stores(&self, dtype: Dtype) -> bool {
        dtype == Dtype::F32
    }
    fn stored(&self, dtype: Dtype, len: usize) -> Buffer {
        assert!(self.stores(dtype), "{dtype} is not stored on a GPU");
        self.zeros(len)
    }
    fn stored_len(&self, stored: &Buffer) -> usize {
        stored.len()
    }
    fn stored_dtype(&self, _: &Buffer) -> Dtype {
        Dtype::F32
    }
    fn store(&self, dst: &mut Buffer, dst_at: usize, src: &Buffer, len: usize) {
        self.copy(dst, dst_at, src, 0, len);
    }
    fn copy_stored(&self, dst: &mut Buffer, dst_at: usize, src: &Buffer, src_at: usize, len: usize) {
        self.copy(dst, dst_at, src, src_at, len);
    }
    fn read_stored(&self, src: &Buffer, at: usize, dst: &mut [f32]) {
        self.read(src, at, dst);
    }
    fn write_stored(&self, dst: &mut Buffer, at: usize, src: &[f32]) {
        self.write(dst, at, src);
    }

    fn embed(&self, x: &mut Buffer, w: &Weight, ids: &Ids) {
        layers::embed(self, x, w, ids);
    }
    fn linear(&self, y: &mut Buffer, x: &Buffer, w: &Weight, bias: Option<&Weight>, t: usize) {
        linear::linear_group(self, &mut [LinearOutput { y, w, bias }], x, t);
    }
    fn linear_group(&self, outputs: &mut [LinearOutput<Cuda>], x: &Buffer, t: usize) {
        linear::linear_group(self, outputs, x, t);
    }
    fn linear_dx(&self, dx: &mut Buffer, dy: &Buffer, w: &Weight, t: usize, accumulate: bool) {
        linear::linear_dx_group(self, dx, &[(dy, w)], t, accumulate);
    }
    fn linear_dx_group(&self, dx: &mut Buffer, inputs: &[(&Buffer, &Weight)], t: usize) {
        linear::linear_dx_group(self, dx, inputs, t, false);
    }
    fn sum_rows(&self, db: &mut Buffer, dy: &Buffer, t: usize, m: usize) {
        layers::sum_rows(self, db, dy, t, m);
    }
    fn outer_accumulate(&self, g: &mut Buffer, f: &Factors<Buffer>) {
        layers::outer_accumulate(self, g, f);
    }
    fn add(&self, x: &mut Buffer, y: &Buffer, len: usize) {
        layers::add(self, x, y, len);
    }

    fn copy_columns(&self, dst: &mut Buffer, to: Columns, src: &Buffer, from: Columns, columns: usize, rows: usize) {
        layers::copy_columns(self, dst, to, src, from, columns, rows);
    }
    fn rms_norm(&self, y: &mut Buffer, x: &Buffer, w: &Weight, norm: Norm, rows: usize) {
        layers::rms_norm(self, y, x, w, norm, rows);
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
        layers::rms_norm_backward(self, dx, dw, dy, x, w, norm, rows);
    }
    fn rope(&self, x: &mut Buffer, table: &Buffer, position: &Ids, t: usize, heads: Heads, inverse: bool) {
        layers::rope(self, x, table, position, t, heads, inverse);
    }
    fn attention(
        &self,
        out: &mut Buffer,
        lse: &mut Buffer,
        q: &Buffer,
        k: &Buffer,
        v: &Buffer,
        past: Past<Cuda>,
        t: usize,
        shape: &Attention,
    ) {
        attention::attention(self, out, lse, q, k, v, past, t, shape);
    }
    fn attention_backward(
        &self,
        grads: AttentionGrads<Buffer>,
        saved: AttentionSaved<Cuda>,
        t: usize,
        shape: &Attention,
    ) {
        attention::attention_backward(self, grads, saved, t, shape);
    }
    fn swiglu(&self, h: &mut Buffer, gate: &Buffer, up: &Buffer, len: usize) {
        layers::swiglu(self, h, gate, up, len);
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
        layers::swiglu_backward(self, dgate, dup, dh, gate, up, len);
    }
    fn sigmoid_gate(&self, h: &mut Buffer, x: &Buffer, gate: &Buffer, len: usize) {
        layers::sigmoid_gate(self, h, x, gate, len);
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
        layers::sigmoid_gate_backward(self, dx, dgate, dh, x, gate, len);
    }
    fn causal_conv(&self, y: &mut Buffer, x: &Buffer, before: &Buffer, w: &Weight, t: usize, shape: Convolution) {
        conv::causal_conv(self, y, x, before, w, t, shape);
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
        conv::causal_conv_backward(self, dx, dw, dy, x, before, w, t, shape);
    }
    fn delta_rule(
        &self,
        out: &mut Buffer,
        next: Option<&mut Buffer>,
        inputs: DeltaInputs<Cuda>,
        t: usize,
        shape: &DeltaRule,
    ) {
        delta::delta_rule(self, out, next, &inputs, t, shape);
    }
    fn delta_rule_backward(
        &self,
        grads: DeltaGrads<Buffer>,
        dout: &Buffer,
        inputs: DeltaInputs<Cuda>,
        t: usize,
        shape: &DeltaRule,
    ) {
        delta::delta_rule_backward(self, grads, dout, &inputs, t, shape);
    }
    fn cross_entropy(&self, losses: &mut Buffer, logits: &mut Buffer, targets: &Ids, v: usize, scale: &Buffer) {
        layers::cross_entropy(self, losses, logits, targets, v, scale);
    }

    fn count_nonfinite(&self, counter: &mut Buffer, at: usize, items: &[(&Buffer, usize)]) {
        layers::count_nonfinite(self, counter, at, items);
    }
    fn sum_squares(&self, out: &mut Buffer, items: &[(&Buffer, usize)]) {
        layers::sum_squares(self, out, items);
    }
    fn normal_projection(&self, p: &mut Buffer, rank: usize, dim: usize, stream: RandomStream) {
        optimizer::normal_projection(self, p, rank, dim, stream);
    }
    fn apollo_prepare(&self, norms: &mut Buffer, tensors: &mut [ApolloPrepare<Cuda>]) {
        optimizer::prepare(self, norms, tensors);
    }
    fn limit(&self, norms: &mut Buffer, limiters: &[(usize, Limiter)]) {
        optimizer::limit(self, norms, limiters);
    }
    fn apollo_commit(&self, norms: &mut Buffer, tensors: &mut [ApolloCommit<Cuda>]) {
        optimizer::commit(self, norms, tensors);
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
        optimizer::adamw_factors(self, w, exp_avg, exp_avg_sq, f, moments, write);
    }
    fn scatter_add_rows(&self, dst: &mut Buffer, src: &Buffer, index: &Ids, n: usize) {
        layers::scatter_add_rows(self, dst, src, index, n);
    }
    fn one_hot(&self, y: &mut Buffer, at: usize, ids: &Ids, m: usize) {
        layers::one_hot(self, y, at, ids, m);
    }
    fn adamw_rows(&self, tensors: &mut [AdamwRows<Cuda>], moments: Moments) {
        optimizer::adamw_rows(self, tensors, moments);
    }
}
