//! Results do not depend on the number of threads, bit for bit.

use crate::random::{DTYPES, Random};
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Attention, AttentionGrads, AttentionSaved, Compressed,
    Convolution, Cpu, DeltaGrads, DeltaInputs, DeltaRule, Device, Dtype, Factors, Heads, LinearOutput, Moments,
    NORM_FACTOR, NORM_SLOTS, Norm, Past, ScaleType, Stream, Write,
    cpu::{Buffer, Stored, Weight},
};
use std::sync::Arc;

/// All results of all operations, by name, as bits.
#[derive(Default)]
struct Results(Vec<(String, Vec<u32>)>);

impl Results {
    fn keep(&mut self, name: &str, values: &[f32]) {
        self.0.push((name.into(), values.iter().map(|v| v.to_bits()).collect()));
    }
}

#[test]
fn results_are_the_same_with_one_thread_and_with_three() {
    let all = |threads: usize| {
        let device = Arc::new(Cpu::new(threads).expect("threads"));
        assert_eq!(device.threads(), threads);
        device.run(|| {
            let mut results = Results::default();
            layers(&device, &mut results);
            attention(&device, &mut results);
            delta_net(&device, &mut results);
            optimizer(&device, &mut results);
            results
        })
    };
    let (one, three) = (all(1), all(3));
    assert!(one.0.len() > 30);
    for ((name, a), (other, b)) in one.0.iter().zip(&three.0) {
        assert_eq!(name, other);
        assert!(a == b, "{name} depends on the number of threads");
    }
}

fn layers(d: &Arc<Cpu>, out: &mut Results) {
    let mut r = Random::new("threads");
    let (t, m, n) = (37, 700, 1100);
    let (x, dy, g) = (r.normals(t * n), r.normals(t * m), r.normals(t * n));
    for dtype in DTYPES {
        let w = r.weight(d, dtype, m, n, 0.1).0;
        let (norm, bias) = (r.weight(d, dtype, 1, n, 1.0).0, r.weight(d, dtype, 1, m, 1.0).0);
        let (mut y, mut dx, mut dw) = (d.zeros(t * m), d.zeros(t * n), d.zeros(n));
        d.linear(&mut y, &x, &w, Some(&bias), t);
        out.keep(&format!("linear {dtype}"), &y);
        d.linear_dx(&mut dx, &dy, &w, t, false);
        out.keep(&format!("linear_dx {dtype}"), &dx);
        d.rms_norm(&mut dx, &x, &norm, Norm { eps: 1e-6, offset: 0.0 }, t);
        out.keep("rms_norm", &dx);
        d.rms_norm_backward(&mut dx, &mut dw, &g, &x, &norm, Norm { eps: 1e-6, offset: 0.0 }, t);
        out.keep("rms_norm_backward dx", &dx);
        out.keep("rms_norm_backward dw", &dw);
        d.embed(&mut dx, &w, &r.ids(t, m));
        out.keep("embed", &dx);
    }
    // As many tokens as are taken another way, and two weights of one group.
    let t = 150;
    let x = r.normals(t * n);
    let [(a, _), (b, _)] = [m, 300].map(|m| r.weight(d, Dtype::BF16, m, n, 0.1));
    let (mut y, mut z) = (d.zeros(t * m), d.zeros(t * 300));
    let group = [LinearOutput { y: &mut y, w: &a, bias: None }, LinearOutput { y: &mut z, w: &b, bias: None }];
    d.linear_group(&mut { group }, &x, t);
    out.keep("linear_group of many tokens", &y);
    out.keep("linear_group of many tokens, the second", &z);
    let t = 37;
    let x = r.normals(t * n);
    let (mut h, mut dup, len) = (d.zeros(t * n), d.zeros(t * n), t * n);
    d.swiglu(&mut h, &x, &g, len);
    out.keep("swiglu", &h);
    let dh = h.clone();
    d.swiglu_backward(&mut h, &mut dup, &dh, &x, &g, len);
    out.keep("swiglu_backward dgate", &h);
    out.keep("swiglu_backward dup", &dup);
    let mut rotated = Buffer::from(x[..t * 1024].to_vec());
    d.rope(&mut rotated, &r.normals(t * 64), &vec![0], t, Heads { count: 16, dim: 64, rotated: 64 }, false);
    out.keep("rope", &rotated);
    let (mut losses, mut logits) = (d.zeros(t), x.clone());
    d.cross_entropy(&mut losses, &mut logits, &r.ids(t, n), n, &vec![0.5].into());
    out.keep("losses", &losses);
    out.keep("logits", &logits);
    let (mut sums, mut product, mut counter) = (d.zeros(m), d.zeros(m * n), d.zeros(1));
    d.sum_rows(&mut sums, &dy, t, m);
    out.keep("sum_rows", &sums);
    d.outer_accumulate(&mut product, &Factors { x: &x, dy: &dy, t, m, n });
    out.keep("outer_accumulate", &product);
    d.scatter_add_rows(&mut product, &x, &r.ids(t, m), n);
    out.keep("scatter_add_rows", &product);
    d.count_nonfinite(&mut counter, 0, &[(&x, len)]);
    out.keep("count_nonfinite", &counter);
}

