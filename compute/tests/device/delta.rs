//! The gated delta rule and the convolution before it.

use crate::machine::{Machine, on_every_device};
use crate::random::{DTYPES, F32, Random, assert_close, wide};
use crate::reference::{self, Delta};
use compute::{Convolution, DeltaGrads, DeltaInputs, DeltaRule, Dtype};
use std::sync::Arc;

on_every_device! {
    causal_conv_sees_the_tokens_before_and_none_after,
    causal_conv_backward_agrees_with_finite_differences,
    delta_rule_agrees_with_the_recurrence,
    a_state_goes_on_where_it_was_left,
    delta_rule_backward_agrees_with_finite_differences,
    delta_rule_backward_of_several_chunks_agrees_along_random_directions,
}

/// (t, channels, width): fewer tokens than the window, a width of one, and more than a task or block takes.
const CONVOLUTIONS: [(usize, usize, usize); 6] =
    [(1, 1, 4), (2, 5, 4), (7, 3, 1), (5, 300, 3), (40, 17, 4), (3, 8, 16)];

fn causal_conv_sees_the_tokens_before_and_none_after<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("causal_conv");
    for (t, channels, width) in CONVOLUTIONS {
        for dtype in DTYPES {
            let shape = Convolution { channels, width };
            let (w, w64) = r.weight(device, dtype, 1, channels * width, 1.0);
            let (x, before) = (r.normals(t * channels), r.normals((width - 1) * channels));
            let mut y = device.poisoned(t * channels + 1);
            device.causal_conv(&mut y, &device.upload(&x), &device.upload(&before), &w, t, shape);
            let (y, want) = (device.download(&y), reference::causal_conv(&wide(&x), &wide(&before), &w64, shape));
            assert_close(&y[..t * channels], &want, F32, &format!("{dtype} {t} {shape:?}"));
            assert!(y[t * channels].is_nan(), "wrote beyond {t} {shape:?}");
        }
    }
}

fn causal_conv_backward_agrees_with_finite_differences<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("causal_conv_backward");
    for (t, channels, width) in CONVOLUTIONS {
        let shape = Convolution { channels, width };
        let (w, w64) = r.weight(device, Dtype::BF16, 1, channels * width, 1.0);
        let (x, before, dy) = (r.normals(t * channels), r.normals((width - 1) * channels), r.normals(t * channels));
        let (mut dx, mut dw) = (device.poisoned(t * channels + 1), device.poisoned(channels * width + 1));
        let [on_x, on_before, on_dy] = [&x, &before, &dy].map(|x| device.upload(x));
        device.causal_conv_backward(&mut dx, &mut dw, &on_dy, &on_x, &on_before, &w, t, shape);
        let (x, before, dy) = (wide(&x), wide(&before), wide(&dy));
        let loss = |x: &[f64], w: &[f64]| reference::dot(&reference::causal_conv(x, &before, w, shape), &dy);
        let (dx, dw) = (device.download(&dx), device.download(&dw));
        let all: Vec<usize> = (0..x.len()).collect();
        let want = reference::gradient(&x, &all, |x| loss(x, &w64));
        assert_close(&dx[..x.len()], &want, F32, &format!("{t} {shape:?} dx"));
        let all: Vec<usize> = (0..w64.len()).collect();
        let want = reference::gradient(&w64, &all, |w| loss(&x, w));
        assert_close(&dw[..w64.len()], &want, F32, &format!("{t} {shape:?} dw"));
        assert!(dx[x.len()].is_nan() && dw[w64.len()].is_nan(), "wrote beyond {t} {shape:?}");
    }
}

/// Heads of odd sizes, fewer key heads than value heads, sizes that differ, longer than a block's columns, and the largest.
const RULES: [DeltaRule; 5] = [
    DeltaRule { key_heads: 1, value_heads: 1, key_dim: 1, value_dim: 1 },
    DeltaRule { key_heads: 2, value_heads: 4, key_dim: 5, value_dim: 3 },
    DeltaRule { key_heads: 1, value_heads: 3, key_dim: 17, value_dim: 37 },
    DeltaRule { key_heads: 3, value_heads: 3, key_dim: 8, value_dim: 64 },
    DeltaRule { key_heads: 1, value_heads: 2, key_dim: 130, value_dim: 33 },
];

