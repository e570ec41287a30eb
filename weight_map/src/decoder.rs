//! The tensors of a decoder as Hugging Face names them.
//!
//! Symbols: L layers, H hidden, I intermediate, V vocab, h heads, k kv_heads, d head_dim.
//! Shapes: embed (V,H) · q (h·d,H), with an output gate (2·h·d,H) · k, v (k·d,H) · o (H,h·d) · gate, up (I,H) · down (H,I) ·
//! layer norms (H,) · q_norm, k_norm (d,) · biases as long as their matrix has rows.
//!
//! Gated DeltaNet layers: K = key_heads·key_dim, V = value_heads·value_dim, vh value_heads, vd value_dim, w conv_width · in_proj_qkv (2K+V,H) ·
//! in_proj_z (V,H) · in_proj_b, in_proj_a (vh,H) · conv1d (2K+V,1,w) · A_log, dt_bias (vh,) · norm (vd,) · out_proj (H,V).
//!
//! Mixture of experts: E experts, M moe_intermediate · router (E,H) · each expert's gate, up (M,H), down (H,M) · the shared expert's
//! likewise with a size of its own · its gate (1,H). Each expert's matrices are tensors of their own, also where files or servers
//! stack them ([`stacked_parts`](crate::stacked_parts)).

use serde::{Deserialize, Serialize};
use std::fmt;

/// A family of decoders, dense or with experts. The family chooses defaults elsewhere; the tensors follow from the
/// fields of [`Decoder`] alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`.
    Qwen2,
    /// `Qwen3ForCausalLM` and `Qwen3MoeForCausalLM`.
    Qwen3,
    /// `Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM`, and the text parts of their `…ForConditionalGeneration`.
    Qwen35,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Llama => "Llama",
            Family::Mistral => "Mistral",
            Family::Qwen2 => "Qwen2",
            Family::Qwen3 => "Qwen3",
            Family::Qwen35 => "Qwen3.5",
        })
    }
}

/// Gated DeltaNet layers (Yang et al., arXiv:2412.06464): a recurrent state for each value head instead of keys and values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaNet {
    /// Heads of queries and keys, `linear_num_key_heads`.
    pub key_heads: usize,
    /// Heads of values, a multiple of it, `linear_num_value_heads`.
    pub value_heads: usize,
    /// Elements of a query or key head, `linear_key_head_dim`.
    pub key_dim: usize,
    /// Elements of a value head, `linear_value_head_dim`.
    pub value_dim: usize,
    /// Tokens that the causal convolution sees, `linear_conv_kernel_dim`.
    pub conv_width: usize,
    /// Which layers they are; the others have attention.
    pub layers: Vec<bool>,
}

impl DeltaNet {
    /// Queries, keys and values of one token: what the convolution mixes.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }

    /// Values of one token.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }
}

/// Experts, of which a router chooses some for each token, in the place of a layer's MLP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// `num_experts`.
    pub count: usize,
    /// `num_experts_per_tok`, at most `count`.
    pub per_token: usize,
    /// `moe_intermediate_size`.
    pub intermediate: usize,
    /// `shared_expert_intermediate_size` of an expert that every token has besides, through a gate (Qwen3.5).
    pub shared: Option<usize>,
    /// Which layers have them; the others have an MLP.
    pub layers: Vec<bool>,
}

/// Everything that decides the names and shapes of a decoder's tensors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decoder {
    /// Model family.
    pub family: Family,
    /// Number of layers, `num_hidden_layers`.
    pub layers: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: usize,
    /// `head_dim`, which need not be hidden / heads.
    pub head_dim: usize,
    /// `vocab_size`, rows of the embedding in the files.
    pub vocab: usize,
    /// Whether q, k and v have biases (Qwen2 always, others by `attention_bias`).
    pub attention_bias: bool,
    /// Whether o_proj has a bias (Llama and Qwen3 with `attention_bias`, Qwen2 never).
    pub output_bias: bool,
    /// Whether gate, up and down have biases (`mlp_bias`).
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// Whether q_proj makes a gate for each element of attention's output besides (Qwen3.5).
    pub output_gate: bool,
    /// Gated DeltaNet layers, if there are any (Qwen3.5).
    pub delta_net: Option<DeltaNet>,
    /// Experts, if there are any (Qwen3-MoE, Qwen3.5-MoE).
    pub experts: Option<Experts>,
    /// Whether the files name the decoder `model.language_model`, as those of a multi-modal model do.
    pub wrapped: bool,
    /// Whether the head is the embedding (`tie_word_embeddings`).
    pub tied: bool,
}

/// What a tensor does, which decides the rule that trains it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The token embedding (V,H); also the head of a tied model.
    Embedding,
    /// The untied output head (V,H).
    Head,
    /// A linear layer's weight.
    Matrix,
    /// An RMS norm's gain.
    Norm,
    /// A linear layer's bias.
    Bias,
    /// The weights of a causal convolution, (channels, 1, width).
    Convolution,
    /// The logarithm of a recurrent state's decay.
    Decay,
    /// What a token's share of the shared expert is computed with, (1,H).
    Gate,
}

/// One tensor of the model, as the files name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HfTensor {
    /// Hugging Face name, for example `model.layers.0.mlp.gate_proj.weight`.
    pub name: String,
    /// Shape as in the files: (rows, cols) or (n,).
    pub shape: Vec<usize>,
    /// What it does.
    pub role: Role,
}

