//! Saving, loading and repeating: bit for bit.

use crate::common::{Random, Rig, distance, header, settings, stored_norm, tensor, tensors};
use apollo::{Optimizer, Restored, Rule, Settings, StateError, TensorKind};
use compute::Dtype;

fn rig(settings: Settings) -> Rig {
    Rig::new(tensors(), settings, Dtype::BF16)
}

fn run(rig: &mut Rig, r: &mut Random, steps: usize) {
    for _ in 0..steps {
        let t = 1 + r.below(4);
        let g = rig.gradients(r, t);
        rig.apply(&g);
    }
}

/// The same weights with an optimizer that read `state`.
fn resumed(from: &Rig, tensors: Vec<apollo::Tensor>, settings: Settings) -> (Rig, Restored) {
    let mut rig = Rig::new(tensors.clone(), settings.clone(), Dtype::BF16);
    for (i, values) in from.values().iter().enumerate() {
        if (rig.weights[i].rows(), rig.weights[i].cols()) == (from.weights[i].rows(), from.weights[i].cols()) {
            rig.set(i, values);
        }
    }
    let restored = rig.optimizer.load(&mut &from.saved()[..]).expect("what was saved can be loaded");
    (rig, restored)
}

#[test]
fn continuing_after_a_load_is_bit_for_bit_the_uninterrupted_run() {
    // Interrupted at every step of nine, over two refreshes of the projection (gap 3).
    for (at, moments) in (0..9).flat_map(|at| [(at, Dtype::F32), (at, Dtype::BF16)]) {
        let mut r = Random::new("resume");
        let settings = Settings { moments, ..settings() };
        let mut whole = rig(settings.clone());
        run(&mut whole, &mut r, at);
        let (mut second, restored) = resumed(&whole, tensors(), settings);
        assert_eq!(restored, Restored { steps: at as u64, ..Restored::default() });
        assert!(second.snapshot() == whole.snapshot(), "at {at}");
        let rest = r.next();
        let after = |rig: &mut Rig| {
            let mut r = Random::new(&format!("rest {rest}"));
            run(rig, &mut r, 9 - at);
        };
        after(&mut whole);
        after(&mut second);
        assert!(second.snapshot() == whole.snapshot(), "interrupted at {at}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let after = |seed: u64, dtype: Dtype| {
        let mut r = Random::new("repeat");
        let mut rig = Rig::new(tensors(), Settings { seed, ..settings() }, dtype);
        run(&mut rig, &mut r, 5);
        rig.snapshot()
    };
    assert!(after(1, Dtype::BF16) == after(1, Dtype::BF16));
    let (a, b) = (after(1, Dtype::BF16), after(2, Dtype::BF16));
    // The head is under AdamW: only the rounding of its bf16 weights is random.
    for i in [crate::common::TALL, crate::common::WIDE, crate::common::TIED, crate::common::HEAD] {
        assert!(a.0[i] != b.0[i], "tensor {i} does not depend on the seed");
    }
    // In f32 only the projection is.
    let (a, b) = (after(1, Dtype::F32), after(2, Dtype::F32));
    assert!(a.0[crate::common::TALL] != b.0[crate::common::TALL]);
    assert!(a.0[crate::common::HEAD] == b.0[crate::common::HEAD]);
}

#[test]
fn another_rank_resets_the_compressed_tensors_and_names_them() {
    let mut r = Random::new("rank");
    let mut old = rig(settings());
    run(&mut old, &mut r, 4);
    let (mut new, restored) = resumed(&old, tensors(), Settings { rank: 6, ..settings() });
    let reset = vec!["tall".into(), "wide".into(), "tied".into()];
    assert_eq!(restored, Restored { steps: 4, reset, ..Restored::default() });
    assert_eq!(new.optimizer.steps(), 4);
    assert_eq!(stored_norm(&new, crate::common::TALL), 0.0);
    let (before, after) = (header(&old.saved()), header(&new.saved()));
    assert_eq!(before["tensors"][4]["lookup"], after["tensors"][4]["lookup"]);
    run(&mut new, &mut r, 3);
    assert_eq!(new.optimizer.steps(), 7);
}

#[test]
fn tensors_of_another_shape_rule_or_name_start_from_zero_and_are_named() {
    let mut r = Random::new("changed");
    let mut old = rig(settings());
    run(&mut old, &mut r, 4);
    let mut changed = tensors();
    changed[0].rows = 81;
    changed[3].rule = Rule::Frozen;
    changed[4].rows = 31;
    changed.push(tensor("new", 2, 2, TensorKind::Matrix, Rule::Apollo));
    changed[6].name = "renamed".into();
    let mut new = Rig::new(changed, settings(), Dtype::BF16);
    let mut restored = new.optimizer.load(&mut &old.saved()[..]).expect("it can be loaded");
    restored.reset.sort();
    assert_eq!(restored.reset, ["embed", "frozen", "head", "new", "renamed", "tall"]);
    assert_eq!(stored_norm(&new, 1), stored_norm(&old, 1));
}

fn in_bf16() -> Settings {
    Settings { moments: Dtype::BF16, ..settings() }
}

/// Bytes of moments behind the header.
fn moments(state: &[u8]) -> usize {
    state.len() - 16 - u64::from_le_bytes(state[8..16].try_into().expect("eight bytes")) as usize
}

#[test]
fn moments_in_bf16_take_half_the_memory_and_half_the_state() {
    let mut r = Random::new("halves");
    let (mut wide, mut narrow) = (rig(settings()), rig(in_bf16()));
    for _ in 0..5 {
        let g = wide.gradients(&mut r, 3);
        wide.apply(&g);
        narrow.apply(&g);
    }
    // But for the vector, 24 elements in each of two moments.
    let half = |bytes: usize| (bytes - 2 * 24 * 4) / 2 + 2 * 24 * 4;
    assert_eq!(narrow.optimizer.state_bytes(), half(wide.optimizer.state_bytes()));
    assert_eq!(moments(&narrow.saved()), half(moments(&wide.saved())));
}

#[test]
fn moments_in_bf16_move_weights_nearly_as_those_in_f32_do() {
    let mut r = Random::new("nearly");
    let make = |settings| Rig::new(tensors(), settings, Dtype::F32);
    let (mut wide, mut narrow) = (make(settings()), make(in_bf16()));
    let start = wide.values();
    for _ in 0..60 {
        let g = wide.gradients(&mut r, 3);
        wide.apply(&g);
        narrow.apply(&g);
    }
    for (i, (a, b)) in wide.values().iter().zip(narrow.values()).enumerate() {
        let (apart, moved) = (distance(a, &b), distance(a, &start[i]));
        println!("{}: {apart:.2e} apart after {moved:.2e}", tensors()[i].name);
        // AdamW divides each element by its own rounded moments, 2^-8 of them; APOLLO takes norms of many.
        assert!(apart <= 0.03 * moved, "{}: {apart} apart after {moved}", tensors()[i].name);
        assert!(i == crate::common::NORM || i == crate::common::FROZEN || apart > 0.0, "the test must compare two");
    }
}

#[test]
fn a_state_in_the_other_type_is_converted_the_same_way_each_time() {
    let trained: Vec<String> = ["tall", "wide", "head", "embed", "tied"].map(String::from).to_vec();
    let mut r = Random::new("convert");
    let mut wide = rig(settings());
    run(&mut wide, &mut r, 6);
    let (narrow, restored) = resumed(&wide, tensors(), in_bf16());
    assert_eq!(restored.steps, 6);
    assert!(restored.reset.is_empty());
    let matrices = |names: &[String]| names.iter().filter(|n| *n != "frozen").cloned().collect::<Vec<_>>();
    assert_eq!(matrices(&restored.converted), trained);
    assert!(resumed(&wide, tensors(), in_bf16()).0.saved() == narrow.saved(), "a replay converts again");
    assert_eq!(stored_norm(&narrow, crate::common::TALL), stored_norm(&wide, crate::common::TALL));

    // What bf16 holds f32 holds too, and rounds to itself.
    let (widened, restored) = resumed(&narrow, tensors(), settings());
    assert_eq!(matrices(&restored.converted), trained);
    assert_eq!(moments(&widened.saved()), moments(&wide.saved()));
    let (again, _) = resumed(&widened, tensors(), in_bf16());
    assert!(again.saved() == narrow.saved());

    // Rounded to either neighbour, not cut.
    let values = |rig: &Rig| {
        let state = rig.saved();
        let bytes = &state[state.len() - moments(&state)..];
        compute::widen(Dtype::F32, bytes)
    };
    let (before, after) = (values(&wide), values(&widened));
    let (mut up, mut down) = (0, 0);
    for (a, b) in before.iter().zip(&after) {
        assert!((a - b).abs() <= a.abs() / 128.0, "{a} became {b}");
        up += usize::from(b.abs() > a.abs());
        down += usize::from(b.abs() < a.abs());
    }
    assert!(up > 200 && down > 200, "{up} up, {down} down");
}

/// The format before moments had a type.
#[test]
fn a_state_of_the_first_format_is_read_as_f32() {
    let mut r = Random::new("first format");
    let mut rig = rig(settings());
    run(&mut rig, &mut r, 3);
    let saved = rig.saved();
    let length = u64::from_le_bytes(saved[8..16].try_into().expect("eight bytes")) as usize;
    let text = String::from_utf8(saved[16..16 + length].to_vec()).expect("JSON").replace("\"moments\":\"f32\",", "");
    assert!(text.len() < length);
    let old = [b"APOLLO1\n", &(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &saved[16 + length..]].concat();
    let mut new = Rig::new(tensors(), settings(), Dtype::BF16);
    let restored = new.optimizer.load(&mut &old[..]).expect("it is read");
    assert_eq!(restored, Restored { steps: 3, ..Restored::default() });
    assert!(new.saved() == saved);
}

#[test]
fn loading_replaces_what_an_optimizer_held_before() {
    let mut r = Random::new("replace");
    let mut old = rig(settings());
    run(&mut old, &mut r, 2);
    let saved = old.saved();
    let mut used = rig(settings());
    run(&mut used, &mut r, 5);
    used.optimizer.load(&mut &saved[..]).expect("it can be loaded");
    assert!(used.saved() == saved);
    // Also what does not match: nothing of the five steps is left.
    run(&mut used, &mut r, 5);
    let smaller = Rig::new(tensors(), Settings { rank: 3, ..settings() }, Dtype::BF16).saved();
    used.optimizer.load(&mut &smaller[..]).expect("it can be loaded");
    assert!(used.saved() == rig(settings()).saved());
}

#[test]
fn after_a_failed_load_the_optimizer_is_as_new_and_keeps_its_projections() {
    let mut r = Random::new("failed");
    let mut source = rig(settings());
    run(&mut source, &mut r, 3);
    let saved = source.saved();
    let with_source = |rig: &Rig| {
        let optimizer = Optimizer::new(rig.device.clone(), tensors(), settings());
        optimizer.with_projections(Box::new(|refresh, rank, dim| vec![1.0 + refresh as f32; rank * dim]))
    };
    let (mut fresh, mut failed) = (rig(settings()), rig(settings()));
    (fresh.optimizer, failed.optimizer) = (with_source(&fresh), with_source(&failed));
    let error = failed.optimizer.load(&mut &saved[..saved.len() - 1]).expect_err("a byte is missing");
    assert!(matches!(error, StateError::Io(_)), "{error}");
    assert!(failed.snapshot() == fresh.snapshot());
    let mut other = Random::new("failed, then");
    run(&mut fresh, &mut other, 2);
    let mut other = Random::new("failed, then");
    run(&mut failed, &mut other, 2);
    assert!(failed.snapshot() == fresh.snapshot());
}

#[test]
fn a_state_of_something_else_is_refused_with_what_to_do() {
    let mut rig = rig(settings());
    let error = rig.optimizer.load(&mut &b"safetensors or what"[..]).expect_err("not a state");
    assert!(error.to_string().contains("delete it to start with fresh moments"), "{error}");
    let error = rig.optimizer.load(&mut &[][..]).expect_err("empty");
    assert!(matches!(error, StateError::Io(_)), "{error}");
}
