//! A layer's attention, forward and backward.
//!
//! t rows of tokens · H hidden · h heads, g kv_heads, d head_dim
//! normed (t,H) · q (t,h·d), k, v (t,g·d) · attended (t,h·d) · gate (t,h·d) where the model has one · out = attended·σ(gate)

use crate::config::Config;
use crate::forward::{Activations, Linear, Model};
use compute::{Attention, AttentionGrads, AttentionSaved, Columns, Device, Heads, Past, Sink, TensorId};
use std::sync::Arc;

/// Its tensors.
pub(crate) struct AttentionLayer {
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub q_norm: Option<TensorId>,
    pub k_norm: Option<TensorId>,
    /// Whether q makes the output's gate besides: of each head d queries, then d gates.
    pub gated: bool,
    pub shape: Attention,
}

/// What backward needs of its forward pass.
pub(crate) struct Attended<D: Device> {
    /// Queries and keys before their norm; absent without one.
    raw: Option<(D::Buffer, D::Buffer)>,
    q: D::Buffer,
    pub k: D::Buffer,
    pub v: D::Buffer,
    attended: Arc<D::Buffer>,
    lse: D::Buffer,
    gate: Option<D::Buffer>,
    out: Arc<D::Buffer>,
}

/// Queries and keys after norm and rope, and values.
struct Projected<D: Device> {
    raw: Option<(D::Buffer, D::Buffer)>,
    q: D::Buffer,
    k: D::Buffer,
    v: D::Buffer,
    gate: Option<D::Buffer>,
}

impl AttentionLayer {
    pub fn new(
        config: &Config,
        layer: usize,
        linear: impl Fn(&str) -> Linear,
        id: impl Fn(&str) -> Option<TensorId>,
    ) -> Self {
        let d = &config.decoder;
        AttentionLayer {
            q: linear("self_attn.q_proj"),
            k: linear("self_attn.k_proj"),
            v: linear("self_attn.v_proj"),
            o: linear("self_attn.o_proj"),
            q_norm: id("self_attn.q_norm.weight"),
            k_norm: id("self_attn.k_norm.weight"),
            gated: d.output_gate,
            shape: Attention {
                heads: d.heads,
                kv_heads: d.kv_heads,
                head_dim: d.head_dim,
                window: config.windows[layer],
                scale: 1.0 / (d.head_dim as f32).sqrt(),
            },
        }
    }

    pub fn linears(&self) -> [Linear; 4] {
        [self.q, self.k, self.v, self.o]
    }

    pub fn norms(&self) -> impl Iterator<Item = TensorId> {
        [self.q_norm, self.k_norm].into_iter().flatten()
    }
}

impl<D: Device> Model<D> {
    /// The output (t,H) of t tokens that follow `past`.
    pub(crate) fn attend(
        &self,
        l: &AttentionLayer,
        normed: &D::Buffer,
        past: Past<D>,
        t: usize,
        activations: Activations,
    ) -> (D::Buffer, Attended<D>) {
        let len = t * l.shape.heads * l.shape.head_dim;
        let Projected { raw, q, k, v, gate } = self.project(l, normed, past.len, t, activations);
        let (mut attended, mut lse) = (self.device.uninit(len), self.device.uninit(t * l.shape.heads));
        self.device.attention(&mut attended, &mut lse, &q, &k, &v, past, t, &l.shape);
        let attended = Arc::new(attended);
        let out = match &gate {
            None => attended.clone(),
            Some(gate) => {
                let mut out = self.device.uninit(len);
                self.device.sigmoid_gate(&mut out, &attended, gate, len);
                Arc::new(out)
            }
        };
        let y = self.linear(&out, l.o, t, activations);
        (y, Attended { raw, q, k, v, attended, lse, gate, out })
    }

    fn project(
        &self,
        l: &AttentionLayer,
        normed: &D::Buffer,
        position: &D::Ids,
        t: usize,
        activations: Activations,
    ) -> Projected<D> {
        let Attention { heads, kv_heads, head_dim: d, .. } = l.shape;
        let [q, raw_k, v] = self.linears(normed, [l.q, l.k, l.v], t, activations);
        let (raw_q, gate) = if l.gated {
            let half = |first: usize| {
                let mut half = self.device.uninit(t * heads * d);
                let (to, from) = (Columns { first: 0, of: d }, Columns { first, of: 2 * d });
                self.device.copy_columns(&mut half, to, &q, from, d, t * heads);
                half
            };
            (half(0), Some(half(d)))
        } else {
            (q, None)
        };
        let q = self.rotated(&raw_q, l.q_norm, position, t, self.heads(heads));
        let k = self.rotated(&raw_k, l.k_norm, position, t, self.heads(kv_heads));
        let raw = l.q_norm.is_some().then_some((raw_q, raw_k));
        Projected { raw, q, k, v, gate }
    }

