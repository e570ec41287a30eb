//! Attention forward against its definition, backward against finite differences of the definition.

use crate::machine::{Machine, on_every_device};
use crate::random::{F32, Random, assert_close, poison, wide};
use crate::reference;
use compute::{Attention, AttentionGrads, AttentionSaved, Past};
use std::sync::Arc;

on_every_device! {
    attention_agrees_with_its_definition,
    attention_with_scores_of_hundreds_stays_exact,
    attention_does_not_look_beyond_the_length,
    attention_backward_agrees_with_finite_differences,
    a_query_that_sees_one_key_gives_queries_and_keys_a_gradient_of_exactly_zero,
    rows_of_padding_change_nothing_for_the_rows_before,
}

/// One shape: t window queries after `past` frozen rows.
#[derive(Clone, Copy, Debug)]
struct Case {
    t: usize,
    past: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

const fn case(t: usize, past: usize, heads: usize, kv_heads: usize, head_dim: usize, window: usize) -> Case {
    Case { t, past, heads, kv_heads, head_dim, window: if window == 0 { None } else { Some(window) } }
}

/// A window of 0 stands for none.
const CASES: [Case; 32] = [
    case(1, 0, 1, 1, 1, 0),
    case(1, 5, 2, 1, 6, 0),
    case(7, 0, 6, 2, 5, 0),
    case(5, 9, 4, 4, 8, 0),
    // Window shorter than the context, and a query that sees only itself.
    case(5, 9, 4, 2, 8, 4),
    case(6, 3, 3, 1, 4, 1),
    // Window of exactly the context, one less, one more, and longer than everything.
    case(4, 9, 2, 1, 4, 9),
    case(4, 9, 2, 1, 4, 8),
    case(4, 9, 2, 1, 4, 10),
    case(4, 9, 2, 1, 4, 13),
    case(4, 9, 2, 1, 4, 100),
    // Window smaller than t: the last queries see nothing of the past.
    case(20, 6, 4, 2, 6, 7),
    // More queries than one block of 64, with and without past and window.
    case(64, 3, 2, 1, 4, 0),
    case(65, 0, 2, 1, 4, 0),
    case(131, 10, 4, 2, 6, 0),
    case(131, 10, 4, 2, 6, 20),
    case(150, 40, 2, 2, 4, 65),
    // A long past.
    case(3, 1500, 2, 1, 16, 0),
    // One that is cut into more parts than a warp has lanes.
    case(2, 2500, 2, 1, 12, 0),
    // The sizes of heads that models have, and sizes beyond.
    case(5, 70, 4, 2, 64, 0),
    case(9, 21, 2, 1, 96, 0),
    case(17, 150, 8, 2, 128, 0),
    case(17, 150, 5, 1, 128, 90),
    case(3, 65, 2, 2, 256, 0),
    case(3, 5, 1, 1, 300, 0),
    case(33, 31, 2, 1, 70, 0),
    // As many keys and queries as whole tiles.
    case(64, 64, 2, 1, 20, 0),
    // So many heads that a GPU has work without cutting the keys finely, or at all: several tiles in a row.
    case(3, 200, 140, 140, 4, 0),
    case(5, 400, 100, 100, 4, 150),
    case(2, 150, 140, 140, 72, 0),
    case(130, 5, 70, 70, 4, 0),
    case(130, 5, 70, 70, 4, 40),
];

#[derive(Clone)]
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    past_k: Vec<f32>,
    past_v: Vec<f32>,
}

impl Case {
    fn shape(&self) -> Attention {
        Attention {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
        }
    }
    fn queries(&self) -> usize {
        self.t * self.heads * self.head_dim
    }
    fn own(&self) -> usize {
        self.t * self.kv_heads * self.head_dim
    }
    /// Past buffers have three rows more than count.
    fn inputs(&self, r: &mut Random) -> Inputs {
        self.inputs_with_room(r, 3)
    }
    /// Past buffers have `room` rows more than count: they hold NaN, and nobody may look at them.
    fn inputs_with_room(&self, r: &mut Random, room: usize) -> Inputs {
        let row = self.kv_heads * self.head_dim;
        let past = |r: &mut Random| {
            let mut rows = r.normals(self.past * row).to_vec();
            rows.extend(poison(room * row));
            rows
        };
        Inputs {
            q: (0..self.queries()).map(|_| 2.0 * r.normal()).collect(),
            k: r.normals(self.own()).to_vec(),
            v: r.normals(self.own()).to_vec(),
            past_k: past(r),
            past_v: past(r),
        }
    }
    /// The definition's output for these q, k and v in f64.
    fn reference(&self, q: &[f64], k: &[f64], v: &[f64], i: &Inputs) -> (Vec<f64>, Vec<f64>) {
        let shape = self.shape();
        let past = reference::Past { keys: &wide(&i.past_k), values: &wide(&i.past_v), len: self.past };
        reference::attention(q, k, v, &past, self.t, &shape, shape.scale as f64)
    }
}

