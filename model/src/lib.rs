//! Decoder language models as explicit forward and backward passes over foreign weights.
//!
//! A training example is *context-frozen*: the context runs without gradients and leaves keys and
//! values, the decision tokens run with gradients on top of them (`window.rs`). Gradients leave as
//! factors through `compute::Sink` and are never formed.
//!
//! Families: Llama, Mistral, Qwen2, Qwen3 and Qwen3.5, the last two also with experts (`experts.rs`), from `config.json` as Hugging Face writes it. Where layers are
//! recurrent, the context leaves their state instead of keys and values (`delta_net.rs`).

#![forbid(unsafe_code)]

mod attention;
mod backward;
mod cache;
mod config;
mod delta_net;
mod experts;
mod forward;
mod mlp;
#[cfg(feature = "oracle")]
pub mod oracle;
mod prefixes;
mod recorded;
mod rope;
mod window;

pub use cache::Cache;
pub use config::{Config, ConfigError};
pub use forward::Model;
pub use prefixes::PrefixLimits;
pub use rope::{Rope, Scaling};
pub use window::{Example, ExampleError, Extent, Report, Timings};
