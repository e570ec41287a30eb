//! Errors as RFC 9457 problem documents.

use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

use crate::queue::QueueError;
use crate::supervisor::ControlError;

/// After how many seconds it is worth looking whether a full disk has room, in s.
const NO_ROOM_RETRY_S: u64 = 5;

/// An error as the client sees it. Boxed, because it travels in the error side of many results.
#[derive(Debug, Clone)]
pub struct Problem(Box<Document>);

#[derive(Debug, Clone)]
struct Document {
    status: StatusCode,
    kind: &'static str,
    detail: String,
    members: Map<String, Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// A problem with an HTTP status, a kind (the last part of its `type`) and what is wrong this time.
    pub fn new(status: u16, kind: &'static str, detail: impl Into<String>) -> Self {
        Self(Box::new(Document {
            status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            kind,
            detail: detail.into(),
            members: Map::new(),
            headers: Vec::new(),
        }))
    }

    /// Adds a member of our own, such as the refused examples.
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.0.members.insert(name.into(), value);
        self
    }

    /// Says when to try again.
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.0.headers.push((header::RETRY_AFTER, HeaderValue::from(seconds)));
        self
    }

    /// Adds a header.
    pub fn header(mut self, name: HeaderName, value: &'static str) -> Self {
        self.0.headers.push((name, HeaderValue::from_static(value)));
        self
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let Document { status, kind, detail, members, headers: more_headers } = *self.0;
        let mut document = json!({
            "type": format!("urn:apollod:problem:{kind}"),
            "title": status.canonical_reason().unwrap_or("error"),
            "status": status.as_u16(),
            "detail": detail,
        });
        if let Value::Object(object) = &mut document {
            object.extend(members);
        }
        let mut response = (status, document.to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.extend(more_headers);
        response
    }
}

impl From<QueueError> for Problem {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Full { wanted, capacity, .. } if wanted > capacity => {
                let detail = format!(
                    "{wanted} examples were posted at once and queue.capacity is {capacity}: post them in parts of at \
                     most {capacity}"
                );
                Self::new(413, "too-many", detail)
            }
            QueueError::Full { .. } => Self::new(429, "queue-full", error.to_string()),
            QueueError::NoRoom { .. } => Self::new(507, "no-room", error.to_string()).retry_after(NO_ROOM_RETRY_S),
            QueueError::KeyReused(_) => Self::new(422, "idempotency-key-reused", error.to_string()),
            error => {
                tracing::error!("{error}");
                Self::new(500, "queue", error.to_string())
            }
        }
    }
}

impl From<ControlError> for Problem {
    fn from(error: ControlError) -> Self {
        let detail = error.to_string();
        match error {
            ControlError::NotReady { .. } => Self::new(503, "not-ready", detail).retry_after(2),
            ControlError::Stopping => Self::new(503, "stopping", detail).retry_after(10),
            ControlError::Failed(_) => Self::new(500, "failed", detail),
            ControlError::NoRoom(_) => Self::new(507, "no-room", detail).retry_after(NO_ROOM_RETRY_S),
            ControlError::Readers(_) => Self::new(503, "readers", detail).retry_after(10),
            ControlError::Harmed(_) => Self::new(409, "harmed", detail),
            ControlError::Unanswered(_) => Self::new(502, "lost", detail).retry_after(2),
            ControlError::Busy(_) => Self::new(503, "busy", detail).retry_after(1),
            ControlError::Expired(_) => Self::new(409, "not-restorable", detail),
            ControlError::Lost(_) => Self::new(502, "lost", detail),
        }
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(413, "too-large", "the body is larger than http.max_body_bytes: post it in parts")
            }
            status => Self::new(status.as_u16(), "body", rejection.body_text()),
        }
    }
}
