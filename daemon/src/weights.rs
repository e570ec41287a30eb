//! From tensors that somebody holds to the weights that `compute` works on.

use anyhow::{Context, Result};
use compute::Dtype;
use compute::cpu::Weight;
use ipc::{Attachment, SafetensorsDir, SharedWeights};
use model::Config;
use std::path::Path;
use std::sync::Arc;
use weight_map::{HfTensor, View, WeightMap};

/// (rows, cols) of a tensor; a vector is one row.
pub fn matrix_shape(shape: &[usize]) -> (usize, usize) {
    match *shape {
        [n] => (1, n),
        [m, n] => (m, n),
        _ => unreachable!("a decoder has vectors and matrices"),
    }
}

/// The weights of an attached server, in the model's order.
pub fn attached(attachment: &Arc<Attachment>) -> Vec<Weight> {
    let tensor = |i| {
        let live = attachment.tensor(i);
        let (rows, cols) = matrix_shape(live.shape);
        // SAFETY: the tensor's bytes were checked against its mapping when it was attached; the Arc
        // that the weight keeps holds the mapping, and nobody makes references into it.
        unsafe { Weight::new(live.ptr, live.dtype, rows, cols, attachment.clone()) }
    };
    (0..attachment.len()).map(tensor).collect()
}

/// The weights that the embedded engine serves, in the model's order.
pub fn shared(weights: &Arc<SharedWeights>) -> Vec<Weight> {
    let tensor = |i| {
        let live = weights.tensor(i);
        let (rows, cols) = matrix_shape(live.shape);
        // SAFETY: as in `attached`: the Arc holds the shared memory that the tensor lies in.
        unsafe { Weight::new(live.ptr, live.dtype, rows, cols, weights.clone()) }
    };
    (0..weights.len()).map(tensor).collect()
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

    /// A private copy of the first `rows` rows of a tensor, as it is or widened to f32.
    pub fn weight(&self, name: &str, rows: usize, widen: bool) -> Result<Weight> {
        let index = self.map.find(name).with_context(|| format!("no tensor {name}"))?;
        let view = &self.map.views[index];
        let cols = matrix_shape(&view.shape).1;
        let (tensor, start) = &self.places[index];
        let weight = Weight::zeros(view.dtype, rows, cols);
        weight.write_bytes(0, &self.files.bytes(tensor)?[*start..][..weight.bytes()]);
        if !widen || view.dtype == Dtype::F32 {
            return Ok(weight);
        }
        Ok(Weight::from_values(Dtype::F32, rows, cols, &weight.values()))
    }
}

/// A private copy of all of a model directory's weights, in the model's order.
pub fn load(dir: &Path, config: &Config, widen: bool) -> Result<Vec<Weight>> {
    let files = ModelFiles::open(dir, config)?;
    let weight = |t: HfTensor| files.weight(&t.name, matrix_shape(&t.shape).0, widen);
    config.decoder.tensors().into_iter().map(weight).collect()
}
