//! The independent reference: one layer, or the head, by plain formulas under candle's autograd in f64 (or f32
//! where that would not fit).
//!
//! Tests and `apollod doctor` run the same random inputs through this and through the kernels, on any
//! device and on an operator's own weights. candle's fused `rms_norm`, `softmax_last_dim` and `rope`
//! have no backward and are not used.

use crate::attention::AttentionLayer;
use crate::cache::Cache;
use crate::delta_net::DeltaLayer;
use crate::experts::ExpertsLayer;
use crate::forward::{Activations, Feed, Linear, Mixer, Model};
use crate::mlp::Mlp;
use candle_core::{D as Dim, DType, Device as CandleDevice, Result, Tensor, Var};
use compute::{Device, Dtype, Factors, Sink, TensorId};
use std::collections::HashMap;
use std::sync::Arc;

/// Relative difference of one result: ‖kernel - reference‖ / ‖reference‖.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// What was compared: `output`, `input gradient`, or a tensor's name for its gradient.
    pub what: String,
    /// ‖a - b‖ / ‖b‖; where the reference is zero, ‖a‖.
    pub relative: f64,
}

/// Inputs of one comparison.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Tokens of frozen context.
    pub context: usize,
    /// Tokens of the window.
    pub window: usize,
    /// Of the random inputs.
    pub seed: u64,
    /// Of the reference.
    pub precision: Precision,
}

/// What the reference computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 8 bytes a value: differences are the kernels' own.
    F64,
    /// 4 bytes a value, for layers that would not fit.
    F32,
}

impl Precision {
    fn dtype(self) -> DType {
        match self {
            Precision::F64 => DType::F64,
            Precision::F32 => DType::F32,
        }
    }
}

/// One layer: output, gradient of its input, and gradient of each of its tensors.
pub fn compare_layer<D: Device>(model: &Model<D>, layer: usize, probe: Probe) -> Result<Vec<Difference>> {
    let (hidden, t) = (model.config().decoder.hidden, probe.window);
    let context = noise(probe.seed, 0, probe.context * hidden);
    let x = noise(probe.seed, 1, t * hidden);
    let dy = noise(probe.seed, 2, t * hidden);

    let device = &model.device;
    let cache = context_of(model, layer, &context, probe.context);
    let frozen = cache.context(layer);
    let (y, saved) = model.layer(layer, Arc::new(upload(&**device, &x)), frozen, t, Activations::Exact, false);
    let mut sink = LayerSink { device: device.clone(), shapes: model.shapes(), gradients: HashMap::new() };
    let dx = model.layer_backward(layer, &saved, Arc::new(upload(&**device, &dy)), frozen, t, &mut sink);

    let reference = Reference::new(model, model.layers[layer].tensors(), probe.precision)?;
    let start = reference.start(layer)?;
    let (_, left) = reference.layer(layer, &matrix(&context, probe.context, probe.precision)?, &start, 0)?;
    let x_var = Var::from_tensor(&matrix(&x, t, probe.precision)?)?;
    let (output, _) = reference.layer(layer, x_var.as_tensor(), &left.detach(), probe.context)?;
    let gradients = (&output * matrix(&dy, t, probe.precision)?)?.sum_all()?.backward()?;

    let mut differences = vec![difference("output", &download(&**device, &y), &host(&output)?, 0.0)];
    let reference_dx = host(gradients.get(&x_var).expect("the output depends on the input"))?;
    // A router whose shares depend on nothing has a gradient of rounding alone: it is measured beside that of the input.
    let router = match &model.layers[layer].feed {
        Feed::Experts(l) => Some(l.router.weight),
        Feed::Mlp(_) => None,
    };
    let of_input = norm(reference_dx.iter().copied());
    differences.push(difference("input gradient", &download(&**device, &dx), &reference_dx, 0.0));
    for (tensor, var) in &reference.vars {
        // None is that of an expert which no token chose.
        let chosen = sink.gradients.get(tensor).map(|gradient| download(&**device, gradient));
        let ours = chosen.or_else(|| model.config().decoder.experts_of(layer).map(|_| vec![0.0; var.elem_count()]));
        let ours = ours.expect("every tensor of the layer got a gradient");
        let theirs = gradients.get(var).expect("the output depends on every tensor of the layer");
        let least = if router == Some(*tensor) { of_input } else { 0.0 };
        differences.push(difference(&model.tensors()[*tensor].name, &ours, &host(theirs)?, least));
    }
    Ok(differences)
}

