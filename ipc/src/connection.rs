//! The trainer's end of an exporter's socket: the handshake, then one request and its answer at a time.

use crate::Error;
use crate::manifest::DOCUMENT_BYTES_MAX;
use crate::process::{check_user, wait_for};
use crate::protocol::{Answer, HELLO, LEASED, Refusal, Request, read_line, write_line};
use std::io::{self, BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long an exporter may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// An open connection, which is the lease.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The same socket as the reader's, to be looked at while a request waits.
    stream: UnixStream,
    talk: Mutex<Talk>,
}

/// What requests need, one at a time.
#[derive(Debug)]
struct Talk {
    reader: BufReader<UnixStream>,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
    /// Answers to requests that were given up; they come first.
    owed: u32,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Silence {
    /// None in time.
    TimedOut,
    /// The connection has ended.
    Closed(String),
    /// A refusal, in the exporter's words.
    Refused(String),
    /// Something that is no answer.
    Babble(String),
}

/// What a handshake gives.
pub(crate) struct Greeting {
    pub(crate) connection: Connection,
    /// One line of JSON.
    pub(crate) manifest: Vec<u8>,
    /// The process at the other end.
    pub(crate) peer: u32,
}

impl Connection {
    /// Connects, checks whose socket it is, and asks for the manifest and the lease.
    pub(crate) fn open(socket: &Path) -> Result<Greeting, Error> {
        let io = |error| Error::io("talk to", socket, error);
        let stream = UnixStream::connect(socket).map_err(|error| Error::io("connect to", socket, error))?;
        let peer = rustix::net::sockopt::socket_peercred(&stream)
            .map_err(|error| Error::io("ask who serves", socket, error))?;
        check_user(socket, peer.uid.as_raw())?;
        stream.set_write_timeout(Some(HANDSHAKE)).map_err(io)?;
        write_line(&stream, &Request::Hello(HELLO)).map_err(io)?;
        let mut reader = BufReader::new(stream.try_clone().map_err(io)?);
        let deadline = Instant::now() + HANDSHAKE;
        let line = read_line(&mut reader, &mut Vec::new(), DOCUMENT_BYTES_MAX, Some(deadline)).map_err(io)?;
        let manifest = line.ok_or_else(|| Error::Protocol {
            socket: socket.to_owned(),
            reason: "it closed the connection without an answer".into(),
        })?;
        if let Ok(refusal) = serde_json::from_slice::<Refusal>(&manifest) {
            let path = socket.to_owned();
            return Err(match refusal.error.strip_prefix(LEASED).map(|pid| pid.parse().ok()) {
                Some(pid) => Error::Leased { path, pid },
                None => Error::Refused { socket: path, reason: refusal.error },
            });
        }
        let talk = Mutex::new(Talk { reader, line: Vec::new(), owed: 0 });
        let peer = peer.pid.as_raw_nonzero().get().unsigned_abs();
        Ok(Greeting { connection: Connection { stream, talk }, manifest, peer })
    }

    /// Sends a request and waits for its answer, at most for `patience`.
    pub(crate) fn ask(&self, request: &Request, patience: Duration) -> Result<Answer, Silence> {
        let mut talk = self.talk.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        write_line(&self.stream, request).map_err(Silence::of)?;
        talk.owed += 1;
        let deadline = Instant::now() + patience.max(Duration::from_millis(1));
        loop {
            let line = talk.next_line(deadline)?;
            talk.owed -= 1;
            if talk.owed == 0 {
                let answer = serde_json::from_slice(&line).map_err(|error| Silence::Babble(error.to_string()))?;
                return match answer {
                    Answer::Refused(Refusal { error }) => Err(Silence::Refused(error)),
                    answer => Ok(answer),
                };
            }
        }
    }

    /// Whether the other end has closed it.
    pub(crate) fn is_closed(&self) -> bool {
        wait_for(None, Some(&self.stream), Duration::ZERO)
    }

    /// The socket, to be polled.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }
}

impl Talk {
    fn next_line(&mut self, deadline: Instant) -> Result<Vec<u8>, Silence> {
        match read_line(&mut self.reader, &mut self.line, DOCUMENT_BYTES_MAX, Some(deadline)) {
            Ok(line) => line.ok_or_else(|| Silence::Closed("it closed the connection".into())),
            Err(error) => {
                let silence = Silence::of(error);
                if matches!(silence, Silence::Closed(_)) {
                    // Whoever watches the connection is to see that it is over.
                    let _ = self.reader.get_ref().shutdown(std::net::Shutdown::Both);
                }
                Err(silence)
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Closing would do, but not while a child that is being started still has a copy of the descriptor.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

impl Silence {
    fn of(error: io::Error) -> Silence {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Silence::TimedOut,
            _ => Silence::Closed(format!("it cannot be reached: {error}")),
        }
    }
}
