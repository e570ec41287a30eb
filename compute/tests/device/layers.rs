//! Norms, rope, SwiGLU, embedding and sums.

use crate::machine::{Machine, on_every_device};
use crate::random::{DTYPES, F32, Random, assert_close, wide};
use crate::reference;
use compute::{Columns, Dtype, Heads, Norm};
use std::sync::Arc;

on_every_device! {
    rms_norm_divides_rows_by_their_root_mean_square,
    rms_norm_backward_agrees_with_finite_differences,
    rms_norm_backward_of_many_rows_agrees_with_the_formula,
    rope_rotates_pairs_by_their_position_and_the_inverse_undoes_it,
    rope_of_padding_beyond_the_table_leaves_the_other_rows_alone,
    swiglu_and_its_backward_agree_with_the_definition,
    swiglu_stays_finite_where_the_exponential_does_not,
    sigmoid_gate_and_its_backward_agree_with_the_definition,
    copy_columns_touches_the_elements_it_names,
    embed_copies_the_rows_of_the_tokens,
    one_hot_rows_have_a_one_at_their_token,
    scatter_add_rows_adds_every_occurrence,
    sum_rows_sets_the_sums_of_the_columns,
    count_nonfinite_adds_the_number_of_values_that_are_not_finite,
    sum_squares_sets_one_sum_per_item,
    copy_add_write_and_read_touch_the_elements_they_name,
}

/// (rows, n): odd, of the size of a head, and longer than one thread block takes at once.
const NORMS: [(usize, usize); 8] = [(1, 1), (3, 5), (9, 16), (17, 37), (40, 128), (33, 515), (2, 1024), (3, 5003)];

fn rms_norm_divides_rows_by_their_root_mean_square<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("rms_norm");
    for (rows, n) in NORMS {
        for dtype in DTYPES {
            let (w, w64) = r.weight(device, dtype, 1, n, 1.0);
            // Rows of very different sizes; in the smallest, eps is most of the sum.
            let x: Vec<f32> = (0..rows * n).map(|i| r.normal() * 10f32.powi((i / n) as i32 % 7 - 4)).collect();
            let mut y = device.poisoned(rows * n + 1);
            let norm = Norm { eps: 1e-6, offset: [0.0, 1.0][rows % 2] };
            let w64: Vec<f64> = w64.iter().map(|w| w + norm.offset as f64).collect();
            device.rms_norm(&mut y, &device.upload(&x), &w, norm, rows);
            let y = device.download(&y);
            // Row by row, so that no row hides behind the size of another.
            for (row, want) in reference::rms_norm(&wide(&x), &w64, 1e-6f32 as f64).chunks(n).enumerate() {
                assert_close(&y[row * n..][..n], want, F32, &format!("{dtype} ({rows},{n}) row {row}"));
            }
            assert!(y[rows * n].is_nan(), "wrote beyond the rows");
        }
    }
}

fn rms_norm_backward_agrees_with_finite_differences<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("rms_norm_backward");
    // Enough elements that not all of them can be sums that cancel to next to nothing.
    for (rows, n) in [(8, 1), (2, 3), (9, 17), (4, 50)] {
        for dtype in DTYPES {
            let (w, w64) = r.weight(device, dtype, 1, n, 1.0);
            let (x, dy, before) = (r.normals(rows * n), r.normals(rows * n), r.normals(rows * n));
            // A large eps, so that a formula that forgets it is seen.
            let eps = 0.25f32;
            let norm = Norm { eps, offset: [0.0, 1.0][n % 2] };
            let w64: Vec<f64> = w64.iter().map(|w| w + norm.offset as f64).collect();
            let (mut dx, mut dw) = (device.upload(&before), device.poisoned(n));
            device.rms_norm_backward(&mut dx, &mut dw, &device.upload(&dy), &device.upload(&x), &w, norm, rows);
            let (x64, dy64) = (wide(&x), wide(&dy));
            let loss = |x: &[f64], w: &[f64]| reference::dot(&reference::rms_norm(x, w, eps as f64), &dy64);
            let all: Vec<usize> = (0..rows * n).collect();
            let mut want = reference::gradient(&x64, &all, |x| loss(x, &w64));
            want.iter_mut().zip(&before).for_each(|(g, &b)| *g += b as f64);
            assert_close(&device.download(&dx), &want, F32, &format!("{dtype} ({rows},{n}) dx"));
            let want = reference::gradient(&w64, &all[..n], |w| loss(&x64, w));
            assert_close(&device.download(&dw), &want, F32, &format!("{dtype} ({rows},{n}) dw"));
        }
    }
}

