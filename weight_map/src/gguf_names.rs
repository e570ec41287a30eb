//! Names: what llama.cpp calls a decoder's tensors.

/// llama.cpp's modules beside the layers, and the files'.
const MODULES: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// llama.cpp's modules of a layer, `blk.N.` before them, and the files', `model.layers.N.` before them.
const LAYER_MODULES: [(&str, &str); 12] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    // Of a converter that was told to merge them.
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// What the files call the tensor that llama.cpp calls `name`, if it is one of a dense decoder:
/// `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
pub fn hf_name(name: &str) -> Option<String> {
    rename(name, ["blk.", "model.layers."], |(gguf, hf)| (gguf, hf))
}

/// What llama.cpp calls the tensor that the files call `name`; the inverse of [`hf_name`].
pub fn gguf_name(name: &str) -> Option<String> {
    rename(name, ["model.layers.", "blk."], |(gguf, hf)| (hf, gguf))
}

type Pair = (&'static str, &'static str);

fn rename(name: &str, [from, to]: [&str; 2], direction: fn(Pair) -> Pair) -> Option<String> {
    let (module, kind) = name.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let lookup = |table: &[Pair], module: &str| {
        table.iter().map(|pair| direction(*pair)).find(|(from, _)| *from == module).map(|(_, to)| to)
    };
    if let Some(rest) = module.strip_prefix(from) {
        let (layer, module) = rest.split_once('.')?;
        let plain = layer.parse::<usize>().is_ok_and(|number| number.to_string() == layer);
        return lookup(&LAYER_MODULES, module).filter(|_| plain).map(|module| format!("{to}{layer}.{module}.{kind}"));
    }
    lookup(&MODULES, module).map(|module| format!("{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Decoder, Family};

    #[test]
    fn every_tensor_of_every_decoder_has_a_name_in_both_and_comes_back() {
        let decoder = Decoder {
            family: Family::Llama,
            layers: 12,
            hidden: 8,
            intermediate: 8,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            vocab: 8,
            attention_bias: true,
            output_bias: true,
            mlp_bias: true,
            qk_norm: true,
            output_gate: false,
            delta_net: None,
            experts: None,
            wrapped: false,
            tied: false,
        };
        for tensor in decoder.tensors() {
            let gguf = gguf_name(&tensor.name).unwrap_or_else(|| panic!("{} has no name", tensor.name));
            assert_eq!(hf_name(&gguf).as_ref(), Some(&tensor.name), "{gguf}");
        }
    }

    #[test]
    fn names_are_those_of_llama_cpp() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("blk.11.attn_k.bias", "model.layers.11.self_attn.k_proj.bias"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ] {
            assert_eq!(hf_name(gguf).as_deref(), Some(hf));
        }
    }

    #[test]
    fn other_names_have_none() {
        for name in ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "blk.0.ssm_in.weight", "output", "output.scale"] {
            assert_eq!(hf_name(name), None, "{name}");
        }
    }
}
