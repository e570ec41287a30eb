//! The operations as their definitions say, in f64 and without any thought of speed.
//!
//! Shapes as in `compute::Device`. Backward formulas are not repeated here where finite differences
//! of the forward ([`gradient`]) can stand for them.

use compute::{Attention, Convolution, DeltaRule, Heads};

/// y (t,m) = x (t,n) Wᵀ + b.
pub fn linear(x: &[f64], w: &[f64], b: Option<&[f64]>, t: usize, m: usize, n: usize) -> Vec<f64> {
    let mut y = vec![0.0; t * m];
    for i in 0..t {
        for j in 0..m {
            let sum: f64 = (0..n).map(|k| x[i * n + k] * w[j * n + k]).sum();
            y[i * m + j] = sum + b.map_or(0.0, |b| b[j]);
        }
    }
    y
}

/// (t,m) (m,n) -> (t,n).
pub fn matmul(a: &[f64], b: &[f64], t: usize, m: usize, n: usize) -> Vec<f64> {
    let mut y = vec![0.0; t * n];
    for i in 0..t {
        for k in 0..m {
            for j in 0..n {
                y[i * n + j] += a[i * m + k] * b[k * n + j];
            }
        }
    }
    y
}

/// G (m,n) = dyᵀ x.
pub fn outer(dy: &[f64], x: &[f64], t: usize, m: usize, n: usize) -> Vec<f64> {
    let mut g = vec![0.0; m * n];
    for i in 0..t {
        for j in 0..m {
            for k in 0..n {
                g[j * n + k] += dy[i * m + j] * x[i * n + k];
            }
        }
    }
    g
}

pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let n = w.len();
    x.chunks(n)
        .flat_map(|row| {
            let rms = (row.iter().map(|v| v * v).sum::<f64>() / n as f64 + eps).sqrt();
            row.iter().zip(w).map(|(v, w)| v / rms * w).collect::<Vec<_>>()
        })
        .collect()
}

/// Rotation of the pair (i, i + d/2) of a head, d what rotates of it, by position · base^(-2i/d), as a complex product.
pub fn rope(x: &[f64], position: usize, heads: Heads, base: f64, inverse: bool) -> Vec<f64> {
    let (mut y, d) = (x.to_vec(), heads.rotated);
    for (row, y) in y.chunks_mut(heads.count * heads.dim).enumerate() {
        for head in y.chunks_mut(heads.dim) {
            for i in 0..d / 2 {
                let angle = (position + row) as f64 * base.powf(-2.0 * i as f64 / d as f64);
                let (sin, cos) = (if inverse { -angle } else { angle }).sin_cos();
                let (re, im) = (head[i], head[i + d / 2]);
                (head[i], head[i + d / 2]) = (re * cos - im * sin, re * sin + im * cos);
            }
        }
    }
    y
}

/// The cos and sin table that the device's rope reads, (positions, d).
pub fn rope_table(positions: usize, d: usize, base: f64) -> Vec<f32> {
    let mut table = Vec::new();
    for p in 0..positions {
        let angles: Vec<f64> = (0..d / 2).map(|i| p as f64 * base.powf(-2.0 * i as f64 / d as f64)).collect();
        table.extend(angles.iter().map(|a| a.cos() as f32));
        table.extend(angles.iter().map(|a| a.sin() as f32));
    }
    table
}

/// Keys and values of past and window, one after the other.
pub struct Past<'a> {
    pub keys: &'a [f64],
    pub values: &'a [f64],
    pub len: usize,
}

/// (out (t, heads·d), lse (heads, t)): for each query, a softmax over exactly the keys whose
/// position p satisfies query - window < p <= query.
pub fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    past: &Past,
    t: usize,
    s: &Attention,
    scale: f64,
) -> (Vec<f64>, Vec<f64>) {
    let d = s.head_dim;
    let (mut out, mut lse) = (vec![0.0; t * s.heads * d], vec![0.0; s.heads * t]);
    let kv = s.kv_heads * d;
    let row = |past: &[f64], own: &[f64], position: usize, head: usize| -> Vec<f64> {
        let (data, i) = if position < past.len() / kv { (past, position) } else { (own, position - past.len() / kv) };
        data[i * kv + head * d..][..d].to_vec()
    };
    let (past_keys, past_values) = (&past.keys[..past.len * kv], &past.values[..past.len * kv]);
    for i in 0..t {
        let position = past.len + i;
        let seen: Vec<usize> =
            (0..=position).filter(|&p| s.window.is_none_or(|w| (p as i64) > position as i64 - w as i64)).collect();
        for h in 0..s.heads {
            let kv_head = h * s.kv_heads / s.heads;
            let query = &q[(i * s.heads + h) * d..][..d];
            let score = |p: usize| -> f64 {
                scale * row(past_keys, k, p, kv_head).iter().zip(query).map(|(a, b)| a * b).sum::<f64>()
            };
            let scores: Vec<f64> = seen.iter().map(|&p| score(p)).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            lse[h * t + i] = top + sum.ln();
            for (&p, score) in seen.iter().zip(&scores) {
                let weight = (score - top).exp() / sum;
                for (c, value) in row(past_values, v, p, kv_head).iter().enumerate() {
                    out[(i * s.heads + h) * d + c] += weight * value;
                }
            }
        }
    }
    (out, lse)
}

pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// y (t,C) = silu of the causal convolution of x with w (C,K), with `before` (K-1,C) before it.
pub fn causal_conv(x: &[f64], before: &[f64], w: &[f64], shape: Convolution) -> Vec<f64> {
    let Convolution { channels, width } = shape;
    let all = [before, x].concat();
    let t = x.len() / channels;
    let sum = |i: usize, c: usize| -> f64 { (0..width).map(|j| w[c * width + j] * all[(i + j) * channels + c]).sum() };
    (0..t).flat_map(|i| (0..channels).map(move |c| (i, c))).map(|(i, c)| silu(sum(i, c))).collect()
}

/// What the gated delta rule is given, as in `compute::DeltaInputs`.
#[derive(Clone)]
pub struct Delta {
    pub mixed: Vec<f64>,
    pub a: Vec<f64>,
    pub b: Vec<f64>,
    pub a_log: Vec<f64>,
    pub dt_bias: Vec<f64>,
    pub state: Vec<f64>,
}

/// (out, state after): S = S·(I - β k kᵀ)·α + β v kᵀ, token by token (arXiv:2412.06464, equation 10), S stored transposed.
pub fn delta_rule(inputs: &Delta, shape: &DeltaRule) -> (Vec<f64>, Vec<f64>) {
    let DeltaRule { key_heads, value_heads, key_dim, value_dim } = *shape;
    let t = inputs.a.len() / value_heads;
    let unit = |x: &[f64]| {
        let length = (x.iter().map(|v| v * v).sum::<f64>() + 1e-6f32 as f64).sqrt();
        x.iter().map(|v| v / length).collect::<Vec<f64>>()
    };
    let (mut out, mut state) = (vec![0.0; t * value_heads * value_dim], inputs.state.clone());
    for i in 0..t {
        let mixed = &inputs.mixed[i * shape.channels()..][..shape.channels()];
        for h in 0..value_heads {
            let of = h / (value_heads / key_heads) * key_dim;
            let (q, k) = (unit(&mixed[of..][..key_dim]), unit(&mixed[key_heads * key_dim + of..][..key_dim]));
            let v = &mixed[2 * key_heads * key_dim + h * value_dim..][..value_dim];
            let x = inputs.a[i * value_heads + h] + inputs.dt_bias[h];
            let alpha = (-inputs.a_log[h].exp() * (1.0 + x.exp()).ln()).exp();
            let beta = 1.0 / (1.0 + (-inputs.b[i * value_heads + h]).exp());
            let s = &mut state[h * key_dim * value_dim..][..key_dim * value_dim];
            for j in 0..value_dim {
                let read: f64 = (0..key_dim).map(|r| alpha * s[r * value_dim + j] * k[r]).sum();
                for r in 0..key_dim {
                    s[r * value_dim + j] = alpha * s[r * value_dim + j] + beta * k[r] * (v[j] - read);
                }
                let sum: f64 = (0..key_dim).map(|r| s[r * value_dim + j] * q[r]).sum();
                out[(i * value_heads + h) * value_dim + j] = sum / (key_dim as f64).sqrt();
            }
        }
    }
    (out, state)
}

/// -log softmax(row)[target] and softmax(row).
pub fn cross_entropy(row: &[f64], target: usize) -> (f64, Vec<f64>) {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|v| (v - top).exp()).sum();
    (sum.ln() + top - row[target], row.iter().map(|v| (v - top).exp() / sum).collect())
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Gradient of `f` at `x` by central differences for the coordinates `which`. In f64 with this step
/// the error is about 1e-9 of the function's size.
pub fn gradient(x: &[f64], which: &[usize], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-5;
    let mut moved = x.to_vec();
    which
        .iter()
        .map(|&i| {
            moved[i] = x[i] + h;
            let up = f(&moved);
            moved[i] = x[i] - h;
            let down = f(&moved);
            moved[i] = x[i];
            (up - down) / (2.0 * h)
        })
        .collect()
}

/// Derivative of `f` at `x` along `direction`, by central differences.
pub fn slope(x: &[f64], direction: &[f64], f: impl Fn(&[f64]) -> f64) -> f64 {
    let h = 1e-5;
    let at = |h: f64| f(&x.iter().zip(direction).map(|(x, d)| x + h * d).collect::<Vec<_>>());
    (at(h) - at(-h)) / (2.0 * h)
}
