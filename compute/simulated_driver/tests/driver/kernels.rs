//! Kernels on the CPU against plain arithmetic.

use crate::gpu::{Gpu, float, passes_in_child};
use compute::{Dtype, Stream, cpu::Weight};

#[test]
fn a_kernel_reads_and_writes_device_memory() {
    let gpu = Gpu::open();
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (input, output) = (gpu.upload(&x), gpu.alloc(4 * 1024).unwrap());
    gpu.launch("test_scale", 4, 256, 0, &[output, input, 1000, float(0.5)]).unwrap();
    let y: Vec<f32> = gpu.read(output, 1024);
    assert!(y[..1000].iter().zip(&x).all(|(y, x)| *y == 0.5 * x));
    assert!(y[1000..].iter().all(|y| y.is_nan()), "memory that nothing wrote is not NaN");
}

fn blocks_meet_at_barriers() {
    let gpu = Gpu::open();
    for threads in [32, 96, 256] {
        let x: Vec<f32> = (0..3 * threads).map(|i| (i % 13) as f32).collect();
        let (input, output) = (gpu.upload(&x), gpu.alloc(4 * (3 + x.len())).unwrap());
        gpu.launch("test_block", 3, threads as u32, 4 * threads as u32, &[output, input]).unwrap();
        let y: Vec<f32> = gpu.read(output, 3 + x.len());
        assert_eq!(y[3..], x, "{threads} threads");
        for (sum, part) in y.iter().zip(x.chunks(threads)) {
            assert_eq!(*sum, part.iter().sum::<f32>(), "{threads} threads: small integers add exactly");
        }
    }
}

#[test]
fn threads_of_a_block_meet_at_barriers() {
    blocks_meet_at_barriers();
}

#[test]
fn threads_meet_in_the_opposite_order_too() {
    let test = "kernels::threads_meet_in_the_opposite_order_too";
    passes_in_child(test, &[("SIMULATED_CUDA_ORDER", "reverse")], || {
        blocks_meet_at_barriers();
        product_is_right();
    });
}

#[test]
fn lanes_shuffle_in_whole_and_partial_warps() {
    let gpu = Gpu::open();
    for lanes in [32u32, 20] {
        let output = gpu.alloc(4 * 7 * lanes as usize).unwrap();
        gpu.launch("test_shuffles", 1, lanes, 0, &[output]).unwrap();
        let got: Vec<u32> = gpu.read(output, 7 * lanes as usize);
        // A lane that does not exist gives all ones; one outside the warp or the segment, the lane's own.
        let of = |source: u32| if source < lanes { source } else { u32::MAX };
        let votes = (0..lanes).filter(|lane| lane % 3 == 0).fold(0, |all, lane| all | 1 << lane);
        for lane in 0..lanes {
            let expected = [
                of(lane ^ 5),
                if lane + 3 < 32 { of(lane + 3) } else { lane },
                if lane >= 3 { lane - 3 } else { lane },
                9,
                if lane % 8 < 5 { of(lane + 3) } else { lane },
                votes,
                if lane < 8 { 2 } else { 10 },
            ];
            let row: Vec<u32> = got.iter().skip(lane as usize).step_by(lanes as usize).copied().collect();
            assert_eq!(row, expected, "lane {lane} of {lanes}");
        }
    }
}

/// A bf16 on the grid of eighths, exact.
fn eighths(i: usize) -> f32 {
    (i * 7 % 31) as f32 / 8.0 - 2.0
}

fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| (v.to_bits() >> 16) as u16).collect()
}

fn product_is_right() {
    let gpu = Gpu::open();
    let a: Vec<f32> = (0..256).map(eighths).collect();
    let b: Vec<f32> = (0..128).map(|i| eighths(3 * i + 1)).collect();
    let (c, a_at, b_at) = (gpu.alloc(4 * 128).unwrap(), gpu.upload(&bf16(&a)), gpu.upload(&bf16(&b)));
    gpu.launch("test_product", 1, 32, 0, &[c, a_at, b_at]).unwrap();
    let c: Vec<f32> = gpu.read(c, 128);
    for (row, column) in (0..16).flat_map(|row| (0..8).map(move |column| (row, column))) {
        // Multiples of 1/64 below 2^12: exact in any order.
        let sum: f32 = (0..16).map(|k| a[16 * row + k] * b[16 * column + k]).sum();
        assert_eq!(c[8 * row + column], sum, "row {row}, column {column}");
    }
}

