//! Products with weights, and the outer product of two factors.

use crate::machine::{Machine, on_every_device};
use crate::random::{DTYPES, F32, Random, assert_close, wide};
use crate::reference;
use compute::{Dtype, Factors, LinearOutput};
use std::sync::Arc;

on_every_device! {
    linear_is_the_product_with_the_transposed_weight_plus_bias,
    a_rounded_product_rounds_its_input_and_nothing_else,
    linear_dx_sets_or_adds_the_product_with_the_weight,
    a_rounded_dx_rounds_its_gradients_and_nothing_else,
    linear_writes_only_its_rows_of_a_larger_buffer,
    outer_accumulate_adds_the_outer_product_of_the_factors,
}

/// (t, m, n): one of everything, odd, and across the blocks of 256 rows and 512 columns.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (3, 7, 5), (1, 300, 33), (5, 257, 513), (17, 31, 1025), (2, 513, 256), (70, 16, 3)];

fn linear_is_the_product_with_the_transposed_weight_plus_bias<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("linear");
    for (t, m, n) in SHAPES {
        for dtype in DTYPES {
            let (w, w64) = r.weight(device, dtype, m, n, 0.3);
            let (b, b64) = r.weight(device, dtype, 1, m, 1.0);
            let x = r.normals(t * n);
            for bias in [false, true] {
                let mut y = device.poisoned(t * m);
                device.linear(&mut y, &device.upload(&x), &w, bias.then_some(&b), t);
                let want = reference::linear(&D::seen(dtype, &x), &w64, bias.then_some(&b64), t, m, n);
                assert_close(&device.download(&y), &want, F32, &format!("{dtype} ({t},{m},{n}) bias {bias}"));
            }
        }
    }
}

/// Whether x is rounded is the device's choice, for all rows alike.
fn a_rounded_product_rounds_its_input_and_nothing_else<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("rounded");
    for (t, m, n) in SHAPES.into_iter().chain([(140, 97, 130), (3, 200, 1100)]) {
        for dtype in DTYPES {
            let (w, w64) = r.weight(device, dtype, m, n, 0.3);
            let (b, b64) = r.weight(device, dtype, 1, m, 1.0);
            let x = r.normals(t * n);
            let product = |x: &[f32], t: usize| {
                let mut y = device.poisoned(t * m);
                let output = LinearOutput { y: &mut y, w: &w, bias: Some(&b) };
                device.linear_group_rounded(&mut [output], &device.upload(x), t);
                device.download(&y)
            };
            let y = product(&x, t);
            let rounded = compute::widen(Dtype::BF16, &compute::narrow(Dtype::BF16, &x));
            let off = |x: Vec<f64>| {
                let want = reference::linear(&x, &w64, Some(&b64), t, m, n);
                let size = want.iter().fold(1.0f64, |top, v| top.max(v.abs()));
                y.iter().zip(&want).map(|(&y, want)| (y as f64 - want).abs() / size).fold(0.0, f64::max)
            };
            let (exact, nearest) = (off(D::seen(dtype, &x)), off(wide(&rounded)));
            let may_round = dtype == Dtype::BF16;
            assert!(exact < F32 || may_round && nearest < F32, "{dtype} ({t},{m},{n}): {exact}, rounded {nearest}");
            let last = t - 1;
            let alone = format!("{dtype} ({t},{m},{n}): the last row alone");
            assert_close(&product(&x[last * n..], 1), &wide(&y[last * m..]), F32, &alone);
        }
    }
}

fn linear_dx_sets_or_adds_the_product_with_the_weight<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("linear_dx");
    for (t, m, n) in SHAPES {
        for dtype in DTYPES {
            let (w, w64) = r.weight(device, dtype, m, n, 0.3);
            let dy = r.normals(t * m);
            let want = reference::matmul(&D::seen(dtype, &dy), &w64, t, m, n);
            let dy = device.upload(&dy);
            let mut dx = device.poisoned(t * n);
            device.linear_dx(&mut dx, &dy, &w, t, false);
            assert_close(&device.download(&dx), &want, F32, &format!("{dtype} ({t},{m},{n}) set"));
            let before = r.normals(t * n);
            let mut dx = device.upload(&before);
            device.linear_dx(&mut dx, &dy, &w, t, true);
            let want: Vec<f64> = want.iter().zip(&before).map(|(a, &b)| a + b as f64).collect();
            assert_close(&device.download(&dx), &want, F32, &format!("{dtype} ({t},{m},{n}) added"));
        }
    }
}

/// Over several weights, of which some are rounded and others not.
fn a_rounded_dx_rounds_its_gradients_and_nothing_else<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("rounded dx");
    for (t, m, n) in SHAPES.into_iter().chain([(32, 130, 97), (7, 600, 700)]) {
        for dtype in DTYPES {
            let weights: [_; 2] = std::array::from_fn(|_| r.weight(device, dtype, m, n, 0.3));
            let dys: [_; 2] = std::array::from_fn(|_| r.normals(t * m));
            let uploaded = dys.each_ref().map(|dy| device.upload(dy));
            let inputs: Vec<_> = uploaded.iter().zip(&weights).map(|(dy, (w, _))| (dy, w)).collect();
            let mut dx = device.poisoned(t * n);
            device.linear_dx_group_rounded(&mut dx, &inputs, t);
            let dx = device.download(&dx);
            let off = |seen: &dyn Fn(&[f32]) -> Vec<f64>| {
                let each = dys.iter().zip(&weights).map(|(dy, (_, w))| reference::matmul(&seen(dy), w, t, m, n));
                let want = each.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap();
                let size = want.iter().fold(1.0f64, |top, v| top.max(v.abs()));
                dx.iter().zip(&want).map(|(&is, want)| (is as f64 - want).abs() / size).fold(0.0, f64::max)
            };
            let nearest = |x: &[f32]| wide(&compute::widen(Dtype::BF16, &compute::narrow(Dtype::BF16, x)));
            let (exact, rounded) = (off(&|dy| D::seen(dtype, dy)), off(&nearest));
            let may_round = dtype == Dtype::BF16;
            assert!(exact < F32 || may_round && rounded < F32, "{dtype} ({t},{m},{n}): {exact}, rounded {rounded}");
        }
    }
}

fn linear_writes_only_its_rows_of_a_larger_buffer<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("larger");
    let (w, w64) = r.weight(device, Dtype::BF16, 259, 21, 0.3);
    let (x, mut y) = (r.normals(9 * 21), device.upload(&[7.0; 9 * 259]));
    device.linear(&mut y, &device.upload(&x), &w, None, 4);
    let y = device.download(&y);
    let want = reference::linear(&D::seen(Dtype::BF16, &x), &w64, None, 4, 259, 21);
    assert_close(&y[..4 * 259], &want, F32, "rows in use");
    assert!(y[4 * 259..].iter().all(|&v| v == 7.0), "rows beyond t were written");
}

fn outer_accumulate_adds_the_outer_product_of_the_factors<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("outer");
    for (t, m, n) in SHAPES {
        let (x, dy, before) = (r.normals(t * n), r.normals(t * m), r.normals(m * n));
        let mut g = device.upload(&before);
        device.outer_accumulate(&mut g, &Factors { x: &device.upload(&x), dy: &device.upload(&dy), t, m, n });
        let product = reference::outer(&wide(&dy), &wide(&x), t, m, n);
        let want: Vec<f64> = product.iter().zip(&before).map(|(a, &b)| a + b as f64).collect();
        assert_close(&device.download(&g), &want, F32, &format!("({t},{m},{n})"));
    }
}
