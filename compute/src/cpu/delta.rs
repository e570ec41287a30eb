//! The gated delta rule (Yang et al., "Gated Delta Networks", arXiv:2412.06464) and its backward, token by token.
//!
//! For each value head, with its key head's q and k of unit length, q besides times kd^-1/2:
//! g = -e^A·softplus(a + dt) · β = σ(b) · S' = e^g·S · r = v - S'ᵀk · S ← S' + k·(β·r)ᵀ · out = Sᵀq
//! S (kd,vd) · backward from dS of the token after: dS += q·doutᵀ · dq = S·dout · dδ = dSᵀk · dk = dS·δ with δ = β·r ·
//! dβ = dδ·r · dv = β·dδ · dS' = dS - k·dvᵀ · dk -= S'·dv · dg = <dS', S'> · dS of the token before = e^g·dS'
//!
//! Columns of a state do not meet but in sums for q, k and the gates: [`WIDTH`] of them are taken through all tokens, so few that
//! they stay in the first-level cache. A token costs some 7·kd·vd multiply-adds for each head, a hundredth of what the layer's
//! projections cost, so that nothing would be gained by the chunks that make matrix products of it.

use super::Buffer;
use super::gemm::Shared;
use super::pointwise::{sigmoid, vector};
use super::simd::{self, multiversion};
use crate::{Cpu, DeltaGrads, DeltaInputs, DeltaRule};
use rayon::prelude::*;

/// Columns of a state that are taken at a time; where there are fewer, zeros fill them up.
const WIDTH: usize = 32;
type Line = [f32; WIDTH];
/// Tokens whose states are held at once in backward.
const CHUNK: usize = 64;
/// Added to the squared length of q and k.
const EPS: f32 = 1e-6;

/// What both directions need of the tokens: computed once.
struct Tokens {
    shape: DeltaRule,
    t: usize,
    /// (t, key_heads, kd), normalised.
    q: Buffer,
    k: Buffer,
    /// What q and k were multiplied with, (t, key_heads).
    q_scale: Buffer,
    k_scale: Buffer,
    /// g, e^g and β, (value_heads, t).
    log_decay: Buffer,
    decay: Buffer,
    beta: Buffer,
}

impl Tokens {
    fn new(inputs: &DeltaInputs<Cpu>, t: usize, shape: &DeltaRule) -> Tokens {
        let DeltaRule { key_heads, value_heads, key_dim, .. } = *shape;
        let (heads, keys) = (t * key_heads, key_heads * key_dim);
        let [mut q, mut k] = [(); 2].map(|()| Buffer::uninit(heads * key_dim));
        let [mut q_scale, mut k_scale] = [(); 2].map(|()| Buffer::uninit(heads));
        let scale = 1.0 / (key_dim as f32).sqrt();
        for (row, mixed) in inputs.mixed.chunks_exact(shape.channels()).take(t).enumerate() {
            let place = row * keys..(row + 1) * keys;
            let scales = row * key_heads..(row + 1) * key_heads;
            normalise(&mut q[place.clone()], &mut q_scale[scales.clone()], &mixed[..keys], key_dim, scale);
            normalise(&mut k[place], &mut k_scale[scales], &mixed[keys..2 * keys], key_dim, 1.0);
        }
        let (a_log, dt_bias) = (vector(inputs.a_log), vector(inputs.dt_bias));
        let [mut log_decay, mut decay, mut beta] = [(); 3].map(|()| Buffer::uninit(value_heads * t));
        for head in 0..value_heads {
            for row in 0..t {
                let (from, to) = (row * value_heads + head, head * t + row);
                log_decay[to] = -a_log[head].exp() * softplus(inputs.a[from] + dt_bias[head]);
                decay[to] = log_decay[to].exp();
                beta[to] = sigmoid(inputs.b[from]);
            }
        }
        Tokens { shape: *shape, t, q, k, q_scale, k_scale, log_decay, decay, beta }
    }

