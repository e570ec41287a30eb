//! Decoder language models as explicit forward and backward passes over foreign weights.
//!
//! A training example is *context-frozen*: the context runs without gradients and leaves keys and
//! values, the decision tokens run with gradients on top of them (`window.rs`). Gradients leave as
//! factors through `compute::Sink` and are never formed.
//!
//! Families: Llama, Mistral, Qwen2 and Qwen3 (dense), from `config.json` as Hugging Face writes it.

#![forbid(unsafe_code)]

mod backward;
mod config;
mod forward;
#[cfg(feature = "oracle")]
pub mod oracle;
mod prefixes;
mod recorded;
mod rope;
mod window;

pub use config::{Config, ConfigError};
pub use forward::{Cache, Model};
pub use prefixes::PrefixLimits;
pub use rope::{Rope, Scaling};
pub use window::{Example, ExampleError, Extent, Report, Timings};
