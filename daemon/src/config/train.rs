//! `[train]`: the training step.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What one norm is taken over when a gradient is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// One scale per row or column.
    Channel,
    /// One scale per matrix (APOLLO-Mini).
    Tensor,
}

/// Whose definition of the scale is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Convention {
    /// arXiv:2412.05270: alpha = sqrt(scale·d/r), d the projected (smaller) dimension.
    Paper,
    /// The authors' package: sqrt(scale).
    ApolloTorch,
}

/// The norm-growth limiter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GrowthLimit {
    /// A step's norm may grow by any factor.
    Off,
    /// A step's norm may grow by at most this factor over the one before.
    At(f64),
}

impl Serialize for GrowthLimit {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::At(limit) => serializer.serialize_f64(*limit),
        }
    }
}

impl<'de> Deserialize<'de> for GrowthLimit {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = GrowthLimit;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a factor such as 1.01, or \"off\"")
            }
            fn visit_f64<E: serde::de::Error>(self, limit: f64) -> Result<GrowthLimit, E> {
                Ok(GrowthLimit::At(limit))
            }
            fn visit_i64<E: serde::de::Error>(self, limit: i64) -> Result<GrowthLimit, E> {
                Ok(GrowthLimit::At(limit as f64))
            }
            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<GrowthLimit, E> {
                match word {
                    "off" => Ok(GrowthLimit::Off),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What the optimizer's moments are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// As small as the device stores them: bf16 on a CPU, f32 on a GPU.
    Auto,
    /// As they are computed.
    F32,
    /// Half of it, rounded stochastically.
    Bf16,
}

/// What a window's products take activations and their gradients in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// As they are computed.
    F32,
    /// Rounded to the nearest, where the weights are bf16 and the processor has dot products of it.
    Bf16,
}

/// How far back gradients flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// Through the decision tokens; the context is frozen.
    Frozen,
    /// Through the whole example, as others do it; for comparison.
    Full,
}

/// How a tensor trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// By APOLLO: matrices only.
    Apollo,
    /// By AdamW, with two full moments.
    Adamw,
    /// Not at all.
    Frozen,
}

