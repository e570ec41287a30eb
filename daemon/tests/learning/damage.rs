//! Damage in what the trainer reads when it starts.

use std::fs;
use std::process::Stdio;

use super::harness::{Place, Process, post, until, wait_trained};
use super::taught;
use serde_json::json;

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