/// Final norm, head and cross entropy of random hidden states.
pub fn compare_head<D: Device>(model: &Model<D>, probe: Probe) -> Result<Vec<Difference>> {
    let (hidden, vocab, t) = (model.config().decoder.hidden, model.config().decoder.vocab, probe.window);
    let x = noise(probe.seed, 3, t * hidden);
    let targets: Vec<u32> = (0..t).map(|i| ((i * 7919 + probe.seed as usize) % vocab) as u32).collect();
    let scale = 1.0 / t as f32;

    let device = &model.device;
    let x_device = upload(&**device, &x);
    let (normed, mut logits) = model.logits(&x_device, t);
    let mut losses = device.zeros(t);
    let weight = upload(&**device, &[scale]);
    device.cross_entropy(&mut losses, &mut logits, &device.ids(&targets), vocab, &weight);
    let mut sink = LayerSink { device: device.clone(), shapes: model.shapes(), gradients: HashMap::new() };
    let dx = model.head_backward(&x_device, &Arc::new(normed), &Arc::new(logits), t, &mut sink);

    let reference = Reference::new(model, vec![model.norm, model.head], probe.precision)?;
    let x_var = Var::from_tensor(&matrix(&x, t, probe.precision)?)?;
    let normed = reference.norm(x_var.as_tensor(), model.norm)?;
    let logits = normed.matmul(&reference.get(model.head).t()?)?;
    let log_sum = log_sum_exp(&logits)?;
    let chosen = logits.gather(&Tensor::from_vec(targets, (t, 1), &CandleDevice::Cpu)?, 1)?.squeeze(1)?;
    let each = (log_sum - chosen)?;
    let gradients = (each.sum_all()? * scale as f64)?.backward()?;

    let mut differences = vec![difference("loss", &download(&**device, &losses), &host(&each)?, 0.0)];
    let reference_dx = gradients.get(&x_var).expect("the loss depends on the input");
    differences.push(difference("input gradient", &download(&**device, &dx), &host(reference_dx)?, 0.0));
    for (tensor, var) in &reference.vars {
        let ours = download(&**device, &sink.gradients[tensor]);
        let theirs = gradients.get(var).expect("the loss depends on norm and head");
        differences.push(difference(&model.tensors()[*tensor].name, &ours, &host(theirs)?, 0.0));
    }
    Ok(differences)
}

/// Forms the gradients of the few tensors that a comparison touches.
struct LayerSink<D: Device> {
    device: Arc<D>,
    shapes: Vec<(usize, usize)>,
    gradients: HashMap<TensorId, D::Buffer>,
}

impl<D: Device> LayerSink<D> {
    fn collect(&mut self, tensor: TensorId, add: impl FnOnce(&D, &mut D::Buffer, (usize, usize))) {
        let (m, n) = self.shapes[tensor];
        let g = self.gradients.entry(tensor).or_insert_with(|| self.device.zeros(m * n));
        add(&self.device, g, (m, n));
    }
}

impl<D: Device> Sink<D> for LayerSink<D> {
    fn linear(&mut self, tensor: TensorId, x: &Arc<D::Buffer>, dy: &Arc<D::Buffer>, t: usize) {
        self.collect(tensor, |device, g, (m, n)| device.outer_accumulate(g, &Factors { x, dy, t, m, n }));
    }
    fn rows(&mut self, _: TensorId, _: &[u32], _: &Arc<D::Buffer>) {
        unreachable!("neither a layer nor the head looks up rows");
    }
    fn dense(&mut self, tensor: TensorId, g: &Arc<D::Buffer>) {
        self.collect(tensor, |device, sum, (m, n)| device.add(sum, g, m * n));
    }
    fn wants(&self, _: TensorId) -> bool {
        true
    }
}

