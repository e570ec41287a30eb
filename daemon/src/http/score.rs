//! `POST /v1/score`: teacher-forced log-probabilities on the live weights.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderMap, header};
use serde::Serialize;
use serde_json::{Value, json};

use super::body::{Item, items};
use super::{App, Problem, blocking};
use crate::examples::Templates;
use crate::protocol::Scoring;
use crate::queue::Queue;

/// Sequences of one request: training waits for them.
const SCORED_MAX: usize = 256;

#[derive(Serialize)]
struct Score {
    index: usize,
    /// Decision tokens.
    tokens: usize,
    /// Mean of `-logprobs`, in nats a token; null where one is not finite.
    loss: Option<f64>,
    /// Natural log-probability of each decision token, given all tokens before it.
    logprobs: Vec<Option<f32>>,
}

/// Scores the decisions of what is posted, in the forms of `POST /v1/examples` or as `{"id": ...}` of an example; nothing is trained.
/// All or nothing.
pub async fn score(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Problem> {
    let body = body?;
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (templates, queue) = (app.templates.clone(), app.queue.clone());
    let scorings = blocking(move || prepare(&templates, &queue, items(content_type.as_deref(), &body)?)).await?;
    let scored = app.supervisor.score(scorings).await?;
    let scores: Vec<Score> = scored.logprobs.into_iter().enumerate().map(score_of).collect();
    Ok(Json(json!({ "weight_version": scored.weight_version, "scores": scores })))
}

fn prepare(templates: &Templates, queue: &Queue, items: Vec<Item>) -> Result<Vec<Scoring>, Problem> {
    if items.len() > SCORED_MAX {
        let detail = format!("{} sequences at once, at most {SCORED_MAX} are scored: post them in parts", items.len());
        return Err(Problem::new(413, "too-many", detail));
    }
    let prepare = |Item { index, line, value }: Item| {
        let place = line.map_or_else(|| format!("[{index}]"), |line| format!("line {line}"));
        let refused = |reason: String| Problem::new(400, "refused", format!("{place}: {reason}"));
        let value = value.map_err(refused)?;
        if let Some(id) = value["id"].as_str().filter(|_| value.as_object().is_some_and(|object| object.len() == 1)) {
            let gone = || format!("{place}: no example {id:?}, or it has no tokens any more");
            return queue.scoring(id)?.ok_or_else(|| Problem::new(404, "unknown-example", gone()));
        }
        let (_, prepared) = templates.prepare(&value).map_err(|refusal| refused(refusal.to_string()))?;
        Ok(Scoring { ids: prepared.ids, spans: prepared.spans })
    };
    items.into_iter().map(prepare).collect()
}

fn score_of((index, logprobs): (usize, Vec<Option<f32>>)) -> Score {
    let sum: Option<f64> = logprobs.iter().map(|logprob| logprob.map(f64::from)).sum();
    Score { index, tokens: logprobs.len(), loss: sum.map(|sum| -sum / logprobs.len() as f64), logprobs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logprob_that_is_not_finite_leaves_no_loss() {
        let score = score_of((3, vec![Some(-1.0), Some(-2.0)]));
        assert_eq!((score.index, score.tokens, score.loss), (3, 2, Some(1.5)));
        assert_eq!(score_of((0, vec![Some(-1.0), None])).loss, None);
    }
}
