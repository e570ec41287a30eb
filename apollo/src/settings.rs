//! What an operator tunes, and which rule trains which tensor.

use compute::{Dtype, Moments, ScaleType};

/// How the factor alpha on the update is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// The paper's: sqrt(scale · d/r). A projection onto r of d dimensions shrinks the ratio
    /// ‖N‖/‖R‖ by about sqrt(r/d) (arXiv:2412.05270, Theorem A.4); this undoes it, so that lr means
    /// the same at every rank.
    Paper,
    /// The authors' package: sqrt(scale).
    ApolloTorch,
}

/// Constants of the optimizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Learning rate.
    pub lr: f32,
    /// Rank of the compressed state; 1 with tensor scaling is APOLLO-Mini.
    pub rank: usize,
    /// See [`Convention`].
    pub scale: f32,
    /// One factor per channel, or one per tensor.
    pub scale_type: ScaleType,
    /// See [`Convention`].
    pub convention: Convention,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled: W -= lr·weight_decay·W after the step.
    pub weight_decay: f32,
    /// Steps between two projections; the moments are kept across.
    pub update_proj_gap: u64,
    /// How much ‖U‖ may grow from step to step; `None` is off.
    pub norm_growth_limit: Option<f32>,
    /// Floor of the norm that the limiter remembers, as a share of sqrt(r·C); 0 disables.
    pub norm_growth_floor: f32,
    /// The first steps' lr rises linearly over this many steps.
    pub warmup_steps: u64,
    /// Of projections and stochastic rounding.
    pub seed: u64,
    /// What the moments of matrices and embeddings are stored in, f32 or bf16; a vector's are f32.
    pub moments: Dtype,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            lr: 1e-5,
            rank: 256,
            scale: 1.0,
            scale_type: ScaleType::Channel,
            convention: Convention::Paper,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-6,
            weight_decay: 0.0,
            update_proj_gap: 200,
            norm_growth_limit: Some(1.01),
            norm_growth_floor: 0.5,
            warmup_steps: 0,
            seed: 0,
            moments: Dtype::F32,
        }
    }
}

impl Settings {
    /// Adam's constants.
    pub fn decay(&self) -> Moments {
        Moments { beta1: self.beta1, beta2: self.beta2, eps: self.eps }
    }

    /// lr of step `t` (from 1) with its warm-up.
    pub fn lr_at(&self, t: u64) -> f64 {
        let warmed = if self.warmup_steps == 0 { 1.0 } else { (t as f64 / self.warmup_steps as f64).min(1.0) };
        self.lr as f64 * warmed
    }

    /// sqrt(1-b2^t)/(1-b1^t), Adam's bias correction at step `t` (from 1).
    pub fn bias_correction(&self, t: u64) -> f64 {
        let left = |beta: f32| 1.0 - (beta as f64).powi(t.min(i32::MAX as u64) as i32);
        left(self.beta2).sqrt() / left(self.beta1)
    }

    /// alpha of a matrix with smaller dimension `d` at rank `r`.
    pub fn alpha(&self, d: usize, r: usize) -> f64 {
        match self.convention {
            Convention::Paper => (self.scale as f64 * d as f64 / r as f64).sqrt(),
            Convention::ApolloTorch => (self.scale as f64).sqrt(),
        }
    }
}

/// Bounds outside which a step is skipped: nothing changes, neither weights nor moments nor norms.
///
/// Why: the step is normalised to the current gradient, so an example that is already learned still
/// moves the weights by nearly a full step, and a corrupt one by no more than that.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gates {
    /// Skip if the mean loss is below: nothing left to learn.
    pub loss_min: Option<f32>,
    /// Skip if the mean loss is above: probably not an example for this model.
    pub loss_max: Option<f32>,
    /// Skip if sqrt(Σ‖U‖² / Σ r·C) over the APOLLO matrices, before the limiter, is below.
    pub update_norm_min: Option<f32>,
    /// Skip if it is above.
    pub update_norm_max: Option<f32>,
}

/// Which rule trains a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The compressed step; matrices and tied embeddings.
    Apollo,
    /// AdamW: dense moments for matrices and vectors, lazily by touched rows for an untied embedding.
    AdamW,
    /// Not trained.
    Frozen,
}

/// What a tensor is to the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// A matrix, or an embedding tied to the head.
    Matrix,
    /// A norm or a bias, (1,n).
    Vector,
    /// An untied token embedding: only the rows of the tokens seen get a gradient.
    Lookup,
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// What it is.
    pub kind: TensorKind,
    /// How it trains. [`Rule::Apollo`] means AdamW for vectors and lookups.
    pub rule: Rule,
}

impl Tensor {
    /// The rule that really applies: only matrices have a compressed step.
    pub fn effective_rule(&self) -> Rule {
        match (self.rule, self.kind) {
            (Rule::Apollo, TensorKind::Vector | TensorKind::Lookup) => Rule::AdamW,
            (rule, _) => rule,
        }
    }
}
