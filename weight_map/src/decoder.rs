//! The tensors of a dense decoder as Hugging Face names them.
//!
//! Symbols: L layers, H hidden, I intermediate, V vocab, h heads, k kv_heads, d head_dim.
//! Shapes: embed (V,H) · q (h·d,H) · k, v (k·d,H) · o (H,h·d) · gate, up (I,H) · down (H,I) ·
//! layer norms (H,) · q_norm, k_norm (d,) · biases as long as their matrix has rows.

use serde::{Deserialize, Serialize};

/// A family of dense decoders. The family chooses defaults elsewhere; the tensors follow from the
/// fields of [`Decoder`] alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`.
    Qwen2,
    /// `Qwen3ForCausalLM`.
    Qwen3,
}

/// Everything that decides the names and shapes of a dense decoder's tensors.
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

impl Decoder {
    /// The model's tensors in the order of its modules. A tied model has no `lm_head.weight`.
    pub fn tensors(&self) -> Vec<HfTensor> {
        let mut list = vec![HfTensor {
            name: "model.embed_tokens.weight".into(),
            shape: vec![self.vocab, self.hidden],
            role: Role::Embedding,
        }];
        for layer in 0..self.layers {
            self.push_layer(&format!("model.layers.{layer}"), &mut list);
        }
        push_norm(&mut list, "model.norm".into(), self.hidden);
        if !self.tied {
            list.push(HfTensor {
                name: "lm_head.weight".into(),
                shape: vec![self.vocab, self.hidden],
                role: Role::Head,
            });
        }
        list
    }

    fn push_layer(&self, layer: &str, list: &mut Vec<HfTensor>) {
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        for (name, rows, cols, bias) in [
            ("self_attn.q_proj", queries, self.hidden, self.attention_bias),
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
        for (name, rows, cols) in [
            ("mlp.gate_proj", self.intermediate, self.hidden),
            ("mlp.up_proj", self.intermediate, self.hidden),
            ("mlp.down_proj", self.hidden, self.intermediate),
        ] {
            push_linear(list, format!("{layer}.{name}"), [rows, cols], self.mlp_bias);
        }
        push_norm(list, format!("{layer}.input_layernorm"), self.hidden);
        push_norm(list, format!("{layer}.post_attention_layernorm"), self.hidden);
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
