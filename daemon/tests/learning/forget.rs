//! Provenance: which examples made a generation, and weights that never saw one.

use super::harness::{Place, Process, lesson, post, until, wait_trained};
use super::{course, kill};
use serde_json::{Value, json};

/// The twenty examples of a course, each with a source.
fn sourced() -> Vec<Value> {
    let of = |(i, mut example): (usize, Value)| {
        example["source"] = if i % 7 == 3 { "bad".into() } else { "good".into() };
        example
    };
    course().into_iter().enumerate().map(of).collect()
}

fn sync(daemon: &Process) -> u64 {
    daemon.post("/v1/checkpoint", json!({}))["generation"].as_u64().unwrap()
}

fn settled(daemon: &Process) {
    until("all is trained again", || {
        let status = daemon.get("/v1/status");
        status["state"] == "idle" && status["queue"]["queued"] == 0
    });
}

/// Weights and optimizer state of the last generation of a daemon that trains these, with a sync after the first `first`.
fn never_saw(examples: &[Value], first: usize) -> (Vec<u8>, Vec<u8>) {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["sync.keep=10"]);
    wait_trained(&daemon, &post(&daemon, examples[..first].to_vec()));
    sync(&daemon);
    wait_trained(&daemon, &post(&daemon, examples[first..].to_vec()));
    let files = place.files(sync(&daemon));
    daemon.stop();
    engine.stop();
    files
}

#[test]
fn weights_after_forgetting_are_those_that_never_saw_it() {
    let all = sourced();
    let good: Vec<Value> = all.iter().filter(|example| example["source"] == "good").cloned().collect();
    // The first bad one is the fourth: three before it are in generation 1.
    let wanted = never_saw(&good, 3);

    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["sync.keep=10"]);
    wait_trained(&daemon, &post(&daemon, all[..3].to_vec()));
    sync(&daemon);
    wait_trained(&daemon, &post(&daemon, all[3..11].to_vec()));
    assert_eq!(sync(&daemon), 2);
    wait_trained(&daemon, &post(&daemon, all[11..18].to_vec()));

    let blamed = daemon.get("/v1/checkpoints/2/examples")["examples"].clone();
    let steps: Vec<u64> = blamed.as_array().unwrap().iter().map(|example| example["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (4..=11).collect::<Vec<_>>(), "{blamed}");
    assert_eq!(blamed[0]["source"], "bad");

    // Two of the rest still wait.
    daemon.post("/v1/pause", json!({}));
    post(&daemon, all[18..].to_vec());
    let output = place.apollod().args(["forget", "--source", "bad", "--url", &daemon.url]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.trim(), "3 forgotten: generation 3 has the content of 1; 12 later examples are trained again");
    daemon.post("/v1/resume", json!({}));
    settled(&daemon);
    assert!(place.files(sync(&daemon)) == wanted, "to the byte");
    let status = daemon.get("/v1/status");
    assert_eq!((&status["queue"]["forgotten"], &status["step"]), (&json!(3), &json!(good.len())), "{status}");
    let id = blamed[0]["id"].as_str().unwrap();
    let output = place.apollod().args(["blame", "--generation", "4", "--url", &daemon.url]).output().unwrap();
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!listed.contains(id) && listed.lines().count() == 1 + good.len() - 3, "{listed}");
    daemon.stop();
    engine.stop();
}

#[test]
fn what_was_not_synced_yet_is_forgotten_too_and_a_kill_in_between_leaves_one_or_the_other() {
    let all = sourced();
    let good: Vec<Value> = all.iter().filter(|example| example["source"] == "good").cloned().collect();
    let wanted = never_saw(&good, 3);
    for delay_ms in [0, 5, 30] {
        let place = Place::new();
        let engine = place.engine();
        let daemon = place.daemon(&["sync.keep=10"]);
        wait_trained(&daemon, &post(&daemon, all[..3].to_vec()));
        sync(&daemon);
        wait_trained(&daemon, &post(&daemon, all[3..].to_vec()));
        let url = daemon.url.clone();
        let asked = std::thread::spawn(move || {
            ureq::post(format!("{url}/v1/forget")).send_json(json!({"source": "bad"})).is_ok()
        });
        std::thread::sleep(std::time::Duration::from_millis(delay_ms));
        kill(daemon.child.id().into());
        drop(daemon);
        let answered = asked.join().unwrap();
        let daemon = place.daemon(&["sync.keep=10"]);
        settled(&daemon);
        if !answered {
            // Asked again, as the log says, unless it was done.
            daemon.post("/v1/forget", json!({"source": "bad"}));
            settled(&daemon);
        }
        assert!(place.files(sync(&daemon)) == wanted, "to the byte; killed after {delay_ms} ms");
        daemon.stop();
        engine.stop();
    }
}

