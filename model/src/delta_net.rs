//! A Gated DeltaNet layer (Yang et al., arXiv:2412.06464), as transformers computes Qwen3.5's, forward and backward.
//!
//! t rows of tokens · H hidden · C channels of queries, keys and values · V values · vh value heads
//! normed (t,H) · qkv (t,C) · z (t,V) · a, b (t,vh) · mixed = silu(conv(qkv)) (t,C) · out (t,V) of the gated delta rule ·
//! gated = norm(out)·silu(z), the norm over each head
//!
//! The context leaves the last inputs of the convolution and the state; both are constants in a window, and backward flows
//! through the states of the window alone.

use crate::config::Config;
use crate::forward::{Activations, Linear, Model};
use compute::{Convolution, DeltaGrads, DeltaInputs, DeltaRule, Device, Norm, Sink, TensorId};
use std::sync::Arc;

/// Its tensors.
pub(crate) struct DeltaLayer {
    pub qkv: Linear,
    pub z: Linear,
    pub b: Linear,
    pub a: Linear,
    pub out: Linear,
    pub conv: TensorId,
    pub a_log: TensorId,
    pub dt_bias: TensorId,
    pub norm: TensorId,
    pub convolution: Convolution,
    pub rule: DeltaRule,
}

/// What backward needs of its forward pass, and what the cache keeps.
pub(crate) struct Recurred<D: Device> {
    pub qkv: D::Buffer,
    z: D::Buffer,
    a: D::Buffer,
    b: D::Buffer,
    mixed: D::Buffer,
    out: D::Buffer,
    normed_out: D::Buffer,
    gated: Arc<D::Buffer>,
}

/// The inputs of a convolution before the window, and the state.
#[derive(Clone, Copy)]
pub(crate) struct State<'a, B> {
    pub before: &'a B,
    pub state: &'a B,
}

impl DeltaLayer {
    pub fn new(config: &Config, linear: impl Fn(&str) -> Linear, id: impl Fn(&str) -> Option<TensorId>) -> Self {
        let delta = config.decoder.delta_net.as_ref().expect("the layer is one");
        let id = |name: &str| id(&format!("linear_attn.{name}")).expect("every layer has its vectors");
        DeltaLayer {
            qkv: linear("linear_attn.in_proj_qkv"),
            z: linear("linear_attn.in_proj_z"),
            b: linear("linear_attn.in_proj_b"),
            a: linear("linear_attn.in_proj_a"),
            out: linear("linear_attn.out_proj"),
            conv: id("conv1d.weight"),
            a_log: id("A_log"),
            dt_bias: id("dt_bias"),
            norm: id("norm.weight"),
            convolution: Convolution { channels: delta.channels(), width: delta.conv_width },
            rule: DeltaRule {
                key_heads: delta.key_heads,
                value_heads: delta.value_heads,
                key_dim: delta.key_dim,
                value_dim: delta.value_dim,
            },
        }
    }

    pub fn linears(&self) -> [Linear; 5] {
        [self.qkv, self.z, self.b, self.a, self.out]
    }

    pub fn vectors(&self) -> [TensorId; 4] {
        [self.conv, self.a_log, self.dt_bias, self.norm]
    }

    /// Elements of `out`.
    fn values(&self, t: usize) -> usize {
        t * self.rule.value_heads * self.rule.value_dim
    }
}

impl<D: Device> Model<D> {
    /// The output (t,H) of t tokens after `state`, and the state after them where it is wanted.
    pub(crate) fn recur(
        &self,
        l: &DeltaLayer,
        normed: &D::Buffer,
        state: State<D::Buffer>,
        t: usize,
        activations: Activations,
        want_state: bool,
    ) -> (D::Buffer, Recurred<D>, Option<D::Buffer>) {
        let [qkv, z, b, a] = self.linears(normed, [l.qkv, l.z, l.b, l.a], t, activations);
        let mixed = self.mixed(l, &qkv, state.before, t);
        let mut out = self.device.uninit(l.values(t));
        let mut next = want_state.then(|| self.device.uninit(l.rule.state()));
        self.device.delta_rule(&mut out, next.as_mut(), self.delta_inputs(l, &mixed, &a, &b, state.state), t, &l.rule);
        let mut normed_out = self.device.uninit(l.values(t));
        self.device.rms_norm(&mut normed_out, &out, &self.weights()[l.norm], self.plain_norm(), t * l.rule.value_heads);
        let mut gated = self.device.uninit(l.values(t));
        self.device.swiglu(&mut gated, &z, &normed_out, l.values(t));
        let y = self.linear(&gated, l.out, t, activations);
        let gated = Arc::new(gated);
        (y, Recurred { qkv, z, a, b, mixed, out, normed_out, gated }, next)
    }

