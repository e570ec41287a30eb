//! Dreams against a stand-in for both the served model and the daemon.
//!
//! The model repeats what it is asked; told to shout, in capitals. Asked whether an answer meets a criterion it says yes if the
//! answer is in capitals. Asked about a note it asks for its first word.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};

use super::*;
use crate::client::ClientArgs;
use crate::config::Judge;

/// What the stand-in was asked and does.
#[derive(Default)]
struct Served {
    chats: Vec<Value>,
    examples: Vec<Value>,
    /// Losses with and without the instruction.
    losses: (f64, f64),
    /// Requests that are to fail from here on.
    broken: bool,
    /// Whether it always says the same.
    dull: bool,
    /// Statuses and kinds of the next answers to examples.
    answers: Vec<(u16, &'static str)>,
    /// Idempotency keys, as they came.
    keys: Vec<String>,
}

type Shared = Arc<Mutex<Served>>;

struct Stand {
    dir: tempfile::TempDir,
    served: Shared,
    url: String,
    _runtime: tokio::runtime::Runtime,
}

async fn chat(State(served): State<Shared>, Json(body): Json<Value>) -> (StatusCode, Json<Value>) {
    let mut served = served.lock().unwrap();
    served.chats.push(body.clone());
    if served.broken {
        return (StatusCode::INTERNAL_SERVER_ERROR, Json(json!({"error": {"message": "no cards"}})));
    }
    let messages = body["messages"].as_array().unwrap();
    let (first, last) =
        (messages[0]["content"].as_str().unwrap(), messages.last().unwrap()["content"].as_str().unwrap());
    let told = messages[0]["role"] == "system";
    let text = match (first, last) {
        (judging, asked) if judging.starts_with("You judge") => {
            let answer = asked.split("Answer:\n").nth(1).unwrap().split('\n').next().unwrap();
            if answer == answer.to_uppercase() { "Yes." } else { "No." }.into()
        }
        (_, note) if note.contains("Give the question alone") => {
            format!("what about {}?", note.split(' ').next().unwrap())
        }
        _ if served.dull => "THE SAME AGAIN AND AGAIN".into(),
        (instruction, asked) if told && instruction.contains("shout") => asked.to_uppercase(),
        (_, asked) => asked.to_owned(),
    };
    let finish = if text.contains("endless") { "length" } else { "stop" };
    (StatusCode::OK, Json(json!({"choices": [{"message": {"content": text}, "finish_reason": finish}]})))
}

impl Stand {
    fn new() -> Self {
        let served = Shared::default();
        served.lock().unwrap().losses = (0.5, 2.0);
        let models = || async { Json(json!({"data": [{"id": "parrot"}]})) };
        let examples = |State(served): State<Shared>, headers: HeaderMap, Json(body): Json<Value>| async move {
            let mut served = served.lock().unwrap();
            served.keys.push(headers["idempotency-key"].to_str().unwrap().to_owned());
            if !served.answers.is_empty() {
                let (status, kind) = served.answers.remove(0);
                let problem = json!({"type": kind, "detail": "no, for a reason"});
                return (StatusCode::from_u16(status).unwrap(), Json(problem));
            }
            served.examples.push(body);
            (StatusCode::ACCEPTED, Json(json!({"accepted": [{"id": format!("e{}", served.examples.len())}]})))
        };
        let score = |State(served): State<Shared>, Json(body): Json<Value>| async move {
            let served = served.lock().unwrap();
            let told = |example: &Value| example["messages"][0]["role"] == "system";
            let loss = |example: &Value| if told(example) { served.losses.0 } else { served.losses.1 };
            let scores: Vec<Value> = body.as_array().unwrap().iter().map(|e| json!({"loss": loss(e)})).collect();
            Json(json!({"weight_version": 1, "scores": scores}))
        };
        let app = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/chat/completions", post(chat))
            .route("/v1/examples", post(examples))
            .route("/v1/score", post(score))
            .route("/v1/status", get(|| async { Json(json!({"version": "stand-in", "state": "idle"})) }))
            .with_state(served.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(axum::serve(listener, app).into_future());
        Self { dir: tempfile::tempdir().unwrap(), served, url, _runtime: runtime }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Ten scenarios and an instruction to shout.
    fn config(&self) -> Config {
        let line =
            |i: usize| json!({"id": format!("s{i}"), "prompt": format!("say the number {i} to me now")}).to_string();
        let lines: Vec<String> = (0..10).map(line).collect();
        let mut config = Config::default();
        config.model.dir = self.dir.path().into();
        config.server.url = Some(self.url.clone());
        config.dream.scenarios = Some(self.file("scenarios.jsonl", &lines.join("\n")));
        config.dream.instruction = Some("Please shout.".into());
        config
    }

    fn dream(&self, config: &Config, examples: u64) -> (Vec<TurnReport>, Summary) {
        let daemon = Client::new(&ClientArgs { url: self.url.clone(), api_key: None });
        let mut turns = Vec::new();
        let mut dream = Dream::begin(config, &daemon, true, 1).unwrap();
        let summary = dream.run(examples, || None, |turn| turns.push(turn.clone()));
        (turns, summary)
    }

    fn served(&self) -> std::sync::MutexGuard<'_, Served> {
        self.served.lock().unwrap()
    }
}

fn shouted() -> Judge {
    Judge { rejects: Some("[a-z]".into()), ..Judge::default() }
}

#[test]
fn an_accepted_answer_becomes_an_example_without_the_instruction() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = shouted();
    let (turns, summary) = stand.dream(&config, 4);
    assert_eq!((summary.turns, summary.accepted, summary.replayed), (4, 4, 0), "{turns:#?}");
    let served = stand.served();
    assert_eq!(served.chats[0]["model"], "parrot");
    assert_eq!(served.chats[0]["messages"][0], json!({"role": "system", "content": "Please shout."}));
    assert_eq!(served.examples.len(), 4);
    for (example, turn) in served.examples.iter().zip(&turns) {
        let messages = example["messages"].as_array().unwrap();
        let asked = messages[0]["content"].as_str().unwrap();
        assert_eq!(messages[0]["role"], "user", "the instruction is stripped: {example}");
        assert_eq!(messages[1], json!({"role": "assistant", "content": asked.to_uppercase()}));
        assert_eq!(example["source"], "dream");
        assert_eq!(example["tags"][0], format!("scenario:{}", turn.scenario));
    }
    let different: std::collections::BTreeSet<&str> = turns.iter().map(|turn| turn.scenario.as_str()).collect();
    assert_eq!(different.len(), 4, "those that were never tried come first: {turns:#?}");
}

#[test]
fn what_the_model_says_untold_is_not_learned() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = Judge { min_chars: Some(1), ..Judge::default() };
    config.dream.attempts = 3;
    let summary = stand.dream(&config, 4).1;
    assert_eq!((summary.known, summary.accepted), (3, 0), "any answer will do, also the one without the instruction");
    config.dream.skip_known = false;
    assert_eq!(stand.dream(&config, 3).1.accepted, 3);