fn delta_net(d: &Arc<Cpu>, out: &mut Results) {
    let mut r = Random::new("threads delta_net");
    let (t, shape) = (80, DeltaRule { key_heads: 3, value_heads: 6, key_dim: 20, value_dim: 40 });
    let (channels, heads) = (shape.channels(), shape.value_heads);
    let conv = Convolution { channels, width: 4 };
    let w = r.weight(d, Dtype::BF16, 1, 4 * channels, 1.0).0;
    let (x, before, dy) = (r.normals(t * channels), r.normals(3 * channels), r.normals(t * channels));
    let (mut y, mut dx, mut dw) = (d.zeros(t * channels), d.zeros(t * channels), d.zeros(4 * channels));
    d.causal_conv(&mut y, &x, &before, &w, t, conv);
    out.keep("causal_conv", &y);
    d.causal_conv_backward(&mut dx, &mut dw, &dy, &x, &before, &w, t, conv);
    out.keep("causal_conv_backward dx", &dx);
    out.keep("causal_conv_backward dw", &dw);
    let [a_log, dt_bias] = [(); 2].map(|()| r.weight(d, Dtype::F32, 1, heads, 1.0).0);
    let (a, b, state) = (r.normals(t * heads), r.normals(t * heads), r.normals(shape.state()));
    let inputs = DeltaInputs { mixed: &x, a: &a, b: &b, a_log: &a_log, dt_bias: &dt_bias, state: &state };
    let (mut values, mut next) = (d.zeros(t * heads * shape.value_dim), d.zeros(shape.state()));
    d.delta_rule(&mut values, Some(&mut next), inputs, t, &shape);
    out.keep("delta_rule out", &values);
    out.keep("delta_rule next", &next);
    let dout = r.normals(t * heads * shape.value_dim);
    let [mut da, mut db] = [(); 2].map(|()| d.zeros(t * heads));
    let [mut da_log, mut ddt] = [(); 2].map(|()| d.zeros(heads));
    let grads = DeltaGrads { mixed: &mut dx, a: &mut da, b: &mut db, a_log: &mut da_log, dt_bias: &mut ddt };
    d.delta_rule_backward(grads, &dout, inputs, t, &shape);
    for (name, values) in [("mixed", &dx), ("a", &da), ("b", &db), ("A_log", &da_log), ("dt_bias", &ddt)] {
        out.keep(&format!("delta_rule_backward {name}"), values);
    }
}

fn attention(d: &Arc<Cpu>, out: &mut Results) {
    let mut r = Random::new("threads attention");
    let (t, past, heads, kv_heads, head_dim) = (150, 90, 6, 3, 16);
    for (window, stored) in [(None, Dtype::F32), (Some(100), Dtype::F32), (None, Dtype::BF16), (Some(100), Dtype::BF16)]
    {
        let shape = Attention { heads, kv_heads, head_dim, window, scale: 0.25 };
        let (q, dout) = (r.normals(t * heads * head_dim), r.normals(t * heads * head_dim));
        let row = kv_heads * head_dim;
        let (k, v, keys, values) =
            (r.normals(t * row), r.normals(t * row), r.normals(past * row), r.normals(past * row));
        let len = vec![past as u32];
        let frozen = |rows: &Buffer| {
            let mut frozen = d.stored(stored, rows.len());
            d.store(&mut frozen, 0, rows, rows.len());
            frozen
        };
        let (keys, values) = (frozen(&keys), frozen(&values));
        let past = Past { keys: &keys, values: &values, len: &len };
        let (mut o, mut lse) = (d.zeros(q.len()), d.zeros(heads * t));
        d.attention(&mut o, &mut lse, &q, &k, &v, past, t, &shape);
        let (mut dq, mut dk, mut dv) = (d.zeros(q.len()), d.zeros(t * row), d.zeros(t * row));
        let saved = AttentionSaved { dout: &dout, out: &o, lse: &lse, q: &q, k: &k, v: &v, past };
        d.attention_backward(AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv }, saved, t, &shape);
        for (name, values) in [("out", &o), ("lse", &lse), ("dq", &dq), ("dk", &dk), ("dv", &dv)] {
            out.keep(&format!("attention {name} {window:?} {stored}"), values);
        }
    }
}

