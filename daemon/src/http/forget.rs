//! Provenance: `GET /v1/checkpoints/{generation}/examples` and `POST /v1/forget`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{App, Problem, blocking};
use crate::config::plain;
use crate::queue::Forget;

/// What `POST /v1/forget` takes: one of the two.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    /// Ids.
    examples: Option<Vec<String>>,
    /// All of a source.
    source: Option<String>,
}

/// `POST /v1/forget`: files and live weights go back to a generation before these examples, and what came after is trained again
/// without them.
pub async fn forget(State(app): State<App>, body: Bytes) -> Result<Response, Problem> {
    let body: Value =
        serde_json::from_slice(&body).map_err(|error| Problem::new(400, "body", format!("not JSON: {error}")))?;
    if !body.is_object() {
        return Err(Problem::new(400, "body", "give an object with \"examples\" or \"source\""));
    }
    let wanted = serde_json::from_value(body).map_err(|error| Problem::new(400, "body", plain(&error.to_string())))?;
    let what = match wanted {
        Wanted { examples: Some(ids), source: None } if !ids.is_empty() => Forget::Examples(ids),
        Wanted { examples: None, source: Some(source) } => Forget::Source(source),
        _ => return Err(Problem::new(400, "body", "give either \"examples\", a list of ids, or \"source\"")),
    };
    let unknown = blocking({
        let (what, queue) = (what.clone(), app.queue.clone());
        move || -> Result<Vec<String>, Problem> {
            let Forget::Examples(ids) = what else { return Ok(Vec::new()) };
            let mut unknown = Vec::new();
            for id in ids {
                if queue.get(&id)?.is_none() {
                    unknown.push(id);
                }
            }
            Ok(unknown)
        }
    });
    let unknown = unknown.await?;
    if !unknown.is_empty() {
        let detail = format!("no example {}, or it finished long ago; nothing was forgotten", unknown.join(", "));
        return Err(Problem::new(404, "unknown-example", detail));
    }
    Ok(Json(app.supervisor.forget(what).await?).into_response())
}

/// `GET /v1/checkpoints/{generation}/examples`: the examples that it was the first to hold, whatever became of them since.
pub async fn blame(State(app): State<App>, Path(generation): Path<String>) -> Result<Json<Value>, Problem> {
    let unknown = || {
        Problem::new(
            404,
            "unknown-generation",
            format!("there is no generation {generation:?}; see GET /v1/checkpoints"),
        )
    };
    let number: u64 = generation.parse().map_err(|_| unknown())?;
    let known = blocking({
        let dir = app.model_dir.clone();
        move || checkpoint::list(&dir)
    });
    let known = known.await.map_err(|error| Problem::new(500, "checkpoint", error.to_string()))?;
    let at = known.iter().position(|of| of.generation == number).ok_or_else(unknown)?;
    let examples = blocking(move || app.queue.made(number)).await?;
    Ok(Json(json!({ "generation": number, "rollback_of": known[at].rollback_of, "examples": examples })))
}
