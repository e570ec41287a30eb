//! One step over all tensors: look at everything, decide, then write.
//!
//! t counts applied steps from 1 · P of refresh k = (t-1)/update_proj_gap · step size
//! lr_t·sqrt(1-b2^t)/(1-b1^t)·alpha/L · see `compute` for the arithmetic of a tensor.
//!
//! Tensors with the same smaller dimension share a projection: it compresses each of them
//! independently, and one regenerated matrix serves a whole model.

use crate::gradients::{Gradients, Pair};
use crate::settings::{Gates, Rule, Settings, Tensor, TensorKind};
use compute::{AdamRow, Compressed, Device, Factors, Limiter, NORM_SLOTS, NORM_UPDATE, Stream, Write};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Compressed or dense moments of one tensor; empty for a frozen one.
pub(crate) struct State<D: Device> {
    pub exp_avg: D::Buffer,
    pub exp_avg_sq: D::Buffer,
    pub lookup: Lookup,
}

/// Which rows of a lookup have moments, and how many gradients each has had.
#[derive(Default)]
pub(crate) struct Lookup {
    /// row -> (slot, gradients so far, step of the last one)
    pub slots: HashMap<u32, Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Slot {
    pub slot: u32,
    pub gradients: u64,
    pub last_step: u64,
}

/// Bytes of moments that a lookup may hold; the rows unused for longest make room.
const LOOKUP_BYTES: usize = 256 << 20;

/// Where projections come from instead of the seed: (refresh, rank, dim) -> P (rank, dim).
pub type ProjectionSource = Box<dyn Fn(u64, usize, usize) -> Vec<f32> + Send>;

/// Moments and norms of all tensors of a model, and the rule that applies them.
pub struct Optimizer<D: Device> {
    pub(crate) device: Arc<D>,
    pub(crate) settings: Settings,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) states: Vec<State<D>>,
    /// [`NORM_SLOTS`] per tensor.
    pub(crate) norms: D::Buffer,
    /// Applied steps.
    pub(crate) steps: u64,
    /// By (rank, dim), with the refresh that it belongs to.
    projections: HashMap<(usize, usize), (u64, D::Buffer)>,
    source: Option<ProjectionSource>,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Weights and state moved.
    Applied(StepReport),
    /// Nothing changed.
    Skipped(Skip),
}

/// Figures of an applied step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Number of applied steps, this one included.
    pub step: u64,
    /// sqrt(Σ‖U‖² / Σ r·C) over the APOLLO matrices before the limiter; about 1 when settled.
    pub update_norm: f32,
    /// The lr that was used, warm-up and example weight included.
    pub lr: f32,
}

/// Why a step changed nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Skip {
    /// A loss or gradient that is infinite or NaN.
    NotFinite {
        /// Values that are not finite among the factors, or 1 for the loss or a norm.
        values: u64,
    },
    /// The mean loss lies outside the gates.
    Loss {
        /// Mean loss.
        loss: f32,
        /// The bound.
        bound: f32,
    },
    /// The update's norm lies outside the gates.
    UpdateNorm {
        /// sqrt(Σ‖U‖² / Σ r·C).
        norm: f32,
        /// The bound.
        bound: f32,
    },
    /// There was no gradient.
    Empty,
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Skip::NotFinite { values } => write!(f, "loss or gradient is not finite ({values} values)"),
            Skip::Loss { loss, bound } if loss < bound => {
                write!(f, "loss {loss:.4} is below the gate loss_min = {bound}")
            }
            Skip::Loss { loss, bound } => write!(f, "loss {loss:.4} is above the gate loss_max = {bound}"),
            Skip::UpdateNorm { norm, bound } => write!(f, "update norm {norm:.4} is outside the gate {bound}"),
            Skip::Empty => write!(f, "no trainable tensor got a gradient"),
        }
    }
}

/// The gradient of one tensor, ready to apply.
enum Ready<D: Device> {
    Apollo { tensor: usize, pair: Pair<D>, s: D::Buffer },
    Dense { tensor: usize, pair: Pair<D> },
    Vector { tensor: usize, g: D::Buffer },
    Lookup { tensor: usize, rows: Vec<u32>, g: D::Buffer },
}

impl<D: Device> Optimizer<D> {
    /// Fresh moments for these tensors.
    pub fn new(device: Arc<D>, tensors: Vec<Tensor>, settings: Settings) -> Optimizer<D> {
        let states = tensors.iter().map(|t| State::new(&*device, t, &settings)).collect();
        let norms = device.zeros(tensors.len() * NORM_SLOTS);
        Optimizer { device, settings, tensors, states, norms, steps: 0, projections: HashMap::new(), source: None }
    }

