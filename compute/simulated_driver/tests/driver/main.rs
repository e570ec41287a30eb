//! The simulated driver through the same bindings as the real one: what works, and what is refused with which error.
//!
//! A test that breaks its context, or that needs another environment, runs in a child process: this same test again.

mod blas;
mod gpu;
mod kernels;
mod memory;
mod misuse;
mod recording;
