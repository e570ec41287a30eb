//! The OpenAI interface: chat completions (also streamed), completions and models.

use super::{Engine, Finish, Sampling};
use crate::examples::Templates;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

/// All routes.
pub fn router(engine: Arc<Engine>) -> Router {
    Router::new()
        .route("/health", get(|| async { "ok" }))
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .with_state(engine)
}

#[derive(Deserialize)]
struct Request {
    #[serde(default)]
    messages: Vec<Value>,
    #[serde(default)]
    prompt: Option<String>,
    #[serde(default)]
    temperature: Option<f32>,
    #[serde(default)]
    top_p: Option<f32>,
    #[serde(default)]
    seed: Option<u64>,
    #[serde(default, alias = "max_completion_tokens")]
    max_tokens: Option<usize>,
    #[serde(default)]
    stream: bool,
}

impl Request {
    /// Greedy unless a temperature is given.
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(0.0),
            top_p: self.top_p.unwrap_or(1.0),
            seed: self.seed.unwrap_or(0),
            max_tokens: self.max_tokens.unwrap_or(256),
        }
    }
}

/// What differs between the two kinds of completion.
#[derive(Clone, Copy)]
enum Kind {
    Chat,
    Text,
}

impl Kind {
    fn object(self, stream: bool) -> &'static str {
        match (self, stream) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Text, _) => "text_completion",
        }
    }
    fn choice(self, text: &str, stream: bool) -> Value {
        match (self, stream) {
            (Kind::Chat, false) => json!({"index": 0, "message": {"role": "assistant", "content": text}}),
            (Kind::Chat, true) => json!({"index": 0, "delta": {"content": text}}),
            (Kind::Text, _) => json!({"index": 0, "text": text}),
        }
    }
}

async fn models(State(engine): State<Arc<Engine>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [{"id": engine.name, "object": "model", "owned_by": "apollod"}]}))
}

type Body = Result<Bytes, BytesRejection>;

async fn chat(State(engine): State<Arc<Engine>>, body: Body) -> Response {
    answer(engine, body, Kind::Chat).await
}

async fn completions(State(engine): State<Arc<Engine>>, body: Body) -> Response {
    answer(engine, body, Kind::Text).await
}

/// A request and its prompt, which leaves room for an answer within `max_tokens`.
fn ask(templates: &Templates, max_tokens: usize, body: &[u8], kind: Kind) -> Result<(Request, Vec<u32>), String> {
    let request = read(body)?;
    let prompt = match (kind, request.messages.as_slice(), request.prompt.as_deref()) {
        (Kind::Chat, [], _) => return Err("messages is missing or empty".into()),
        (Kind::Chat, messages, _) => templates.render_prompt(messages),
        (Kind::Text, _, Some("") | None) => return Err("prompt is missing or empty".into()),
        (Kind::Text, _, Some(text)) => templates.encode(text),
    };
    match prompt.map_err(|error| error.to_string())? {
        ids if ids.is_empty() => Err("the prompt is empty".into()),
        ids if ids.len() >= max_tokens => {
            Err(format!("the prompt has {} tokens; fewer than {max_tokens} fit", ids.len()))
        }
        ids => Ok((request, ids)),
    }
}

/// The tokens of the prompt in a body of `/v1/chat/completions`, or, without `chat`, of `/v1/completions`.
///
/// # Errors
/// What is wrong with it.
pub fn prompt(templates: &Templates, max_tokens: usize, body: &[u8], chat: bool) -> Result<Vec<u32>, String> {
    Ok(ask(templates, max_tokens, body, if chat { Kind::Chat } else { Kind::Text })?.1)
}

fn read(body: &[u8]) -> Result<Request, String> {
    serde_json::from_slice(body).map_err(|error| {
        let what = if error.is_data() { "the request does not fit" } else { "the body is not JSON" };
        format!("{what}: {}", crate::config::plain(&error.to_string()))
    })
}

/// 400 as OpenAI's clients expect it.
fn refused(message: String) -> Response {
    let error = json!({"error": {"message": message, "type": "invalid_request_error"}});
    (StatusCode::BAD_REQUEST, Json(error)).into_response()
}

async fn answer(engine: Arc<Engine>, body: Body, kind: Kind) -> Response {
    let body = body.map_err(|error| error.body_text());
    let asked = body.and_then(|body| ask(&engine.templates, engine.max_tokens, &body, kind));
    let (request, prompt) = match asked {
        Ok(asked) => asked,
        Err(message) => return refused(message),
    };
    if request.stream { stream(engine, request, prompt, kind) } else { whole(engine, request, prompt, kind).await }
}

async fn whole(engine: Arc<Engine>, request: Request, prompt: Vec<u32>, kind: Kind) -> Response {
    let name = engine.name.clone();
    let prompt_tokens = prompt.len();
    let generated = tokio::task::spawn_blocking(move || {
        engine.generate(&prompt, &request.sampling(), |_| ControlFlow::Continue(()))
    });
    let Ok(answer) = generated.await else {
        let error = json!({"error": {"message": "generation failed; see the engine's log", "type": "server_error"}});
        return (StatusCode::INTERNAL_SERVER_ERROR, Json(error)).into_response();
    };
    let mut choice = kind.choice(&answer.text, false);
    choice["finish_reason"] = reason(answer.finish).into();
    Json(json!({
        "id": id(),
        "object": kind.object(false),
        "created": now(),
        "model": name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": prompt_tokens + answer.tokens,
        },
    }))
    .into_response()
}

fn stream(engine: Arc<Engine>, request: Request, prompt: Vec<u32>, kind: Kind) -> Response {
    let (sender, receiver) = mpsc::channel::<String>(16);
    let (id, created, name) = (id(), now(), engine.name.clone());
    let chunk = move |choice: Value| {
        let object = kind.object(true);
        json!({"id": id, "object": object, "created": created, "model": name, "choices": [choice]}).to_string()
    };
    tokio::task::spawn_blocking(move || {
        let answer = engine.generate(&prompt, &request.sampling(), |text| {
            // A client that is gone ends the generation.
            match sender.blocking_send(chunk(kind.choice(text, true))) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        let mut last = kind.choice("", true);
        last["finish_reason"] = reason(answer.finish).into();
        let _ = sender.blocking_send(chunk(last));
        let _ = sender.blocking_send("[DONE]".into());
    });
    let events = ReceiverStream::new(receiver).map(|data| Ok::<Event, Infallible>(Event::default().data(data)));
    Sse::new(events).into_response()
}

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn id() -> String {
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    format!("cmpl-{nanos:x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_that_does_not_fit_is_told_why_in_plain_words() {
        let refusal = |body: &'static str| read(body.as_bytes()).err().unwrap_or_default();
        assert!(refusal("{oops").starts_with("the body is not JSON"), "{}", refusal("{oops"));
        let error = refusal(r#"{"max_tokens": "many"}"#);
        assert!(error.starts_with("the request does not fit"), "{error}");
        assert!(error.contains("expected a whole number, 0 or more at line 1"), "{error}");
        let error = refusal("3");
        assert!(error.contains("expected a table of keys at line 1"), "{error}");
        assert_eq!(refusal(r#"{"messages": []}"#), "");
    }
}