    /// Rows `first..first + n` of a head of `from` (t, heads, dim), dense.
    fn of_head(from: &[f32], heads: usize, dim: usize, head: usize, first: usize, n: usize) -> Vec<f32> {
        let mut rows = Vec::with_capacity(n * dim);
        (first..first + n).for_each(|row| rows.extend_from_slice(&from[(row * heads + head) * dim..][..dim]));
        rows
    }

    fn chunks(&self) -> impl DoubleEndedIterator<Item = (usize, usize)> + use<> {
        let t = self.t;
        (0..t.div_ceil(CHUNK)).map(move |chunk| (chunk * CHUNK, CHUNK.min(t - chunk * CHUNK)))
    }

    /// Some tokens as a value head sees them.
    fn chunk(&self, head: usize, first: usize, n: usize) -> Chunk<'_> {
        let DeltaRule { key_heads, value_heads, key_dim, .. } = self.shape;
        let key_head = head / (value_heads / key_heads);
        let of_head = |from: &[f32]| Tokens::of_head(from, key_heads, key_dim, key_head, first, n);
        let gates = head * self.t + first..head * self.t + first + n;
        Chunk { q: of_head(&self.q), k: of_head(&self.k), decay: &self.decay[gates.clone()], beta: &self.beta[gates] }
    }
}

struct Chunk<'a> {
    /// (n, kd)
    q: Vec<f32>,
    k: Vec<f32>,
    /// (n)
    decay: &'a [f32],
    beta: &'a [f32],
}

/// Rows of heads in unit length times `scale`, and the factors that make them so.
fn normalise(out: &mut [f32], factors: &mut [f32], from: &[f32], dim: usize, scale: f32) {
    for ((out, factor), from) in out.chunks_exact_mut(dim).zip(factors).zip(from.chunks_exact(dim)) {
        *factor = scale / (simd::dot(from, from) + EPS).sqrt();
        out.iter_mut().zip(from).for_each(|(o, x)| *o = *factor * x);
    }
}

/// ln(1 + e^x); above 20 that is x, in f32.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Columns `first..` of a value head, up to [`WIDTH`] of them.
#[derive(Clone, Copy)]
struct Strip {
    head: usize,
    first: usize,
    n: usize,
}

impl Strip {
    fn of(shape: &DeltaRule, head: usize) -> impl Iterator<Item = Strip> + use<> {
        let dim = shape.value_dim;
        (0..dim).step_by(WIDTH).map(move |first| Strip { head, first, n: WIDTH.min(dim - first) })
    }

    /// These columns of rows that are `stride` apart, zeros beside them.
    fn gather(self, from: &[f32], start: usize, stride: usize, rows: usize) -> Vec<Line> {
        let mut lines = vec![[0.0; WIDTH]; rows];
        for (i, line) in lines.iter_mut().enumerate() {
            line[..self.n].copy_from_slice(&from[start + i * stride + self.first..][..self.n]);
        }
        lines
    }

    /// Writes them there.
    ///
    /// # Safety
    /// No other task uses these elements meanwhile.
    unsafe fn scatter(self, to: &Shared, start: usize, stride: usize, lines: &[Line]) {
        for (i, line) in lines.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.slice(start + i * stride + self.first, self.n) }.copy_from_slice(&line[..self.n]);
        }
    }

    /// Where the state's rows of the head begin.
    fn state(self, shape: &DeltaRule) -> usize {
        self.head * shape.key_dim * shape.value_dim
    }

    /// Where the head's values of a token begin, in `mixed` and in `out`.
    fn value(self, shape: &DeltaRule, token: usize) -> usize {
        token * shape.channels() + 2 * shape.key_heads * shape.key_dim + self.head * shape.value_dim
    }
    fn out(self, shape: &DeltaRule, token: usize) -> usize {
        (token * shape.value_heads + self.head) * shape.value_dim
    }
}