    /// Takes projections from `source` instead of the seed: to replay somebody else's run.
    pub fn with_projections(mut self, source: ProjectionSource) -> Optimizer<D> {
        self.source = Some(source);
        self
    }

    /// Applied steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }
    /// Constants in use.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }
    /// Tensors in the model's order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }
    /// An empty sink for one step.
    pub fn gradients(&self) -> Gradients<D> {
        Gradients::new(self.tensors.iter().map(|t| t.effective_rule() != Rule::Frozen).collect())
    }
    /// Bytes of moments.
    pub fn state_bytes(&self) -> usize {
        let len = |s: &State<D>| self.device.len(&s.exp_avg) + self.device.len(&s.exp_avg_sq);
        4 * self.states.iter().map(len).sum::<usize>()
    }

    /// Applies one step, or nothing. `weights` in the order of the tensors; `loss` is the mean over
    /// the step's decision tokens; `lr_scale` multiplies lr (an example's weight).
    pub fn step(
        &mut self,
        weights: &[D::Weight],
        gradients: &Gradients<D>,
        loss: f32,
        lr_scale: f32,
        gates: &Gates,
    ) -> Outcome {
        if !loss.is_finite() {
            return Outcome::Skipped(Skip::NotFinite { values: 1 });
        }
        if let Some(bound) = outside(loss, gates.loss_min, gates.loss_max) {
            return Outcome::Skipped(Skip::Loss { loss, bound });
        }
        let values = self.count_nonfinite(gradients);
        if values > 0 {
            return Outcome::Skipped(Skip::NotFinite { values });
        }
        let ready = self.prepare(gradients);
        if ready.is_empty() {
            return Outcome::Skipped(Skip::Empty);
        }
        let update_norm = self.update_norm(&ready);
        if !update_norm.is_finite() {
            return Outcome::Skipped(Skip::NotFinite { values: 1 });
        }
        if let Some(bound) = outside(update_norm, gates.update_norm_min, gates.update_norm_max) {
            return Outcome::Skipped(Skip::UpdateNorm { norm: update_norm, bound });
        }
        let lr = self.settings.lr_at(self.steps + 1) * lr_scale as f64;
        self.steps += 1;
        for tensor in ready {
            self.commit(weights, tensor, lr);
        }
        Outcome::Applied(StepReport { step: self.steps, update_norm, lr: lr as f32 })
    }

    fn count_nonfinite(&self, gradients: &Gradients<D>) -> u64 {
        let mut counter = self.device.zeros(1);
        let mut count = |b: &D::Buffer| self.device.count_nonfinite(&mut counter, 0, b, self.device.len(b));
        for events in &gradients.events {
            events.linear.iter().for_each(|(x, dy, _)| {
                count(x);
                count(dy);
            });
            events.rows.iter().for_each(|(_, dx)| count(dx));
            events.dense.iter().for_each(|g| count(g));
        }
        let mut host = [0.0];
        self.device.read(&counter, 0, &mut host);
        host[0] as u64
    }

    /// First pass: everything that a step needs, without writing state or weights.
    fn prepare(&mut self, gradients: &Gradients<D>) -> Vec<Ready<D>> {
        let mut ready = Vec::new();
        for tensor in 0..self.tensors.len() {
            let (rule, kind) = (self.tensors[tensor].effective_rule(), self.tensors[tensor].kind);
            let (m, n) = (self.tensors[tensor].rows, self.tensors[tensor].cols);
            let events = &gradients.events[tensor];
            let item = match (rule, kind) {
                (Rule::Frozen, _) => None,
                (Rule::Apollo, _) => events.pair(&self.device, m, n).map(|pair| self.prepare_apollo(tensor, pair)),
                (Rule::AdamW, TensorKind::Matrix) => {
                    events.pair(&self.device, m, n).map(|pair| Ready::Dense { tensor, pair })
                }
                (Rule::AdamW, TensorKind::Vector) => {
                    events.vector(&self.device, n).map(|g| Ready::Vector { tensor, g })
                }
                (Rule::AdamW, TensorKind::Lookup) => {
                    events.touched(&self.device, n).map(|(rows, g)| Ready::Lookup { tensor, rows, g })
                }
            };
            ready.extend(item);
        }
        ready
    }