/// Random inputs of t tokens, on the device and in f64.
struct Case<D: Machine> {
    inputs: Delta,
    mixed: D::Buffer,
    a: D::Buffer,
    b: D::Buffer,
    state: D::Buffer,
    a_log: D::Weight,
    dt_bias: D::Weight,
}

impl<D: Machine> Case<D> {
    fn new(r: &mut Random, device: &Arc<D>, t: usize, shape: &DeltaRule, dtype: Dtype) -> Case<D> {
        let heads = shape.value_heads;
        let (mixed, state) = (r.normals(t * shape.channels()), r.normals(shape.state()));
        let (a, b) = (r.normals(t * heads), r.normals(t * heads));
        let (a_log, a_log64) = r.weight(device, dtype, 1, heads, 1.0);
        let (dt_bias, dt_bias64) = r.weight(device, Dtype::F32, 1, heads, 1.0);
        Case {
            inputs: Delta {
                mixed: wide(&mixed),
                a: wide(&a),
                b: wide(&b),
                a_log: a_log64,
                dt_bias: dt_bias64,
                state: wide(&state),
            },
            mixed: device.upload(&mixed),
            a: device.upload(&a),
            b: device.upload(&b),
            state: device.upload(&state),
            a_log,
            dt_bias,
        }
    }

    fn on_device(&self) -> DeltaInputs<'_, D> {
        let Case { mixed, a, b, state, a_log, dt_bias, .. } = self;
        DeltaInputs { mixed, a, b, a_log, dt_bias, state }
    }

    /// Gradients of mixed, a, b, A_log and dt_bias, one after the other.
    fn backward(&self, device: &D, dout: &[f32], t: usize, shape: &DeltaRule) -> [Vec<f32>; 5] {
        let heads = shape.value_heads;
        let lengths = [t * shape.channels(), t * heads, t * heads, heads, heads];
        let [mut mixed, mut a, mut b, mut a_log, mut dt_bias] = lengths.map(|len| device.poisoned(len + 1));
        let grads = DeltaGrads { mixed: &mut mixed, a: &mut a, b: &mut b, a_log: &mut a_log, dt_bias: &mut dt_bias };
        device.delta_rule_backward(grads, &device.upload(dout), self.on_device(), t, shape);
        let mut all = [mixed, a, b, a_log, dt_bias].map(|x| device.download(&x));
        for (values, len) in all.iter_mut().zip(lengths) {
            assert!(values[len].is_nan(), "wrote beyond {len} of {shape:?}");
            values.truncate(len);
        }
        all
    }
}

fn delta_rule_agrees_with_the_recurrence<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("delta_rule");
    for shape in RULES {
        for (t, dtype) in [(1, Dtype::F32), (3, Dtype::F16), (70, Dtype::BF16)] {
            let case = Case::new(&mut r, device, t, &shape, dtype);
            let values = t * shape.value_heads * shape.value_dim;
            let (mut out, mut next) = (device.poisoned(values + 1), device.poisoned(shape.state() + 1));
            device.delta_rule(&mut out, Some(&mut next), case.on_device(), t, &shape);
            let (want_out, want_next) = reference::delta_rule(&case.inputs, &shape);
            let (out, next) = (device.download(&out), device.download(&next));
            assert_close(&out[..values], &want_out, F32, &format!("{dtype} {t} {shape:?} out"));
            assert_close(&next[..shape.state()], &want_next, F32, &format!("{dtype} {t} {shape:?} next"));
            assert!(out[values].is_nan() && next[shape.state()].is_nan(), "wrote beyond {t} {shape:?}");
        }
    }
}

fn a_state_goes_on_where_it_was_left<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("delta_rule state");
    let (shape, t, cut) = (RULES[2], 11, 4);
    let (channels, heads, values) = (shape.channels(), shape.value_heads, shape.value_heads * shape.value_dim);
    let case = Case::new(&mut r, device, t, &shape, Dtype::F32);
    let (mut whole, mut out, mut next) =
        (device.poisoned(t * values), device.poisoned(t * values), device.poisoned(shape.state()));
    device.delta_rule(&mut whole, None, case.on_device(), t, &shape);
    device.delta_rule(&mut out, Some(&mut next), case.on_device(), cut, &shape);
    let part = |from: &D::Buffer, row: usize| {
        let mut rest = device.zeros((t - cut) * row);
        device.copy(&mut rest, 0, from, cut * row, (t - cut) * row);
        rest
    };
    let (mixed, a, b) = (part(&case.mixed, channels), part(&case.a, heads), part(&case.b, heads));
    let rest = DeltaInputs { mixed: &mixed, a: &a, b: &b, state: &next, ..case.on_device() };
    let mut later = device.poisoned((t - cut) * values);
    device.delta_rule(&mut later, None, rest, t - cut, &shape);
    let (whole, out, later) = (device.download(&whole), device.download(&out), device.download(&later));
    assert!([&out[..cut * values], &later].concat() == whole, "the bits depend on where a context is cut");
}

