//! Weights in a GPU's memory: the engine allocates them, the trainer opens them by CUDA IPC. Here on the simulated
//! driver, unless APOLLOD_TEST_DRIVER=real.

use crate::harness::{BEFORE, Place, Process, QUESTION, TAUGHT, ask, post, until, wait_trained};
use crate::{kill, taught};
use serde_json::json;
use std::process::Stdio;

#[test]
fn a_served_answer_changes_is_saved_and_rolls_back() {
    let place = Place::on_a_gpu();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    assert_eq!(ask(&engine, QUESTION), (BEFORE.into(), "stop".into()));
    wait_trained(&daemon, &post(&daemon, taught(12)));
    assert_eq!(ask(&engine, QUESTION), (TAUGHT.into(), "stop".into()));
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 1);
    daemon.post("/v1/checkpoints/0/rollback", json!({}));
    assert_eq!(ask(&engine, QUESTION).0, BEFORE, "rolled back in the live weights too");
    let weights = |place: &Place| std::fs::read(place.model().join("model.safetensors")).unwrap();
    assert!(weights(&place) == weights(&Place::new()), "and in the files, to the byte");
    daemon.stop();
    engine.stop();
}

#[test]
fn a_trainer_that_is_killed_leaves_the_memory_to_the_next() {
    let place = Place::on_a_gpu();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(2)));
    let ids = post(&daemon, taught(10));
    let pid = daemon.get("/v1/status")["trainer_pid"].as_u64().unwrap();
    kill(pid);
    wait_trained(&daemon, &ids);
    let status = daemon.get("/v1/status");
    assert!(status["trainer_pid"].as_u64().is_some_and(|now| now != pid), "{status}");
    assert_eq!(ask(&engine, QUESTION), (TAUGHT.into(), "stop".into()), "every example counted once");
    daemon.stop();
    engine.stop();
}

#[test]
fn a_server_that_dies_is_noticed_and_a_new_one_is_attached() {
    let place = Place::on_a_gpu();
    let mut engine = place.engine();
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(2)));
    engine.child.kill().unwrap();
    engine.child.wait().unwrap();
    until("the daemon notices", || daemon.get("/v1/status")["state"] == "waiting_for_server");
    let ids = post(&daemon, taught(10));
    let engine = place.engine();
    wait_trained(&daemon, &ids);
    assert_eq!(ask(&engine, QUESTION), (TAUGHT.into(), "stop".into()));
    daemon.stop();
    engine.stop();
}

#[test]
fn moments_in_bf16_are_refused_before_anything_is_written() {
    let place = Place::on_a_gpu();
    let engine = place.engine();
    let mut command = place.daemon_command(&["train.moments=bf16"]);
    let daemon =
        Process::of(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    until("it is said", || daemon.get("/v1/status")["state"] == "failed");
    let said = daemon.get("/v1/status")["detail"].as_str().unwrap().to_owned();
    assert!(said.contains(r#"train.moments is "bf16", which only a CPU stores: set it to "auto" or "f32""#), "{said}");
    assert_eq!(ask(&engine, QUESTION).0, BEFORE);
    drop(daemon);
    engine.stop();
}