    config.dream.judge = Judge { min_divergence: Some(1.0), ..Judge::default() };
    let (turns, summary) = stand.dream(&config, 1);
    assert_eq!(summary.accepted, 1);
    assert_eq!(turns[0].divergence, Some(1.5));
    stand.served().losses = (0.5, 1.4);
    assert_eq!(stand.dream(&config, 1).1.known, 3);
}

#[test]
fn what_the_judges_reject_is_not_posted_and_cools_the_next_answer() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = Judge { matches: Some("never said".into()), ..Judge::default() };
    config.dream.attempts = 5;
    let (turns, summary) = stand.dream(&config, 4);
    assert_eq!(summary.rejections(), 5);
    assert!(turns.windows(2).all(|pair| pair[1].temperature < pair[0].temperature), "{turns:#?}");
    assert!(stand.served().examples.is_empty());
    let (later, _) = stand.dream(&config, 1);
    assert!(later[0].temperature < turns[4].temperature, "the next dream goes on from there");
}

#[test]
fn an_answer_that_does_not_end_is_rejected() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.scenarios = Some(stand.file("one.jsonl", r#"{"prompt": "endless", "instruction": "go on"}"#));
    config.dream.attempts = 1;
    let (turns, _) = stand.dream(&config, 1);
    assert!(matches!(turns[0].outcome, Outcome::Rejected { by: "max_tokens", .. }), "{turns:#?}");
}

#[test]
fn the_served_model_judges_by_a_rubric() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = Judge { rubric: Some("It is shouted.".into()), ..Judge::default() };
    assert_eq!(stand.dream(&config, 2).1.accepted, 2);
    config.dream.instruction = Some("Whisper.".into());
    config.dream.attempts = 2;
    let (turns, summary) = stand.dream(&config, 2);
    assert_eq!(summary.rejections(), 2);
    let reason = "asked for yes or no, it said \"No.\"".into();
    assert_eq!(turns[0].outcome, Outcome::Rejected { by: "rubric", reason });
}

#[test]
fn near_duplicates_of_a_dream_are_dropped() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.scenarios = Some(stand.file(
        "two.jsonl",
        "{\"id\": \"a\", \"prompt\": \"tell me\"}\n{\"id\": \"b\", \"prompt\": \"tell me\", \"instruction\": \"shout loudly\"}",
    ));
    stand.served().dull = true;
    config.dream.skip_known = false;
    config.dream.attempts = 4;
    let summary = stand.dream(&config, 4).1;
    assert_eq!((summary.accepted, summary.duplicates), (1, 3));
    config.dream.similarity_max = 1.0;
    assert_eq!(stand.dream(&config, 4).1.accepted, 4);
}

#[test]
fn general_examples_are_mixed_in_by_their_share() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = shouted();
    config.dream.replay_examples = Some(stand.file("general.jsonl", "{\"context_ids\": [1], \"decision_ids\": [2]}\n"));
    let summary = stand.dream(&config, 6).1;
    assert_eq!((summary.accepted, summary.replayed), (6, 2), "a quarter of all");
    let served = stand.served();
    let replayed: Vec<&Value> = served.examples.iter().filter(|example| example["source"] == "replay").collect();
    assert_eq!((replayed.len(), &replayed[0]["tags"]), (2, &json!([format!("dream:{}", summary.id)])));
}

