//! Properties of the mapping over random decoders and the ways that servers hold them.

mod common;

use common::{contiguous, decoder, layout, server};
use proptest::prelude::*;
use std::collections::HashMap;
use weight_map::{Error, Packing, ServerTensor, View, map};

/// Views of each server tensor, sorted by offset.
fn by_server_tensor(views: &[View]) -> HashMap<usize, Vec<&View>> {
    let mut groups: HashMap<usize, Vec<&View>> = HashMap::new();
    for view in views {
        groups.entry(view.server_tensor).or_default().push(view);
    }
    for group in groups.values_mut() {
        group.sort_by_key(|view| view.offset);
    }
    groups
}

/// One way in which an exporter's list can be wrong.
#[derive(Clone, Copy, Debug)]
enum Corruption {
    Drop,
    Duplicate,
    Rename,
    GrowAxis,
    ShrinkAxis,
    Stride,
    Misalign,
    MoveOntoAnother,
    ForgetStrides,
    HugeOffset,
    HugeShape,
}

const CORRUPTIONS: [Corruption; 11] = [
    Corruption::Drop,
    Corruption::Duplicate,
    Corruption::Rename,
    Corruption::GrowAxis,
    Corruption::ShrinkAxis,
    Corruption::Stride,
    Corruption::Misalign,
    Corruption::MoveOntoAnother,
    Corruption::ForgetStrides,
    Corruption::HugeOffset,
    Corruption::HugeShape,
];

/// Damages tensor `at`. False where the damage would leave a list that is still right.
fn corrupt(list: &mut Vec<ServerTensor>, at: usize, axis: usize, what: Corruption) -> bool {
    let axis = axis % list[at].shape.len();
    let tensor = &mut list[at];
    match what {
        Corruption::Drop => {
            list.remove(at);
        }
        Corruption::Duplicate => {
            let mut copy = tensor.clone();
            copy.allocation += 500_000;
            list.push(copy);
        }
        Corruption::Rename => tensor.name = format!("visual.{}", tensor.name),
        Corruption::GrowAxis => {
            tensor.shape[axis] += 1;
            tensor.strides = contiguous(&tensor.shape);
            // One more row may be exactly the padding that servers add.
            return !(tensor.shape.len() == 2 && tensor.shape[0].is_multiple_of(64));
        }
        Corruption::ShrinkAxis => {
            tensor.shape[axis] -= 1;
            tensor.strides = contiguous(&tensor.shape);
            let vocab = tensor.name.contains("embed_tokens") || tensor.name.contains("lm_head");
            return !(vocab && axis == 0 && tensor.shape[0].is_multiple_of(64));
        }
        Corruption::Stride => {
            tensor.strides[axis] += 1;
            return tensor.shape[axis] > 1;
        }
        Corruption::Misalign => tensor.offset += 1,
        Corruption::MoveOntoAnother => {
            let other = list[(at + 1) % list.len()].clone();
            list[at].allocation = other.allocation;
            list[at].offset = other.offset;
        }
        Corruption::ForgetStrides => {
            tensor.strides.pop();
        }
        Corruption::HugeOffset => tensor.offset = u64::MAX - 1,
        Corruption::HugeShape => tensor.shape[axis] = usize::MAX / 2,
    }
    true
}

