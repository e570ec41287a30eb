//! `config.json` as Hugging Face writes it, in the spelling of transformers 4 and 5.
//!
//! What this crate does not compute is refused by name: a model that is trained by other formulas
//! than it is served with learns nonsense.

use crate::rope::Rope;
use serde_json::{Map, Value};
use std::path::Path;
use weight_map::{Decoder, DeltaNet, EXPERTS_MAX, Experts, Family};

/// Everything that decides what the layers compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Names and shapes of the tensors.
    pub decoder: Decoder,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Added to the gain of every norm but that of a Gated DeltaNet: 1 in Qwen3.5, whose files hold what is beside it.
    pub norm_offset: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether the shares of a token's experts add up to 1: always in Qwen3.5, in Qwen3 by `norm_topk_prob`.
    pub shares_normalised: bool,
    /// Sliding window of each layer; `None` sees the whole context, as a recurrent layer does.
    pub windows: Vec<Option<usize>>,
    /// Longest sequence that the model was made for.
    pub max_position_embeddings: usize,
    /// Tokens that end an answer, from `eos_token_id`; may be empty.
    pub eos_token_ids: Vec<u32>,
}

/// A `config.json` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {reason}; a model directory holds config.json beside its safetensors")]
    Read {
        /// The file.
        path: String,
        /// The system's words.
        reason: String,
    },
    /// Not JSON, or not an object.
    #[error("config.json is not valid: {0}")]
    Json(String),
    /// A key is missing or of the wrong type.
    #[error("config.json: {key} must be {expected}, found {found}")]
    Value {
        /// The key.
        key: String,
        /// What would do.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A model that this crate does not compute.
    #[error("config.json: {key} = {found} is not supported; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would do.
        supported: &'static str,
    },
}

/// Keys that change what is computed, with the only value that is supported.
const NEUTRAL: [(&str, f64); 9] = [
    ("pretraining_tp", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("embedding_multiplier", 1.0),
    ("residual_multiplier", 1.0),
    ("logits_scaling", 1.0),
    ("n_routed_experts", 0.0),
    ("attention_dropout", 0.0),
];

/// More layers than any model has.
const LAYERS_MAX: usize = 4096;
/// The same of the length of a head.
const HEAD_DIM_MAX: usize = 65_536;
/// More experts than any model has.
const ALL_EXPERTS_MAX: usize = 1 << 18;
/// The longest head of a Gated DeltaNet, and its widest convolution: as kernels hold them.
const DELTA_DIM_MAX: usize = 256;
const CONV_WIDTH_MAX: usize = 16;

impl Config {
    /// Reads `config.json` of a model directory.
    pub fn read(model_dir: &Path) -> Result<Config, ConfigError> {
        let path = model_dir.join("config.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|e| ConfigError::Read { path: path.display().to_string(), reason: e.to_string() })?;
        Config::parse(&text)
    }

    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let json: Value = serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))?;
        let Value::Object(map) = json else { return Err(ConfigError::Json("not an object".into())) };
        let whole = Keys { map: &map, prefix: "" };
        let Architecture { family, experts, wrapped } = architecture(&whole)?;
        refuse_unsupported(&whole)?;
        let merged = if wrapped { Some(text_config(&whole)?) } else { None };
        let keys = match &merged {
            Some(map) => Keys { map, prefix: "text_config." },
            None => whole,
        };
        refuse_unsupported(&keys)?;
        let mut decoder = Decoder { wrapped, ..decoder(&keys, family, experts)? };
        decoder.experts = self::experts(&keys, family, experts, decoder.layers)?;
        if decoder.intermediate == 0 && (0..decoder.layers).any(|layer| decoder.experts_of(layer).is_none()) {
            return keys.wrong("intermediate_size", "a positive whole number, because some layers have no experts");
        }
        let max_position_embeddings = keys.size_or("max_position_embeddings", positions_default(family))?;
        let rotated = rotated(&keys, family, decoder.head_dim)?;
        let config = Config {
            rms_norm_eps: keys.not_negative_or("rms_norm_eps", 1e-6)? as f32,
            norm_offset: if family == Family::Qwen35 { 1.0 } else { 0.0 },
            rope: Rope::parse(&keys, rotated, max_position_embeddings)?,
            windows: windows(&keys, family, experts, decoder.layers)?,
            shares_normalised: family == Family::Qwen35 || keys.flag("norm_topk_prob")?,
            eos_token_ids: eos(&keys)?,
            max_position_embeddings,
            decoder,
        };
        Ok(config)
    }
}

