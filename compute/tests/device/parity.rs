//! The CUDA backend against the CPU backend: the same steps of the optimizer, for many tensors per call.
//!
//! Random numbers are the same bit for bit, so 16-bit weights may differ only where the values that are rounded lie on
//! both sides of a random number: they differ by some 2^-16 of a weight's distance to its neighbour, and so does the
//! share of elements that are rounded apart.

use crate::machine::{Machine, on_every_device};
use crate::random::{F32, Random, assert_close, wide};
use crate::reference;
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Compressed, Cpu, Cuda, Device, Dtype, Factors, Limiter,
    LinearOutput, Moments, NORM_SLOTS, ScaleType, Stream, Write, cpu::Buffer,
};
use std::sync::Arc;

on_every_device! {
    grouped_products_are_the_products_one_by_one,
    a_row_that_is_not_finite_leaves_the_others_alone,
}

const MOMENTS: Moments = Moments { beta1: 0.9, beta2: 0.99, eps: 1e-6 };

/// A tensor of a step and its factors in each of the steps.
struct Tensor {
    dtype: Dtype,
    m: usize,
    n: usize,
    t: usize,
    rank: usize,
    scale_type: ScaleType,
    w: Vec<f32>,
    p: Vec<f32>,
    factors: Vec<(Buffer, Buffer)>,
}

/// What a device makes of a tensor: moments, norms and the bytes of W.
struct Outcome {
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
    norms: Vec<f32>,
    w: Vec<u8>,
}

const STEPS: usize = 3;

/// Rows of whole groups of 128 columns and others; tall, wide, square; t below and above every size of a tile; ranks
/// that no vector divides; more than 1024 columns, which is more than one block writes.
fn tensors(r: &mut Random) -> Vec<Tensor> {
    use Dtype::{BF16, F16, F32};
    use ScaleType::{Channel, Tensor as Mini};
    let list = [
        (BF16, 200, 128, 32, 16, Channel),
        (BF16, 40, 1280, 17, 13, Channel),
        (BF16, 130, 256, 1, 5, Mini),
        (BF16, 128, 128, 100, 131, Channel),
        (BF16, 64, 384, 33, 7, Mini),
        (BF16, 37, 130, 9, 6, Channel),
        (BF16, 150, 20, 65, 20, Channel),
        (F16, 96, 256, 32, 8, Channel),
        (F16, 70, 45, 12, 9, Mini),
        (F32, 90, 128, 32, 12, Channel),
        (F32, 33, 70, 40, 8, Channel),
        (BF16, 7, 128, 16, 7, Channel),
    ];
    list.into_iter()
        .map(|(dtype, m, n, t, rank, scale_type)| {
            let mut p = vec![0.0; rank * m.min(n)];
            p.iter_mut().for_each(|v| *v = r.normal() / (rank as f32).sqrt());
            // On the grid of every dtype.
            let w = (0..m * n).map(|_| (r.below(128) as f32 - 64.0) / 64.0).collect();
            let factors = (0..STEPS).map(|_| (r.normals(t * n), r.normals(t * m))).collect();
            Tensor { dtype, m, n, t, rank, scale_type, w, p, factors }
        })
        .collect()
}

