//! Products with weights, norms, rope, SwiGLU, embedding and sums.

use crate::random::{DTYPES, F32, Random, assert_close, poison, wide};
use crate::reference;
use compute::{Cpu, Device, Dtype, Factors, cpu::Weight};

fn cpu() -> Cpu {
    Cpu::new(2).expect("two threads")
}

/// (t, m, n): one of everything, odd, and across the blocks of 256 rows and 512 columns.
const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 1), (3, 7, 5), (1, 300, 33), (5, 257, 513), (17, 31, 1025), (2, 513, 256), (70, 16, 3)];

#[test]
fn linear_is_the_product_with_the_transposed_weight_plus_bias() {
    let mut r = Random::new("linear");
    for (t, m, n) in SHAPES {
        for dtype in DTYPES {
            let (w, w64) = r.weight(dtype, m, n, 0.3);
            let (b, b64) = r.weight(dtype, 1, m, 1.0);
            let x = r.normals(t * n);
            for bias in [false, true] {
                let mut y = poison(t * m);
                cpu().linear(&mut y, &x, &w, bias.then_some(&b), t);
                let want = reference::linear(&wide(&x), &w64, bias.then_some(&b64), t, m, n);
                assert_close(&y, &want, F32, &format!("{dtype} ({t},{m},{n}) bias {bias}"));
            }
        }
    }
}

#[test]
fn linear_dx_sets_or_adds_the_product_with_the_weight() {
    let mut r = Random::new("linear_dx");
    for (t, m, n) in SHAPES {
        for dtype in DTYPES {
            let (w, w64) = r.weight(dtype, m, n, 0.3);
            let dy = r.normals(t * m);
            let want = reference::matmul(&wide(&dy), &w64, t, m, n);
            let mut dx = poison(t * n);
            cpu().linear_dx(&mut dx, &dy, &w, t, false);
            assert_close(&dx, &want, F32, &format!("{dtype} ({t},{m},{n}) set"));
            let before = r.normals(t * n);
            let mut dx = before.clone();
            cpu().linear_dx(&mut dx, &dy, &w, t, true);
            let want: Vec<f64> = want.iter().zip(&before).map(|(a, &b)| a + b as f64).collect();
            assert_close(&dx, &want, F32, &format!("{dtype} ({t},{m},{n}) added"));
        }
    }
}

#[test]
fn linear_writes_only_its_rows_of_a_larger_buffer() {
    let mut r = Random::new("larger");
    let (w, w64) = r.weight(Dtype::BF16, 259, 21, 0.3);
    let (x, mut y) = (r.normals(9 * 21), vec![7.0; 9 * 259]);
    cpu().linear(&mut y, &x, &w, None, 4);
    assert_close(&y[..4 * 259], &reference::linear(&wide(&x), &w64, None, 4, 259, 21), F32, "rows in use");
    assert!(y[4 * 259..].iter().all(|&v| v == 7.0), "rows beyond t were written");
}

#[test]
fn outer_accumulate_adds_the_outer_product_of_the_factors() {
    let mut r = Random::new("outer");
    for (t, m, n) in SHAPES {
        let (x, dy, before) = (r.normals(t * n), r.normals(t * m), r.normals(m * n));
        let mut g = before.clone();
        cpu().outer_accumulate(&mut g, &Factors { x: &x, dy: &dy, t, m, n });
        let product = reference::outer(&wide(&dy), &wide(&x), t, m, n);
        let want: Vec<f64> = product.iter().zip(&before).map(|(a, &b)| a + b as f64).collect();
        assert_close(&g, &want, F32, &format!("({t},{m},{n})"));
    }
}

#[test]
fn rms_norm_divides_rows_by_their_root_mean_square() {
    let mut r = Random::new("rms_norm");
    for (rows, n) in [(1, 1), (3, 5), (9, 16), (17, 37), (33, 515)] {
        for dtype in DTYPES {
            let (w, w64) = r.weight(dtype, 1, n, 1.0);
            // Rows of very different sizes; in the smallest, eps is most of the sum.
            let x: Vec<f32> = (0..rows * n).map(|i| r.normal() * 10f32.powi((i / n) as i32 % 7 - 4)).collect();
            let mut y = poison(rows * n);
            cpu().rms_norm(&mut y, &x, &w, 1e-6, rows);
            // Row by row, so that no row hides behind the size of another.
            for (row, want) in reference::rms_norm(&wide(&x), &w64, 1e-6f32 as f64).chunks(n).enumerate() {
                assert_close(&y[row * n..][..n], want, F32, &format!("{dtype} ({rows},{n}) row {row}"));
            }
        }
    }
}