/// See [`crate::Device::delta_rule`].
pub fn delta_rule(out: &mut [f32], next: Option<&mut [f32]>, inputs: &DeltaInputs<Cpu>, t: usize, shape: &DeltaRule) {
    let tokens = Tokens::new(inputs, t, shape);
    let (values, dim) = (shape.value_heads * shape.value_dim, shape.value_dim);
    let (out, next) = (Shared::new(&mut out[..t * values]), next.map(|next| Shared::new(&mut next[..shape.state()])));
    let tasks: Vec<Strip> = (0..shape.value_heads).flat_map(|head| Strip::of(shape, head)).collect();
    tasks.into_par_iter().for_each(|columns| {
        let mut state = columns.gather(inputs.state, columns.state(shape), dim, shape.key_dim);
        let mut kept = Kept::default();
        for (first, n) in tokens.chunks() {
            let v = columns.gather(inputs.mixed, columns.value(shape, first), shape.channels(), n);
            let mut result = vec![[0.0; WIDTH]; n];
            kept.run(&mut state, &tokens.chunk(columns.head, first, n), &v, &mut result, false);
            // SAFETY: these columns of the head belong to this task.
            unsafe { columns.scatter(&out, columns.out(shape, first), values, &result) };
        }
        if let Some(next) = &next {
            // SAFETY: as above.
            unsafe { columns.scatter(next, columns.state(shape), dim, &state) };
        }
    });
}

/// What backward needs of a chunk's forward pass.
#[derive(Default)]
struct Kept {
    /// Before each token and after the last, (n + 1, kd).
    states: Vec<Line>,
    /// δ and r of each token.
    delta: Vec<Line>,
    rest: Vec<Line>,
}

impl Kept {
    /// Takes `state` through a chunk.
    fn run(&mut self, state: &mut [Line], chunk: &Chunk, v: &[Line], out: &mut [Line], keep: bool) {
        let (n, kd) = (v.len(), state.len());
        self.delta.resize(n, [0.0; WIDTH]);
        self.rest.resize(n, [0.0; WIDTH]);
        self.states.clear();
        if keep {
            self.states.resize((n + 1) * kd, [0.0; WIDTH]);
            self.states[..kd].copy_from_slice(state);
        }
        let Chunk { q, k, decay, beta } = chunk;
        forward(state, q, k, decay, beta, v, out, &mut self.delta, &mut self.rest, &mut self.states);
    }
}

multiversion! {
    /// `states` (n + 1, kd) gets the state after each token, unless it is empty.
    fn forward(
        state: &mut [Line], q: &[f32], k: &[f32], decay: &[f32], beta: &[f32], v: &[Line], out: &mut [Line], delta: &mut [Line],
        rest: &mut [Line], states: &mut [Line],
    ) {
        let kd = state.len();
        for t in 0..v.len() {
            let (q, k) = (&q[t * kd..][..kd], &k[t * kd..][..kd]);
            let mut read = [0.0; WIDTH];
            for (row, &k) in state.iter_mut().zip(k) {
                for j in 0..WIDTH {
                    row[j] *= decay[t];
                    read[j] += k * row[j];
                }
            }
            for j in 0..WIDTH {
                rest[t][j] = v[t][j] - read[j];
                delta[t][j] = beta[t] * rest[t][j];
            }
            let (delta, mut sum) = (&delta[t], [0.0; WIDTH]);
            for ((row, &k), &q) in state.iter_mut().zip(k).zip(q) {
                for j in 0..WIDTH {
                    row[j] += k * delta[j];
                    sum[j] += q * row[j];
                }
            }
            out[t] = sum;
            if !states.is_empty() {
                states[(t + 1) * kd..][..kd].copy_from_slice(state);
            }
        }
    }
}

/// Gradients of one key head's tokens, and of one of its value heads' gates.
struct HeadGrads {
    /// (t, kd), of the normalised q and k.
    dq: Vec<f32>,
    dk: Vec<f32>,
    /// (t)
    dbeta: Vec<f32>,
    dg: Vec<f32>,
}