#[test]
fn the_tensor_core_product_takes_its_operands_as_the_isa_says() {
    product_is_right();
}

#[test]
fn shared_memory_is_nan_when_a_block_begins() {
    let gpu = Gpu::open();
    for _ in 0..2 {
        let output = gpu.alloc(4 * 8).unwrap();
        gpu.launch("test_fresh_shared", 4, 1, 16, &[output]).unwrap();
        assert_eq!(gpu.read::<u32>(output, 8), [u32::MAX; 8]);
    }
}

/// The stream's key, as compute makes it: 1 stands for rounding, 2 for projections.
fn key(seed: u64, purpose: u32) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32 ^ purpose << 24]
}

#[test]
fn random_numbers_and_rounding_are_those_of_the_cpu() {
    let gpu = Gpu::open();
    let n = 1000;
    let (seed, step, tensor) = (0x1234_5678_9ABC_DEF0, 41, 7);
    // Every magnitude, both signs, and the ends of the ranges of both types.
    let mut values: Vec<f32> = (0..n as u32)
        .map(|i| f32::from_bits(i.wrapping_mul(0x9E37_79B9)))
        .map(|v| if v.is_nan() { 0.0 } else { v })
        .collect();
    values.splice(..6, [65504.0, -65520.0, 6e-8, f32::MAX, -1e-7, 1.0009765]);
    values.iter_mut().skip(n / 2).enumerate().for_each(|(i, v)| *v = ((i as f32) * 0.37).sin() * 1e-3 * i as f32);

    let at = |bytes| gpu.alloc(bytes * n).unwrap();
    let (numbers, normal, as_bf16, as_f16, input) = (at(4), at(4), at(2), at(2), gpu.upload(&values));
    let random = |purpose| {
        let [a, b] = key(seed, purpose);
        [a, b, step, tensor]
    };
    for purpose in [2, 1] {
        gpu.launch_random([numbers, normal, as_bf16, as_f16, input], random(purpose), n as u32);
        if purpose == 2 {
            let mut expected = vec![0.0; n];
            Stream::projection(seed, step as u64, tensor as usize).fill_normal(0, 1.0, &mut expected);
            let got: Vec<f32> = gpu.read(normal, n);
            // Two f64 libraries may differ by an ulp of f64, which moves few f32 by one of theirs.
            for (got, expected) in got.iter().zip(&expected) {
                assert!((got - expected).abs() <= expected.abs() * f32::EPSILON, "{got} {expected}");
            }
        }
    }
    let stream = Stream::rounding(seed, step as u64, tensor as usize);
    let mut expected = vec![0; n];
    stream.fill_u16(0, &mut expected);
    assert_eq!(gpu.read::<u32>(numbers, n), expected.iter().map(|&e| e as u32).collect::<Vec<_>>());
    for (dtype, got) in [(Dtype::BF16, as_bf16), (Dtype::F16, as_f16)] {
        let weight = Weight::zeros(dtype, 1, n);
        weight.write(0, 0, &values, &stream);
        let mut bytes = vec![0; 2 * n];
        weight.read_bytes(0, &mut bytes);
        let expected: Vec<u16> = bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        assert_eq!(gpu.read::<u16>(got, n), expected, "{dtype}");
    }
}

impl Gpu {
    /// The stream is a structure of 16 bytes, which a launch takes as one argument.
    fn launch_random(&self, pointers: [u64; 5], stream: [u32; 4], n: u32) {
        use cudarc::driver::sys;
        let function = self.function("test_random").unwrap();
        let mut arguments: Vec<*mut std::ffi::c_void> =
            pointers.iter().map(|p| std::ptr::from_ref(p).cast_mut().cast()).collect();
        arguments.push(stream.as_ptr().cast_mut().cast());
        arguments.push(std::ptr::from_ref(&n).cast_mut().cast());
        let (blocks, null) = (n.div_ceil(128), std::ptr::null_mut());
        // SAFETY: the kernel's parameters, in order.
        crate::gpu::ok(unsafe {
            sys::cuLaunchKernel(function, blocks, 1, 1, 128, 1, 1, 0, self.stream, arguments.as_mut_ptr(), null)
        });
    }
}
