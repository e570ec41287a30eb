//! Every operation of every backend against plain f64 arithmetic written here, backwards also
//! against finite differences of that arithmetic.
//!
//! Inputs are random; a failing test prints its seed, and `TEST_SEED=n cargo test` repeats it.

mod attention;
mod delta;
mod foreign;
mod layers;
mod linear;
mod loss;
mod machine;
mod moments;
mod optimizer;
mod parity;
mod random;
mod reference;
mod row_order;
mod threads;
