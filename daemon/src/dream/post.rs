//! The daemon, as a dream's client sees it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::client::Client;

/// How long a full queue, or a trainer that is not ready, is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait before it is tried again.
const RETRY_MAX: Duration = Duration::from_secs(5);
const JSON: (&str, &str) = ("content-type", "application/json");

/// Why an example is not in the queue.
pub enum PostError {
    /// It cannot be trained; another may.
    Refused(String),
    /// None can be posted now.
    Down(anyhow::Error),
}

/// Posts an example and gives its id. The key makes a repeated request harmless.
///
/// # Errors
/// [`PostError`].
pub fn example(daemon: &Client, key: &str, example: &Value) -> Result<String, PostError> {
    let headers = [JSON, ("idempotency-key", key)];
    let body = example.to_string();
    let answer = patiently(daemon, "/v1/examples", &headers, body.as_bytes()).map_err(PostError::Down)?;
    match answer.status {
        400 | 413 | 422 => Err(PostError::Refused(answer.problem())),
        _ => {
            let body = answer.ok().map_err(PostError::Down)?;
            Ok(body["accepted"][0]["id"].as_str().unwrap_or_default().to_owned())
        }
    }
}

/// By how much `with` makes the answer more likely than `without` on the live weights, in nats a token.
///
/// # Errors
/// What the daemon says; a log-probability that is not finite.
pub fn divergence(daemon: &Client, with: &[Value], without: &[Value], answer: &Value) -> Result<f64> {
    let example = |messages: &[Value]| {
        let messages: Vec<&Value> = messages.iter().chain([answer]).collect();
        json!({ "messages": messages })
    };
    let body = Value::from(vec![example(with), example(without)]).to_string();
    let scored = patiently(daemon, "/v1/score", &[JSON], body.as_bytes())?.ok()?;
    let loss = |index: usize| scored["scores"][index]["loss"].as_f64().context("a log-probability is not finite");
    Ok(loss(1)? - loss(0)?)
}

/// Posts until the daemon has room and a trainer.
fn patiently(daemon: &Client, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<crate::client::Answer> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = daemon.post(path, headers, body)?;
        if !matches!(answer.status, 429 | 502 | 503 | 507) || Instant::now() > deadline {
            return Ok(answer);
        }
        std::thread::sleep(Duration::from_secs(answer.retry_after.unwrap_or(1)).min(RETRY_MAX));
    }
}
