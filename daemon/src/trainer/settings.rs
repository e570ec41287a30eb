//! What the configuration means to the optimizer (constants, and which rule trains which tensor) and to the checkpoint.

use crate::config::{self, GrowthLimit, Moments, SyncConfig, TrainConfig};
use crate::protocol::Budget;
use anyhow::{Result, bail};
use apollo::{Convention, Gates, Rule, ScaleType, Settings, Tensor, TensorKind};
use checkpoint::{Keep, Options};
use compute::{Device, Dtype};
use model::{Config as ModelConfig, Extent, PrefixLimits};
use std::time::Duration;
use weight_map::Role;

/// The optimizer's constants.
///
/// # Errors
/// If the device does not store moments as they are configured: what to set instead.
pub fn optimizer_settings<D: Device>(device: &D, train: &TrainConfig) -> Result<Settings> {
    let moments = match (train.moments, device.stores(Dtype::BF16)) {
        (Moments::F32, _) | (Moments::Auto, false) => Dtype::F32,
        (Moments::Auto | Moments::Bf16, true) => Dtype::BF16,
        (Moments::Bf16, false) => bail!(
            "train.moments is \"bf16\", which only a CPU stores: set it to \"auto\" or \"f32\"; a saved state is converted"
        ),
    };
    Ok(Settings {
        lr: train.lr as f32,
        rank: train.rank,
        scale: train.scale as f32,
        scale_type: match train.scale_type {
            config::ScaleType::Channel => ScaleType::Channel,
            config::ScaleType::Tensor => ScaleType::Tensor,
        },
        convention: match train.convention {
            config::Convention::Paper => Convention::Paper,
            config::Convention::ApolloTorch => Convention::ApolloTorch,
        },
        beta1: train.beta1 as f32,
        beta2: train.beta2 as f32,
        eps: train.eps as f32,
        weight_decay: train.weight_decay as f32,
        update_proj_gap: train.update_proj_gap,
        norm_growth_limit: match train.norm_growth_limit {
            GrowthLimit::Off => None,
            GrowthLimit::At(limit) => Some(limit as f32),
        },
        norm_growth_floor: train.norm_growth_floor as f32,
        warmup_steps: train.warmup_steps,
        seed: train.seed,
        moments,
    })
}

/// What the checkpoint keeps. The configuration counts the current generation, the library those before it.
pub fn checkpoint_options(sync: &SyncConfig) -> Options {
    let age = Duration::from_secs_f64(sync.keep_days * 86_400.0);
    let keep = Keep { generations: sync.keep.saturating_sub(1), bytes: sync.keep_bytes, age };
    Options { keep, ..Options::default() }
}

/// How far back gradients flow.
pub fn extent(train: &TrainConfig) -> Extent {
    match train.window {
        config::Window::Frozen => Extent::Frozen,
        config::Window::Full => Extent::Full,
    }
}

/// What the trainer allows itself, its niceness as it is.
///
/// # Errors
/// When the system does not tell it.
pub fn budget(train: &TrainConfig) -> std::io::Result<Budget> {
    let (workers, threads) = (train.workers, threads(train));
    Ok(Budget { workers, threads, nice: rustix::process::getpriority_process(None)?, duty_cycle: train.duty_cycle })
}

/// Threads of each worker: what is configured, or its share of the cores.
pub fn threads(train: &TrainConfig) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    if train.threads == 0 { (cores() / train.workers).max(1) } else { train.threads }
}

/// What is kept of contexts for those that begin alike.
pub fn prefix_limits(train: &TrainConfig) -> PrefixLimits {
    PrefixLimits { tokens: train.prefix_cache_tokens, max_updates: train.prefix_max_updates }
}

/// Bounds outside which a step is skipped.
pub fn gates(train: &TrainConfig) -> Gates {
    let bound = |value: Option<f64>| value.map(|v| v as f32);
    Gates {
        loss_min: bound(train.loss_min),
        loss_max: bound(train.loss_max),
        update_norm_min: bound(train.update_norm_min),
        update_norm_max: bound(train.update_norm_max),
    }
}

/// Tokens of the longest example: what the operator allows, and no more than the model has positions.
pub fn longest(model: &ModelConfig, train: &TrainConfig) -> usize {
    train.max_tokens.min(model.max_position_embeddings)
}

/// The patterns of `train.rules` that match no tensor: probably mistyped.
pub fn unmatched_rules<'a>(model: &ModelConfig, train: &'a TrainConfig) -> Vec<&'a str> {
    let names: Vec<String> = model.decoder.tensors().into_iter().map(|t| t.name).collect();
    let matches = |pattern: &str| names.iter().any(|name| config::glob_matches(pattern, name));
    train.rules.iter().map(|rule| rule.pattern.as_str()).filter(|pattern| !matches(pattern)).collect()
}

/// The model's tensors with the rules that the configuration gives them. Without a rule of its own, a
/// matrix trains by APOLLO, the rest by AdamW.
pub fn tensors(model: &ModelConfig, train: &TrainConfig) -> Vec<Tensor> {
    let tied = model.decoder.tied;
    let tensor = |t: weight_map::HfTensor| {
        let (rows, cols) = weight_map::matrix_shape(&t.shape);
        let kind = match t.role {
            Role::Norm | Role::Bias | Role::Convolution | Role::Decay | Role::Gate => TensorKind::Vector,
            Role::Embedding if !tied => TensorKind::Lookup,
            Role::Embedding | Role::Head | Role::Matrix => TensorKind::Matrix,
        };
        let rule = match train.rule_for(&t.name) {
            Some(config::Rule::Apollo) | None => Rule::Apollo,
            Some(config::Rule::Adamw) => Rule::AdamW,
            Some(config::Rule::Frozen) => Rule::Frozen,
        };
        Tensor { name: t.name, rows, cols, kind, rule }
    };
    model.decoder.tensors().into_iter().map(tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_that_is_configured_is_the_one_that_is_kept() {
        let sync = SyncConfig { keep: 7, keep_bytes: 1000, keep_days: 0.5, ..SyncConfig::default() };
        let want = Keep { generations: 6, bytes: 1000, age: Duration::from_secs(43_200) };
        assert_eq!(checkpoint_options(&sync).keep, want);
    }
}
