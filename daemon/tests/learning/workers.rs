//! Several workers on one model: what is trained, in which order, and what is left when they are killed.

use crate::harness::{Place, Process, QUESTION, TAUGHT, ask, lesson, post, until, wait_trained};
use crate::{course, kill, taught};
use serde_json::{Value, json};

const TWO: [&str; 2] = ["train.workers=2", "train.threads=1"];

fn records(daemon: &Process, ids: &[String]) -> Vec<Value> {
    ids.iter().map(|id| daemon.get(&format!("/v1/examples/{id}"))).collect()
}

/// That each of these was trained once, in the order in which they were posted, after `before` others.
fn assert_in_order(records: &[Value], before: u64) {
    for (i, record) in records.iter().enumerate() {
        assert_eq!(record["state"], "trained", "{record}");
        assert_eq!(record["seq"], before + i as u64 + 1, "{record}");
        assert_eq!(record["step"], before + i as u64 + 1, "{record}");
    }
}

/// The files hold finite numbers only.
fn assert_finite(place: &Place) {
    let bytes = std::fs::read(place.model().join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let values = tensors.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    assert!(values.map(|(_, tensor)| tensor["dtype"].clone()).all(|dtype| dtype == "BF16"), "{tensors}");
    let halves = bytes[8 + header..].as_chunks::<2>().0;
    assert!(halves.iter().all(|half| f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16).is_finite()));
}

#[test]
fn two_workers_train_everything_once_and_in_order_and_it_is_learned() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&TWO);
    let lessons = [course(), course(), course(), taught(20)].concat();
    let ids = post(&daemon, lessons);
    wait_trained(&daemon, &ids[..10]);
    // In the midst of it: what is in flight is finished first.
    let synced = daemon.post("/v1/checkpoint", json!({}));
    assert!(synced["cursor"].as_u64() >= Some(10), "{synced}");
    wait_trained(&daemon, &ids);
    let records = records(&daemon, &ids);
    assert_in_order(&records, 0);
    let mean =
        |records: &[Value]| records.iter().map(|r| r["loss"].as_f64().unwrap()).sum::<f64>() / records.len() as f64;
    let (first, third) = (mean(&records[..20]), mean(&records[40..60]));
    assert!(third < first, "the same course for the first and the third time: {first} and {third}");
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT);
    let status = daemon.get("/v1/status");
    assert_eq!((&status["restarts"], &status["budget"]["workers"]), (&json!(0), &json!(2)), "{status}");
    assert_eq!((&status["counts"]["applied"], &status["weight_version"]), (&json!(80), &json!(80)));
    // Side by side: some step missed the update before it, and none missed two.
    assert_eq!(status["counts"]["staleness_max"], 1, "{status}");
    assert!(status["counts"]["staleness_sum"].as_u64() < Some(80), "{status}");
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["cursor"], 80);
    daemon.stop();
    engine.stop();
    assert_finite(&place);
}

#[test]
fn two_workers_killed_in_mid_step_lose_and_double_nothing() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[&TWO[..], &["server.update=between"]].concat());
    wait_trained(&daemon, &post(&daemon, course()));
    daemon.post("/v1/checkpoint", json!({}));
    let ids = post(&daemon, [course(), course(), course(), course()].concat());
    for (wait_ms, steps) in [(3, 24), (17, 28), (29, 32)] {
        until("a trainer is up", || {
            let status = daemon.get("/v1/status");
            status["state"] == "training" && status["step"].as_u64() >= Some(steps)
        });
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        let pid = daemon.get("/v1/status")["trainer_pid"].as_u64().expect("no other one kills it");
        kill(pid);
        until("another trainer is ready", || {
            let status = daemon.get("/v1/status");
            status["trainer_pid"].as_u64().is_some_and(|now| now != pid) && status["state"] == "training"
        });
    }
    wait_trained(&daemon, &ids);
    assert_in_order(&records(&daemon, &ids), 20);
    let status = daemon.get("/v1/status");
    assert_eq!((&status["restarts"], &status["step"]), (&json!(3), &json!(100)), "{status}");
    let counts = &status["counts"];
    assert!(counts["applied"].as_u64() > Some(100), "no step was trained again: the test did not test");
    assert_eq!(counts["holds"], counts["applied"], "the engine is held for each update");
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["cursor"], 100);
    daemon.stop();
    engine.stop();
    assert_finite(&place);
}

#[test]
fn a_gate_stops_one_step_and_not_those_beside_it() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[&TWO[..], &["train.loss_max=6", "train.lr=1e-6"]].concat());
    let nonsense = || lesson(QUESTION, "qzx vvk jjw xqz kkv");
    let lessons: Vec<Value> = taught(12).into_iter().flat_map(|lesson| [lesson, nonsense()]).collect();
    let ids = post(&daemon, lessons);
    until("all are done", || daemon.get("/v1/status")["step"] == 24);
    for (i, record) in records(&daemon, &ids).iter().enumerate() {
        println!("{} {}", record["state"], record["loss"]);
        assert_eq!(record["state"], ["trained", "skipped"][i % 2], "{record}");
        assert_eq!(record["seq"], i + 1, "{record}");
    }
    let status = daemon.get("/v1/status");
    assert_eq!((&status["counts"]["applied"], &status["counts"]["skipped"]), (&json!(12), &json!(12)), "{status}");
    assert_eq!(status["weight_version"], 12);
    daemon.stop();
    engine.stop();
}

/// Of keys and values that were computed with older weights, as many updates old as is allowed and no more, by each
/// worker for itself.
#[test]
fn prefixes_are_kept_by_each_worker() {
    let place = Place::new();
    let engine = place.engine();
    let kept = ["train.prefix_cache_tokens=256", "train.prefix_max_updates=5"];
    let daemon = place.daemon(&[&TWO[..], &kept].concat());
    let ids = post(&daemon, [crate::long_course(), crate::long_course()].concat());
    wait_trained(&daemon, &ids);
    assert_in_order(&records(&daemon, &ids), 0);
    assert_eq!(daemon.get("/v1/status")["restarts"], 0);
    daemon.post("/v1/checkpoint", json!({}));
    daemon.stop();
    engine.stop();
    assert_finite(&place);
}

#[test]
fn a_gpu_takes_one_worker_only() {
    let place = Place::on_a_gpu();
    let engine = place.engine();
    let mut command = place.daemon_command(&["train.workers=2"]);
    let daemon =
        Process::of(command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).spawn().unwrap());
    let why = || daemon.get("/v1/status")["detail"].to_string();
    until("it says why not", || why().contains("train.workers is 2, but the weights lie on a GPU"));
    drop((daemon, engine));
}