/// What `architectures` says.
struct Architecture {
    family: Family,
    /// Whether layers have experts.
    experts: bool,
    /// Whether the decoder is a part of a multi-modal model.
    wrapped: bool,
}

fn architecture(keys: &Keys) -> Result<Architecture, ConfigError> {
    const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, \
                             Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5ForConditionalGeneration, \
                             Qwen3_5MoeForConditionalGeneration";
    let found = keys.get("architectures").cloned().unwrap_or(Value::Null);
    let name = found.as_array().and_then(|a| a.first()).and_then(Value::as_str);
    let (family, experts, wrapped) = match name {
        Some("LlamaForCausalLM") => (Family::Llama, false, false),
        Some("MistralForCausalLM") => (Family::Mistral, false, false),
        Some("Qwen2ForCausalLM") => (Family::Qwen2, false, false),
        Some("Qwen3ForCausalLM") => (Family::Qwen3, false, false),
        Some("Qwen3MoeForCausalLM") => (Family::Qwen3, true, false),
        Some("Qwen3_5ForCausalLM") => (Family::Qwen35, false, false),
        Some("Qwen3_5MoeForCausalLM") => (Family::Qwen35, true, false),
        Some("Qwen3_5ForConditionalGeneration") => (Family::Qwen35, false, true),
        Some("Qwen3_5MoeForConditionalGeneration") => (Family::Qwen35, true, true),
        _ => {
            return Err(ConfigError::Unsupported {
                key: "architectures".into(),
                found: found.to_string(),
                supported: SUPPORTED,
            });
        }
    };
    Ok(Architecture { family, experts, wrapped })
}

/// The experts of an architecture that has them. Others must have none.
fn experts(keys: &Keys, family: Family, wanted: bool, layers: usize) -> Result<Option<Experts>, ConfigError> {
    // transformers 5 writes the first name for Qwen3-MoE, reads both, and takes the first if they differ.
    let names = if family == Family::Qwen35 { &["num_experts"][..] } else { &["num_local_experts", "num_experts"] };
    let count = names.iter().copied().find(|key| keys.get(key).is_some());
    if !wanted {
        return match count.and_then(|key| keys.get(key).map(|found| (key, found))) {
            Some((key, found)) if found.as_u64() != Some(0) => Err(ConfigError::Unsupported {
                key: key.into(),
                found: found.to_string(),
                supported: "0 or absent in this architecture",
            }),
            _ => Ok(None),
        };
    }
    let key = count.unwrap_or("num_experts");
    let (default, per_token) = if family == Family::Qwen35 { (256, 8) } else { (128, 8) };
    let experts = Experts {
        count: keys.size_or(key, default)?,
        per_token: keys.size_or("num_experts_per_tok", per_token)?,
        intermediate: keys.size("moe_intermediate_size")?,
        shared: match family {
            Family::Qwen35 => Some(keys.size("shared_expert_intermediate_size")?),
            _ => None,
        },
        layers: sparse_layers(keys, family, layers)?,
    };
    if experts.count > EXPERTS_MAX {
        return keys.wrong(key, "at most 4096");
    }
    // A length of lists, as the number of layers.
    if experts.count * layers > ALL_EXPERTS_MAX {
        return keys.wrong(key, "at most 262144 in all layers together");
    }
    if experts.per_token > experts.count {
        return keys.wrong("num_experts_per_tok", "at most the number of experts");
    }
    Ok(experts.layers.contains(&true).then_some(experts))
}

