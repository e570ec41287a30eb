//! Status, pausing, syncs, generations and rollbacks.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use checkpoint::Generation;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;

use super::{App, Problem, blocking};
use crate::lineage;
use crate::protocol::RolledBack;

/// `GET /v1/status`: everything about the daemon now.
pub async fn status(State(app): State<App>) -> Response {
    blocking(move || Json(app.supervisor.status()).into_response()).await
}

/// `GET /health`: the process answers.
pub async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// `GET /ready`: 200 when a trainer is attached to the server's weights, 503 with the reason otherwise.
pub async fn ready(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let status = blocking(move || app.supervisor.status()).await;
    if status.state.is_ready() {
        return Ok(Json(json!({ "status": "ready", "state": status.state })));
    }
    let why = status.detail.map(|detail| format!(": {detail}")).unwrap_or_default();
    let problem = Problem::new(503, "not-ready", format!("{}{why}", status.state));
    Err(problem.with("state", json!(status.state)).retry_after(1))
}

/// `POST /v1/pause`
pub async fn pause(State(app): State<App>) -> Json<Value> {
    app.supervisor.pause(true);
    Json(json!({ "paused": true }))
}

/// `POST /v1/resume`
pub async fn resume(State(app): State<App>) -> Json<Value> {
    app.supervisor.pause(false);
    Json(json!({ "paused": false }))
}

/// Whether to wait for the outcome of `POST /v1/checkpoint`.
#[derive(Deserialize)]
pub struct Wait {
    #[serde(default = "yes")]
    wait: bool,
}

fn yes() -> bool {
    true
}

/// `POST /v1/checkpoint`: syncs and answers with the generation, or with 202 at once when `wait=false`.
pub async fn checkpoint(State(app): State<App>, Query(Wait { wait }): Query<Wait>) -> Result<Response, Problem> {
    if wait {
        return Ok(Json(app.supervisor.sync("request").await?).into_response());
    }
    app.supervisor.sync_later("request");
    Ok((StatusCode::ACCEPTED, Json(json!({ "status": "accepted" }))).into_response())
}

/// A generation as the API and `apollod checkpoint list` show it.
#[derive(Debug, Serialize)]
pub struct GenerationView {
    generation: u64,
    created: String,
    cursor: u64,
    step: u64,
    examples: u64,
    loss: Option<f32>,
    weight_version: u64,
    blocks_changed: u64,
    blocks_total: u64,
    written_bytes: u64,
    journal_bytes: u64,
    ratio: f64,
    rollback_of: Option<u64>,
    restorable: bool,
    /// What is wrong with the generation's document, of which then nothing but the number is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

impl From<&Generation> for GenerationView {
    fn from(of: &Generation) -> Self {
        Self {
            generation: of.generation,
            created: of.created.clone(),
            cursor: of.progress.cursor,
            step: of.progress.step,
            examples: of.progress.examples,
            loss: of.progress.loss,
            weight_version: of.progress.weight_version,
            blocks_changed: of.blocks_changed,
            blocks_total: of.blocks_total,
            written_bytes: of.written_bytes,
            journal_bytes: of.journal_bytes,
            ratio: of.ratio,
            rollback_of: of.rollback_of,
            restorable: of.restorable,
            damage: of.damage.clone(),
        }
    }
}

/// `GET /v1/checkpoints` and `GET /checkpoints`: the generations, newest first.
pub async fn checkpoints(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let list = blocking(move || checkpoint::list(&app.model_dir)).await;
    let list = list.map_err(|error| Problem::new(500, "checkpoint", error.to_string()))?;
    let views: Vec<GenerationView> = list.iter().rev().map(GenerationView::from).collect();
    Ok(Json(json!({ "checkpoints": views })))
}

/// What `POST /v1/checkpoints/repair` takes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Repair {
    /// Copies of the model directory, on the daemon's machine.
    #[serde(default)]
    from: Vec<PathBuf>,
}

/// `POST /v1/checkpoints/repair`: puts damaged blocks of the files right and answers with what was, and with what is
/// damaged still.
pub async fn repair(State(app): State<App>, body: Bytes) -> Result<Response, Problem> {
    let body = if body.is_empty() { &b"{}"[..] } else { &body };
    let Repair { from } = serde_json::from_slice(body)
        .map_err(|error| Problem::new(400, "body", format!("not {{\"from\": [...]}}: {error}")))?;
    if let Some(path) = from.iter().find(|path| !path.is_absolute()) {
        return Err(Problem::new(400, "from", format!("{} is no absolute path", path.display())));
    }
    if let Some(path) = from.iter().find(|path| !path.is_dir()) {
        return Err(Problem::new(400, "from", format!("{} is no directory here", path.display())));
    }
    Ok(Json(app.supervisor.repair(from).await?).into_response())
}

/// `POST /v1/checkpoints/{generation}/rollback`
pub async fn rollback(State(app): State<App>, Path(generation): Path<String>) -> Result<Json<Value>, Problem> {
    let to: u64 = generation.parse().map_err(|_| {
        Problem::new(400, "generation", format!("{generation:?} is no generation; see GET /v1/checkpoints"))
    })?;
    let known = blocking({
        let dir = app.model_dir.clone();
        move || checkpoint::list(&dir)
    });
    let known = known.await.map_err(|error| Problem::new(500, "checkpoint", error.to_string()))?;
    match known.iter().find(|known| known.generation == to) {
        None => {
            let detail = format!("there is no generation {to}; see GET /v1/checkpoints");
            return Err(Problem::new(404, "unknown-generation", detail));
        }
        Some(Generation { damage: Some(damage), .. }) => {
            return Err(Problem::new(409, "not-restorable", format!("generation {to} cannot be read: {damage}")));
        }
        Some(known) if !known.restorable => {
            let detail = format!("generation {to} is no longer restorable; see GET /v1/checkpoints and [sync] keep");
            return Err(Problem::new(409, "not-restorable", detail));
        }
        Some(_) => {}
    }
    let of: Vec<u64> = lineage::ancestors(&known, to).iter().flat_map(lineage::Ancestor::numbers).collect();
    let queue = app.queue.clone();
    if let Some(generation) = blocking(move || queue.holds_forgotten(&of)).await? {
        let detail = format!(
            "generation {to} holds what was forgotten since (an example of generation {generation}): nothing brings it back"
        );
        return Err(Problem::new(409, "forgotten", detail));
    }
    let RolledBack { generation, cursor, no_longer, .. } = app.supervisor.rollback(to).await?;
    let body = json!({ "generation": generation, "cursor": cursor, "rollback_of": to, "no_longer": no_longer });
    Ok(Json(body))
}
