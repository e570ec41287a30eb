//! The optimizer as a whole: what a step refuses, how its rules move weights, and its saved state.
//!
//! Inputs are random; a failing test prints its seed, and `TEST_SEED=n cargo test` repeats it.

mod common;
mod limiter;
mod lookup;
mod refusal;
mod rules;
mod state;
