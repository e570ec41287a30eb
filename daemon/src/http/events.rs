//! `GET /v1/events`: what happens, as server-sent events.

use std::convert::Infallible;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

use super::{App, json_text};
use crate::supervisor::What;

/// Each event has its name and one line of JSON. A reader that falls behind gets `lost` with the number of events that
/// it missed; nothing waits for it. The stream ends with `stopped`.
pub async fn events(State(app): State<App>) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let mut happenings = app.supervisor.listen();
    // One event lies ready; the rest waits in the ring, whose size is fixed.
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let happening = tokio::select! {
                happening = happenings.recv() => happening,
                // The reader has gone while nothing happened.
                () = sender.closed() => return,
            };
            let (event, last) = match happening {
                Ok(happening) => {
                    let event = Event::default().event(happening.what.name()).data(json_text(&happening));
                    (event, happening.what == What::Stopped)
                }
                Err(RecvError::Lagged(lost)) => {
                    (Event::default().event("lost").data(json!({ "event": "lost", "lost": lost }).to_string()), false)
                }
                Err(RecvError::Closed) => return,
            };
            // The reader has gone.
            if sender.send(Ok(event)).await.is_err() || last {
                return;
            }
        }
    });
    Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default())
}