/// A cache in which one layer has seen a context with these inputs, by the kernels.
fn context_of<D: Device>(model: &Model<D>, layer: usize, x: &[f32], len: usize) -> Cache<D> {
    let mut cache = model.cache_in(Dtype::F32, len.max(1));
    if len > 0 {
        let x = Arc::new(upload(&*model.device, x));
        let (_, saved) = model.layer(layer, x, cache.context(layer), len, Activations::Exact, true);
        cache.take(layer, saved.mixed.left(), len);
        cache.extend(&vec![0; len]);
    }
    cache
}

/// What a layer of the reference leaves of the tokens that it has run.
enum Left {
    /// Keys and values (t, kv_heads, d).
    Keys(Tensor, Tensor),
    /// Inputs of the convolution (width - 1, channels), and the state (value_heads, key_dim, value_dim).
    State(Tensor, Tensor),
}

impl Left {
    fn detach(&self) -> Left {
        match self {
            Left::Keys(a, b) => Left::Keys(a.detach(), b.detach()),
            Left::State(a, b) => Left::State(a.detach(), b.detach()),
        }
    }
}

/// The tensors in question as candle variables in f64.
struct Reference<'a, D: Device> {
    model: &'a Model<D>,
    vars: HashMap<TensorId, Var>,
    dtype: DType,
    eps: f64,
}