proptest! {
    // A failure prints its shrunken input; nothing is written beside the sources.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_expected_tensor_is_covered_exactly_once_and_in_order(decoder in decoder(), layout in layout()) {
        let expected = decoder.tensors();
        let server = server(&decoder, &layout);
        let map = map(&expected, &server, &[]).unwrap();
        let names: Vec<_> = map.views.iter().map(|view| (&view.name, &view.shape, view.role)).collect();
        let wanted: Vec<_> = expected.iter().map(|tensor| (&tensor.name, &tensor.shape, tensor.role)).collect();
        prop_assert_eq!(names, wanted);
    }

    #[test]
    fn views_tile_the_merged_tensor_and_never_overlap(decoder in decoder(), layout in layout()) {
        let server = server(&decoder, &layout);
        let map = map(&decoder.tensors(), &server, &[]).unwrap();
        for (index, views) in by_server_tensor(&map.views) {
            let tensor = &server[index];
            let mut at = tensor.offset;
            for view in &views {
                prop_assert_eq!(view.offset, at, "{} leaves a gap or overlaps", &view.name);
                prop_assert_eq!(view.allocation, tensor.allocation);
                prop_assert_eq!(view.dtype, tensor.dtype);
                at += view.bytes() as u64;
            }
            let end = tensor.offset + (tensor.shape.iter().product::<usize>() * tensor.dtype.size()) as u64;
            let padded = tensor.name.contains("embed_tokens") || tensor.name.contains("lm_head");
            prop_assert!(at == end || (padded && at < end), "{} ends at {at}, want {end}", tensor.name);
        }
    }

    #[test]
    fn a_damaged_list_is_refused_by_name(
        decoder in decoder(),
        layout in layout(),
        at in any::<prop::sample::Index>(),
        axis in 0usize..2,
        kind in 0..CORRUPTIONS.len(),
    ) {
        let expected = decoder.tensors();
        let mut list = server(&decoder, &layout);
        // Only weights: dropping a buffer, a vision tower or the alias of a tied head leaves a list that is right.
        let weights = list.len()
            - 2 * usize::from(layout.buffer)
            - usize::from(decoder.tied && layout.alias_head);
        let at = at.index(weights);
        let spoilt = corrupt(&mut list, at, axis, CORRUPTIONS[kind]);
        prop_assume!(spoilt);
        let result = map(&expected, &list, &[]);
        prop_assert!(result.is_err(), "{:?} of tensor {at} was accepted: {:?}", CORRUPTIONS[kind], list);
        prop_assert!(result.unwrap_err().to_string().contains('`'), "the message names no tensor");
    }

    #[test]
    fn any_list_of_numbers_is_answered_without_a_panic(
        decoder in decoder(),
        layout in layout(),
        values in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0usize..4), 1..8),
    ) {
        let mut list = server(&decoder, &layout);
        for (at, value, field) in values {
            let at = at.index(list.len());
            let tensor = &mut list[at];
            match field {
                0 => tensor.offset = value,
                1 => tensor.shape = vec![value as usize; (value % 4) as usize],
                2 => tensor.strides = vec![value as usize; (value % 4) as usize],
                _ => tensor.allocation = value as usize,
            }
        }
        let _ = map(&decoder.tensors(), &list, &[]);
    }

    #[test]
    fn the_packing_of_the_running_server_overrides_the_default_order(decoder in decoder(), mut layout in layout()) {
        layout.merge = true;
        let server = server(&decoder, &layout);
        let packing: Vec<Packing> = server
            .iter()
            .filter(|tensor| tensor.name.ends_with("gate_up_proj.weight"))
            .map(|tensor| Packing {
                merged: tensor.name.clone(),
                parts: ["up_proj", "gate_proj"]
                    .map(|part| weight_map::canonical_name(&tensor.name).replace("gate_up_proj", part))
                    .to_vec(),
            })
            .collect();
        let map = map(&decoder.tensors(), &server, &packing).unwrap();
        for layer in (0..decoder.layers).filter(|layer| decoder.experts_of(*layer).is_none()) {
            let place = |part: &str| {
                let name = format!("{}.layers.{layer}.mlp.{part}.weight", decoder.module());
                map.views[map.find(&name).unwrap()].offset
            };
            prop_assert!(place("up_proj") < place("gate_proj"));
        }
    }
}