    fn prepare_apollo(&mut self, tensor: usize, pair: Pair<D>) -> Ready<D> {
        let (m, n) = (self.tensors[tensor].rows, self.tensors[tensor].cols);
        let (rank, dim) = (self.rank(tensor), m.min(n));
        self.refresh_projection(rank, dim);
        let mut s = self.device.zeros(m.max(n));
        let factors = Factors { x: &*pair.x, dy: &*pair.dy, t: pair.t, m, n };
        let compressed = compressed(&self.settings, &self.projections[&(rank, dim)].1, rank);
        let (state, at) = (&self.states[tensor], tensor * NORM_SLOTS);
        let norms = &mut self.norms;
        self.device.apollo_prepare(&mut s, norms, at, &state.exp_avg, &state.exp_avg_sq, &factors, &compressed);
        let limiter = Limiter {
            growth: self.settings.norm_growth_limit,
            floor: self.settings.norm_growth_floor,
            expected: ((rank * m.max(n)) as f32).sqrt(),
        };
        self.device.limit(norms, at, limiter);
        Ready::Apollo { tensor, pair, s }
    }

    fn rank(&self, tensor: usize) -> usize {
        rank_of(&self.tensors[tensor], &self.settings)
    }

    fn refresh_projection(&mut self, rank: usize, dim: usize) {
        let refresh = self.steps / self.settings.update_proj_gap.max(1);
        if self.projections.get(&(rank, dim)).is_some_and(|(of, _)| *of == refresh) {
            return;
        }
        let mut p = self.device.zeros(rank * dim);
        match &self.source {
            Some(source) => self.device.write(&mut p, 0, &source(refresh, rank, dim)),
            None => {
                let stream = Stream::projection(self.settings.seed, refresh, dim);
                self.device.normal_projection(&mut p, rank, dim, stream);
            }
        }
        self.projections.insert((rank, dim), (refresh, p));
    }

    /// sqrt(Σ‖U‖² / Σ r·C) over the APOLLO matrices; 1 if there are none.
    fn update_norm(&self, ready: &[Ready<D>]) -> f32 {
        let mut norms = vec![0.0; self.device.len(&self.norms)];
        self.device.read(&self.norms, 0, &mut norms);
        let (mut sum, mut expected) = (0f64, 0f64);
        for item in ready {
            if let Ready::Apollo { tensor, .. } = item {
                let t = &self.tensors[*tensor];
                sum += (norms[tensor * NORM_SLOTS + NORM_UPDATE] as f64).powi(2);
                expected += (self.rank(*tensor) * t.rows.max(t.cols)) as f64;
            }
        }
        if expected == 0.0 { 1.0 } else { (sum / expected).sqrt() as f32 }
    }

    /// Second pass: writes state and weight of one tensor. Nothing here can fail.
    fn commit(&mut self, weights: &[D::Weight], ready: Ready<D>, lr: f64) {
        let corrected = lr * self.settings.bias_correction(self.steps);
        let write = |tensor: usize, step: f64| Write {
            step: step as f32,
            decay: (lr * self.settings.weight_decay as f64) as f32,
            stream: Stream::rounding(self.settings.seed, self.steps, tensor),
        };
        let moments = self.settings.moments();
        match ready {
            Ready::Apollo { tensor, pair, s } => {
                let (m, n) = (self.tensors[tensor].rows, self.tensors[tensor].cols);
                let (rank, dim) = (self.rank(tensor), m.min(n));
                let write = write(tensor, corrected * self.settings.alpha(dim, rank));
                let factors = Factors { x: &*pair.x, dy: &*pair.dy, t: pair.t, m, n };
                let compressed = compressed(&self.settings, &self.projections[&(rank, dim)].1, rank);
                let State { exp_avg, exp_avg_sq, .. } = &mut self.states[tensor];
                let at = tensor * NORM_SLOTS;
                let (w, norms) = (&weights[tensor], &mut self.norms);
                self.device.apollo_commit(w, norms, at, &s, exp_avg, exp_avg_sq, &factors, &compressed, write);
            }
            Ready::Dense { tensor, pair } => {
                let (m, n) = (self.tensors[tensor].rows, self.tensors[tensor].cols);
                let factors = Factors { x: &*pair.x, dy: &*pair.dy, t: pair.t, m, n };
                let write = write(tensor, corrected);
                let State { exp_avg, exp_avg_sq, .. } = &mut self.states[tensor];
                self.device.adamw_factors(&weights[tensor], exp_avg, exp_avg_sq, &factors, moments, write);
            }
            Ready::Vector { tensor, g } => {
                let write = write(tensor, corrected);
                let rows = [AdamRow { row: 0, slot: 0, step: corrected as f32 }];
                let State { exp_avg, exp_avg_sq, .. } = &mut self.states[tensor];
                self.device.adamw_rows(&weights[tensor], &rows, &g, exp_avg, exp_avg_sq, moments, write);
            }
            Ready::Lookup { tensor, rows, g } => {
                let write = write(tensor, corrected);
                let settings = &self.settings;
                let step_of = |gradients: u64| (lr * settings.bias_correction(gradients)) as f32;
                let state = &mut self.states[tensor];
                let cols = self.tensors[tensor].cols;
                let rows = state.assign_slots(&*self.device, &rows, cols, self.steps, step_of);
                let State { exp_avg, exp_avg_sq, .. } = state;
                self.device.adamw_rows(&weights[tensor], &rows, &g, exp_avg, exp_avg_sq, moments, write);
            }
        }
    }
}