/// Which layers have experts: all of Qwen3.5, those of Qwen3 that `decoder_sparse_step` and `mlp_only_layers` leave.
fn sparse_layers(keys: &Keys, family: Family, layers: usize) -> Result<Vec<bool>, ConfigError> {
    if family == Family::Qwen35 {
        return Ok(vec![true; layers]);
    }
    let step = keys.size_or("decoder_sparse_step", 1)?;
    let dense: Vec<u64> = match keys.get("mlp_only_layers") {
        None => Vec::new(),
        Some(list) => match list.as_array().and_then(|list| list.iter().map(Value::as_u64).collect()) {
            Some(list) => list,
            None => return keys.wrong("mlp_only_layers", "a list of layers"),
        },
    };
    Ok((0..layers).map(|i| (i + 1).is_multiple_of(step) && !dense.contains(&(i as u64))).collect())
}

/// The decoder's part of a multi-modal model's config. Whether the head is the embedding, and which tokens end an answer, may
/// stand beside it.
fn text_config(whole: &Keys) -> Result<Map<String, Value>, ConfigError> {
    let Some(text) = whole.object("text_config", "text_config.")? else {
        return whole.wrong("text_config", "an object");
    };
    let mut text = text.map.clone();
    for key in ["tie_word_embeddings", "eos_token_id"] {
        match (whole.get(key), text.get(key).filter(|value| !value.is_null())) {
            (Some(beside), None) => {
                text.insert(key.into(), beside.clone());
            }
            // What the whole model ties counts for transformers; the two do not differ where nobody has edited them.
            (Some(beside), Some(inside)) if key == "tie_word_embeddings" && beside != inside => {
                return whole.wrong(key, "the same as text_config.tie_word_embeddings");
            }
            _ => {}
        }
    }
    Ok(text)
}

/// Elements of a head that rotate: a quarter of it in Qwen3.5 unless `partial_rotary_factor` says otherwise, in others all.
fn rotated(keys: &Keys, family: Family, head_dim: usize) -> Result<usize, ConfigError> {
    const KEY: &str = "partial_rotary_factor";
    let rope = keys.object("rope_parameters", "rope_parameters.")?;
    let inside = rope.as_ref().filter(|rope| rope.get(KEY).is_some());
    let factor = match inside {
        Some(rope) => rope.float(KEY)?,
        None => keys.float_or(KEY, if family == Family::Qwen35 { 0.25 } else { 1.0 })?,
    };
    let of = inside.unwrap_or(keys);
    if family != Family::Qwen35 && factor != 1.0 {
        return of.wrong(KEY, "1 or absent");
    }
    let rotated = (head_dim as f64 * factor) as usize;
    if factor > 1.0 || rotated == 0 || !rotated.is_multiple_of(2) {
        return of.wrong(KEY, "a share of head_dim, 1 at most, of an even number of elements");
    }
    Ok(rotated)
}

/// What transformers assumes where the key is absent.
fn positions_default(family: Family) -> usize {
    match family {
        Family::Llama => 2048,
        Family::Mistral => 131_072,
        Family::Qwen2 | Family::Qwen3 | Family::Qwen35 => 32_768,
    }
}

fn refuse_unsupported(keys: &Keys) -> Result<(), ConfigError> {
    let unsupported = |key: &str, found: &Value, supported| {
        Err(ConfigError::Unsupported { key: key.into(), found: found.to_string(), supported })
    };
    if let Some(found) = keys.get("quantization_config") {
        return unsupported("quantization_config", found, "weights in F32, F16 or BF16, not quantized");
    }
    for (key, neutral) in NEUTRAL {
        match keys.get(key) {
            Some(found) if found.as_f64() != Some(neutral) => {
                return unsupported(key, found, "a dense model without this option");
            }
            _ => {}
        }
    }
    match keys.get("hidden_act") {
        Some(act) if act != "silu" => unsupported("hidden_act", act, "silu"),
        _ => Ok(()),
    }
}

