//! The independent reference: one layer, or the head, by plain formulas under candle's autograd in f64 (or f32
//! where that would not fit).
//!
//! Tests and `apollod doctor` run the same random inputs through this and through the kernels, on any
//! device and on an operator's own weights. candle's fused `rms_norm`, `softmax_last_dim` and `rope`
//! have no backward and are not used.

use crate::forward::{Activations, Linear, Model};
use candle_core::{D as Dim, DType, Device as CandleDevice, Result, Tensor, Var};
use compute::{Device, Factors, Past, Sink, TensorId};
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
    let frozen = context_of(model, layer, &context, probe.context);
    let len = device.ids(&[probe.context as u32]);
    let past = Past { keys: &frozen.0, values: &frozen.1, len: &len };
    let (y, saved) = model.layer(layer, Arc::new(upload(&**device, &x)), past, t, Activations::Exact);
    let mut sink = LayerSink { device: device.clone(), shapes: model.shapes(), gradients: HashMap::new() };
    let dx = model.layer_backward(layer, &saved, Arc::new(upload(&**device, &dy)), past, t, &mut sink);

    let mut reference = Reference::new(model, layer_tensors(model, layer), probe.precision)?;
    let (keys, values) = reference.keys_and_values(layer, &matrix(&context, probe.context, probe.precision)?, 0)?;
    let x_var = Var::from_tensor(&matrix(&x, t, probe.precision)?)?;
    let output = reference.layer(layer, x_var.as_tensor(), &keys.detach(), &values.detach(), probe.context)?;
    let gradients = (&output * matrix(&dy, t, probe.precision)?)?.sum_all()?.backward()?;

    let mut differences = vec![difference("output", &download(&**device, &y), &host(&output)?)];
    let reference_dx = gradients.get(&x_var).expect("the output depends on the input");
    differences.push(difference("input gradient", &download(&**device, &dx), &host(reference_dx)?));
    for (tensor, var) in &reference.vars {
        let ours = download(&**device, &sink.gradients[tensor]);
        let theirs = gradients.get(var).expect("the output depends on every tensor of the layer");
        differences.push(difference(&model.tensors()[*tensor].name, &ours, &host(theirs)?));
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
    let normed = rms_norm(x_var.as_tensor(), reference.get(model.norm), reference.eps)?;
    let logits = normed.matmul(&reference.get(model.head).t()?)?;
    let log_sum = log_sum_exp(&logits)?;
    let chosen = logits.gather(&Tensor::from_vec(targets, (t, 1), &CandleDevice::Cpu)?, 1)?.squeeze(1)?;
    let each = (log_sum - chosen)?;
    let gradients = (each.sum_all()? * scale as f64)?.backward()?;

    let mut differences = vec![difference("loss", &download(&**device, &losses), &host(&each)?)];
    let reference_dx = gradients.get(&x_var).expect("the loss depends on the input");
    differences.push(difference("input gradient", &download(&**device, &dx), &host(reference_dx)?));
    for (tensor, var) in &reference.vars {
        let ours = download(&**device, &sink.gradients[tensor]);
        let theirs = gradients.get(var).expect("the loss depends on norm and head");
        differences.push(difference(&model.tensors()[*tensor].name, &ours, &host(theirs)?));
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

/// Keys and values of a frozen context by the kernels.
fn context_of<D: Device>(model: &Model<D>, layer: usize, x: &[f32], len: usize) -> (D::Stored, D::Stored) {
    let device = &model.device;
    let none = (device.zeros(0).into(), device.zeros(0).into());
    if len == 0 {
        return none;
    }
    let zero = device.ids(&[0]);
    let past = Past { keys: &none.0, values: &none.1, len: &zero };
    let (_, saved) = model.layer(layer, Arc::new(upload(&**device, x)), past, len, Activations::Exact);
    (saved.k.into(), saved.v.into())
}

fn layer_tensors<D: Device>(model: &Model<D>, layer: usize) -> Vec<TensorId> {
    let l = &model.layers[layer];
    let linear = [l.q, l.k, l.v, l.o, l.gate, l.up, l.down];
    let mut ids: Vec<TensorId> = linear.iter().flat_map(|l: &Linear| [Some(l.weight), l.bias]).flatten().collect();
    ids.extend([Some(l.input_norm), Some(l.post_norm), l.q_norm, l.k_norm].into_iter().flatten());
    ids
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

    /// (t, heads, d) after head norm and rope.
    fn rotated(&self, x: Tensor, norm: Option<TensorId>, heads: usize, d: usize, position: usize) -> Result<Tensor> {
        let t = x.dim(0)?;
        let mut x = x.reshape((t, heads, d))?;
        if let Some(norm) = norm {
            x = rms_norm(&x, self.get(norm), self.eps)?;
        }
        let table = self.model.config().rope.table(position, t);
        let table = Tensor::from_vec(table, (t, 1, d), &CandleDevice::Cpu)?.to_dtype(self.dtype)?;
        let (cos, sin) = (table.narrow(2, 0, d / 2)?, table.narrow(2, d / 2, d / 2)?);
        let (a, b) = (x.narrow(2, 0, d / 2)?, x.narrow(2, d / 2, d / 2)?);
        let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[first, second], 2)
    }

    /// Keys and values (t, kv_heads, d) of tokens at `position`...
    fn keys_and_values(&mut self, layer: usize, x: &Tensor, position: usize) -> Result<(Tensor, Tensor)> {
        let l = &self.model.layers[layer];
        let (g, d) = (l.attention.kv_heads, l.attention.head_dim);
        if x.dim(0)? == 0 {
            let none = Tensor::zeros((0, g, d), self.dtype, &CandleDevice::Cpu)?;
            return Ok((none.clone(), none));
        }
        let normed = rms_norm(x, self.get(l.input_norm), self.eps)?;
        let keys = self.rotated(self.linear(&normed, l.k)?, l.k_norm, g, d, position)?;
        let values = self.linear(&normed, l.v)?.reshape((x.dim(0)?, g, d))?;
        Ok((keys, values))
    }

    fn layer(&mut self, layer: usize, x: &Tensor, keys: &Tensor, values: &Tensor, position: usize) -> Result<Tensor> {
        let (own_keys, own_values) = self.keys_and_values(layer, x, position)?;
        let (keys, values) = match position {
            0 => (own_keys, own_values),
            _ => (Tensor::cat(&[keys, &own_keys], 0)?, Tensor::cat(&[values, &own_values], 0)?),
        };
        let l = &self.model.layers[layer];
        let shape = &l.attention;
        let (t, total, d) = (x.dim(0)?, keys.dim(0)?, shape.head_dim);
        let normed = rms_norm(x, self.get(l.input_norm), self.eps)?;
        let q = self.rotated(self.linear(&normed, l.q)?, l.q_norm, shape.heads, d, position)?;
        let group = shape.heads / shape.kv_heads;
        // (heads, total, d): every kv head repeated for its group of query heads.
        let spread = |kv: &Tensor| {
            let kv = kv.transpose(0, 1)?.unsqueeze(1)?;
            kv.expand((shape.kv_heads, group, total, d))?.contiguous()?.reshape((shape.heads, total, d))
        };
        let scores = q.transpose(0, 1)?.contiguous()?.matmul(&spread(&keys)?.transpose(1, 2)?.contiguous()?)?;
        let scores = (scores * shape.scale as f64)?
            .broadcast_add(&mask(t, total, position, shape.window)?.to_dtype(self.dtype)?)?;
        let out = softmax(&scores)?.matmul(&spread(&values)?)?;
        let out = out.transpose(0, 1)?.contiguous()?.reshape((t, shape.heads * d))?;
        let mid = (x + self.linear(&out, l.o)?)?;
        let normed = rms_norm(&mid, self.get(l.post_norm), self.eps)?;
        let (gate, up) = (self.linear(&normed, l.gate)?, self.linear(&normed, l.up)?);
        let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
        mid + self.linear(&(silu * up)?, l.down)?
    }
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

fn difference(what: &str, ours: &[f32], reference: &[f64]) -> Difference {
    assert_eq!(ours.len(), reference.len(), "{what}");
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut ours.iter().zip(reference).map(|(a, b)| *a as f64 - b));
    let size = norm(&mut reference.iter().copied());
    Difference { what: what.into(), relative: if size > 0.0 { apart / size } else { apart } }
}
