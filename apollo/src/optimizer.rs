//! One step over all tensors: look at everything, decide, then write.
//!
//! t counts applied steps from 1 · P of refresh k = (t-1)/update_proj_gap · step size
//! lr_t·sqrt(1-b2^t)/(1-b1^t)·alpha/L · see `compute` for the arithmetic of a tensor.
//!
//! Tensors with the same smaller dimension share a projection: it compresses each of them
//! independently, and one regenerated matrix serves a whole model.

use crate::gradients::{Gradients, Pair};
use crate::moments::{State, rank_of};
use crate::settings::{Gates, Rule, Settings, Tensor, TensorKind};
use compute::{AdamRow, Compressed, Device, Factors, Limiter, NORM_SLOTS, NORM_UPDATE, Stream, Write};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Default of [`Optimizer::with_lookup_bytes`].
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
    lookup_bytes: usize,
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

/// A step that passed every gate and is not written yet. It may be dropped: then nothing has happened.
pub struct Prepared<D: Device> {
    ready: Vec<Ready<D>>,
    update_norm: f32,
    lr: f64,
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
        Optimizer {
            device,
            settings,
            tensors,
            states,
            norms,
            steps: 0,
            projections: HashMap::new(),
            source: None,
            lookup_bytes: LOOKUP_BYTES,
        }
    }

    /// Forgets moments, norms and counters; keeps what the optimizer was made with.
    pub(crate) fn reset(&mut self) {
        self.states = self.tensors.iter().map(|t| State::new(&*self.device, t, &self.settings)).collect();
        self.norms = self.device.zeros(self.tensors.len() * NORM_SLOTS);
        self.steps = 0;
        self.projections.clear();
    }

    /// Takes projections from `source` instead of the seed: to replay somebody else's run.
    pub fn with_projections(mut self, source: ProjectionSource) -> Optimizer<D> {
        self.source = Some(source);
        self
    }

    /// Caps the moments of each lookup (default 256 MiB): the rows unused for longest make room. A
    /// step that touches more rows than fit goes over the cap rather than leaving rows out.
    pub fn with_lookup_bytes(mut self, bytes: usize) -> Optimizer<D> {
        self.lookup_bytes = bytes;
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

    /// Applies one step, or nothing: [`Optimizer::prepare`], then [`Optimizer::commit`].
    pub fn step(
        &mut self,
        weights: &[D::Weight],
        gradients: &Gradients<D>,
        loss: f32,
        lr_scale: f32,
        gates: &Gates,
    ) -> Outcome {
        match self.prepare(weights, gradients, loss, lr_scale, gates) {
            Ok(prepared) => Outcome::Applied(self.commit(weights, prepared)),
            Err(skip) => Outcome::Skipped(skip),
        }
    }

    /// Looks at everything that could stop a step and writes no weight and no moment. `weights` in the order of the
    /// tensors; `loss` is the mean over the step's decision tokens; `lr_scale` multiplies lr (an example's weight).
    ///
    /// Panics if a trained weight has not the shape of its tensor.
    ///
    /// # Errors
    /// Why this step must not be applied.
    pub fn prepare(
        &mut self,
        weights: &[D::Weight],
        gradients: &Gradients<D>,
        loss: f32,
        lr_scale: f32,
        gates: &Gates,
    ) -> Result<Prepared<D>, Skip> {
        self.assert_shapes(weights);
        if !loss.is_finite() || !lr_scale.is_finite() {
            return Err(Skip::NotFinite { values: 1 });
        }
        if let Some(bound) = outside(loss, gates.loss_min, gates.loss_max) {
            return Err(Skip::Loss { loss, bound });
        }
        let values = self.count_nonfinite(gradients);
        if values > 0 {
            return Err(Skip::NotFinite { values });
        }
        let ready = self.prepare_tensors(gradients);
        if ready.is_empty() {
            return Err(Skip::Empty);
        }
        let update_norm = self.update_norm(&ready);
        if !update_norm.is_finite() || self.adamw_overflows(&ready) {
            return Err(Skip::NotFinite { values: 1 });
        }
        if let Some(bound) = outside(update_norm, gates.update_norm_min, gates.update_norm_max) {
            return Err(Skip::UpdateNorm { norm: update_norm, bound });
        }
        let lr = self.settings.lr_at(self.steps + 1) * lr_scale as f64;
        Ok(Prepared { ready, update_norm, lr })
    }

    /// Writes moments and weights of the step that was prepared last. Nothing here can fail.
    pub fn commit(&mut self, weights: &[D::Weight], prepared: Prepared<D>) -> StepReport {
        let Prepared { ready, update_norm, lr } = prepared;
        self.steps += 1;
        for tensor in ready {
            self.commit_tensor(weights, tensor, lr);
        }
        StepReport { step: self.steps, update_norm, lr: lr as f32 }
    }

    fn count_nonfinite(&self, gradients: &Gradients<D>) -> u64 {
        let mut counter = self.device.zeros(1);
        let mut count = |b: &D::Buffer, len: usize| self.device.count_nonfinite(&mut counter, 0, b, len);
        for (events, tensor) in gradients.events.iter().zip(&self.tensors) {
            let (m, n) = (tensor.rows, tensor.cols);
            events.linear.iter().for_each(|Pair { x, dy, t }| {
                count(x, t * n);
                count(dy, t * m);
            });
            events.rows.iter().for_each(|(ids, dx)| count(dx, ids.len() * n));
            events.dense.iter().for_each(|g| count(g, n));
        }
        let mut host = [0.0];
        self.device.read(&counter, 0, &mut host);
        host[0] as u64
    }

    /// Whether a gradient that AdamW squares element by element would overflow. Its sum of squares
    /// stands for all of them; that of G = dyᵀx is at most the product of those of its factors.
    /// (The compressed step says the same by a norm that is not finite.)
    fn adamw_overflows(&self, ready: &[Ready<D>]) -> bool {
        let device = &*self.device;
        let dot = |x: &D::Buffer, dy: &D::Buffer, t: usize| {
            let mut sum = device.zeros(1);
            device.outer_accumulate(&mut sum, &Factors { x, dy, t, m: 1, n: 1 });
            sum
        };
        let mut counter = device.zeros(1);
        for item in ready {
            let squares = match item {
                Ready::Apollo { .. } => continue,
                Ready::Dense { tensor, pair } => {
                    let (x, dy) = (pair.t * self.tensors[*tensor].cols, pair.t * self.tensors[*tensor].rows);
                    dot(&dot(&pair.x, &pair.x, x), &dot(&pair.dy, &pair.dy, dy), 1)
                }
                Ready::Vector { tensor, g } => dot(g, g, self.tensors[*tensor].cols),
                Ready::Lookup { tensor, rows, g } => dot(g, g, rows.len() * self.tensors[*tensor].cols),
            };
            device.count_nonfinite(&mut counter, 0, &squares, 1);
        }
        let mut host = [0.0];
        device.read(&counter, 0, &mut host);
        host[0] > 0.0
    }

    fn assert_shapes(&self, weights: &[D::Weight]) {
        assert_eq!(weights.len(), self.tensors.len(), "one weight per tensor");
        for (w, t) in weights.iter().zip(&self.tensors).filter(|(_, t)| t.effective_rule() != Rule::Frozen) {
            assert_eq!(self.device.shape(w), (t.rows, t.cols), "weight of {}", t.name);
        }
    }

    /// First pass: everything that a step needs, without writing state or weights.
    fn prepare_tensors(&mut self, gradients: &Gradients<D>) -> Vec<Ready<D>> {
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
    fn commit_tensor(&mut self, weights: &[D::Weight], ready: Ready<D>, lr: f64) {
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
                let capacity = (self.lookup_bytes / (8 * cols)).max(rows.len());
                let rows = state.assign_slots(&*self.device, &rows, cols, capacity, self.steps, step_of);
                let State { exp_avg, exp_avg_sq, .. } = state;
                self.device.adamw_rows(&weights[tensor], &rows, &g, exp_avg, exp_avg_sq, moments, write);
            }
        }
    }
}

fn compressed<'a, B>(settings: &Settings, projection: &'a B, rank: usize) -> Compressed<'a, B> {
    Compressed { projection, rank, scale_type: settings.scale_type, moments: settings.moments() }
}

fn outside(value: f32, min: Option<f32>, max: Option<f32>) -> Option<f32> {
    min.filter(|min| value < *min).or(max.filter(|max| value > *max))
}
