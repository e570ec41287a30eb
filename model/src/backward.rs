//! Backward through the window: from the gradient of the logits to gradient events.
//!
//! Residual gradients flow from layer to layer as dx (t,H). Nothing of the context gets a gradient,
//! and the pass ends at the lowest layer in which somebody wants one.

use crate::cache::Context;
use crate::delta_net::State;
use crate::forward::{Activations, Fed, Feed, Linear, Mixed, Mixer, Model, Saved};
use compute::{Device, Sink, TensorId};
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
        self.layers[..layer].iter().any(|l| l.tensors().into_iter().any(|tensor| sink.wants(tensor)))
    }

    /// One layer: dy (t,H) of its output gives dx of its input.
    pub(crate) fn layer_backward(
        &self,
        layer: usize,
        saved: &Saved<D>,
        dy: Arc<D::Buffer>,
        context: Context<D>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        let dmid = self.feed_backward(layer, saved, dy, t, sink);
        self.mixer_backward(layer, saved, dmid, context, t, sink)
    }

    /// y = mid + fed(norm(mid)): dy gives dmid.
    fn feed_backward(
        &self,
        layer: usize,
        saved: &Saved<D>,
        dy: Arc<D::Buffer>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        let l = &self.layers[layer];
        let dnormed = match (&l.feed, &saved.fed) {
            (Feed::Mlp(mlp), Fed::Mlp(fed)) => self.mlp_backward(mlp, fed, &saved.normed_mid, &dy, t, sink),
            (Feed::Experts(l), Fed::Experts(fed)) => self.experts_backward(l, fed, &saved.normed_mid, &dy, t, sink),
            _ => unreachable!("a layer keeps what it needs"),
        };
        let mut dmid = self.copy_of(&dy);
        self.norm_backward(&mut dmid, &dnormed, &saved.mid, l.post_norm, t, sink);
        Arc::new(dmid)
    }

    /// mid = x + mixed(norm(x)): dmid gives dx.
    fn mixer_backward(
        &self,
        layer: usize,
        saved: &Saved<D>,
        dmid: Arc<D::Buffer>,
        context: Context<D>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> Arc<D::Buffer> {
        let l = &self.layers[layer];
        let dnormed = match (&l.mixer, &saved.mixed, context) {
            (Mixer::Attention(l), Mixed::Attention(mixed), Context::Keys(past)) => {
                self.attend_backward(l, mixed, &saved.normed, &dmid, past, t, sink)
            }
            (Mixer::DeltaNet(l), Mixed::DeltaNet(mixed, _), Context::State { before, state }) => {
                self.recur_backward(l, mixed, &saved.normed, &dmid, State { before, state }, t, sink)
            }
            _ => unreachable!("a layer sees what it has left"),
        };
        let mut dx = self.copy_of(&dmid);
        self.norm_backward(&mut dx, &dnormed, &saved.x, l.input_norm, t, sink);
        Arc::new(dx)
    }

    /// Events of layers that share their input x, each with the gradient of its outputs, and dx (t,n).
    pub(crate) fn linear_backward<const N: usize>(
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
    pub(crate) fn dx(&self, inputs: &[(&D::Buffer, &D::Weight)], t: usize) -> D::Buffer {
        let mut dx = self.device.uninit(t * self.device.shape(inputs[0].1).1);
        match self.windows {
            Activations::Exact => self.device.linear_dx_group(&mut dx, inputs, t),
            Activations::Rounded => self.device.linear_dx_group_rounded(&mut dx, inputs, t),
        }
        dx
    }

    /// dx += gradient of a norm's input, and the event of its gain.
    pub(crate) fn norm_backward(
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
        self.device.rms_norm_backward(dx, &mut dw, dy, x, w, self.norms(), rows);
        if sink.wants(norm) {
            sink.dense(norm, &Arc::new(dw));
        }
    }

    pub(crate) fn copy_of(&self, buffer: &D::Buffer) -> D::Buffer {
        let len = self.device.len(buffer);
        let mut copy = self.device.uninit(len);
        self.device.copy(&mut copy, 0, buffer, 0, len);
        copy
    }
}
