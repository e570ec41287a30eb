//! What GPUs have, from their makers' data sheets.

/// A GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// As an operator names it.
    pub name: &'static str,
    /// Its full name.
    pub title: &'static str,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes per second of memory.
    pub bandwidth: f64,
    /// bf16 tensor-core operations per second with f32 accumulation, without sparsity.
    pub flops: f64,
}

const fn gpu(name: &'static str, title: &'static str, gb: f64, tb_s: f64, tflops: f64) -> Gpu {
    Gpu { name, title, memory: gb * 1e9, bandwidth: tb_s * 1e12, flops: tflops * 1e12 }
}

/// All that are known.
const GPUS: [Gpu; 8] = [
    gpu("a100-40gb", "NVIDIA A100 40 GB SXM", 40.0, 1.555, 312.0),
    gpu("a100-80gb", "NVIDIA A100 80 GB SXM", 80.0, 2.039, 312.0),
    gpu("l40s", "NVIDIA L40S", 48.0, 0.864, 362.0),
    gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24.0, 1.008, 165.2),
    gpu("rtx5090", "NVIDIA GeForce RTX 5090", 32.0, 1.792, 209.5),
    gpu("h100", "NVIDIA H100 SXM", 80.0, 3.35, 989.4),
    gpu("h200", "NVIDIA H200 SXM", 141.0, 4.8, 989.4),
    gpu("b200", "NVIDIA B200", 180.0, 8.0, 2250.0),
];

/// The one of this name.
///
/// # Errors
/// There is none: which there are.
pub fn named(name: &str) -> Result<Gpu, String> {
    let known = || GPUS.map(|gpu| gpu.name).join(", ");
    let found = GPUS.into_iter().find(|gpu| gpu.name.eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("{name} is not known; known are {}", known()))
}
