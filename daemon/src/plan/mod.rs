//! What training a model will take, from its config alone: whether its tensors are found, the optimizer's state, other memory,
//! and the least time of a step on a GPU.
//!
//! N elements of the trained matrices · S bytes of the optimizer's state · T decision tokens · k context tokens · V vocabulary ·
//! H, I hidden and intermediate size · of a mixture of experts, a step has those that its tokens choose: as many as they can

mod gpus;

pub use gpus::{Gpu, named};

use crate::config::TrainConfig;
use crate::trainer;
use anyhow::{Result, bail};
use apollo::{Rule, Settings, Tensor, TensorKind};
use compute::Dtype;
use model::Config;
use serde_json::{Value, json};
use std::fmt;

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Rank of the optimizer.
    pub rank: usize,
    /// Element type of the weights.
    pub dtype: Dtype,
    /// Tokens of context and of decision.
    pub context: usize,
    pub decision: usize,
    /// GPUs that the server splits the model over.
    pub tensor_parallel: usize,
    /// None for a CPU.
    pub gpu: Option<Gpu>,
}

impl Question {
    /// What the device stores moments in, by `train.moments = "auto"`.
    fn moments(&self) -> Dtype {
        if self.gpu.is_some() { Dtype::F32 } else { Dtype::BF16 }
    }

    /// What it stores keys and values of a context in.
    fn keys(&self) -> Dtype {
        if self.gpu.is_none() && self.dtype == Dtype::BF16 { Dtype::BF16 } else { Dtype::F32 }
    }
}

/// The answer. Bytes are of the whole model; what one GPU holds is a `tensor_parallel`-th of the weights.
#[derive(Clone, Debug)]
pub struct Plan {
    question: Question,
    model: String,
    recurrent_layers: usize,
    layers: usize,
    tensors: usize,
    mapped: usize,
    server_tensors: usize,
    parameters: u64,
    /// Those that a token is multiplied with, if it has experts, and what they are.
    active: Option<(u64, weight_map::Experts)>,
    trained: u64,
    weights: u64,
    by_apollo: usize,
    by_adamw: usize,
    state: u64,
    context: u64,
    window: u64,
    logits: u64,
    projections: u64,
    /// Seconds that a context and a decision take at least on the GPU.
    floor: Option<(f64, f64)>,
}