/// An example's inputs on the device.
struct Uploaded<D: Machine> {
    q: D::Buffer,
    k: D::Buffer,
    v: D::Buffer,
    past_k: D::Stored,
    past_v: D::Stored,
    len: D::Ids,
    out: D::Buffer,
    lse: D::Buffer,
}

impl<D: Machine> Uploaded<D> {
    /// With out and lse as forward leaves them, poisoned before.
    fn forward(device: &Arc<D>, case: &Case, i: &Inputs) -> Uploaded<D> {
        let [q, k, v] = [&i.q, &i.k, &i.v].map(|x| device.upload(x));
        let [past_k, past_v] = [&i.past_k, &i.past_v].map(|x| device.upload(x).into());
        let (out, lse) = (device.poisoned(case.queries()), device.poisoned(case.heads * case.t));
        let mut u = Uploaded { q, k, v, past_k, past_v, len: device.ids(&[case.past as u32]), out, lse };
        let past = Past { keys: &u.past_k, values: &u.past_v, len: &u.len };
        device.run(|| device.attention(&mut u.out, &mut u.lse, &u.q, &u.k, &u.v, past, case.t, &case.shape()));
        u
    }
}

fn forward<D: Machine>(device: &Arc<D>, case: &Case, i: &Inputs) -> (Vec<f32>, Vec<f32>) {
    let u = Uploaded::forward(device, case, i);
    (device.download(&u.out), device.download(&u.lse))
}

fn attention_agrees_with_its_definition<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("attention");
    for case in CASES {
        let i = case.inputs(&mut r);
        let (out, lse) = forward(device, &case, &i);
        let (want, want_lse) = case.reference(&wide(&i.q), &wide(&i.k), &wide(&i.v), &i);
        assert_close(&out, &want, F32, &format!("out of {case:?}"));
        assert_close(&lse, &want_lse, F32, &format!("lse of {case:?}"));
    }
}

fn attention_with_scores_of_hundreds_stays_exact<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("scores");
    for case in [case(9, 20, 2, 1, 8, 0), case(3, 700, 4, 1, 8, 0)] {
        let mut i = case.inputs(&mut r);
        i.q.iter_mut().for_each(|q| *q *= 100.0);
        let (out, lse) = forward(device, &case, &i);
        let (want, want_lse) = case.reference(&wide(&i.q), &wide(&i.k), &wide(&i.v), &i);
        // A score of 500 is known to 500 · 2^-24 = 3e-5, and so is the logarithm of a weight.
        assert_close(&out, &want, 2e-4, "out");
        assert_close(&lse, &want_lse, F32, "lse");
    }
}

/// Room for many more rows than count, as when a recorded window is replayed over another context.
fn attention_does_not_look_beyond_the_length<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("room");
    for case in [case(5, 0, 4, 2, 8, 0), case(5, 3, 4, 2, 8, 0), case(5, 130, 4, 2, 8, 30), case(70, 90, 2, 1, 16, 0)] {
        let i = case.inputs_with_room(&mut r, 3000);
        let (out, lse) = forward(device, &case, &i);
        let (want, want_lse) = case.reference(&wide(&i.q), &wide(&i.k), &wide(&i.v), &i);
        assert_close(&out, &want, F32, &format!("out of {case:?}"));
        assert_close(&lse, &want_lse, F32, &format!("lse of {case:?}"));
        let dout = r.normals(case.queries());
        let tight = Inputs { past_k: i.past_k[..(case.past + 1) * case.own() / case.t].to_vec(), ..i.clone() };
        let tight = Inputs { past_v: i.past_v[..(case.past + 1) * case.own() / case.t].to_vec(), ..tight };
        let (roomy, tight) = (backward(device, &case, &i, &dout), backward(device, &case, &tight, &dout));
        for ((a, b), name) in roomy.iter().zip(&tight).zip(["dq", "dk", "dv"]) {
            assert_close(a, &wide(b), F32, &format!("{name} of {case:?} with room"));
        }
    }
}