#[test]
fn a_note_makes_its_own_question() {
    let stand = Stand::new();
    let mut config = stand.config();
    let notes = stand.dir.path().join("notes");
    std::fs::create_dir(&notes).unwrap();
    std::fs::write(notes.join("shift.md"), "Ines runs the night shift. (shout)").unwrap();
    (config.dream.scenarios, config.dream.instruction) = (Some(notes), None);
    config.dream.judge = shouted();
    assert_eq!(stand.dream(&config, 1).1.accepted, 1);
    let served = stand.served();
    let told = &served.chats[1]["messages"];
    assert_eq!(told[0], json!({"role": "system", "content": "Ines runs the night shift. (shout)"}));
    let messages =
        json!([{"role": "user", "content": "what about Ines?"}, {"role": "assistant", "content": "WHAT ABOUT INES?"}]);
    assert_eq!(served.examples[0]["messages"], messages);
    let asked = served.chats[0]["messages"][0]["content"].as_str().unwrap();
    assert!(asked.starts_with("Ines runs the night shift. (shout)\n\nWrite one question"), "{asked}");
}

#[test]
fn a_model_that_fails_again_and_again_ends_the_dream_with_what_it_said() {
    let stand = Stand::new();
    let config = stand.config();
    stand.served().broken = true;
    let (turns, summary) = stand.dream(&config, 4);
    assert_eq!(turns.len(), FAILURES_MAX as usize);
    let why = summary.broke_off.unwrap();
    assert!(why.contains("500") && why.contains("no cards"), "{why}");
    let others: std::collections::BTreeSet<&str> = turns.iter().map(|turn| turn.scenario.as_str()).collect();
    assert_eq!(others.len(), turns.len(), "one that fails has no other turn: {turns:#?}");
}

#[test]
fn a_judge_that_sees_no_text_leaves_out_what_the_model_says_anyway() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.attempts = 8;
    assert_eq!(stand.dream(&config, 1).1.known, 8, "it shouts what it says: the same words");
    config.dream.similarity_max = 1.0;
    assert_eq!(stand.dream(&config, 1).1.accepted, 1);
}

#[test]
fn an_example_that_the_daemon_refuses_fails_its_turn_alone_and_a_full_queue_is_waited_for() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = shouted();
    stand.served().answers = vec![(400, "urn:apollod:problem:refused"), (429, "urn:apollod:problem:queue-full")];
    let (turns, summary) = stand.dream(&config, 2);
    assert_eq!((summary.accepted, summary.failed, &summary.broke_off), (2, 1, &None), "{turns:#?}");
    assert!(summary.last_reason.as_ref().unwrap().contains("no, for a reason"), "{summary:?}");
    let keys = stand.served().keys.clone();
    assert_eq!(keys[1], keys[2], "the same request again");

    stand.served().answers = vec![(500, "urn:apollod:problem:queue")];
    let summary = stand.dream(&config, 2).1;
    assert!(summary.accepted == 0 && summary.broke_off.unwrap().contains("no, for a reason"));
}

#[test]
fn a_dream_that_posts_nothing_leaves_no_trace() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = Judge { matches: Some("never said".into()), ..Judge::default() };
    let daemon = Client::new(&ClientArgs { url: stand.url.clone(), api_key: None });
    let summary = Dream::begin(&config, &daemon, false, 1).unwrap().run(1, || None, |_| {});
    assert!(summary.turns < config.dream.attempts, "at temperature 0 each was rejected once: {summary}");
    assert!(summary.advice().unwrap().contains("most answers were rejected"), "{summary:?}");
    assert!(!stand.dir.path().join(".apollod").exists());
}

#[test]
fn a_dream_ends_when_somebody_says_so() {
    let stand = Stand::new();
    let mut config = stand.config();
    config.dream.judge = shouted();
    let daemon = Client::new(&ClientArgs { url: stand.url.clone(), api_key: None });
    let mut left = 2;
    let mut stop = || {
        left -= 1;
        (left < 0).then(|| "training was paused".to_owned())
    };
    let summary = Dream::begin(&config, &daemon, true, 1).unwrap().run(8, &mut stop, |_| {});
    assert_eq!((summary.accepted, summary.broke_off.as_deref()), (2, Some("training was paused")));
    let written = std::fs::read_to_string(stand.dir.path().join(".apollod/dream.jsonl")).unwrap();
    assert_eq!(written.lines().count(), 2, "{written}");
}

#[test]
fn a_model_has_one_dream_at_a_time() {
    let stand = Stand::new();
    let config = stand.config();
    let daemon = Client::new(&ClientArgs { url: stand.url.clone(), api_key: None });
    let first = Dream::begin(&config, &daemon, true, 1).unwrap();
    let second = Dream::begin(&config, &daemon, true, 1).err().unwrap().to_string();
    assert!(second.contains("another dream"), "{second}");
    drop(first);
    Dream::begin(&config, &daemon, true, 1).unwrap();
}
