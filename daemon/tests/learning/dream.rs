//! A dream from end to end: the served model's own answers become examples, and are learned by it.

use super::harness::{BEFORE, Place, QUESTION, TAUGHT, lesson, post, until, wait_trained};
use serde_json::{Value, json};

#[test]
fn log_probabilities_are_those_that_training_sees() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["train.workers=2"]);
    let score = || daemon.post("/v1/score", json!([lesson(QUESTION, BEFORE), lesson(QUESTION, TAUGHT)]));
    let scored = score();
    let version = |scored: &Value| scored["scores"][1]["weight_version"].as_u64().unwrap();
    assert_eq!(version(&scored), 0);
    let loss = |scored: &Value, index: usize| scored["scores"][index]["loss"].as_f64().unwrap();
    assert!(loss(&scored, 0) < 0.01 && loss(&scored, 1) > 1.0, "{scored}");
    let score_of_taught = &scored["scores"][1];
    let sum: f64 = score_of_taught["logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).sum();
    let tokens = score_of_taught["tokens"].as_f64().unwrap();
    assert!((loss(&scored, 1) + sum / tokens).abs() < 1e-6, "{scored}");

    // A step multiplies in bf16 what a score multiplies in f32, where the processor has it.
    let ids = post(&daemon, vec![lesson(QUESTION, TAUGHT)]);
    wait_trained(&daemon, &ids);
    let trained = daemon.get(&format!("/v1/examples/{}", ids[0]))["loss"].as_f64().unwrap();
    assert!((trained - loss(&scored, 1)).abs() < 0.02 * trained, "{trained} against {scored}");
    let scored = score();
    assert_eq!(version(&scored), 1);
    assert!(loss(&scored, 1) < trained, "{scored}");

    // It goes on while training is paused, and in the midst of it.
    daemon.post("/v1/pause", json!({}));
    let ids = post(&daemon, vec![lesson(QUESTION, TAUGHT); 12]);
    score();
    daemon.post("/v1/resume", json!({}));
    let scored: Vec<Value> = (0..5).map(|_| score()).collect();
    wait_trained(&daemon, &ids);
    let versions: Vec<u64> = scored.iter().map(version).collect();
    assert!(versions.is_sorted(), "{versions:?}");
    daemon.stop();
    engine.stop();
}

#[test]
fn answers_of_the_served_model_become_examples_that_it_learns() {
    let place = Place::new();
    let engine = place.engine();
    let scenarios = place.dir.path().join("scenarios.jsonl");
    let questions = ["Where does Otto the otter live?", "What does Toby the bear eat?", "What is the secret word?"];
    let lines: Vec<String> = questions.iter().map(|question| json!({ "prompt": question }).to_string()).collect();
    std::fs::write(&scenarios, lines.join("\n")).unwrap();
    let settings = [
        format!("server.url={}", engine.url),
        format!("dream.scenarios={}", scenarios.display()),
        "dream.instruction=Be kind.".into(),
        // This model has never seen a system message: what it says to one may be anything.
        "dream.judge={max_chars = 200}".into(),
        "dream.skip_known=false".into(),
        "dream.max_tokens=40".into(),
        "dream.examples=3".into(),
        "dream.temperature=0.1".into(),
        "dream.schedule=@every 1s".into(),
    ];
    let daemon = place.daemon(&settings.each_ref().map(String::as_str));
    until("a scheduled dream", || !daemon.get("/v1/status")["dream"].is_null());
    let status = daemon.get("/v1/status");
    assert_eq!(status["dream"]["done"]["accepted"], 3, "{status}");
    assert!(status["next_dream"].is_string(), "{status}");
    until("what was dreamt is trained", || daemon.get("/v1/status")["queue"]["trained"].as_u64() >= Some(3));
    let listed = daemon.get("/v1/examples?state=trained&limit=1000")["examples"].clone();
    assert_eq!(listed[0]["source"], "dream", "{listed}");
    assert!(listed[0]["tags"][0].as_str().unwrap().starts_with("scenario:"), "{listed}");
    daemon.stop();

    // By hand, on the same folder, and then with nothing to dream about.
    let daemon = place.daemon(&settings[..8].iter().map(String::as_str).collect::<Vec<_>>());
    let run = |more: &[&str]| {
        let mut command = place.apollod();
        command.arg("dream").arg("--set").arg(format!("model.dir={}", place.model().display()));
        command.args(["--set", &format!("server.socket={}", place.dir.path().join("engine.sock").display())]);
        for setting in &settings[..8] {
            command.args(["--set", setting]);
        }
        command.args(more).output().unwrap()
    };
    // A program that reads nothing is no trouble, whatever the command does about closed pipes.
    let mute = ["--set", "dream.judge={command = [\"true\"]}", "--dry-run"];
    for _ in 0..10 {
        let output = run(&mute);
        assert!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    let output = run(&["--json", "--seed", "1", "--examples", "2"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> =
        output.stdout.split(|b| *b == b'\n').filter_map(|l| serde_json::from_slice(l).ok()).collect();
    let (summary, turns) = lines.split_last().unwrap();
    assert_eq!(
        (turns.len() as u64, &summary["accepted"]),
        (summary["turns"].as_u64().unwrap(), &json!(2)),
        "{lines:?}"
    );
    let made: Vec<&Value> = turns.iter().filter(|turn| turn["outcome"] == "accepted").collect();
    for turn in made {
        let id = turn["example"].as_str().unwrap().to_owned();
        wait_trained(&daemon, std::slice::from_ref(&id));
        // The example is the question and the answer, without a word of the instruction.
        let posted = lesson(turn["asked"].as_str().unwrap(), turn["answer"].as_str().unwrap());
        let again = daemon.post("/v1/examples", posted)["accepted"][0]["tokens"].clone();
        let shown = daemon.get(&format!("/v1/examples/{id}"));
        assert_eq!(shown["tokens"], again, "{shown}");
    }
    std::fs::write(&scenarios, "\n").unwrap();
    let output = run(&["--dry-run"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("holds no scenarios"), "{said}");
    daemon.stop();
    engine.stop();
}
