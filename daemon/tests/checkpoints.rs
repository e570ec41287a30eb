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
    model(dir.path());
    let not_compared = format!("; contents not compared, `apollod checkpoint verify {}` does\n", dir.path().display());
    assert_eq!(said(&run("recover", dir.path(), &[])), format!("journal: clean at generation 2{not_compared}"));
    let own = dir.path().join(".apollod");
    std::fs::rename(own.join("history/2.delta"), own.join("journal")).unwrap();
    assert_eq!(said(&run("recover", dir.path(), &[])), format!("the last sync is whole: generation 2{not_compared}"));
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
    assert!(text.contains("not covered: config.json, the tokenizer's files, the queue"), "{text}");
    assert!(!text.contains("repair"), "{text}");
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
    assert!(text.contains(&format!("apollod checkpoint repair {}", dir.path().display())), "{text}");
    for name in ["history/1.delta", "history/2.delta", "state/1", "generations/0.json", "generations/2.json"] {
        let text = damaged(&format!(".apollod/{name}"), 3);
        assert!(text.contains(name), "{name}: {text}");
    }
}

/// Changes bytes of the weights, from this one on.
fn damage(dir: &Path, at: usize, bytes: usize) {
    let path = dir.join("model.safetensors");
    let mut content = std::fs::read(&path).unwrap();
    content[at..at + bytes].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(path, content).unwrap();
}

#[test]
fn repair_puts_right_what_it_can_and_says_what_it_cannot() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("model"), dir.path().join("copy"));
    std::fs::create_dir(&path).unwrap();
    model(&path);
    let good = std::fs::read(path.join("model.safetensors")).unwrap();
    assert_eq!(said(&run("repair", &path, &[])), "generation 2: all checksums match, nothing to repair\n");
    checkpoint::export(&path, &copy).unwrap();
    damage(&path, 100_000, 5);
    let output = run("repair", &path, &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("still damaged: model.safetensors: tensor `w`") && text.contains("--from"), "{text}");
    let refused = run("rollback", &path, &["--to", "1"]);
    let command = format!("apollod checkpoint repair {}", path.display());
    assert!(String::from_utf8_lossy(&refused.stderr).contains(&command), "{refused:?}");
    let text = said(&run("repair", &path, &["--from", copy.to_str().unwrap()]));
    let want = format!("repaired: model.safetensors: tensor `w`: 1 block of 16 KiB from {}", copy.display());
    assert_eq!(text, format!("{want}\ngeneration 2: all checksums match now\n"));
    assert!(std::fs::read(path.join("model.safetensors")).unwrap() == good);
}

#[test]
fn adopt_does_nothing_for_nothing_and_else_names_what_it_takes_and_that_history_ends() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    let text = said(&run("adopt", dir.path(), &[]));
    assert!(text.starts_with("nothing to adopt: "), "{text}");
    assert_eq!(checkpoint::list(dir.path()).unwrap().iter().filter(|of| of.restorable).count(), 3);
    damage(dir.path(), 100_000, 20_000);
    let output = run("adopt", dir.path(), &[]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "journal: clean at generation 2\n");
    let text = said(&output);
    for part in [
        "generation 3 is the files as they are",
        "model.safetensors: tensor `w`, 2 blocks of 16 KiB\n",
        "history ends here: generations 0 to 1 and 2 cannot be restored any more\n",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(checkpoint::list(dir.path()).unwrap().iter().filter(|of| of.restorable).count(), 1);
}

#[test]
fn a_damaged_document_is_listed_as_such_beside_the_others() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path());
    std::fs::write(dir.path().join(".apollod/generations/1.json"), "{}").unwrap();
    let text = said(&run("list", dir.path(), &[]));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[2].trim_start().starts_with("1  DAMAGED: ") && lines[2].contains("checkpoint repair"), "{text}");
    assert_eq!((lines.len(), lines[3].split_whitespace().next()), (4, Some("0")));
    let json: Value = serde_json::from_str(&said(&run("list", dir.path(), &["--json"]))).unwrap();
    assert!(json[1]["damage"].is_string() && json[0].get("damage").is_none(), "{json}");
    said(&run("rollback", dir.path(), &["--to", "0"]));
    said(&run("repair", dir.path(), &[]));
    assert!(!said(&run("list", dir.path(), &[])).contains("DAMAGED"));
}

#[test]
fn directories_without_generations_are_refused_and_nothing_is_made_there() {
    let dir = tempfile::tempdir().unwrap();
    let [path, empty, copy] = ["model", "empty", "copy"].map(|name| dir.path().join(name));
    std::fs::create_dir(&path).unwrap();
    std::fs::create_dir(&empty).unwrap();
    model(&path);
    let published = Checkpoint::open(&path).unwrap().0.publish().unwrap().path.with_file_name("current");
    checkpoint::export(&path, &copy).unwrap();
    for (dir, reason) in [
        (empty.as_path(), "no model directory"),
        (&copy, "an export carries none"),
        (&published, "a copy of one generation, which nobody writes into"),
        (Path::new("/nonexistent"), "no such directory"),
    ] {
        for (action, more) in [
            ("list", &[][..]),
            ("verify", &[]),
            ("recover", &[]),
            ("adopt", &[]),
            ("repair", &[]),
            ("rollback", &["--to", "1"]),
        ] {
            let output = run(action, dir, more);
            assert!(!output.status.success(), "{action} {}", dir.display());
            let text = String::from_utf8(output.stderr).unwrap();
            assert!(text.contains(reason), "{action} {}: {text}", dir.display());
            assert!(!dir.join(".apollod").exists(), "{action} {}", dir.display());
        }
    }
}
