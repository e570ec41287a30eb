//! Wrappers of the gated delta rule's kernels: the chunks of backward, and the memory that holds what is between kernels.

use super::launch::Launch;
use super::optimizer::dtype_number;
use super::{Buffer, Cuda, Weight};
use crate::{DeltaGrads, DeltaInputs, DeltaRule, Device};

const THREADS: usize = 256;
/// Warps of a block, and columns of a state that one has.
const WARPS: usize = 8;
const WIDTH: usize = 32;
/// Tokens whose states are held at once in backward.
const CHUNK: usize = 64;
/// The longest head.
const DIM_MAX: usize = 256;

/// Structs that kernels are given by value, as they lie in memory: pointers, then numbers.
fn by_value(pointers: &[u64], numbers: &[u32]) -> Vec<u8> {
    let pointers = pointers.iter().flat_map(|pointer| pointer.to_ne_bytes());
    pointers.chain(numbers.iter().flat_map(|number| number.to_ne_bytes())).collect()
}

/// What both directions need of the tokens: computed once.
struct Tokens<'a> {
    cuda: &'a Cuda,
    inputs: &'a DeltaInputs<'a, Cuda>,
    shape: DeltaRule,
    t: usize,
    /// (t, key_heads, key_dim), normalised, and their factors (t, key_heads).
    q: Buffer,
    k: Buffer,
    q_factor: Buffer,
    k_factor: Buffer,
    /// (value_heads, t)
    log_decay: Buffer,
    decay: Buffer,
    beta: Buffer,
}

