//! The norm-growth limiter over many steps: its floor, zero gradients, and switching it off.

use crate::common::{Random, Rig, linear, one_matrix, stored_norm};
use apollo::Settings;

const M: usize = 60;
const N: usize = 40;
const T: usize = 4;

fn settings(growth: Option<f32>, floor: f32) -> Settings {
    Settings { lr: 1e-2, rank: 8, norm_growth_limit: growth, norm_growth_floor: floor, ..Settings::default() }
}

/// One step with gradients of a size; the distance moved.
fn step(rig: &mut Rig, r: &mut Random, size: f32) -> f64 {
    let dy = (0..T * M).map(|_| size * r.normal()).collect::<Vec<_>>();
    let g = linear(rig, r.normals(T * N), dy, T);
    rig.apply(&g)[0]
}

/// `count` such steps.
fn run(rig: &mut Rig, r: &mut Random, size: f32, count: usize) {
    for _ in 0..count {
        step(rig, r, size);
    }
}

/// The move of a normal example after 30 normal and 20 quiet ones.
fn after_quiet(growth: Option<f32>, floor: f32) -> f64 {
    let mut r = Random::new("quiet");
    let mut rig = one_matrix(M, N, settings(growth, floor));
    run(&mut rig, &mut r, 1.0, 30);
    run(&mut rig, &mut r, 1e-4, 20);
    step(&mut rig, &mut r, 1.0)
}

#[test]
fn with_its_floor_a_normal_example_after_quiet_ones_learns_at_once() {
    let free = after_quiet(None, 0.0);
    let floored = after_quiet(Some(1.01), 0.5);
    let bare = after_quiet(Some(1.01), 0.0);
    println!("moved: {free} without limiter, {floored} with the floor, {bare} without it");
    // One example differs from another by a quarter; the throttle is three to four times.
    assert!(floored > 0.6 * free, "throttled in spite of the floor: {floored} of {free}");
    assert!(bare < 0.5 * free, "not throttled without the floor: {bare} of {free}");
}

#[test]
fn the_stored_norm_is_never_below_the_floor() {
    let mut r = Random::new("floor");
    let mut rig = one_matrix(M, N, settings(Some(1.01), 0.5));
    let floor = 0.5 * (8.0 * M as f32).sqrt();
    for size in [1e-6, 1.0, 1e-4, 1e-4, 1e-4, 1.0] {
        step(&mut rig, &mut r, size);
        assert!(stored_norm(&rig, 0) >= floor, "{} after size {size}", stored_norm(&rig, 0));
    }
}

#[test]
fn an_update_grows_by_at_most_the_limit() {
    let mut r = Random::new("growth");
    let mut rig = one_matrix(M, N, settings(Some(1.01), 0.0));
    run(&mut rig, &mut r, 1.0, 30);
    run(&mut rig, &mut r, 1e-4, 20);
    for _ in 0..20 {
        let before = stored_norm(&rig, 0);
        step(&mut rig, &mut r, 1.0);
        let growth = stored_norm(&rig, 0) / before;
        assert!((1.0099..1.0101).contains(&growth), "{growth}");
    }
}

#[test]
fn a_zero_gradient_leaves_the_stored_norm_and_the_next_step_learns() {
    let mut r = Random::new("zero");
    for floor in [0.0, 0.5] {
        let mut rig = one_matrix(M, N, settings(Some(1.01), floor));
        let normal = (0..40).map(|_| step(&mut rig, &mut r, 1.0)).last().expect("forty");
        let stored = stored_norm(&rig, 0);
        let g = linear(&rig, r.normals(T * N), vec![0.0; T * M], T);
        assert_eq!(rig.apply(&g)[0], 0.0, "a zero gradient moved the weights");
        assert_eq!(stored_norm(&rig, 0), stored, "floor {floor}");
        let next = step(&mut rig, &mut r, 1.0);
        assert!(next > 0.5 * normal, "floor {floor}: {next} after a zero gradient, {normal} before");
    }
}