#[test]
fn a_missing_tensor_is_one_error_that_lists_the_names() {
    let decoder = sample();
    let mut list = server(&decoder, &plain());
    list.retain(|tensor| !tensor.name.contains("o_proj"));
    let Err(Error::Missing { names }) = map(&decoder.tensors(), &list, &[]) else { panic!("accepted") };
    assert_eq!(names, ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"]);
}

#[test]
fn a_tensor_parallel_shard_is_recognised() {
    let decoder = sample();
    let mut list = server(&decoder, &plain());
    let down = list.iter_mut().find(|tensor| tensor.name.contains("down_proj")).unwrap();
    down.shape[1] /= 2;
    down.strides = contiguous(&down.shape);
    let error = map(&decoder.tensors(), &list, &[]).unwrap_err().to_string();
    assert!(error.contains("down_proj") && error.contains("one of 2 tensor-parallel shards"), "{error}");
}

#[test]
fn an_unknown_name_is_taken_for_another_one_of_a_tensor_that_is_mapped_and_of_nothing_else() {
    let decoder = sample();
    let list = server(&decoder, &plain());
    let at = list.iter().position(|tensor| tensor.name.contains("down_proj")).unwrap();
    let with = |change: &dyn Fn(&mut ServerTensor)| {
        let mut alias = ServerTensor { name: "model.layers.0.mlp.experts.down.weight".into(), ..list[at].clone() };
        change(&mut alias);
        map(&decoder.tensors(), &[&list[..], &[alias]].concat(), &[]).map_err(Box::new)
    };
    let found = with(&|_| {}).unwrap();
    assert_eq!(found, map(&decoder.tensors(), &list, &[]).unwrap());
    let changes: [&dyn Fn(&mut ServerTensor); 4] =
        [&|alias| alias.offset += 2, &|alias| alias.allocation += 50, &|alias| alias.shape.reverse(), &|alias| {
            alias.dtype = weight_map::Dtype::F16
        }];
    for change in changes {
        let error = with(change).unwrap_err();
        assert!(matches!(&*error, Error::Unmapped { name, .. } if name.contains("experts.down")), "{error}");
    }
}

#[test]
fn a_separate_head_in_a_tied_model_is_refused_by_name() {
    let decoder = sample();
    let mut list = server(&decoder, &plain());
    let mut head = list[0].clone();
    head.name = "lm_head.weight".into();
    head.allocation = 77;
    list.push(head);
    let error = map(&decoder.tensors(), &list, &[]).unwrap_err();
    assert!(matches!(&error, Error::TiedCopy { name, .. } if name == "lm_head.weight"), "{error}");
}

#[test]
fn an_aliased_head_in_an_untied_model_is_an_overlap() {
    let decoder = weight_map::Decoder { tied: false, ..sample() };
    let mut list = server(&decoder, &plain());
    let (embedding, head) = (list[0].clone(), list.last_mut().unwrap());
    head.allocation = embedding.allocation;
    head.offset = embedding.offset;
    let error = map(&decoder.tensors(), &list, &[]).unwrap_err();
    assert!(matches!(&error, Error::Overlap { .. }) && error.to_string().contains("lm_head"), "{error}");
}

#[test]
fn padding_of_the_vocabulary_cannot_hide_a_neighbour() {
    let decoder = sample();
    let layout = common::Layout { pad_vocab: true, ..plain() };
    let mut list = server(&decoder, &layout);
    let vocab_bytes = (decoder.vocab * decoder.hidden * layout.dtype.size()) as u64;
    list[1].allocation = list[0].allocation;
    list[1].offset = list[0].offset + vocab_bytes;
    let error = map(&decoder.tensors(), &list, &[]).unwrap_err();
    assert!(matches!(error, Error::Overlap { .. }), "{error}");
}

#[test]
fn a_packing_that_names_what_is_not_there_is_refused() {
    let decoder = sample();
    let list = server(&decoder, &common::Layout { merge: true, ..plain() });
    let packing = |merged: &str, part: &str| [Packing { merged: merged.into(), parts: vec![part.into()] }];
    for packing in [
        packing("model.layers.9.mlp.gate_up_proj.weight", "model.layers.9.mlp.up_proj.weight"),
        packing("model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.side_proj.weight"),
    ] {
        let error = map(&decoder.tensors(), &list, &packing).unwrap_err();
        assert!(matches!(error, Error::Packing { .. }), "{error}");
    }
}

#[test]
fn a_part_that_a_packing_forgets_is_a_wrong_merged_shape() {
    let decoder = sample();
    let list = server(&decoder, &common::Layout { merge: true, ..plain() });
    let merged = "model.layers.0.mlp.gate_up_proj.weight";
    let packing = [Packing { merged: merged.into(), parts: vec!["model.layers.0.mlp.up_proj.weight".into()] }];
    let error = map(&decoder.tensors(), &list, &packing).unwrap_err();
    assert!(matches!(&error, Error::Merged { name, .. } if name == merged), "{error}");
}

#[test]
fn shapes_of_a_decoder_are_those_of_the_files() {
    let tensors = sample().tensors();
    let shape = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap().shape.clone();
    assert_eq!(shape("model.embed_tokens.weight"), [10, 8]);
    assert_eq!(shape("model.layers.1.self_attn.q_proj.weight"), [12, 8]);
    assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), [6, 8]);
    assert_eq!(shape("model.layers.1.self_attn.o_proj.weight"), [8, 12]);
    assert_eq!(shape("model.layers.0.self_attn.q_norm.weight"), [6]);
    assert_eq!(shape("model.layers.0.mlp.down_proj.weight"), [8, 20]);
    assert!(tensors.iter().all(|tensor| tensor.name != "lm_head.weight"));
    assert_eq!(tensors.len(), 2 + 2 * 11);
}

fn sample() -> weight_map::Decoder {
    weight_map::Decoder {
        family: weight_map::Family::Qwen3,
        layers: 2,
        hidden: 8,
        intermediate: 20,
        heads: 2,
        kv_heads: 1,
        head_dim: 6,
        vocab: 10,
        attention_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: true,
        output_gate: false,
        delta_net: None,
        experts: None,
        wrapped: false,
        tied: true,
    }
}

fn plain() -> common::Layout {
    common::Layout {
        stacks: None,
        merge: false,
        prefix: "model.",
        dtype: weight_map::Dtype::BF16,
        pad_vocab: false,
        alias_head: false,
        buffer: false,
        per_allocation: 3,
    }
}
