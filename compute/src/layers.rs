//! What the operations of a layer take.

use crate::Device;

/// Constants of a norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the gain.
    pub offset: f32,
}

/// Heads of one token, and how many elements of each rotate: an even number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// How many.
    pub count: usize,
    /// Elements of one.
    pub dim: usize,
    /// Elements that rotate, from the first on.
    pub rotated: usize,
}

/// Columns of a row-major matrix, from `first` on, whose rows have `of` elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The first of them.
    pub first: usize,
    /// Elements of a row.
    pub of: usize,
}

/// Shape of a causal convolution of each channel by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// C.
    pub channels: usize,
    /// K: tokens that an output sees, its own included; at most 16.
    pub width: usize,
}

/// Shape of a gated delta rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaRule {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of it.
    pub value_heads: usize,
    /// Elements of a query or key head; at most 256.
    pub key_dim: usize,
    /// Elements of a value head; at most 256.
    pub value_dim: usize,
}

impl DeltaRule {
    /// Queries, keys and values of one token.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
    }

    /// Elements of the state, (value_heads, key_dim, value_dim).
    pub fn state(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim
    }
}

/// Inputs of [`Device::delta_rule`] and its backward.
pub struct DeltaInputs<'a, D: Device> {
    /// Queries, keys and values of each token, (t, channels), not normalised.
    pub mixed: &'a D::Buffer,
    /// What the decay is made of, (t, value_heads).
    pub a: &'a D::Buffer,
    /// What the strength of a write is made of, (t, value_heads).
    pub b: &'a D::Buffer,
    /// Logarithm of the decay's rate, (value_heads).
    pub a_log: &'a D::Weight,
    /// Added to a, (value_heads).
    pub dt_bias: &'a D::Weight,
    /// The state before the first token, (value_heads, key_dim, value_dim).
    pub state: &'a D::Buffer,
}

impl<D: Device> Clone for DeltaInputs<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for DeltaInputs<'_, D> {}

/// Outputs of [`Device::delta_rule_backward`].
pub struct DeltaGrads<'a, B> {
    /// (t, channels)
    pub mixed: &'a mut B,
    /// (t, value_heads)
    pub a: &'a mut B,
    /// (t, value_heads)
    pub b: &'a mut B,
    /// (value_heads)
    pub a_log: &'a mut B,
    /// (value_heads)
    pub dt_bias: &'a mut B,
}

/// Shape of one attention operation, the same for forward and backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; `heads` is a multiple of it (grouped-query attention).
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Sliding window: a query at position p sees keys at positions > p - window. `None`: all.
    pub window: Option<usize>,
    /// Factor on q·k, 1/sqrt(head_dim) in every supported family.
    pub scale: f32,
}

/// Keys and values of the frozen context: `len` rows of (kv_heads · head_dim), at positions 0..len.
pub struct Past<'a, D: Device> {
    /// Keys after rope, at least `len` rows.
    pub keys: &'a D::Stored,
    /// Values, at least `len` rows.
    pub values: &'a D::Stored,
    /// Number of rows that count: one element.
    pub len: &'a D::Ids,
}

impl<D: Device> Clone for Past<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Past<'_, D> {}

/// Outputs of [`Device::attention_backward`].
pub struct AttentionGrads<'a, B> {
    /// (t, heads·head_dim)
    pub dq: &'a mut B,
    /// (t, kv_heads·head_dim)
    pub dk: &'a mut B,
    /// (t, kv_heads·head_dim)
    pub dv: &'a mut B,
}

/// Inputs of [`Device::attention_backward`]: what forward saw and left, and the gradient of out.
pub struct AttentionSaved<'a, D: Device> {
    /// Gradient of out, (t, heads·head_dim).
    pub dout: &'a D::Buffer,
    /// Forward's output; a backend may compute what it needs of it again.
    pub out: &'a D::Buffer,
    /// Forward's log-sum-exp, (heads, t); likewise.
    pub lse: &'a D::Buffer,
    /// Queries after rope.
    pub q: &'a D::Buffer,
    /// Keys after rope.
    pub k: &'a D::Buffer,
    /// Values.
    pub v: &'a D::Buffer,
    /// The frozen context.
    pub past: Past<'a, D>,
}

/// One product of [`Device::linear_group`].
pub struct LinearOutput<'a, D: Device> {
    /// (t,m)
    pub y: &'a mut D::Buffer,
    /// (m,n)
    pub w: &'a D::Weight,
    /// (m)
    pub bias: Option<&'a D::Weight>,
}

/// Target of a row that has none: padding.
pub const NO_TARGET: u32 = u32::MAX;
