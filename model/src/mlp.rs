//! y = down(silu(gate(x)) · up(x)): a layer's MLP, an expert, or the expert that all tokens share.
//!
//! x (n,H) · gate, up, act (n,I) · y (n,H)

use crate::forward::{Activations, Linear, Model};
use compute::{Device, Sink};
use std::sync::Arc;

/// Its matrices.
#[derive(Clone, Copy)]
pub(crate) struct Mlp {
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

/// What backward needs of its forward pass.
pub(crate) struct Activated<D: Device> {
    gate: D::Buffer,
    up: D::Buffer,
    pub act: Arc<D::Buffer>,
}

impl Mlp {
    pub fn new(module: &str, linear: impl Fn(&str) -> Linear) -> Mlp {
        let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"].map(|name| linear(&format!("{module}.{name}")));
        Mlp { gate, up, down }
    }

    pub fn linears(&self) -> [Linear; 3] {
        [self.gate, self.up, self.down]
    }
}

impl<D: Device> Model<D> {
    /// Its output for n rows.
    pub(crate) fn mlp(&self, l: &Mlp, x: &D::Buffer, n: usize, activations: Activations) -> (D::Buffer, Activated<D>) {
        let [gate, up] = self.linears(x, [l.gate, l.up], n, activations);
        let len = n * self.inner(l);
        let mut act = self.device.uninit(len);
        self.device.swiglu(&mut act, &gate, &up, len);
        let y = self.linear(&act, l.down, n, activations);
        (y, Activated { gate, up, act: Arc::new(act) })
    }

    /// dy (n,H) gives dx (n,H).
    pub(crate) fn mlp_backward(
        &self,
        l: &Mlp,
        saved: &Activated<D>,
        x: &Arc<D::Buffer>,
        dy: &Arc<D::Buffer>,
        n: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let dact = self.linear_backward(&saved.act, [(l.down, dy)], n, sink);
        self.activation_backward(l, saved, x, &dact, n, sink)
    }

    /// The part of it above `down`: dact (n,I) gives dx (n,H).
    pub(crate) fn activation_backward(
        &self,
        l: &Mlp,
        saved: &Activated<D>,
        x: &Arc<D::Buffer>,
        dact: &D::Buffer,
        n: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let len = n * self.inner(l);
        let (mut dgate, mut dup) = (self.device.uninit(len), self.device.uninit(len));
        self.device.swiglu_backward(&mut dgate, &mut dup, dact, &saved.gate, &saved.up, len);
        let (dgate, dup) = (Arc::new(dgate), Arc::new(dup));
        self.linear_backward(x, [(l.gate, &dgate), (l.up, &dup)], n, sink)
    }

    /// I.
    pub(crate) fn inner(&self, l: &Mlp) -> usize {
        self.device.shape(&self.weights()[l.down.weight]).1
    }
}