/// The formula was proven on small shapes by finite differences; here it is that proof's extension to sizes at which a
/// backend cuts its work into pieces.
fn rms_norm_backward_of_many_rows_agrees_with_the_formula<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("rms_norm_backward of many rows");
    for (rows, n) in [(300, 128), (131, 20), (5, 3001), (33, 515)] {
        for dtype in DTYPES {
            let (w, w64) = r.weight(device, dtype, 1, n, 1.0);
            let (x, dy, before) = (r.normals(rows * n), r.normals(rows * n), r.normals(rows * n));
            let (mut dx, mut dw) = (device.upload(&before), device.poisoned(n));
            let norm = Norm { eps: 1e-5, offset: [0.0, 1.0][rows % 2] };
            let w64: Vec<f64> = w64.iter().map(|w| w + norm.offset as f64).collect();
            device.rms_norm_backward(&mut dx, &mut dw, &device.upload(&dy), &device.upload(&x), &w, norm, rows);
            let (x, dy, mut want_dx, mut want_dw) = (wide(&x), wide(&dy), wide(&before), vec![0.0; n]);
            for row in 0..rows {
                let (x, dy) = (&x[row * n..][..n], &dy[row * n..][..n]);
                let inv = 1.0 / (reference::dot(x, x) / n as f64 + 1e-5f32 as f64).sqrt();
                let pull = (0..n).map(|i| dy[i] * w64[i] * x[i]).sum::<f64>() * inv.powi(3) / n as f64;
                for i in 0..n {
                    want_dx[row * n + i] += dy[i] * w64[i] * inv - x[i] * pull;
                    want_dw[i] += dy[i] * x[i] * inv;
                }
            }
            assert_close(&device.download(&dx), &want_dx, F32, &format!("{dtype} ({rows},{n}) dx"));
            assert_close(&device.download(&dw), &want_dw, F32, &format!("{dtype} ({rows},{n}) dw"));
        }
    }
}

fn rope_rotates_pairs_by_their_position_and_the_inverse_undoes_it<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("rope");
    for (t, count, dim, rotated, position) in [
        (1, 1, 2, 2, 0),
        (5, 3, 6, 6, 0),
        (7, 2, 10, 10, 11),
        (7, 2, 11, 4, 3),
        (40, 4, 16, 16, 25),
        (3, 5, 128, 128, 9),
        (3, 5, 128, 32, 9),
    ] {
        let heads = Heads { count, dim, rotated };
        let table = device.upload(&reference::rope_table(position + t, rotated, 10_000.0));
        let at = device.ids(&[position as u32]);
        let x = r.normals(t * count * dim);
        let mut y = device.upload(&x);
        device.rope(&mut y, &table, &at, t, heads, false);
        let want = reference::rope(&wide(&x), position, heads, 10_000.0, false);
        assert_close(&device.download(&y), &want, F32, &format!("({t}) {heads:?} at {position}"));
        device.rope(&mut y, &table, &at, t, heads, true);
        assert_close(&device.download(&y), &wide(&x), F32, &format!("inverse ({t}) {heads:?} at {position}"));
        let mut back = device.upload(&x);
        device.rope(&mut back, &table, &at, t, heads, true);
        let want = reference::rope(&wide(&x), position, heads, 10_000.0, true);
        assert_close(&device.download(&back), &want, F32, &format!("backward ({t}) {heads:?} at {position}"));
    }
}

