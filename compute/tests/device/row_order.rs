//! A weight whose rows lie in another order than the files' is the same weight to everybody who uses it.

use crate::machine::Machine;
use crate::random::{DTYPES, Random};
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Compressed, Cpu, Device, Dtype, Factors, Limiter, Moments,
    NORM_SLOTS, RowOrder, ScaleType, Stream, Write, cpu::Weight,
};

const MOMENTS: Moments = Moments { beta1: 0.9, beta2: 0.99, eps: 1e-6 };
const ORDER: RowOrder = RowOrder::Interleaved { head_dim: 6 };

/// Bytes of a weight as they lie when its rows (elements of a vector) are interleaved by hand.
fn interleaved(bytes: &[u8], units: usize) -> Vec<u8> {
    let unit = bytes.len() / units;
    (0..units).flat_map(|at| bytes[ORDER.in_files(at) * unit..][..unit].to_vec()).collect()
}

fn units(rows: usize, cols: usize) -> usize {
    if rows == 1 { cols } else { rows }
}

/// The same values twice: as in the files, and interleaved in memory.
fn pair(random: &mut Random, dtype: Dtype, rows: usize, cols: usize) -> (Weight, Weight) {
    let plain = Weight::from_values(dtype, rows, cols, &random.normals(rows * cols));
    let (mut bytes, live) = (vec![0; plain.bytes()], Weight::zeros(dtype, rows, cols));
    plain.read_bytes(0, &mut bytes);
    live.write_bytes(0, &interleaved(&bytes, units(rows, cols)));
    (plain, live.ordered(ORDER))
}

#[test]
fn values_and_bytes_come_and_go_in_the_order_of_the_files() {
    let mut random = Random::new("values_and_bytes");
    for dtype in DTYPES {
        for (rows, cols) in [(12, 1100), (1, 1200), (6, 3)] {
            let (plain, live) = pair(&mut random, dtype, rows, cols);
            assert_eq!(live.values(), plain.values(), "{dtype} ({rows},{cols})");
            let mut part = vec![0.0; cols / 2];
            live.read(rows - 1, cols / 3, &mut part);
            assert_eq!(part, plain.values()[(rows - 1) * cols + cols / 3..][..cols / 2]);
            // Pieces that begin and end anywhere between elements.
            let (size, bytes) = (dtype.size(), plain.bytes());
            for (from, to) in [(0, bytes), (size, bytes - size), (bytes / 2 / size * size, bytes)] {
                let (mut a, mut b) = (vec![0; to - from], vec![1; to - from]);
                plain.read_bytes(from, &mut a);
                live.read_bytes(from, &mut b);
                assert_eq!(a, b, "{dtype} {from}..{to}");
                a.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(3) & 0x3b);
                for weight in [&plain, &live] {
                    weight.write_bytes(from, &a);
                }
            }
            assert_eq!(live.values(), plain.values(), "{dtype} after writes");
        }
    }
}

#[test]
fn a_written_row_lands_where_the_server_reads_it() {
    let live = Weight::zeros(Dtype::F32, 6, 2).ordered(ORDER);
    for row in 0..6 {
        live.write(row, 0, &[row as f32; 2], &Stream::rounding(1, 1, 1));
    }
    let raw: Vec<f32> = live.ordered(RowOrder::AsFiles).values();
    assert_eq!(raw, [0.0, 0.0, 3.0, 3.0, 1.0, 1.0, 4.0, 4.0, 2.0, 2.0, 5.0, 5.0]);
}

/// Products, steps and their rounding are the same to the bit, so that neither a model nor its optimizer's state
/// can tell the two apart.
#[test]
fn products_and_steps_are_the_same_to_the_bit() {
    let device = Cpu::new(2).expect("two threads");
    let (t, m, n, rank) = (5, 24, 10, 4);
    let mut random = Random::new("products_and_steps");
    for dtype in DTYPES {
        let (plain, live) = pair(&mut random, dtype, m, n);
        let (plain_bias, live_bias) = pair(&mut random, dtype, 1, m);
        let (x, dy, p) = (random.normals(t * n), random.normals(t * m), random.normals(rank * n));
        let run = |w: &Weight, bias: &Weight| {
            let (mut y, mut dx) = (device.zeros(t * m), device.zeros(t * n));
            device.linear(&mut y, &x, w, Some(bias), t);
            device.linear_dx(&mut dx, &dy, w, t, false);
            let f = Factors { x: &x, dy: &dy, t, m, n };
            let c =
                Compressed { projection: &p, rank, scale_type: ScaleType::Channel, moments: MOMENTS, weight: dtype };
            let (mut s, mut norms) = (device.zeros(m), device.zeros(NORM_SLOTS));
            let [mut avg, mut avg_sq] = [(); 2].map(|()| device.stored(Dtype::F32, m * rank));
            device.apollo_prepare(
                &mut norms,
                &mut [ApolloPrepare {
                    s: &mut s,
                    at: 0,
                    exp_avg: &avg,
                    exp_avg_sq: &avg_sq,
                    factors: f,
                    compressed: c,
                }],
            );
            device.limit(&mut norms, &[(0, Limiter { growth: Some(1.01), floor: 0.5, expected: 10.0 })]);
            let write = Write { step: 0.01, decay: 0.0, stream: Stream::rounding(7, 3, 2) };
            device.apollo_commit(
                &mut norms,
                &mut [ApolloCommit {
                    w,
                    s: &s,
                    at: 0,
                    exp_avg: &mut avg,
                    exp_avg_sq: &mut avg_sq,
                    factors: f,
                    compressed: c,
                    write,
                }],
            );
            let [mut exp_avg, mut exp_avg_sq] = [(); 2].map(|()| device.stored(Dtype::F32, m));
            let row = [AdamRow { row: 0, slot: 0, step: 0.01 }];
            device.adamw_rows(
                &mut [AdamwRows {
                    w: bias,
                    rows: &row,
                    g: &dy,
                    exp_avg: &mut exp_avg,
                    exp_avg_sq: &mut exp_avg_sq,
                    write,
                }],
                MOMENTS,
            );
            let moments = [&avg, &avg_sq, &exp_avg].map(|moment| device.download_stored(moment));
            ([y, dx], moments, [w.values(), bias.values()])
        };
        assert_eq!(run(&live, &live_bias), run(&plain, &plain_bias), "{dtype}");
    }
}

#[test]
#[should_panic(expected = "10 rows in Interleaved")]
fn rows_that_are_no_whole_heads_are_refused() {
    let _ = Weight::zeros(Dtype::F32, 10, 4).ordered(ORDER);
}