fn delta_rule_backward_agrees_with_finite_differences<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("delta_rule_backward");
    for shape in &RULES[..3] {
        for (t, dtype) in [(1, Dtype::F32), (6, Dtype::BF16)] {
            let case = Case::new(&mut r, device, t, shape, dtype);
            let dout = r.normals(t * shape.value_heads * shape.value_dim);
            let got = case.backward(device, &dout, t, shape);
            let (inputs, dout) = (&case.inputs, wide(&dout));
            let loss = |inputs: &Delta| reference::dot(&reference::delta_rule(inputs, shape).0, &dout);
            let with = |values: &[f64], set: fn(&mut Delta, Vec<f64>)| {
                let mut moved = inputs.clone();
                set(&mut moved, values.to_vec());
                loss(&moved)
            };
            type Field = (&'static str, fn(&Delta) -> &Vec<f64>, fn(&mut Delta, Vec<f64>));
            let fields: [Field; 5] = [
                ("mixed", |d| &d.mixed, |d, v| d.mixed = v),
                ("a", |d| &d.a, |d, v| d.a = v),
                ("b", |d| &d.b, |d, v| d.b = v),
                ("A_log", |d| &d.a_log, |d, v| d.a_log = v),
                ("dt_bias", |d| &d.dt_bias, |d, v| d.dt_bias = v),
            ];
            for ((name, get, set), got) in fields.into_iter().zip(&got) {
                let all: Vec<usize> = (0..got.len()).collect();
                let want = reference::gradient(get(inputs), &all, |values| with(values, set));
                // A key of one element has unit length wherever it is: its gradient is 0 but for the eps.
                assert_close_or_tiny(got, &want, &format!("{dtype} {t} {shape:?} d{name}"));
            }
        }
    }
}

/// As [`assert_close`], with room for a few units of rounding where everything cancels.
fn assert_close_or_tiny(got: &[f32], want: &[f64], what: &str) {
    if want.iter().all(|w| w.abs() < 1e-5) {
        assert!(got.iter().all(|g| g.abs() < 1e-5), "{what}: {got:?}, want {want:?}");
    } else {
        assert_close(got, want, 2.0 * F32, what);
    }
}

fn delta_rule_backward_of_several_chunks_agrees_along_random_directions<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("delta_rule_backward of chunks");
    for (t, shape) in [(64, &RULES[1]), (65, &RULES[3]), (150, &RULES[2]), (9, &RULES[4])] {
        let case = Case::new(&mut r, device, t, shape, Dtype::BF16);
        let dout = r.normals(t * shape.value_heads * shape.value_dim);
        let got = case.backward(device, &dout, t, shape);
        let (inputs, dout) = (&case.inputs, wide(&dout));
        for _ in 0..8 {
            let directions = got.each_ref().map(|g| wide(&r.normals(g.len())));
            let along: f64 = got.iter().zip(&directions).map(|(g, d)| reference::dot(&wide(g), d)).sum();
            let size: f64 = got.iter().map(|g| wide(g).iter().map(|v| v * v).sum::<f64>()).sum::<f64>().sqrt();
            let want = reference::slope(&[0.0], &[1.0], |h| {
                let moved = |x: &[f64], d: &[f64]| x.iter().zip(d).map(|(x, d)| x + h[0] * d).collect();
                let moved = Delta {
                    mixed: moved(&inputs.mixed, &directions[0]),
                    a: moved(&inputs.a, &directions[1]),
                    b: moved(&inputs.b, &directions[2]),
                    a_log: moved(&inputs.a_log, &directions[3]),
                    dt_bias: moved(&inputs.dt_bias, &directions[4]),
                    state: inputs.state.clone(),
                };
                reference::dot(&reference::delta_rule(&moved, shape).0, &dout)
            });
            assert!(
                (along - want).abs() < 1e-4 * size,
                "{t} {shape:?}: {along} along a direction, want {want} (size {size})"
            );
        }
    }
}