#[test]
fn rms_norm_backward_agrees_with_finite_differences() {
    let mut r = Random::new("rms_norm_backward");
    for (rows, n) in [(1, 1), (2, 3), (9, 17), (4, 50)] {
        for dtype in DTYPES {
            let (w, w64) = r.weight(dtype, 1, n, 1.0);
            let (x, dy, before) = (r.normals(rows * n), r.normals(rows * n), r.normals(rows * n));
            // A large eps, so that a formula that forgets it is seen.
            let eps = 0.25f32;
            let (mut dx, mut dw) = (before.clone(), poison(n));
            cpu().rms_norm_backward(&mut dx, &mut dw, &dy, &x, &w, eps, rows);
            let (x64, dy64) = (wide(&x), wide(&dy));
            let loss = |x: &[f64], w: &[f64]| reference::dot(&reference::rms_norm(x, w, eps as f64), &dy64);
            let all: Vec<usize> = (0..rows * n).collect();
            let mut want = reference::gradient(&x64, &all, |x| loss(x, &w64));
            want.iter_mut().zip(&before).for_each(|(g, &b)| *g += b as f64);
            assert_close(&dx, &want, F32, &format!("{dtype} ({rows},{n}) dx"));
            let want = reference::gradient(&w64, &all[..n], |w| loss(&x64, w));
            assert_close(&dw, &want, F32, &format!("{dtype} ({rows},{n}) dw"));
        }
    }
}

#[test]
fn rope_rotates_pairs_by_their_position_and_the_inverse_undoes_it() {
    let mut r = Random::new("rope");
    for (t, heads, d, position) in [(1, 1, 2, 0), (5, 3, 6, 0), (7, 2, 10, 11), (40, 4, 16, 25)] {
        let table = reference::rope_table(position + t, d, 10_000.0);
        let x = r.normals(t * heads * d);
        let mut y = x.clone();
        cpu().rope(&mut y, &table, &vec![position as u32], t, heads, d, false);
        let want = reference::rope(&wide(&x), position, heads, d, 10_000.0, false);
        assert_close(&y, &want, F32, &format!("({t},{heads},{d}) at {position}"));
        cpu().rope(&mut y, &table, &vec![position as u32], t, heads, d, true);
        assert_close(&y, &wide(&x), F32, &format!("inverse ({t},{heads},{d}) at {position}"));
        let mut back = x.clone();
        cpu().rope(&mut back, &table, &vec![position as u32], t, heads, d, true);
        let want = reference::rope(&wide(&x), position, heads, d, 10_000.0, true);
        assert_close(&back, &want, F32, &format!("backward ({t},{heads},{d}) at {position}"));
    }
}

#[test]
fn swiglu_and_its_backward_agree_with_the_definition() {
    let mut r = Random::new("swiglu");
    for len in [1, 15, 16_385, 40_000] {
        let gate: Vec<f32> = (0..len).map(|_| 4.0 * r.normal()).collect();
        let (up, dh) = (r.normals(len), r.normals(len));
        let (mut h, mut dgate, mut dup) = (poison(len), poison(len), poison(len));
        cpu().swiglu(&mut h, &gate, &up, len);
        cpu().swiglu_backward(&mut dgate, &mut dup, &dh, &gate, &up, len);
        let (gate, up, dh) = (wide(&gate), wide(&up), wide(&dh));
        let each = |f: &dyn Fn(usize) -> f64| (0..len).map(f).collect::<Vec<_>>();
        assert_close(&h, &each(&|i| reference::silu(gate[i]) * up[i]), F32, "h");
        let step = 1e-5;
        let slope = |g: f64| (reference::silu(g + step) - reference::silu(g - step)) / (2.0 * step);
        assert_close(&dgate, &each(&|i| dh[i] * up[i] * slope(gate[i])), F32, "dgate");
        assert_close(&dup, &each(&|i| dh[i] * reference::silu(gate[i])), F32, "dup");
    }
}

