use super::*;

#[test]
fn a_value_on_the_grid_survives_a_write_and_a_read() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let w = Weight::zeros(dtype, 3, 1037);
        let values: Vec<f32> = (0..1037).map(|i| (i as f32 % 64.0 - 32.0) / 8.0).collect();
        w.write(1, 0, &values, &Stream::rounding(1, 2, 3));
        let mut back = vec![0.0; 1037];
        w.read(1, 0, &mut back);
        assert_eq!(back, values, "{dtype}");
        w.read(2, 0, &mut back);
        assert!(back.iter().all(|&v| v == 0.0), "{dtype}: a neighbouring row was written");
    }
}

#[test]
fn stochastic_rounding_is_unbiased() {
    // n draws of one value: the mean's standard error is at most ulp / (2 sqrt n).
    let n = 1 << 16;
    let subnormal_f16 = 3.3e-6;
    for (dtype, mantissa) in [(Dtype::BF16, 7), (Dtype::F16, 10)] {
        for value in [1.001_f32, -3.3337, 0.1, 1e-3, -1.0 - 1e-4, subnormal_f16] {
            let w = Weight::zeros(dtype, 1, n);
            w.write(0, 0, &vec![value; n], &Stream::rounding(99, 5, 1));
            let mut back = vec![0.0; n];
            w.read(0, 0, &mut back);
            let mean = back.iter().map(|&v| v as f64).sum::<f64>() / n as f64;
            let floor = if dtype == Dtype::F16 { -14.0 } else { -126.0 };
            let ulp = 2f64.powf((value.abs() as f64).log2().floor().max(floor) - mantissa as f64);
            let error = (mean - value as f64).abs() / ulp;
            println!("{dtype} {value}: mean of {n} writes off by {error:.1e} ulp");
            assert!(error < 5.0 * 0.5 / (n as f64).sqrt(), "{dtype} {value}: off by {error} ulp");
            let mut kinds = back.clone();
            kinds.sort_by(f32::total_cmp);
            kinds.dedup();
            assert_eq!(kinds.len(), 2, "{dtype} {value} became {kinds:?}");
        }
    }
}

#[test]
fn a_finite_value_never_rounds_to_infinity() {
    for (dtype, largest) in [(Dtype::BF16, 3.3895314e38_f32), (Dtype::F16, 65504.0)] {
        let w = Weight::zeros(dtype, 1, 128);
        w.write(0, 0, &[f32::MAX; 128], &Stream::rounding(1, 1, 1));
        let mut back = [0.0; 128];
        w.read(0, 0, &mut back);
        assert!(back.iter().all(|&v| v == largest), "{dtype}: {back:?}");
    }
}

#[test]
fn pieces_are_those_of_the_row_and_nothing_beside_them_is_written() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let w = Weight::zeros(dtype, 3, 101);
        let values: Vec<f32> = (0..101).map(|i| i as f32 - 50.0).collect();
        w.write(1, 0, &values, &Stream::rounding(1, 2, 3));
        for (col, len, piece, step) in
            [(0, 101, 16, 16), (3, 90, 16, 21), (5, 32, 32, 40), (7, 1, 8, 9), (0, 50, 7, 11)]
        {
            // Not one element more than is needed.
            let mut out = vec![f32::NAN; (len - 1) / piece * step + (len - 1) % piece + 1];
            w.read_pieces(1, col, len, &mut out, piece, step);
            for (i, v) in out.iter().enumerate() {
                match (i / step * piece + i % step, i % step < piece) {
                    (at, true) => assert_eq!(*v, values[col + at], "{dtype} ({col},{len},{piece},{step}) at {i}"),
                    (_, false) => assert!(v.is_nan(), "{dtype} ({col},{len},{piece},{step}): wrote {i}"),
                }
            }
        }
    }
}

#[test]
fn pairs_of_rows_are_those_of_the_two_rows_and_nothing_beside_them_is_written() {
    let w = Weight::zeros(Dtype::BF16, 3, 701);
    let stream = Stream::rounding(1, 2, 3);
    // On the grid of bf16, so that rounding changes nothing.
    let row = |sign: f32| (0..701).map(|i| sign * (i % 128) as f32).collect::<Vec<f32>>();
    let rows = [row(1.0), row(-1.0)];
    rows.iter().enumerate().for_each(|(i, values)| w.write(1 + i, 0, values, &stream));
    for (col, len, piece, step) in [
        (0, 701, 32, 40),
        (1, 96, 32, 32),
        (4, 31, 32, 40),
        (3, 600, 48, 48),
        (5, 7, 16, 21),
        (1, 300, 256, 300),
        (0, 9, 1, 2),
    ] {
        let mut out = vec![f32::NAN; (len - 1) / piece * step + (len - 1) % piece + 1];
        w.read_pairs_of_rows(1, col, len, &mut out, piece, step);
        for (i, pair) in out.iter().enumerate() {
            let halves = [pair.to_bits() << 16, pair.to_bits() & 0xFFFF_0000].map(f32::from_bits);
            match (i / step * piece + i % step, i % step < piece) {
                (at, true) => {
                    assert_eq!(halves, [rows[0][col + at], rows[1][col + at]], "({col},{len},{piece}) at {i}")
                }
                (_, false) => assert!(pair.is_nan(), "({col},{len},{piece}): wrote {i}"),
            }
        }
    }
}

