//! Names: what a server calls a tensor, and what the model's files call it.

use crate::gguf_names::hf_name;

/// Modules that servers and multi-modal checkpoints wrap around the decoder.
const WRAPPERS: [&str; 6] = ["model", "language_model", "text_model", "transformer", "module", "_orig_mod"];

/// The file name of the tensor that a server calls `name`.
///
/// Wrapping modules are dropped (`language_model.model.layers.0.…`, `model.language_model.layers.0.…`
/// and a bare `layers.0.…` all become `model.layers.0.…`), and llama.cpp's names are translated (see
/// [`hf_name`](crate::hf_name)). A name that is not the decoder's own, such as `visual.blocks.0.…`, comes
/// back unchanged, and is then unknown to the expected list.
pub fn canonical_name(name: &str) -> String {
    if let Some(name) = hf_name(name) {
        return name;
    }
    let mut rest = name;
    loop {
        let (head, tail) = rest.split_once('.').unwrap_or((rest, ""));
        match head {
            // vLLM has a module of its own around the stacks.
            "layers" => return format!("model.{}", rest.replacen(".experts.routed_experts.", ".experts.", 1)),
            "embed_tokens" | "norm" => return format!("model.{rest}"),
            "lm_head" => return rest.to_owned(),
            _ if WRAPPERS.contains(&head) && !tail.is_empty() => rest = tail,
            _ => return name.to_owned(),
        }
    }
}

/// Whether `name` belongs to a part of the model beside the decoder, which is left alone on purpose: a vision tower, or layers
/// that predict several tokens ahead.
pub fn is_other_part(name: &str) -> bool {
    name.split('.').find(|module| !WRAPPERS.contains(module)).is_some_and(|module| ["visual", "mtp"].contains(&module))
}

/// Whether `name` is a tensor that servers hold and nobody trains: rotary tables (llama.cpp's
/// `rope_freqs.weight` is one) and the scale buffers of an unquantized key-value cache.
pub fn is_known_buffer(name: &str) -> bool {
    const SUFFIXES: [&str; 8] = [
        "rope_freqs.weight",
        "rotary_emb.inv_freq",
        "rotary_emb.original_inv_freq",
        "rotary_emb.cos_sin_cache",
        "attn._q_scale",
        "attn._k_scale",
        "attn._v_scale",
        "attn._prob_scale",
    ];
    SUFFIXES.iter().any(|suffix| name.strip_suffix(suffix).is_some_and(|head| head.is_empty() || head.ends_with('.')))
}

/// What vLLM and SGLang merge by default, with its parts in row order.
const MERGED: [(&str, &[&str]); 4] = [
    ("qkv_proj", &["q_proj", "k_proj", "v_proj"]),
    ("gate_up_proj", &["gate_proj", "up_proj"]),
    ("in_proj_qkvz", &["in_proj_qkv", "in_proj_z"]),
    ("in_proj_ba", &["in_proj_b", "in_proj_a"]),
];

/// More experts than any layer has.
pub const EXPERTS_MAX: usize = 4096;

/// How the experts of a layer are stacked, (experts, rows, columns), and what of each lies there: transformers and some files, then
/// vLLM and SGLang.
const STACKED: [(&str, &[&str]); 4] = [
    ("gate_up_proj", &["gate_proj", "up_proj"]),
    ("down_proj", &["down_proj"]),
    ("w13_weight", &["gate_proj", "up_proj"]),
    ("w2_weight", &["down_proj"]),
];

/// The matrices that a stack of this name and shape holds, in the order of its bytes; none if it is no stack. Whoever reads the
/// files of a model takes them for tensors of their own.
pub fn unstacked(name: &str, shape: &[usize]) -> Option<Vec<(String, [usize; 2])>> {
    let &[experts, rows, cols] = shape else { return None };
    let of_one = stacked_parts(name, 1)?.len();
    // Of nothing there could be any number.
    if !(1..=EXPERTS_MAX).contains(&experts) || rows == 0 || cols == 0 || !rows.is_multiple_of(of_one) {
        return None;
    }
    let parts = stacked_parts(name, experts)?;
    Some(parts.into_iter().map(|part| (part, [rows / of_one, cols])).collect())
}

/// The stack of vLLM and SGLang that holds the expert's matrix of this file name, and how many matrices of an expert it holds.
pub fn stack_of(name: &str) -> Option<(String, usize)> {
    let module = name.strip_suffix(".weight")?;
    let (parent, part) = module.rsplit_once('.')?;
    let (experts, number) = parent.rsplit_once('.')?;
    let known = experts.ends_with(".experts") && number.bytes().all(|digit| digit.is_ascii_digit());
    let (stack, parts) = STACKED[2..].iter().find(|(_, parts)| parts.contains(&part)).filter(|_| known)?;
    Some((format!("{experts}.{stack}"), parts.len()))
}

