//! What is kept of a context: keys and values of layers with attention, the states of recurrent ones.

use crate::prefixes::{BLOCK, PrefixLimits, Prefixes, Shape};
use crate::recorded::Recorded;
use compute::{Convolution, Device, Dtype, Past};
use std::sync::Arc;

/// What one layer keeps.
pub(crate) enum Held<D: Device> {
    /// Keys and values, a row for each token.
    Keys(D::Stored, D::Stored),
    /// The last inputs of a Gated DeltaNet's convolution (width - 1, channels), and its state.
    State { before: D::Buffer, state: D::Buffer },
}

/// What a layer sees of the tokens before the window.
pub(crate) enum Context<'a, D: Device> {
    Keys(Past<'a, D>),
    State { before: &'a D::Buffer, state: &'a D::Buffer },
}

impl<D: Device> Clone for Context<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Context<'_, D> {}

/// Keys and values of a context, per layer, for up to `capacity` tokens, or the state that it leaves in a recurrent layer.
///
/// It knows which tokens it holds, so that a context which begins like the last one is not run again; beside it are
/// those of earlier contexts, as far as [`Cache::keep_prefixes`] allows. Both are right only as long as the weights are
/// the same: [`Cache::weights_moved`] says that they are not. A state cannot be cut: where there is one, a context is shared
/// only as long as the next one goes on where it ends, and nothing is kept of earlier ones.
pub struct Cache<D: Device> {
    device: Arc<D>,
    layers: Vec<Held<D>>,
    ids: Vec<u32>,
    /// Number of tokens, where the device reads it: one element.
    pub(crate) len: D::Ids,
    capacity: usize,
    dtype: Dtype,
    prefixes: Prefixes<D>,
    /// The oldest weights that any of the tokens rests on, as `prefixes` counts them.
    version: u64,
    tokens_run: u64,
    /// Windows over these keys and values that were recorded.
    pub(crate) recorded: Vec<Recorded<D>>,
}

impl<D: Device> Cache<D> {
    /// An empty one for a model whose layers are `recurrent` or have attention.
    pub(crate) fn new(
        device: Arc<D>,
        capacity: usize,
        shape: Shape,
        recurrent: &[Option<(Convolution, usize)>],
    ) -> Cache<D> {
        let stored = || device.stored(shape.dtype, capacity * shape.row);
        let held = |layer: &Option<(Convolution, usize)>| match layer {
            None => Held::Keys(stored(), stored()),
            Some((conv, state)) => {
                Held::State { before: device.zeros((conv.width - 1) * conv.channels), state: device.zeros(*state) }
            }
        };
        let layers = recurrent.iter().map(held).collect();
        let (len, prefixes) = (device.ids(&[0]), Prefixes::new(device.clone(), shape));
        let (ids, recorded, dtype) = (Vec::new(), Vec::new(), shape.dtype);
        Cache { device, layers, ids, len, capacity, dtype, prefixes, version: 0, tokens_run: 0, recorded }
    }