#[test]
fn a_step_of_many_elements_is_that_of_each() {
    const ROWS: usize = 3;
    const COLS: usize = 1301;
    let (stream, factor, keep) = (Stream::rounding(3, 5, 7), 0.37, 0.99);
    let start: Vec<f32> = (0..ROWS * COLS).map(|i| (i % 251) as f32 - 125.0).collect();
    let u: Vec<f32> = (0..COLS).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
    // Row 1 begins at element 1301: the first whole group of random numbers is that from its element 107 on.
    for (col, len) in [(0, COLS), (107, 256), (107, 1000), (106, 700), (235, 255), (3, 1), (1300, 1), (50, 0)] {
        let w = Weight::from_values(Dtype::BF16, ROWS, COLS, &start);
        w.subtract(1, col, &u[..len], factor, keep, &stream);
        let mut want = start.clone();
        let mut random = vec![0; ROWS * COLS];
        stream.fill_u16(0, &mut random);
        for (at, u) in (COLS + col..).zip(&u[..len]) {
            let rounded = rounded_bf16((want[at] - factor * u) * keep, random[at]);
            want[at] = f32::from_bits((rounded as u32) << 16);
        }
        assert_eq!(w.values(), want, "{len} elements from {col} on");
    }
}

#[test]
fn a_step_of_what_is_no_number_leaves_what_each_would() {
    let values = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, -0.0, 1e-45, 1.0];
    let u: Vec<f32> = (0..512).map(|i| values[i % values.len()]).collect();
    let stream = Stream::rounding(3, 5, 7);
    let mut random = [0; 512];
    stream.fill_u16(0, &mut random);
    for factor in [0.0, 1.0, -1.0] {
        let w = Weight::from_values(Dtype::BF16, 1, 512, &[1.0; 512]);
        w.subtract(0, 0, &u, factor, 1.0, &stream);
        for (i, v) in w.values().iter().enumerate() {
            let want = (rounded_bf16(1.0 - factor * u[i], random[i]) as u32) << 16;
            assert_eq!(v.to_bits(), want, "1 - {factor}·{} at {i}", u[i]);
        }
    }
}

#[test]
fn rows_of_pairs_are_those_that_the_files_have() {
    let values: Vec<f32> = (0..12 * 6).map(|i| i as f32).collect();
    let even = Weight::from_values(Dtype::BF16, 12, 6, &values);
    assert!(even.rows_of_pairs(2, 10).is_some() && even.rows_of_pairs(12, 0).is_some());
    let odd = Weight::from_values(Dtype::BF16, 24, 3, &values);
    assert!(odd.rows_of_pairs(0, 24).is_none(), "a pair would lie across two rows");
    let mixed = Weight::zeros(Dtype::BF16, 12, 6).ordered(RowOrder::Interleaved { head_dim: 4 });
    assert!(mixed.rows_of_pairs(0, 12).is_none(), "the rows lie in another order");
}

#[test]
#[should_panic(expected = "2+11 outside 12 rows")]
fn rows_of_pairs_beyond_the_last_are_refused() {
    Weight::zeros(Dtype::BF16, 12, 6).rows_of_pairs(2, 11);
}

#[test]
#[should_panic(expected = "outside 31")]
fn pieces_that_do_not_fit_are_refused() {
    Weight::zeros(Dtype::BF16, 2, 64).read_pieces(0, 0, 32, &mut [0.0; 31], 16, 16);
}

#[test]
#[should_panic(expected = "outside (2,8)")]
fn a_place_that_no_sum_can_hold_is_refused() {
    Weight::zeros(Dtype::F32, 2, 8).read(0, usize::MAX, &mut [0.0; 1]);
}

#[test]
#[should_panic(expected = "outside (2,8)")]
fn a_write_outside_the_tensor_is_refused() {
    Weight::zeros(Dtype::F32, 2, 8).write(1, 4, &[0.0; 5], &Stream::rounding(1, 1, 1));
}
