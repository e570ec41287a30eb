//! Backward through the window: from the gradient of the logits to gradient events.
//!
//! Residual gradients flow from layer to layer as dx (t,H). Nothing of the context gets a gradient,
//! and the pass ends at the lowest layer in which somebody wants one.

use crate::forward::{Activations, Linear, Model, Saved};
use compute::{AttentionGrads, AttentionSaved, Device, Past, Sink, TensorId};
use std::sync::Arc;

impl<D: Device> Model<D> {
    /// Head and final norm: events for both, and dx (t,H) of the last layer's output.
    pub(crate) fn head_backward(
        &self,
        x: &D::Buffer,
        normed: &Arc<D::Buffer>,
        dlogits: &Arc<D::Buffer>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        if sink.wants(self.head) {
            sink.linear(self.head, normed, dlogits, t);
        }
        let hidden = self.config().decoder.hidden;
        let dnormed = self.dx(&[(&**dlogits, &self.weights()[self.head])], t);
        let mut dx = self.device.zeros(t * hidden);
        self.norm_backward(&mut dx, &dnormed, x, self.norm, t, sink);
        Arc::new(dx)
    }

    /// Whether backward has to go below `layer`.
    pub(crate) fn wanted_below(&self, layer: usize, sink: &impl Sink<D>) -> bool {
        if sink.wants(self.embed) {
            return true;
        }
        let wants = |l: Linear| sink.wants(l.weight) || l.bias.is_some_and(|b| sink.wants(b));
        self.layers[..layer].iter().any(|l| {
            [l.q, l.k, l.v, l.o, l.gate, l.up, l.down].into_iter().any(wants)
                || [Some(l.input_norm), Some(l.post_norm), l.q_norm, l.k_norm]
                    .into_iter()
                    .flatten()
                    .any(|norm| sink.wants(norm))
        })
    }

    /// One layer: dy (t,H) of its output gives dx of its input.
    pub(crate) fn layer_backward(
        &self,
        layer: usize,
        saved: &Saved<D>,
        dy: Arc<D::Buffer>,
        past: Past<D>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        let dmid = self.mlp_backward(layer, saved, dy, t, sink);
        self.attention_backward(layer, saved, dmid, past, t, sink)
    }

    /// y = mid + down(silu(gate(n)) · up(n)), n = norm(mid): dy gives dmid.
    fn mlp_backward(
        &self,
        layer: usize,
        saved: &Saved<D>,
        dy: Arc<D::Buffer>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        let l = &self.layers[layer];
        let len = t * self.config().decoder.intermediate;
        let dact = self.linear_backward(&saved.act, [(l.down, &dy)], t, sink);
        let (mut dgate, mut dup) = (self.device.uninit(len), self.device.uninit(len));
        self.device.swiglu_backward(&mut dgate, &mut dup, &dact, &saved.gate, &saved.up, len);
        let (dgate, dup) = (Arc::new(dgate), Arc::new(dup));
        let dnormed = self.linear_backward(&saved.normed_mid, [(l.gate, &dgate), (l.up, &dup)], t, sink);
        let mut dmid = self.copy_of(&dy);
        self.norm_backward(&mut dmid, &dnormed, &saved.mid, l.post_norm, t, sink);
        Arc::new(dmid)
    }

    /// mid = x + o(attention(rope(q), rope(k), v)) with q, k, v from norm(x): dmid gives dx.
    fn attention_backward(
        &self,
        layer: usize,
        saved: &Saved<D>,
        dmid: Arc<D::Buffer>,
        past: Past<D>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        let l = &self.layers[layer];
        let shape = &l.attention;
        let dout = self.linear_backward(&saved.out, [(l.o, &dmid)], t, sink);
        let (queries, keys) = (t * shape.heads * shape.head_dim, t * shape.kv_heads * shape.head_dim);
        let uninit = |len| self.device.uninit(len);
        let (mut dq, mut dk, mut dv) = (uninit(queries), uninit(keys), uninit(keys));
        self.device.attention_backward(
            AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv },
            AttentionSaved {
                dout: &dout,
                out: &saved.out,
                lse: &saved.lse,
                q: &saved.q,
                k: &saved.k,
                v: &saved.v,
                past,
            },
            t,
            shape,
        );
        let position = past.len;
        self.device.rope(&mut dq, &self.rope, position, t, shape.heads, shape.head_dim, true);
        self.device.rope(&mut dk, &self.rope, position, t, shape.kv_heads, shape.head_dim, true);
        if let Some((raw_q, raw_k)) = &saved.raw {
            dq = self.head_norm_backward(dq, raw_q, l.q_norm, t * shape.heads, sink);
            dk = self.head_norm_backward(dk, raw_k, l.k_norm, t * shape.kv_heads, sink);
        }
        let (dq, dk, dv) = (Arc::new(dq), Arc::new(dk), Arc::new(dv));
        let dnormed = self.linear_backward(&saved.normed, [(l.q, &dq), (l.k, &dk), (l.v, &dv)], t, sink);
        let mut dx = self.copy_of(&dmid);
        self.norm_backward(&mut dx, &dnormed, &saved.x, l.input_norm, t, sink);
        Arc::new(dx)
    }

    /// Events of layers that share their input x, each with the gradient of its outputs, and dx (t,n).
    fn linear_backward<const N: usize>(
        &self,
        x: &Arc<D::Buffer>,
        layers: [(Linear, &Arc<D::Buffer>); N],
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        for (linear, dy) in layers {
            if sink.wants(linear.weight) {
                sink.linear(linear.weight, x, dy, t);
            }
            if let Some(bias) = linear.bias.filter(|b| sink.wants(*b)) {
                let m = self.device.shape(&self.weights()[linear.weight]).0;
                let mut db = self.device.uninit(m);
                self.device.sum_rows(&mut db, dy, t, m);
                sink.dense(bias, &Arc::new(db));
            }
        }
        let inputs = layers.map(|(linear, dy)| (&**dy, &self.weights()[linear.weight]));
        self.dx(&inputs, t)
    }

    /// dx (t,n) = Σ dy W over pairs (dy, W).
    fn dx(&self, inputs: &[(&D::Buffer, &D::Weight)], t: usize) -> D::Buffer {
        let mut dx = self.device.uninit(t * self.device.shape(inputs[0].1).1);
        match self.windows {
            Activations::Exact => self.device.linear_dx_group(&mut dx, inputs, t),
            Activations::Rounded => self.device.linear_dx_group_rounded(&mut dx, inputs, t),
        }
        dx
    }

    /// dx += gradient of a norm's input, and the event of its gain.
    fn norm_backward(
        &self,
        dx: &mut D::Buffer,
        dy: &D::Buffer,
        x: &D::Buffer,
        norm: TensorId,
        rows: usize,
        sink: &mut impl Sink<D>,
    ) {
        let w = &self.weights()[norm];
        let mut dw = self.device.uninit(self.device.shape(w).1);
        self.device.rms_norm_backward(dx, &mut dw, dy, x, w, self.config().rms_norm_eps, rows);
        if sink.wants(norm) {
            sink.dense(norm, &Arc::new(dw));
        }
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

    fn copy_of(&self, buffer: &D::Buffer) -> D::Buffer {
        let len = self.device.len(buffer);
        let mut copy = self.device.uninit(len);
        self.device.copy(&mut copy, 0, buffer, 0, len);
        copy
    }
}
