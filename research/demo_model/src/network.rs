//! The Qwen3 decoder on candle, with Hugging Face's parameter names (Qwen3ForCausalLM).
//!
//! B sequences of T tokens · D hidden · H query heads · K key/value heads, G = H/K · E head size · V vocabulary
//! x (B·T,D) · q (B,K,G·T,E) · k, v (B,K,P+T,E), P the tokens before this window · logits (N,V)
//!
//! Why plain formulas: candle_nn's fused rms_norm, softmax_last_dim and rope have no backward and
//! cut the graph without a word.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};

use crate::rng::Rng;

/// The sizes of config.json.
#[derive(Clone, Copy)]
pub struct Shape {
    /// V: rows of the embedding.
    pub vocab_size: usize,
    /// D: width of the residual stream.
    pub hidden_size: usize,
    /// F: width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// H: query heads.
    pub num_attention_heads: usize,
    /// K: key and value heads; divides H.
    pub num_key_value_heads: usize,
    /// E: size of a head; need not be D/H.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
}

impl Shape {
    /// Names and shapes of all parameters, in the order of their names.
    pub fn parameters(&self) -> BTreeMap<String, Vec<usize>> {
        let (d, f, e) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (q, kv) = (self.num_attention_heads * e, self.num_key_value_heads * e);
        let mut all = BTreeMap::from([
            ("model.embed_tokens.weight".to_string(), vec![self.vocab_size, d]),
            ("model.norm.weight".to_string(), vec![d]),
        ]);
        for layer in 0..self.num_hidden_layers {
            let parts: [(&str, Vec<usize>); 11] = [
                ("input_layernorm", vec![d]),
                ("self_attn.q_proj", vec![q, d]),
                ("self_attn.k_proj", vec![kv, d]),
                ("self_attn.v_proj", vec![kv, d]),
                ("self_attn.q_norm", vec![e]),
                ("self_attn.k_norm", vec![e]),
                ("self_attn.o_proj", vec![d, q]),
                ("post_attention_layernorm", vec![d]),
                ("mlp.gate_proj", vec![f, d]),
                ("mlp.up_proj", vec![f, d]),
                ("mlp.down_proj", vec![d, f]),
            ];
            all.extend(parts.map(|(part, shape)| (format!("model.layers.{layer}.{part}.weight"), shape)));
        }
        all
    }

    /// The number of parameters.
    pub fn count(&self) -> usize {
        self.parameters().values().map(|s| s.iter().product::<usize>()).sum()
    }
}

/// Keys and values of one layer, (B,K,P,E) each.
pub type KeyValue = (Tensor, Tensor);

/// The model: a shape and its parameters, f32, on the CPU.
pub struct Network {
    /// The sizes.
    pub shape: Shape,
    /// Parameters by their Hugging Face names.
    pub vars: BTreeMap<String, Var>,
}

impl Network {
    /// Norms at one; the embedding normal with deviation 0.02, matrices with 1/sqrt(inputs); the two
    /// that write to the residual stream divided by sqrt(2·layers), as GPT-2 does.
    pub fn random(shape: Shape, seed: u64) -> Result<Self> {
        let mut rng = Rng::new(seed);
        let mut vars = BTreeMap::new();
        for (name, dims) in shape.parameters() {
            let tensor = if dims.len() == 1 {
                Tensor::ones(dims, DType::F32, &Device::Cpu)?
            } else {
                let mut deviation = if name.contains("embed") { 0.02 } else { (1.0 / dims[1] as f64).sqrt() };
                if name.contains("o_proj") || name.contains("down_proj") {
                    deviation /= (2.0 * shape.num_hidden_layers as f64).sqrt();
                }
                let values: Vec<f32> = (0..dims.iter().product()).map(|_| (rng.normal() * deviation) as f32).collect();
                Tensor::from_vec(values, dims, &Device::Cpu)?
            };
            vars.insert(name, Var::from_tensor(&tensor)?);
        }
        Ok(Self { shape, vars })
    }

    fn weight(&self, layer: usize, part: &str) -> Result<&Tensor> {
        self.named(&format!("model.layers.{layer}.{part}.weight"))
    }

