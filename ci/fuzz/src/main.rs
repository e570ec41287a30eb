//! The program that libFuzzer drives: one target, named by FUZZ_TARGET. `ci/fuzz.py` builds and runs it.
//!
//! Before libFuzzer reads its corpus, the target's seeds and dictionary are written into the folder FUZZ_SEEDS. Without
//! FUZZ_TARGET it prints the names of all targets.

#![no_main]

use std::sync::OnceLock;

use fuzz::Target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(init: start(), |input: &[u8]| {
    TARGET.get().expect("init has run").run(input);
});

fn start() {
    let Ok(name) = std::env::var("FUZZ_TARGET") else {
        fuzz::TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    };
    let target = fuzz::TARGETS.iter().find(|target| target.name == name).expect("FUZZ_TARGET is a target");
    TARGET.set(target).ok().expect("init runs once");
    if let Ok(folder) = std::env::var("FUZZ_SEEDS") {
        let folder = std::path::Path::new(&folder);
        for (number, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(folder.join(format!("seed-{number}")), seed).expect("FUZZ_SEEDS can be written to");
        }
        std::fs::write(folder.with_extension("dict"), target.dictionary()).expect("FUZZ_SEEDS can be written beside");
    }
}
