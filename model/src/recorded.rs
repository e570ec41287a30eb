//! Windows whose work is recorded once and replayed: a GPU then gets a window as one launch instead of a thousand.
//!
//! A recording holds for one number of rows T (a bucket of [`Device::bucket`]), one cache and one set of wanted gradients.
//! What differs between two windows lies in [`Inputs`] and in the cache's length, in device memory. A window of t < T
//! tokens is padded at its end: its rows see nothing of the padding, the padding has no target, and so all gradients of
//! its rows are 0; factors have T rows of which the last T - t add nothing.

use crate::cache::Cache;
use crate::forward::Model;
use crate::window::Timings;
use compute::{Device, NO_TARGET, Sink, TensorId};
use std::sync::Arc;

/// What differs between two windows of one shape.
pub(crate) struct Inputs<D: Device> {
    pub ids: D::Ids,
    pub targets: D::Ids,
    /// Weight of one token's loss, one element.
    pub scale: D::Buffer,
}

impl<D: Device> Inputs<D> {
    pub fn new(device: &D, ids: &[u32], targets: &[u32], scale: f32) -> Inputs<D> {
        let mut inputs = Inputs { ids: device.ids(ids), targets: device.ids(targets), scale: device.uninit(1) };
        device.write(&mut inputs.scale, 0, &[scale]);
        inputs
    }
}

/// A recorded window and what it leaves.
pub(crate) struct Recorded<D: Device> {
    /// T.
    rows: usize,
    graph: D::Graph,
    inputs: Inputs<D>,
    losses: D::Buffer,
    left: Left<D>,
    /// Holders of the events' buffers when nobody else has one.
    holders: usize,
}

impl<D: Device> Recorded<D> {
    /// Whether nobody holds what the last replay left.
    fn is_idle(&self) -> bool {
        self.left.holders() == self.holders
    }
}

/// A gradient event without what differs between two windows.
enum Event<D: Device> {
    Linear { tensor: TensorId, x: Arc<D::Buffer>, dy: Arc<D::Buffer> },
    Rows { tensor: TensorId, dx: Arc<D::Buffer> },
    Dense { tensor: TensorId, g: Arc<D::Buffer> },
}

/// The events of a recorded window, in their order.
struct Left<D: Device> {
    wanted: Vec<bool>,
    events: Vec<Event<D>>,
}

impl<D: Device> Sink<D> for Left<D> {
    fn linear(&mut self, tensor: TensorId, x: &Arc<D::Buffer>, dy: &Arc<D::Buffer>, _: usize) {
        self.events.push(Event::Linear { tensor, x: x.clone(), dy: dy.clone() });
    }
    fn rows(&mut self, tensor: TensorId, _: &[u32], dx: &Arc<D::Buffer>) {
        self.events.push(Event::Rows { tensor, dx: dx.clone() });
    }
    fn dense(&mut self, tensor: TensorId, g: &Arc<D::Buffer>) {
        self.events.push(Event::Dense { tensor, g: g.clone() });
    }
    fn wants(&self, tensor: TensorId) -> bool {
        self.wanted[tensor]
    }
}

impl<D: Device> Left<D> {
    fn holders(&self) -> usize {
        let holders = |event: &Event<D>| match event {
            Event::Linear { x, dy, .. } => Arc::strong_count(x) + Arc::strong_count(dy),
            Event::Rows { dx: buffer, .. } | Event::Dense { g: buffer, .. } => Arc::strong_count(buffer),
        };
        self.events.iter().map(holders).sum()
    }

    /// Hands the events on, for a window of these ids that was padded to `rows`.
    fn hand_on(&self, ids: &[u32], rows: usize, sink: &mut impl Sink<D>) {
        for event in &self.events {
            match event {
                Event::Linear { tensor, x, dy } => sink.linear(*tensor, x, dy, rows),
                Event::Rows { tensor, dx } => sink.rows(*tensor, ids, dx),
                Event::Dense { tensor, g } => sink.dense(*tensor, g),
            }
        }
    }
}

impl<D: Device> Model<D> {
    /// A recording for a window of `t` rows with `scored` targets over this cache, made now if there is none. None where
    /// the device does not record, where the host chooses experts, where rows have no target, or while somebody holds what a recording left:
    /// recordings of a cache share their memory.
    pub(crate) fn recorded<'c, S: Sink<D>>(
        &self,
        cache: &'c mut Cache<D>,
        t: usize,
        scored: usize,
        sink: &S,
    ) -> Option<&'c mut Recorded<D>> {
        let decides = self.config().decoder.experts.is_some();
        let fits = |rows: &usize| !decides && t == scored && cache.len() + rows <= self.positions();
        let rows = self.device.bucket(t).filter(fits)?;
        if !cache.recorded.iter().all(Recorded::is_idle) {
            return None;
        }
        let wanted: Vec<bool> = (0..self.tensors().len()).map(|tensor| sink.wants(tensor)).collect();
        let fits = |recorded: &Recorded<D>| recorded.rows == rows && recorded.left.wanted == wanted;
        if !cache.recorded.iter().any(fits) {
            let recorded = self.record(cache, rows, wanted.clone());
            cache.recorded.push(recorded);
        }
        cache.recorded.iter_mut().find(|recorded| fits(recorded))
    }

    fn record(&self, cache: &Cache<D>, rows: usize, wanted: Vec<bool>) -> Recorded<D> {
        let inputs = Inputs::new(&*self.device, &vec![0; rows], &vec![NO_TARGET; rows], 0.0);
        let mut left = Left { wanted, events: Vec::new() };
        let mut losses = None;
        let instead = cache.recorded.first().map(|other| &other.graph);
        let graph = self.device.record(instead, &mut || {
            let ids = vec![0; rows];
            losses = Some(self.pass(cache, &inputs, &ids, rows, Some(&mut left), &mut Timings::default()));
        });
        let losses = losses.expect("the work was recorded");
        Recorded { rows, graph, inputs, losses, holders: left.holders(), left }
    }

    /// Runs a recorded window with these tokens: its losses, of which the first `targets.len()` count, and its events.
    pub(crate) fn replay<'r>(
        &self,
        recorded: &'r mut Recorded<D>,
        ids: &[u32],
        targets: &[u32],
        scale: f32,
        sink: &mut impl Sink<D>,
    ) -> &'r D::Buffer {
        let Recorded { rows, graph, inputs, losses, left, .. } = recorded;
        let padded = |values: &[u32], with| [values, &vec![with; *rows - values.len()]].concat();
        // A token whose embedding is looked at anyway: padding must bring nothing into the window, not a NaN either.
        self.device.write_ids(&mut inputs.ids, &padded(ids, ids[0]));
        self.device.write_ids(&mut inputs.targets, &padded(targets, NO_TARGET));
        self.device.write(&mut inputs.scale, 0, &[scale]);
        self.device.replay(graph);
        left.hand_on(ids, *rows, sink);
        losses
    }
}
