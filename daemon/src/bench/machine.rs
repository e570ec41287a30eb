//! What this machine can do at best. A CPU, on all compute threads: dot products on registers and a stream through
//! memory. A GPU: a large matrix product and a copy in its memory.

use crate::backend::Backend;
use compute::{Cpu, Cuda, Device, Dtype};
use std::sync::Arc;
use std::time::Instant;

/// Measured rates.
pub struct Rates {
    /// bf16 dot products where the processor has them, f32 multiply-adds otherwise; operations per
    /// second, a multiplication and an addition being two.
    pub dot_flops: f64,
    /// Bytes per second, the better of reading and of reading and writing.
    pub bytes: f64,
}

/// Takes about a second.
pub fn cpu_rates(device: &Cpu) -> Rates {
    let threads = device.threads();
    let best = |f: &dyn Fn() -> f64| (0..3).map(|_| f()).fold(0.0, f64::max);
    Rates {
        dot_flops: best(&|| on_all(threads, dot_rate)),
        bytes: best(&|| on_all(threads, read_rate)).max(best(&|| on_all(threads, update_rate))),
    }
}

/// Elements of the buffers that are copied on a GPU, 4 bytes each: far more than its caches hold.
const COPIED: usize = 1 << 28;
/// Rows and columns of the product, and how often each is done.
const PRODUCT: usize = 8192;
const REPEATS: usize = 10;

/// Takes about a second.
pub fn gpu_rates(device: &Arc<Cuda>) -> Rates {
    let seconds = |work: &mut dyn FnMut()| {
        work();
        device.synchronize();
        let clock = Instant::now();
        (0..REPEATS).for_each(|_| work());
        device.synchronize();
        clock.elapsed().as_secs_f64() / REPEATS as f64
    };
    let (source, mut copy) = (device.zeros(COPIED), device.zeros(COPIED));
    let copied = seconds(&mut || device.copy(&mut copy, 0, &source, 0, COPIED));
    let weight = Cuda::weight(device, Dtype::BF16, PRODUCT, PRODUCT);
    // The power that a product takes, and so its rate, depends on the values: zeros would be fast.
    crate::bench::fill(&**device, &weight, 0, false);
    let mut x = device.uninit(PRODUCT * PRODUCT);
    device.write(&mut x, 0, &device.weight_values(&weight));
    let multiplied = seconds(&mut || device.linear(&mut copy, &x, &weight, None, PRODUCT));
    Rates { dot_flops: 2.0 * (PRODUCT as f64).powi(3) / multiplied, bytes: 8.0 * COPIED as f64 / copied }
}

/// Sum of the rates of `f` run on so many threads at once.
fn on_all(threads: usize, f: fn() -> f64) -> f64 {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(f)).collect();
        running.into_iter().map(|t| t.join().unwrap_or(0.0)).sum()
    })
}

/// Independent accumulators, enough to hide the latency of an instruction.
const CHAINS: usize = 12;
const ROUNDS: usize = 2_000_000;

fn dot_rate() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f") {
            // SAFETY: the features were detected on the line above.
            return unsafe { bf16_rate() };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were detected on the line above.
            return unsafe { fma_rate() };
        }
    }
    let clock = Instant::now();
    let mut sums = [0f32; 64];
    for i in 0..ROUNDS / 8 {
        let x = std::hint::black_box(i as f32);
        sums.iter_mut().for_each(|s| *s = *s * 0.5 + x);
    }
    std::hint::black_box(sums);
    (ROUNDS / 8 * 64 * 2) as f64 / clock.elapsed().as_secs_f64()
}

/// vdpbf16ps: 16 lanes of two products each.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_rate() -> f64 {
    use std::arch::x86_64::*;
    let x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.5), _mm512_set1_ps(0.25));
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    let clock = Instant::now();
    for _ in 0..ROUNDS {
        let x = std::hint::black_box(x);
        sums.iter_mut().for_each(|s| *s = _mm512_dpbf16_ps(*s, x, x));
    }
    std::hint::black_box(sums);
    (ROUNDS * CHAINS * 64) as f64 / clock.elapsed().as_secs_f64()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_rate() -> f64 {
    use std::arch::x86_64::*;
    let x = _mm256_set1_ps(0.5);
    let mut sums = [_mm256_setzero_ps(); CHAINS];
    let clock = Instant::now();
    for _ in 0..ROUNDS {
        let x = std::hint::black_box(x);
        sums.iter_mut().for_each(|s| *s = _mm256_fmadd_ps(*s, x, x));
    }
    std::hint::black_box(sums);
    (ROUNDS * CHAINS * 16) as f64 / clock.elapsed().as_secs_f64()
}

/// Elements of each thread's stream; far more than a cache holds.
const STREAM: usize = 1 << 25;

fn read_rate() -> f64 {
    let data = vec![1u64; STREAM];
    let clock = Instant::now();
    let sum = data.as_chunks::<16>().0.iter().fold([0u64; 16], |mut sums, chunk| {
        sums.iter_mut().zip(chunk).for_each(|(s, v)| *s = s.wrapping_add(*v));
        sums
    });
    let seconds = clock.elapsed().as_secs_f64();
    std::hint::black_box(sum);
    (STREAM * 8) as f64 / seconds
}

fn update_rate() -> f64 {
    let mut data = vec![1u64; STREAM];
    let clock = Instant::now();
    data.iter_mut().for_each(|v| *v = v.wrapping_mul(3));
    let seconds = clock.elapsed().as_secs_f64();
    std::hint::black_box(&data);
    (STREAM * 16) as f64 / seconds
}
