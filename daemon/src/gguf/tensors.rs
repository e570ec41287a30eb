//! The tensors as llama.cpp holds them, made from those of the model directory.
//!
//! As llama.cpp's converter writes them: matrices in the files' element type, vectors in f32, which its kernels
//! need, and the rows of queries and keys of `llama` interleaved.

use crate::weights::{Fit, ModelFiles, widened};
use anyhow::{Context, Result, bail};
use compute::Dtype;
use ipc::{GgufFile, NewTensor};
use model::{Config, Scaling};
use std::borrow::Cow;
use std::path::Path;
use weight_map::{Family, RowOrder, gguf_name};

/// Bytes handed on at a time, at least.
const PIECE: usize = 1 << 20;

/// A tensor for llama.cpp, as a recipe.
pub struct Tensor<'a> {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    order: RowOrder,
    /// The bytes in the files' order and element type.
    files: Cow<'a, [u8]>,
    files_dtype: Dtype,
}

impl Tensor<'_> {
    /// Name, shape and element type.
    pub fn described(&self) -> NewTensor {
        NewTensor { name: self.name.clone(), shape: self.shape.clone(), dtype: self.dtype }
    }

    /// Calls `each` with the bytes, piece by piece.
    ///
    /// # Errors
    /// Those of `each`.
    pub fn pieces(&self, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let files = match self.files_dtype == self.dtype {
            true => Cow::Borrowed(&*self.files),
            false => Cow::Owned(widened(&self.files, self.files_dtype)),
        };
        // Rows of a matrix, elements of a vector.
        let rows = self.shape[0];
        let row_bytes = files.len() / rows;
        let mut piece = Vec::with_capacity(PIECE + row_bytes);
        for row in 0..rows {
            piece.extend_from_slice(&files[self.order.in_files(row) * row_bytes..][..row_bytes]);
            if piece.len() >= PIECE || row + 1 == rows {
                each(&piece)?;
                piece.clear();
            }
        }
        Ok(())
    }
}

/// Every tensor of the model, in its order.
pub fn of<'a>(files: &'a ModelFiles, config: &Config) -> Result<Vec<Tensor<'a>>> {
    let d = &config.decoder;
    let mut tensors = Vec::new();
    for tensor in d.tensors() {
        let (bytes, files_dtype) = files.bytes(&tensor.name)?;
        let interleaved = matches!(d.family, Family::Llama | Family::Mistral)
            && [".q_proj.", ".k_proj."].iter().any(|module| tensor.name.contains(module));
        tensors.push(Tensor {
            name: gguf_name(&tensor.name).with_context(|| format!("llama.cpp has no name for {}", tensor.name))?,
            dtype: if tensor.shape.len() == 1 { Dtype::F32 } else { files_dtype },
            order: if interleaved { RowOrder::Interleaved { head_dim: d.head_dim } } else { RowOrder::AsFiles },
            shape: tensor.shape,
            files: Cow::Borrowed(bytes),
            files_dtype,
        });
    }
    if config.rope.scaling == Scaling::Llama3 {
        tensors.push(rope_freqs(config));
    }
    Ok(tensors)
}

/// What llama.cpp divides the unscaled frequencies by, (head_dim/2,).
fn rope_freqs(config: &Config) -> Tensor<'static> {
    let (rope, head_dim) = (&config.rope, config.decoder.head_dim);
    let base = |i: usize| rope.theta.powf(-2.0 * i as f64 / head_dim as f64);
    let factor = |(i, f): (usize, &f32)| (base(i) / f64::from(*f)) as f32;
    let factors: Vec<u8> = rope.frequencies.iter().enumerate().map(factor).flat_map(f32::to_le_bytes).collect();
    Tensor {
        name: "rope_freqs.weight".into(),
        shape: vec![head_dim / 2],
        dtype: Dtype::F32,
        order: RowOrder::AsFiles,
        files: Cow::Owned(factors),
        files_dtype: Dtype::F32,
    }
}

/// llama.cpp's number for files of mostly one element type.
pub fn file_type(tensors: &[Tensor]) -> u32 {
    match tensors.first().map(|tensor| tensor.dtype) {
        Some(Dtype::F16) => 1,
        Some(Dtype::BF16) => 32,
        Some(Dtype::F32) | None => 0,
    }
}

/// Checks that a GGUF file, which [`super::check`] has let pass, holds the weights of a model directory.
///
/// # Errors
/// The first tensor that is not there, of another type or another content.
pub fn compare(file: &GgufFile, model_dir: &Path, config: &Config) -> Result<()> {
    let place = file.path().display();
    let mut map = weight_map::map(&config.decoder.tensors(), &file.server_tensors()?, &[])
        .with_context(|| format!("{place} is not the model of {}", model_dir.display()))?;
    file.order_rows(&mut map)?;
    let files = ModelFiles::open(model_dir, config)?;
    for view in &map.views {
        let (bytes, files_dtype) = files.bytes(&view.name)?;
        Fit::of(&view.name, &view.shape, view.dtype, files_dtype).with_context(|| place.to_string())?;
        let tensor = Tensor {
            name: view.name.clone(),
            shape: view.shape.clone(),
            dtype: view.dtype,
            order: view.row_order,
            files: Cow::Borrowed(bytes),
            files_dtype,
        };
        let mut at = view.offset;
        tensor.pieces(|piece| {
            if file.bytes(at, piece.len()) != piece {
                bail!(
                    "{place}: {} differs from the model directory's: convert that directory again, or let `--gguf` \
                     without a file write one",
                    view.name
                );
            }
            at += piece.len() as u64;
            Ok(())
        })?;
    }
    Ok(())
}