/// One entry of `train.rules`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRule {
    /// Hugging Face tensor name; `*` stands for any characters, none included.
    pub pattern: String,
    /// What happens to the tensors that it matches.
    pub rule: Rule,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Learning rate, dimensionless. Default 1e-5. Larger learns in fewer steps and forgets more of the rest.
    pub lr: f64,
    /// Rank of the projected gradient. Default 256; capped at a matrix's smaller side. Optimizer state is
    /// 8·rank·max(m,n) bytes per matrix (m,n) with moments in f32, half of it in bf16. 1 with `scale_type = "tensor"` is APOLLO-Mini.
    pub rank: usize,
    /// Enters the update as its root, in both conventions. Default 1.0.
    pub scale: f64,
    /// One norm per `channel` (default) or per `tensor`.
    pub scale_type: ScaleType,
    /// `paper` (default: alpha = sqrt(scale·d/r), so that lr means the same at every rank) or `apollo-torch`
    /// (sqrt(scale), as the authors' package does it; its APOLLO-Mini has scale 128).
    pub convention: Convention,
    /// What the moments of matrices and embeddings are stored in: `f32`, `bf16`, or `auto` (default), which is bf16 on a CPU and
    /// f32 on a GPU, which knows nothing else. bf16 halves the optimizer's memory and its part of a generation, and is rounded
    /// stochastically. A state in the other type is converted at the start.
    pub moments: Moments,
    /// What products of the decision tokens take activations and their gradients in: `bf16` (default), which rounds them where
    /// the weights are bf16 and a CPU has dot products of it, and there multiplies twice as fast, or `f32`; elsewhere both are the
    /// same. Rounding moves a gradient by about a hundredth of its size, which no loss has shown (research/LOG.md). Contexts are
    /// rounded there in any case.
    pub activations: Activations,
    /// Decay of the first moment per step. Default 0.9.
    pub beta1: f64,
    /// Decay of the second moment per step. Default 0.999.
    pub beta2: f64,
    /// Added to the root of the second moment. Default 1e-6.
    pub eps: f64,
    /// Decoupled weight decay, per step and per lr. Default 0: with few examples, decay forgets.
    pub weight_decay: f64,
    /// Steps between two random projections. Default 200.
    pub update_proj_gap: u64,
    /// Largest factor by which a step's norm may grow over the one before, or "off". Default 1.01.
    pub norm_growth_limit: GrowthLimit,
    /// Least norm that the limiter remembers, over sqrt(rank·max(m,n)). Default 0.5; 0 disables. Without it a run of
    /// quiet examples stops learning for hundreds of steps.
    pub norm_growth_floor: f64,
    /// Steps over which lr rises linearly from 0. Default 0.
    pub warmup_steps: u64,
    /// Seed of projections and stochastic rounding. Default 0. The same seed and examples give the same bytes.
    pub seed: u64,
    /// Examples per step. Default 1.
    pub batch_examples: usize,
    /// Tokens whose keys and values are kept of contexts that were run, for later ones that begin alike, in blocks of 32.
    /// Default 0: an example shares only with the one before it in its step. A token takes as much memory as in
    /// `max_tokens`.
    pub prefix_cache_tokens: usize,
    /// Updates of the weights after which keys and values that are kept still serve. Default 0: none, so that an update
    /// makes every context run anew. More is an approximation, because they are those of older weights; and as every sync
    /// empties the cache, the bytes that training leaves then depend on when syncs fall.
    pub prefix_max_updates: u64,
    /// Steps that are computed side by side on a CPU (HOGWILD), 1 to 64. Default 1. More than one reads weights while
    /// another's update is written: a step then rests on weights up to `workers - 1` updates old, and training the same
    /// examples again, after a crash too, does not leave the same bytes. Each worker has activations, keys and values of
    /// its own. A GPU takes 1 only.
    pub workers: usize,
    /// Threads of the CPU step, for each worker. Default 0: all cores, shared among the workers.
    pub threads: usize,
    /// Added to the daemon's niceness for the trainer's process, 0 to 19. Default 0. At 10 a server on the same cores goes
    /// first and training takes what is left; with `server.update = "between"` it then holds the engine longer.
    pub nice: u8,
    /// Share of the time in which steps run, 0.01 to 1. Default 1: the next follows at once. At 0.25 a rest of
    /// three times its length follows each step, or each `workers` steps side by side. Syncs, rollbacks and the end do not wait for it.
    pub duty_cycle: f64,
    /// Tokens of the longest example, context and decision. Default 4096; a longer one is refused. Bounds memory.
    pub max_tokens: usize,
    /// `frozen` (default): the context runs without gradients. `full`: gradients flow through the whole example, which
    /// takes up to twice the time; for comparison.
    pub window: Window,
    /// Skip a step whose mean loss in nats per token is below this. No default (no gate): a learned example moves the
    /// weights almost as far as a new one, so a stream of examples wants a gate such as 0.02.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_min: Option<f64>,
    /// Skip a step whose mean loss in nats per token is above this. No default (no gate).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_max: Option<f64>,
    /// Skip a step whose update norm before the limiter, over sqrt(rank·max(m,n)), is below this. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_norm_min: Option<f64>,
    /// Skip a step whose update norm before the limiter, over sqrt(rank·max(m,n)), is above this. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_norm_max: Option<f64>,
    /// Which tensors train and how; the first pattern that matches a name decides. Default none: matrices by APOLLO,
    /// vectors by AdamW.
    pub rules: Vec<TensorRule>,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            lr: 1e-5,
            rank: 256,
            scale: 1.0,
            scale_type: ScaleType::Channel,
            convention: Convention::Paper,
            moments: Moments::Auto,
            activations: Activations::Bf16,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-6,
            weight_decay: 0.0,
            update_proj_gap: 200,
            norm_growth_limit: GrowthLimit::At(1.01),
            norm_growth_floor: 0.5,
            warmup_steps: 0,
            seed: 0,
            batch_examples: 1,
            prefix_cache_tokens: 0,
            prefix_max_updates: 0,
            workers: 1,
            threads: 0,
            nice: 0,
            duty_cycle: 1.0,
            max_tokens: 4096,
            window: Window::Frozen,
            loss_min: None,
            loss_max: None,
            update_norm_min: None,
            update_norm_max: None,
            rules: Vec::new(),
        }
    }
}

impl TrainConfig {
    /// The rule of the first pattern that matches the tensor's name; `None` when none does.
    pub fn rule_for(&self, name: &str) -> Option<Rule> {
        self.rules.iter().find(|entry| glob_matches(&entry.pattern, name)).map(|entry| entry.rule)
    }
}

/// Whether `name` matches `pattern`, in which `*` stands for any characters, none included.
pub fn glob_matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|head| name.strip_prefix(head)) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    unreachable!("the last part returns")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_matches_any_characters_and_none() {
        for (pattern, name, want) in [
            ("model.norm.weight", "model.norm.weight", true),
            ("model.norm.weight", "model.norm.weights", false),
            ("*", "", true),
            ("*", "anything", true),
            ("*.q_proj.*", "model.layers.0.self_attn.q_proj.weight", true),
            ("*.q_proj.*", "model.layers.0.self_attn.k_proj.weight", false),
            ("model.*.weight", "model.layers.0.weight", true),
            ("model.*.weight", "model.weight", false),
            ("*a*ab", "aab", true),
            ("a*a", "a", false),
        ] {
            assert_eq!(glob_matches(pattern, name), want, "{pattern} on {name}");
        }
    }

    #[test]
    fn the_first_matching_rule_decides() {
        let train = TrainConfig {
            rules: vec![
                TensorRule { pattern: "lm_head.*".into(), rule: Rule::Adamw },
                TensorRule { pattern: "*".into(), rule: Rule::Frozen },
            ],
            ..TrainConfig::default()
        };
        assert_eq!(train.rule_for("lm_head.weight"), Some(Rule::Adamw));
        assert_eq!(train.rule_for("model.norm.weight"), Some(Rule::Frozen));
        assert_eq!(TrainConfig::default().rule_for("model.norm.weight"), None);
    }
}
