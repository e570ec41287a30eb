//! The real binary over HTTP and its command line, with tests/support/fake_trainer.sh in the trainer's place.

#[path = "support/tiny_model.rs"]
#[allow(dead_code)]
mod tiny_model;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A served tiny model, ended when dropped.
struct Daemon {
    dir: tempfile::TempDir,
    process: Child,
    url: String,
}

struct Answer {
    status: u16,
    content_type: String,
    retry_after: Option<String>,
    body: Value,
}

impl Daemon {
    fn start(settings: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        tiny_model::write(dir.path(), tiny_model::CHATML);
        Self::start_in(dir, settings)
    }

    fn start_in(dir: tempfile::TempDir, settings: &[&str]) -> Self {
        let mut command = apollod(&["serve", "--trainer", &support("fake_trainer.sh")]);
        for setting in settings.iter().chain(&["http.listen=127.0.0.1:0", "server.live=/nonexistent/live"]) {
            command.args(["--set", setting]);
        }
        command.arg("--set").arg(format!("model.dir={}", dir.path().display()));
        command.env("FAKE_TRAINER", dir.path()).stderr(Stdio::inherit());
        let address = dir.path().join(".apollod/address");
        // A killed daemon leaves its own.
        let _ = std::fs::remove_file(&address);
        let process = command.spawn().unwrap();
        let mut daemon = Self { dir, process, url: String::new() };
        daemon.until("an address", || std::fs::read_to_string(&address).is_ok_and(|url| url.ends_with('\n')));
        daemon.url = std::fs::read_to_string(&address).unwrap().trim().to_owned();
        daemon
    }

    fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !holds() {
            assert!(Instant::now() < deadline, "waited 30 s for {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = agent.run(request.body(body).unwrap()).unwrap();
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let (content_type, retry_after) = (header("content-type").unwrap_or_default(), header("retry-after"));
        let text = response.body_mut().read_to_string().unwrap();
        let status = response.status().as_u16();
        Answer { status, content_type, retry_after, body: serde_json::from_str(&text).unwrap_or_default() }
    }

    fn wait_for_state(&self, id: &str, state: &str) -> Value {
        let path = format!("/v1/examples/{id}");
        self.until(state, || self.get(&path).body["state"] == state);
        self.get(&path).body
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pause(&self) {
        self.until("ready", || self.get("/ready").status == 200);
        assert_eq!(self.post("/v1/pause", &json!({})).status, 200);
        self.until("paused", || self.get("/v1/status").body["state"] == "paused");
    }

    fn cli(&self, arguments: &[&str]) -> Output {
        apollod(arguments).env("APOLLOD_URL", &self.url).output().unwrap()
    }

    fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.process.wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

fn apollod(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_apollod"));
    command.args(arguments).env_remove("APOLLOD_CONFIG");
    command
}

fn support(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support").join(name).display().to_string()
}

fn text(context: &str) -> Value {
    json!({ "context": context, "decision": "yes" })
}

fn is_problem(answer: &Answer, status: u16) -> bool {
    answer.status == status
        && answer.content_type == "application/problem+json"
        && answer.body["status"] == status
        && ["type", "title", "detail"].iter().all(|member| answer.body[member].is_string())
}

#[test]
fn an_example_is_accepted_trained_and_can_be_asked_about() {
    let daemon = Daemon::start(&[]);
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]);
    let answer = daemon.post("/v1/examples", &json!({ "messages": messages, "tags": ["greeting"], "source": "test" }));
    assert_eq!(answer.status, 202);
    let accepted = &answer.body["accepted"][0];
    assert_eq!((&accepted["index"], &accepted["decision_tokens"]), (&json!(0), &json!(3)));
    assert_eq!(answer.body["refused"], json!([]));
    let record = daemon.wait_for_state(accepted["id"].as_str().unwrap(), "trained");
    assert_eq!(record["loss"], json!(0.5));
    assert_eq!((&record["seq"], &record["step"], &record["in_files"]), (&json!(1), &json!(1), &json!(false)));
    assert_eq!((&record["tags"], &record["source"]), (&json!(["greeting"]), &json!("test")));

    let status = daemon.get("/v1/status").body;
    assert_eq!((&status["queue"]["trained"], &status["weight_version"]), (&json!(1), &json!(1)));
    let synced = daemon.post("/v1/checkpoint", &json!({}));
    assert_eq!((synced.status, &synced.body["generation"]), (200, &json!(1)));
    assert_eq!(daemon.get(&format!("/v1/examples/{}", record["id"].as_str().unwrap())).body["in_files"], json!(true));
    assert_eq!(daemon.request("POST", "/v1/checkpoint?wait=false", &[], b"").status, 202);
    assert!(is_problem(&daemon.get("/v1/examples/unknown"), 404));
    assert!(is_problem(&daemon.get("/nothing"), 404));
    assert!(is_problem(&daemon.get("/v1/pause"), 405));
    let answer = daemon.post("/v1/checkpoints/7/rollback", &json!({}));
    assert!(is_problem(&answer, 404), "{}", answer.body);
    assert!(answer.body["detail"].as_str().unwrap().contains("there is no generation 7"), "{}", answer.body);
    assert!(is_problem(&daemon.post("/v1/checkpoints/x/rollback", &json!({})), 400));
}

#[test]
fn a_bad_line_is_refused_by_number_and_the_rest_goes_in() {
    let daemon = Daemon::start(&["train.max_tokens=20"]);
    let body = format!(
        "{}\nnot json\n\n{}\n{}\n{}\n",
        text("one"),
        json!({"context": "x"}),
        text("far too long for twenty tokens"),
        text("two")
    );
    for content_type in ["application/x-ndjson", "text/plain"] {
        let answer = daemon.request("POST", "/v1/examples", &[("content-type", content_type)], body.as_bytes());
        assert_eq!(answer.status, 202);
        let lines = |list: &Value| -> Vec<u64> {
            list.as_array().unwrap().iter().map(|entry| entry["line"].as_u64().unwrap()).collect()
        };
        assert_eq!(lines(&answer.body["accepted"]), [1, 6]);
        assert_eq!(lines(&answer.body["refused"]), [2, 4, 5]);
        let refused = &answer.body["refused"];
        assert!(refused[0]["reason"].as_str().unwrap().contains("not JSON"), "{refused}");
        assert_eq!((&refused[1]["field"], &refused[1]["reason"]), (&json!("decision"), &json!("missing")));
        assert!(refused[2]["reason"].as_str().unwrap().contains("at most 20 are taken (train.max_tokens"), "{refused}");
    }
}

#[test]
fn a_body_of_which_nothing_can_be_taken_is_a_problem_that_lists_why() {
    let daemon = Daemon::start(&["http.max_body_bytes=2000"]);
    let answer = daemon.post("/v1/examples", &json!([{"contxt": "x", "decision": "y"}, 7]));
    assert!(is_problem(&answer, 400), "{}", answer.body);
    let refused = &answer.body["refused"];
    assert_eq!(refused[0]["field"], "contxt");
    assert!(refused[0]["reason"].as_str().unwrap().contains("did you mean `context`?"), "{refused}");
    assert_eq!(refused[1]["index"], 1);
    let answer = daemon.request("POST", "/v1/examples", &[], b"{\"context\": \n oops}");
    assert!(is_problem(&answer, 400) && answer.body["line"] == 2, "{}", answer.body);
    assert!(is_problem(&daemon.request("POST", "/v1/examples", &[], b""), 400));
    assert!(is_problem(&daemon.request("POST", "/v1/examples", &[], &[b' '; 3000]), 413));
}

#[test]
fn a_full_queue_answers_429_with_retry_after_and_takes_nothing() {
    let daemon = Daemon::start(&["queue.capacity=3"]);
    daemon.pause();
    assert_eq!(daemon.post("/v1/examples", &json!([text("a"), text("b")])).status, 202);
    let answer = daemon.post("/v1/examples", &json!([text("c"), text("d")]));
    assert!(is_problem(&answer, 429), "{}", answer.body);
    assert!(answer.retry_after.unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(daemon.get("/v1/status").body["queue"]["queued"], 2);
    let many: Vec<Value> = (0..4).map(|_| text("e")).collect();
    let answer = daemon.post("/v1/examples", &json!(many));
    assert!(is_problem(&answer, 413), "more than ever fit");
    let detail = answer.body["detail"].as_str().unwrap();
    assert!(detail.contains("4 examples were posted at once and queue.capacity is 3"), "{detail}");
    assert_eq!(daemon.post("/v1/resume", &json!({})).status, 200);
    daemon.until("room", || daemon.get("/v1/status").body["queue"]["trained"] == 2);
    assert_eq!(daemon.post("/v1/examples", &json!([text("c"), text("d")])).status, 202);
}

#[test]
fn a_repeated_request_with_its_key_is_answered_alike_and_done_once() {
    let daemon = Daemon::start(&[]);
    let post = |body: &Value| {
        daemon.request("POST", "/v1/examples", &[("idempotency-key", "k1")], body.to_string().as_bytes())
    };
    let (first, second) = (post(&text("a")), post(&text("a")));
    assert_eq!((first.status, second.status), (202, 202));
    assert_eq!(first.body, second.body);
    assert!(is_problem(&post(&text("b")), 422));
    daemon.wait_for_state(first.body["accepted"][0]["id"].as_str().unwrap(), "trained");
    assert_eq!(daemon.get("/v1/status").body["queue"]["trained"], 1);
}

#[test]
fn a_web_page_cannot_reach_a_loopback_daemon() {
    let daemon = Daemon::start(&[]);
    let with = |name: &str, value: &str| daemon.request("GET", "/v1/status", &[(name, value)], b"");
    assert!(is_problem(&with("host", "evil.example:8844"), 403));
    assert!(is_problem(&with("origin", "https://evil.example"), 403));
    assert!(is_problem(&with("origin", "null"), 403));
    assert_eq!(with("host", "localhost:8844").status, 200);
    assert_eq!(with("origin", "http://localhost:3000").status, 200);
}

#[test]
fn a_configured_key_is_asked_for_except_by_health_and_ready() {
    let daemon = Daemon::start(&["http.api_key=0123456789abcdef"]);
    assert!(is_problem(&daemon.get("/v1/status"), 401));
    assert!(is_problem(&daemon.post("/train", &json!({})), 401));
    let stderr = String::from_utf8(daemon.cli(&["status"]).stderr).unwrap();
    assert!(stderr.contains("no API key was sent") && stderr.contains("APOLLOD_API_KEY"), "{stderr}");
    let stderr = String::from_utf8(daemon.cli(&["status", "--api-key", "0123456789abcdeX"]).stderr).unwrap();
    assert!(stderr.contains("the API key is wrong") && stderr.contains("--api-key"), "{stderr}");
    let with = |key: &str| daemon.request("GET", "/v1/status", &[("authorization", key)], b"").status;
    assert_eq!(with("Bearer 0123456789abcdeX"), 401);
    assert_eq!(with("Bearer 0123456789abcdef"), 200);
    assert_eq!(daemon.get("/health").status, 200);
    daemon.until("ready", || daemon.get("/ready").status == 200);
    let shown = std::fs::read_to_string(daemon.file(".apollod/trainer.toml")).unwrap();
    assert!(!shown.contains("0123456789abcdef"), "the trainer's file holds the key");
}

#[test]
fn ready_is_503_while_there_is_no_server() {
    let dir = tempfile::tempdir().unwrap();
    tiny_model::write(dir.path(), tiny_model::CHATML);
    std::fs::write(dir.path().join("no_server"), "").unwrap();
    let daemon = Daemon::start_in(dir, &[]);
    daemon.until("waiting", || daemon.get("/v1/status").body["state"] == "waiting_for_server");
    let answer = daemon.get("/ready");
    assert!(is_problem(&answer, 503), "{}", answer.body);
    assert!(answer.body["detail"].as_str().unwrap().contains("nothing listens on the socket"));
    assert_eq!(daemon.get("/health").status, 200);
    assert!(is_problem(&daemon.post("/v1/checkpoint", &json!({})), 503));
    std::fs::remove_file(daemon.file("no_server")).unwrap();
    daemon.until("ready", || daemon.get("/ready").status == 200);
}

#[test]
fn a_job_of_the_earlier_system_cycles_through_its_samples() {
    let daemon = Daemon::start(&["train.batch_examples=4"]);
    let samples =
        json!([{"input": "a", "expected_output": "b", "rationale": "because"}, {"input": "c", "expected_output": "d"}]);
    let config = json!({"learning_rate": 1e-4, "max_steps": 5});
    let answer = daemon.post("/train", &json!({"training_data": {"samples": samples, "config": config}}));
    assert_eq!(answer.status, 202, "{}", answer.body);
    assert!(answer.body["rationale"].as_str().unwrap().starts_with("left out"));
    let path = format!("/status/{}", answer.body["job_id"].as_str().unwrap());
    daemon.until("the job", || daemon.get(&path).body["status"] == "completed");
    let job = daemon.get(&path).body;
    assert_eq!((&job["step"], &job["max_steps"]), (&json!(5), &json!(5)));
    assert_eq!(job["loss_history"], json!([0.5, 0.5, 0.5, 0.5, 0.5]));
    let log = std::fs::read_to_string(daemon.file("log")).unwrap();
    let trains: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(trains.len(), 5, "a step each: {log}");
    assert!(trains.iter().all(|train| (train["lr"].as_f64().unwrap() - 1e-4).abs() < 1e-9));
    assert_eq!(trains[0]["examples"][0]["ids"], trains[2]["examples"][0]["ids"]);
    assert_ne!(trains[0]["examples"][0]["ids"], trains[1]["examples"][0]["ids"]);

    let bad = json!({"training_data": {"samples": [{"input": "a", "expected_output": ""}]}});
    let answer = daemon.post("/train", &bad);
    assert!(is_problem(&answer, 400) && answer.body["field"] == "training_data.samples[0]", "{}", answer.body);
    let bad =
        json!({"training_data": {"samples": [{"input": "a", "expected_output": "b"}], "config": {"max_steps": 0}}});
    assert!(is_problem(&daemon.post("/train", &bad), 400));
    let sample = json!({"input": "a", "expected_output": "b"});
    for (bad, field) in [
        (json!({"training_data": {"samples": [sample]}, "epochs": 3}), "epochs"),
        (json!({"training_data": {"samples": [sample], "config": {"max_step": 3}}}), "training_data.config.max_step"),
        (
            json!({"training_data": {"samples": [sample], "config": {"max_steps": "3"}}}),
            "training_data.config.max_steps",
        ),
        (json!({"training_data": {"samples": [{"input": "a"}]}}), "training_data.samples[0].expected_output"),
        (json!({"training_data": {"samples": [sample], "config": 3}}), "training_data.config"),
        (json!({}), "training_data"),
    ] {
        let answer = daemon.post("/train", &bad);
        assert!(is_problem(&answer, 400) && answer.body["field"] == field, "{field}: {}", answer.body);
    }
    assert!(is_problem(&daemon.get("/status/unknown"), 404));
    assert_eq!(daemon.get("/checkpoints").status, 200);
}

#[test]
fn on_sigterm_the_step_is_finished_and_synced_and_the_next_start_goes_on() {
    let mut daemon = Daemon::start(&[]);
    let body: Vec<Value> = ["a", "b", "c"].into_iter().map(text).collect();
    std::fs::write(daemon.file("step_seconds"), "0.3").unwrap();
    let answer = daemon.post("/v1/examples", &json!(body));
    let ids: Vec<String> = (0..3).map(|i| answer.body["accepted"][i]["id"].as_str().unwrap().to_owned()).collect();
    daemon.until("a step", || daemon.get("/v1/status").body["state"] == "training");
    assert!(daemon.terminate().success());
    assert!(!daemon.file(".apollod/address").exists());
    let synced: u64 = std::fs::read_to_string(daemon.file("cursor")).unwrap().trim().parse().unwrap();
    assert!((1..3).contains(&synced), "cursor {synced}");

    let dir = std::mem::replace(&mut daemon.dir, tempfile::tempdir().unwrap());
    let daemon = Daemon::start_in(dir, &[]);
    for id in &ids {
        daemon.wait_for_state(id, "trained");
    }
    let log = std::fs::read_to_string(daemon.file("log")).unwrap();
    assert_eq!(log.lines().filter(|line| line.contains("train")).count(), 3, "each example once: {log}");
}

#[test]
fn a_killed_daemon_takes_its_trainer_with_it_and_loses_nothing() {
    let mut daemon = Daemon::start(&[]);
    std::fs::write(daemon.file("step_seconds"), "60").unwrap();
    let answer = daemon.post("/v1/examples", &json!([text("a"), text("b")]));
    let id = answer.body["accepted"][1]["id"].as_str().unwrap().to_owned();
    daemon.until("a step", || daemon.get("/v1/status").body["state"] == "training");
    let trainer = daemon.get("/v1/status").body["trainer_pid"].as_u64().unwrap();
    daemon.process.kill().unwrap();
    daemon.process.wait().unwrap();
    let stat = format!("/proc/{trainer}/stat");
    daemon.until("the trainer's end", || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z ")));

    std::fs::write(daemon.file("step_seconds"), "0").unwrap();
    let dir = std::mem::replace(&mut daemon.dir, tempfile::tempdir().unwrap());
    let daemon = Daemon::start_in(dir, &[]);
    daemon.wait_for_state(&id, "trained");
}

#[test]
fn a_second_daemon_on_the_same_model_is_refused() {
    let daemon = Daemon::start(&[]);
    let dir = format!("model.dir={}", daemon.dir.path().display());
    let output =
        apollod(&["serve", "--set", &dir, "--set", "server.live=/x", "--set", "http.listen=127.0.0.1:0"]).output();
    let output = output.unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("another apollod serves this model directory"), "{stderr}");
}

#[test]
fn the_command_line_trains_a_file_and_reports_bad_lines_and_status() {
    let daemon = Daemon::start(&[]);
    let file = daemon.file("examples.jsonl");
    std::fs::write(&file, format!("{}\n\n{}\n{{\"context\": 1}}\n", text("a"), text("b"))).unwrap();
    let output = daemon.cli(&["train", file.to_str().unwrap()]);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "a refused line: {stderr}");
    assert!(stdout.contains("2 trained, 0 skipped, 0 failed, 1 refused; loss 0.5000 -> 0.5000"), "{stdout}");
    assert!(stderr.contains("line 4: context: must be text, is 1"), "{stderr}");

    let output = daemon.cli(&["status"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.starts_with("apollod ") && stdout.contains("2 trained"), "{stdout}");
    let json: Value = serde_json::from_slice(&daemon.cli(&["status", "--json"]).stdout).unwrap();
    assert_eq!(json["queue"]["trained"], 2);
    // The directory knows its daemon's address.
    let sync = || apollod(&["checkpoint", "sync", daemon.dir.path().to_str().unwrap()]).output().unwrap();
    let stdout = String::from_utf8_lossy(&sync().stdout).into_owned();
    assert!(stdout.starts_with("generation 1: 3 of 10 blocks changed"), "{stdout}");
    let other = tempfile::tempdir().unwrap();
    let output = apollod(&["checkpoint", "sync", other.path().to_str().unwrap()]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("no daemon runs on"));
}

#[test]
fn an_unknown_configuration_key_ends_the_start_with_the_nearest_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("apollod.toml");
    std::fs::write(&file, "[train]\nlearning_rat = 1e-5\nlrr = 1\n").unwrap();
    let output = apollod(&["serve", "--config", file.to_str().unwrap()]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(stderr.contains("apollod.toml:") && stderr.contains("unknown key"), "{stderr}");
    let output = apollod(&["status"]).env("APOLLOD_URL", "http://127.0.0.1:9").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("start one with `apollod serve`"));
}

#[test]
fn train_says_why_nothing_moves_and_posts_in_parts_that_fit() {
    let daemon = Daemon::start(&["queue.capacity=3"]);
    daemon.pause();
    let file = daemon.file("examples.json");
    let list: Vec<Value> = (0..12).map(|i| text(&format!("example {i}"))).collect();
    std::fs::write(&file, serde_json::to_string_pretty(&list).unwrap()).unwrap();
    // Without http://, as one types it.
    let mut train = apollod(&["train", file.to_str().unwrap()]);
    train.env("APOLLOD_URL", daemon.url.trim_start_matches("http://"));
    let train = train.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    daemon.until("a full queue", || daemon.get("/v1/status").body["queue"]["queued"] == 3);
    std::thread::sleep(Duration::from_secs(4));
    assert!(daemon.cli(&["resume"]).status.success());
    let output = train.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stderr}");
    assert!(stdout.contains("12 trained, 0 skipped, 0 failed, 0 refused"), "{stdout}");
    // Although it was full again and again.
    assert_eq!(stderr.matches("the queue is full").count(), 1, "{stderr}");
    assert_eq!(stderr.matches("the daemon is paused").count(), 1, "{stderr}");
    assert!(stderr.contains("12/12, loss 0.5000"), "{stderr}");

