//! The model directory as Hugging Face lays it out: bf16 safetensors, configs, tokenizer, card.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor, Var};
use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};

use crate::batch::special;
use crate::network::{Network, Shape};
use crate::text::{END_OF_TEXT, TURN_END, TURN_START};
use crate::vocabulary::Trained;

/// Positions that config.json promises; the training rows have 128.
pub const POSITIONS: usize = 512;

/// ChatML, as Qwen renders it without tools.
const CHAT_TEMPLATE: &str = "{%- for message in messages %}\
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{%- endfor %}\
{%- if add_generation_prompt %}\
{{- '<|im_start|>assistant\\n' }}\
{%- endif %}";

/// Writes everything but the card into `dir`; parameters are rounded to the nearest bf16.
pub fn write(dir: &Path, network: &Network, tokenizer: &Trained) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    write_weights(&dir.join("model.safetensors"), network)?;
    let [end_of_text, end_of_turn] = [special(tokenizer, END_OF_TEXT)?, special(tokenizer, TURN_END)?];
    let shape = &network.shape;
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": POSITIONS,
        "max_window_layers": shape.num_hidden_layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pad_token_id": end_of_text,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": null,
        "rope_theta": shape.rope_theta,
        "sliding_window": null,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": shape.vocab_size,
    });
    write_json(&dir.join("config.json"), &config)?;
    let generation = json!({
        "bos_token_id": end_of_text,
        "do_sample": false,
        "eos_token_id": end_of_turn,
        "pad_token_id": end_of_text,
    });
    write_json(&dir.join("generation_config.json"), &generation)?;
    let added: serde_json::Map<String, Value> = [END_OF_TEXT, TURN_START, TURN_END]
        .into_iter()
        .map(|token| {
            let entry = json!({"content": token, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": true});
            Ok((special(tokenizer, token)?.to_string(), entry))
        })
        .collect::<Result<_>>()?;
    let tokenizer_config = json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": added,
        "additional_special_tokens": [TURN_START, TURN_END],
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": POSITIONS,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": null,
    });
    write_json(&dir.join("tokenizer_config.json"), &tokenizer_config)?;
    tokenizer.save(dir.join("tokenizer.json"), true).map_err(|e| anyhow!("cannot write tokenizer.json: {e}"))
}

/// Pretty JSON with a newline at its end.
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn write_weights(path: &Path, network: &Network) -> Result<()> {
    let mut bytes: BTreeMap<&str, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, var) in &network.vars {
        let values: Vec<f32> = var.flatten_all()?.to_vec1()?;
        let data = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        bytes.insert(name, (var.dims().to_vec(), data));
    }
    let mut views = Vec::new();
    for (name, (dims, data)) in &bytes {
        views.push((*name, TensorView::new(Dtype::BF16, dims.clone(), data)?));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a directory that `write` made; parameters become f32.
pub fn read(dir: &Path) -> Result<(Network, Trained)> {
    let at = |name: &str| dir.join(name);
    let text = fs::read(at("config.json")).with_context(|| format!("no config.json in {}", dir.display()))?;
    let config: Value = serde_json::from_slice(&text)?;
    let size = |key: &str| {
        config[key].as_u64().map(|v| v as usize).with_context(|| format!("config.json has no whole number {key}"))
    };
    let real = |key: &str| config[key].as_f64().with_context(|| format!("config.json has no number {key}"));
    let shape = Shape {
        vocab_size: size("vocab_size")?,
        hidden_size: size("hidden_size")?,
        intermediate_size: size("intermediate_size")?,
        num_hidden_layers: size("num_hidden_layers")?,
        num_attention_heads: size("num_attention_heads")?,
        num_key_value_heads: size("num_key_value_heads")?,
        head_dim: size("head_dim")?,
        rope_theta: real("rope_theta")?,
        rms_norm_eps: real("rms_norm_eps")?,
    };
    let file = fs::read(at("model.safetensors"))?;
    let tensors = SafeTensors::deserialize(&file)?;
    let mut vars = BTreeMap::new();
    for (name, dims) in shape.parameters() {
        let view = tensors.tensor(&name).with_context(|| format!("model.safetensors has no {name}"))?;
        ensure!(view.dtype() == Dtype::BF16 && view.shape() == dims, "{name}: want BF16 {dims:?}, got {view:?}");
        let values: Vec<f32> =
            view.data().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        vars.insert(name, Var::from_tensor(&Tensor::from_vec(values, dims, &Device::Cpu)?)?);
    }
    let text = fs::read(at("tokenizer.json"))?;
    let tokenizer: Trained = serde_json::from_slice(&text).context("tokenizer.json")?;
    Ok((Network { shape, vars }, tokenizer))
}
