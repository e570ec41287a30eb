//! From tensors that somebody holds to the weights that `compute` works on.

use crate::backend::Backend;
use anyhow::{Context, Result, bail};
use compute::Dtype;
use ipc::SafetensorsDir;
use model::Config;
use std::path::Path;
use std::sync::Arc;
use weight_map::{HfTensor, View, WeightMap, matrix_shape};

/// How a server's tensor and the files' go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Byte for byte.
    Same,
    /// The server holds a vector of 16-bit elements in f32, as llama.cpp does. What it would learn could not be
    /// written back, so it is not trained.
    Widened,
}

impl Fit {
    /// Compares the element types of a tensor in a server and in the files.
    ///
    /// # Errors
    /// They differ in a way that would lose what is trained.
    pub fn of(name: &str, shape: &[usize], live: Dtype, files: Dtype) -> Result<Fit> {
        match (live, shape.len()) {
            _ if live == files => Ok(Fit::Same),
            (Dtype::F32, 1) => Ok(Fit::Widened),
            _ => bail!(
                "the server holds {name} in {live}, the model directory in {files}: serve it as it is (`--outtype {}` \
                 of llama.cpp's converter, `--dtype` of other servers); nothing was written",
                files.as_str().to_lowercase()
            ),
        }
    }
}

/// The element types of tensors in the files.
pub fn file_dtypes(files: &SafetensorsDir, names: &[String]) -> Result<Vec<Dtype>> {
    let dtype = |name: &String| {
        let tensor = files.find(name).with_context(|| format!("{} holds no {name}", files.dir().display()))?;
        tensor.dtype().with_context(|| name.clone())
    };
    names.iter().map(dtype).collect()
}

/// Elements of any type as the bytes of f32.
pub fn widened(bytes: &[u8], dtype: Dtype) -> Vec<u8> {
    compute::narrow(Dtype::F32, &compute::widen(dtype, bytes))
}

/// A model directory's tensors, mapped to the names that its config expects.
pub struct ModelFiles {
    files: SafetensorsDir,
    map: WeightMap,
    /// For each view the tensor in the files that holds it, and where in its bytes the view begins.
    places: Vec<(String, usize)>,
}

impl ModelFiles {
    /// Reads the headers and checks that the files hold the model.
    pub fn open(dir: &Path, config: &Config) -> Result<ModelFiles> {
        let files = SafetensorsDir::open(dir)?;
        // A head that the files hold beside an embedding it is tied to is no tensor of the model.
        let copy = ipc::tied_head_copy(&files, config.decoder.tied)?;
        let mut tensors = files.server_tensors()?;
        tensors.retain(|t| Some(&t.name) != copy.as_ref());
        let map = weight_map::map(&config.decoder.tensors(), &tensors, &[])
            .with_context(|| format!("{} does not hold the model that its config.json describes", dir.display()))?;
        let place = |view: &View| {
            let tensor = &tensors[view.server_tensor];
            (tensor.name.clone(), (view.offset - tensor.offset) as usize)
        };
        let places = map.views.iter().map(place).collect();
        Ok(ModelFiles { files, map, places })
    }

    /// A tensor's bytes in the files, and their element type. For directories that nobody writes to meanwhile.
    pub fn bytes(&self, name: &str) -> Result<(&[u8], Dtype)> {
        let index = self.map.find(name).with_context(|| format!("no tensor {name}"))?;
        let (view, (tensor, start)) = (&self.map.views[index], &self.places[index]);
        Ok((&self.files.bytes(tensor)?[*start..][..view.bytes()], view.dtype))
    }

    /// A private copy of the first `rows` rows of a tensor, as it is or widened to f32.
    pub fn weight<D: Backend>(&self, device: &Arc<D>, name: &str, rows: usize, widen: bool) -> Result<D::Weight> {
        let index = self.map.find(name).with_context(|| format!("no tensor {name}"))?;
        let cols = matrix_shape(&self.map.views[index].shape).1;
        let (bytes, dtype) = self.bytes(name)?;
        let bytes = &bytes[..rows * cols * dtype.size()];
        let weight = D::weight(device, if widen { Dtype::F32 } else { dtype }, rows, cols);
        if widen && dtype != Dtype::F32 {
            device.write_weight(&weight, 0, &widened(bytes, dtype));
        } else {
            device.write_weight(&weight, 0, bytes);
        }
        Ok(weight)
    }
}

/// A private copy of all of a model directory's weights, in the model's order.
pub fn load<D: Backend>(device: &Arc<D>, dir: &Path, config: &Config, widen: bool) -> Result<Vec<D::Weight>> {
    let files = ModelFiles::open(dir, config)?;
    let weight = |t: HfTensor| files.weight(device, &t.name, matrix_shape(&t.shape).0, widen);
    config.decoder.tensors().into_iter().map(weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_vectors_may_be_wider_in_the_server() {
        let fit = |shape: &[usize], live, files| Fit::of("w", shape, live, files).map_err(|error| error.to_string());
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            assert_eq!(fit(&[4, 4], dtype, dtype), Ok(Fit::Same));
            assert_eq!(fit(&[4], dtype, dtype), Ok(Fit::Same));
        }
        assert_eq!(fit(&[4], Dtype::F32, Dtype::BF16), Ok(Fit::Widened));
        for (shape, live, files) in [
            (&[4, 4][..], Dtype::F32, Dtype::BF16),
            (&[4, 4], Dtype::F16, Dtype::BF16),
            (&[4], Dtype::BF16, Dtype::F32),
        ] {
            let error = fit(shape, live, files).unwrap_err();
            assert!(error.contains("--outtype") && error.contains("nothing was written"), "{error}");
        }
    }

    #[test]
    fn widening_keeps_every_value() {
        let halves = [0x3f80u16, 0xc000, 0x0001, 0x7f7f].map(u16::to_le_bytes).concat();
        let want = [0x3f80_0000u32, 0xc000_0000, 0x0001_0000, 0x7f7f_0000].map(u32::to_le_bytes).concat();
        assert_eq!(widened(&halves, Dtype::BF16), want);
    }
}
