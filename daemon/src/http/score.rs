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

/// Sequences of one request.
const SCORED_MAX: usize = 256;
/// Tokens that are scored before training goes on, but for a longer single sequence.
const TOKENS_AT_ONCE: usize = 4096;

#[derive(Serialize)]
struct Score {
    index: usize,
    /// Updates that the live weights had had.
    weight_version: u64,
    /// Decision tokens.
    tokens: usize,
    /// Mean of `-logprobs`, in nats a token; null where one is not finite.
    loss: Option<f64>,
    /// Natural log-probability of each decision token, given all tokens before it.
    logprobs: Vec<Option<f32>>,
}

/// Scores the decisions of what is posted, in the forms of `POST /v1/examples` or as `{"id": ...}` of an example; nothing is trained.
/// All or nothing. A request is scored in pieces, between which steps and syncs go on.
pub async fn score(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Problem> {
    let body = body?;
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (templates, queue) = (app.templates.clone(), app.queue.clone());
    let scorings = blocking(move || prepare(&templates, &queue, items(content_type.as_deref(), &body)?)).await?;
    let mut scores = Vec::with_capacity(scorings.len());
    for piece in pieces(scorings) {
        let scored = app.supervisor.score(piece).await?;
        for logprobs in scored.logprobs {
            scores.push(score_of(scores.len(), scored.weight_version, logprobs));
        }
    }
    Ok(Json(json!({ "scores": scores })))
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
            let scoring = queue.scoring(id)?.ok_or_else(|| Problem::new(404, "unknown-example", gone()))?;
            templates.check_length(scoring.ids.len()).map_err(|refusal| refused(refusal.to_string()))?;
            return Ok(scoring);
        }
        let (_, prepared) = templates.prepare(&value).map_err(|refusal| refused(refusal.to_string()))?;
        Ok(Scoring { ids: prepared.ids, spans: prepared.spans })
    };
    items.into_iter().map(prepare).collect()
}

/// In order, each of [`TOKENS_AT_ONCE`] at most or of one sequence.
fn pieces(scorings: Vec<Scoring>) -> Vec<Vec<Scoring>> {
    let (mut pieces, mut tokens) = (Vec::<Vec<Scoring>>::new(), usize::MAX);
    for scoring in scorings {
        tokens = tokens.saturating_add(scoring.ids.len());
        match pieces.last_mut().filter(|_| tokens <= TOKENS_AT_ONCE) {
            Some(piece) => piece.push(scoring),
            None => {
                tokens = scoring.ids.len();
                pieces.push(vec![scoring]);
            }
        }
    }
    pieces
}

fn score_of(index: usize, weight_version: u64, logprobs: Vec<Option<f32>>) -> Score {
    let sum: Option<f64> = logprobs.iter().map(|logprob| logprob.map(f64::from)).sum();
    let loss = sum.map(|sum| -sum / logprobs.len() as f64);
    Score { index, weight_version, tokens: logprobs.len(), loss, logprobs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_logprob_that_is_not_finite_leaves_no_loss() {
        let score = score_of(3, 7, vec![Some(-1.0), Some(-2.0)]);
        assert_eq!((score.index, score.tokens, score.loss), (3, 2, Some(1.5)));
        assert_eq!(score_of(0, 7, vec![Some(-1.0), None]).loss, None);
    }

    #[test]
    fn pieces_keep_the_order_and_hold_no_more_than_may_be_scored_at_once() {
        let of = |tokens: usize| Scoring { ids: vec![1; tokens], spans: Vec::new() };
        let sizes = [3000, 1096, 1, 9000, 10, 10];
        let lengths: Vec<Vec<usize>> = pieces(sizes.map(of).to_vec())
            .iter()
            .map(|piece| piece.iter().map(|scoring| scoring.ids.len()).collect())
            .collect();
        assert_eq!(lengths, [vec![3000, 1096], vec![1], vec![9000], vec![10, 10]]);
        assert!(pieces(Vec::new()).is_empty());
    }
}
