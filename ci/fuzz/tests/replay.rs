//! Seeds, and inputs that broke a target once.

use std::path::Path;
use std::time::{Duration, Instant};

use fuzz::TARGETS;

/// No input of some KiB takes so long; a debug build of a busy machine does not either.
const LONGEST: Duration = Duration::from_secs(10);

/// One test, as the bound on memory counts every thread's.
#[test]
fn seeds_and_regressions_run_within_their_bounds() {
    let regressions = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    let mut unreached = Vec::new();
    for target in TARGETS {
        let seeds = (target.seeds)();
        for (number, seed) in seeds.iter().enumerate() {
            let accepted = timed(target.name, &format!("seed {number}"), || target.run(seed));
            if number == 0 && !accepted {
                unreached.push(target.name);
            }
        }
        for entry in std::fs::read_dir(regressions.join(target.name)).into_iter().flatten() {
            let path = entry.expect("the folder can be read").path();
            let input = std::fs::read(&path).expect("the file can be read");
            timed(target.name, &path.display().to_string(), || target.run(&input));
        }
    }
    assert!(unreached.is_empty(), "the first seed is refused, so that nothing behind it is reached: {unreached:?}");
    for entry in std::fs::read_dir(&regressions).expect("there are regressions").flatten() {
        let name = entry.file_name();
        assert!(TARGETS.iter().any(|target| name == target.name), "regressions of {name:?}, which is no target");
    }
}

fn timed(target: &str, input: &str, run: impl FnOnce() -> bool) -> bool {
    println!("{target}: {input}");
    let start = Instant::now();
    let accepted = run();
    assert!(start.elapsed() < LONGEST, "{target}: {input} took {:?}", start.elapsed());
    accepted
}
