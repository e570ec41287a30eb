//! Layers, their forward pass, and next-token logits.
//!
//! t rows of tokens · H hidden · I intermediate · V vocab
//! x (t,H) residual stream · mid (t,H), with what the layer's attention or recurrence adds

use crate::attention::{Attended, AttentionLayer};
use crate::cache::{Cache, Context, Left};
use crate::config::Config;
use crate::delta_net::{DeltaLayer, Recurred, State};
use crate::experts::{ExpertsLayer, Routed};
use crate::mlp::{Activated, Mlp};
use crate::prefixes::Shape;
use compute::{Device, Dtype, LinearOutput, Norm, TensorId};
use std::collections::HashMap;
use std::sync::Arc;
use weight_map::{HfTensor, matrix_shape};

/// Tokens that prefill runs at a time, so that its memory does not grow with the context.
const PREFILL_CHUNK: usize = 512;

/// A linear layer: y = x Wᵀ + b.
#[derive(Clone, Copy)]
pub(crate) struct Linear {
    pub weight: TensorId,
    pub bias: Option<TensorId>,
}

/// How products take activations, and gradients of them.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Activations {
    /// As they are: for windows that gradients flow through, unless [`Model::rounding_windows`] says otherwise.
    Exact,
    /// Rounded as a server of 16-bit weights rounds them, where that is faster: for a frozen context whose keys and values are
    /// kept in bf16 too.
    Rounded,
}

/// Tensors of one layer.
pub(crate) struct Layer {
    pub input_norm: TensorId,
    pub mixer: Mixer,
    pub post_norm: TensorId,
    pub feed: Feed,
}

/// What brings the tokens together.
pub(crate) enum Mixer {
    Attention(AttentionLayer),
    DeltaNet(DeltaLayer),
}

/// What is done with each token by itself.
pub(crate) enum Feed {
    Mlp(Mlp),
    Experts(ExpertsLayer),
}

/// A model whose weights lie in foreign memory.
pub struct Model<D: Device> {
    pub(crate) device: Arc<D>,
    config: Config,
    tensors: Vec<HfTensor>,
    weights: Vec<D::Weight>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) embed: TensorId,
    pub(crate) norm: TensorId,
    pub(crate) head: TensorId,
    /// (positions, elements of a head that rotate)
    pub(crate) rope: D::Buffer,
    positions: usize,
    /// How windows take them.
    pub(crate) windows: Activations,
}

/// What backward needs of one layer's forward pass.
pub(crate) struct Saved<D: Device> {
    pub x: Arc<D::Buffer>,
    pub normed: Arc<D::Buffer>,
    pub mixed: Mixed<D>,
    pub mid: D::Buffer,
    pub normed_mid: Arc<D::Buffer>,
    pub fed: Fed<D>,
}

/// What it needs of what brought the tokens together.
pub(crate) enum Mixed<D: Device> {
    Attention(Attended<D>),
    DeltaNet(Recurred<D>, Option<D::Buffer>),
}

/// What it needs of what was done with each by itself.
pub(crate) enum Fed<D: Device> {
    Mlp(Activated<D>),
    Experts(Routed<D>),
}

impl<D: Device> Model<D> {
    /// `weights` in the order of `config.decoder.tensors()`, a vector being (1,n). Sequences of up to
    /// `positions` tokens can be run.
    ///
    /// Panics if number or shapes of the weights are not those of the config; a weight map has
    /// checked them before.
    pub fn new(device: Arc<D>, config: Config, weights: Vec<D::Weight>, positions: usize) -> Model<D> {
        let tensors = config.decoder.tensors();
        assert_eq!(tensors.len(), weights.len(), "number of weights");
        for (tensor, weight) in tensors.iter().zip(&weights) {
            assert_eq!(matrix_shape(&tensor.shape), device.shape(weight), "{}", tensor.name);
        }
        let ids: HashMap<&str, TensorId> = tensors.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let layers = (0..config.decoder.layers).map(|i| Layer::new(&config, &ids, i)).collect();
        let module = config.decoder.module();
        let id = |name: &str| ids[format!("{module}.{name}").as_str()];
        let (embed, norm) = (id("embed_tokens.weight"), id("norm.weight"));
        let head = ids.get("lm_head.weight").copied().unwrap_or(embed);
        let table = config.rope.table(0, positions);
        let mut rope = device.uninit(table.len());
        device.write(&mut rope, 0, &table);
        let windows = Activations::Exact;
        Model { layers, embed, norm, head, rope, positions, device, config, tensors, weights, windows }
    }

