//! `apollod checkpoint` on a directory of a few generations, without a daemon.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Progress};
use serde_json::{Value, json};

/// One tensor, all of whose elements are the same.
struct Live {
    tensors: Vec<LiveTensor>,
    value: u8,
}

impl LiveWeights for Live {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }
    fn read(&self, _: usize, _: u64, buf: &mut [u8]) {
        buf.fill(self.value);
    }
}

const ROWS: usize = 50_000;

/// Generations 0..=2 with the values 1, 2 and 3 in a tensor of F32.
fn model(dir: &Path) {
    let header = json!({"w": {"dtype": "F32", "shape": [ROWS], "data_offsets": [0, ROWS * 4]}}).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![1; ROWS * 4]].concat();
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    let (mut checkpoint, _) = Checkpoint::open(dir).unwrap();
    for n in 1..=2 {
        let tensor = LiveTensor { name: "w".into(), dtype: "F32".into(), shape: vec![ROWS], bytes: ROWS as u64 * 4 };
        let live = Live { tensors: vec![tensor], value: n as u8 + 1 };
        let progress = Progress {
            cursor: n,
            step: n,
            examples: 10 * n,
            loss: Some(0.25),
            weight_version: 7 * n,
            epoch: "e".into(),
        };
        let state = &mut |out: &mut dyn Write| out.write_all(b"state");
        checkpoint.sync(&live, state, progress, &mut |_, _| {}).unwrap();
    }
}

fn run(action: &str, dir: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_apollod")).args(["checkpoint", action]).arg(dir).args(more).output().unwrap()
}

/// What it printed; it must have succeeded.
fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn list_tells_time_version_examples_loss_and_bytes() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let text = said(&run("list", dir.path(), &[]));
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let heads = "generation created version examples loss bytes written bytes journal ratio";
    assert_eq!(lines[0].join(" "), heads);
    let json: Value = serde_json::from_str(&said(&run("list", dir.path(), &["--json"]))).unwrap();
    let newest = &json[0];
    let (journal, written) = (newest["journal_bytes"].as_u64().unwrap(), newest["written_bytes"].as_u64().unwrap());
    assert!(0 < journal && journal < written && written == ROWS as u64 * 4, "{newest}");
    let ratio = journal as f64 / written as f64;
    assert_eq!(newest["ratio"], json!(ratio));
    let created = newest["created"].as_str().unwrap();
    let want = format!("2 {created} 14 20 0.2500 {written} {journal} {ratio:.3}");
    assert_eq!(lines[1].join(" "), want);
    assert_eq!(lines[3][2..].join(" "), "0 0 - 0 0 -");
    assert_eq!((lines.len(), newest["weight_version"].as_u64()), (4, Some(14)));
}

#[test]
fn rollback_takes_the_generation_by_name() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let weights = || std::fs::read(dir.path().join("model.safetensors")).unwrap().pop().unwrap();
    assert_eq!(weights(), 3);
    assert!(!run("rollback", dir.path(), &["1"]).status.success());
    let text = said(&run("rollback", dir.path(), &["--to", "1"]));
    assert!(text.starts_with("back at the content of 1: generation 3"), "{text}");
    assert_eq!(weights(), 2);
    let refused = run("rollback", dir.path(), &["--to", "9"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("restorable are [0, 1, 2, 3]"), "{refused:?}");
}

#[test]
fn recover_finishes_or_undoes_what_a_crash_left() {
    let dir = tempfile::tempdir().unwrap();
    assert!(said(&run("recover", dir.path(), &[])).starts_with("no generations yet"));
    model(dir.path());
    assert_eq!(said(&run("recover", dir.path(), &[])), "clean at generation 2\n");
    let own = dir.path().join(".apollod");
    std::fs::rename(own.join("history/2.delta"), own.join("journal")).unwrap();
    assert_eq!(said(&run("recover", dir.path(), &[])), "the last sync is whole: generation 2\n");
    assert!(said(&run("verify", dir.path(), &[])).contains("all checksums match"));
    std::fs::rename(own.join("history/2.delta"), own.join("journal")).unwrap();
    std::fs::remove_file(own.join("generations/2.json")).unwrap();
    let undone = said(&run("recover", dir.path(), &[]));
    assert!(undone.contains("weights remain at generation 1"), "{undone}");
    assert_eq!(std::fs::read(dir.path().join("model.safetensors")).unwrap().pop(), Some(2));
}

#[test]
fn verify_names_what_is_damaged_and_fails() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let text = said(&run("verify", dir.path(), &[]));
    assert!(text.contains("2 earlier generations") && text.contains("all checksums match"), "{text}");
    let damaged = |name: &str, byte: usize| {
        let path = dir.path().join(name);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[byte] ^= 64;
        std::fs::write(&path, bad).unwrap();
        let output = run("verify", dir.path(), &[]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        std::fs::write(&path, good).unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let text = damaged("model.safetensors", 100_000);
    assert!(text.contains("tensor `w` is damaged in 1 of its 16 KiB blocks, the first at its bytes "), "{text}");
    for name in ["history/1.delta", "history/2.delta", "state/1", "generations/0.json", "generations/2.json"] {
        let text = damaged(&format!(".apollod/{name}"), 3);
        assert!(text.contains(name), "{name}: {text}");
    }
}