impl Plan {
    /// Plans for a model of which nothing but the config is there.
    ///
    /// # Errors
    /// A tensor that has no place in what vLLM holds, which would be a bug, or a context that the model is not made for.
    pub fn of(config: &Config, question: Question) -> Result<Plan> {
        let d = &config.decoder;
        let Question { rank, dtype, context: k, decision: t, tensor_parallel, gpu } = question;
        if k.saturating_add(t) > config.max_position_embeddings {
            bail!(
                "{k} tokens of context and {t} of decision are more than the model's {}",
                config.max_position_embeddings
            );
        }
        if tensor_parallel == 0 {
            bail!("--tp counts GPUs, at least 1");
        }
        let expected = d.tensors();
        let held = weight_map::merged_layout(&expected, dtype);
        let map = weight_map::map(&expected, &held, &[])?;
        let tensors = trainer::tensors(config, &TrainConfig::default());
        let settings = Settings { rank, moments: question.moments(), ..Settings::default() };
        let state = apollo::state_bytes(&tensors, &settings);
        let elements = |tensor: &Tensor| (tensor.rows * tensor.cols) as u64;
        let is = |rule: Rule| tensors.iter().filter(move |tensor| tensor.effective_rule() == rule);
        let matrices: u64 = tensors.iter().filter(|tensor| tensor.kind == TensorKind::Matrix).map(elements).sum();
        let parameters: u64 = tensors.iter().map(elements).sum();
        // The head multiplies no context.
        let head = (d.vocab * d.hidden) as u64;
        let recurrent_layers = (0..d.layers).filter(|layer| d.is_delta_net(*layer)).count();
        let attention_layers = d.layers - recurrent_layers;
        let keys = 2 * question.keys().size() * k * attention_layers * d.kv_heads * d.head_dim;
        let recurrent = d.delta_net.as_ref().map_or(0, |delta| {
            let state = delta.value_heads * delta.key_dim * delta.value_dim;
            4 * recurrent_layers * (state + (delta.conv_width - 1) * delta.channels())
        });
        let of_layer = |layer: usize| match &d.delta_net {
            // Inputs, mixed, values three times and gates; and queries, keys, values and outputs of attention.
            Some(delta) if delta.layers[layer] => 2 * delta.channels() + 4 * delta.values(),
            _ => 5 * d.heads * d.head_dim,
        };
        let fed = |layer: usize| match d.experts_of(layer) {
            // Rows of the chosen experts besides, and the router's outputs.
            Some(e) => e.per_token * (2 * d.hidden + 6 * e.intermediate) + 6 * e.shared.unwrap_or(0) + 2 * e.count,
            None => 6 * d.intermediate,
        };
        let window: usize = (0..d.layers).map(|layer| 4 * t * (8 * d.hidden + fed(layer) + of_layer(layer))).sum();
        let mut smaller: Vec<usize> = is(Rule::Apollo).map(|tensor| tensor.rows.min(tensor.cols)).collect();
        smaller.sort_unstable();
        smaller.dedup();
        let projections: usize = smaller.into_iter().map(|side| 4 * rank.min(side) * side).sum();
        let of_experts: Vec<Tensor> = tensors.iter().filter(|t| t.name.contains(".mlp.experts.")).cloned().collect();
        let routed: u64 = of_experts.iter().map(elements).sum();
        // The share of the experts that so many tokens choose at most.
        let share = |tokens: usize| {
            let e = d.experts.as_ref();
            e.map_or(0.0, |e| (tokens * e.per_token).min(e.count) as f64 / e.count as f64)
        };
        let touched = |whole: u64, of_experts: u64| (whole - of_experts) as f64 + of_experts as f64 * share(t);
        let moved = 4.0 * dtype.size() as f64 * touched(matrices, routed)
            + 2.0 * touched(state, apollo::state_bytes(&of_experts, &settings));
        let per_token = (matrices - routed) as f64 + routed as f64 * share(1);
        let floor = gpu.map(|gpu| {
            let prefill = 2.0 * (per_token - head as f64) * k as f64 / gpu.flops;
            (prefill, (6.0 * per_token * t as f64 / gpu.flops).max(moved / gpu.bandwidth))
        });
        let active = d.experts.clone().map(|e| ((parameters - routed) + (routed as f64 * share(1)) as u64, e));
        Ok(Plan {
            question,
            model: d.family.to_string(),
            recurrent_layers,
            layers: d.layers,
            tensors: expected.len(),
            mapped: map.views.len(),
            server_tensors: held.len(),
            parameters,
            active,
            trained: is(Rule::Apollo).chain(is(Rule::AdamW)).map(elements).sum(),
            weights: parameters * dtype.size() as u64,
            by_apollo: is(Rule::Apollo).count(),
            by_adamw: is(Rule::AdamW).count(),
            state,
            context: (keys + recurrent) as u64,
            window: window as u64,
            logits: (4 * t * d.vocab) as u64,
            projections: projections as u64,
            floor,
        })
    }

    /// Bytes that the trainer takes besides the weights.
    fn extra(&self) -> u64 {
        self.state + self.context + self.window + self.logits + self.projections
    }

    /// Bytes on one such GPU that are left for the server's own keys and values, if there are any.
    fn left(&self, gpu: Gpu) -> f64 {
        gpu.memory - (self.weights / self.question.tensor_parallel as u64 + self.extra()) as f64
    }

    /// As an object.
    pub fn json(&self) -> Value {
        let Question { rank, dtype, context, decision, tensor_parallel, gpu } = self.question;
        let left = gpu.map(|gpu| self.left(gpu));
        json!({
            "family": self.model, "layers": self.layers, "recurrent_layers": self.recurrent_layers,
            "tensors": self.tensors, "tensors_mapped": self.mapped, "server_tensors": self.server_tensors,
            "parameters": self.parameters, "parameters_active": self.active.as_ref().map_or(self.parameters, |(active, _)| *active),
            "trainable": self.trained, "dtype": dtype.to_string(), "weights_bytes": self.weights,
            "rank": rank, "tensors_by_apollo": self.by_apollo, "tensors_by_adamw": self.by_adamw,
            "moments": self.question.moments().to_string(), "optimizer_state_bytes": self.state, "gradient_bytes": 0, "context": context, "decision": decision,
            "context_bytes": self.context, "window_bytes": self.window, "logits_bytes": self.logits,
            "projection_bytes": self.projections, "extra_bytes": self.extra(), "tensor_parallel": tensor_parallel,
            "gpu": gpu.map(|gpu| gpu.name), "gpu_memory_bytes": gpu.map(|gpu| gpu.memory), "left_bytes": left,
            "fits": left.map(|left| left > 0.0), "floor_prefill_ms": self.floor.map(|(prefill, _)| prefill * 1e3),
            "floor_decision_ms": self.floor.map(|(_, decision)| decision * 1e3),
        })
    }
}

