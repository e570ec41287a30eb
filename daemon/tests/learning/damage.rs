//! Damage in what the trainer reads when it starts.

use std::fs;
use std::process::Stdio;

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
        for part in ["optimizer state", "state/1 of generation 1", "roll back", "apollod checkpoint adopt"] {
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
