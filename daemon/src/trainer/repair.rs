//! Live weights as what damaged files are repaired from: whatever of them is still as the current generation has it.

use super::start::{StartError, attach};
use crate::backend::Backend;
use crate::config::Config;
use crate::protocol::Repaired;
use crate::weights;
use anyhow::{Context, Result};
use checkpoint::{LiveTensor, LiveWeights, RepairReport, Sources};
use compute::cuda::DeviceName;
use compute::{Cpu, Cuda, Dtype};
use ipc::SafetensorsDir;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weight_map::matrix_shape;

/// All weights that a server holds with the files' element types, trained or frozen.
pub struct Held<'a, D: Backend> {
    device: &'a D,
    tensors: Vec<LiveTensor>,
    weights: Vec<&'a D::Weight>,
}

impl<'a, D: Backend> Held<'a, D> {
    /// `tensors` are the model's, `weights` the server's, `files` the element types in the files, all in the same order.
    pub fn new(
        device: &'a D,
        tensors: &[weight_map::HfTensor],
        weights: &'a [D::Weight],
        files: &[Dtype],
    ) -> Held<'a, D> {
        let mut held = Held { device, tensors: Vec::new(), weights: Vec::new() };
        for ((tensor, weight), files) in tensors.iter().zip(weights).zip(files) {
            if device.dtype(weight) == *files {
                let (rows, cols) = matrix_shape(&tensor.shape);
                held.tensors.push(LiveTensor {
                    name: tensor.name.clone(),
                    dtype: files.to_string(),
                    shape: tensor.shape.clone(),
                    bytes: (rows * cols * files.size()) as u64,
                });
                held.weights.push(weight);
            }
        }
        held
    }
}

impl<D: Backend> LiveWeights for Held<'_, D> {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        self.device.read_weight(self.weights[tensor], offset as usize, buf)
    }
}

/// What a repair did, for the protocol and for people.
pub fn told(report: &RepairReport) -> Repaired {
    Repaired {
        generation: report.generation,
        repaired: report.repaired.iter().map(ToString::to_string).collect(),
        damage: report.damage.iter().map(ToString::to_string).collect(),
    }
}

/// Repairs a model directory on which no trainer works: from copies, and from the live weights of the server that `config`,
/// the last daemon's, names, where it is there; the second is why it was not looked at, if it was not.
///
/// # Errors
/// The repair's.
pub fn files(dir: &Path, config: Option<&Config>, copies: &[PathBuf]) -> Result<(RepairReport, Option<String>)> {
    let Some(config) = config else { return Ok((offline(dir, None, copies)?, None)) };
    match attached(dir, config, copies) {
        Ok(report) => Ok((report, None)),
        Err(NotLooked::Why(why)) => Ok((offline(dir, None, copies)?, Some(why))),
        Err(NotLooked::Failed(error)) => Err(error),
    }
}

/// Why there was no repair from live weights.
enum NotLooked {
    Why(String),
    Failed(anyhow::Error),
}

impl From<anyhow::Error> for NotLooked {
    fn from(error: anyhow::Error) -> NotLooked {
        NotLooked::Why(format!("{error:#}"))
    }
}

fn offline(dir: &Path, live: Option<&dyn LiveWeights>, copies: &[PathBuf]) -> Result<RepairReport> {
    Ok(checkpoint::repair(dir, &Sources { live, copies })?)
}

fn attached(dir: &Path, config: &Config, copies: &[PathBuf]) -> Result<RepairReport, NotLooked> {
    let model = model::Config::read(dir).context("the model's config.json")?;
    let attachment = match attach(config, &model) {
        Ok(attachment) => Arc::new(attachment),
        Err(StartError::ServerGone(why)) => return Err(NotLooked::Why(why)),
        Err(StartError::Failed(error)) => return Err(error.into()),
    };
    let tensors = model.decoder.tensors();
    let names: Vec<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
    // A header that is what is damaged: then the files alone have to do.
    let types =
        SafetensorsDir::open(dir).map_err(anyhow::Error::from).and_then(|f| weights::file_dtypes(&f, &names))?;
    let gpu = attachment.device().map(|device| DeviceName::Uuid(device.uuid.clone()));
    match gpu {
        None => {
            let device = Arc::new(Cpu::new(config.train.threads).map_err(anyhow::Error::from)?);
            let weights = Cpu::attached(&device, &attachment);
            let held = Held::new(&*device, &tensors, &weights, &types);
            offline(dir, Some(&held), copies).map_err(NotLooked::Failed)
        }
        Some(gpu) => {
            let device = Arc::new(Cuda::open(&gpu).map_err(anyhow::Error::from)?);
            let weights = Cuda::attached(&device, &attachment);
            let held = Held::new(&*device, &tensors, &weights, &types);
            offline(dir, Some(&held), copies).map_err(NotLooked::Failed)
        }
    }
}
