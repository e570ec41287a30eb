//! The words that a trainer and an exporter exchange over a Unix stream socket, a line of JSON each.
//!
//! ```text
//! trainer  {"hello":1}
//! exporter the manifest, or {"error":"leased by pid 4711"} and the end of the connection
//! trainer  {"ping":7}
//! exporter {"pong":7,"epoch":"…"}
//! trainer  {"invalidate":"reset"}          or "salt": the weights have moved, older keys and values must not serve new requests
//! exporter {"invalidated":"reset"}         what was done: "reset", the cache is empty; "salt", new requests match no older block;
//!                                          a reset that is refused because requests are running falls back to "salt"
//! trainer  {"hold":5000}                   hold the engine between two of its steps, for at most 5000 ms, and wait at most
//!                                          that long for the running step to end
//! exporter {"held":true}                   or false: the step did not end in that time, and nothing is held
//! trainer  {"release":true}
//! exporter {"released":true}               false: the hold had ended by itself before, as its time had passed
//! trainer  {"score":[5,17,3]}
//! exporter {"logprobs":[-1.2,-0.3]}        natural log-probabilities of ids[1..], each given all ids before it
//! exporter {"error":"…"}                   to a request that this exporter cannot do; the connection stays
//! ```
//! Requests come one at a time, and every request gets exactly one answer, in their order. A trainer that gave up
//! waiting therefore knows how many late answers to skip.
//!
//! The open connection is the lease: the exporter grants it to one connection at a time, and it ends with
//! the connection, however that ends; so does a hold. An exporter whose parameters are replaced (reload, sleep) ends
//! the connection first and then serves a manifest with another epoch.

use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// The version that `hello` asks for.
pub(crate) const HELLO: u32 = 1;
/// How an exporter refuses a second trainer; the holder's process id follows.
pub(crate) const LEASED: &str = "leased by pid ";

/// What an exporter may offer beyond signs of life; a manifest lists it in `controls`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// Makes keys and values of older weights unusable for new requests.
    Invalidate,
    /// Stops the engine between two of its steps.
    Hold,
    /// Computes log-probabilities by the engine's own forward pass.
    Score,
    /// Something that this version does not know.
    #[serde(other)]
    Unknown,
}

/// How a prefix cache is kept from serving keys and values of older weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Invalidation {
    /// The cache is emptied.
    Reset,
    /// New requests get a salt with which no older block matches.
    Salt,
}

/// What a trainer says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Asks for the manifest and the lease; the version of the protocol.
    Hello(u32),
    /// Asks for a sign of life.
    Ping(u64),
    /// The weights have moved.
    Invalidate(Invalidation),
    /// Asks the engine to stop between two steps, for at most so many ms.
    Hold(u64),
    /// Lets it go on. Always true.
    Release(bool),
    /// Asks for log-probabilities of these tokens.
    Score(Vec<u32>),
}

impl Request {
    /// The key of its line.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Request::Hello(_) => "hello",
            Request::Ping(_) => "ping",
            Request::Invalidate(_) => "invalidate",
            Request::Hold(_) => "hold",
            Request::Release(_) => "release",
            Request::Score(_) => "score",
        }
    }
}

/// What an exporter answers after the manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Answer {
    /// A sign of life: the number of the ping, and which load of the weights it has now.
    Pong { pong: u64, epoch: String },
    /// What was done to the prefix cache.
    Invalidated { invalidated: Invalidation },
    /// Whether the engine is held.
    Held { held: bool },
    /// Whether it was held until now.
    Released { released: bool },
    /// One for each token but the first.
    Logprobs { logprobs: Vec<f32> },
    /// The request could not be done.
    Refused(Refusal),
}

/// An exporter's refusal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// Why, for people.
    pub(crate) error: String,
}

/// Reads on to the end of a line of at most `bytes_max` bytes and takes it from `line`, without its end. None at the
/// end of the stream. After a time-out, `line` holds what has come so far, and reading can go on. The deadline is for
/// the whole line, however slowly its bytes come; without one the stream's own time-out is for each of them.
pub(crate) fn read_line(
    reader: &mut BufReader<UnixStream>,
    line: &mut Vec<u8>,
    bytes_max: u64,
    deadline: Option<Instant>,
) -> io::Result<Option<Vec<u8>>> {
    loop {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            reader.get_ref().set_read_timeout(Some(left))?;
        }
        let come = reader.fill_buf()?;
        if come.is_empty() {
            return if line.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        let end = come.iter().position(|&byte| byte == b'\n');
        let taken = end.unwrap_or(come.len());
        line.extend_from_slice(&come[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if line.len() as u64 >= bytes_max {
            return Err(io::Error::other(format!("a line longer than {bytes_max} bytes")));
        }
        if end.is_some() {
            return Ok(Some(std::mem::take(line)));
        }
    }
}

/// Writes one value and the end of the line in one go.
pub(crate) fn write_line(mut stream: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_forms_are_the_documented_ones() {
        for (request, want) in [
            (Request::Hello(1), r#"{"hello":1}"#),
            (Request::Ping(7), r#"{"ping":7}"#),
            (Request::Invalidate(Invalidation::Reset), r#"{"invalidate":"reset"}"#),
            (Request::Hold(5000), r#"{"hold":5000}"#),
            (Request::Release(true), r#"{"release":true}"#),
            (Request::Score(vec![5, 17, 3]), r#"{"score":[5,17,3]}"#),
        ] {
            assert_eq!(serde_json::to_string(&request).unwrap(), want);
            assert!(want.contains(request.name()));
        }
        for (answer, want) in [
            (Answer::Pong { pong: 7, epoch: "e".into() }, r#"{"pong":7,"epoch":"e"}"#),
            (Answer::Invalidated { invalidated: Invalidation::Salt }, r#"{"invalidated":"salt"}"#),
            (Answer::Held { held: false }, r#"{"held":false}"#),
            (Answer::Released { released: true }, r#"{"released":true}"#),
            (Answer::Logprobs { logprobs: vec![-1.5, -0.25] }, r#"{"logprobs":[-1.5,-0.25]}"#),
            (Answer::Refused(Refusal { error: "no".into() }), r#"{"error":"no"}"#),
        ] {
            assert_eq!(serde_json::to_string(&answer).unwrap(), want);
            assert_eq!(serde_json::from_str::<Answer>(want).unwrap(), answer);
        }
    }

    #[test]
    fn a_control_of_a_later_version_is_read_over() {
        let controls: Vec<Control> = serde_json::from_str(r#"["hold","teleport","score"]"#).unwrap();
        assert_eq!(controls, [Control::Hold, Control::Unknown, Control::Score]);
    }
}
