//! Moments in bf16 on a CPU: a step computes as with f32 ones of the same values, and leaves them rounded.

use crate::random::Random;
use compute::cpu::{Buffer, Stored, Weight};
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Compressed, Cpu, Device, Dtype, Factors, Moments, NORM_FACTOR,
    NORM_SLOTS, ScaleType, Stream, Write,
};

const MOMENTS: Moments = Moments { beta1: 0.9, beta2: 0.999, eps: 1e-6 };

/// A moment with these values, which are rounded first.
fn stored(dtype: Dtype, values: &[f32]) -> Stored {
    let mut rounded = Stored::zeros(Dtype::BF16, values.len());
    rounded.write(0, values);
    let mut grid = vec![0.0; values.len()];
    rounded.read(0, &mut grid);
    let mut stored = Stored::zeros(dtype, values.len());
    stored.write(0, &grid);
    stored
}

fn values(stored: &Stored) -> Vec<f32> {
    let mut values = vec![0.0; stored.len()];
    stored.read(0, &mut values);
    values
}

/// W and both moments after a step by each of the three ways, from the same bf16 values.
fn after(dtype: Dtype, (m, n, t, rank): (usize, usize, usize, usize)) -> [(Vec<f32>, Vec<f32>, Vec<f32>); 3] {
    let device = Cpu::new(2).expect("two threads");
    let mut r = Random::new("moments");
    let (channels, dim) = (m.max(n), m.min(n));
    let write = Write { step: 0.05, decay: 0.01, stream: Stream::rounding(3, 9, 4) };
    let (x, dy, p): (Buffer, Buffer, Buffer) = (r.normals(t * n), r.normals(t * m), r.normals(rank * dim));
    let f = Factors { x: &x, dy: &dy, t, m, n };
    let mut moments = |len: usize| {
        let (avg, sq) = (r.normals(len), r.normals(len));
        (stored(dtype, &avg), stored(dtype, &sq.iter().map(|v| v * v).collect::<Vec<_>>()))
    };
    let (mut compressed, mut dense, mut rows) = (moments(rank * channels), moments(m * n), moments(2 * n));
    let (start, g) = (r.normals(m * n), r.normals(2 * n));
    let weight = || Weight::from_values(Dtype::F32, m, n, &start);
    let weights = [weight(), weight(), weight()];
    device.run(|| {
        let c =
            Compressed { projection: &p, rank, scale_type: ScaleType::Channel, moments: MOMENTS, weight: Dtype::F32 };
        let (mut s, mut norms) = (device.zeros(channels), device.zeros(NORM_SLOTS));
        let (exp_avg, exp_avg_sq) = (&compressed.0, &compressed.1);
        let prepare = ApolloPrepare { s: &mut s, at: 0, exp_avg, exp_avg_sq, factors: f, compressed: c };
        device.apollo_prepare(&mut norms, &mut [prepare]);
        norms[NORM_FACTOR] = 0.8;
        let (exp_avg, exp_avg_sq) = (&mut compressed.0, &mut compressed.1);
        let commit =
            ApolloCommit { w: &weights[0], s: &s, at: 0, exp_avg, exp_avg_sq, factors: f, compressed: c, write };
        device.apollo_commit(&mut norms, &mut [commit]);
        device.adamw_factors(&weights[1], &mut dense.0, &mut dense.1, &f, MOMENTS, write);
        let list = [AdamRow { row: 1, slot: 1, step: 0.1 }, AdamRow { row: 3, slot: 0, step: 0.2 }];
        let (exp_avg, exp_avg_sq) = (&mut rows.0, &mut rows.1);
        let adamw = AdamwRows { w: &weights[2], rows: &list, g: &g, exp_avg, exp_avg_sq, write };
        device.adamw_rows(&mut [adamw], MOMENTS);
    });
    let result = |w: &Weight, (a, b): &(Stored, Stored)| (w.values(), values(a), values(b));
    [result(&weights[0], &compressed), result(&weights[1], &dense), result(&weights[2], &rows)]
}

#[test]
fn a_step_on_moments_in_bf16_writes_the_same_weights_and_rounded_moments() {
    for shape in [(40, 24, 5, 7), (24, 700, 3, 20), (5, 1100, 30, 4)] {
        let (narrow, wide) = (after(Dtype::BF16, shape), after(Dtype::F32, shape));
        for ((narrow, wide), way) in narrow.iter().zip(&wide).zip(["apollo", "adamw_factors", "adamw_rows"]) {
            assert!(narrow.0 == wide.0, "{way} {shape:?}: weights differ");
            for (which, (got, want)) in [(&narrow.1, &wide.1), (&narrow.2, &wide.2)].into_iter().enumerate() {
                let mut other = 0;
                for (&got, &want) in got.iter().zip(want) {
                    let below = f32::from_bits(want.to_bits() & 0xFFFF_0000);
                    let above = f32::from_bits(below.to_bits() + 0x1_0000);
                    assert!(got == below || got == above, "{way} {shape:?} moment {which}: {got} for {want}");
                    other += usize::from(got != want);
                }
                assert!(other * 2 > got.len(), "{way} {shape:?} moment {which}: the test must round");
            }
        }
    }
}