    /// The inputs of the convolution and the state after t tokens, alone.
    pub(crate) fn advance(
        &self,
        l: &DeltaLayer,
        normed: &D::Buffer,
        state: State<D::Buffer>,
        t: usize,
        activations: Activations,
    ) -> (D::Buffer, D::Buffer) {
        let [qkv, b, a] = self.linears(normed, [l.qkv, l.b, l.a], t, activations);
        let mixed = self.mixed(l, &qkv, state.before, t);
        let (mut out, mut next) = (self.device.uninit(l.values(t)), self.device.uninit(l.rule.state()));
        self.device.delta_rule(
            &mut out,
            Some(&mut next),
            self.delta_inputs(l, &mixed, &a, &b, state.state),
            t,
            &l.rule,
        );
        (qkv, next)
    }

    fn mixed(&self, l: &DeltaLayer, qkv: &D::Buffer, before: &D::Buffer, t: usize) -> D::Buffer {
        let mut mixed = self.device.uninit(t * l.convolution.channels);
        self.device.causal_conv(&mut mixed, qkv, before, &self.weights()[l.conv], t, l.convolution);
        mixed
    }

    fn delta_inputs<'a>(
        &'a self,
        l: &DeltaLayer,
        mixed: &'a D::Buffer,
        a: &'a D::Buffer,
        b: &'a D::Buffer,
        state: &'a D::Buffer,
    ) -> DeltaInputs<'a, D> {
        let (a_log, dt_bias) = (&self.weights()[l.a_log], &self.weights()[l.dt_bias]);
        DeltaInputs { mixed, a, b, a_log, dt_bias, state }
    }

    /// The norm of the output's heads has its gain as the files hold it.
    fn plain_norm(&self) -> Norm {
        Norm { eps: self.config().rms_norm_eps, offset: 0.0 }
    }

    /// dy (t,H) of the output gives that of the normed input.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn recur_backward(
        &self,
        l: &DeltaLayer,
        saved: &Recurred<D>,
        normed: &Arc<D::Buffer>,
        dy: &Arc<D::Buffer>,
        state: State<D::Buffer>,
        t: usize,
        sink: &mut impl Sink<D>,
    ) -> D::Buffer {
        let (values, heads, rows) = (l.values(t), l.rule.value_heads, t * l.rule.value_heads);
        let uninit = |len| self.device.uninit(len);
        let dgated = self.linear_backward(&saved.gated, [(l.out, dy)], t, sink);
        let (mut dz, mut dnormed_out) = (uninit(values), uninit(values));
        self.device.swiglu_backward(&mut dz, &mut dnormed_out, &dgated, &saved.z, &saved.normed_out, values);
        let (mut dout, mut dnorm) = (self.device.zeros(values), uninit(l.rule.value_dim));
        let gain = &self.weights()[l.norm];
        self.device.rms_norm_backward(&mut dout, &mut dnorm, &dnormed_out, &saved.out, gain, self.plain_norm(), rows);
        let (mut dmixed, mut da, mut db) = (uninit(t * l.convolution.channels), uninit(rows), uninit(rows));
        let (mut da_log, mut ddt_bias) = (uninit(heads), uninit(heads));
        let Recurred { mixed, a, b, .. } = saved;
        self.device.delta_rule_backward(
            DeltaGrads { mixed: &mut dmixed, a: &mut da, b: &mut db, a_log: &mut da_log, dt_bias: &mut ddt_bias },
            &dout,
            self.delta_inputs(l, mixed, a, b, state.state),
            t,
            &l.rule,
        );
        let Convolution { channels, width } = l.convolution;
        let (mut dqkv, mut dconv) = (uninit(t * channels), uninit(channels * width));
        let conv = &self.weights()[l.conv];
        self.device.causal_conv_backward(
            &mut dqkv,
            &mut dconv,
            &dmixed,
            &saved.qkv,
            state.before,
            conv,
            t,
            l.convolution,
        );
        for (tensor, g) in [(l.norm, dnorm), (l.conv, dconv), (l.a_log, da_log), (l.dt_bias, ddt_bias)] {
            if sink.wants(tensor) {
                sink.dense(tensor, &Arc::new(g));
            }
        }
        let (dqkv, dz, db, da) = (Arc::new(dqkv), Arc::new(dz), Arc::new(db), Arc::new(da));
        self.linear_backward(normed, [(l.qkv, &dqkv), (l.z, &dz), (l.b, &db), (l.a, &da)], t, sink)
    }
}
