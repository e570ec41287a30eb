//! Layers and their forward pass, the cache of the frozen context, and next-token logits.
//!
//! t rows of tokens · H hidden · I intermediate · h heads, g kv_heads, d head_dim · V vocab
//! x (t,H) residual stream · q (t,h·d) · k, v (t,g·d) · attention out (t,h·d) · gate, up, act (t,I)

use crate::config::Config;
use crate::prefixes::{BLOCK, PrefixLimits, Prefixes, Shape};
use crate::recorded::Recorded;
use compute::{Attention, Device, Dtype, LinearOutput, Past, TensorId};
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
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub q_norm: Option<TensorId>,
    pub k_norm: Option<TensorId>,
    pub post_norm: TensorId,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
    pub attention: Attention,
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
    /// (positions, head_dim)
    pub(crate) rope: D::Buffer,
    positions: usize,
    /// How windows take them.
    pub(crate) windows: Activations,
}

/// Keys and values of a context, per layer, for up to `capacity` tokens.
///
/// It knows which tokens it holds, so that a context which begins like the last one is not run again; beside it are
/// those of earlier contexts, as far as [`Cache::keep_prefixes`] allows. Both are right only as long as the weights are
/// the same: [`Cache::weights_moved`] says that they are not.
pub struct Cache<D: Device> {
    device: Arc<D>,
    layers: Vec<(D::Stored, D::Stored)>,
    ids: Vec<u32>,
    /// Number of tokens, where the device reads it: one element.
    pub(crate) len: D::Ids,
    capacity: usize,
    prefixes: Prefixes<D>,
    /// The oldest weights that any of the tokens rests on, as `prefixes` counts them.
    version: u64,
    tokens_run: u64,
    /// Windows over these keys and values that were recorded.
    pub(crate) recorded: Vec<Recorded<D>>,
}

/// What backward needs of one layer's forward pass.
pub(crate) struct Saved<D: Device> {
    pub x: Arc<D::Buffer>,
    pub normed: Arc<D::Buffer>,
    /// Queries and keys before their norm; absent without one.
    pub raw: Option<(D::Buffer, D::Buffer)>,
    pub q: D::Buffer,
    pub k: D::Buffer,
    pub v: D::Buffer,
    pub out: Arc<D::Buffer>,
    pub lse: D::Buffer,
    pub mid: D::Buffer,
    pub normed_mid: Arc<D::Buffer>,
    pub gate: D::Buffer,
    pub up: D::Buffer,
    pub act: Arc<D::Buffer>,
}