    std::fs::write(&file, "\n").unwrap();
    let output = daemon.cli(&["train", file.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("holds no examples"));
    assert!(daemon.cli(&["pause"]).status.success());
    daemon.until("paused", || daemon.get("/v1/status").body["state"] == "paused");
}

#[test]
fn commands_on_a_directory_say_what_is_missing() {
    let stderr = |arguments: &[&str]| {
        let output = apollod(arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let there = dir.path().join("model.safetensors");
    std::fs::write(&there, "weights").unwrap();
    for arguments in [
        &["engine", "/nonexistent", "--socket", "s"][..],
        &["stage", "/nonexistent", "/nonexistent/live"],
        &["doctor", "--model", "/nonexistent"],
        &["grads", "--model", "/nonexistent", "--examples", "x", "--out", "y"],
        &["serve", "--set", "model.dir=/nonexistent"],
    ] {
        let error = stderr(arguments);
        assert!(error.contains("/nonexistent does not exist"), "{arguments:?}: {error}");
        let weights = there.to_str().unwrap();
        let in_its_place: Vec<String> = arguments.iter().map(|a| a.replace("/nonexistent", weights)).collect();
        let error = stderr(&in_its_place.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(error.contains("is no directory"), "{in_its_place:?}: {error}");
    }
    assert!(stderr(&["engine", path, "--socket", "s"]).contains("has no config.json"));
    let error = stderr(&["serve", "--config", "/nonexistent.toml"]);
    assert_eq!(error.matches("No such file").count(), 1, "{error}");
    assert!(error.contains("cannot read the configuration file /nonexistent.toml"), "{error}");
    std::fs::write(dir.path().join("config.json"), r#"{"architectures": ["GPT2LMHeadModel"]}"#).unwrap();
    let grads = stderr(&["grads", "--model", path, "--examples", "x", "--out", there.to_str().unwrap()]);
    assert!(grads.contains("exists already"), "{grads}");
    assert_eq!(std::fs::read(&there).unwrap(), b"weights");
    let live = dir.path().join("live");
    let stage = stderr(&["stage", path, live.to_str().unwrap()]);
    assert!(stage.contains("GPT2LMHeadModel") && !live.exists(), "{stage}");
    let engine = stderr(&["engine", path, "--socket", live.to_str().unwrap()]);
    assert!(engine.contains("tokenizer.json is missing: copy it"), "{engine}");
    let bogus = apollod(&["status"]).env("APOLLOD_LOG", "bogus").output().unwrap();
    assert!(String::from_utf8_lossy(&bogus.stderr).contains("use off, error, warn"));
}

#[test]
fn adopting_makes_a_generation_of_files_that_were_changed() {
    let mut daemon = Daemon::start(&[]);
    let path = daemon.dir.path().to_str().unwrap().to_owned();
    let weights = daemon.file("model.safetensors");
    let header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let file = |value: u8| [&(header.len() as u64).to_le_bytes()[..], header, &[value; 8]].concat();
    std::fs::write(&weights, file(1)).unwrap();
    drop(checkpoint::Checkpoint::open(daemon.dir.path()).unwrap());
    let run = |action: &str| apollod(&["checkpoint", action, &path]).output().unwrap();
    let refused = run("adopt");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("a daemon serves"), "{refused:?}");
    daemon.terminate();
    assert!(run("adopt").status.success());
    assert!(run("verify").status.success());
    std::fs::write(&weights, file(2)).unwrap();
    assert_eq!(run("verify").status.code(), Some(1));
    assert!(run("adopt").status.success());
    assert!(run("verify").status.success());
    let list = String::from_utf8(run("list").stdout).unwrap();
    assert_eq!(list.matches("no longer restorable").count(), 1, "{list}");
}

#[test]
fn a_reader_that_leaves_early_ends_the_command_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let header = br#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let file = [&(header.len() as u64).to_le_bytes()[..], header, &[1; 8]].concat();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    drop(checkpoint::Checkpoint::open(dir.path()).unwrap());
    let mut list = apollod(&["checkpoint", "list", dir.path().to_str().unwrap()]);
    let mut list = list.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(list.stdout.take());
    let output = list.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn examples_are_listed_by_state_and_those_that_wait_can_be_withdrawn() {
    let daemon = Daemon::start(&[]);
    daemon.pause();
    for (context, source) in [("a", "good"), ("b", "bad"), ("c", "bad"), ("d", "good")] {
        let example = json!({ "context": context, "decision": "yes", "source": source });
        assert_eq!(daemon.post("/v1/examples", &example).status, 202);
    }
    let sources = |path: &str| -> Vec<String> {
        let listed = daemon.get(path).body["examples"].as_array().unwrap().clone();
        listed.iter().map(|example| example["source"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(sources("/v1/examples?state=queued"), ["good", "bad", "bad", "good"]);
    assert_eq!(sources("/v1/examples?state=queued&limit=2"), ["good", "bad"]);
    let delete = |path: &str| daemon.request("DELETE", path, &[], b"");
    assert_eq!(delete("/v1/examples?state=queued&source=bad").body, json!({ "withdrawn": 2 }));
    assert_eq!(sources("/v1/examples?state=queued"), ["good", "good"]);
    let refused = daemon.get("/v1/examples?state=refused").body["examples"].clone();
    assert_eq!(refused[0]["reason"], "withdrawn on request", "{refused}");
    assert_eq!(daemon.post("/v1/resume", &json!({})).status, 200);
    daemon.until("the rest to be trained", || sources("/v1/examples?state=trained").len() == 2);
    assert_eq!(delete("/v1/examples?state=queued").body, json!({ "withdrawn": 0 }));
    for path in [
        "/v1/examples",
        "/v1/examples?state=gone",
        "/v1/examples?state=queued&limit=0",
        "/v1/examples?state=queued&x=1",
    ] {
        assert!(is_problem(&daemon.get(path), 400), "{path}: {}", daemon.get(path).body);
    }
    for path in ["/v1/examples", "/v1/examples?state=trained"] {
        assert!(is_problem(&delete(path), 400), "{path}");
    }
}