/// Windows are padded only where work is recorded, that is where `bucket` gives one.
fn rope_of_padding_beyond_the_table_leaves_the_other_rows_alone<D: Machine>(device: &Arc<D>) {
    if device.bucket(5).is_none() {
        return;
    }
    let mut r = Random::new("rope padding");
    let (t, rows, d, position) = (5, 8, 6, 7);
    let heads = Heads { count: 2, dim: d, rotated: d };
    // The table ends where the rows that count do.
    let table = device.upload(&reference::rope_table(position + t, d, 10_000.0));
    let x = r.normals(rows * heads.count * d);
    let mut y = device.upload(&x);
    device.rope(&mut y, &table, &device.ids(&[position as u32]), rows, heads, false);
    let (y, want) = (device.download(&y), reference::rope(&wide(&x), position, heads, 10_000.0, false));
    let count = t * heads.count * d;
    assert_close(&y[..count], &want[..count], F32, "rows in the table");
    assert!(y.iter().all(|v| v.is_finite()), "padding is not finite: {y:?}");
}

fn swiglu_and_its_backward_agree_with_the_definition<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("swiglu");
    for len in [1, 15, 16_385, 40_000] {
        let gate: Vec<f32> = (0..len).map(|_| 4.0 * r.normal()).collect();
        let (up, dh) = (r.normals(len), r.normals(len));
        let (on_gate, on_up, on_dh) = (device.upload(&gate), device.upload(&up), device.upload(&dh));
        let [mut h, mut dgate, mut dup] = [(); 3].map(|()| device.poisoned(len + 1));
        device.swiglu(&mut h, &on_gate, &on_up, len);
        device.swiglu_backward(&mut dgate, &mut dup, &on_dh, &on_gate, &on_up, len);
        let [h, dgate, dup] = [h, dgate, dup].map(|x| device.download(&x));
        assert!(h[len].is_nan() && dgate[len].is_nan() && dup[len].is_nan(), "wrote beyond {len}");
        let (gate, up, dh) = (wide(&gate), wide(&up), wide(&dh));
        let each = |f: &dyn Fn(usize) -> f64| (0..len).map(f).collect::<Vec<_>>();
        assert_close(&h[..len], &each(&|i| reference::silu(gate[i]) * up[i]), F32, "h");
        let step = 1e-5;
        let slope = |g: f64| (reference::silu(g + step) - reference::silu(g - step)) / (2.0 * step);
        assert_close(&dgate[..len], &each(&|i| dh[i] * up[i] * slope(gate[i])), F32, "dgate");
        assert_close(&dup[..len], &each(&|i| dh[i] * reference::silu(gate[i])), F32, "dup");
    }
}

fn swiglu_stays_finite_where_the_exponential_does_not<D: Machine>(device: &Arc<D>) {
    let values = [-1e4f32, -100.0, -90.0, 90.0, 1e4];
    let (gate, one) = (device.upload(&values), device.upload(&[1.0; 5]));
    let [mut h, mut dgate, mut dup] = [(); 3].map(|()| device.poisoned(5));
    device.swiglu(&mut h, &gate, &one, 5);
    device.swiglu_backward(&mut dgate, &mut dup, &one, &gate, &one, 5);
    let [h, dgate, dup] = [h, dgate, dup].map(|x| device.download(&x));
    for (i, want) in [0.0, 0.0, 0.0, 90.0, 1e4].into_iter().enumerate() {
        assert!((h[i] - want).abs() < 1e-30 && (dup[i] - want).abs() < 1e-30, "{h:?} {dup:?}");
        assert_eq!(dgate[i].round(), if values[i] > 0.0 { 1.0 } else { 0.0 }, "{dgate:?}");
    }
}