impl<'a, D: Device> Reference<'a, D> {
    fn new(model: &'a Model<D>, tensors: Vec<TensorId>, precision: Precision) -> Result<Reference<'a, D>> {
        let mut vars = HashMap::new();
        for id in tensors {
            let values = model.device.weight_values(&model.weights()[id]);
            let shape = model.tensors()[id].shape.clone();
            let tensor = Tensor::from_vec(values, shape, &CandleDevice::Cpu)?.to_dtype(precision.dtype())?;
            vars.insert(id, Var::from_tensor(&tensor)?);
        }
        Ok(Reference { model, vars, dtype: precision.dtype(), eps: model.config().rms_norm_eps as f64 })
    }

    fn get(&self, id: TensorId) -> &Tensor {
        self.vars[&id].as_tensor()
    }

    fn linear(&self, x: &Tensor, linear: Linear) -> Result<Tensor> {
        let y = x.matmul(&self.get(linear.weight).t()?)?;
        match linear.bias {
            Some(bias) => y.broadcast_add(self.get(bias)),
            None => Ok(y),
        }
    }

    /// A norm whose gain has the model's offset.
    fn norm(&self, x: &Tensor, norm: TensorId) -> Result<Tensor> {
        rms_norm(x, &(self.get(norm) + self.model.config().norm_offset as f64)?, self.eps)
    }

    /// (t, heads, d) after head norm and rope of the first elements.
    fn rotated(&self, x: Tensor, norm: Option<TensorId>, position: usize) -> Result<Tensor> {
        let (t, _, d) = x.dims3()?;
        let x = match norm {
            Some(norm) => self.norm(&x, norm)?,
            None => x,
        };
        let rope = &self.model.config().rope;
        let rotated = 2 * rope.frequencies.len();
        let table = Tensor::from_vec(rope.table(position, t), (t, 1, rotated), &CandleDevice::Cpu)?;
        let table = table.to_dtype(self.dtype)?;
        let half = |x: &Tensor, first: usize| x.narrow(2, first, rotated / 2);
        let (cos, sin, a, b) = (half(&table, 0)?, half(&table, rotated / 2)?, half(&x, 0)?, half(&x, rotated / 2)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        match d - rotated {
            0 => Tensor::cat(&[first, second], 2),
            rest => Tensor::cat(&[first, second, x.narrow(2, rotated, rest)?], 2),
        }
    }

    /// What a layer has left before the first token.
    fn start(&self, layer: usize) -> Result<Left> {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, self.dtype, &CandleDevice::Cpu);
        match &self.model.layers[layer].mixer {
            Mixer::Attention(l) => {
                let none = zeros(&[0, l.shape.kv_heads, l.shape.head_dim])?;
                Ok(Left::Keys(none.clone(), none))
            }
            Mixer::DeltaNet(l) => {
                let state = zeros(&[l.rule.value_heads, l.rule.key_dim, l.rule.value_dim])?;
                Ok(Left::State(zeros(&[l.convolution.width - 1, l.convolution.channels])?, state))
            }
        }
    }

    /// The output of tokens at `position`.. and what the layer leaves then.
    fn layer(&self, layer: usize, x: &Tensor, left: &Left, position: usize) -> Result<(Tensor, Left)> {
        let l = &self.model.layers[layer];
        if x.dim(0)? == 0 {
            return Ok((x.clone(), left.detach()));
        }
        let normed = self.norm(x, l.input_norm)?;
        let (mixed, left) = match (&l.mixer, left) {
            (Mixer::Attention(l), Left::Keys(keys, values)) => self.attend(l, &normed, keys, values, position)?,
            (Mixer::DeltaNet(l), Left::State(before, state)) => self.recur(l, &normed, before, state)?,
            _ => unreachable!("a layer sees what it has left"),
        };
        let mid = (x + mixed)?;
        let normed = self.norm(&mid, l.post_norm)?;
        let fed = match &l.feed {
            Feed::Mlp(mlp) => self.mlp(mlp, &normed)?,
            Feed::Experts(l) => self.experts(l, &normed)?,
        };
        Ok(((&mid + fed)?, left))
    }

    fn mlp(&self, l: &Mlp, x: &Tensor) -> Result<Tensor> {
        let (gate, up) = (self.linear(x, l.gate)?, self.linear(x, l.up)?);
        self.linear(&(silu(&gate)? * up)?, l.down)
    }

    /// Every expert on every token; shares are 0 where it is not chosen.
    fn experts(&self, l: &ExpertsLayer, x: &Tensor) -> Result<Tensor> {
        let experts = l.experts.len();
        let p = softmax(&self.linear(x, l.router)?)?;
        let shares = (&p * chosen(&p, l.per_token)?)?;
        let shares = match l.normalised {
            true => shares.broadcast_div(&shares.sum_keepdim(Dim::Minus1)?)?,
            false => shares,
        };
        let one = |e: usize| self.mlp(&l.experts[e], x)?.broadcast_mul(&shares.narrow(1, e, 1)?);
        let mut y = one(0)?;
        for e in 1..experts {
            y = (y + one(e)?)?;
        }
        if let Some(shared) = &l.shared {
            let gate = self.linear(x, Linear { weight: shared.gate, bias: None })?;
            y = (y + self.mlp(&shared.mlp, x)?.broadcast_mul(&sigmoid(&gate)?)?)?;
        }
        Ok(y)
    }

    fn attend(
        &self,
        l: &AttentionLayer,
        x: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        position: usize,
    ) -> Result<(Tensor, Left)> {
        let (t, shape) = (x.dim(0)?, &l.shape);
        let (h, g, d) = (shape.heads, shape.kv_heads, shape.head_dim);
        let q = self.linear(x, l.q)?;
        let (q, gate) = match l.gated {
            false => (q.reshape((t, h, d))?, None),
            true => {
                let both = q.reshape((t, h, 2 * d))?;
                (both.narrow(2, 0, d)?, Some(both.narrow(2, d, d)?.contiguous()?.reshape((t, h * d))?))
            }
        };
        let q = self.rotated(q, l.q_norm, position)?;
        let own_keys = self.rotated(self.linear(x, l.k)?.reshape((t, g, d))?, l.k_norm, position)?;
        let own_values = self.linear(x, l.v)?.reshape((t, g, d))?;
        let (keys, values) = match position {
            0 => (own_keys, own_values),
            _ => (Tensor::cat(&[keys, &own_keys], 0)?, Tensor::cat(&[values, &own_values], 0)?),
        };
        let total = keys.dim(0)?;
        // (heads, total, d): every kv head repeated for its group of query heads.
        let spread = |kv: &Tensor| {
            let kv = kv.transpose(0, 1)?.unsqueeze(1)?;
            kv.expand((g, h / g, total, d))?.contiguous()?.reshape((h, total, d))
        };
        let scores = q.transpose(0, 1)?.contiguous()?.matmul(&spread(&keys)?.transpose(1, 2)?.contiguous()?)?;
        let scores = (scores * shape.scale as f64)?
            .broadcast_add(&mask(t, total, position, shape.window)?.to_dtype(self.dtype)?)?;
        let out = softmax(&scores)?.matmul(&spread(&values)?)?;
        let out = out.transpose(0, 1)?.contiguous()?.reshape((t, h * d))?;
        let out = match gate {
            Some(gate) => (out * sigmoid(&gate)?)?,
            None => out,
        };
        Ok((self.linear(&out, l.o)?, Left::Keys(keys, values)))
    }

    /// The gated delta rule as its definition says, token by token (arXiv:2412.06464, equation 10).
    fn recur(&self, l: &DeltaLayer, x: &Tensor, before: &Tensor, state: &Tensor) -> Result<(Tensor, Left)> {
        let (t, rule, width) = (x.dim(0)?, &l.rule, l.convolution.width);
        let (kh, vh, kd, vd) = (rule.key_heads, rule.value_heads, rule.key_dim, rule.value_dim);
        let all = Tensor::cat(&[before, &self.linear(x, l.qkv)?], 0)?;
        let weights = self.get(l.conv).reshape((l.convolution.channels, width))?;
        let mut mixed = Tensor::zeros((t, l.convolution.channels), self.dtype, &CandleDevice::Cpu)?;
        for j in 0..width {
            mixed = (mixed + all.narrow(0, j, t)?.broadcast_mul(&weights.narrow(1, j, 1)?.t()?)?)?;
        }
        let mixed = silu(&mixed)?;
        // (t, value_heads, dim), each key head repeated for its value heads.
        let spread = |first: usize| {
            let heads = mixed.narrow(1, first, kh * kd)?.reshape((t, kh, 1, kd))?;
            let length = (heads.sqr()?.sum_keepdim(3)? + 1e-6)?.sqrt()?;
            heads.broadcast_div(&length)?.expand((t, kh, vh / kh, kd))?.contiguous()?.reshape((t, vh, kd))
        };
        let (q, k) = ((spread(0)? / (kd as f64).sqrt())?, spread(kh * kd)?);
        let v = mixed.narrow(1, 2 * kh * kd, vh * vd)?.reshape((t, vh, vd))?;
        let rate = self.get(l.a_log).exp()?;
        let softplus = (self.linear(x, l.a)?.broadcast_add(self.get(l.dt_bias))?.exp()? + 1.0)?.log()?;
        let decay = softplus.broadcast_mul(&rate)?.neg()?.exp()?;
        let beta = sigmoid(&self.linear(x, l.b)?)?;
        let (mut state, mut outs) = (state.clone(), Vec::new());
        for i in 0..t {
            let of = |x: &Tensor, dim: usize| x.get(i)?.reshape((vh, 1, dim));
            let (q, k, v) = (of(&q, kd)?, of(&k, kd)?, of(&v, vd)?);
            state = state.broadcast_mul(&decay.get(i)?.reshape((vh, 1, 1))?)?;
            let delta = (v - k.matmul(&state)?)?.broadcast_mul(&beta.get(i)?.reshape((vh, 1, 1))?)?;
            state = (state + k.transpose(1, 2)?.contiguous()?.matmul(&delta)?)?;
            outs.push(q.matmul(&state)?.reshape((1, vh, vd))?);
        }
        let out = rms_norm(&Tensor::cat(&outs, 0)?, self.get(l.norm), self.eps)?.reshape((t, vh * vd))?;
        let gated = (out * silu(&self.linear(x, l.z)?)?)?;
        let kept = all.narrow(0, all.dim(0)? - (width - 1), width - 1)?;
        Ok((self.linear(&gated, l.out)?, Left::State(kept, state)))
    }
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

fn silu(x: &Tensor) -> Result<Tensor> {
    x * sigmoid(x)?
}

/// 0 where a query sees a key, a large negative number elsewhere; (t, total).
fn mask(t: usize, total: usize, position: usize, window: Option<usize>) -> Result<Tensor> {
    let seen = |i: usize, key: usize| key <= position + i && window.is_none_or(|w| key + w > position + i);
    let values: Vec<f64> =
        (0..t).flat_map(|i| (0..total).map(move |key| if seen(i, key) { 0.0 } else { -1e30 })).collect();
    Tensor::from_vec(values, (t, total), &CandleDevice::Cpu)
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(Dim::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(weight)
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(Dim::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(Dim::Minus1)?)
}

/// 1 where a probability is among the k largest of its row, 0 elsewhere; of equal ones the first.
fn chosen(p: &Tensor, k: usize) -> Result<Tensor> {
    let rows = p.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let of_row = |row: &Vec<f64>| {
        let above = |e: usize| (0..row.len()).filter(|&o| row[o] > row[e] || (row[o] == row[e] && o < e)).count();
        (0..row.len()).map(|e| if above(e) < k { 1.0 } else { 0.0 }).collect::<Vec<f64>>()
    };
    let values: Vec<f64> = rows.iter().flat_map(of_row).collect();
    Tensor::from_vec(values, p.shape(), &CandleDevice::Cpu)?.to_dtype(p.dtype())
}

fn log_sum_exp(x: &Tensor) -> Result<Tensor> {
    let top = x.max_keepdim(Dim::Minus1)?.detach();
    let sum = x.broadcast_sub(&top)?.exp()?.sum_keepdim(Dim::Minus1)?;
    (sum.log()? + top)?.squeeze(Dim::Minus1)
}

/// Standard normal numbers.
fn noise(seed: u64, stream: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    compute::Stream::projection(seed, stream, 0).fill_normal(0, 1.0, &mut values);
    values
}

fn matrix(values: &[f32], rows: usize, precision: Precision) -> Result<Tensor> {
    let shape = (rows, values.len().checked_div(rows).unwrap_or(0));
    Tensor::from_vec(values.to_vec(), shape, &CandleDevice::Cpu)?.to_dtype(precision.dtype())
}

fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

fn upload<D: Device>(device: &D, values: &[f32]) -> D::Buffer {
    let mut buffer = device.zeros(values.len());
    device.write(&mut buffer, 0, values);
    buffer
}

fn download<D: Device>(device: &D, buffer: &D::Buffer) -> Vec<f32> {
    let mut values = vec![0.0; device.len(buffer)];
    device.read(buffer, 0, &mut values);
    values
}

fn norm(v: impl Iterator<Item = f64>) -> f64 {
    v.map(|x| x * x).sum::<f64>().sqrt()
}

/// Relative to the reference, or to `least` if that is larger.
fn difference(what: &str, ours: &[f32], reference: &[f64], least: f64) -> Difference {
    assert_eq!(ours.len(), reference.len(), "{what}");
    let apart = norm(ours.iter().zip(reference).map(|(a, b)| *a as f64 - b));
    let size = norm(reference.iter().copied()).max(least);
    Difference { what: what.into(), relative: if size > 0.0 { apart / size } else { apart } }
}
