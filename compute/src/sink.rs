//! Where backward leaves gradients: as factors, never as a buffer of the size of a weight.
//!
//! x (t,n) inputs of a layer · dy (t,m) gradient of its outputs · G (m,n) = dyᵀ x, of rank <= t.

use crate::{Device, Factors};
use std::sync::Arc;

/// Number of a tensor in the model's list.
pub type TensorId = usize;

/// Receives the gradient events of one or more windows. A tensor may get several events; their
/// gradients add up. Factors are shared (`Arc`) so that q, k and v can hand over one x.
pub trait Sink<D: Device> {
    /// A matrix: G += dyᵀ x over t rows.
    fn linear(&mut self, tensor: TensorId, x: &Arc<D::Buffer>, dy: &Arc<D::Buffer>, t: usize);
    /// An embedding: row ids\[i\] of G += row i of dx (ids.len(), n).
    fn rows(&mut self, tensor: TensorId, ids: &[u32], dx: &Arc<D::Buffer>);
    /// A vector: g += g.
    fn dense(&mut self, tensor: TensorId, g: &Arc<D::Buffer>);
    /// Whether anybody wants the gradient of this tensor; backward skips what nobody wants.
    fn wants(&self, tensor: TensorId) -> bool;
}

/// Forms every gradient in full, f32: for checks and for the `grads` command.
pub struct Collector<D: Device> {
    device: Arc<D>,
    shapes: Vec<(usize, usize)>,
    /// G of each tensor, (m,n) row-major.
    pub gradients: Vec<D::Buffer>,
}

impl<D: Device> Collector<D> {
    /// Zero gradients of these (rows, cols).
    pub fn new(device: Arc<D>, shapes: &[(usize, usize)]) -> Collector<D> {
        let gradients = shapes.iter().map(|(m, n)| device.zeros(m * n)).collect();
        Collector { device, shapes: shapes.to_vec(), gradients }
    }
}

impl<D: Device> Sink<D> for Collector<D> {
    fn linear(&mut self, tensor: TensorId, x: &Arc<D::Buffer>, dy: &Arc<D::Buffer>, t: usize) {
        let (m, n) = self.shapes[tensor];
        self.device.outer_accumulate(&mut self.gradients[tensor], &Factors { x, dy, t, m, n });
    }
    fn rows(&mut self, tensor: TensorId, ids: &[u32], dx: &Arc<D::Buffer>) {
        let ids = self.device.ids(ids);
        self.device.scatter_add_rows(&mut self.gradients[tensor], dx, &ids, self.shapes[tensor].1);
    }
    fn dense(&mut self, tensor: TensorId, g: &Arc<D::Buffer>) {
        let (m, n) = self.shapes[tensor];
        self.device.add(&mut self.gradients[tensor], g, m * n);
    }
    fn wants(&self, _: TensorId) -> bool {
        true
    }
}
