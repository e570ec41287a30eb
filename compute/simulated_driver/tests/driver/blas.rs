//! cuBLASLt's products against plain sums.

use crate::gpu::Gpu;
use cudarc::cublaslt::{result, sys};
use std::ffi::{CString, c_void};

type Type = sys::cudaDataType_t;

fn load() {
    simulated_driver::load();
    let path = simulated_driver::library_dir().join("libcublasLt.so.13");
    let name = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a C string; the library needs nothing but the driver, which is loaded.
    assert!(!unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null());
}

/// Multiples of 1/8 below 2: products and sums of a few dozen are exact in f32.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 13 + seed) % 31) as f32 / 8.0 - 2.0).collect()
}

fn as_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| (v.to_bits() >> 16) as u16).collect()
}

/// D (m,n) = op(A)·op(B) + beta·C through the library, all column-major, with one unused row below each column.
fn product(gpu: &Gpu, [m, n, k]: [usize; 3], transposed: [bool; 2], beta: f32, [a, b, c]: [&[f32]; 3]) -> Vec<f32> {
    let shape = |transposed: bool, rows, columns| if transposed { (columns, rows) } else { (rows, columns) };
    let [(a_rows, a_columns), (b_rows, b_columns)] = [shape(transposed[0], m, k), shape(transposed[1], k, n)];
    let [a_at, b_at] = [gpu.upload(&as_bf16(a)), gpu.upload(&as_bf16(b))];
    let d_at = gpu.upload(c);
    let layout = |ty, rows: usize, columns: usize| {
        result::create_matrix_layout(ty, rows as u64, columns as u64, rows as i64 + 1).unwrap()
    };
    let handle = result::create_handle().unwrap();
    let description =
        result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F).unwrap();
    let [a, b] = [layout(Type::CUDA_R_16BF, a_rows, a_columns), layout(Type::CUDA_R_16BF, b_rows, b_columns)];
    let d = layout(Type::CUDA_R_32F, m, n);
    let preference = result::create_matmul_pref().unwrap();
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    let sides = [Attribute::CUBLASLT_MATMUL_DESC_TRANSA, Attribute::CUBLASLT_MATMUL_DESC_TRANSB];
    // SAFETY: every handle is alive, the operands are as large as their layouts say, and alpha and beta are of the
    // host.
    unsafe {
        for (side, transposed) in sides.into_iter().zip(transposed) {
            let value = transposed as i32;
            result::set_matmul_desc_attribute(description, side, (&raw const value).cast::<c_void>(), 4).unwrap();
        }
        let found = result::get_matmul_algo_heuristic(handle, description, a, b, d, d, preference).unwrap();
        let (alpha, null) = (1.0f32, std::ptr::null_mut());
        result::matmul(
            handle,
            description,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            a_at as *const c_void,
            a,
            b_at as *const c_void,
            b,
            d_at as *const c_void,
            d,
            d_at as *mut c_void,
            d,
            &raw const found.algo,
            null,
            0,
            gpu.stream.cast(),
        )
        .unwrap();
        for layout in [a, b, d] {
            result::destroy_matrix_layout(layout).unwrap();
        }
        result::destroy_matmul_pref(preference).unwrap();
        result::destroy_matmul_desc(description).unwrap();
        result::destroy_handle(handle).unwrap();
    }
    gpu.read(d_at, c.len())
}

#[test]
fn products_are_column_major_with_either_side_transposed() {
    let gpu = Gpu::open();
    load();
    let [m, n, k] = [5, 3, 37];
    for (transposed, beta) in [([false; 2], 0.0), ([true, false], 1.0), ([false, true], 1.0), ([true, true], 0.0)] {
        let leading = [if transposed[0] { k } else { m } + 1, if transposed[1] { n } else { k } + 1, m + 1];
        let columns = [if transposed[0] { m } else { k }, if transposed[1] { k } else { n }, n];
        let [a, b, mut c] = [0, 1, 2].map(|i| values(leading[i] * columns[i], i));
        if beta == 0.0 {
            c.fill(f32::NAN);
        }
        let d = product(&gpu, [m, n, k], transposed, beta, [&a, &b, &c]);
        let at = |x: &[f32], leading, transposed, row, column| {
            if transposed { x[row * leading + column] } else { x[column * leading + row] }
        };
        for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
            let of = |i| at(&a, leading[0], transposed[0], row, i) * at(&b, leading[1], transposed[1], i, column);
            let sum: f32 = (0..k).map(of).sum();
            let old = if beta == 0.0 { 0.0 } else { c[column * leading[2] + row] };
            assert_eq!(d[column * leading[2] + row], sum + old, "{transposed:?} {row} {column}");
        }
        assert!((0..n).all(|column| d[column * leading[2] + m].to_bits() == c[column * leading[2] + m].to_bits()));
    }
}