fn steps<D: Machine>(device: &Arc<D>, tensors: &[Tensor]) -> Vec<Outcome> {
    let state = |t: &Tensor| device.stored(Dtype::F32, t.rank * t.m.max(t.n));
    let weights: Vec<D::Weight> = tensors.iter().map(|t| device.weight(t.dtype, t.m, t.n, &t.w)).collect();
    let projections: Vec<D::Buffer> = tensors.iter().map(|t| device.upload(&t.p)).collect();
    let mut moments: Vec<[D::Stored; 2]> = tensors.iter().map(|t| [state(t), state(t)]).collect();
    let mut norms = device.zeros(NORM_SLOTS * tensors.len());
    for step in 0..STEPS {
        let factors: Vec<[D::Buffer; 2]> =
            tensors.iter().map(|t| [device.upload(&t.factors[step].0), device.upload(&t.factors[step].1)]).collect();
        let mut scalings: Vec<D::Buffer> = tensors.iter().map(|t| device.poisoned(t.m.max(t.n))).collect();
        let parts = |i: usize| {
            let Tensor { dtype, m, n, t, rank, scale_type, .. } = tensors[i];
            let factors = Factors { x: &factors[i][0], dy: &factors[i][1], t, m, n };
            (factors, Compressed { projection: &projections[i], rank, scale_type, moments: MOMENTS, weight: dtype })
        };
        let mut prepare: Vec<ApolloPrepare<D>> = scalings
            .iter_mut()
            .zip(&moments)
            .enumerate()
            .map(|(i, (s, [exp_avg, exp_avg_sq]))| {
                let (factors, compressed) = parts(i);
                ApolloPrepare { s, at: i * NORM_SLOTS, exp_avg, exp_avg_sq, factors, compressed }
            })
            .collect();
        device.apollo_prepare(&mut norms, &mut prepare);
        let limiters: Vec<(usize, Limiter)> = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| {
                let expected = ((t.rank * t.m.max(t.n)) as f32).sqrt();
                (i * NORM_SLOTS, Limiter { growth: Some(1.01), floor: 0.5, expected })
            })
            .collect();
        device.limit(&mut norms, &limiters);
        let mut commit: Vec<ApolloCommit<D>> = scalings
            .iter()
            .zip(&mut moments)
            .enumerate()
            .map(|(i, (s, [exp_avg, exp_avg_sq]))| {
                let (factors, compressed) = parts(i);
                // Moves of about a bf16 weight's distance to its neighbour.
                let write = Write { step: 2e-3, decay: 1e-3, stream: Stream::rounding(9, step as u64, i) };
                let at = i * NORM_SLOTS;
                ApolloCommit { w: &weights[i], s, at, exp_avg, exp_avg_sq, factors, compressed, write }
            })
            .collect();
        device.apollo_commit(&mut norms, &mut commit);
    }
    let norms = device.download(&norms);
    let outcome = |(i, (w, [exp_avg, exp_avg_sq])): (usize, (&D::Weight, &[D::Stored; 2]))| {
        let mut bytes = vec![0; tensors[i].w.len() * tensors[i].dtype.size()];
        device.read_weight(w, 0, &mut bytes);
        Outcome {
            exp_avg: device.download_stored(exp_avg),
            exp_avg_sq: device.download_stored(exp_avg_sq),
            norms: norms[i * NORM_SLOTS..][..NORM_SLOTS].to_vec(),
            w: bytes,
        }
    };
    weights.iter().zip(&moments).enumerate().map(outcome).collect()
}

#[test]
fn steps_of_many_tensors_leave_what_the_cpu_leaves() {
    let mut r = Random::new("parity");
    let tensors = tensors(&mut r);
    // Whatever the processor rounds, a GPU does not.
    let cpu = Arc::new(Cpu::new(2).expect("two threads").without_pairs());
    let cuda = Cuda::start();
    let (want, got) = (cpu.run(|| steps(&cpu, &tensors)), steps(&cuda, &tensors));
    for ((tensor, want), got) in tensors.iter().zip(want).zip(got) {
        let what = format!("{} ({},{}) t {} rank {}", tensor.dtype, tensor.m, tensor.n, tensor.t, tensor.rank);
        // Sums of t·d products in another order.
        assert_close(&got.exp_avg, &wide(&want.exp_avg), 1e-5, &format!("{what} exp_avg"));
        assert_close(&got.exp_avg_sq, &wide(&want.exp_avg_sq), 2e-5, &format!("{what} exp_avg_sq"));
        for (got, want) in got.norms.iter().zip(&want.norms) {
            assert!((got - want).abs() <= 3e-5 * want.abs(), "{what}: norm {got} want {want}");
        }
        if tensor.dtype == Dtype::F32 {
            let values =
                |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
            assert_close(&values(&got.w), &wide(&values(&want.w)), 1e-6, &format!("{what} W"));
            continue;
        }
        let values = |bytes: &[u8]| bytes.as_chunks::<2>().0.iter().map(|b| i16::from_le_bytes(*b)).collect::<Vec<_>>();
        let (got, want) = (values(&got.w), values(&want.w));
        let moved = want.iter().zip(&values(&bytes_of(tensor))).filter(|(a, b)| a != b).count();
        assert!(2 * moved > want.len(), "{what}: {moved} of {} elements moved", want.len());
        let apart: Vec<i32> =
            got.iter().zip(&want).map(|(a, b)| (*a as i32 - *b as i32).abs()).filter(|d| *d > 0).collect();
        println!("{what}: {} of {} elements are rounded apart", apart.len(), want.len());
        // f16 keeps three bits more, so the same error of a value is eight times the share of a neighbour's distance.
        // Three steps, each with the errors of two products and a scaling, are ten times the 2^-16 of one.
        let share = if tensor.dtype == Dtype::F16 { 1e-3 } else { 2e-4 };
        assert!(apart.len() as f64 <= 3.0 + share * want.len() as f64, "{what}: {} rounded apart", apart.len());
        assert!(apart.iter().all(|d| *d == 1), "{what}: further than a neighbour");
    }
}

