//! Device memory and the operations of one training step on it.
//!
//! One trait, [`Device`], and a twin for each kind of machine behind it (`cpu`, `cuda`). The trait is shaped
//! for a GPU: no operation returns a host value, so a step can be queued without waiting; every
//! scalar that steers a step (loss, norms, the verdict of the gates) lives in a device buffer, and
//! the host reads it once, at the end, through [`Device::read`]. What differs between two examples of the same
//! shape (token ids, targets, the length of the context, the weight of the loss) lies in device memory too, so that
//! the work of one can be recorded and replayed for the next ([`Device::record`]). The optimizer's operations take
//! all tensors of a model at once, which a GPU does in a few launches.
//!
//! Activations, gradients and norms are f32; moments, and keys and values of a context, f32 or bf16. Weights are *foreign*: they belong to an
//! inference server, keep its dtype (f32, f16 or bf16), are read where they lie and are written in
//! place: in a step by exactly three operations, [`Device::apollo_commit`], [`Device::adamw_factors`] and
//! [`Device::adamw_rows`], and between steps, to restore them, by [`Device::write_weight`].
//!
//! Shapes: matrices are row-major. `t` is the number of token rows; a weight W is (m,n) = (outputs,
//! inputs) as Hugging Face stores `nn.Linear`; a vector is (1,n).

pub mod cpu;
pub mod cuda;
mod device;
pub mod hash;
mod layers;
mod optimizer;
mod random;
mod sink;

pub use cpu::Cpu;
pub use cuda::Cuda;
pub use device::Device;
pub use layers::{
    Attention, AttentionGrads, AttentionSaved, Columns, Convolution, DeltaGrads, DeltaInputs, DeltaRule, Heads,
    LinearOutput, NO_TARGET, Norm, Past,
};
pub use optimizer::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Channels, Compressed, Factors, Limiter, Moments, NORM_FACTOR,
    NORM_NEXT, NORM_PREVIOUS, NORM_SLOTS, NORM_UPDATE, ScaleType, Write,
};
pub use random::{Philox, Stream};
pub use sink::{Collector, Sink, TensorId};
pub use weight_map::{Dtype, RowOrder};

/// Elements of any type, as they lie in memory, as f32.
pub fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}

/// Values rounded to the nearest of a type, as they lie in memory.
pub fn narrow(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
    }
}
