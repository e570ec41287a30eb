//! One step over all tensors: look at everything, decide, then write.
//!
//! t counts applied steps from 1, g those in which a tensor had a gradient · P of refresh k = (t-1)/update_proj_gap · step size
//! lr_t·sqrt(1-b2^g)/(1-b1^g)·alpha/L · see `compute` for the arithmetic of a tensor.
//!
//! Tensors with the same smaller dimension share a projection: it compresses each of them
//! independently, and one regenerated matrix serves a whole model.

use crate::gradients::{Gradients, Pair};
use crate::moments::{State, rank_of};
use crate::settings::{Gates, Rule, Settings, Tensor, TensorKind};
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Compressed, Device, Dtype, Factors, Limiter, NORM_SLOTS,
    NORM_UPDATE, Stream, Write,
};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

/// Default of [`Optimizer::with_lookup_bytes`].
const LOOKUP_BYTES: usize = 256 << 20;

/// Where projections come from instead of the seed: (refresh, rank, dim) -> P (rank, dim).
pub type ProjectionSource = Box<dyn Fn(u64, usize, usize) -> Vec<f32> + Send + Sync>;

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
    written: Vec<Written>,
}

/// What steps have written of a tensor.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Written {
    /// Nothing.
    #[default]
    Nothing,
    /// These rows at most.
    Rows(BTreeSet<u32>),
    /// All of it, perhaps.
    Everything,
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
    Vector { tensor: usize, g: Arc<D::Buffer> },
    Lookup { tensor: usize, rows: Vec<u32>, g: Arc<D::Buffer> },
}