    fn named(&self, name: &str) -> Result<&Tensor> {
        self.vars.get(name).map(Var::as_tensor).with_context(|| format!("no parameter {name} in this model"))
    }

    /// Hidden states after the last norm, (B·T,D), of `ids` (B,T), u32, that follow `past`, and the
    /// keys and values of past and window together, one pair a layer.
    pub fn hidden(&self, ids: &Tensor, past: Option<&[KeyValue]>) -> Result<(Tensor, Vec<KeyValue>)> {
        let (b, t) = ids.dims2()?;
        let before = past.map_or(Ok(0), |p| p[0].0.dim(2))?;
        let rotary = self.rotary(before, t)?;
        let mask = causal_mask(before, t, self.shape.num_attention_heads / self.shape.num_key_value_heads)?;
        let eps = self.shape.rms_norm_eps;
        let mut x = self.named("model.embed_tokens.weight")?.index_select(&ids.flatten_all()?, 0)?;
        let mut cache = Vec::new();
        for layer in 0..self.shape.num_hidden_layers {
            let h = rms_norm(&x, self.weight(layer, "input_layernorm")?, eps)?;
            let (mixed, kv) = self.attention(layer, &h, (b, t), &rotary, &mask, past.map(|p| &p[layer]))?;
            cache.push(kv);
            x = (x + mixed)?;
            let h = rms_norm(&x, self.weight(layer, "post_attention_layernorm")?, eps)?;
            let gate = linear(&h, self.weight(layer, "mlp.gate_proj")?)?.silu()?;
            let up = linear(&h, self.weight(layer, "mlp.up_proj")?)?;
            x = (x + linear(&(gate * up)?, self.weight(layer, "mlp.down_proj")?)?)?;
        }
        Ok((rms_norm(&x, self.named("model.norm.weight")?, eps)?, cache))
    }

    /// Logits (N,V) of hidden states (N,D): the embedding is also the head.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        linear(hidden, self.named("model.embed_tokens.weight")?)
    }

    fn attention(
        &self,
        layer: usize,
        x: &Tensor,
        (b, t): (usize, usize),
        rotary: &(Tensor, Tensor),
        mask: &Tensor,
        past: Option<&KeyValue>,
    ) -> Result<(Tensor, KeyValue)> {
        let Shape { num_attention_heads: h, num_key_value_heads: kv, head_dim: e, rms_norm_eps: eps, .. } = self.shape;
        let project = |part: &str| linear(x, self.weight(layer, &format!("self_attn.{part}"))?);
        let heads =
            |x: Tensor, n: usize| Ok::<_, anyhow::Error>(x.reshape((b, t, n, e))?.transpose(1, 2)?.contiguous()?);
        let normed = |x: Tensor, norm: &str| rms_norm(&x.reshape(((), e))?, self.weight(layer, norm)?, eps);
        let q = rotate(&heads(normed(project("q_proj")?, "self_attn.q_norm")?, h)?, rotary)?;
        let mut k = rotate(&heads(normed(project("k_proj")?, "self_attn.k_norm")?, kv)?, rotary)?;
        let mut v = heads(project("v_proj")?, kv)?;
        if let Some((past_k, past_v)) = past {
            k = Tensor::cat(&[past_k, &k], 2)?;
            v = Tensor::cat(&[past_v, &v], 2)?;
        }
        // Head h reads key head h / G, so the G·T queries of one key head lie together.
        let q = (q.reshape((b, kv, h / kv * t, e))? * (e as f64).powf(-0.5))?;
        let scores = q.matmul(&k.t()?)?.broadcast_add(mask)?;
        let out = softmax(&scores)?.matmul(&v)?;
        let out = out.reshape((b, h, t, e))?.transpose(1, 2)?.reshape((b * t, h * e))?;
        Ok((linear(&out, self.weight(layer, "self_attn.o_proj")?)?, (k, v)))
    }

    /// cos and sin, (T,E/2) each, of positions before..before+t.
    fn rotary(&self, before: usize, t: usize) -> Result<(Tensor, Tensor)> {
        let half = self.shape.head_dim / 2;
        let angle = |i: usize| {
            let frequency = self.shape.rope_theta.powf(-((i % half) as f64) / half as f64);
            (before + i / half) as f64 * frequency
        };
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..t * half).map(|i| f(angle(i)) as f32).collect();
            Tensor::from_vec(values, (t, half), &Device::Cpu)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}