    /// Number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.ids.len()
    }
    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
    /// Element type of keys and values.
    pub(crate) fn dtype(&self) -> Dtype {
        self.dtype
    }
    /// Tokens that were run to fill it, ever.
    pub fn tokens_run(&self) -> u64 {
        self.tokens_run
    }
    /// Tokens of earlier contexts that are kept beside it.
    pub fn tokens_kept(&self) -> usize {
        self.prefixes.tokens()
    }
    /// From now on keeps what contexts begin with, within these limits; of a model with recurrent layers nothing.
    pub fn keep_prefixes(&mut self, limits: PrefixLimits) {
        self.prefixes.limit(if self.is_recurrent() { PrefixLimits::default() } else { limits });
    }
    fn is_recurrent(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer, Held::State { .. }))
    }
    /// Forgets the context, and of the earlier ones what rests on weights that are too old now.
    pub fn weights_moved(&mut self) {
        self.clear();
        self.prefixes.weights_moved();
    }
    /// Forgets everything.
    pub fn forget(&mut self) {
        self.clear();
        self.prefixes.forget();
    }
    /// Forgets the context.
    pub fn clear(&mut self) {
        self.truncate(0);
    }
    /// Forgets all but the first `len` tokens, or all where a state that holds more cannot be cut.
    fn truncate(&mut self, len: usize) {
        let kept = if self.is_recurrent() && len < self.ids.len() { 0 } else { len };
        if kept == 0 && !self.ids.is_empty() {
            self.layers.iter_mut().for_each(|layer| layer.clear(&*self.device));
        }
        self.ids.truncate(kept);
        self.tell_len();
    }
    pub(crate) fn extend(&mut self, ids: &[u32]) {
        if self.ids.is_empty() {
            self.version = self.prefixes.updates();
        }
        self.ids.extend_from_slice(ids);
        self.tell_len();
    }
    pub(crate) fn count_run(&mut self, tokens: usize) {
        self.tokens_run += tokens as u64;
    }
    fn tell_len(&mut self) {
        self.device.write_ids(&mut self.len, &[self.ids.len() as u32]);
    }
    /// Forgets what does not begin `context`, and takes over what earlier contexts have of the rest.
    pub(crate) fn recall(&mut self, context: &[u32]) {
        let common = self.ids.iter().zip(context).take_while(|(a, b)| a == b).count();
        self.truncate(common);
        let common = self.len();
        let blocks = self.prefixes.find(context);
        let end = blocks.len() * BLOCK;
        let Some(version) = self.prefixes.version(&blocks).filter(|_| end > common) else { return };
        for (i, &block) in blocks.iter().enumerate().skip(common / BLOCK) {
            let first = common.saturating_sub(i * BLOCK);
            for (layer, cached) in self.layers.iter_mut().enumerate() {
                self.prefixes.copy_out(block, first, layer, cached, i * BLOCK + first);
            }
        }
        self.extend(&context[common..end]);
        self.version = self.version.min(version);
    }
    /// Keeps what the context begins with for later ones.
    pub(crate) fn keep(&mut self) {
        self.prefixes.keep(&self.ids, &self.layers, self.version);
    }
    /// What a layer sees of it.
    pub(crate) fn context(&self, layer: usize) -> Context<'_, D> {
        match &self.layers[layer] {
            Held::Keys(keys, values) => Context::Keys(Past { keys, values, len: &self.len }),
            Held::State { before, state } => Context::State { before, state },
        }
    }
    /// Takes over what a layer leaves of t tokens after those that are held, before [`Cache::extend`] counts them.
    pub(crate) fn take(&mut self, layer: usize, left: Left<D>, t: usize) {
        let first = self.len();
        match (&mut self.layers[layer], left) {
            (Held::Keys(keys, values), Left::Keys(k, v)) => {
                let row = self.device.len(&k) / t;
                self.device.store(keys, first * row, &k, t * row);
                self.device.store(values, first * row, &v, t * row);
            }
            (Held::State { before, state }, Left::State { inputs, next }) => {
                keep_last_rows(&*self.device, before, &inputs, t);
                self.device.copy(state, 0, &next, 0, self.device.len(&next));
            }
            _ => unreachable!("a layer leaves what it holds"),
        }
    }
}

/// What a layer leaves of the tokens that it has run.
pub(crate) enum Left<D: Device> {
    Keys(D::Buffer, D::Buffer),
    /// Inputs of the convolution, and the state after the last token.
    State {
        inputs: D::Buffer,
        next: D::Buffer,
    },
}

impl<D: Device> Held<D> {
    /// A state goes back to where no token was seen, in its place: recorded work knows its address.
    fn clear(&mut self, device: &D) {
        if let Held::State { before, state } = self {
            for buffer in [before, state] {
                let len = device.len(buffer);
                device.copy(buffer, 0, &device.zeros(len), 0, len);
            }
        }
    }

    /// Keys and values, of which a model without recurrent layers has nothing else.
    pub fn keys(&self) -> (&D::Stored, &D::Stored) {
        match self {
            Held::Keys(keys, values) => (keys, values),
            Held::State { .. } => unreachable!("nothing is kept of a model with recurrent layers"),
        }
    }
    pub fn keys_mut(&mut self) -> (&mut D::Stored, &mut D::Stored) {
        match self {
            Held::Keys(keys, values) => (keys, values),
            Held::State { .. } => unreachable!("nothing is kept of a model with recurrent layers"),
        }
    }
}

/// `before` becomes the last of its own rows and of the t rows after them.
fn keep_last_rows<D: Device>(device: &D, before: &mut D::Buffer, rows: &D::Buffer, t: usize) {
    let (held, row) = (device.len(before), device.len(rows) / t);
    let new = held.min(t * row);
    let mut next = device.uninit(held);
    device.copy(&mut next, 0, before, new, held - new);
    device.copy(&mut next, held - new, rows, t * row - new, new);
    device.copy(before, 0, &next, 0, held);
}
