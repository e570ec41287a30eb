//! Where each Hugging Face tensor lies in the memory of an inference server.
//!
//! A trainer thinks in the names of the model's files (`model.layers.0.self_attn.q_proj.weight`),
//! a server holds what suits its kernels: `qkv_proj` and `gate_up_proj` merged by rows, a vocabulary
//! padded to a multiple of 64, experts in stacks, prefixes of wrappers, a head that is the embedding, llama.cpp's own names
//! and order of rows. This crate turns a list of server tensors into one [`View`] per expected tensor: a
//! span of bytes in an allocation, each row contiguous, zero-copy.
//!
//! Shapes are as in the files: a matrix is (rows, cols) = (out features, in features), a vector (n,).
//! Strides count elements, offsets count bytes from the start of the allocation.
//!
//! The mapping fails closed. Somebody will write to these spans while a server reads them, so a tensor
//! that is missing, unknown, mapped twice, of another shape or overlapping another one is an [`Error`]
//! that names it, never a guess. No I/O, no device, no unsafe code.

#![forbid(unsafe_code)]

mod decoder;
mod dtype;
mod error;
mod gguf_names;
mod map;
mod names;
mod row_order;

pub use decoder::{Decoder, DeltaNet, Experts, Family, HfTensor, Role, matrix_shape};
pub use dtype::{Dtype, UnknownDtype};
pub use error::Error;
pub use gguf_names::{gguf_name, hf_name};
pub use map::{Packing, ServerTensor, View, WeightMap, map, merged_layout};
pub use names::{EXPERTS_MAX, canonical_name, is_known_buffer, is_other_part, stack_of, stacked_parts, unstacked};
pub use row_order::RowOrder;