#[test]
fn swiglu_stays_finite_where_the_exponential_does_not() {
    let gate = vec![-1e4f32, -100.0, -90.0, 90.0, 1e4];
    let one = vec![1.0; 5];
    let (mut h, mut dgate, mut dup) = (poison(5), poison(5), poison(5));
    cpu().swiglu(&mut h, &gate, &one, 5);
    cpu().swiglu_backward(&mut dgate, &mut dup, &one, &gate, &one, 5);
    for (i, want) in [0.0, 0.0, 0.0, 90.0, 1e4].into_iter().enumerate() {
        assert!((h[i] - want).abs() < 1e-30 && (dup[i] - want).abs() < 1e-30, "{h:?} {dup:?}");
        assert_eq!(dgate[i].round(), if gate[i] > 0.0 { 1.0 } else { 0.0 }, "{dgate:?}");
    }
}

#[test]
fn embed_copies_the_rows_of_the_tokens() {
    let mut r = Random::new("embed");
    for dtype in DTYPES {
        let (w, w64) = r.weight(dtype, 41, 19, 1.0);
        let mut ids = r.ids(50, 41);
        ids.extend([0, 40, 40]);
        let mut x = poison(53 * 19);
        let device = cpu();
        device.embed(&mut x, &w, &device.ids(&ids));
        let want: Vec<f64> = ids.iter().flat_map(|&id| w64[id as usize * 19..][..19].to_vec()).collect();
        assert_eq!(wide(&x), want, "{dtype}");
    }
}

#[test]
fn scatter_add_rows_adds_every_occurrence() {
    let mut r = Random::new("scatter");
    let device = cpu();
    let (rows, n, count) = (11, 7, 60);
    let (before, src, index) = (r.normals(rows * n), r.normals(count * n), r.ids(count, rows - 1));
    let mut dst = before.clone();
    device.scatter_add_rows(&mut dst, &src, &device.ids(&index), n);
    let mut want = wide(&before);
    for (i, &row) in index.iter().enumerate() {
        (0..n).for_each(|c| want[row as usize * n + c] += src[i * n + c] as f64);
    }
    assert_close(&dst, &want, F32, "sums");
    assert_eq!(dst[(rows - 1) * n..], before[(rows - 1) * n..], "a row that no index names was written");
}

#[test]
fn sum_rows_sets_the_sums_of_the_columns() {
    let mut r = Random::new("sum_rows");
    for (t, m) in [(1, 1), (5, 3), (130, 17)] {
        let dy = r.normals(t * m);
        let mut db = poison(m);
        cpu().sum_rows(&mut db, &dy, t, m);
        let want: Vec<f64> = (0..m).map(|j| (0..t).map(|i| dy[i * m + j] as f64).sum()).collect();
        assert_close(&db, &want, F32, &format!("({t},{m})"));
    }
}

#[test]
fn count_nonfinite_adds_the_number_of_values_that_are_not_finite() {
    let mut r = Random::new("count");
    let mut x = r.normals(100_000);
    for (i, bad) in [(0, f32::NAN), (16_384, f32::INFINITY), (50_000, f32::NEG_INFINITY), (99_999, -f32::NAN)] {
        x[i] = bad;
    }
    x[1] = f32::MAX;
    x[2] = f32::MIN_POSITIVE / 4.0;
    let mut counter = vec![5.0, 2.0, 5.0];
    cpu().count_nonfinite(&mut counter, 1, &[(&x, 50_000), (&x, 100_000)]);
    assert_eq!(counter, [5.0, 8.0, 5.0]);
    cpu().count_nonfinite(&mut counter, 1, &[(&x, 99_999)]);
    assert_eq!(counter[1], 11.0, "the element after len was counted");
}

#[test]
fn copy_add_write_and_read_touch_the_elements_they_name() {
    let device = cpu();
    let mut x = device.zeros(6);
    device.write(&mut x, 2, &[1.0, 2.0]);
    let mut y = device.zeros(6);
    device.copy(&mut y, 0, &x, 1, 3);
    assert_eq!(y, [0.0, 1.0, 2.0, 0.0, 0.0, 0.0]);
    device.add(&mut y, &x, 3);
    assert_eq!(y, [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]);
    let mut host = [0.0; 2];
    device.read(&y, 1, &mut host);
    assert_eq!(host, [1.0, 3.0]);
    assert_eq!((device.len(&y), device.shape(&Weight::zeros(Dtype::F16, 3, 4))), (6, (3, 4)));
}