fn sigmoid_gate_and_its_backward_agree_with_the_definition<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("sigmoid_gate");
    for len in [1, 15, 3001] {
        let gate: Vec<f32> = (0..len).map(|_| 4.0 * r.normal()).collect();
        let (x, dh) = (r.normals(len), r.normals(len));
        let (on_gate, on_x, on_dh) = (device.upload(&gate), device.upload(&x), device.upload(&dh));
        let [mut h, mut dx, mut dgate] = [(); 3].map(|()| device.poisoned(len + 1));
        device.sigmoid_gate(&mut h, &on_x, &on_gate, len);
        device.sigmoid_gate_backward(&mut dx, &mut dgate, &on_dh, &on_x, &on_gate, len);
        let [h, dx, dgate] = [h, dx, dgate].map(|x| device.download(&x));
        assert!(h[len].is_nan() && dx[len].is_nan() && dgate[len].is_nan(), "wrote beyond {len}");
        let (gate, x, dh) = (wide(&gate), wide(&x), wide(&dh));
        let sigmoid = |g: f64| 1.0 / (1.0 + (-g).exp());
        let each = |f: &dyn Fn(usize) -> f64| (0..len).map(f).collect::<Vec<_>>();
        assert_close(&h[..len], &each(&|i| x[i] * sigmoid(gate[i])), F32, "h");
        assert_close(&dx[..len], &each(&|i| dh[i] * sigmoid(gate[i])), F32, "dx");
        let step = 1e-5;
        let slope = |g: f64| (sigmoid(g + step) - sigmoid(g - step)) / (2.0 * step);
        assert_close(&dgate[..len], &each(&|i| dh[i] * x[i] * slope(gate[i])), F32, "dgate");
    }
}

fn copy_columns_touches_the_elements_it_names<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("copy_columns");
    for (rows, columns, to, from) in [
        (1, 1, Columns { first: 0, of: 1 }, Columns { first: 0, of: 1 }),
        (5, 3, Columns { first: 2, of: 7 }, Columns { first: 1, of: 4 }),
        (300, 24, Columns { first: 24, of: 48 }, Columns { first: 0, of: 24 }),
        (0, 3, Columns { first: 2, of: 7 }, Columns { first: 1, of: 4 }),
    ] {
        let (before, src) = (r.normals((rows + 1) * to.of), r.normals((rows + 1) * from.of));
        let mut dst = device.upload(&before);
        device.copy_columns(&mut dst, to, &device.upload(&src), from, columns, rows);
        let mut want = before.to_vec();
        for row in 0..rows {
            let src = &src[row * from.of + from.first..][..columns];
            want[row * to.of + to.first..][..columns].copy_from_slice(src);
        }
        assert!(device.download(&dst) == want, "{rows} rows, {columns} columns from {from:?} to {to:?}");
    }
}

fn embed_copies_the_rows_of_the_tokens<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("embed");
    for dtype in DTYPES {
        for n in [19, 1048] {
            let (w, w64) = r.weight(device, dtype, 41, n, 1.0);
            let mut ids = r.ids(50, 41);
            ids.extend([0, 40, 40]);
            let mut x = device.poisoned(53 * n);
            device.embed(&mut x, &w, &device.ids(&ids));
            let want: Vec<f64> = ids.iter().flat_map(|&id| w64[id as usize * n..][..n].to_vec()).collect();
            assert_eq!(wide(&device.download(&x)), want, "{dtype} {n}");
        }
    }
}

fn one_hot_rows_have_a_one_at_their_token<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("one_hot");
    let (m, at, ids) = (1031, 2, [0, 1030, 7, 7]);
    let before = r.normals((at + ids.len() + 1) * m);
    let mut y = device.upload(&before);
    device.one_hot(&mut y, at, &device.ids(&ids), m);
    let mut want = before.to_vec();
    want[at * m..][..ids.len() * m].fill(0.0);
    ids.iter().enumerate().for_each(|(i, &id)| want[(at + i) * m + id as usize] = 1.0);
    assert!(device.download(&y) == want);
}

fn scatter_add_rows_adds_every_occurrence<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("scatter");
    for (rows, n, count) in [(11, 7, 60), (3, 1030, 700)] {
        let (before, src, index) = (r.normals(rows * n), r.normals(count * n), r.ids(count, rows - 1));
        let mut dst = device.upload(&before);
        device.scatter_add_rows(&mut dst, &device.upload(&src), &device.ids(&index), n);
        let dst = device.download(&dst);
        let mut want = wide(&before);
        for (i, &row) in index.iter().enumerate() {
            (0..n).for_each(|c| want[row as usize * n + c] += src[i * n + c] as f64);
        }
        assert_close(&dst, &want, F32, "sums");
        assert_eq!(dst[(rows - 1) * n..], before[(rows - 1) * n..], "a row that no index names was written");
    }
}