fn decoder(keys: &Keys, family: Family, experts: bool) -> Result<Decoder, ConfigError> {
    let (hidden, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
    let attention_bias = match family {
        Family::Qwen2 => true,
        Family::Mistral => false,
        Family::Llama | Family::Qwen3 | Family::Qwen35 => keys.flag("attention_bias")?,
    };
    let layers = keys.size("num_hidden_layers")?;
    // A length of lists that are made before any weight is looked at.
    if layers > LAYERS_MAX {
        return keys.wrong("num_hidden_layers", "at most 4096");
    }
    let head_dim = if family == Family::Qwen35 { 256 } else { hidden / heads };
    let decoder = Decoder {
        family,
        layers,
        hidden,
        // Of a model whose layers all have experts there may be none.
        intermediate: if experts { keys.count_or("intermediate_size", 0)? } else { keys.size("intermediate_size")? },
        heads,
        kv_heads: keys.size_or("num_key_value_heads", heads)?,
        head_dim: keys.size_or("head_dim", head_dim)?,
        vocab: keys.size("vocab_size")?,
        attention_bias,
        output_bias: attention_bias && family != Family::Qwen2,
        mlp_bias: family == Family::Llama && keys.flag("mlp_bias")?,
        qk_norm: matches!(family, Family::Qwen3 | Family::Qwen35),
        output_gate: family == Family::Qwen35,
        delta_net: if family == Family::Qwen35 { delta_net(keys, layers)? } else { None },
        experts: None,
        wrapped: false,
        tied: keys.flag("tie_word_embeddings")?,
    };
    if decoder.head_dim > HEAD_DIM_MAX {
        return keys.wrong("head_dim", "at most 65536");
    }
    if !decoder.heads.is_multiple_of(decoder.kv_heads) {
        return keys.wrong("num_key_value_heads", "a divisor of num_attention_heads");
    }
    if !decoder.head_dim.is_multiple_of(2) {
        return keys.wrong("head_dim", "even, for rotary embeddings");
    }
    Ok(decoder)
}

/// The Gated DeltaNet layers of Qwen3.5: those that `layer_types` says, or all but every `full_attention_interval`-th.
fn delta_net(keys: &Keys, layers: usize) -> Result<Option<DeltaNet>, ConfigError> {
    if keys.get("attn_output_gate").is_some_and(|gate| *gate != Value::Bool(true)) {
        return keys.wrong("attn_output_gate", "true or absent");
    }
    let interval = keys.size_or("full_attention_interval", 4)?;
    let linear = |i: usize| !(i + 1).is_multiple_of(interval);
    let which: Vec<bool> = match layer_types(keys, layers)? {
        Some(types) => types.iter().map(|kind| *kind == "linear_attention").collect(),
        None => (0..layers).map(linear).collect(),
    };
    let delta = DeltaNet {
        key_heads: keys.size_or("linear_num_key_heads", 16)?,
        value_heads: keys.size_or("linear_num_value_heads", 32)?,
        key_dim: keys.size_or("linear_key_head_dim", 128)?,
        value_dim: keys.size_or("linear_value_head_dim", 128)?,
        conv_width: keys.size_or("linear_conv_kernel_dim", 4)?,
        layers: which,
    };
    if !delta.value_heads.is_multiple_of(delta.key_heads) {
        return keys.wrong("linear_num_value_heads", "a multiple of linear_num_key_heads");
    }
    for (key, value) in [("linear_key_head_dim", delta.key_dim), ("linear_value_head_dim", delta.value_dim)] {
        if value > DELTA_DIM_MAX {
            return keys.wrong(key, "at most 256");
        }
    }
    if delta.conv_width > CONV_WIDTH_MAX {
        return keys.wrong("linear_conv_kernel_dim", "at most 16");
    }
    Ok(delta.layers.contains(&true).then_some(delta))
}

/// The words of `layer_types`, one for each layer, if it is there.
fn layer_types<'a>(keys: &Keys<'a>, layers: usize) -> Result<Option<Vec<&'a str>>, ConfigError> {
    let Some(types) = keys.get("layer_types") else { return Ok(None) };
    let names = types.as_array().filter(|a| a.len() == layers);
    match names.and_then(|names| names.iter().map(Value::as_str).collect::<Option<Vec<_>>>()) {
        Some(names) => Ok(Some(names)),
        None => keys.wrong("layer_types", "a list with one word per layer"),
    }
}

