//! GGUF files: what llama.cpp keeps a model in, and maps shared and read-only.
//!
//! A file is `GGUF`, a version, the number of tensors and of metadata entries, the entries (key, type, value), the
//! tensors' descriptions (name, dimensions from the fastest to the slowest, type, offset), and from the next
//! multiple of the alignment the data, to which offsets count. Everything is little endian.
//! Format: `docs/gguf.md` of <https://github.com/ggml-org/ggml>.
//!
//! Reading is by hand because a header is input that may be hostile: no length in it is believed before the file
//! was seen to be that long, and refusals name the tensor and its type.

mod read;
mod write;

pub use read::{GgufFile, GgufTensor};
pub use write::{GgufLayout, NewTensor};

use weight_map::Dtype;

/// The name of the weights in a live directory that llama.cpp serves from.
pub const GGUF_FILE: &str = "model.gguf";

const MAGIC: [u8; 4] = *b"GGUF";
/// Where data begin, unless `general.alignment` says otherwise: at a multiple of this many bytes.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Type 0.
    U8(u8),
    /// Type 1.
    I8(i8),
    /// Type 2.
    U16(u16),
    /// Type 3.
    I16(i16),
    /// Type 4.
    U32(u32),
    /// Type 5.
    I32(i32),
    /// Type 6.
    F32(f32),
    /// Type 7.
    Bool(bool),
    /// Type 8, in bytes because not every writer keeps to UTF-8.
    String(Vec<u8>),
    /// Type 9: the type of the elements, and the elements.
    Array(u32, Vec<GgufValue>),
    /// Type 10.
    U64(u64),
    /// Type 11.
    I64(i64),
    /// Type 12.
    F64(f64),
}

impl GgufValue {
    /// A string.
    pub fn string(text: impl Into<String>) -> GgufValue {
        GgufValue::String(text.into().into_bytes())
    }

    /// An array of strings.
    pub fn strings<T: Into<String>>(texts: impl IntoIterator<Item = T>) -> GgufValue {
        GgufValue::Array(8, texts.into_iter().map(GgufValue::string).collect())
    }

    /// An array of 32-bit integers.
    pub fn i32s(values: impl IntoIterator<Item = i32>) -> GgufValue {
        GgufValue::Array(5, values.into_iter().map(GgufValue::I32).collect())
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            GgufValue::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// A whole number of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            GgufValue::U8(v) => Some(v.into()),
            GgufValue::U16(v) => Some(v.into()),
            GgufValue::U32(v) => Some(v.into()),
            GgufValue::U64(v) => Some(v),
            GgufValue::I8(v) => v.try_into().ok(),
            GgufValue::I16(v) => v.try_into().ok(),
            GgufValue::I32(v) => v.try_into().ok(),
            GgufValue::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            GgufValue::F32(v) => Some(v.into()),
            GgufValue::F64(v) => Some(v),
            _ => None,
        }
    }

    fn type_id(&self) -> u32 {
        match self {
            GgufValue::U8(_) => 0,
            GgufValue::I8(_) => 1,
            GgufValue::U16(_) => 2,
            GgufValue::I16(_) => 3,
            GgufValue::U32(_) => 4,
            GgufValue::I32(_) => 5,
            GgufValue::F32(_) => 6,
            GgufValue::Bool(_) => 7,
            GgufValue::String(_) => 8,
            GgufValue::Array(..) => 9,
            GgufValue::U64(_) => 10,
            GgufValue::I64(_) => 11,
            GgufValue::F64(_) => 12,
        }
    }
}

/// ggml's number of an element type.
fn type_of(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::BF16 => 30,
    }
}

/// The element type of ggml's number, or the type's name if it cannot be trained.
fn dtype_of(type_id: u32) -> Result<Dtype, String> {
    // Gaps are numbers that ggml has given up.
    const NAMES: [&str; 41] = [
        "F32", "F16", "Q4_0", "Q4_1", "", "", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
        "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32",
        "I64", "F64", "IQ1_M", "BF16", "", "", "", "TQ1_0", "TQ2_0", "", "", "", "MXFP4", "NVFP4",
    ];
    match NAMES.get(type_id as usize) {
        Some(&"F32") => Ok(Dtype::F32),
        Some(&"F16") => Ok(Dtype::F16),
        Some(&"BF16") => Ok(Dtype::BF16),
        Some(name) if !name.is_empty() => Err((*name).to_owned()),
        _ => Err(format!("number {type_id}")),
    }
}
