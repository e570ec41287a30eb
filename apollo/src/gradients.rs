//! The gradient of one step, as backward hands it over: factors, rows and vectors per tensor.

use compute::{Device, Sink, TensorId};
use std::sync::Arc;

/// Events of one tensor.
pub(crate) struct Events<D: Device> {
    pub linear: Vec<Pair<D>>,
    pub rows: Vec<(Vec<u32>, Arc<D::Buffer>)>,
    pub dense: Vec<Arc<D::Buffer>>,
}

/// Everything that backward left for one step.
pub struct Gradients<D: Device> {
    pub(crate) events: Vec<Events<D>>,
    wanted: Vec<bool>,
}

/// G = dyᵀ x over t rows, owned.
pub(crate) struct Pair<D: Device> {
    pub x: Arc<D::Buffer>,
    pub dy: Arc<D::Buffer>,
    pub t: usize,
}

impl<D: Device> Gradients<D> {
    /// Nothing yet, for tensors of which `wanted` train.
    pub fn new(wanted: Vec<bool>) -> Gradients<D> {
        let none = || Events { linear: Vec::new(), rows: Vec::new(), dense: Vec::new() };
        Gradients { events: wanted.iter().map(|_| none()).collect(), wanted }
    }
}

impl<D: Device> Sink<D> for Gradients<D> {
    fn linear(&mut self, tensor: TensorId, x: &Arc<D::Buffer>, dy: &Arc<D::Buffer>, t: usize) {
        self.events[tensor].linear.push(Pair { x: x.clone(), dy: dy.clone(), t });
    }
    fn rows(&mut self, tensor: TensorId, ids: &[u32], dx: &Arc<D::Buffer>) {
        self.events[tensor].rows.push((ids.to_vec(), dx.clone()));
    }
    fn dense(&mut self, tensor: TensorId, g: &Arc<D::Buffer>) {
        self.events[tensor].dense.push(g.clone());
    }
    fn wants(&self, tensor: TensorId) -> bool {
        self.wanted[tensor]
    }
}

impl<D: Device> Events<D> {
    /// Number of rows over all factor pairs, embedding rows included.
    pub fn total_rows(&self) -> usize {
        self.linear.iter().map(|l| l.t).sum::<usize>() + self.rows.iter().map(|r| r.0.len()).sum::<usize>()
    }

    /// All factor pairs as one, (T,n) and (T,m); rows of a tied embedding become one-hot rows of dy,
    /// so that head and input share one optimizer state.
    pub fn pair(&self, device: &D, m: usize, n: usize) -> Option<Pair<D>> {
        let t = self.total_rows();
        if t == 0 {
            return None;
        }
        if let ([Pair { x, dy, t }], []) = (&self.linear[..], &self.rows[..]) {
            return Some(Pair { x: x.clone(), dy: dy.clone(), t: *t });
        }
        let (mut x, mut dy) = (device.uninit(t * n), device.uninit(t * m));
        let mut at = 0;
        for Pair { x: piece_x, dy: piece_dy, t: rows } in &self.linear {
            device.copy(&mut x, at * n, piece_x, 0, rows * n);
            device.copy(&mut dy, at * m, piece_dy, 0, rows * m);
            at += rows;
        }
        for (ids, piece) in &self.rows {
            device.copy(&mut x, at * n, piece, 0, ids.len() * n);
            device.one_hot(&mut dy, at, &device.ids(ids), m);
            at += ids.len();
        }
        Some(Pair { x: Arc::new(x), dy: Arc::new(dy), t })
    }

    /// The sum of the dense events of a vector of n elements.
    pub fn vector(&self, device: &D, n: usize) -> Option<Arc<D::Buffer>> {
        let (first, rest) = self.dense.split_first()?;
        if rest.is_empty() {
            return Some(first.clone());
        }
        let mut g = device.uninit(n);
        device.copy(&mut g, 0, first, 0, n);
        rest.iter().for_each(|more| device.add(&mut g, more, n));
        Some(Arc::new(g))
    }

    /// The touched rows of a lookup in ascending order, and their summed gradients (rows, n).
    pub fn touched(&self, device: &D, n: usize) -> Option<(Vec<u32>, D::Buffer)> {
        let mut rows: Vec<u32> = self.rows.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        rows.sort_unstable();
        rows.dedup();
        if rows.is_empty() {
            return None;
        }
        let mut g = device.zeros(rows.len() * n);
        for (ids, dx) in &self.rows {
            let index: Vec<u32> =
                ids.iter().map(|id| rows.binary_search(id).expect("every id was collected") as u32).collect();
            device.scatter_add_rows(&mut g, dx, &device.ids(&index), n);
        }
        Some((rows, g))
    }
}
