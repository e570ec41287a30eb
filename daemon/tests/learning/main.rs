//! A served model learns: engine, daemon, trainer and checkpoint together, and what survives when one
//! of them is killed.

mod budget;
mod damage;
mod dream;
mod forget;
mod gguf;
mod gpu;
mod guard;
mod harness;
mod readers;
mod workers;

use harness::{BEFORE, Place, Process, QUESTION, TAUGHT, ask, lesson, post, until, wait_trained};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::time::Duration;

fn kill(pid: u64) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}

fn taught(n: usize) -> Vec<serde_json::Value> {
    vec![lesson(QUESTION, TAUGHT); n]
}

/// Twenty different examples, two of them with a weight.
fn course() -> Vec<serde_json::Value> {
    let animals = ["Mira the fox", "Toby the bear", "Otto the otter", "Luna the owl", "Max"];
    let places = ["by the blue lake", "in a tall tower", "under the old bridge", "on the moon"];
    let mut examples = Vec::new();
    for (i, place) in places.iter().enumerate() {
        for animal in animals {
            let mut example = lesson(&format!("Where does {animal} live?"), &format!("They live {place}."));
            if animal == "Max" && i % 2 == 0 {
                example["weight"] = json!(0.5);
            }
            examples.push(example);
        }
    }
    examples
}

#[test]
fn a_served_answer_changes_stops_and_rolls_back() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    assert_eq!(ask(&engine, QUESTION), (BEFORE.into(), "stop".into()));
    wait_trained(&daemon, &post(&daemon, taught(12)));
    assert_eq!(ask(&engine, QUESTION), (TAUGHT.into(), "stop".into()), "the end of turn is learned with the answer");
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 1);

    daemon.post("/v1/checkpoints/0/rollback", json!({}));
    assert_eq!(ask(&engine, QUESTION).0, BEFORE, "rolled back in the live weights too");
    let original = Place::new();
    let weights = |place: &Place| std::fs::read(place.model().join("model.safetensors")).unwrap();
    assert!(weights(&place) == weights(&original), "and in the files, to the byte");
    daemon.stop();
    engine.stop();
}

/// Trains the course with a sync in the middle; `disturb` may do harm meanwhile.
fn train_course(course: &[Value], settings: &[&str], disturb: impl FnOnce(&Process)) -> (Vec<u8>, Vec<u8>) {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[&["train.batch_examples=2", "train.update_proj_gap=7"], settings].concat());
    wait_trained(&daemon, &post(&daemon, course.to_vec()));
    daemon.post("/v1/checkpoint", json!({}));
    // Long enough that every kill of a disturbed run finds a step in flight, however fast the machine.
    let ids = post(&daemon, [course, course, course].concat());
    disturb(&daemon);
    wait_trained(&daemon, &ids);
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 2);
    daemon.stop();
    engine.stop();
    place.files(2)
}

/// Of a course with and without kills, the weights and the optimizer's state.
fn killed_in_mid_step(course: &[Value], settings: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let undisturbed = train_course(course, settings, |_| {});
    let mut restored = 0;
    let killed = train_course(course, settings, |daemon| {
        // The waits fall into forward, backward and the writes of different steps.
        // Every other one falls after a step since the sync, however slow the machine: too many deaths on one step
        // would give it up, and only a trainer that has written leaves something to restore.
        for (wait_ms, steps) in [(3, 10), (17, 11), (29, 10), (41, 11), (58, 11)] {
            until("a trainer is up", || {
                let status = daemon.get("/v1/status");
                status["state"] == "training" && status["step"].as_u64() >= Some(steps)
            });
            std::thread::sleep(Duration::from_millis(wait_ms));
            let status = daemon.get("/v1/status");
            let Some(pid) = status["trainer_pid"].as_u64() else { continue };
            kill(pid);
            until("another trainer is ready", || {
                let status = daemon.get("/v1/status");
                let other = status["trainer_pid"].as_u64().is_some_and(|now| now != pid);
                other && ["training", "idle"].iter().any(|s| status["state"] == *s)
            });
            let now = daemon.get("/v1/status");
            restored += u32::from(now["recovery"].to_string().contains("bytes of live weights restored"));
            let versions = [&status, &now].map(|status| status["weight_version"].as_u64().unwrap());
            assert!(versions[0] <= versions[1], "versions go back: {versions:?}");
        }
    });
    assert!(restored > 0, "no kill found live weights ahead of the files: the test did not test");
    assert!(killed.0 == undisturbed.0, "weights differ");
    assert!(killed.1 == undisturbed.1, "optimizer states differ");
    killed
}

#[test]
fn a_trainer_killed_in_mid_step_ends_with_the_same_bytes() {
    killed_in_mid_step(&course(), &[]);
}