/// (rows, cols) of a tensor for who computes with it: a matrix as it is; anything else, a convolution too, is one row.
pub fn matrix_shape(shape: &[usize]) -> (usize, usize) {
    match *shape {
        [m, n] => (m, n),
        _ => (1, shape.iter().product()),
    }
}

impl Decoder {
    /// The decoder's module in the files.
    pub fn module(&self) -> &'static str {
        if self.wrapped { "model.language_model" } else { "model" }
    }

    /// Whether a layer is a Gated DeltaNet.
    pub fn is_delta_net(&self, layer: usize) -> bool {
        self.delta_net.as_ref().is_some_and(|delta| delta.layers[layer])
    }

    /// A layer's experts, if it has them.
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| experts.layers[layer])
    }

    /// The model's tensors in the order of its modules. A tied model has no `lm_head.weight`.
    pub fn tensors(&self) -> Vec<HfTensor> {
        let module = self.module();
        let mut list = vec![HfTensor {
            name: format!("{module}.embed_tokens.weight"),
            shape: vec![self.vocab, self.hidden],
            role: Role::Embedding,
        }];
        for layer in 0..self.layers {
            let name = format!("{module}.layers.{layer}");
            match &self.delta_net {
                Some(delta) if delta.layers[layer] => push_delta_net(&name, self.hidden, delta, &mut list),
                _ => self.push_attention(&name, &mut list),
            }
            match self.experts_of(layer) {
                Some(experts) => push_experts(&format!("{name}.mlp"), self.hidden, experts, &mut list),
                None => push_mlp(&format!("{name}.mlp"), self.hidden, self.intermediate, self.mlp_bias, &mut list),
            }
            push_norm(&mut list, format!("{name}.input_layernorm"), self.hidden);
            push_norm(&mut list, format!("{name}.post_attention_layernorm"), self.hidden);
        }
        push_norm(&mut list, format!("{module}.norm"), self.hidden);
        if !self.tied {
            list.push(HfTensor {
                name: "lm_head.weight".into(),
                shape: vec![self.vocab, self.hidden],
                role: Role::Head,
            });
        }
        list
    }

    fn push_attention(&self, layer: &str, list: &mut Vec<HfTensor>) {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let gated = if self.output_gate { 2 * queries } else { queries };
        for (name, rows, cols, bias) in [
            ("self_attn.q_proj", gated, self.hidden, self.attention_bias),
            ("self_attn.k_proj", keys, self.hidden, self.attention_bias),
            ("self_attn.v_proj", keys, self.hidden, self.attention_bias),
            ("self_attn.o_proj", self.hidden, queries, self.output_bias),
        ] {
            push_linear(list, format!("{layer}.{name}"), [rows, cols], bias);
        }
        if self.qk_norm {
            push_norm(list, format!("{layer}.self_attn.q_norm"), self.head_dim);
            push_norm(list, format!("{layer}.self_attn.k_norm"), self.head_dim);
        }
    }
}

fn push_mlp(module: &str, hidden: usize, intermediate: usize, bias: bool, list: &mut Vec<HfTensor>) {
    for (name, shape) in [
        ("gate_proj", [intermediate, hidden]),
        ("up_proj", [intermediate, hidden]),
        ("down_proj", [hidden, intermediate]),
    ] {
        push_linear(list, format!("{module}.{name}"), shape, bias);
    }
}

fn push_experts(module: &str, hidden: usize, experts: &Experts, list: &mut Vec<HfTensor>) {
    push_linear(list, format!("{module}.gate"), [experts.count, hidden], false);
    for expert in 0..experts.count {
        push_mlp(&format!("{module}.experts.{expert}"), hidden, experts.intermediate, false, list);
    }
    if let Some(intermediate) = experts.shared {
        push_mlp(&format!("{module}.shared_expert"), hidden, intermediate, false, list);
        list.push(HfTensor {
            name: format!("{module}.shared_expert_gate.weight"),
            shape: vec![1, hidden],
            role: Role::Gate,
        });
    }
}

fn push_delta_net(layer: &str, hidden: usize, delta: &DeltaNet, list: &mut Vec<HfTensor>) {
    let (channels, values, heads) = (delta.channels(), delta.values(), delta.value_heads);
    let module = format!("{layer}.linear_attn");
    let other =
        |name: &str, shape: &[usize], role| HfTensor { name: format!("{module}.{name}"), shape: shape.to_vec(), role };
    list.push(other("dt_bias", &[heads], Role::Bias));
    list.push(other("A_log", &[heads], Role::Decay));
    list.push(other("conv1d.weight", &[channels, 1, delta.conv_width], Role::Convolution));
    push_norm(list, format!("{module}.norm"), delta.value_dim);
    for (name, shape) in [
        ("out_proj", [hidden, values]),
        ("in_proj_qkv", [channels, hidden]),
        ("in_proj_z", [values, hidden]),
        ("in_proj_b", [heads, hidden]),
        ("in_proj_a", [heads, hidden]),
    ] {
        push_linear(list, format!("{module}.{name}"), shape, false);
    }
}

fn push_linear(list: &mut Vec<HfTensor>, module: String, shape: [usize; 2], bias: bool) {
    list.push(HfTensor { name: format!("{module}.weight"), shape: shape.to_vec(), role: Role::Matrix });
    if bias {
        list.push(HfTensor { name: format!("{module}.bias"), shape: vec![shape[0]], role: Role::Bias });
    }
}

fn push_norm(list: &mut Vec<HfTensor>, module: String, length: usize) {
    list.push(HfTensor { name: format!("{module}.weight"), shape: vec![length], role: Role::Norm });
}
