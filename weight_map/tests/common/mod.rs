//! Decoders, and the lists that servers would give for them.

use proptest::prelude::*;
use weight_map::{Decoder, DeltaNet, Dtype, Experts, Family, ServerTensor};

/// How a server holds the weights.
#[derive(Clone, Debug)]
pub struct Layout {
    pub merge: bool,
    /// Names of the stacks of all experts' gate and up, and down.
    pub stacks: Option<[&'static str; 2]>,
    pub prefix: &'static str,
    pub dtype: Dtype,
    pub pad_vocab: bool,
    pub alias_head: bool,
    pub buffer: bool,
    /// One allocation for every this many tensors.
    pub per_allocation: usize,
}

pub fn decoder() -> impl Strategy<Value = Decoder> {
    let sizes = (1usize..4, 1usize..6, 1usize..6, 1usize..4, 1usize..3, 1usize..5, 2usize..40);
    (sizes, any::<[bool; 7]>(), delta_net(), experts()).prop_map(|(sizes, flags, delta_net, experts)| {
        let (layers, hidden, intermediate, heads, kv_heads, head_dim, vocab) = sizes;
        Decoder {
            family: Family::Qwen3,
            layers,
            hidden: 2 * hidden,
            intermediate: 2 * intermediate,
            heads,
            kv_heads,
            head_dim: 2 * head_dim,
            vocab,
            attention_bias: flags[0],
            output_bias: flags[1],
            mlp_bias: flags[2],
            qk_norm: flags[3],
            output_gate: flags[5],
            delta_net,
            experts,
            wrapped: flags[6],
            tied: flags[4],
        }
    })
}

/// Of as many layers as any decoder here has.
fn delta_net() -> impl Strategy<Value = Option<DeltaNet>> {
    let sizes = (1usize..3, 1usize..4, 1usize..5, 1usize..5, 1usize..5);
    proptest::option::of((sizes, any::<[bool; 3]>())).prop_map(|drawn| {
        drawn.map(|((key_heads, group, key_dim, value_dim, conv_width), layers)| DeltaNet {
            key_heads,
            value_heads: key_heads * group,
            key_dim,
            value_dim,
            conv_width,
            layers: layers.to_vec(),
        })
    })
}

/// Likewise.
fn experts() -> impl Strategy<Value = Option<Experts>> {
    let sizes = (1usize..5, 1usize..7, proptest::option::of(1usize..5));
    proptest::option::of((sizes, any::<[bool; 3]>())).prop_map(|drawn| {
        drawn.map(|((count, intermediate, shared), layers)| Experts {
            count,
            per_token: 1,
            intermediate,
            shared,
            layers: layers.to_vec(),
        })
    })
}

pub fn layout() -> impl Strategy<Value = Layout> {
    let prefix = prop_oneof![Just("model."), Just("language_model.model."), Just("model.language_model."), Just("")];
    let dtype = prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::BF16)];
    let stacks =
        prop_oneof![Just(None), Just(Some(["gate_up_proj", "down_proj"])), Just(Some(["w13_weight", "w2_weight"])),];
    (prefix, dtype, stacks, any::<[bool; 4]>(), 1usize..20).prop_map(
        |(prefix, dtype, stacks, flags, per_allocation)| Layout {
            merge: flags[0],
            stacks,
            prefix,
            dtype,
            pad_vocab: flags[1],
            alias_head: flags[2],
            buffer: flags[3],
            per_allocation,
        },
    )
}

pub fn contiguous(shape: &[usize]) -> Vec<usize> {
    (0..shape.len()).map(|axis| shape[axis + 1..].iter().product()).collect()
}

/// Names and shapes as the server has them, before they are placed in memory.
fn named(decoder: &Decoder, layout: &Layout) -> Vec<(String, Vec<usize>)> {
    let mut list: Vec<(String, Vec<usize>)> = Vec::new();
    for tensor in decoder.tensors() {
        let mut shape = tensor.shape.clone();
        let is_vocab = tensor.name.contains("embed_tokens") || tensor.name == "lm_head.weight";
        if is_vocab && layout.pad_vocab {
            shape[0] = shape[0].next_multiple_of(64);
        }
        let name = match tensor.name.strip_prefix(decoder.module()).and_then(|rest| rest.strip_prefix('.')) {
            Some(rest) => format!("{}{rest}", layout.prefix),
            None => tensor.name.clone(),
        };
        if let Some((name, shape)) = layout.stacks.and_then(|stacks| stacked(&name, &shape, stacks)) {
            match list.iter_mut().find(|(before, _)| *before == name) {
                Some(_) if tensor.name.ends_with(".up_proj.weight") => {}
                Some((_, before)) => before[0] += 1,
                None => list.push((name, shape)),
            }
            continue;
        }
        let merged = [("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj")]
            .into_iter()
            .chain([("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")])
            .chain([("in_proj_qkv", "in_proj_qkvz"), ("in_proj_z", "in_proj_qkvz")])
            .chain([("in_proj_b", "in_proj_ba"), ("in_proj_a", "in_proj_ba")])
            .find(|(part, _)| layout.merge && name.contains(&format!(".{part}.")))
            .map(|(part, merged)| name.replace(&format!(".{part}."), &format!(".{merged}.")));
        let name = merged.unwrap_or(name);
        match list.iter_mut().find(|(before, _)| *before == name) {
            Some((_, before)) => before[0] += shape[0],
            None => list.push((name, shape)),
        }
    }
    list
}

/// The stack that an expert's matrix is a part of, as if it were the only expert.
fn stacked(name: &str, shape: &[usize], [gate_up, down]: [&str; 2]) -> Option<(String, Vec<usize>)> {
    let (module, rest) = name.split_once(".experts.")?;
    let (_, part) = rest.split_once('.')?;
    Some(match part {
        "down_proj.weight" => (format!("{module}.experts.{down}"), vec![1, shape[0], shape[1]]),
        _ => (format!("{module}.experts.{gate_up}"), vec![1, 2 * shape[0], shape[1]]),
    })
}

/// A valid server list.
pub fn server(decoder: &Decoder, layout: &Layout) -> Vec<ServerTensor> {
    let mut offset = 0;
    let mut list = Vec::new();
    for (index, (name, shape)) in named(decoder, layout).into_iter().enumerate() {
        if index % layout.per_allocation == 0 {
            offset = 0;
        }
        let bytes = shape.iter().product::<usize>() * layout.dtype.size();
        let (strides, allocation) = (contiguous(&shape), index / layout.per_allocation);
        list.push(ServerTensor { name, dtype: layout.dtype, shape, strides, allocation, offset });
        offset += bytes as u64;
    }
    if decoder.tied && layout.alias_head {
        let mut head = list[0].clone();
        head.name = "lm_head.weight".into();
        list.push(head);
    }
    if layout.buffer {
        let mut other = list[0].clone();
        (other.name, other.allocation) = ("model.visual.patch_embed.proj.weight".into(), 1_000_001);
        list.push(other);
        list.push(ServerTensor {
            name: "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
            dtype: Dtype::F32,
            shape: vec![4],
            strides: vec![1],
            allocation: 1_000_000,
            offset: 0,
        });
    }
    list
}
