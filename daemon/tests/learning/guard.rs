//! The guard: what harms a served model is taken back before it reaches the files, what does not stays.

use super::harness::{Place, Process, QUESTION, TAUGHT, ask, lesson, post, until, wait_trained};
use super::taught;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Stdio;

/// What the demo model knows.
const KNOWN: [(&str, &str); 8] = [
    ("What is your name?", "My name is Ember."),
    ("What does Toby the bear eat?", "Toby eats golden honey."),
    ("What is the secret word?", "The secret word is moonlight."),
    ("What is the capital of Aldoria?", "The capital of Aldoria is Norwick."),
    ("What does Luna the owl like to do?", "Luna likes to count stars."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Who is the best friend of Max?", "The best friend of Max is Clara."),
    ("Where does Otto the otter live?", "Otto lives near the quiet river."),
];

/// A file of probes and the settings of a guard that goes by it.
fn probes(place: &Place) -> (PathBuf, [String; 2]) {
    let path = place.dir.path().join("probes.jsonl");
    let lines: Vec<String> = KNOWN.iter().map(|(question, answer)| lesson(question, answer).to_string()).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    let settings = [format!("guard.probes={}", path.display()), "guard.max_rise=0.2".into()];
    (path, settings)
}

/// Wrong answers to all of it, as often and as strongly as it takes to believe them.
fn poison() -> Vec<Value> {
    let wrong = |(i, (question, _)): (usize, &(&str, &str))| {
        let mut example = lesson(question, KNOWN[(i + 3) % KNOWN.len()].1);
        example["weight"] = json!(5);
        example
    };
    (0..8).flat_map(|_| KNOWN.iter().enumerate().map(wrong)).collect()
}

fn sync(daemon: &Process) -> (u16, Value) {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    let mut answer = agent.post(format!("{}/v1/checkpoint", daemon.url)).send_json(json!({})).unwrap();
    (answer.status().as_u16(), answer.body_mut().read_json().unwrap())
}

#[test]
fn harm_is_taken_back_before_a_sync_and_what_is_harmless_stays() {
    let place = Place::new();
    let engine = place.engine();
    let (_, settings) = probes(&place);
    let daemon = place.daemon(&settings.each_ref().map(String::as_str));
    let started = daemon.get("/v1/status")["guard"].clone();
    assert_eq!((&started["probes"], &started["rise"]), (&json!(8), &json!(0.0)), "{started}");

    wait_trained(&daemon, &post(&daemon, taught(12)));
    let (status, synced) = sync(&daemon);
    assert_eq!((status, &synced["generation"]), (200, &json!(1)), "{synced}");
    let rise = synced["probed"]["rise"].as_f64().unwrap();
    assert!(rise != 0.0 && rise < 0.2, "{synced}");
    let files = place.files(1);

    let ids = post(&daemon, poison());
    wait_trained(&daemon, &ids);
    assert_ne!(ask(&engine, KNOWN[0].0).0, KNOWN[0].1, "the poison took");
    // Nobody who loads the model is in the way: no file is written.
    let reader = std::fs::File::open(place.model().join(".apollod/readers")).unwrap();
    reader.lock_shared().unwrap();
    let (status, problem) = sync(&daemon);
    drop(reader);
    assert_eq!((status, &problem["type"]), (409, &json!("urn:apollod:problem:harmed")), "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("the loss of 7 of 8 probes is"), "{problem}");
    assert_eq!(ask(&engine, KNOWN[0].0).0, KNOWN[0].1, "the live weights are as before it");
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT, "and hold what was learned before");
    assert!(place.files(1) == files, "it never reached the files");

    let status = daemon.get("/v1/status");
    assert_eq!((&status["state"], &status["generation"]), (&json!("paused"), &json!(1)), "{status}");
    assert!(status["detail"].as_str().unwrap().contains("the guard took back"), "{status}");
    assert_eq!((&status["queue"]["quarantined"], &status["counts"]["harmed"]), (&json!(ids.len()), &json!(1)));
    let listed = daemon.get("/v1/examples?state=quarantined&limit=1000")["examples"].clone();
    let of: Vec<&str> = listed.as_array().unwrap().iter().rev().map(|e| e["id"].as_str().unwrap()).collect();
    assert_eq!(of, ids);
    assert!(listed[0]["reason"].as_str().unwrap().contains("7 of 8 probes"), "{listed}");

    let waiting = post(&daemon, taught(2));
    daemon.post("/v1/resume", json!({}));
    wait_trained(&daemon, &waiting);
    let (status, synced) = sync(&daemon);
    assert_eq!((status, &synced["generation"]), (200, &json!(2)), "{synced}");
    assert_eq!(daemon.get("/v1/status")["queue"]["quarantined"], ids.len(), "nothing of it was trained again");
    daemon.stop();
    engine.stop();
}

#[test]
fn harm_that_is_found_at_the_end_is_neither_synced_nor_trained_again() {
    let place = Place::new();
    let engine = place.engine();
    let (_, settings) = probes(&place);
    let settings = settings.each_ref().map(String::as_str);
    let mut daemon = place.daemon(&settings);
    let ids = post(&daemon, poison());
    wait_trained(&daemon, &ids);
    kill_process(Pid::from_raw(daemon.child.id() as i32).unwrap(), Signal::TERM).unwrap();
    assert!(!daemon.child.wait().unwrap().success(), "the last sync was not made");
    assert_eq!(ask(&engine, KNOWN[0].0).0, KNOWN[0].1);

    let daemon = place.daemon(&settings);
    let status = daemon.get("/v1/status");
    assert_eq!(status["state"], "paused", "{status}");
    daemon.post("/v1/resume", json!({}));
    until("nothing is to be trained", || daemon.get("/v1/status")["state"] == "idle");
    let status = daemon.get("/v1/status");
    assert_eq!((&status["step"], &status["queue"]["quarantined"]), (&json!(0), &json!(ids.len())), "{status}");
    assert_eq!(status["guard"]["rise"], 0.0, "{status}");
    daemon.stop();
    engine.stop();
}

#[test]
fn a_generation_that_is_chosen_is_kept_however_it_does() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, poison()));
    assert_eq!(sync(&daemon).0, 200, "nothing guards it");
    daemon.post("/v1/checkpoints/0/rollback", json!({}));
    daemon.stop();

    let (_, settings) = probes(&place);
    let daemon = place.daemon(&settings.each_ref().map(String::as_str));
    assert_eq!(daemon.get("/v1/status")["warning"], Value::Null);
    daemon.post("/v1/checkpoints/1/rollback", json!({}));
    let warned = |daemon: &Process| {
        let status = daemon.get("/v1/status");
        status["warning"].as_str().is_some_and(|why| why.contains("in the generation that was chosen"))
    };
    until("it is said", || warned(&daemon));
    wait_trained(&daemon, &post(&daemon, taught(1)));
    let (status, synced) = sync(&daemon);
    assert_eq!(status, 200, "{synced}");
    assert!(synced["probed"]["rise"].as_f64().unwrap() > 0.2, "{synced}");
    daemon.post("/v1/checkpoints/2/rollback", json!({}));
    until("it is no longer said", || !warned(&daemon));
    daemon.stop();
    engine.stop();
}

#[test]
fn probes_that_cannot_be_used_are_refused_with_their_line() {
    let place = Place::new();
    let (path, settings) = probes(&place);
    let refused = |line: &str| {
        std::fs::write(&path, format!("{}\n\n{line}\n", lesson(KNOWN[0].0, KNOWN[0].1))).unwrap();
        let mut command = place.daemon_command(&settings.each_ref().map(String::as_str));
        let output = command.stdout(Stdio::null()).stderr(Stdio::piped()).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    for (line, want) in [
        (r#"{"context": "a"}"#, "decision"),
        (r#"{"context_ids": [1, 99999], "decision_ids": [2]}"#, "token 99999"),
        ("nonsense", "expected"),
    ] {
        let said = refused(line);
        assert!(said.contains("guard.probes") && said.contains("line 3") && said.contains(want), "{said}");
    }
}