/// A number of parameters for people.
fn count(n: f64) -> String {
    if n < 1e9 { format!("{:.1} M", n / 1e6) } else { format!("{:.2} B", n / 1e9) }
}

/// Bytes for people.
fn gb(bytes: f64) -> String {
    if bytes.abs() < 1e9 { format!("{:.0} MB", bytes / 1e6) } else { format!("{:.1} GB", bytes / 1e9) }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Question { rank, dtype, context, decision, tensor_parallel, gpu } = self.question;
        let layers = match self.recurrent_layers {
            0 => format!("{} layers", self.layers),
            recurrent => {
                format!(
                    "{} layers, {recurrent} of them Gated DeltaNet and {} attention",
                    self.layers,
                    self.layers - recurrent
                )
            }
        };
        writeln!(f, "model      {}, {layers}, {} parameters", self.model, count(self.parameters as f64))?;
        if let Some((active, e)) = &self.active {
            let shared = if e.shared.is_some() { " and one that all share" } else { "" };
            writeln!(
                f,
                "experts    {} a layer, {} for each token{shared}: {} parameters for a token; only chosen experts are trained",
                e.count,
                e.per_token,
                count(*active as f64)
            )?;
        }
        writeln!(
            f,
            "tensors    {} of {} mapped, in {} that vLLM holds; {} train by APOLLO, {} by AdamW",
            self.mapped, self.tensors, self.server_tensors, self.by_apollo, self.by_adamw
        )?;
        let weights = self.weights as f64;
        let split = match tensor_parallel {
            1 => String::new(),
            n => format!(", {} on each of {n} GPUs", gb(weights / n as f64)),
        };
        writeln!(f, "weights    {} in {dtype}{split}: the server's, trained where they lie", gb(weights))?;
        writeln!(f, "gradients  0: never stored (a trainer that stores them in {dtype}: {})", gb(weights))?;
        let moments = self.question.moments();
        writeln!(f, "state      {} at rank {rank}, moments in {moments}", gb(self.state as f64))?;
        writeln!(
            f,
            "step       {}: context of {context} tokens {}, window of {decision} {}, logits {}, projections {}",
            gb((self.extra() - self.state) as f64),
            gb(self.context as f64),
            gb(self.window as f64),
            gb(self.logits as f64),
            gb(self.projections as f64)
        )?;
        match gpu {
            Some(gpu) => self.fmt_gpu(gpu, f)?,
            None => write!(
                f,
                "CPU        {} beside the server's weights; `apollod bench step --shape config.json` measures a step",
                gb(self.extra() as f64)
            )?,
        }
        if tensor_parallel > 1 {
            write!(f, "\nnote       apollod attaches to servers with tensor parallel size 1 only, for now")?;
        }
        Ok(())
    }
}

