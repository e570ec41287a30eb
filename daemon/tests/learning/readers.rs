//! Other programs that load the model directory, and what a crash of a sync leaves to them.

use std::fs::{self, File};

use super::harness::{Place, QUESTION, TAUGHT, ask, post, until, wait_trained};
use super::taught;
use serde_json::json;

#[test]
fn a_sync_that_finds_a_reader_is_made_up_for_and_the_trainer_lives_on() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["sync.schedule=@every 1s"]);
    let reader = File::open(place.model().join(".apollod/readers")).unwrap();
    reader.lock_shared().unwrap();
    let weights = || fs::read(place.model().join("model.safetensors")).unwrap();
    let (before, trainer) = (weights(), daemon.get("/v1/status")["trainer_pid"].clone());
    wait_trained(&daemon, &post(&daemon, taught(2)));
    until("a sync fails", || daemon.get("/v1/status")["counts"]["syncs_failed"].as_u64() >= Some(1));
    let status = daemon.get("/v1/status");
    let warning = status["warning"].to_string();
    assert!(warning.contains("another program has been loading the model"), "{status}");
    assert_eq!((&status["trainer_pid"], &status["generation"]), (&trainer, &json!(0)));
    assert!(weights() == before);
    wait_trained(&daemon, &post(&daemon, taught(1)));
    drop(reader);
    until("a later sync is done", || daemon.get("/v1/status")["counts"]["syncs"].as_u64() >= Some(1));
    let status = daemon.get("/v1/status");
    assert_eq!((&status["trainer_pid"], &status["restarts"]), (&trainer, &json!(0)));
    assert!(weights() != before && status["warning"].is_null(), "{status}");
    daemon.stop();
    engine.stop();
}

#[test]
fn engine_and_stage_recover_what_a_crash_left() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&[]);
    wait_trained(&daemon, &post(&daemon, taught(12)));
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 1);
    daemon.stop();
    engine.stop();
    let own = place.model().join(".apollod");
    let tear = || {
        fs::rename(own.join("history/1.delta"), own.join("journal")).unwrap();
    };
    let is_whole = || own.join("history/1.delta").exists() && !own.join("journal").exists();

    tear();
    let engine = place.engine();
    assert!(is_whole());
    assert_eq!(ask(&engine, QUESTION).0, TAUGHT);
    engine.stop();

    tear();
    let live = place.dir.path().join("live");
    let staged = place.apollod().arg("stage").arg(place.model()).arg(&live).output().unwrap();
    assert!(staged.status.success() && is_whole(), "{staged:?}");
    assert!(String::from_utf8_lossy(&staged.stderr).contains("the last sync is whole: generation 1"), "{staged:?}");

    tear();
    let recovered = place.apollod().args(["checkpoint", "recover"]).arg(place.model()).output().unwrap();
    assert!(
        String::from_utf8_lossy(&recovered.stdout).contains("the last sync is whole: generation 1"),
        "{recovered:?}"
    );
    assert!(is_whole());
}

#[test]
fn with_generation_mode_the_link_names_a_directory_of_what_was_synced() {
    let place = Place::new();
    let engine = place.engine();
    let root = place.dir.path().join("model.generations");
    let link = || fs::read_link(root.join("current")).ok();
    let named = |generation: &str| link().is_some_and(|target| target.as_os_str() == generation);
    let same = || {
        let file = |dir: std::path::PathBuf| fs::read(dir.join("model.safetensors")).unwrap();
        file(root.join("current")) == file(place.model())
    };
    let daemon = place.daemon(&["sync.mode=generation"]);
    until("the first directory is there", || named("0"));
    assert!(same());
    wait_trained(&daemon, &post(&daemon, taught(2)));
    daemon.post("/v1/checkpoint", json!({}));
    assert!(named("1") && same(), "who hears of a generation finds its directory");
    assert_eq!(daemon.get("/v1/status")["directory"]["generation"], 1);
    let directory = daemon.get("/v1/status")["directory"]["directory"].clone();
    assert_eq!(directory, json!(root.canonicalize().unwrap().join("1")));

    // It cannot be made: the sync counts, the trainer lives, and the next one makes up for it.
    fs::rename(&root, place.dir.path().join("aside")).unwrap();
    fs::write(&root, "in the way").unwrap();
    wait_trained(&daemon, &post(&daemon, taught(1)));
    let synced = daemon.post("/v1/checkpoint", json!({}));
    assert!(synced["generation"] == 2 && synced["directory_failed"].is_string(), "{synced}");
    until("the status warns", || daemon.get("/v1/status")["warning"].to_string().contains("no directory of its own"));
    fs::remove_file(&root).unwrap();
    fs::rename(place.dir.path().join("aside"), &root).unwrap();
    assert!(named("1"));
    daemon.post("/v1/checkpoints/1/rollback", json!({}));
    assert!(named("3") && same());
    until("the warning is gone", || daemon.get("/v1/status")["warning"].is_null());
    // Started again, with an engine that loads the directory as it is now.
    daemon.stop();
    engine.stop();
    let engine = place.engine();
    fs::remove_file(root.join("current")).unwrap();
    let daemon = place.daemon(&["sync.mode=generation"]);
    until("the link is there again", || named("3"));
    assert_eq!(daemon.get("/v1/status")["restarts"], 0);
    daemon.stop();
    engine.stop();
}