impl<D: Device> Optimizer<D> {
    /// Fresh moments for these tensors.
    ///
    /// Panics if the device does not store `settings.moments` ([`Device::stores`]).
    pub fn new(device: Arc<D>, tensors: Vec<Tensor>, settings: Settings) -> Optimizer<D> {
        let states = tensors.iter().map(|t| State::new(&*device, t, &settings)).collect();
        let norms = device.zeros(tensors.len() * NORM_SLOTS);
        let written = vec![Written::Nothing; tensors.len()];
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
            written,
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

    /// What steps have written of each tensor since this optimizer was made, or [`Optimizer::forget_written`].
    pub fn written(&self) -> &[Written] {
        &self.written
    }

    /// Counts what is written from now on.
    pub fn forget_written(&mut self) {
        self.written.fill(Written::Nothing);
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
        let bytes = |moment: &D::Stored| self.device.stored_len(moment) * self.device.stored_dtype(moment).size();
        self.states.iter().map(|s| bytes(&s.exp_avg) + bytes(&s.exp_avg_sq)).sum()
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
        let ready = self.prepare_tensors(weights, gradients);
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
        self.commit_tensors(weights, &ready, lr);
        StepReport { step: self.steps, update_norm, lr: lr as f32 }
    }

    fn count_nonfinite(&self, gradients: &Gradients<D>) -> u64 {
        let mut items: Vec<(&D::Buffer, usize)> = Vec::new();
        for (events, tensor) in gradients.events.iter().zip(&self.tensors) {
            let (m, n) = (tensor.rows, tensor.cols);
            items.extend(events.linear.iter().flat_map(|Pair { x, dy, t }| [(&**x, t * n), (&**dy, t * m)]));
            items.extend(events.rows.iter().map(|(ids, dx)| (&**dx, ids.len() * n)));
            items.extend(events.dense.iter().map(|g| (&**g, n)));
        }
        let mut counter = self.device.zeros(1);
        self.device.count_nonfinite(&mut counter, 0, &items);
        let mut host = [0.0];
        self.device.read(&counter, 0, &mut host);
        host[0] as u64
    }

    /// Whether a gradient that AdamW squares element by element would overflow. Its sum of squares
    /// stands for all of them; that of G = dyᵀx is at most the product of those of its factors.
    /// (The compressed step says the same by a norm that is not finite.)
    fn adamw_overflows(&self, ready: &[Ready<D>]) -> bool {
        let mut items: Vec<(&D::Buffer, usize)> = Vec::new();
        for item in ready {
            match item {
                Ready::Apollo { .. } => (),
                Ready::Dense { tensor, pair } => {
                    items.push((&pair.x, pair.t * self.tensors[*tensor].cols));
                    items.push((&pair.dy, pair.t * self.tensors[*tensor].rows));
                }
                Ready::Vector { tensor, g } => items.push((&**g, self.tensors[*tensor].cols)),
                Ready::Lookup { tensor, rows, g } => items.push((&**g, rows.len() * self.tensors[*tensor].cols)),
            }
        }
        if items.is_empty() {
            return false;
        }
        let mut sums = self.device.uninit(items.len());
        self.device.sum_squares(&mut sums, &items);
        let mut host = vec![0.0; items.len()];
        self.device.read(&sums, 0, &mut host);
        let mut sums = host.into_iter();
        let mut next = || sums.next().expect("one sum per item");
        ready.iter().any(|item| match item {
            Ready::Apollo { .. } => false,
            Ready::Dense { .. } => !(next() * next()).is_finite(),
            Ready::Vector { .. } | Ready::Lookup { .. } => !next().is_finite(),
        })
    }

    fn assert_shapes(&self, weights: &[D::Weight]) {
        assert_eq!(weights.len(), self.tensors.len(), "one weight per tensor");
        for (w, t) in weights.iter().zip(&self.tensors).filter(|(_, t)| t.effective_rule() != Rule::Frozen) {
            assert_eq!(self.device.shape(w), (t.rows, t.cols), "weight of {}", t.name);
        }
    }

    /// First pass: everything that a step needs, without writing state or weights.
    fn prepare_tensors(&mut self, weights: &[D::Weight], gradients: &Gradients<D>) -> Vec<Ready<D>> {
        let mut ready = Vec::new();
        for (tensor, events) in gradients.events.iter().enumerate() {
            let (m, n, kind) = (self.tensors[tensor].rows, self.tensors[tensor].cols, self.tensors[tensor].kind);
            let item = match (self.tensors[tensor].effective_rule(), kind) {
                (Rule::Frozen, _) => None,
                (Rule::Apollo, _) => events.pair(&self.device, m, n).map(|pair| {
                    self.refresh_projection(self.rank(tensor), m.min(n));
                    Ready::Apollo { tensor, pair, s: self.device.uninit(m.max(n)) }
                }),
                (Rule::AdamW, TensorKind::Matrix) => {
                    events.pair(&self.device, m, n).map(|pair| Ready::Dense { tensor, pair })
                }
                (Rule::AdamW, TensorKind::Vector) => {
                    events.vector(&self.device, n).map(|g| Ready::Vector { tensor, g })
                }
                (Rule::AdamW, TensorKind::Lookup) => {
                    events.touched(&self.device, n).map(|(rows, g)| Ready::Lookup { tensor, rows, g: Arc::new(g) })
                }
            };
            ready.extend(item);
        }
        self.prepare_apollo(weights, &mut ready);
        ready
    }

    /// Scaling, ‖U‖ and limiter of every matrix under APOLLO.
    fn prepare_apollo(&mut self, weights: &[D::Weight], ready: &mut [Ready<D>]) {
        let (mut tensors, mut limiters) = (Vec::new(), Vec::new());
        for item in ready {
            let Ready::Apollo { tensor, pair, s } = item else { continue };
            let spec = &self.tensors[*tensor];
            let (rank, at, state) = (rank_of(spec, &self.settings), *tensor * NORM_SLOTS, &self.states[*tensor]);
            let projection = &self.projections[&(rank, spec.rows.min(spec.cols))].1;
            tensors.push(ApolloPrepare {
                s,
                at,
                exp_avg: &state.exp_avg,
                exp_avg_sq: &state.exp_avg_sq,
                factors: factors(spec, pair),
                compressed: compressed(&self.settings, projection, rank, self.device.dtype(&weights[*tensor])),
            });
            let limiter = Limiter {
                growth: self.settings.norm_growth_limit,
                floor: self.settings.norm_growth_floor,
                expected: ((rank * spec.rows.max(spec.cols)) as f32).sqrt(),
            };
            limiters.push((at, limiter));
        }
        self.device.apollo_prepare(&mut self.norms, &mut tensors);
        self.device.limit(&mut self.norms, &limiters);
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

    /// Second pass: writes states and weights. Nothing here can fail.
    fn commit_tensors(&mut self, weights: &[D::Weight], ready: &[Ready<D>], lr: f64) {
        let rows = self.rows_to_write(ready, lr);
        let (settings, steps) = (&self.settings, self.steps);
        let write = |tensor: usize, step: f64| Write {
            step: step as f32,
            decay: (lr * settings.weight_decay as f64) as f32,
            stream: Stream::rounding(settings.seed, steps, tensor),
        };
        let (mut apollo, mut adamw) = (Vec::new(), Vec::new());
        let mut states = self.states.iter_mut().enumerate();
        // Both are in the order of the tensors.
        for (item, rows) in ready.iter().zip(&rows) {
            let tensor = item.tensor();
            self.written[tensor].add(item, rows);
            let state = states.find(|(i, _)| *i == tensor).expect("one state per tensor").1;
            state.gradients += 1;
            let corrected = lr * settings.bias_correction(state.gradients);
            let State { exp_avg, exp_avg_sq, .. } = state;
            let (w, spec) = (&weights[tensor], &self.tensors[tensor]);
            match item {
                Ready::Apollo { pair, s, .. } => {
                    let (rank, dim) = (rank_of(spec, settings), spec.rows.min(spec.cols));
                    let factors = factors(spec, pair);
                    let projection = &self.projections[&(rank, dim)].1;
                    let compressed = compressed(settings, projection, rank, self.device.dtype(w));
                    let write = write(tensor, corrected * settings.alpha(dim, rank));
                    let at = tensor * NORM_SLOTS;
                    apollo.push(ApolloCommit { w, s, at, exp_avg, exp_avg_sq, factors, compressed, write });
                }
                Ready::Dense { pair, .. } => {
                    let (factors, write) = (factors(spec, pair), write(tensor, corrected));
                    self.device.adamw_factors(w, exp_avg, exp_avg_sq, &factors, settings.decay(), write);
                }
                Ready::Vector { g, .. } | Ready::Lookup { g, .. } => {
                    adamw.push(AdamwRows { w, rows, g: &**g, exp_avg, exp_avg_sq, write: write(tensor, corrected) });
                }
            }
        }
        self.device.apollo_commit(&mut self.norms, &mut apollo);
        self.device.adamw_rows(&mut adamw, settings.decay());
    }

    /// For each tensor that is ready, its rows that AdamW writes; rows of a lookup get their slots.
    fn rows_to_write(&mut self, ready: &[Ready<D>], lr: f64) -> Vec<Vec<AdamRow>> {
        let step_of = |gradients: u64| (lr * self.settings.bias_correction(gradients)) as f32;
        let rows = |item: &Ready<D>| match item {
            Ready::Apollo { .. } | Ready::Dense { .. } => Vec::new(),
            Ready::Vector { tensor, .. } => {
                vec![AdamRow { row: 0, slot: 0, step: step_of(self.states[*tensor].gradients + 1) }]
            }
            Ready::Lookup { tensor, rows, .. } => {
                let cols = self.tensors[*tensor].cols;
                let row_bytes = 2 * self.settings.moments.size() * cols;
                let capacity = (self.lookup_bytes / row_bytes).max(rows.len());
                self.states[*tensor].assign_slots(&*self.device, rows, cols, capacity, self.steps, step_of)
            }
        };
        ready.iter().map(rows).collect()
    }
}

impl Written {
    /// Adds what a step writes.
    fn add<D: Device>(&mut self, item: &Ready<D>, rows: &[AdamRow]) {
        match (item, &mut *self) {
            (_, Written::Everything) => {}
            (Ready::Lookup { .. }, Written::Rows(written)) => written.extend(rows.iter().map(|row| row.row)),
            (Ready::Lookup { .. }, Written::Nothing) => {
                *self = Written::Rows(rows.iter().map(|row| row.row).collect());
            }
            _ => *self = Written::Everything,
        }
    }
}

impl<D: Device> Ready<D> {
    fn tensor(&self) -> usize {
        match self {
            Ready::Apollo { tensor, .. }
            | Ready::Dense { tensor, .. }
            | Ready::Vector { tensor, .. }
            | Ready::Lookup { tensor, .. } => *tensor,
        }
    }
}

fn factors<'a, D: Device>(tensor: &Tensor, pair: &'a Pair<D>) -> Factors<'a, D::Buffer> {
    Factors { x: &pair.x, dy: &pair.dy, t: pair.t, m: tensor.rows, n: tensor.cols }
}

fn compressed<'a, B>(settings: &Settings, projection: &'a B, rank: usize, weight: Dtype) -> Compressed<'a, B> {
    Compressed { projection, rank, scale_type: settings.scale_type, moments: settings.decay(), weight }
}

fn outside(value: f32, min: Option<f32>, max: Option<f32>) -> Option<f32> {
    min.filter(|min| value < *min).or(max.filter(|max| value > *max))
}
