//! The metadata that say what llama.cpp computes, from config.json, and whether a file's say the same.

use anyhow::{Result, bail};
use ipc::{GgufFile, GgufValue};
use model::{Config, Scaling};
use weight_map::Family;

/// llama.cpp's name of the family's architecture.
fn architecture(config: &Config) -> &'static str {
    match config.decoder.family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
        Family::Qwen35 => "qwen35",
    }
}

/// Refuses models that llama.cpp keeps in another form than the files.
///
/// # Errors
/// For models with recurrent layers or with experts.
pub fn refuse_other_forms(config: &Config) -> Result<()> {
    if config.decoder.experts.is_some() {
        bail!(
            "a GGUF file of a mixture of experts is not supported: llama.cpp stacks the experts in an order of its own; serve the \
             safetensors from a program that calls apollod.export, or with the embedded engine"
        );
    }
    if config.decoder.family == Family::Qwen35 {
        bail!(
            "a GGUF file of Qwen3.5 is not supported: llama.cpp keeps norms, decay and heads of its recurrent layers in a form of \
             its own, which cannot be trained in place; serve the safetensors with vLLM or transformers"
        );
    }
    Ok(())
}

/// `general.*` and the keys of the architecture.
pub fn metadata(config: &Config, name: &str) -> Result<Vec<(String, GgufValue)>> {
    let architecture = architecture(config);
    if config.decoder.output_bias && architecture != "llama" {
        bail!("llama.cpp knows no bias of o_proj in its architecture {architecture} (attention_bias in config.json)");
    }
    let mut metadata = vec![
        ("general.architecture".into(), GgufValue::string(architecture)),
        ("general.type".into(), GgufValue::string("model")),
        ("general.name".into(), GgufValue::string(name)),
    ];
    // llama.cpp attends to the whole context: within the window that is the same.
    let context = config.windows.iter().flatten().fold(config.max_position_embeddings, |least, &w| least.min(w));
    let d = &config.decoder;
    let mut keys = shapes(config);
    keys.extend([
        ("context_length", GgufValue::U32(context as u32)),
        ("vocab_size", GgufValue::U32(d.vocab as u32)),
        ("rope.dimension_count", GgufValue::U32(d.head_dim as u32)),
    ]);
    keys.extend(scaling(config)?);
    metadata.extend(keys.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)));
    Ok(metadata)
}

/// The keys that a file of the same model has with the same values.
fn shapes(config: &Config) -> Vec<(&'static str, GgufValue)> {
    let d = &config.decoder;
    let size = |n: usize| GgufValue::U32(n as u32);
    vec![
        ("block_count", size(d.layers)),
        ("embedding_length", size(d.hidden)),
        ("feed_forward_length", size(d.intermediate)),
        ("attention.head_count", size(d.heads)),
        ("attention.head_count_kv", size(d.kv_heads)),
        ("attention.key_length", size(d.head_dim)),
        ("attention.value_length", size(d.head_dim)),
        ("attention.layer_norm_rms_epsilon", GgufValue::F32(config.rms_norm_eps)),
        ("rope.freq_base", GgufValue::F32(config.rope.theta as f32)),
    ]
}

fn scaling(config: &Config) -> Result<Vec<(&'static str, GgufValue)>> {
    let kind = |name: &str, factor: f64| {
        vec![("rope.scaling.type", GgufValue::string(name)), ("rope.scaling.factor", GgufValue::F32(factor as f32))]
    };
    match config.rope.scaling {
        Scaling::Default => Ok(Vec::new()),
        Scaling::Linear { factor } => Ok(kind("linear", factor)),
        // In a tensor of its own, which llama.cpp loads in this architecture alone.
        Scaling::Llama3 if architecture(config) == "llama" => Ok(Vec::new()),
        Scaling::Yarn { factor, original, plain: true } => {
            let mut keys = kind("yarn", factor);
            keys.push(("rope.scaling.original_context_length", GgufValue::U32(original as u32)));
            Ok(keys)
        }
        Scaling::Llama3 | Scaling::Yarn { .. } => bail!(
            "cannot write this rope scaling for llama.cpp; make a GGUF of the model with llama.cpp's converter, and \
             give it to `stage --gguf=FILE` or `checkpoint export --gguf-template FILE`"
        ),
    }
}

/// Checks that a GGUF file describes the model of config.json.
///
/// # Errors
/// The first key that says something else.
pub fn check(file: &GgufFile, config: &Config) -> Result<()> {
    refuse_other_forms(config)?;
    let place = file.path().display();
    let (found, want) = (file.architecture()?, architecture(config));
    if found != want {
        bail!("{place}: general.architecture is {found}, config.json's model is {want}: this is another model");
    }
    for (key, want) in shapes(config) {
        let found = match file.architecture_value(key)? {
            Some(found) => found.clone(),
            None => match default(key, config) {
                Some(default) => default,
                None => bail!("{place}: its metadata have no {found}.{key}"),
            },
        };
        if !same(&found, &want) {
            bail!("{place}: {key} is {}, config.json says {}: this is another model", shown(&found), shown(&want));
        }
    }
    check_scaling(file, config)
}

/// What llama.cpp assumes where a key is absent.
fn default(key: &str, config: &Config) -> Option<GgufValue> {
    let d = &config.decoder;
    match key {
        "attention.head_count_kv" => Some(GgufValue::U32(d.heads as u32)),
        "attention.key_length" | "attention.value_length" => Some(GgufValue::U32((d.hidden / d.heads) as u32)),
        "rope.freq_base" => Some(GgufValue::F32(10000.0)),
        _ => None,
    }
}

fn check_scaling(file: &GgufFile, config: &Config) -> Result<()> {
    let kind = file.architecture_value("rope.scaling.type")?.and_then(GgufValue::as_str).unwrap_or("none");
    let factor = file.architecture_value("rope.scaling.factor")?.and_then(GgufValue::as_f64).unwrap_or(1.0);
    let (want_kind, want_factor) = match config.rope.scaling {
        Scaling::Default | Scaling::Llama3 => ("none", factor),
        Scaling::Linear { factor } => ("linear", factor),
        Scaling::Yarn { factor, .. } => ("yarn", factor),
    };
    let table = file.tensors().iter().any(|tensor| tensor.name == "rope_freqs.weight");
    let want_table = config.rope.scaling == Scaling::Llama3;
    if kind != want_kind || !close(factor, want_factor) || table != want_table {
        bail!(
            "{}: its rope scaling is {kind} by {factor}{}, config.json says {:?}: this is another model",
            file.path().display(),
            if table { " with rope_freqs.weight" } else { "" },
            config.rope.scaling
        );
    }
    Ok(())
}

fn same(a: &GgufValue, b: &GgufValue) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => close(a, b),
        _ => a.as_u64().is_some() && a.as_u64() == b.as_u64(),
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * b.abs()
}

fn shown(value: &GgufValue) -> String {
    let number = value.as_u64().map(|n| n.to_string()).or_else(|| value.as_f64().map(|n| n.to_string()));
    number.unwrap_or_else(|| format!("{value:?}"))
}
