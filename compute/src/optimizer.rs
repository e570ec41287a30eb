//! What the optimizer's operations take.

use crate::{Device, Dtype, Stream};

/// Which factor of G = dyᵀx carries the channels (APOLLO, arXiv:2412.05270, Algorithm 1).
///
/// The projection compresses the smaller dimension; channels run along the larger one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channels {
    /// m >= n: one channel per row of W.
    Rows,
    /// m < n: one channel per column of W.
    Columns,
}

/// How the scaling s is formed from the compressed step (APOLLO `scale_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleType {
    /// One factor per channel.
    Channel,
    /// One factor per tensor (APOLLO-Mini).
    Tensor,
}

/// Adam's constants as the compressed moments use them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to sqrt(exp_avg_sq).
    pub eps: f32,
}

/// Gradient G (m,n) = dyᵀ x as its factors over t rows, with the compressed state of its tensor.
pub struct Factors<'a, B> {
    /// Inputs of the layer, (t,n).
    pub x: &'a B,
    /// Gradient of its outputs, (t,m).
    pub dy: &'a B,
    /// Rows.
    pub t: usize,
    /// Outputs.
    pub m: usize,
    /// Inputs.
    pub n: usize,
}

impl<B> Clone for Factors<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for Factors<'_, B> {}

impl<B> Factors<'_, B> {
    /// Rows if m >= n, else columns.
    pub fn channels(&self) -> Channels {
        if self.m >= self.n { Channels::Rows } else { Channels::Columns }
    }
    /// The factor with one column per channel, (t, max(m,n)).
    pub fn big(&self) -> &B {
        match self.channels() {
            Channels::Rows => self.dy,
            Channels::Columns => self.x,
        }
    }
    /// The factor that the projection compresses, (t, min(m,n)).
    pub fn small(&self) -> &B {
        match self.channels() {
            Channels::Rows => self.x,
            Channels::Columns => self.dy,
        }
    }
}

/// What of a compressed step the two passes of APOLLO share.
pub struct Compressed<'a, B> {
    /// Projection P (r, min(m,n)), entries N(0, 1/r).
    pub projection: &'a B,
    /// Rank r of the projection.
    pub rank: usize,
    /// Channel or tensor scaling.
    pub scale_type: ScaleType,
    /// Decay constants.
    pub moments: Moments,
    /// Type of W: factors of a step on bf16 weights may be rounded to bf16.
    pub weight: Dtype,
}

impl<B> Clone for Compressed<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for Compressed<'_, B> {}

/// Number of f32 slots that [`Device::apollo_prepare`] and [`Device::limit`] use for one tensor.
pub const NORM_SLOTS: usize = 4;
/// Slot: ‖U‖ stored by the last step that was applied; 0 before the first. Part of the saved state.
pub const NORM_PREVIOUS: usize = 0;
/// Slot: ‖U‖ of this step before the limiter.
pub const NORM_UPDATE: usize = 1;
/// Slot: 1/L, what the limiter multiplies U with.
pub const NORM_FACTOR: usize = 2;
/// Slot: ‖U‖ after the limiter and its floor, which becomes `NORM_PREVIOUS` if the step is applied.
pub const NORM_NEXT: usize = 3;

/// The norm-growth limiter (APOLLO section 4, after Fira): L = max(‖U‖/(prev+1e-8), γ)/γ, U /= L.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limiter {
    /// γ, 1.01 in the paper; `None` switches the limiter off.
    pub growth: Option<f32>,
    /// Floor of the stored norm as a share of `expected`; 0 disables. Without it a run of quiet
    /// examples freezes learning: the norm drops at once and climbs one per cent a step.
    pub floor: f32,
    /// sqrt(r·max(m,n)), near which ‖U‖ settles.
    pub expected: f32,
}

/// A write of W: W' = (W - step·U)·(1 - decay), rounded to the dtype of W.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Write {
    /// lr · bias correction · alpha.
    pub step: f32,
    /// lr · weight_decay.
    pub decay: f32,
    /// Random numbers of the stochastic rounding; ignored for f32.
    pub stream: Stream,
}

/// One tensor of [`Device::apollo_prepare`].
pub struct ApolloPrepare<'a, D: Device> {
    /// The scaling, max(m,n) elements, or 1 for tensor scaling: set.
    pub s: &'a mut D::Buffer,
    /// First of this tensor's [`NORM_SLOTS`].
    pub at: usize,
    /// First moment of R, (max(m,n), r).
    pub exp_avg: &'a D::Stored,
    /// Second moment of R, likewise.
    pub exp_avg_sq: &'a D::Stored,
    /// The gradient.
    pub factors: Factors<'a, D::Buffer>,
    /// Projection and constants.
    pub compressed: Compressed<'a, D::Buffer>,
}

/// One tensor of [`Device::apollo_commit`].
pub struct ApolloCommit<'a, D: Device> {
    /// Written.
    pub w: &'a D::Weight,
    /// The scaling that `apollo_prepare` left.
    pub s: &'a D::Buffer,
    /// First of this tensor's [`NORM_SLOTS`].
    pub at: usize,
    /// First moment of R, (max(m,n), r): written.
    pub exp_avg: &'a mut D::Stored,
    /// Second moment of R: written.
    pub exp_avg_sq: &'a mut D::Stored,
    /// The gradient.
    pub factors: Factors<'a, D::Buffer>,
    /// Projection and constants.
    pub compressed: Compressed<'a, D::Buffer>,
    /// Step size, decay and random numbers.
    pub write: Write,
}

/// Rows of one tensor of [`Device::adamw_rows`].
pub struct AdamwRows<'a, D: Device> {
    /// W (·,n): its rows are written. A vector is row 0 of (1,n).
    pub w: &'a D::Weight,
    /// Which rows, and which rows of the moments are theirs.
    pub rows: &'a [AdamRow],
    /// Gradient, (rows.len(), n).
    pub g: &'a D::Buffer,
    /// First moments, (·,n).
    pub exp_avg: &'a mut D::Stored,
    /// Second moments, likewise.
    pub exp_avg_sq: &'a mut D::Stored,
    /// Decay and random numbers; each row has a step of its own.
    pub write: Write,
}

/// One row of [`Device::adamw_rows`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamRow {
    /// Row of W.
    pub row: u32,
    /// Row of the moments.
    pub slot: u32,
    /// lr·sqrt(1-b2^t)/(1-b1^t) with t the number of gradients that this row has had.
    pub step: f32,
}