fn optimizer(d: &Arc<Cpu>, out: &mut Results) {
    let mut r = Random::new("threads optimizer");
    let moments = Moments { beta1: 0.9, beta2: 0.999, eps: 1e-6 };
    // The second shape has many Gram blocks, the third forms G.
    for (m, n, t, rank) in [(700, 300, 9, 70), (12, 9000, 2, 5), (300, 700, 200, 100)] {
        for (i, dtype) in DTYPES.into_iter().enumerate() {
            let scale_type = if i == 1 { ScaleType::Tensor } else { ScaleType::Channel };
            let (channels, dim) = (m.max(n), m.min(n));
            let (w, x, dy) = (r.weight(d, dtype, m, n, 1.0).0, r.normals(t * n), r.normals(t * m));
            let f = Factors { x: &x, dy: &dy, t, m, n };
            let mut p = d.zeros(rank * dim);
            d.normal_projection(&mut p, rank, dim, Stream::projection(3, 1, dim));
            out.keep("projection", &p);
            let c = Compressed { projection: &p, rank, scale_type, moments, weight: dtype };
            let (mut s, mut norms) = (d.zeros(channels), d.zeros(NORM_SLOTS));
            let stored = if i == 2 { Dtype::BF16 } else { Dtype::F32 };
            let [mut a, mut b] = [(); 2].map(|()| d.stored(stored, rank * channels));
            let write = Write { step: 1e-2, decay: 1e-3, stream: Stream::rounding(4, 1, 2) };
            d.apollo_prepare(
                &mut norms,
                &mut [ApolloPrepare { s: &mut s, at: 0, exp_avg: &a, exp_avg_sq: &b, factors: f, compressed: c }],
            );
            norms[NORM_FACTOR] = 0.7;
            d.apollo_commit(
                &mut norms,
                &mut [ApolloCommit {
                    w: &w,
                    s: &s,
                    at: 0,
                    exp_avg: &mut a,
                    exp_avg_sq: &mut b,
                    factors: f,
                    compressed: c,
                    write,
                }],
            );
            keep_step(out, &format!("apollo {dtype} ({m},{n},{t})"), &w, &[&a, &b]);
            out.keep("scaling", &s);
            out.keep("norms", &norms);
            let [mut a, mut b] = [(); 2].map(|()| d.stored(stored, m * n));
            d.adamw_factors(&w, &mut a, &mut b, &f, moments, write);
            keep_step(out, &format!("adamw_factors {dtype}"), &w, &[&a, &b]);
            let rows = [AdamRow { row: 3, slot: 1, step: 0.1 }, AdamRow { row: 1, slot: 0, step: 0.2 }];
            d.adamw_rows(
                &mut [AdamwRows {
                    w: &w,
                    rows: &rows,
                    g: &r.normals(2 * n),
                    exp_avg: &mut a,
                    exp_avg_sq: &mut b,
                    write,
                }],
                moments,
            );
            keep_step(out, &format!("adamw_rows {dtype}"), &w, &[&a, &b]);
        }
    }
}

fn keep_step(out: &mut Results, name: &str, w: &Weight, moments: &[&Stored]) {
    out.keep(&format!("{name} weights"), &w.values());
    for (i, moment) in moments.iter().enumerate() {
        let mut values = vec![0.0; moment.len()];
        moment.read(0, &mut values);
        out.keep(&format!("{name} moment {i}"), &values);
    }
}