fn sum_rows_sets_the_sums_of_the_columns<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("sum_rows");
    for (t, m) in [(1, 1), (5, 3), (130, 17), (9, 1030)] {
        let dy = r.normals(t * m);
        let mut db = device.poisoned(m + 1);
        device.sum_rows(&mut db, &device.upload(&dy), t, m);
        let db = device.download(&db);
        let want: Vec<f64> = (0..m).map(|j| (0..t).map(|i| dy[i * m + j] as f64).sum()).collect();
        assert_close(&db[..m], &want, F32, &format!("({t},{m})"));
        assert!(db[m].is_nan(), "wrote beyond ({t},{m})");
    }
}

fn count_nonfinite_adds_the_number_of_values_that_are_not_finite<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("count");
    let mut x = r.normals(100_000);
    for (i, bad) in [(0, f32::NAN), (16_384, f32::INFINITY), (50_000, f32::NEG_INFINITY), (99_999, -f32::NAN)] {
        x[i] = bad;
    }
    x[1] = f32::MAX;
    x[2] = f32::MIN_POSITIVE / 4.0;
    let (x, mut counter) = (device.upload(&x), device.upload(&[5.0, 2.0, 5.0]));
    device.count_nonfinite(&mut counter, 1, &[(&x, 50_000), (&x, 100_000)]);
    assert_eq!(device.download(&counter), [5.0, 8.0, 5.0]);
    device.count_nonfinite(&mut counter, 1, &[(&x, 99_999)]);
    assert_eq!(device.download(&counter)[1], 11.0, "the element after len was counted");
    // More items than one launch may take, and none.
    let one = device.upload(&[f32::NAN, 1.0, f32::NAN]);
    device.count_nonfinite(&mut counter, 0, &vec![(&one, 2); 1500]);
    device.count_nonfinite(&mut counter, 2, &[]);
    assert_eq!(device.download(&counter), [1505.0, 11.0, 5.0]);
}

fn sum_squares_sets_one_sum_per_item<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("sum_squares");
    let lengths = [1, 0, 1000, 33_333, 5, 100_001];
    let items: Vec<Vec<f32>> = lengths
        .iter()
        .enumerate()
        .map(|(i, &n)| (0..n + 1).map(|_| r.normal() * 10f32.powi(i as i32 - 2)).collect())
        .collect();
    let buffers: Vec<D::Buffer> = items.iter().map(|x| device.upload(x)).collect();
    let named: Vec<(&D::Buffer, usize)> = buffers.iter().zip(lengths).collect();
    let mut sums = device.poisoned(lengths.len());
    device.sum_squares(&mut sums, &named);
    for ((sum, x), len) in device.download(&sums).into_iter().zip(&items).zip(lengths) {
        let want: f64 = x[..len].iter().map(|&v| (v as f64).powi(2)).sum();
        assert!((sum as f64 - want).abs() <= 1e-7 * want, "{len}: {sum} want {want}");
    }
    // A square beyond f32 shows as infinity.
    let large = device.upload(&[1e30]);
    device.sum_squares(&mut sums, &[(&large, 1)]);
    assert_eq!(device.download(&sums)[0], f32::INFINITY);
}

fn copy_add_write_and_read_touch_the_elements_they_name<D: Machine>(device: &Arc<D>) {
    let mut x = device.zeros(6);
    device.write(&mut x, 2, &[1.0, 2.0]);
    let mut y = device.zeros(6);
    device.copy(&mut y, 0, &x, 1, 3);
    assert_eq!(device.download(&y), [0.0, 1.0, 2.0, 0.0, 0.0, 0.0]);
    device.add(&mut y, &x, 3);
    assert_eq!(device.download(&y), [0.0, 1.0, 3.0, 0.0, 0.0, 0.0]);
    let mut host = [0.0; 2];
    device.read(&y, 1, &mut host);
    assert_eq!(host, [1.0, 3.0]);
    let w = device.weight(Dtype::F16, 3, 4, &[0.0; 12]);
    assert_eq!((device.len(&y), device.shape(&w), device.dtype(&w)), (6, (3, 4), Dtype::F16));
}