/// The matrices that a stack of `experts` holds, one under the other, if a tensor of this name is one:
/// `….experts.gate_up_proj` and `….experts.w13_weight` those of gate and up in turn, `….experts.down_proj` and `….experts.w2_weight`
/// those of down.
pub fn stacked_parts(name: &str, experts: usize) -> Option<Vec<String>> {
    let (parent, stack) = name.rsplit_once('.')?;
    let (_, parts) = STACKED.iter().find(|(name, _)| *name == stack)?;
    if !parent.ends_with(".experts") {
        return None;
    }
    let of_one = |expert: usize| parts.iter().map(move |part| format!("{parent}.{expert}.{part}.weight"));
    Some((0..experts).flat_map(of_one).collect())
}

/// The merged tensor that holds the one with this file name in vLLM and SGLang, if they merge it.
pub(crate) fn merged_name(name: &str) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    let (parent, part) = module.rsplit_once('.')?;
    let (merged, _) = MERGED.iter().find(|(_, parts)| parts.contains(&part))?;
    Some(format!("{parent}.{merged}.{kind}"))
}

/// The parts, in row order, of a merged tensor that vLLM or SGLang makes by default.
pub(crate) fn default_parts(name: &str) -> Option<Vec<String>> {
    let (module, kind) = name.rsplit_once('.')?;
    if kind != "weight" && kind != "bias" {
        return None;
    }
    let (parent, merged) = module.rsplit_once('.')?;
    let (_, parts) = MERGED.iter().find(|(name, _)| *name == merged)?;
    Some(parts.iter().map(|part| format!("{parent}.{part}.{kind}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_modules_are_stripped_to_the_name_in_the_files() {
        for (server, file) in [
            ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
            ("language_model.model.layers.3.input_layernorm.weight", "model.layers.3.input_layernorm.weight"),
            ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
            ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.qkv_proj.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("model.layers.1.mlp.experts.routed_experts.w13_weight", "model.layers.1.mlp.experts.w13_weight"),
            ("model.norm.weight", "model.norm.weight"),
            ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
            ("output.weight", "lm_head.weight"),
        ] {
            assert_eq!(canonical_name(server), file);
        }
    }

    #[test]
    fn the_name_of_another_part_of_the_model_is_left_alone() {
        for name in ["visual.blocks.0.norm1.weight", "vision_tower.layers.0.mlp.up_proj.weight", "model", ""] {
            assert_eq!(canonical_name(name), name);
        }
    }

    #[test]
    fn parts_beside_the_decoder_are_told_by_their_module() {
        for name in ["visual.blocks.0.norm1.weight", "model.visual.patch_embed.proj.weight", "mtp.fc.weight"] {
            assert!(is_other_part(name), "{name}");
        }
        for name in [
            "model.layers.0.visual.weight",
            "visuals.x.weight",
            "model",
            "",
            "vision_tower.layers.0.mlp.up_proj.weight",
        ] {
            assert!(!is_other_part(name), "{name}");
        }
    }

    #[test]
    fn a_stack_is_its_experts_one_after_the_other() {
        let part = |name: &str, rows| (format!("model.layers.0.mlp.experts.{name}_proj.weight"), [rows, 5]);
        let stack = |name: &str, shape: &[usize]| unstacked(&format!("model.layers.0.mlp.experts.{name}"), shape);
        assert_eq!(
            stack("gate_up_proj", &[2, 6, 5]),
            Some(vec![part("0.gate", 3), part("0.up", 3), part("1.gate", 3), part("1.up", 3)])
        );
        assert_eq!(stack("down_proj", &[2, 6, 5]), Some(vec![part("0.down", 6), part("1.down", 6)]));
        for (name, shape) in [
            ("gate_up_proj", &[2, 7, 5][..]),
            ("gate_up_proj", &[6, 5]),
            ("down_proj", &[0, 6, 5]),
            ("down_proj", &[4096, 0, 5]),
            ("gate_up_proj", &[4096, 2, 0]),
            ("down_proj", &[1 << 40, 6, 5]),
            ("0.down_proj", &[2, 6, 5]),
            ("side_proj", &[2, 6, 5]),
        ] {
            assert_eq!(stack(name, shape), None, "{name} {shape:?}");
        }
        assert_eq!(unstacked("model.layers.0.mlp.gate_up_proj", &[2, 6, 5]), None);
    }

    #[test]
    fn only_whole_module_names_are_known_buffers() {
        assert!(is_known_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"));
        assert!(is_known_buffer("rotary_emb.inv_freq"));
        assert!(!is_known_buffer("model.layers.0.self_attn.my_rotary_emb.inv_freq"));
        assert!(!is_known_buffer("model.layers.0.self_attn.q_proj.weight"));
    }
}