impl Plan {
    fn fmt_gpu(&self, gpu: Gpu, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = self.left(gpu);
        let verdict = if left > 0.0 {
            format!("fits, {} left for the server's keys and values", gb(left))
        } else {
            format!("does not fit: {} too much; lower --rank, or a larger GPU", gb(-left))
        };
        writeln!(f, "{:10} {}, {}: {verdict}", gpu.name, gpu.title, gb(gpu.memory))?;
        let (prefill, decision) = self.floor.expect("a GPU has a floor");
        write!(
            f,
            "floor      {:.0} ms a step: context {:.0}, decision {:.0} (memory traffic or arithmetic, whichever takes longer)",
            (prefill + decision) * 1e3,
            prefill * 1e3,
            decision * 1e3
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(rank: usize, gpu: &str) -> Question {
        let gpu = Some(named(gpu).unwrap());
        Question { rank, dtype: Dtype::BF16, context: 4096, decision: 32, tensor_parallel: 1, gpu }
    }

    fn config(name: &str) -> Config {
        let path = format!("{}/../model/tests/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
        Config::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn all_851_tensors_of_qwen3_5_27b_have_a_place_and_its_figures_are_those_that_were_published() {
        let config = config("qwen3_5_27b");
        let plan = Plan::of(&config, ask(256, "b200")).unwrap();
        assert_eq!((plan.tensors, plan.mapped, plan.recurrent_layers, plan.layers), (851, 851, 48, 64));
        // 54 GB of weights, so of gradients where they are stored; 10 GB of state at rank 256, 2.5 GB at 64.
        assert!((53.0..55.0).contains(&(plan.weights as f64 / 1e9)), "{plan}");
        assert!((9.5..11.5).contains(&(plan.state as f64 / 1e9)), "{plan}");
        let low = Plan::of(&config, ask(64, "b200")).unwrap();
        assert!((2.4..2.9).contains(&(low.state as f64 / 1e9)), "{low}");
        // What the optimizer would really take, tensor by tensor, by the formula of the memory budget: 8·min(r,m,n)·max(m,n).
        let by_hand: usize = config
            .decoder
            .tensors()
            .iter()
            .map(|t| match (t.role, &t.shape[..]) {
                (weight_map::Role::Embedding, _) => 0,
                (_, [m, n]) => 8 * 256.min(*m).min(*n) * m.max(n),
                (_, shape) => 8 * shape.iter().product::<usize>(),
            })
            .sum();
        assert_eq!(plan.state, by_hand as u64);
        let left = |gpu| Plan::of(&config, ask(256, gpu)).unwrap().left(named(gpu).unwrap());
        assert!(left("b200") > 0.0 && left("l40s") < 0.0);
    }

    #[test]
    fn a_mixture_of_experts_moves_what_its_tokens_choose() {
        let config = config("qwen3_30b_a3b");
        let plan = Plan::of(&config, ask(256, "b200")).unwrap();
        // 48 layers of 3 experts' matrices each, router, 6 of attention and 2 norms; vLLM stacks them.
        assert_eq!((plan.tensors, plan.mapped, plan.server_tensors), (18_867, 18_867, 48 * 9 + 3));
        // As published: 30.5 billion parameters, 3.3 of them for a token.
        let (active, _) = plan.active.as_ref().unwrap();
        assert!((30.4..30.6).contains(&(plan.parameters as f64 / 1e9)), "{plan}");
        assert!((3.25..3.4).contains(&(*active as f64 / 1e9)), "{plan}");
        // One token has 8 of 128 experts, 32 tokens may have all.
        let floor = |decision| Plan::of(&config, Question { decision, ..ask(256, "b200") }).unwrap().floor.unwrap().1;
        assert!(floor(1) < 0.2 * floor(32) && floor(16) == floor(32), "{} {} {}", floor(1), floor(16), floor(32));
        assert!(plan.to_string().contains("128 a layer, 8 for each token"), "{plan}");
    }

    #[test]
    fn on_a_cpu_moments_and_the_keys_of_bf16_weights_take_half() {
        let config = config("qwen3_30b_a3b");
        let gpu = Plan::of(&config, ask(256, "h200")).unwrap();
        let on_cpu = |dtype| Plan::of(&config, Question { gpu: None, dtype, ..ask(256, "h200") }).unwrap();
        let (half, full) = (on_cpu(Dtype::BF16), on_cpu(Dtype::F32));
        assert_eq!((2 * half.context, full.context), (gpu.context, gpu.context));
        // Moments of norms, which AdamW trains, are f32 everywhere.
        assert!((0.5..0.501).contains(&(half.state as f64 / gpu.state as f64)), "{half}");
        assert_eq!((half.state, half.floor), (full.state, None));
        assert!(half.to_string().contains("moments in BF16") && half.json()["fits"].is_null(), "{half}");
    }

    #[test]
    fn what_cannot_be_planned_is_refused_with_what_could() {
        let config = config("qwen3_5_27b");
        let error = named("h900").unwrap_err();
        assert!(error.contains("h900") && error.contains("h100") && error.contains("b200"), "{error}");
        let long = Question { context: 300_000, ..ask(1, "h100") };
        assert!(Plan::of(&config, long).unwrap_err().to_string().contains("262144"));
    }
}