impl<'a> Tokens<'a> {
    fn new(cuda: &'a Cuda, inputs: &'a DeltaInputs<'a, Cuda>, t: usize, shape: &DeltaRule) -> Tokens<'a> {
        let DeltaRule { key_heads, value_heads, key_dim, value_dim } = *shape;
        assert!(key_dim <= DIM_MAX && value_dim <= DIM_MAX, "heads of {key_dim} and {value_dim}");
        assert!(value_heads.is_multiple_of(key_heads), "{value_heads} value heads, {key_heads} key heads");
        let (heads, gates) = (t * key_heads, t * value_heads);
        let [q, k] = [(); 2].map(|()| cuda.uninit(heads * key_dim));
        let [q_factor, k_factor] = [(); 2].map(|()| cuda.uninit(heads));
        let [log_decay, decay, beta] = [(); 3].map(|()| cuda.uninit(gates));
        let tokens = Tokens { cuda, inputs, shape: *shape, t, q, k, q_factor, k_factor, log_decay, decay, beta };
        Launch::new("delta_tokens")
            .grid(heads.div_ceil(WARPS), 1, 1)
            .block(THREADS)
            .arg(tokens.q.ptr())
            .arg(tokens.k.ptr())
            .arg(tokens.q_factor.ptr())
            .arg(tokens.k_factor.ptr())
            .arg(inputs.mixed.range(0, t * shape.channels()))
            .bytes(&tokens.shape_by_value())
            .arg(t as u32)
            .run(cuda);
        let launch = Launch::new("delta_gates")
            .grid(gates.div_ceil(THREADS), 1, 1)
            .block(THREADS)
            .arg(tokens.log_decay.ptr())
            .arg(tokens.decay.ptr())
            .arg(tokens.beta.ptr())
            .arg(inputs.a.range(0, gates))
            .arg(inputs.b.range(0, gates));
        tokens.rates(launch).arg(value_heads as u32).arg(t as u32).run(cuda);
        tokens
    }

    /// A_log and dt_bias with their types.
    fn rates<'k>(&self, launch: Launch<'k>) -> Launch<'k> {
        let with = |launch: Launch<'k>, w: &Weight| {
            assert!(w.rows() * w.cols() >= self.shape.value_heads, "one for each value head");
            launch.arg(w.ptr()).arg(dtype_number(w.dtype()))
        };
        with(with(launch, self.inputs.a_log), self.inputs.dt_bias)
    }

    fn shape_by_value(&self) -> Vec<u8> {
        let DeltaRule { key_heads, value_heads, key_dim, value_dim } = self.shape;
        by_value(&[], &[key_heads, value_heads, key_dim, value_dim].map(|n| n as u32))
    }

    fn by_value(&self) -> Vec<u8> {
        let pointers = [self.inputs.mixed.ptr(), self.q.ptr(), self.k.ptr(), self.decay.ptr(), self.beta.ptr()];
        // Padded to the alignment of a pointer.
        by_value(&pointers, &[self.t as u32, 0])
    }

    /// A kernel with a block for every head and [`WIDTH`] of its columns.
    fn launch(&self, kernel: [&'static str; 2]) -> Launch<'static> {
        let kernel = kernel[usize::from(self.shape.key_dim > 128)];
        Launch::new(kernel).grid(self.shape.value_heads, self.blocks(), 1).block(THREADS)
    }

    fn blocks(&self) -> usize {
        self.shape.value_dim.div_ceil(WIDTH)
    }

    /// Tokens `first..first + n` from `state` on.
    fn forward(&self, out: u64, next: u64, kept: Option<&Kept>, state: u64, first: usize, n: usize) {
        self.launch(["delta_rule_128", "delta_rule_256"])
            .arg(out)
            .arg(next)
            .bytes(&kept.map_or(by_value(&[0; 3], &[]), Kept::by_value))
            .arg(state)
            .bytes(&self.by_value())
            .bytes(&self.shape_by_value())
            .arg(first as u32)
            .arg(n as u32)
            .run(self.cuda);
    }

    /// Elements of `out`.
    fn values(&self) -> usize {
        self.t * self.shape.value_heads * self.shape.value_dim
    }
}

/// What is kept of a chunk for backward.
struct Kept {
    states: Buffer,
    delta: Buffer,
    rest: Buffer,
}

impl Kept {
    fn new(cuda: &Cuda, n: usize, shape: &DeltaRule) -> Kept {
        let values = n * shape.value_heads * shape.value_dim;
        let (states, delta, rest) = (cuda.uninit((n + 1) * shape.state()), cuda.uninit(values), cuda.uninit(values));
        Kept { states, delta, rest }
    }

    fn by_value(&self) -> Vec<u8> {
        by_value(&[self.states.ptr(), self.delta.ptr(), self.rest.ptr()], &[])
    }
}

/// See [`crate::Device::delta_rule`].
pub(super) fn delta_rule(
    cuda: &Cuda,
    out: &mut Buffer,
    next: Option<&mut Buffer>,
    inputs: &DeltaInputs<Cuda>,
    t: usize,
    shape: &DeltaRule,
) {
    let tokens = Tokens::new(cuda, inputs, t, shape);
    let next = next.map_or(0, |next| next.range(0, shape.state()));
    tokens.forward(out.range(0, tokens.values()), next, None, inputs.state.range(0, shape.state()), 0, t);
}

/// See [`crate::Device::delta_rule_backward`].
pub(super) fn delta_rule_backward(
    cuda: &Cuda,
    grads: DeltaGrads<Buffer>,
    dout: &Buffer,
    inputs: &DeltaInputs<Cuda>,
    t: usize,
    shape: &DeltaRule,
) {
    let (tokens, most) = (Tokens::new(cuda, inputs, t, shape), CHUNK.min(t));
    let (heads, blocks) = (shape.value_heads, tokens.blocks());
    let kept = Kept::new(cuda, most, shape);
    let (out, ds) = (cuda.uninit(tokens.values()), cuda.zeros(shape.state()));
    let [dq, dk] = [(); 2].map(|()| cuda.uninit(blocks * heads * most * shape.key_dim));
    let [dbeta, dg] = [(); 2].map(|()| cuda.uninit(blocks * heads * t));
    let parts = by_value(&[dq.ptr(), dk.ptr(), dbeta.ptr(), dg.ptr()], &[]);
    let dmixed = grads.mixed.range(0, t * shape.channels());
    let chunks: Vec<(usize, usize)> = (0..t).step_by(CHUNK).map(|first| (first, CHUNK.min(t - first))).collect();
    // The state at the beginning of each chunk.
    let later: Vec<Buffer> = chunks.iter().skip(1).map(|_| cuda.uninit(shape.state())).collect();
    let mut starts = vec![inputs.state.range(0, shape.state())];
    for ((first, n), next) in chunks.iter().zip(&later) {
        let start = *starts.last().expect("there is one");
        tokens.forward(out.ptr(), next.ptr(), None, start, *first, *n);
        starts.push(next.ptr());
    }
    for ((first, n), start) in chunks.into_iter().zip(starts).rev() {
        tokens.forward(out.ptr(), 0, Some(&kept), start, first, n);
        tokens
            .launch(["delta_rule_backward_128", "delta_rule_backward_256"])
            .arg(dmixed)
            .arg(ds.ptr())
            .bytes(&parts)
            .arg(dout.range(0, tokens.values()))
            .bytes(&kept.by_value())
            .bytes(&tokens.by_value())
            .bytes(&tokens.shape_by_value())
            .arg(first as u32)
            .arg(n as u32)
            .run(cuda);
        Launch::new("delta_keys_backward")
            .grid((n * shape.key_heads).div_ceil(WARPS), 1, 1)
            .block(THREADS)
            .arg(dmixed)
            .bytes(&parts)
            .bytes(&tokens.by_value())
            .arg(tokens.q_factor.ptr())
            .arg(tokens.k_factor.ptr())
            .bytes(&tokens.shape_by_value())
            .arg(first as u32)
            .arg(n as u32)
            .arg(blocks as u32)
            .run(cuda);
    }
    let launch = Launch::new("delta_gates_backward")
        .grid(heads, 1, 1)
        .block(THREADS)
        .arg(grads.a.range(0, t * heads))
        .arg(grads.b.range(0, t * heads))
        .arg(grads.a_log.range(0, heads))
        .arg(grads.dt_bias.range(0, heads))
        .bytes(&parts)
        .arg(tokens.log_decay.ptr())
        .arg(tokens.beta.ptr())
        .arg(inputs.a.range(0, t * heads));
    tokens.rates(launch).arg(heads as u32).arg(t as u32).arg(blocks as u32).run(cuda);
}