/// Gradients of sum(dout · out), outputs poisoned before.
fn backward<D: Machine>(device: &Arc<D>, case: &Case, i: &Inputs, dout: &[f32]) -> [Vec<f32>; 3] {
    let u = Uploaded::forward(device, case, i);
    let [mut dq, mut dk, mut dv] = [case.queries(), case.own(), case.own()].map(|n| device.poisoned(n));
    let past = Past { keys: &u.past_k, values: &u.past_v, len: &u.len };
    let dout = device.upload(dout);
    let saved = AttentionSaved { dout: &dout, out: &u.out, lse: &u.lse, q: &u.q, k: &u.k, v: &u.v, past };
    let grads = AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    device.run(|| device.attention_backward(grads, saved, case.t, &case.shape()));
    [dq, dk, dv].map(|x| device.download(&x))
}

fn attention_backward_agrees_with_finite_differences<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("attention_backward");
    for case in CASES {
        let i = case.inputs(&mut r);
        let dout = r.normals(case.queries());
        let got = backward(device, &case, &i, &dout);
        let (dout, inputs) = (wide(&dout), [wide(&i.q), wide(&i.k), wide(&i.v)]);
        for (which, name) in ["dq", "dk", "dv"].into_iter().enumerate() {
            let loss = |moved: &[f64]| {
                let at = |n: usize| if n == which { moved } else { &inputs[n] };
                reference::dot(&case.reference(at(0), at(1), at(2), &i).0, &dout)
            };
            let x = &inputs[which];
            // All coordinates of a small case; of a large one first, last, a few between, and a
            // random direction that feels every one.
            let few = [0, 1, x.len() / 3, x.len() / 2, x.len() - 1].to_vec();
            let coordinates = if x.len() <= 160 { (0..x.len()).collect() } else { few };
            let want = reference::gradient(x, &coordinates, loss);
            let all = wide(&got[which]);
            // A gradient's own size, also where only a few of its elements are looked at; with a
            // single key q and k have none, only the rounding of terms of size 1.
            let size = (reference::dot(&all, &all) / all.len() as f64).sqrt().max(0.1);
            for (&c, want) in coordinates.iter().zip(&want) {
                let error = (all[c] - want).abs();
                assert!(error <= 2e-5 * (size + want.abs()), "{name}[{c}] of {case:?}: {} want {want}", all[c]);
            }
            let direction = wide(&r.normals(x.len()));
            let (slope, want) = (reference::dot(&all, &direction), reference::slope(x, &direction, loss));
            let scale = size * (all.len() as f64).sqrt();
            assert!((slope - want).abs() <= 2e-5 * scale, "{name} of {case:?} along a direction: {slope} want {want}");
        }
    }
}

/// A softmax over one key is constant, so q and k have no gradient at all: not rounding, 0.
fn a_query_that_sees_one_key_gives_queries_and_keys_a_gradient_of_exactly_zero<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("one_key");
    for case in [case(1, 0, 6, 2, 5, 0), case(6, 3, 3, 1, 4, 1), case(1, 0, 2, 1, 128, 0)] {
        let i = case.inputs(&mut r);
        let dout = r.normals(case.queries());
        let [dq, dk, dv] = backward(device, &case, &i, &dout);
        assert!(dq.iter().chain(&dk).all(|g| *g == 0.0), "{case:?}: dq {dq:?}, dk {dk:?}");
        assert!(dv.iter().any(|g| *g != 0.0), "{case:?}");
    }
}

/// A window of a recorded size has rows beyond its last token; dout is 0 there.
fn rows_of_padding_change_nothing_for_the_rows_before<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("attention padding");
    for (case, t) in [(case(8, 21, 4, 2, 8, 0), 5), (case(128, 9, 4, 1, 8, 30), 70)] {
        let (i, alone) = (case.inputs(&mut r), Case { t, ..case });
        let mut dout = r.normals(case.queries());
        dout[alone.queries()..].fill(0.0);
        let cut = |x: &[f32], n: usize| x[..n].to_vec();
        let short =
            Inputs { q: cut(&i.q, alone.queries()), k: cut(&i.k, alone.own()), v: cut(&i.v, alone.own()), ..i.clone() };
        let (padded, exact) =
            (backward(device, &case, &i, &dout), backward(device, &alone, &short, &dout[..alone.queries()]));
        for ((padded, exact), name) in padded.iter().zip(&exact).zip(["dq", "dk", "dv"]) {
            let (rows, padding) = padded.split_at(exact.len());
            assert_close(rows, &wide(exact), F32, &format!("{name} of {case:?}"));
            assert!(padding.iter().all(|&g| g == 0.0), "{name} of {case:?}: padding has a gradient");
        }
    }
}