/// Mistral and Qwen3 with experts slide everywhere; the others where `layer_types` says so, or from `max_window_layers` on.
fn windows(keys: &Keys, family: Family, experts: bool, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let slides = match family {
        Family::Mistral => true,
        Family::Llama | Family::Qwen35 => false,
        Family::Qwen2 | Family::Qwen3 => keys.flag("use_sliding_window")?,
    };
    // Absent means transformers' default, null means none.
    let window = match keys.map.get("sliding_window") {
        _ if !slides => None,
        None => Some(4096),
        Some(Value::Null) => None,
        Some(_) => Some(keys.size("sliding_window")?),
    };
    if family == Family::Qwen3 && experts {
        return Ok(vec![window; layers]);
    }
    let Some(names) = layer_types(keys, layers)? else {
        let first = if family == Family::Mistral { 0 } else { keys.count_or("max_window_layers", 28)? };
        return Ok((0..layers).map(|i| window.filter(|_| i >= first)).collect());
    };
    let kind = |name: &&str| match (*name, family) {
        ("full_attention", _) | ("linear_attention", Family::Qwen35) => Ok(None),
        ("sliding_attention", Family::Mistral | Family::Qwen2 | Family::Qwen3 | Family::Llama) => Ok(window),
        (_, family) => Err(ConfigError::Unsupported {
            key: "layer_types".into(),
            found: name.to_string(),
            supported: if family == Family::Qwen35 {
                "full_attention, linear_attention"
            } else {
                "full_attention, sliding_attention"
            },
        }),
    };
    names.iter().map(kind).collect()
}

fn eos(keys: &Keys) -> Result<Vec<u32>, ConfigError> {
    let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
    let ids = match keys.get("eos_token_id") {
        None => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(one) => id(one).map(|one| vec![one]),
    };
    ids.map_or_else(|| keys.wrong("eos_token_id", "a token id or a list of them"), Ok)
}

/// Typed access to the keys of a JSON object; null counts as absent.
pub(crate) struct Keys<'a> {
    pub map: &'a Map<String, Value>,
    /// Path of the object, for messages: `rope_parameters.`.
    pub prefix: &'static str,
}

