//! Replays of apollo-torch's runs: the weights after every step of every golden case.

#[allow(dead_code)]
#[path = "../examples/replay.rs"]
mod replay;

use safetensors::SafeTensors;
use std::path::Path;

/// ‖ours - theirs‖ over the distance moved so far. f32 against f64 of the package itself is below
/// 1e-6 (the script that made the files asserts it); lr is large, so that the rounding of the
/// weights is far below.
const TOLERANCE: f64 = 1e-5;

#[test]
fn every_step_of_every_golden_run_is_reproduced() {
    // Asked for when it runs: the program may have been carried to another machine.
    let root = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it");
    let folder = Path::new(&root).join("tests/goldens");
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("goldens") {
        let path = entry.expect("entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).expect("name").to_string();
        cases.extend(name.strip_suffix(".in.safetensors").map(String::from));
    }
    assert!(cases.len() >= 9, "cases are missing: {cases:?}");
    for case in cases {
        let read = |kind: &str| std::fs::read(folder.join(format!("{case}.{kind}.safetensors"))).expect("both files");
        let (input, output) = (read("in"), read("out"));
        follow(&case, &input, &output);
    }
}

fn follow(case: &str, input: &[u8], output: &[u8]) {
    let file = SafeTensors::deserialize(input).expect("input");
    let theirs = SafeTensors::deserialize(output).expect("output");
    let (_, header) = SafeTensors::read_metadata(input).expect("header");
    let settings = replay::settings(header.metadata().as_ref().expect("metadata")).expect("settings");
    let ours = replay::replay(&file, settings).expect("replay");
    assert_eq!(ours.len(), theirs.len(), "{case}: steps");
    assert!(ours.len() >= 12, "{case}: {} steps", ours.len());
    let (_, _, first) = replay::matrix(&file, "w").expect("w");
    let mut worst = 0f64;
    for (t, w) in ours.iter().enumerate() {
        let (_, _, want) = replay::matrix(&theirs, &format!("w.{t}")).expect("w.t");
        let (error, moved) = (distance(w, &want), distance(&want, &first));
        assert!(moved > 0.0 && error <= TOLERANCE * moved, "{case} step {t}: off by {:e} of the way", error / moved);
        worst = worst.max(error / moved);
    }
    println!("{case}: {} steps, worst {worst:.1e}", ours.len());
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (a as f64 - b as f64).powi(2)).sum::<f64>().sqrt()
}
