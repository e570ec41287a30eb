//! The element types that can be trained in place.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Element type of a weight, spelled as safetensors spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Dtype {
    /// IEEE 754 binary32, 4 bytes.
    F32,
    /// IEEE 754 binary16, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    BF16,
}

impl Dtype {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// The safetensors spelling: `F32`, `F16` or `BF16`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A dtype that cannot be trained in place: quantized, integer, double or simply unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "dtype `{0}` cannot be trained in place; the weights must be float32, float16 or bfloat16 (serve the unquantized model)"
)]
pub struct UnknownDtype(
    /// The dtype as it was spelled.
    pub String,
);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    /// Reads the safetensors spelling (`BF16`) or torch's (`bfloat16`, `torch.bfloat16`).
    fn from_str(text: &str) -> Result<Self, UnknownDtype> {
        match text.strip_prefix("torch.").unwrap_or(text) {
            "F32" | "float32" | "float" => Ok(Dtype::F32),
            "F16" | "float16" | "half" => Ok(Dtype::F16),
            "BF16" | "bfloat16" => Ok(Dtype::BF16),
            _ => Err(UnknownDtype(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dtype_reads_the_spellings_of_safetensors_and_of_torch() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
        }
        assert_eq!("torch.bfloat16".parse(), Ok(Dtype::BF16));
        assert_eq!("float16".parse(), Ok(Dtype::F16));
        assert_eq!("torch.float32".parse(), Ok(Dtype::F32));
    }

    #[test]
    fn a_quantized_dtype_is_refused_by_its_name() {
        let error = "F8_E4M3".parse::<Dtype>().unwrap_err();
        assert!(error.to_string().contains("F8_E4M3"), "{error}");
    }
}