fn bytes_of(tensor: &Tensor) -> Vec<u8> {
    let w = compute::cpu::Weight::from_values(tensor.dtype, tensor.m, tensor.n, &tensor.w);
    let mut bytes = vec![0; w.bytes()];
    w.read_bytes(0, &mut bytes);
    bytes
}

#[test]
fn projections_are_those_of_the_cpu_to_the_last_bit_but_one() {
    let (cpu, cuda) = (Cpu::start(), Cuda::start());
    for (rank, dim) in [(1, 1), (3, 5), (8, 1000), (16, 64)] {
        let (mut want, mut got) = (cpu.poisoned(rank * dim), cuda.poisoned(rank * dim));
        cpu.normal_projection(&mut want, rank, dim, Stream::projection(5, 7, dim));
        cuda.normal_projection(&mut got, rank, dim, Stream::projection(5, 7, dim));
        for (i, (got, want)) in cuda.download(&got).iter().zip(&want).enumerate() {
            assert!(
                (got.to_bits() as i64 - want.to_bits() as i64).abs() <= 1,
                "({rank},{dim})[{i}]: {got} want {want}"
            );
        }
    }
}

/// Rows of several tensors of different dtypes in one call: the arithmetic and the random numbers of the CPU.
fn vectors<D: Machine>(device: &Arc<D>, r: &mut Random) -> Vec<Vec<f32>> {
    let shapes =
        [(Dtype::BF16, 1, 1024), (Dtype::F32, 1, 33), (Dtype::F16, 5, 700), (Dtype::BF16, 9, 129), (Dtype::BF16, 1, 1)];
    let weights: Vec<D::Weight> = shapes.iter().map(|&(dtype, m, n)| r.weight(device, dtype, m, n, 1.0).0).collect();
    let lists: Vec<Vec<AdamRow>> = shapes
        .iter()
        .map(|&(_, m, _)| (0..m as u32).step_by(2).map(|row| AdamRow { row, slot: row / 2, step: 0.01 }).collect())
        .collect();
    let mut moments: Vec<[D::Stored; 2]> =
        shapes.iter().map(|&(_, m, n)| [(); 2].map(|()| device.stored(Dtype::F32, m * n))).collect();
    for step in 0..3 {
        let gradients: Vec<D::Buffer> =
            shapes.iter().zip(&lists).map(|(&(_, _, n), list)| device.upload(&r.normals(list.len() * n))).collect();
        let mut tasks: Vec<AdamwRows<D>> = moments
            .iter_mut()
            .enumerate()
            .map(|(i, [exp_avg, exp_avg_sq])| {
                let write = Write { step: f32::NAN, decay: 0.001, stream: Stream::rounding(3, step, i) };
                AdamwRows { w: &weights[i], rows: &lists[i], g: &gradients[i], exp_avg, exp_avg_sq, write }
            })
            .collect();
        device.adamw_rows(&mut tasks, MOMENTS);
    }
    let weights = weights.iter().map(|w| device.weight_values(w));
    weights.chain(moments.iter().flatten().map(|m| device.download_stored(m))).collect()
}

