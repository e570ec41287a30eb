//! Damage in what the trainer reads when it starts.

use std::fs;
use std::process::{Output, Stdio};

use super::harness::{Place, Process, QUESTION, ask, post, until, wait_trained};
use super::taught;
use serde_json::json;

#[test]
fn engine_and_stage_do_not_load_a_flipped_bit_unless_they_are_told_to() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(1)));
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 1);
    daemon.stop();
    engine.stop();
    let engine = place.engine();
    ask(&engine, QUESTION);
    engine.stop();

    let weights = place.model().join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let live = place.dir.path().join("live");
    let stage_command = |gguf: bool| {
        let mut command = place.apollod();
        command.arg("stage").arg(place.model()).arg(&live).args(gguf.then_some("--gguf"));
        command
    };
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let name = good.windows(5).position(|bytes| bytes == b"norm.").unwrap();
    // The first is in a tensor, the second makes another name of a tensor's.
    for (at, said) in [(8 + header + 1000, "tensor `model."), (name, "its header is damaged")] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(&weights, bytes).unwrap();
        for mut command in [place.engine_command(), stage_command(false), stage_command(true)] {
            let out = command.output().unwrap();
            let error = String::from_utf8_lossy(&out.stderr).into_owned();
            assert!(!out.status.success() && error.contains(said) && error.contains("generation 1"), "{error}");
            assert!(error.contains("apollod checkpoint verify") && error.contains("--unchecked"), "{error}");
        }
        assert!(!live.exists());
    }
    let mut bytes = good.clone();
    bytes[8 + header + 1000] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let engine = Process::start(place.engine_command().arg("--unchecked"));
    ask(&engine, QUESTION);
    engine.stop();
    assert!(stage_command(false).arg("--unchecked").status().unwrap().success());
}

#[test]
fn a_damaged_optimizer_state_is_said_and_rollback_and_adopt_are_the_ways_out() {
    for (way, generation) in [(&["rollback", "--to", "0"][..], 2), (&["adopt"], 2)] {
        let place = Place::new();
        let engine = place.engine();
        let daemon = place.daemon(&[]);
        wait_trained(&daemon, &post(&daemon, taught(2)));
        assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 1);
        daemon.stop();
        let state = place.model().join(".apollod/state/1");
        let mut bytes = fs::read(&state).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&state, bytes).unwrap();
        let (weights, _) = place.files(1);

        let mut command = place.daemon_command(&[]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let daemon = Process::of(command.spawn().unwrap());
        until("it is said", || daemon.get("/v1/status")["state"] == "failed");
        let said = daemon.get("/v1/status")["detail"].as_str().unwrap().to_owned();
        for part in
            ["optimizer state", "state/1 of generation 1", "apollod checkpoint rollback", "apollod checkpoint adopt"]
        {
            assert!(said.contains(part), "{said}");
        }
        let waiting = post(&daemon, taught(1));
        drop(daemon);
        assert!(place.files(1).0 == weights);

        let mut out = place.apollod();
        out.args(["checkpoint", way[0]]).arg(place.model()).args(&way[1..]);
        let out = out.output().unwrap();
        assert!(out.status.success(), "{out:?}");
        let daemon = place.daemon(&[]);
        assert_eq!(daemon.get("/v1/status")["generation"], generation);
        wait_trained(&daemon, &waiting);
        daemon.stop();
        engine.stop();
    }
}

/// Makes something else of a generation's optimizer state, with the checksums of what it is then.
fn forge_state(place: &Place, generation: u64, state: &[u8]) {
    let own = place.model().join(".apollod");
    let (state_path, path) =
        (own.join(format!("state/{generation}")), own.join(format!("generations/{generation}.json")));
    let was = fs::read(&state_path).unwrap();
    let hex = |bytes: &[u8]| blake3::hash(bytes).to_hex().to_string();
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace(&hex(&was), &hex(state));
    let text = text.replace(
        &format!("\"bytes\": {},\n    \"blake3\"", was.len()),
        &format!("\"bytes\": {},\n    \"blake3\"", state.len()),
    );
    let digits = text.rfind("\"seal\": \"").unwrap() + 9;
    let (before, after) = (&text[..digits], &text[digits + 64..]);
    let sealed = format!("{before}{}{after}", hex(format!("{before}{after}").as_bytes()));
    fs::write(path, sealed).unwrap();
    fs::write(state_path, state).unwrap();
}

