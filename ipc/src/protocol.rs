//! The words that a trainer and an exporter exchange over a Unix stream socket, a line of JSON each.
//!
//! ```text
//! trainer  {"hello":1}
//! exporter the manifest, or {"error":"leased by pid 4711"} and the end of the connection
//! trainer  {"ping":7}                      as often as it likes
//! exporter {"pong":7,"epoch":"…"}
//! ```
//! The open connection is the lease: the exporter grants it to one connection at a time, and it ends with
//! the connection, however that ends.

use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

/// The version that `hello` asks for.
pub(crate) const HELLO: u32 = 1;

/// What a trainer says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Asks for the manifest and the lease; the version of the protocol.
    Hello(u32),
    /// Asks for a sign of life.
    Ping(u64),
}

/// An exporter's sign of life.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pong {
    /// The number of the ping.
    pub(crate) pong: u64,
    /// Which load of the weights it has now.
    pub(crate) epoch: String,
}

/// An exporter's refusal.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Refusal {
    /// Why, for people.
    pub(crate) error: String,
}

/// Reads one line of at most `bytes_max` bytes, without its end. None at the end of the stream.
pub(crate) fn read_line(reader: &mut BufReader<UnixStream>, bytes_max: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.by_ref().take(bytes_max).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) if line.len() as u64 + 1 == bytes_max => {
            Err(io::Error::other(format!("a line longer than {bytes_max} bytes")))
        }
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Writes one value and the end of the line in one go.
pub(crate) fn write_line(mut stream: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line)
}
