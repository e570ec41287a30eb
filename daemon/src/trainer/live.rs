//! The trained tensors, as a sync reads them.

use crate::backend::{Backend, ReadNext};
use apollo::{Optimizer, Rule, Written};
use checkpoint::{LiveTensor, LiveWeights, Part, Reads};
use model::Model;
use std::ops::Range;
use std::sync::{Mutex, OnceLock, PoisonError};
use weight_map::Role;

/// The trained tensors, as sync reads them.
pub(super) struct Live<'a, D: Backend> {
    device: &'a D,
    tensors: Vec<LiveTensor>,
    weights: Vec<&'a D::Weight>,
    written: Vec<&'a Written>,
    hash_seed: u64,
    /// What was announced, where it is read ahead.
    ahead: OnceLock<Mutex<ReadNext<'a>>>,
}

impl<'a, D: Backend> Live<'a, D> {
    pub(super) fn new(
        model: &'a Model<D>,
        optimizer: &'a Optimizer<D>,
        head_copy: Option<&str>,
        hash_seed: u64,
    ) -> Live<'a, D> {
        let (tensors, weights, written, ahead) = (Vec::new(), Vec::new(), Vec::new(), OnceLock::new());
        let mut live = Live { device: &**model.device(), tensors, weights, written, hash_seed, ahead };
        let specs = optimizer.tensors().iter().zip(optimizer.written());
        for ((tensor, weight), (spec, written)) in model.tensors().iter().zip(model.weights()).zip(specs) {
            if spec.effective_rule() != Rule::Frozen {
                live.push(&tensor.name, &tensor.shape, weight, written);
                if let (Role::Embedding, Some(head)) = (tensor.role, head_copy) {
                    live.push(head, &tensor.shape, weight, written);
                }
            }
        }
        live
    }

    fn push(&mut self, name: &str, shape: &[usize], weight: &'a D::Weight, written: &'a Written) {
        let dtype = self.device.dtype(weight);
        self.tensors.push(LiveTensor {
            name: name.into(),
            dtype: dtype.to_string(),
            shape: shape.to_vec(),
            bytes: (shape.iter().product::<usize>() * dtype.size()) as u64,
        });
        self.weights.push(weight);
        self.written.push(written);
    }

    /// The bytes of a tensor that steps have written.
    fn written_bytes(&self, tensor: usize) -> Vec<Range<u64>> {
        let LiveTensor { shape, bytes, .. } = &self.tensors[tensor];
        let row = bytes / shape.first().map_or(1, |rows| *rows as u64).max(1);
        match self.written[tensor] {
            Written::Nothing => Vec::new(),
            Written::Everything => vec![0..*bytes],
            Written::Rows(rows) => rows.iter().map(|&r| u64::from(r) * row..(u64::from(r) + 1) * row).collect(),
        }
    }
}

impl<D: Backend> LiveWeights for Live<'_, D> {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }
    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        match self.ahead.get() {
            Some(next) => next.lock().unwrap_or_else(PoisonError::into_inner)(buf),
            None => self.device.read_weight(self.weights[tensor], offset as usize, buf),
        }
    }
    fn block_hashes(&self, block_bytes: u64) -> Option<Vec<u128>> {
        self.device.block_hashes(&self.weights, block_bytes as usize, self.hash_seed)
    }
    fn written(&self) -> Option<Vec<Vec<Range<u64>>>> {
        Some((0..self.tensors.len()).map(|tensor| self.written_bytes(tensor)).collect())
    }
    fn announce(&self, parts: Vec<Part>) -> Reads {
        let bytes = |part: Part| {
            let start = part.offset as usize;
            (self.weights[part.tensor], start..start + part.bytes as usize)
        };
        let Some(ahead) = self.device.read_ahead(parts.into_iter().map(bytes).collect()) else {
            return Reads::Anyhow;
        };
        assert!(self.ahead.set(Mutex::new(ahead)).is_ok(), "a sync announces its parts once");
        Reads::InOrder
    }
}