fn compressed<'a, B>(settings: &Settings, projection: &'a B, rank: usize) -> Compressed<'a, B> {
    Compressed { projection, rank, scale_type: settings.scale_type, moments: settings.moments() }
}

/// min(rank, m, n).
pub(crate) fn rank_of(tensor: &Tensor, settings: &Settings) -> usize {
    settings.rank.min(tensor.rows).min(tensor.cols)
}

fn outside(value: f32, min: Option<f32>, max: Option<f32>) -> Option<f32> {
    min.filter(|min| value < *min).or(max.filter(|max| value > *max))
}

impl<D: Device> State<D> {
    pub fn new(device: &D, tensor: &Tensor, settings: &Settings) -> State<D> {
        let len = moments_len(tensor, settings);
        State { exp_avg: device.zeros(len), exp_avg_sq: device.zeros(len), lookup: Lookup::default() }
    }

    /// Gives each row a slot of moments: its own, a free one, or that of the row unused for longest.
    fn assign_slots(
        &mut self,
        device: &D,
        rows: &[u32],
        cols: usize,
        now: u64,
        step_of: impl Fn(u64) -> f32,
    ) -> Vec<AdamRow> {
        let wanted = self.lookup.slots.len() + rows.iter().filter(|r| !self.lookup.slots.contains_key(r)).count();
        let capacity = (LOOKUP_BYTES / (8 * cols)).max(rows.len());
        self.grow(device, wanted.min(capacity) * cols);
        rows.iter()
            .map(|&row| {
                let slot = self.lookup.take(row, capacity as u32, now, |slot| {
                    let zeros = vec![0.0; cols];
                    device.write(&mut self.exp_avg, slot as usize * cols, &zeros);
                    device.write(&mut self.exp_avg_sq, slot as usize * cols, &zeros);
                });
                AdamRow { row, slot: slot.slot, step: step_of(slot.gradients) }
            })
            .collect()
    }

    fn grow(&mut self, device: &D, len: usize) {
        for buffer in [&mut self.exp_avg, &mut self.exp_avg_sq] {
            let old = device.len(buffer);
            if len > old {
                // Doubling keeps the number of copies small.
                let mut larger = device.zeros(len.max(2 * old));
                device.copy(&mut larger, 0, buffer, 0, old);
                *buffer = larger;
            }
        }
    }
}

impl Lookup {
    /// The slot of `row` with this gradient counted; `clear` zeroes a slot that changes hands.
    fn take(&mut self, row: u32, capacity: u32, now: u64, mut clear: impl FnMut(u32)) -> Slot {
        if let Some(slot) = self.slots.get_mut(&row) {
            slot.gradients += 1;
            slot.last_step = now;
            return *slot;
        }
        let used = self.slots.len() as u32;
        let slot = if used < capacity {
            used
        } else {
            let oldest = self.slots.iter().map(|(row, s)| (s.last_step, *row)).min().expect("capacity is above 0").1;
            let slot = self.slots.remove(&oldest).expect("it was just found").slot;
            clear(slot);
            slot
        };
        let slot = Slot { slot, gradients: 1, last_step: now };
        self.slots.insert(row, slot);
        slot
    }
}

/// f32 values in each moment of a tensor; a lookup grows with the rows that it sees.
pub(crate) fn moments_len(tensor: &Tensor, settings: &Settings) -> usize {
    match (tensor.effective_rule(), tensor.kind) {
        (Rule::Frozen, _) | (_, TensorKind::Lookup) => 0,
        (Rule::Apollo, _) => rank_of(tensor, settings) * tensor.rows.max(tensor.cols),
        (Rule::AdamW, _) => tensor.rows * tensor.cols,
    }
}
