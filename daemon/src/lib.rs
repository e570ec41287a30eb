//! apollod: a daemon that makes a language model learn while it is being served.
//!
//! A reader follows one example: `http` -> `queue` -> `supervisor` -> (the trainer child) `trainer` -> the live
//! weights -> (`schedule`) the model directory.
//!
//! The program is [`cli`]; what else is public reads what comes from outside, so that it can be fuzzed (`ci/fuzz`).

mod backend;
mod bench;
pub mod cli;
mod client;
pub mod config;
mod demo;
mod doctor;
mod dream;
mod durable;
pub mod engine;
pub mod examples;
pub mod gguf;
mod grads;
mod guard;
pub mod http;
mod lineage;
mod plan;
mod protocol;
mod queue;
mod reading;
mod schedule;
mod signals;
mod supervisor;
mod trainer;
mod weights;