/// See [`crate::Device::delta_rule_backward`].
pub fn delta_rule_backward(
    grads: DeltaGrads<Buffer>,
    dout: &[f32],
    inputs: &DeltaInputs<Cpu>,
    t: usize,
    shape: &DeltaRule,
) {
    let tokens = Tokens::new(inputs, t, shape);
    let (kd, heads) = (shape.key_dim, shape.value_heads);
    let dmixed = Shared::new(&mut grads.mixed[..t * shape.channels()]);
    let (da, db) = (Shared::new(&mut grads.a[..t * heads]), Shared::new(&mut grads.b[..t * heads]));
    let (da_log, ddt_bias) = (Shared::new(&mut grads.a_log[..heads]), Shared::new(&mut grads.dt_bias[..heads]));
    let (a_log, dt_bias) = (vector(inputs.a_log), vector(inputs.dt_bias));
    let group = heads / shape.key_heads;
    (0..shape.key_heads).into_par_iter().for_each(|key_head| {
        let zeros = |n: usize| vec![0.0; n];
        let mut head_grads = HeadGrads { dq: zeros(t * kd), dk: zeros(t * kd), dbeta: zeros(t), dg: zeros(t) };
        for head in key_head * group..(key_head + 1) * group {
            head_grads.dbeta.fill(0.0);
            head_grads.dg.fill(0.0);
            for columns in Strip::of(shape, head) {
                // SAFETY: the values of this head belong to this task.
                unsafe { columns_backward(&mut head_grads, &dmixed, columns, &tokens, dout, inputs) };
            }
            let (mut sum_a_log, mut sum_dt) = (0.0, 0.0);
            for row in 0..t {
                let (dg, at) = (head_grads.dg[row], row * heads + head);
                let d = -a_log[head].exp() * sigmoid(inputs.a[at] + dt_bias[head]) * dg;
                let beta = tokens.beta[head * t + row];
                // SAFETY: the gates of this head belong to this task.
                unsafe {
                    da.slice(at, 1)[0] = d;
                    db.slice(at, 1)[0] = head_grads.dbeta[row] * beta * (1.0 - beta);
                }
                sum_dt += d;
                sum_a_log += dg * tokens.log_decay[head * t + row];
            }
            // SAFETY: as above.
            unsafe {
                da_log.slice(head, 1)[0] = sum_a_log;
                ddt_bias.slice(head, 1)[0] = sum_dt;
            }
        }
        let keys = shape.key_heads * kd;
        for row in 0..t {
            let at = row * shape.key_heads + key_head;
            for (of, unit, factor, d) in [
                (0, &tokens.q, tokens.q_scale[at], &head_grads.dq),
                (keys, &tokens.k, tokens.k_scale[at], &head_grads.dk),
            ] {
                let scale = if of == 0 { 1.0 / (kd as f32).sqrt() } else { 1.0 };
                // SAFETY: q and k of this head belong to this task.
                let out = unsafe { dmixed.slice(row * shape.channels() + of + key_head * kd, kd) };
                normalise_backward(out, &unit[at * kd..][..kd], &d[row * kd..][..kd], factor, scale);
            }
        }
    });
}

/// With unit = factor·x and factor = scale/sqrt(x² + eps): dx = factor·(d - unit·(unit·d)/scale²).
fn normalise_backward(out: &mut [f32], unit: &[f32], d: &[f32], factor: f32, scale: f32) {
    let along = simd::dot(unit, d) / (scale * scale);
    for ((out, unit), d) in out.iter_mut().zip(unit).zip(d) {
        *out = factor * (d - unit * along);
    }
}

