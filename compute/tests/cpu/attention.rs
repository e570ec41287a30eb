//! Attention forward against its definition, backward against finite differences of the definition.

use crate::random::{F32, Random, assert_close, poison, wide};
use crate::reference;
use compute::{Attention, AttentionGrads, AttentionSaved, Cpu, Device, Past};

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
const CASES: [Case; 18] = [
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
];

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
    /// Past buffers have three rows more than count: they hold NaN, and nobody may look at them.
    fn inputs(&self, r: &mut Random) -> Inputs {
        let row = self.kv_heads * self.head_dim;
        let past = |r: &mut Random| {
            let mut rows = r.normals(self.past * row);
            rows.extend(poison(3 * row));
            rows
        };
        Inputs {
            q: (0..self.queries()).map(|_| 2.0 * r.normal()).collect(),
            k: r.normals(self.own()),
            v: r.normals(self.own()),
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

fn forward(case: &Case, i: &Inputs) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut lse) = (poison(case.queries()), poison(case.heads * case.t));
    let len = vec![case.past as u32];
    let past = Past { keys: &i.past_k, values: &i.past_v, len: &len };
    let device = Cpu::new(2).expect("two threads");
    device.run(|| device.attention(&mut out, &mut lse, &i.q, &i.k, &i.v, past, case.t, &case.shape()));
    (out, lse)
}

#[test]
fn attention_agrees_with_its_definition() {
    let mut r = Random::new("attention");
    for case in CASES {
        let i = case.inputs(&mut r);
        let (out, lse) = forward(&case, &i);
        let (want, want_lse) = case.reference(&wide(&i.q), &wide(&i.k), &wide(&i.v), &i);
        assert_close(&out, &want, F32, &format!("out of {case:?}"));
        assert_close(&lse, &want_lse, F32, &format!("lse of {case:?}"));
    }
}

#[test]
fn attention_with_scores_of_hundreds_stays_exact() {
    let mut r = Random::new("scores");
    let case = case(9, 20, 2, 1, 8, 0);
    let mut i = case.inputs(&mut r);
    i.q.iter_mut().for_each(|q| *q *= 100.0);
    let (out, lse) = forward(&case, &i);
    let (want, want_lse) = case.reference(&wide(&i.q), &wide(&i.k), &wide(&i.v), &i);
    // A score of 500 is known to 500 · 2^-24 = 3e-5, and so is the logarithm of a weight.
    assert_close(&out, &want, 2e-4, "out");
    assert_close(&lse, &want_lse, F32, "lse");
}

/// Gradients of sum(dout · out), outputs poisoned before.
fn backward(case: &Case, i: &Inputs, dout: &[f32]) -> [Vec<f32>; 3] {
    let (out, lse) = forward(case, i);
    let (mut dq, mut dk, mut dv) = (poison(case.queries()), poison(case.own()), poison(case.own()));
    let len = vec![case.past as u32];
    let past = Past { keys: &i.past_k, values: &i.past_v, len: &len };
    let dout = dout.to_vec();
    let saved = AttentionSaved { dout: &dout, out: &out, lse: &lse, q: &i.q, k: &i.k, v: &i.v, past };
    let grads = AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    let device = Cpu::new(2).expect("two threads");
    device.run(|| device.attention_backward(grads, saved, case.t, &case.shape()));
    [dq, dk, dv]
}

#[test]
fn attention_backward_agrees_with_finite_differences() {
    let mut r = Random::new("attention_backward");
    for case in CASES {
        let i = case.inputs(&mut r);
        let dout = r.normals(case.queries());
        let got = backward(&case, &i, &dout);
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
#[test]
fn a_query_that_sees_one_key_gives_queries_and_keys_a_gradient_of_exactly_zero() {
    let mut r = Random::new("one_key");
    for case in [case(1, 0, 6, 2, 5, 0), case(6, 3, 3, 1, 4, 1), case(1, 0, 2, 1, 128, 0)] {
        let i = case.inputs(&mut r);
        let dout = r.normals(case.queries());
        let [dq, dk, dv] = backward(&case, &i, &dout);
        assert!(dq.iter().chain(&dk).all(|g| *g == 0.0), "{case:?}: dq {dq:?}, dk {dk:?}");
        assert!(dv.iter().any(|g| *g != 0.0), "{case:?}");
    }
}
