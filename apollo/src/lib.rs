//! APOLLO (arXiv:2412.05270): Adam-like full-weight updates at the memory cost of SGD, applied in
//! place to weights that somebody else is reading.
//!
//! G (m,n) = dyᵀ x, in factors · d = min(m,n), C = max(m,n) · r = min(rank, d) ·
//! state of a matrix: exp_avg and exp_avg_sq (C,r) f32, and the norm ‖U‖ of its last update.
//!
//! Backward fills [`Gradients`]; [`Optimizer::step`] looks at all of it first (finite? gates?) and
//! then, where nothing can fail any more, writes moments and weights. A step is all or nothing.

#![forbid(unsafe_code)]

mod gradients;
mod moments;
mod optimizer;
mod settings;
mod state;

pub use compute::ScaleType;
pub use gradients::Gradients;
pub use moments::state_bytes;
pub use optimizer::{Optimizer, Outcome, Prepared, Skip, StepReport, Written};
pub use settings::{Convention, Gates, Rule, Settings, Tensor, TensorKind};
pub use state::{Restored, StateError};