    /// Keys and values alone.
    pub(crate) fn project_keys(
        &self,
        l: &AttentionLayer,
        normed: &D::Buffer,
        position: &D::Ids,
        t: usize,
        activations: Activations,
    ) -> (D::Buffer, D::Buffer) {
        let [raw_k, v] = self.linears(normed, [l.k, l.v], t, activations);
        (self.rotated(&raw_k, l.k_norm, position, t, self.heads(l.shape.kv_heads)), v)
    }

    fn heads(&self, count: usize) -> Heads {
        Heads { count, dim: self.config().decoder.head_dim, rotated: 2 * self.config().rope.frequencies.len() }
    }

    /// Head norm, if there is one, and rope of queries or keys (t,heads·d) at position..position + t.
    fn rotated(&self, raw: &D::Buffer, norm: Option<TensorId>, position: &D::Ids, t: usize, heads: Heads) -> D::Buffer {
        let mut y = match norm {
            Some(norm) => self.norm(raw, norm, t * heads.count),
            None => {
                let len = t * heads.count * heads.dim;
                let mut y = self.device.uninit(len);
                self.device.copy(&mut y, 0, raw, 0, len);
                y
            }
        };
        self.device.rope(&mut y, &self.rope, position, t, heads, false);
        y
    }

    /// dy (t,H) of the output gives that of the normed input.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attend_backward(
        &self,
        l: &AttentionLayer,
        saved: &Attended<D>,
        normed: &Arc<D::Buffer>,
        dy: &Arc<D::Buffer>,
        past: Past<D>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let Attention { heads, kv_heads, head_dim: d, .. } = l.shape;
        let (queries, keys) = (t * heads * d, t * kv_heads * d);
        let uninit = |len| self.device.uninit(len);
        let dout = self.linear_backward(&saved.out, [(l.o, dy)], t, sink);
        let (dattended, dgate) = match &saved.gate {
            None => (dout, None),
            Some(gate) => {
                let (mut dattended, mut dgate) = (uninit(queries), uninit(queries));
                self.device.sigmoid_gate_backward(&mut dattended, &mut dgate, &dout, &saved.attended, gate, queries);
                (dattended, Some(dgate))
            }
        };
        let (mut dq, mut dk, mut dv) = (uninit(queries), uninit(keys), uninit(keys));
        let Attended { q, k, v, attended, lse, .. } = saved;
        self.device.attention_backward(
            AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv },
            AttentionSaved { dout: &dattended, out: attended, lse, q, k, v, past },
            t,
            &l.shape,
        );
        self.device.rope(&mut dq, &self.rope, past.len, t, self.heads(heads), true);
        self.device.rope(&mut dk, &self.rope, past.len, t, self.heads(kv_heads), true);
        if let Some((raw_q, raw_k)) = &saved.raw {
            dq = self.head_norm_backward(dq, raw_q, l.q_norm, t * heads, sink);
            dk = self.head_norm_backward(dk, raw_k, l.k_norm, t * kv_heads, sink);
        }
        if let Some(dgate) = dgate {
            let mut both = uninit(2 * queries);
            for (first, half) in [(0, &dq), (d, &dgate)] {
                let (to, from) = (Columns { first, of: 2 * d }, Columns { first: 0, of: d });
                self.device.copy_columns(&mut both, to, half, from, d, t * heads);
            }
            dq = both;
        }
        let (dq, dk, dv) = (Arc::new(dq), Arc::new(dk), Arc::new(dv));
        self.linear_backward(normed, [(l.q, &dq), (l.k, &dk), (l.v, &dv)], t, sink)
    }

    /// Through the norm of each head of queries or keys, if the model has one.
    fn head_norm_backward(
        &self,
        dy: D::Buffer,
        raw: &D::Buffer,
        norm: Option<TensorId>,
        rows: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let Some(norm) = norm else { return dy };
        let mut dx = self.device.zeros(self.device.len(&dy));
        self.norm_backward(&mut dx, &dy, raw, norm, rows, sink);
        dx
    }
}
