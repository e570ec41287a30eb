//! `POST /v1/examples`, `GET /v1/examples/{id}`, and of all of them `GET` and `DELETE /v1/examples?state=S`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::body::{Item, items};
use super::{App, Problem, blocking, json_text};
use crate::examples::{Refusal, Templates};
use crate::queue::{self, Added, Idempotency, NewExample, QueueError};
use crate::supervisor::Status;

/// Longest Idempotency-Key, in bytes.
const KEY_BYTES_MAX: usize = 255;
/// Examples in one list.
const LISTED_MAX: u64 = 20_000;

#[derive(Serialize)]
struct Accepted {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    id: String,
    tokens: usize,
    decision_tokens: usize,
}

/// An example that was not taken, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    #[serde(flatten)]
    refusal: Refusal,
}

/// Takes what can be taken and says one by one what cannot.
pub async fn post(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let body = body?;
    let idempotency = idempotency(&headers, "/v1/examples", &body)?;
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
    blocking(move || {
        if let Some(key) = &idempotency
            && let Some(Added::Before(status, text)) = app.queue.before(key)?
        {
            return Ok(repeated(status, text));
        }
        let (taken, refused) = prepare(&app.templates, items(content_type.as_deref(), &body)?);
        if taken.is_empty() {
            let detail = match refused.as_slice() {
                [one] => one.refusal.to_string(),
                _ => format!("all {} examples were refused", refused.len()),
            };
            return Err(Problem::new(400, "refused", detail).with("refused", json!(refused)));
        }
        let examples: Vec<NewExample> = taken.iter().map(|(_, example)| example.clone()).collect();
        let answer = |ids: &[String]| json_text(&answer(&taken, ids, &refused));
        let added = app.queue.add(&examples, idempotency.as_ref(), |ids| (202, answer(ids)));
        match added.map_err(|error| full(error, &app.supervisor.status()))? {
            Added::Before(status, text) => Ok(repeated(status, text)),
            Added::New(ids) => {
                app.supervisor.wake();
                Ok((StatusCode::ACCEPTED, [(header::CONTENT_TYPE, "application/json")], answer(&ids)).into_response())
            }
        }
    })
    .await
}

/// What is known about one example.
pub async fn get(State(app): State<App>, Path(id): Path<String>) -> Result<Response, Problem> {
    blocking(move || match app.queue.get(&id)? {
        Some(record) => Ok(Json(record).into_response()),
        None => Err(Problem::new(404, "unknown-example", format!("no example {id:?}, or it finished long ago"))),
    })
    .await
}

/// What `GET /v1/examples` takes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    state: String,
    #[serde(default = "listed_by_default")]
    limit: u64,
}

fn listed_by_default() -> u64 {
    100
}

/// `GET /v1/examples?state=S`: those in a state, the newest first.
pub async fn list(State(app): State<App>, query: Result<Query<Listed>, QueryRejection>) -> Result<Response, Problem> {
    let Query(Listed { state, limit }) = query.map_err(|error| Problem::new(400, "query", error.body_text()))?;
    let state = state.parse().map_err(|()| {
        let known = queue::State::ALL.map(queue::State::name).join(", ");
        Problem::new(400, "state", format!("{state:?} is no state of an example; there are {known}"))
    })?;
    if !(1..=LISTED_MAX).contains(&limit) {
        return Err(Problem::new(400, "limit", format!("is {limit}, must lie in [1, {LISTED_MAX}]")));
    }
    blocking(move || Ok(Json(json!({ "examples": app.queue.in_state(state, limit)? })).into_response())).await
}

/// What `DELETE /v1/examples` takes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Withdrawn {
    state: String,
    source: Option<String>,
}

/// `DELETE /v1/examples?state=queued`: what waits, of one `source` or all of it, will not be trained.
pub async fn withdraw(
    State(app): State<App>,
    query: Result<Query<Withdrawn>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(Withdrawn { state, source }) = query.map_err(|error| Problem::new(400, "query", error.body_text()))?;
    if state != queue::State::Queued.name() {
        let detail = format!("is {state:?}: only what waits can be withdrawn, with state=queued");
        return Err(Problem::new(400, "state", detail));
    }
    blocking(move || Ok(Json(json!({ "withdrawn": app.queue.withdraw(source.as_deref())? })).into_response())).await
}

fn answer(taken: &[(Item, NewExample)], ids: &[String], refused: &[Refused]) -> serde_json::Value {
    let accepted = |((item, example), id): (&(Item, NewExample), &String)| Accepted {
        index: item.index,
        line: item.line,
        id: id.clone(),
        tokens: example.ids.len(),
        decision_tokens: example.spans.iter().map(ExactSizeIterator::len).sum(),
    };
    let accepted: Vec<Accepted> = taken.iter().zip(ids).map(accepted).collect();
    json!({ "accepted": accepted, "refused": refused })
}

/// Makes tokens of each item, apart from those that cannot be.
fn prepare(templates: &Templates, items: Vec<Item>) -> (Vec<(Item, NewExample)>, Vec<Refused>) {
    let (mut taken, mut refused) = (Vec::new(), Vec::new());
    for item in items {
        let prepared = match &item.value {
            Ok(value) => templates.prepare(value),
            Err(reason) => Err(Refusal::whole(reason)),
        };
        match prepared {
            Ok((example, prepared)) => taken.push((
                item,
                NewExample {
                    ids: prepared.ids,
                    spans: prepared.spans,
                    weight: example.weight,
                    priority: example.priority,
                    tags: example.tags,
                    source: example.source,
                    lr: None,
                    job: None,
                },
            )),
            Err(refusal) => refused.push(Refused { index: item.index, line: item.line, refusal }),
        }
    }
    (taken, refused)
}

fn repeated(status: u16, text: String) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::ACCEPTED);
    (status, [("idempotent-replayed", "true"), (header::CONTENT_TYPE.as_str(), "application/json")], text)
        .into_response()
}

/// The problem of a full queue, with the time after which there should be room.
pub(super) fn full(error: QueueError, status: &Status) -> Problem {
    let retry = match &error {
        QueueError::Full { waiting, wanted, capacity } if wanted <= capacity => {
            let step_s = status.timings.map_or(1.0, |timings| timings.total_ms / 1e3);
            Some((((waiting + wanted - capacity) as f64 * step_s).ceil() as u64).clamp(1, 600))
        }
        _ => None,
    };
    let problem = Problem::from(error);
    match retry {
        Some(seconds) => problem.retry_after(seconds),
        None => problem,
    }
}

/// The request's Idempotency-Key, if it has one, with what tells its request from others.
pub(super) fn idempotency(headers: &HeaderMap, path: &str, body: &[u8]) -> Result<Option<Idempotency>, Problem> {
    let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
    let key = key.to_str().unwrap_or_default();
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        let detail = format!("the Idempotency-Key must be 1 to {KEY_BYTES_MAX} printable ASCII characters");
        return Err(Problem::new(400, "idempotency-key", detail));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(path.as_bytes()).update(&[0]).update(body);
    Ok(Some(Idempotency { key: key.to_owned(), body: *hasher.finalize().as_bytes() }))
}
