//! One source, three instruction sets: the body of a function is compiled for AVX-512, for AVX2 and
//! for the baseline, and the best that the processor has is chosen at run time.
//!
//! Rust never fuses or reorders floating-point operations, so all versions give the same bits as
//! long as sums are written with a fixed number of lanes ([`LANES`]).

/// Lanes of a reduction written to vectorise: partial sum i takes elements i, i + 16, i + 32, ...
pub const LANES: usize = 16;

/// Defines a safe function whose body is compiled once per instruction set.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn generic($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { generic($($arg),*) }
                #[target_feature(enable = "avx2")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { generic($($arg),*) }
                if $crate::cpu::simd::has_avx512() {
                    // SAFETY: has_avx512 has seen every feature that the function enables.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: avx2 was detected on the line above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            generic($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Whether the processor has the AVX-512 subset that `multiversion` compiles for.
#[cfg(target_arch = "x86_64")]
pub fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Asks for the cache line of an address, which is read soon; any address will do.
#[inline(always)]
pub fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch(address.cast::<i8>(), std::arch::x86_64::_MM_HINT_T1)
    };
}

/// Sum of a(i)·b(i) in f32 with a fixed order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    fold(lanes) + rest
}

/// Sum of a(i)·b(i)·c(i) in f32 with a fixed order.
#[inline(always)]
pub fn dot_of_products(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest), (c, c_rest)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i] * c[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| a * b * c).sum();
    fold(lanes) + rest
}

/// Sum of the lanes as a tree, the same order everywhere.
#[inline(always)]
pub fn fold(lanes: [f32; LANES]) -> f32 {
    let mut v = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            v[i] += v[i + half];
        }
        half /= 2;
    }
    v[0]
}

/// e^x to within 2 units in the last place (Cephes expf: reduction by ln 2 in two parts, polynomial of
/// degree 5), without branches or calls so that loops over it vectorise. Below -87.3 it gives 0, above 88 e^88; NaN stays.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5·2^23: adding it rounds to a whole number, which then stands in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let y = p * r * r + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127)) << 23);
    if x < -87.3 { 0.0 } else { y * scale }
}

multiversion! {
    /// x = e^(x - top), and the sum of them in f32 with a fixed order.
    pub fn exp_in_place(x: &mut [f32], top: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                chunk[i] = exp(chunk[i] - top);
                lanes[i] += chunk[i];
            }
        }
        let mut sum = 0.0;
        for v in rest {
            *v = exp(*v - top);
            sum += *v;
        }
        fold(lanes) + sum
    }
}

multiversion! {
    /// Largest value; NaN is passed over.
    pub fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for i in 0..LANES {
                lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

multiversion! {
    /// dst (cols, rows) = srcᵀ, src (rows, cols); both row-major with the given distances of rows.
    pub fn transpose(src: &[f32], rows: usize, cols: usize, stride: usize, dst: &mut [f32], dst_stride: usize) {
        let (whole_rows, whole_cols) = (rows / LANES * LANES, cols / LANES * LANES);
        for i in (0..whole_rows).step_by(LANES) {
            for j in (0..whole_cols).step_by(LANES) {
                transpose_tile(&src[i * stride + j..], stride, &mut dst[j * dst_stride + i..], dst_stride);
            }
        }
        for i in 0..rows {
            let first = if i < whole_rows { whole_cols } else { 0 };
            for j in first..cols {
                dst[j * dst_stride + i] = src[i * stride + j];
            }
        }
    }
}

/// A tile of 16 by 16 in four rounds of exchanges between rows, which become shuffles of registers.
#[inline(always)]
fn transpose_tile(src: &[f32], stride: usize, dst: &mut [f32], dst_stride: usize) {
    let mut tile = [[0f32; LANES]; LANES];
    for (i, row) in tile.iter_mut().enumerate() {
        row.copy_from_slice(&src[i * stride..][..LANES]);
    }
    exchange::<8>(&mut tile);
    exchange::<4>(&mut tile);
    exchange::<2>(&mut tile);
    exchange::<1>(&mut tile);
    for (i, row) in tile.iter().enumerate() {
        dst[i * dst_stride..][..LANES].copy_from_slice(row);
    }
}

/// Exchanges the off-diagonal quarters of each block of 2S by 2S.
#[inline(always)]
fn exchange<const S: usize>(tile: &mut [[f32; LANES]; LANES]) {
    for i in (0..LANES).filter(|i| i & S == 0) {
        let (upper, lower) = (tile[i], tile[i + S]);
        for j in 0..LANES {
            tile[i][j] = if j & S == 0 { upper[j] } else { lower[j - S] };
            tile[i + S][j] = if j & S == 0 { upper[j + S] } else { lower[j] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = (x as f64).exp();
            let ulp = f32::EPSILON as f64 * 2f64.powf(exact.log2().floor());
            worst = worst.max((exp(x) as f64 - exact).abs() / ulp);
        }
        println!("worst {worst} ulp");
        assert!(worst < 2.0, "{worst}");
        assert_eq!((exp(0.0), exp(-90.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_transpose_of_any_size_is_one() {
        for (rows, cols) in [(1, 1), (16, 16), (17, 33), (5, 40), (64, 15), (48, 32)] {
            let (stride, dst_stride) = (cols + 3, rows + 2);
            let src: Vec<f32> = (0..rows * stride).map(|v| v as f32).collect();
            let mut dst = vec![-1.0; cols * dst_stride];
            transpose(&src, rows, cols, stride, &mut dst, dst_stride);
            for i in 0..rows {
                for j in 0..cols {
                    assert_eq!(dst[j * dst_stride + i], src[i * stride + j], "({rows},{cols}) at ({i},{j})");
                }
            }
            assert_eq!(dst[dst_stride - 1], -1.0, "({rows},{cols}): wrote beside the result");
        }
    }
}