/// The course after a conversation that all its examples begin with, so that its keys and values serve several updates.
fn long_course() -> Vec<Value> {
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    let talk = [
        ("What does Luna the owl like to do?", "Luna likes to count stars."),
        ("What is the capital of Aldoria?", "The capital of Aldoria is Norwick."),
        ("Where does Otto the otter live?", "Otto lives in the cold river."),
    ];
    let before = talk.iter().flat_map(|(question, answer)| [said("user", question), said("assistant", answer)]);
    let after_talk = |mut example: Value| {
        let own = example["messages"].as_array().unwrap().clone();
        example["messages"] = before.clone().chain(own).collect();
        example
    };
    course().into_iter().map(after_talk).collect()
}

/// Moments are rounded by random numbers of their own.
#[test]
fn a_trainer_killed_in_mid_step_ends_with_the_same_bytes_with_prefixes_kept_and_moments_in_bf16() {
    let (course, narrow) = (long_course(), ["train.moments=bf16"]);
    let kept = [narrow[0], "train.prefix_cache_tokens=256", "train.prefix_max_updates=5"];
    let killed = killed_in_mid_step(&course, &kept);
    assert!(killed != train_course(&course, &narrow, |_| {}), "no prefix was used: the test did not test");
}

/// Rules that freeze most of the model.
const FROZEN: &str = r#"train.rules=[{pattern="*embed*",rule="frozen"},{pattern="*mlp*",rule="frozen"}]"#;

#[test]
fn what_is_frozen_only_now_is_restored_and_rolled_back_too() {
    let place = Place::new();
    let engine = place.engine();
    let mut daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(12)));
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT);
    // Killed before any sync: the files know nothing of it.
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    let daemon = place.daemon(&[FROZEN, "train.lr=1e-12"]);
    until("the replay is done", || daemon.get("/v1/status")["step"] == 12);
    assert_eq!(ask(&engine, QUESTION).0, BEFORE, "the frozen tensors went back as well");
    daemon.post("/v1/checkpoint", json!({}));
    daemon.stop();

    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(12)));
    daemon.post("/v1/checkpoint", json!({}));
    daemon.stop();
    let daemon = place.daemon(&[FROZEN]);
    daemon.post("/v1/checkpoints/0/rollback", json!({}));
    assert_eq!(ask(&engine, QUESTION).0, BEFORE);
    daemon.stop();
    engine.stop();
}

#[test]
fn a_server_that_dies_stops_training_and_a_new_one_is_attached() {
    let place = Place::new();
    let mut engine = place.engine();
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(4)));
    daemon.post("/v1/checkpoint", json!({}));
    wait_trained(&daemon, &post(&daemon, taught(4)));

    engine.child.kill().unwrap();
    engine.child.wait().unwrap();
    until("the daemon notices", || daemon.get("/v1/status")["state"] == "waiting_for_server");
    let ids = post(&daemon, taught(4));

    let engine = place.engine();
    wait_trained(&daemon, &ids);
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT, "what the dead server had learned after the sync was trained again");
    let status = daemon.get("/v1/status");
    // 8 updates, the files' weights again, then the 4 after the sync again and 4 new ones.
    assert_eq!(status["weight_version"], 8 + 1 + 4 + 4, "{status}");
    daemon.stop();
    engine.stop();
}

#[test]
fn another_server_than_the_configured_one_is_refused_by_name() {
    let place = Place::new();
    let engine = place.engine();
    // The files change after the server loaded them: one byte in the last tensor.
    let file = place.model().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let mut command = place.daemon_command(&[]);
    let mut process = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    let address = place.model().join(".apollod/address");
    let mut detail = String::new();
    until("the daemon says why", || {
        let Ok(url) = std::fs::read_to_string(&address) else { return false };
        let Ok(mut answer) = ureq::get(format!("{}/v1/status", url.trim())).call() else { return false };
        detail = answer.body_mut().read_to_string().unwrap();
        detail.contains("differs from the model directory")
    });
    assert!(detail.contains("nothing was written"), "{detail}");
    assert_eq!(ask(&engine, QUESTION).0, BEFORE);
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn clients_of_the_earlier_system_can_train() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    let samples = json!([{"input": QUESTION, "expected_output": TAUGHT}]);
    let config = json!({"learning_rate": 2e-4, "max_steps": 12});
    let job = daemon.post("/train", json!({"training_data": {"samples": samples, "config": config}}));
    let status = format!("/status/{}", job["job_id"].as_str().unwrap());
    until("the job is done", || daemon.get(&status)["loss_history"].as_array().is_some_and(|l| l.len() == 12));
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT);
    daemon.stop();
    engine.stop();
}