/// Some columns of a value head through all tokens: its dv is set, the rest is added.
///
/// # Safety
/// No other task uses the values of the head in `dmixed` meanwhile.
unsafe fn columns_backward(
    grads: &mut HeadGrads,
    dmixed: &Shared,
    columns: Strip,
    tokens: &Tokens,
    dout: &[f32],
    inputs: &DeltaInputs<Cpu>,
) {
    let (shape, kd) = (&tokens.shape, tokens.shape.key_dim);
    let value = |first: usize, n: usize| columns.gather(inputs.mixed, columns.value(shape, first), shape.channels(), n);
    let mut state = columns.gather(inputs.state, columns.state(shape), shape.value_dim, kd);
    let (mut kept, mut out) = (Kept::default(), vec![[0.0; WIDTH]; CHUNK]);
    // The state at the beginning of each chunk.
    let mut starts = Vec::new();
    for (first, n) in tokens.chunks() {
        starts.push(state.clone());
        if first + n < tokens.t {
            kept.run(&mut state, &tokens.chunk(columns.head, first, n), &value(first, n), &mut out, false);
        }
    }
    let mut ds = vec![[0.0; WIDTH]; kd];
    for (first, n) in tokens.chunks().rev() {
        let (chunk, mut state) = (tokens.chunk(columns.head, first, n), starts.pop().expect("one for each chunk"));
        kept.run(&mut state, &chunk, &value(first, n), &mut out, true);
        let stride = shape.value_heads * shape.value_dim;
        let dout = columns.gather(dout, columns.out(shape, first), stride, n);
        let mut dv = vec![[0.0; WIDTH]; n];
        let Chunk { q, k, decay, beta } = &chunk;
        let (dq, dk) = (&mut grads.dq[first * kd..][..n * kd], &mut grads.dk[first * kd..][..n * kd]);
        let (dbeta, dg) = (&mut grads.dbeta[first..][..n], &mut grads.dg[first..][..n]);
        let Kept { states, delta, rest } = &kept;
        backward(&mut ds, states, q, k, decay, beta, delta, rest, &dout, dq, dk, &mut dv, dbeta, dg);
        // SAFETY: the caller's promise.
        unsafe { columns.scatter(dmixed, columns.value(shape, first), shape.channels(), &dv) };
    }
}

multiversion! {
    /// A chunk from its last token to its first. `ds` is the gradient of the state after it, then of the state before it.
    fn backward(
        ds: &mut [Line], states: &[Line], q: &[f32], k: &[f32], decay: &[f32], beta: &[f32], delta: &[Line], rest: &[Line],
        dout: &[Line], dq: &mut [f32], dk: &mut [f32], dv: &mut [Line], dbeta: &mut [f32], dg: &mut [f32],
    ) {
        let kd = ds.len();
        for t in (0..dout.len()).rev() {
            let (q, k) = (&q[t * kd..][..kd], &k[t * kd..][..kd]);
            let (dq, dk) = (&mut dq[t * kd..][..kd], &mut dk[t * kd..][..kd]);
            let (before, after) = (&states[t * kd..][..kd], &states[(t + 1) * kd..][..kd]);
            let mut ddelta = [0.0; WIDTH];
            for i in 0..kd {
                for j in 0..WIDTH {
                    ds[i][j] += q[i] * dout[t][j];
                    ddelta[j] += k[i] * ds[i][j];
                }
                dq[i] += simd::dot(&after[i], &dout[t]);
                dk[i] += simd::dot(&ds[i], &delta[t]);
            }
            dbeta[t] += simd::dot(&ddelta, &rest[t]);
            for j in 0..WIDTH {
                dv[t][j] = beta[t] * ddelta[j];
            }
            let mut pull = [0.0; WIDTH];
            for i in 0..kd {
                let mut decayed = [0.0; WIDTH];
                for j in 0..WIDTH {
                    decayed[j] = decay[t] * before[i][j];
                    ds[i][j] -= k[i] * dv[t][j];
                    pull[j] += ds[i][j] * decayed[j];
                }
                dk[i] -= simd::dot(&decayed, &dv[t]);
                ds[i].iter_mut().for_each(|d| *d *= decay[t]);
            }
            dg[t] += pull.iter().sum::<f32>();
        }
    }
}
