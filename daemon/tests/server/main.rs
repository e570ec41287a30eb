//! The daemon and its server: refusals that leave every byte, the server's end, holds, signs of what happens.

#[path = "../learning/harness.rs"]
#[allow(dead_code)]
mod harness;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipc::{Manifest, SharedWeights};
use serde_json::{Value, json};

use harness::{Place, Process, QUESTION, TAUGHT, ask, lesson, post, until, wait_trained};

/// The memory of an engine's weights, which stays readable after its end.
fn memory_of(pid: u32) -> File {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let of_weights =
        |path: &Path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("apollod-weights"));
    let path = links.map(|link| link.unwrap().path()).find(|path| of_weights(path)).unwrap();
    File::open(path).unwrap()
}

fn bytes(memory: &File) -> Vec<u8> {
    let mut bytes = vec![0; memory.metadata().unwrap().len() as usize];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn lives(pid: u64) -> bool {
    // A zombie has ended.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_killed_server_ends_the_writing_within_100_ms_in_the_middle_of_a_step() {
    let place = Place::new();
    let mut engine = place.engine();
    let memory = memory_of(engine.child.id());
    // Steps of seconds: what ends the trainer in time is not the end of a step.
    let daemon = place.daemon(&["train.batch_examples=400"]);
    let before = bytes(&memory);
    post(&daemon, vec![lesson(QUESTION, TAUGHT); 4000]);
    until("weights move", || bytes(&memory) != before);
    until("a step runs", || daemon.get("/v1/status")["state"] == "training");
    std::thread::sleep(Duration::from_millis(50));
    let trainer = daemon.get("/v1/status")["trainer_pid"].as_u64().unwrap();
    engine.child.kill().unwrap();
    engine.child.wait().unwrap();
    let killed = Instant::now();
    while lives(trainer) {
        assert!(killed.elapsed() < Duration::from_millis(100), "the trainer still runs");
        std::thread::sleep(Duration::from_millis(1));
    }
    let after = bytes(&memory);
    std::thread::sleep(Duration::from_millis(300));
    assert!(bytes(&memory) == after, "weights of a dead server were written");
    until("the daemon says why", || daemon.get("/v1/status")["state"] == "waiting_for_server");
    let queue = daemon.get("/v1/status")["queue"].clone();
    assert_eq!(queue["failed"].as_u64().unwrap_or(0), 0, "{queue}");
}

#[test]
fn an_engine_is_held_for_the_writes_of_each_step() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["server.update=between", "server.prefix_cache_interval=0.1"]);
    wait_trained(&daemon, &post(&daemon, vec![lesson(QUESTION, TAUGHT); 12]));
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT);
    let status = daemon.get("/v1/status");
    assert_eq!(status["counts"]["holds"], 12, "{status}");
    assert_eq!(status["counts"]["holds_overrun"], 0);
    assert!(status["timings"]["hold_ms"].as_f64().unwrap() > 0.0);
    assert!(status["server"].as_str().unwrap().starts_with("apollod engine "));
    assert!(status["shadow_check"].as_str().unwrap().starts_with("16 log-probabilities within "), "{status}");
    until("the last update is told", || {
        daemon.get("/v1/status")["prefix_cache"]["weight_version"] == 12
            && daemon.get("/v1/status")["warning"].is_null()
    });
    let metrics = ureq::get(format!("{}/metrics", daemon.url)).call().unwrap().body_mut().read_to_string().unwrap();
    assert!(metrics.contains("apollod_weight_version 12\n"), "{metrics}");
    assert!(metrics.contains("apollod_holds_total{outcome=\"in_time\"} 12\n"), "{metrics}");
    daemon.stop();
    engine.stop();
}

#[test]
fn events_tell_what_happens_with_the_weights_version() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    let mut stream = ureq::get(format!("{}/v1/events", daemon.url)).call().unwrap();
    wait_trained(&daemon, &post(&daemon, vec![lesson(QUESTION, TAUGHT); 2]));
    daemon.post("/v1/checkpoint", json!({}));
    daemon.post("/v1/checkpoints/0/rollback", json!({}));
    daemon.stop();
    let text = stream.body_mut().read_to_string().unwrap();
    let events: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    let seen: Vec<(&str, u64)> = events
        .iter()
        .filter(|event| event["event"] != "invalidated")
        .map(|event| (event["event"].as_str().unwrap(), event["weight_version"].as_u64().unwrap()))
        .collect();
    assert_eq!(seen, [("step", 1), ("step", 2), ("sync", 2), ("rollback", 3), ("stopped", 3)], "{text}");
    assert!(events.iter().any(|event| event["event"] == "invalidated" && event["done"] == "reset"), "{text}");
    engine.stop();
}