#[test]
fn rows_under_adamw_are_those_of_the_cpu() {
    let want = vectors(&Cpu::start(), &mut Random::new("adamw parity"));
    let got = vectors(&Cuda::start(), &mut Random::new("adamw parity"));
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        // The same operations in the same order; a GPU's compiler may fuse a product and a sum.
        assert_close(got, &wide(want), 1e-6, &format!("array {i}"));
    }
}

/// One x and several weights in one launch, more than a launch takes; then dx from all of them.
fn grouped_products_are_the_products_one_by_one<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("grouped");
    for (round, n) in [64, 8, 1088, 130, 36].into_iter().enumerate() {
        for t in [1, 7, 8, 9, 16, 31, 33, 64, 65, 100] {
            let dtype = if round == 2 && t == 9 { Dtype::F16 } else { Dtype::BF16 };
            let ms: &[usize] = if t == 8 { &[40, 7, 300, 16, 1] } else { &[40, 7, 150] };
            let weights: Vec<(D::Weight, Vec<f64>)> = ms.iter().map(|&m| r.weight(device, dtype, m, n, 0.3)).collect();
            let (bias, bias64) = r.weight(device, dtype, 1, ms[1], 1.0);
            let x = r.normals(t * n);
            let x_buffer = device.upload(&x);
            let mut outputs: Vec<D::Buffer> = ms.iter().map(|m| device.poisoned(t * m)).collect();
            let mut group: Vec<LinearOutput<D>> = outputs
                .iter_mut()
                .zip(&weights)
                .enumerate()
                .map(|(i, (y, (w, _)))| LinearOutput { y, w, bias: (i == 1).then_some(&bias) })
                .collect();
            device.linear_group(&mut group, &x_buffer, t);
            for (i, y) in outputs.iter().enumerate() {
                let bias = (i == 1).then_some(&bias64[..]);
                let want = reference::linear(&D::seen(dtype, &x), &weights[i].1, bias, t, ms[i], n);
                assert_close(&device.download(y), &want, F32, &format!("({t},{},{n}) {dtype}", ms[i]));
            }
            let dys: Vec<Buffer> = ms.iter().map(|m| r.normals(t * m)).collect();
            let buffers: Vec<D::Buffer> = dys.iter().map(|dy| device.upload(dy)).collect();
            let inputs: Vec<(&D::Buffer, &D::Weight)> =
                buffers.iter().zip(&weights).map(|(dy, (w, _))| (dy, w)).collect();
            let mut dx = device.poisoned(t * n);
            device.linear_dx_group(&mut dx, &inputs, t);
            let mut want = vec![0.0; t * n];
            for (i, dy) in dys.iter().enumerate() {
                let one = reference::matmul(&D::seen(dtype, dy), &weights[i].1, t, ms[i], n);
                want.iter_mut().zip(one).for_each(|(sum, v)| *sum += v);
            }
            assert_close(&device.download(&dx), &want, F32, &format!("dx ({t},{ms:?},{n}) {dtype}"));
        }
    }
}

fn a_row_that_is_not_finite_leaves_the_others_alone<D: Machine>(device: &Arc<D>) {
    let mut r = Random::new("not finite");
    let (t, m, n) = (20, 70, 96);
    let (w, w64) = r.weight(device, Dtype::BF16, m, n, 0.3);
    let (mut x, mut dy) = (r.normals(t * n), r.normals(t * m));
    x[3] = f32::NAN;
    dy[5] = f32::INFINITY;
    let (mut y, mut dx) = (device.poisoned(t * m), device.poisoned(t * n));
    device.linear(&mut y, &device.upload(&x), &w, None, t);
    device.linear_dx(&mut dx, &device.upload(&dy), &w, t, false);
    let (y, dx) = (device.download(&y), device.download(&dx));
    assert!(y[..m].iter().all(|v| v.is_nan()), "a NaN was lost");
    assert!(dx[..n].iter().all(|v| !v.is_finite()), "an infinity was lost");
    let rows = |v: &[f32]| D::seen(Dtype::BF16, v);
    assert_close(&y[m..], &reference::linear(&rows(&x[n..]), &w64, None, t - 1, m, n), F32, "y");
    assert_close(&dx[n..], &reference::matmul(&rows(&dy[m..]), &w64, t - 1, m, n), F32, "dx");
}
