//! What the configuration means to the optimizer: constants, and which rule trains which tensor.

use crate::config::{self, GrowthLimit, TrainConfig};
use apollo::{Convention, Gates, Rule, ScaleType, Settings, Tensor, TensorKind};
use model::{Config as ModelConfig, Extent};
use weight_map::Role;

/// The optimizer's constants.
pub fn optimizer_settings(train: &TrainConfig) -> Settings {
    Settings {
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
    }
}

/// How far back gradients flow.
pub fn extent(train: &TrainConfig) -> Extent {
    match train.window {
        config::Window::Frozen => Extent::Frozen,
        config::Window::Full => Extent::Full,
    }
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
        let (rows, cols) = crate::weights::matrix_shape(&t.shape);
        let kind = match t.role {
            Role::Norm | Role::Bias => TensorKind::Vector,
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