    /// From now on windows round activations, and gradients of them, to bf16 where weights are bf16 and that is faster, as other
    /// trainers do everywhere. It moves a gradient by some 1e-2 of its size (DESIGN.md).
    pub fn rounding_windows(self, round: bool) -> Model<D> {
        Model { windows: if round { Activations::Rounded } else { Activations::Exact }, ..self }
    }

    /// What it runs on.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }
    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }
    /// Tensors in the model's order; a [`TensorId`] is an index into it.
    pub fn tensors(&self) -> &[HfTensor] {
        &self.tensors
    }
    /// Weights in the same order.
    pub fn weights(&self) -> &[D::Weight] {
        &self.weights
    }
    /// (rows, cols) of every tensor, a vector being (1,n).
    pub fn shapes(&self) -> Vec<(usize, usize)> {
        self.tensors.iter().map(|tensor| matrix_shape(&tensor.shape)).collect()
    }
    /// Longest sequence that can be run.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// An empty cache for `capacity` tokens: in bf16 where the weights have 16 bits and the device can, else in f32.
    pub fn cache(&self, capacity: usize) -> Cache<D> {
        let matrix = match &self.layers[0].feed {
            Feed::Mlp(mlp) => mlp.down,
            Feed::Experts(l) => l.experts[0].down,
        };
        let weights = self.device.dtype(&self.weights[matrix.weight]);
        let narrow = weights != Dtype::F32 && self.device.stores(Dtype::BF16);
        self.cache_in(if narrow { Dtype::BF16 } else { Dtype::F32 }, capacity)
    }

    /// An empty cache for `capacity` tokens with keys and values of a type that the device stores; states are f32. It decides
    /// how a context is run as well: with f32 as exactly as a window.
    pub fn cache_in(&self, dtype: Dtype, capacity: usize) -> Cache<D> {
        let d = &self.config.decoder;
        let shape = Shape { layers: self.layers.len(), row: d.kv_heads * d.head_dim, dtype };
        let recurrent = self.layers.iter().map(|layer| match &layer.mixer {
            Mixer::Attention(_) => None,
            Mixer::DeltaNet(l) => Some((l.convolution, l.rule.state())),
        });
        Cache::new(self.device.clone(), capacity, shape, &recurrent.collect::<Vec<_>>())
    }

    /// Runs tokens after those in the cache without gradients and adds their keys and values.
    pub fn prefill(&self, cache: &mut Cache<D>, ids: &[u32]) {
        for chunk in ids.chunks(PREFILL_CHUNK) {
            self.prefill_chunk(cache, chunk, false);
        }
    }

    /// Like [`Model::prefill`], and the logits (V) that follow the last token.
    pub fn next_logits(&self, cache: &mut Cache<D>, ids: &[u32]) -> Vec<f32> {
        let (&last, before) = ids.split_last().expect("at least one token");
        self.prefill(cache, before);
        let x = self.prefill_chunk(cache, &[last], true).expect("asked for");
        let (normed, logits) = self.logits(&x, 1);
        drop(normed);
        let mut host = vec![0.0; self.config.decoder.vocab];
        self.device.read(&logits, 0, &mut host);
        host
    }

    /// One chunk through all layers; the last layer stops at what it leaves unless the output is wanted.
    fn prefill_chunk(&self, cache: &mut Cache<D>, ids: &[u32], want_output: bool) -> Option<Arc<D::Buffer>> {
        let (t, len) = (ids.len(), cache.len());
        assert!(len + t <= cache.capacity(), "{len} + {t} tokens in a cache of {}", cache.capacity());
        let activations = match cache.dtype() {
            Dtype::F32 => Activations::Exact,
            _ => Activations::Rounded,
        };
        let mut x = Arc::new(self.embed(&self.device.ids(ids), t));
        let last = self.layers.len() - 1;
        for layer in 0..self.layers.len() {
            let left = if layer == last && !want_output {
                self.leave(layer, &x, cache.context(layer), t, activations)
            } else {
                let (next, saved) = self.layer(layer, x, cache.context(layer), t, activations, true);
                x = next;
                saved.mixed.left()
            };
            cache.take(layer, left, t);
        }
        cache.extend(ids);
        cache.count_run(t);
        want_output.then_some(x)
    }

    /// What a layer leaves of t tokens, without its output.
    fn leave(&self, layer: usize, x: &D::Buffer, context: Context<D>, t: usize, activations: Activations) -> Left<D> {
        let l = &self.layers[layer];
        let normed = self.norm(x, l.input_norm, t);
        match (&l.mixer, context) {
            (Mixer::Attention(l), Context::Keys(past)) => {
                let (k, v) = self.project_keys(l, &normed, past.len, t, activations);
                Left::Keys(k, v)
            }
            (Mixer::DeltaNet(l), Context::State { before, state }) => {
                let (inputs, next) = self.advance(l, &normed, State { before, state }, t, activations);
                Left::State { inputs, next }
            }
            _ => unreachable!("a layer sees what it has left"),
        }
    }

    /// Embedding rows of t ids, (t,H).
    pub(crate) fn embed(&self, ids: &D::Ids, t: usize) -> D::Buffer {
        let mut x = self.device.uninit(t * self.config.decoder.hidden);
        self.device.embed(&mut x, &self.weights[self.embed], ids);
        x
    }

    /// Final norm and head: normed (t,H) and logits (t,V).
    pub(crate) fn logits(&self, x: &D::Buffer, t: usize) -> (D::Buffer, D::Buffer) {
        let normed = self.norm(x, self.norm, t);
        let logits = self.linear(&normed, Linear { weight: self.head, bias: None }, t, self.windows);
        (normed, logits)
    }

    /// The norms' constants, but for that inside a Gated DeltaNet.
    pub(crate) fn norms(&self) -> Norm {
        Norm { eps: self.config.rms_norm_eps, offset: self.config.norm_offset }
    }

    pub(crate) fn norm(&self, x: &D::Buffer, weight: TensorId, rows: usize) -> D::Buffer {
        let w = &self.weights[weight];
        let mut y = self.device.uninit(rows * self.device.shape(w).1);
        self.device.rms_norm(&mut y, x, w, self.norms(), rows);
        y
    }

    /// The outputs of layers that share their input.
    pub(crate) fn linears<const N: usize>(
        &self,
        x: &D::Buffer,
        layers: [Linear; N],
        t: usize,
        activations: Activations,
    ) -> [D::Buffer; N] {
        let weights = layers.map(|l| (&self.weights[l.weight], l.bias.map(|b| &self.weights[b])));
        let mut y = weights.map(|(w, _)| self.device.uninit(t * self.device.shape(w).0));
        let outputs = y.iter_mut().zip(weights).map(|(y, (w, bias))| LinearOutput { y, w, bias });
        let mut outputs: Vec<_> = outputs.collect();
        match activations {
            Activations::Rounded => self.device.linear_group_rounded(&mut outputs, x, t),
            Activations::Exact => self.device.linear_group(&mut outputs, x, t),
        }
        y
    }

    pub(crate) fn linear(&self, x: &D::Buffer, layer: Linear, t: usize, activations: Activations) -> D::Buffer {
        let [y] = self.linears(x, [layer], t, activations);
        y
    }

    /// One layer over t tokens that follow `context`; a recurrent one makes the state after them if it is wanted.
    pub(crate) fn layer(
        &self,
        layer: usize,
        x: Arc<D::Buffer>,
        context: Context<D>,
        t: usize,
        activations: Activations,
        want_state: bool,
    ) -> (Arc<D::Buffer>, Saved<D>) {
        let (l, hidden) = (&self.layers[layer], self.config.decoder.hidden);
        let normed = Arc::new(self.norm(&x, l.input_norm, t));
        let (mut mid, mixed) = match (&l.mixer, context) {
            (Mixer::Attention(l), Context::Keys(past)) => {
                let (y, saved) = self.attend(l, &normed, past, t, activations);
                (y, Mixed::Attention(saved))
            }
            (Mixer::DeltaNet(l), Context::State { before, state }) => {
                let (y, saved, next) = self.recur(l, &normed, State { before, state }, t, activations, want_state);
                (y, Mixed::DeltaNet(saved, next))
            }
            _ => unreachable!("a layer sees what it has left"),
        };
        self.device.add(&mut mid, &x, t * hidden);
        let normed_mid = self.norm(&mid, l.post_norm, t);
        let (mut y, fed) = match &l.feed {
            Feed::Mlp(mlp) => {
                let (y, saved) = self.mlp(mlp, &normed_mid, t, activations);
                (y, Fed::Mlp(saved))
            }
            Feed::Experts(l) => {
                let (y, saved) = self.experts(l, &normed_mid, t, activations);
                (y, Fed::Experts(saved))
            }
        };
        self.device.add(&mut y, &mid, t * hidden);
        (Arc::new(y), Saved { x, normed, mixed, mid, normed_mid: Arc::new(normed_mid), fed })
    }
}