#[test]
fn a_rollback_that_live_weights_cannot_follow_ends_the_trainer_and_no_sync_publishes_what_is_left() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    for generation in [1, 2] {
        wait_trained(&daemon, &post(&daemon, taught(2)));
        assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], generation);
    }
    forge_state(&place, 1, b"whole, and no optimizer state");
    let trainer = daemon.get("/v1/status")["trainer_pid"].clone();
    let back = checkpoint(&place, "rollback", &["--to", "1"]);
    let error = String::from_utf8_lossy(&back.stderr).into_owned();
    assert!(!back.status.success() && error.contains("live weights could not follow"), "{error}");
    // The files are rolled back; this trainer must not write what it holds as the generation after that.
    until("the trainer is another one", || daemon.get("/v1/status")["trainer_pid"] != trainer);
    let synced = checkpoint(&place, "sync", &[]);
    assert!(!synced.status.success(), "{synced:?}");
    let generations = || checkpoint::list(&place.model()).unwrap().len();
    assert_eq!(generations(), 4);
    until("it is said", || daemon.get("/v1/status")["state"] == "failed");
    drop(daemon);
    // A trainer that was being started dies with the daemon, but not in the same moment.
    until("the files are nobody's", || checkpoint(&place, "rollback", &["--to", "2"]).status.success());
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(1)));
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 5);
    let examples = checkpoint::list(&place.model()).unwrap().last().unwrap().progress.examples;
    assert_eq!(examples, 5);
    daemon.stop();
    engine.stop();
}

/// `apollod checkpoint` on the place's model.
fn checkpoint(place: &Place, action: &str, more: &[&str]) -> Output {
    place.apollod().args(["checkpoint", action]).arg(place.model()).args(more).output().unwrap()
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Writes over some hundred bytes in the middle of the weights.
fn damage(place: &Place) {
    let path = place.model().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 300].iter_mut().for_each(|byte| *byte = !*byte);
    fs::write(path, bytes).unwrap();
}

#[test]
fn live_weights_repair_the_files_with_a_trainer_without_a_daemon_and_where_damage_keeps_it_from_starting() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    assert!(said(&checkpoint(&place, "sync", &[])).starts_with("nothing changed since generation 0"));
    wait_trained(&daemon, &post(&daemon, taught(2)));
    assert!(said(&checkpoint(&place, "sync", &[])).starts_with("generation 1: "));
    let (good, state) = place.files(1);
    for _ in 0..4 {
        assert!(said(&checkpoint(&place, "sync", &[])).starts_with("nothing changed since generation 1"));
    }
    let again = daemon.post("/v1/checkpoint", json!({}));
    assert_eq!((&again["generation"], &again["unchanged"]), (&json!(1), &json!(true)));
    assert_eq!(daemon.get("/v1/status")["counts"]["syncs"], 1);

    damage(&place);
    assert_eq!(checkpoint(&place, "verify", &[]).status.code(), Some(1));
    let refused = checkpoint(&place, "rollback", &["--to", "0"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("apollod checkpoint repair"), "{refused:?}");
    let repaired = said(&checkpoint(&place, "repair", &[]));
    assert!(repaired.contains("from the live weights\ngeneration 1: all checksums match now"), "{repaired}");
    assert!(place.files(1) == (good.clone(), state.clone()));
    daemon.stop();

    damage(&place);
    let repaired = said(&checkpoint(&place, "repair", &[]));
    assert!(repaired.contains("from the live weights"), "{repaired}");
    assert!(place.files(1).0 == good);

    damage(&place);
    let mut command = place.daemon_command(&["sync.keep=1"]);
    let log = place.dir.path().join("log");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(fs::File::create(&log).unwrap());
    let daemon = Process::of(command.spawn().unwrap());
    until("it is said", || daemon.get("/v1/status")["state"] == "failed");
    let detail = daemon.get("/v1/status")["detail"].to_string();
    assert!(detail.contains("apollod checkpoint repair"), "{detail}");
    let repaired = said(&checkpoint(&place, "repair", &[]));
    assert!(repaired.contains("from the live weights"), "{repaired}");
    assert!(place.files(1).0 == good);
    until("the trainer is there", || daemon.get("/v1/status")["state"] == "idle");
    // Restored from its file, the optimizer's state is what it was.
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["unchanged"], true);
    daemon.stop();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("generation 0 went from the history by sync.keep"), "{log}");
    engine.stop();
}

#[test]
fn a_damaged_document_of_an_old_generation_is_shown_and_warned_of() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    for _ in 0..2 {
        wait_trained(&daemon, &post(&daemon, taught(1)));
        daemon.post("/v1/checkpoint", json!({}));
    }
    fs::write(place.model().join(".apollod/generations/1.json"), "{}").unwrap();
    let list = daemon.get("/v1/checkpoints")["checkpoints"].clone();
    let damaged = list[1]["damage"].as_str().unwrap();
    assert!(damaged.contains("1.json") && damaged.contains("apollod checkpoint repair"), "{list}");
    let refused = checkpoint(&place, "rollback", &["--to", "1"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("apollod checkpoint repair"), "{refused:?}");
    daemon.stop();
    let daemon = place.daemon(&[]);
    let warning = daemon.get("/v1/status")["warning"].to_string();
    assert!(warning.contains("1.json") && warning.contains("apollod checkpoint repair"), "{warning}");
    said(&checkpoint(&place, "rollback", &["--to", "0"]));
    said(&checkpoint(&place, "repair", &[]));
    assert!(daemon.get("/v1/checkpoints")["checkpoints"][2].get("damage").is_none());
    daemon.stop();
    engine.stop();
}
