//! The HTTP interface: examples in, status out, syncs and rollbacks on request.
//!
//! Errors are `application/problem+json` (RFC 9457) that say which field or line was wrong. On loopback no key is
//! asked for; what protects the model there is that a web page cannot reach it: a request whose `Host` or `Origin` is
//! not this machine is refused (DNS rebinding, cross-site requests).

mod access;
mod body;
mod control;
mod events;
mod examples;
mod forget;
mod legacy;
mod metrics;
mod problem;
mod score;

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use serde::Serialize;

use crate::config::HttpConfig;
use crate::examples::Templates;
use crate::queue::Queue;
use crate::supervisor::Handle;

pub use body::{Item, items};
pub use control::GenerationView;
pub use legacy::Job;
pub use problem::Problem;

/// What the handlers share.
#[derive(Clone)]
pub struct App {
    /// Where examples go.
    pub queue: Arc<Queue>,
    /// Makes tokens of them.
    pub templates: Arc<Templates>,
    /// Trains them.
    pub supervisor: Handle,
    /// Whose generations are listed.
    pub model_dir: PathBuf,
    /// Address, key and limits.
    pub config: Arc<HttpConfig>,
}

/// All routes.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/v1/examples", post(examples::post).get(examples::list).delete(examples::withdraw))
        .route("/v1/examples/{id}", get(examples::get))
        .route("/v1/forget", post(forget::forget))
        .route("/v1/checkpoints/{generation}/examples", get(forget::blame))
        .route("/v1/score", post(score::score))
        .route("/v1/status", get(control::status))
        .route("/v1/events", get(events::events))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/checkpoint", post(control::checkpoint))
        .route("/v1/checkpoints", get(control::checkpoints))
        .route("/v1/checkpoints/{generation}/rollback", post(control::rollback))
        .route("/v1/checkpoints/repair", post(control::repair))
        .route("/v1/pause", post(control::pause))
        .route("/v1/resume", post(control::resume))
        .route("/train", post(legacy::train))
        .route("/status/{job}", get(legacy::status))
        .route("/checkpoints", get(control::checkpoints))
        .layer(axum::middleware::from_fn_with_state(app.clone(), access::key))
        .route("/health", get(control::health))
        .route("/ready", get(control::ready))
        .fallback(|| async { Problem::new(404, "not-found", "there is nothing at this path") })
        .method_not_allowed_fallback(|| async { Problem::new(405, "method", "this path does not take this method") })
        .layer(axum::middleware::from_fn_with_state(app.clone(), access::same_machine))
        .layer(DefaultBodyLimit::max(app.config.max_body_bytes))
        .with_state(app)
}

/// Runs work that blocks (SQLite, tokenizing, files) off the event loop.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that shuts down cancels blocking work, and then this future is dropped too.
            Err(_) => std::future::pending().await,
        },
    }
}

/// A JSON answer as text; our own types always serialize.
fn json_text<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("answers have string keys and plain values")
}
