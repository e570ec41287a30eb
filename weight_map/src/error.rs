//! Why a server's tensors cannot be mapped. Nothing is written when any of these is returned.

use crate::Dtype;

/// A server's list of tensors that does not cover the model exactly. Shapes are in elements, offsets
/// in bytes of the allocation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Expected tensors that the server does not hold.
    #[error(
        "the server does not hold {} of the model's tensors: {}; check that it serves this model directory, unsharded and complete",
        names.len(), list(names)
    )]
    Missing {
        /// Hugging Face names, in model order.
        names: Vec<String>,
    },

    /// A server tensor that the model does not have.
    #[error(
        "server tensor `{name}` {shape:?} belongs to no tensor of the model; check that config.json describes the model that is served, or give its packing if it is a merged tensor"
    )]
    Unmapped {
        /// Name as the server spells it.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// Two server tensors that claim the same tensor of the model.
    #[error(
        "`{name}` is claimed by two server tensors, `{first}` and `{second}`; the exporter must list each weight once"
    )]
    TwiceMapped {
        /// Hugging Face name.
        name: String,
        /// The server tensor that came first in the list.
        first: String,
        /// The one that came after it.
        second: String,
    },

    /// A server tensor of another shape than the model's.
    #[error("server tensor `{name}` has shape {found:?}, the model's `{hf_name}` has {expected:?}; {hint}")]
    Shape {
        /// Name as the server spells it.
        name: String,
        /// Hugging Face name.
        hf_name: String,
        /// Shape in the model.
        expected: Vec<usize>,
        /// Shape in the server.
        found: Vec<usize>,
        /// What is likely to be wrong and what to do.
        hint: String,
    },

    /// A merged tensor whose parts do not add up to it.
    #[error(
        "merged server tensor `{name}` has shape {found:?}, but its parts {} make {expected:?}; {hint}",
        parts.join(" + ")
    )]
    Merged {
        /// Name as the server spells it.
        name: String,
        /// Shape in the server.
        found: Vec<usize>,
        /// Each part with its shape, in row order.
        parts: Vec<String>,
        /// Shape that the parts make.
        expected: Vec<usize>,
        /// What is likely to be wrong and what to do.
        hint: String,
    },

    /// Parts of one merged tensor that cannot be stacked by rows: their columns or ranks differ.
    #[error("the parts of `{name}` cannot be stacked by rows: {}; correct its packing", parts.join(", "))]
    MixedParts {
        /// Name as the server spells it.
        name: String,
        /// Each part with its shape, in row order.
        parts: Vec<String>,
    },

    /// A tensor that is not row-contiguous.
    #[error(
        "server tensor `{name}` {shape:?} has strides {strides:?}, want {want:?}: only row-contiguous weights can be trained in place; switch off the option of the server that repacks or pads it"
    )]
    Strides {
        /// Name as the server spells it.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<usize>,
        /// The strides of a row-contiguous tensor of this shape.
        want: Vec<usize>,
    },

    /// An offset that is no multiple of the element size.
    #[error("server tensor `{name}` starts at byte {offset} of allocation {allocation}, which is not a multiple of {dtype}'s {} bytes", dtype.size())]
    Misaligned {
        /// Name as the server spells it.
        name: String,
        /// Index of the allocation.
        allocation: usize,
        /// Offset in the allocation.
        offset: u64,
        /// Its element type.
        dtype: Dtype,
    },

    /// Two tensors that share bytes.
    #[error(
        "server tensors `{first}` and `{second}` overlap in allocation {allocation} (bytes {} to {} and {} to {}); if the server ties them, config.json must say so",
        first_bytes.0, first_bytes.1, second_bytes.0, second_bytes.1
    )]
    Overlap {
        /// The tensor that starts first.
        first: String,
        /// The other one.
        second: String,
        /// Index of the allocation.
        allocation: usize,
        /// First byte of the first tensor, and the byte after its last.
        first_bytes: (u64, u64),
        /// First byte of the second tensor, and the byte after its last.
        second_bytes: (u64, u64),
    },

    /// A separate head in the server of a tied model.
    #[error(
        "config.json ties the head to the embedding, but server tensor `{name}` (allocation {allocation}, byte {offset}) is a copy apart from `{embedding}`: training one would leave the other behind; serve with the weights tied, or set tie_word_embeddings to false"
    )]
    TiedCopy {
        /// The head's name as the server spells it.
        name: String,
        /// Index of the head's allocation.
        allocation: usize,
        /// The head's offset.
        offset: u64,
        /// The embedding's name as the server spells it.
        embedding: String,
    },

    /// A size or an end beyond 64 bits.
    #[error(
        "server tensor `{name}` {shape:?} at byte {offset} has a size beyond 64 bits; the exporter's description is corrupt"
    )]
    Overflow {
        /// Name as the server spells it.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its offset.
        offset: u64,
    },

    /// A packing that does not fit the server's tensors or the model's.
    #[error("packing of `{merged}`: {reason}")]
    Packing {
        /// The merged tensor, as the packing spells it.
        merged: String,
        /// What is wrong.
        reason: String,
    },

    /// Queries or keys that are no whole heads.
    #[error("`{name}` has {rows} rows, which are no whole heads of {head_dim} (want an even number of rows in each)")]
    Heads {
        /// Hugging Face name.
        name: String,
        /// Its rows.
        rows: usize,
        /// Rows of a head, as the server says.
        head_dim: usize,
    },

    /// The expected list names a tensor twice.
    #[error("the model's own list of tensors holds `{name}` twice")]
    ExpectedTwice {
        /// Hugging Face name.
        name: String,
    },
}

/// The first few names, and how many more there are.
fn list(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}