impl<D: Device> Mixed<D> {
    /// What the cache keeps of it.
    pub fn left(self) -> Left<D> {
        match self {
            Mixed::Attention(Attended { k, v, .. }) => Left::Keys(k, v),
            Mixed::DeltaNet(Recurred { qkv, .. }, next) => {
                Left::State { inputs: qkv, next: next.expect("it was asked for") }
            }
        }
    }
}

impl Layer {
    fn new(config: &Config, ids: &HashMap<&str, TensorId>, i: usize) -> Layer {
        let module = config.decoder.module();
        let id = |name: &str| ids.get(format!("{module}.layers.{i}.{name}").as_str()).copied();
        let linear = |name: &str| Linear {
            weight: id(&format!("{name}.weight")).expect("every layer has its matrices"),
            bias: id(&format!("{name}.bias")),
        };
        let norm = |name: &str| id(&format!("{name}.weight")).expect("every layer has its norms");
        let mixer = match config.decoder.is_delta_net(i) {
            true => Mixer::DeltaNet(DeltaLayer::new(config, linear, id)),
            false => Mixer::Attention(AttentionLayer::new(config, i, linear, id)),
        };
        let feed = match config.decoder.experts_of(i) {
            Some(_) => Feed::Experts(ExpertsLayer::new(config, i, linear)),
            None => Feed::Mlp(Mlp::new("mlp", linear)),
        };
        Layer { input_norm: norm("input_layernorm"), mixer, post_norm: norm("post_attention_layernorm"), feed }
    }

    /// Its tensors.
    pub fn tensors(&self) -> Vec<TensorId> {
        let of = |linears: &[Linear]| -> Vec<TensorId> {
            linears.iter().flat_map(|l| [Some(l.weight), l.bias]).flatten().collect()
        };
        let mut tensors = vec![self.input_norm, self.post_norm];
        match &self.feed {
            Feed::Mlp(mlp) => tensors.extend(of(&mlp.linears())),
            Feed::Experts(l) => {
                tensors.extend(of(&l.linears()));
                tensors.extend(l.shared.map(|shared| shared.gate));
            }
        }
        match &self.mixer {
            Mixer::Attention(l) => {
                tensors.extend(of(&l.linears()));
                tensors.extend(l.norms());
            }
            Mixer::DeltaNet(l) => {
                tensors.extend(of(&l.linears()));
                tensors.extend(l.vectors());
            }
        }
        tensors
    }
}