impl<'a> Keys<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub fn wrong<T>(&self, key: &str, expected: &'static str) -> Result<T, ConfigError> {
        let found = self.map.get(key).map_or("nothing".into(), Value::to_string);
        Err(ConfigError::Value { key: format!("{}{key}", self.prefix), expected, found })
    }

    /// A positive whole number below 2^32.
    pub fn size(&self, key: &str) -> Result<usize, ConfigError> {
        let value = self.get(key).and_then(Value::as_u64).filter(|v| (1..1 << 32).contains(v));
        value.map_or_else(|| self.wrong(key, "a positive whole number"), |v| Ok(v as usize))
    }

    /// A whole number, 0 included.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.get(key).and_then(Value::as_u64) == Some(0) { Ok(0) } else { self.size_or(key, default) }
    }

    pub fn not_negative_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        if self.get(key).and_then(Value::as_f64) == Some(0.0) { Ok(0.0) } else { self.float_or(key, default) }
    }

    pub fn size_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        if self.get(key).is_none() { Ok(default) } else { self.size(key) }
    }

    pub fn float(&self, key: &str) -> Result<f64, ConfigError> {
        let value = self.get(key).and_then(Value::as_f64).filter(|v| v.is_finite() && *v > 0.0);
        value.map_or_else(|| self.wrong(key, "a positive number"), Ok)
    }

    pub fn float_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        if self.get(key).is_none() { Ok(default) } else { self.float(key) }
    }

    pub fn flag(&self, key: &str) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => self.wrong(key, "true or false"),
        }
    }

    /// The object under `key`, if there is one.
    pub fn object(&self, key: &'static str, prefix: &'static str) -> Result<Option<Keys<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { map, prefix })),
            Some(_) => self.wrong(key, "an object"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN3: &str = r#"{"architectures":["Qwen3ForCausalLM"],"hidden_size":1024,"num_attention_heads":16,
        "num_key_value_heads":8,"head_dim":128,"intermediate_size":3072,"num_hidden_layers":28,"vocab_size":151936,
        "tie_word_embeddings":true,"rope_theta":1000000,"sliding_window":null,"eos_token_id":151645}"#;

    fn with(key: &str, value: &str) -> Result<Config, ConfigError> {
        let mut json: Value = serde_json::from_str(QWEN3).unwrap();
        json[key] = serde_json::from_str(value).unwrap();
        Config::parse(&json.to_string())
    }

    #[test]
    fn a_config_of_transformers_4_is_read() {
        let config = Config::parse(QWEN3).unwrap();
        assert_eq!(config.decoder.head_dim, 128);
        assert!(config.decoder.qk_norm && config.decoder.tied && !config.decoder.attention_bias);
        assert_eq!(config.windows, vec![None; 28]);
        assert_eq!(config.eos_token_ids, [151645]);
    }

    #[test]
    fn experts_are_where_the_config_says_and_nowhere_else() {
        let parse = |changes: Value| {
            let mut json: Value = serde_json::from_str(QWEN3).unwrap();
            json["architectures"] = serde_json::json!(["Qwen3MoeForCausalLM"]);
            (json["num_experts"], json["num_experts_per_tok"], json["moe_intermediate_size"]) =
                (8.into(), 2.into(), 768.into());
            changes.as_object().unwrap().iter().for_each(|(k, v)| json[k] = v.clone());
            Config::parse(&json.to_string())
        };
        let sparse = |changes| {
            let config = parse(changes).unwrap();
            (0..28).filter(|layer| config.decoder.experts_of(*layer).is_some()).collect::<Vec<usize>>()
        };
        assert_eq!(sparse(serde_json::json!({})).len(), 28);
        assert_eq!(sparse(serde_json::json!({"decoder_sparse_step": 10, "mlp_only_layers": [9]})), [19]);
        assert_eq!(sparse(serde_json::json!({"decoder_sparse_step": 29})), Vec::<usize>::new());
        assert!(!parse(serde_json::json!({})).unwrap().shares_normalised);
        // As transformers 5.23 was seen to read them.
        let both = parse(serde_json::json!({"num_experts": 8, "num_local_experts": 4})).unwrap();
        assert_eq!(both.decoder.experts.unwrap().count, 4);
        let slides = serde_json::json!({"use_sliding_window": true, "sliding_window": 64, "max_window_layers": 20});
        assert_eq!(parse(slides).unwrap().windows, [Some(64); 28]);
        assert!(
            parse(serde_json::json!({"norm_topk_prob": true, "intermediate_size": null})).unwrap().shares_normalised
        );
        for (changes, named) in [
            (serde_json::json!({"num_experts_per_tok": 9}), "num_experts_per_tok"),
            (serde_json::json!({"num_experts": 5000}), "num_experts"),
            (serde_json::json!({"num_experts": null, "num_local_experts": "many"}), "num_local_experts"),
            (serde_json::json!({"moe_intermediate_size": null}), "moe_intermediate_size"),
            (serde_json::json!({"mlp_only_layers": [3], "intermediate_size": null}), "intermediate_size"),
            (serde_json::json!({"mlp_only_layers": 3}), "mlp_only_layers"),
            (serde_json::json!({"num_experts": 4096, "num_hidden_layers": 65}), "num_experts"),
        ] {
            let error = parse(changes.clone()).expect_err(named).to_string();
            assert!(error.contains(named), "{changes}: {error}");
        }
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value, named) in [
            ("architectures", r#"["GPT2LMHeadModel"]"#, "GPT2LMHeadModel"),
            ("quantization_config", r#"{"quant_method":"fp8"}"#, "quantization_config"),
            ("hidden_act", r#""gelu""#, "gelu"),
            ("partial_rotary_factor", "0.5", "partial_rotary_factor"),
            ("num_experts", "8", "num_experts"),
            ("num_local_experts", "8", "num_local_experts"),
            ("rope_scaling", r#"{"rope_type":"dynamic","factor":2}"#, "dynamic"),
            ("layer_types", r#"["linear_attention"]"#, "layer_types"),
            ("head_dim", "127", "head_dim"),
            ("head_dim", "4294967294", "head_dim"),
            ("num_hidden_layers", "4294967295", "num_hidden_layers"),
            ("num_key_value_heads", "3", "num_key_value_heads"),
            ("hidden_size", "-1", "hidden_size"),
            ("hidden_size", "\"big\"", "hidden_size"),
        ] {
            let error = with(key, value).expect_err(key).to_string();
            assert!(error.contains(named), "{key}: {error}");
        }
    }

    #[test]
    fn sliding_windows_follow_the_family() {
        let qwen = with("use_sliding_window", "true").unwrap();
        assert_eq!(qwen.windows[27], None, "sliding_window is null");
        let mut json: Value = serde_json::from_str(QWEN3).unwrap();
        (json["use_sliding_window"], json["sliding_window"], json["max_window_layers"]) =
            (true.into(), 64.into(), 20.into());
        let windows = Config::parse(&json.to_string()).unwrap().windows;
        assert_eq!((windows[19], windows[20]), (None, Some(64)));
        json["architectures"] = serde_json::json!(["MistralForCausalLM"]);
        assert_eq!(Config::parse(&json.to_string()).unwrap().windows, vec![Some(64); 28]);
    }

    /// As transformers 5.23 was seen to read them.
    #[test]
    fn keys_that_stand_twice_or_not_at_all_are_read_as_transformers_does() {
        let base = r#"{"architectures":["Qwen2ForCausalLM"],"hidden_size":64,"num_attention_heads":4,
            "intermediate_size":64,"num_hidden_layers":2,"vocab_size":9,"max_position_embeddings":128}"#;
        let with = |changes: Value| {
            let mut json: Value = serde_json::from_str(base).unwrap();
            changes.as_object().unwrap().iter().for_each(|(k, v)| json[k] = v.clone());
            Config::parse(&json.to_string()).unwrap()
        };
        let yarn = |original: u64| serde_json::json!({"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":original});
        let inside = with(serde_json::json!({"rope_scaling": yarn(32)}));
        let above = with(serde_json::json!({"rope_scaling": yarn(64), "original_max_position_embeddings": 32}));
        assert_eq!(inside.rope, above.rope, "the one above counts");
        let both =
            with(serde_json::json!({"rope_scaling": yarn(32), "rope_parameters": {"rope_type":"linear","factor":2.0}}));
        assert_eq!(inside.rope, both.rope, "rope_scaling counts");
        let sliding = |window: Value| {
            let mut json = serde_json::json!({"use_sliding_window": true, "max_window_layers": 0});
            if !window.is_string() {
                json["sliding_window"] = window;
            }
            with(json).windows
        };
        assert_eq!(sliding("absent".into()), [Some(4096); 2]);
        assert_eq!(sliding(Value::Null), [None; 2]);
        assert_eq!(sliding(5.into()), [Some(5); 2]);
    }
}