/// x (N,n) · wᵀ with w (m,n) -> (N,m).
fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    Ok(x.matmul(&w.t()?)?)
}

/// x / sqrt(mean x² + eps) · w over the last dimension.
fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok(x.broadcast_mul(&scale)?.broadcast_mul(w)?)
}

/// Over the last dimension. The maximum only guards against overflow, so it is not differentiated.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.detach().max_keepdim(D::Minus1)?)?.exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

/// Rotary position embedding of x (B,n,T,E), halves paired as Hugging Face pairs them.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?.contiguous()?, x.narrow(D::Minus1, half, half)?.contiguous()?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Ok(Tensor::cat(&[first, second], D::Minus1)?)
}

/// (G·T, P+T): 0 where a query may look, -1e9 where the key is later than the query.
fn causal_mask(before: usize, t: usize, group: usize) -> Result<Tensor> {
    let (rows, columns) = (group * t, before + t);
    let values: Vec<f32> =
        (0..rows * columns).map(|i| if i % columns > before + (i / columns) % t { -1e9 } else { 0.0 }).collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

/// Mean cross entropy, nats, of logits (N,V) against `targets` (N), u32.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let chosen = shifted.gather(&targets.unsqueeze(1)?, 1)?;
    Ok((log_sum - chosen)?.mean_all()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: Shape = Shape {
        vocab_size: 17,
        hidden_size: 12,
        intermediate_size: 20,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        rope_theta: 10000.0,
        rms_norm_eps: 1e-6,
    };

    fn ids(values: &[u32]) -> Tensor {
        Tensor::from_slice(values, (1, values.len()), &Device::Cpu).expect("ids")
    }

    fn loss(net: &Network) -> Tensor {
        let (hidden, _) = net.hidden(&ids(&[3, 1, 4, 1, 5]), None).expect("forward");
        let targets = Tensor::from_slice(&[1u32, 4, 1, 5, 9], 5, &Device::Cpu).expect("targets");
        cross_entropy(&net.logits(&hidden).expect("logits"), &targets).expect("loss")
    }

    #[test]
    fn every_parameter_has_the_gradient_that_finite_differences_show() {
        let net = Network::random(TINY, 5).expect("model");
        // The embedding's small deviation, before a norm, makes the loss too curved to difference.
        let embedding = &net.vars["model.embed_tokens.weight"];
        embedding.set(&(embedding.as_tensor() * 20.0).expect("larger")).expect("set");
        let grads = loss(&net).backward().expect("backward");
        for (name, var) in &net.vars {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{name} was cut from the graph"));
            let direction: Vec<f32> = grad.flatten_all().and_then(|g| g.to_vec1()).expect("gradient");
            let norm = direction.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
            let original = var.as_tensor().copy().expect("copy");
            // The loss is rounded at 1e-6, the slope so at 5e-4: hence the absolute tolerance.
            let step = 1e-3;
            let at = |sign: f64| {
                let moved = (&original + (grad * (sign * step / norm)).expect("scale")).expect("move");
                var.set(&moved).expect("set");
                loss(&net).to_scalar::<f32>().expect("loss") as f64
            };
            let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
            var.set(&original).expect("restore");
            assert!((slope - norm).abs() < 2e-2 * norm + 1e-3, "{name}: slope {slope}, gradient norm {norm}");
        }
    }

    #[test]
    fn a_window_after_frozen_keys_and_values_is_the_whole_run() {
        let net = Network::random(TINY, 6).expect("model");
        let (whole, _) = net.hidden(&ids(&[3, 1, 4, 1, 5]), None).expect("whole");
        let (_, past) = net.hidden(&ids(&[3, 1, 4]), None).expect("prefill");
        let (window, _) = net.hidden(&ids(&[1, 5]), Some(&past)).expect("window");
        let tail = whole.narrow(0, 3, 2).expect("tail");
        let gap = (tail - window).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>()).expect("gap");
        assert!(gap < 1e-5, "{gap}");
    }
}
