//! What an attached server can be asked for over its socket: a sign of life, and what its manifest offers.

use crate::connection::Silence;
use crate::protocol::{Answer, Request};
use crate::{Attachment, Control, ControlError, Invalidation};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a request that the engine does at once may take.
const PROMPT: Duration = Duration::from_secs(5);
/// How long a forward pass may take: the first one of a server may compile it.
const FORWARD: Duration = Duration::from_secs(60);
/// Above the time that a hold may wait for a step to end.
const HOLD_SLACK: Duration = Duration::from_secs(1);

/// Number of the last ping of this process.
static PINGS: AtomicU64 = AtomicU64::new(0);

/// An engine that stands still between two of its steps, until this is released or dropped, or its time has passed.
#[derive(Debug)]
#[must_use = "the engine goes on when this is dropped"]
pub struct Hold<'a> {
    attachment: Option<&'a Attachment>,
}

impl Hold<'_> {
    /// Lets the engine go on. False if it already had, because its time had passed.
    ///
    /// # Errors
    /// The server did not answer; the hold ends by itself then.
    pub fn release(mut self) -> Result<bool, ControlError> {
        self.attachment.take().map_or(Ok(false), Attachment::release)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        // Whatever went wrong has been told already, and the hold ends by itself.
        let _ = self.attachment.take().map(Attachment::release);
    }
}

impl Attachment {
    /// Asks an exporter for a sign of life, which also notices one that has loaded other weights. Other sources are
    /// only checked.
    ///
    /// # Errors
    /// [`ControlError::Gone`] if the connection has ended or the answer is of another epoch, and
    /// [`ControlError::TimedOut`] if none comes within `timeout`: the server is busy or hangs.
    pub fn ping(&self, timeout: Duration) -> Result<(), ControlError> {
        self.check()?;
        if self.connection.is_none() {
            return Ok(());
        }
        let number = PINGS.fetch_add(1, Ordering::Relaxed) + 1;
        match self.ask(Request::Ping(number), timeout)? {
            Answer::Pong { pong, epoch } if pong == number && epoch == self.epoch() => Ok(()),
            Answer::Pong { pong, epoch } if pong == number => {
                let how = format!("it now holds epoch {epoch}, attached was {}", self.epoch());
                Err(self.gone(self.pid(), how).into())
            }
            other => Err(out_of_place("ping", other)),
        }
    }

    /// Says that the weights have moved, so that keys and values of older ones serve no new request. Gives what was
    /// done: a server that cannot reset while requests run salts instead.
    ///
    /// # Errors
    /// The server does not offer it, refuses, does not answer or is gone.
    pub fn invalidate(&self, how: Invalidation) -> Result<Invalidation, ControlError> {
        self.need(Control::Invalidate, "invalidate")?;
        match self.ask(Request::Invalidate(how), PROMPT)? {
            Answer::Invalidated { invalidated } => Ok(invalidated),
            other => Err(out_of_place("invalidate", other)),
        }
    }

    /// Holds the engine between two of its steps for at most `longest`, and waits at most that long for the running
    /// step to end.
    ///
    /// # Errors
    /// As for [`Attachment::invalidate`], and [`ControlError::Busy`] if the step did not end in time.
    pub fn hold(&self, longest: Duration) -> Result<Hold<'_>, ControlError> {
        self.need(Control::Hold, "hold")?;
        match self.ask(Request::Hold(longest.as_millis() as u64), longest + HOLD_SLACK)? {
            Answer::Held { held: true } => Ok(Hold { attachment: Some(self) }),
            Answer::Held { held: false } => Err(ControlError::Busy { waited: longest }),
            other => Err(out_of_place("hold", other)),
        }
    }

    fn release(&self) -> Result<bool, ControlError> {
        match self.ask(Request::Release(true), PROMPT)? {
            Answer::Released { released } => Ok(released),
            other => Err(out_of_place("release", other)),
        }
    }

    /// Natural log-probabilities of `ids[1..]`, each given all ids before it, by the server's own forward pass.
    ///
    /// # Errors
    /// As for [`Attachment::invalidate`], and an answer of another length, or one that is not finite.
    pub fn score(&self, ids: &[u32]) -> Result<Vec<f32>, ControlError> {
        self.need(Control::Score, "score")?;
        let babble = |reason: String| ControlError::Babble { request: "score", reason };
        match self.ask(Request::Score(ids.to_vec()), FORWARD)? {
            Answer::Logprobs { logprobs } if logprobs.len() + 1 != ids.len() => {
                Err(babble(format!("{} log-probabilities for {} tokens", logprobs.len(), ids.len())))
            }
            Answer::Logprobs { logprobs } => match logprobs.iter().find(|value| !value.is_finite()) {
                Some(value) => Err(babble(format!("a log-probability of {value}"))),
                None => Ok(logprobs),
            },
            other => Err(out_of_place("score", other)),
        }
    }

    fn need(&self, control: Control, request: &'static str) -> Result<(), ControlError> {
        if self.controls().contains(&control) { Ok(()) } else { Err(ControlError::NotOffered { request }) }
    }

    /// One request and its answer. Everything that goes over the socket after the handshake goes through here.
    fn ask(&self, request: Request, patience: Duration) -> Result<Answer, ControlError> {
        let name = request.name();
        let connection = self.connection.as_ref().ok_or(ControlError::NotOffered { request: name })?;
        connection.ask(&request, patience).map_err(|silence| match silence {
            Silence::TimedOut => ControlError::TimedOut { request: name, patience },
            Silence::Closed(how) => self.check().err().unwrap_or_else(|| self.gone(self.pid(), how)).into(),
            Silence::Refused(reason) => ControlError::Refused { request: name, reason },
            Silence::Babble(reason) => ControlError::Babble { request: name, reason },
        })
    }
}

fn out_of_place(request: &'static str, answer: Answer) -> ControlError {
    ControlError::Babble { request, reason: format!("{answer:?}") }
}