/// Answers every trainer with a manifest, and pings with `epoch`.
fn serve(socket: &Path, manifest: &Value, epoch: &str) {
    // The last case's socket is replaced.
    let _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    let (manifest, epoch) = (manifest.to_string(), epoch.to_owned());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                let request: Value = serde_json::from_str(&line).unwrap();
                let answer = match request["ping"].as_u64() {
                    Some(number) => json!({ "pong": number, "epoch": epoch }).to_string(),
                    None => manifest.clone(),
                };
                if writeln!(&stream, "{answer}").is_err() {
                    break;
                }
            }
        }
    });
}

/// Starts a daemon on the place's socket and gives what it says once that contains `want`.
fn said(place: &Place, want: &str) -> String {
    let mut command = place.daemon_command(&[]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let daemon = Process::of(child);
    let mut status = String::new();
    until(want, || {
        status = daemon.get("/v1/status").to_string();
        status.contains(want)
    });
    status
}

#[test]
fn a_wrong_manifest_is_refused_by_name_and_every_byte_stays() {
    let place = Place::new();
    let config = model::Config::read(&place.model()).unwrap();
    let weights = Arc::new(SharedWeights::load(&place.model(), &config.decoder.tensors(), None).unwrap());
    let read = || (0..weights.len()).map(|i| weights.tensor(i).read()).collect::<Vec<_>>();
    let (before, good) = (read(), serde_json::to_value(weights.manifest()).unwrap());
    Manifest::parse(good.to_string().as_bytes()).unwrap();
    let socket = place.dir.path().join("engine.sock");
    type Change = fn(&mut Value);
    let cases: [(&str, Change, &str); 6] = [
        ("an overlapping span", |m| m["tensors"][4]["offset"] = m["tensors"][3]["offset"].clone(), "overlap"),
        ("an offset out of range", |m| m["tensors"][2]["offset"] = json!(1u64 << 40), "does not lie in allocation 0"),
        (
            "a missing tensor",
            |m| drop(m["tensors"].as_array_mut().unwrap().remove(5)),
            "does not hold 1 of the model's tensors",
        ),
        ("a wrong dtype", |m| m["tensors"][1]["dtype"] = json!("torch.int8"), "int8"),
        ("another model", |m| m["model_dir"] = json!("/tmp"), "point one of them at the other"),
        ("a process that is not the socket's", |m| m["pid"] = json!(1), "names pid 1"),
    ];
    for (what, change, want) in cases {
        let mut manifest = good.clone();
        change(&mut manifest);
        serve(&socket, &manifest, weights.epoch());
        let status = said(&place, want);
        assert!(!status.contains("\"ready\""), "{what}: {status}");
        assert!(read() == before, "{what}: bytes were written");
    }

    // Another model's configuration, with the right directory.
    serve(&socket, &good, weights.epoch());
    let text = std::fs::read_to_string(place.model().join("config.json")).unwrap();
    let mut other: Value = serde_json::from_str(&text).unwrap();
    other["intermediate_size"] = json!(512);
    std::fs::write(place.model().join("config.json"), other.to_string()).unwrap();
    let output = place.daemon_command(&[]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("mlp"), "{error}");
    std::fs::write(place.model().join("config.json"), text).unwrap();

    // A lease that somebody else has, and a server that now holds another epoch.
    serve(&socket, &json!({ "error": "leased by pid 4711" }), weights.epoch());
    let status = said(&place, "leased by pid 4711: another trainer has them");
    assert!(status.contains("waiting_for_server") && !status.contains("is the server running"), "{status}");
    serve(&socket, &good, "00000000000000000000000000000000");
    said(&place, "it now holds epoch 00000000000000000000000000000000");
    assert!(read() == before, "bytes were written");
}
