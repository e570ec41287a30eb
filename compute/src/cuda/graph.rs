//! Recorded work: the driver keeps kernels and their arguments, and queues all of them at once.

use super::Cuda;
use super::driver::{Context, check};
use super::pool::Pool;
use cudarc::driver::{result, sys};
use std::sync::Arc;

/// Recorded work, with the memory that it uses.
pub struct Graph {
    exec: sys::CUgraphExec,
    pool: Arc<Pool>,
    context: Arc<Context>,
}

// SAFETY: a name that the driver accepts from any thread in which the context is current.
unsafe impl Send for Graph {}
// SAFETY: as above; it is only launched, by `replay`, on one stream.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind_for_drop();
        // SAFETY: instantiated in `record`; the driver ends what runs of it first. An error has nobody to tell.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}

impl Cuda {
    /// See [`crate::Device::record`].
    pub(super) fn record_graph(&self, instead: Option<&Graph>, work: &mut dyn FnMut()) -> Graph {
        let pool = Arc::new(Pool::for_recording(self.context.clone(), instead.map(|graph| &*graph.pool)));
        let before = self.pool.lock().expect("no holder panics").replace(pool.clone());
        assert!(before.is_none(), "a recording within a recording");
        self.context.bind();
        // Relaxed: this thread may allocate while it records, which touches no stream.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { result::stream::begin_capture(self.stream.0, mode) }, "cuStreamBeginCapture");
        work();
        // SAFETY: as above.
        let graph = check(unsafe { result::stream::end_capture(self.stream.0) }, "cuStreamEndCapture");
        *self.pool.lock().expect("no holder panics") = None;
        // SAFETY: the driver gave this graph.
        let exec = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        let exec = check(exec, "cuGraphInstantiate");
        // SAFETY: as above; what is executed is a copy.
        check(unsafe { result::graph::destroy(graph) }, "cuGraphDestroy");
        // SAFETY: the driver gave it.
        check(unsafe { result::graph::upload(exec, self.stream.0) }, "cuGraphUpload");
        Graph { exec, pool, context: self.context.clone() }
    }

    /// See [`crate::Device::replay`].
    pub(super) fn replay_graph(&self, graph: &Graph) {
        self.context.bind();
        // SAFETY: instantiated and not destroyed; its memory is held by its pool, what it reads besides by whoever
        // recorded it.
        check(unsafe { result::graph::launch(graph.exec, self.stream.0) }, "cuGraphLaunch");
    }
}