impl<D: Device> Cache<D> {
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
    /// Tokens that were run to fill it, ever.
    pub fn tokens_run(&self) -> u64 {
        self.tokens_run
    }
    /// Tokens of earlier contexts that are kept beside it.
    pub fn tokens_kept(&self) -> usize {
        self.prefixes.tokens()
    }
    /// From now on keeps what contexts begin with, within these limits.
    pub fn keep_prefixes(&mut self, limits: PrefixLimits) {
        self.prefixes.limit(limits);
    }
    /// Forgets the context, and of the earlier ones what rests on weights that are too old now.
    pub fn weights_moved(&mut self) {
        self.truncate(0);
        self.prefixes.weights_moved();
    }
    /// Forgets everything.
    pub fn forget(&mut self) {
        self.truncate(0);
        self.prefixes.forget();
    }
    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.tell_len();
    }
    fn extend(&mut self, ids: &[u32]) {
        if self.ids.is_empty() {
            self.version = self.prefixes.updates();
        }
        self.ids.extend_from_slice(ids);
        self.tell_len();
    }
    fn tell_len(&mut self) {
        self.device.write_ids(&mut self.len, &[self.ids.len() as u32]);
    }
    /// Forgets what does not begin `context`, and takes over what earlier contexts have of the rest.
    pub(crate) fn recall(&mut self, context: &[u32]) {
        let common = self.ids.iter().zip(context).take_while(|(a, b)| a == b).count();
        self.truncate(common);
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
    pub(crate) fn past(&self, layer: usize) -> Past<'_, D> {
        let (keys, values) = &self.layers[layer];
        Past { keys, values, len: &self.len }
    }
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
        let embed = ids["model.embed_tokens.weight"];
        let (norm, head) = (ids["model.norm.weight"], ids.get("lm_head.weight").copied().unwrap_or(embed));
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
        let weights = self.device.dtype(&self.weights[self.layers[0].k.weight]);
        let narrow = weights != Dtype::F32 && self.device.stores(Dtype::BF16);
        self.cache_in(if narrow { Dtype::BF16 } else { Dtype::F32 }, capacity)
    }

    /// An empty cache for `capacity` tokens with keys and values of a type that the device stores. It decides how a context
    /// is run as well: with f32 as exactly as a window.
    pub fn cache_in(&self, dtype: Dtype, capacity: usize) -> Cache<D> {
        let device = self.device.clone();
        let shape = Shape {
            layers: self.layers.len(),
            row: self.config.decoder.kv_heads * self.config.decoder.head_dim,
            dtype,
        };
        let stored = || device.stored(dtype, capacity * shape.row);
        let layers = self.layers.iter().map(|_| (stored(), stored())).collect();
        let (len, prefixes) = (device.ids(&[0]), Prefixes::new(device.clone(), shape));
        let (ids, recorded) = (Vec::new(), Vec::new());
        Cache { device, layers, ids, len, capacity, prefixes, version: 0, tokens_run: 0, recorded }
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

    /// One chunk through all layers; the last layer stops at its keys unless the output is wanted.
    fn prefill_chunk(&self, cache: &mut Cache<D>, ids: &[u32], want_output: bool) -> Option<Arc<D::Buffer>> {
        let (t, len) = (ids.len(), cache.len());
        assert!(len + t <= cache.capacity, "{len} + {t} tokens in a cache of {}", cache.capacity);
        let row = self.config.decoder.kv_heads * self.config.decoder.head_dim;
        let activations = match self.device.stored_dtype(&cache.layers[0].0) {
            Dtype::F32 => Activations::Exact,
            _ => Activations::Rounded,
        };
        let mut x = Arc::new(self.embed(&self.device.ids(ids), t));
        let last = self.layers.len() - 1;
        for layer in 0..self.layers.len() {
            let (k, v) = if layer == last && !want_output {
                self.project_keys(layer, &x, &cache.len, t, activations)
            } else {
                let (next, saved) = self.layer(layer, x, cache.past(layer), t, activations);
                x = next;
                (saved.k, saved.v)
            };
            let (keys, values) = &mut cache.layers[layer];
            self.device.store(keys, len * row, &k, t * row);
            self.device.store(values, len * row, &v, t * row);
        }
        cache.extend(ids);
        cache.tokens_run += t as u64;
        want_output.then_some(x)
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

    fn norm(&self, x: &D::Buffer, weight: TensorId, rows: usize) -> D::Buffer {
        let w = &self.weights[weight];
        let mut y = self.device.uninit(rows * self.device.shape(w).1);
        self.device.rms_norm(&mut y, x, w, self.config.rms_norm_eps, rows);
        y
    }

    /// The outputs of layers that share their input.
    fn linears<const N: usize>(
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

    fn linear(&self, x: &D::Buffer, layer: Linear, t: usize, activations: Activations) -> D::Buffer {
        let [y] = self.linears(x, [layer], t, activations);
        y
    }

    /// Head norm, if there is one, and rope of queries or keys (t,heads·d) at position..position + t.
    fn rotated(
        &self,
        raw: &D::Buffer,
        norm: Option<TensorId>,
        position: &D::Ids,
        t: usize,
        heads: usize,
        head_dim: usize,
    ) -> D::Buffer {
        let mut y = match norm {
            Some(norm) => self.norm(raw, norm, t * heads),
            None => {
                let mut y = self.device.uninit(t * heads * head_dim);
                self.device.copy(&mut y, 0, raw, 0, t * heads * head_dim);
                y
            }
        };
        self.device.rope(&mut y, &self.rope, position, t, heads, head_dim, false);
        y
    }

    /// Norm, projections, head norms and rope of one layer.
    fn project(
        &self,
        layer: usize,
        x: &D::Buffer,
        position: &D::Ids,
        t: usize,
        activations: Activations,
    ) -> Projected<D> {
        let l = &self.layers[layer];
        let Attention { heads, kv_heads, head_dim, .. } = l.attention;
        let normed = Arc::new(self.norm(x, l.input_norm, t));
        let [raw_q, raw_k, v] = self.linears(&normed, [l.q, l.k, l.v], t, activations);
        let q = self.rotated(&raw_q, l.q_norm, position, t, heads, head_dim);
        let k = self.rotated(&raw_k, l.k_norm, position, t, kv_heads, head_dim);
        let raw = l.q_norm.is_some().then_some((raw_q, raw_k));
        Projected { normed, raw, q, k, v }
    }

    /// Keys and values alone.
    fn project_keys(
        &self,
        layer: usize,
        x: &D::Buffer,
        position: &D::Ids,
        t: usize,
        activations: Activations,
    ) -> (D::Buffer, D::Buffer) {
        let l = &self.layers[layer];
        let normed = self.norm(x, l.input_norm, t);
        let [raw_k, v] = self.linears(&normed, [l.k, l.v], t, activations);
        (self.rotated(&raw_k, l.k_norm, position, t, l.attention.kv_heads, l.attention.head_dim), v)
    }

    /// One layer over t tokens that follow `past`.
    pub(crate) fn layer(
        &self,
        layer: usize,
        x: Arc<D::Buffer>,
        past: Past<D>,
        t: usize,
        activations: Activations,
    ) -> (Arc<D::Buffer>, Saved<D>) {
        let (l, hidden) = (&self.layers[layer], self.config.decoder.hidden);
        let Projected { normed, raw, q, k, v } = self.project(layer, &x, past.len, t, activations);
        let mut out = self.device.uninit(t * l.attention.heads * l.attention.head_dim);
        let mut lse = self.device.uninit(t * l.attention.heads);
        self.device.attention(&mut out, &mut lse, &q, &k, &v, past, t, &l.attention);
        let mut mid = self.linear(&out, l.o, t, activations);
        self.device.add(&mut mid, &x, t * hidden);
        let normed_mid = self.norm(&mid, l.post_norm, t);
        let [gate, up] = self.linears(&normed_mid, [l.gate, l.up], t, activations);
        let intermediate = t * self.config.decoder.intermediate;
        let mut act = self.device.uninit(intermediate);
        self.device.swiglu(&mut act, &gate, &up, intermediate);
        let mut y = self.linear(&act, l.down, t, activations);
        self.device.add(&mut y, &mid, t * hidden);
        let (out, normed_mid, act) = (Arc::new(out), Arc::new(normed_mid), Arc::new(act));
        (Arc::new(y), Saved { x, normed, raw, q, k, v, out, lse, mid, normed_mid, gate, up, act })
    }
}

struct Projected<D: Device> {
    normed: Arc<D::Buffer>,
    raw: Option<(D::Buffer, D::Buffer)>,
    q: D::Buffer,
    k: D::Buffer,
    v: D::Buffer,
}

impl Layer {
    fn new(config: &Config, ids: &HashMap<&str, TensorId>, i: usize) -> Layer {
        let d = &config.decoder;
        let id = |name: &str| ids.get(format!("model.layers.{i}.{name}").as_str()).copied();
        let linear = |name: &str| Linear {
            weight: id(&format!("{name}.weight")).expect("every layer has its matrices"),
            bias: id(&format!("{name}.bias")),
        };
        let norm = |name: &str| id(&format!("{name}.weight"));
        let attention = Attention {
            heads: d.heads,
            kv_heads: d.kv_heads,
            head_dim: d.head_dim,
            window: config.windows[i],
            scale: 1.0 / (d.head_dim as f32).sqrt(),
        };
        Layer {
            input_norm: norm("input_layernorm").expect("every layer has its norms"),
            q: linear("self_attn.q_proj"),
            k: linear("self_attn.k_proj"),
            v: linear("self_attn.v_proj"),
            o: linear("self_attn.o_proj"),
            q_norm: norm("self_attn.q_norm"),
            k_norm: norm("self_attn.k_norm"),
            post_norm: norm("post_attention_layernorm").expect("every layer has its norms"),
            gate: linear("mlp.gate_proj"),
            up: linear("mlp.up_proj"),
            down: linear("mlp.down_proj"),
            attention,
        }
    }
}