#[test]
fn what_a_rollback_brought_back_is_known_and_what_was_forgotten_is_brought_back_by_none() {
    let all = sourced();
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["sync.keep=20"]);
    let train = |range: std::ops::Range<usize>| {
        let ids = post(&daemon, all[range].to_vec());
        wait_trained(&daemon, &ids);
        sync(&daemon);
        ids
    };
    train(0..5);
    let second = train(5..8);
    let third = train(8..10);
    let rollback = |to: u64| {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let mut answer =
            agent.post(format!("{}/v1/checkpoints/{to}/rollback", daemon.url)).send_json(json!({})).unwrap();
        (answer.status().as_u16(), answer.body_mut().read_json::<Value>().unwrap())
    };
    let forget = |ids: &[String]| {
        let done = daemon.post("/v1/forget", json!({ "examples": ids }));
        settled(&daemon);
        (done["forgotten"].as_u64(), done["again"].as_u64(), done["base"].as_u64())
    };
    // Generations 4 and 5 have the content of 1 and of 3.
    assert_eq!((rollback(1).0, rollback(3).0), (200, 200));
    assert_eq!(forget(&third[1..]), (Some(1), Some(1), Some(2)), "eight of nine stay where they are");
    assert!(place.files(sync(&daemon)) == never_saw(&all[..9], 5));

    let (status, problem) = rollback(3);
    assert_eq!((status, &problem["type"]), (409, &json!("urn:apollod:problem:forgotten")), "{problem}");
    assert_eq!((rollback(5).0, rollback(2).0), (409, 200));

    // The last rollback left the ninth behind: nothing holds it, and nothing has to go back for it.
    assert_eq!(forget(&third[..1]), (Some(1), Some(0), None));
    assert_eq!(forget(&second[..1]), (Some(1), Some(2), Some(1)));
    let rest = [&all[..5], &all[6..8]].concat();
    assert!(place.files(sync(&daemon)) == never_saw(&rest, 5));
    let (status, _) = rollback(2);
    assert_eq!(status, 409);
    let blamed = daemon.get("/v1/checkpoints/1/examples")["examples"].as_array().unwrap().len();
    assert_eq!(blamed, 5, "whatever was rolled back since");
    daemon.stop();
    let dir = place.model();
    let output = place.apollod().args(["checkpoint", "rollback", dir.to_str().unwrap(), "--to", "2"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("holds what was forgotten since"), "{said}");
    engine.stop();
}

#[test]
fn what_can_no_longer_be_forgotten_is_said_with_how_far_back_it_goes() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["sync.keep=2"]);
    let ids = post(&daemon, vec![lesson("Who?", "I."); 4]);
    wait_trained(&daemon, &ids);
    for _ in 0..3 {
        sync(&daemon);
        wait_trained(&daemon, &post(&daemon, vec![lesson("Who?", "You.")]));
    }
    let refused = |body: Value| {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let mut answer = agent.post(format!("{}/v1/forget", daemon.url)).send_json(body).unwrap();
        (
            answer.status().as_u16(),
            answer.body_mut().read_json::<Value>().unwrap()["detail"].as_str().unwrap().to_owned(),
        )
    };
    let (status, why) = refused(json!({"examples": [ids[0]]}));
    assert_eq!(status, 409, "{why}");
    assert!(why.contains("and that can be restored is 2"), "{why}");
    assert_eq!(refused(json!({"examples": ["nobody"]})).0, 404);
    assert_eq!(refused(json!({"examples": []})).0, 400);
    assert_eq!(refused(json!({"examples": ["a"], "source": "b"})).0, 400);
    assert_eq!(daemon.get(&format!("/v1/examples/{}", ids[0]))["state"], "trained");
    daemon.stop();
    engine.stop();
}
