//! The exporter's end of the socket: one lease at a time, and what the engine can be asked for.

use crate::protocol::{Answer, HELLO, LEASED, Refusal, Request, read_line, write_line};
use crate::{Control, Invalidation, Manifest, Server, SharedWeights};
use std::collections::HashMap;
use std::fmt;
use std::io::BufReader;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a connection may take to say hello, or to take an answer.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest request in bytes.
const REQUEST_BYTES_MAX: u64 = 1 << 16;
/// Connections at a time; more are turned away.
pub(crate) const CONNECTIONS_MAX: usize = 16;

/// The engine behind exported weights: what a trainer may ask of it beyond a sign of life. What is not in
/// [`Engine::controls`] is refused before it gets here.
pub trait Engine: Send + Sync {
    /// Who it is.
    fn server(&self) -> Option<Server> {
        None
    }
    /// What it can do.
    fn controls(&self) -> Vec<Control> {
        Vec::new()
    }
    /// Makes sure that keys and values of older weights serve no new request; gives what was done.
    ///
    /// # Errors
    /// Why it could not be done, for people.
    fn invalidate(&self, how: Invalidation) -> Result<Invalidation, String> {
        Err(format!("{how:?} is not done here"))
    }
    /// Stops between two steps for at most `longest`, and waits at most that long for the running one to end; whether
    /// it stands still now.
    fn hold(&self, _longest: Duration) -> bool {
        false
    }
    /// Goes on. False if it already had by itself.
    fn release(&self) -> bool {
        false
    }
    /// Natural log-probabilities of `ids[1..]`, each given all ids before it.
    ///
    /// # Errors
    /// Why it could not be done, for people.
    fn score(&self, _ids: &[u32]) -> Result<Vec<f32>, String> {
        Err("scoring is not done here".into())
    }
}

/// Weights alone.
impl Engine for () {}

/// What the connections share.
pub(crate) struct Lender {
    weights: Arc<SharedWeights>,
    manifest: Manifest,
    engine: Arc<dyn Engine>,
    state: Mutex<Lent>,
}

impl fmt::Debug for Lender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lender").field("epoch", &self.manifest.epoch).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Lent {
    stopping: bool,
    /// Number of the last connection.
    last: u64,
    /// Every open connection, by its number, to be shut down on the way out.
    connections: HashMap<u64, UnixStream>,
    /// The connection and process that have the lease.
    lease: Option<(u64, u32)>,
}

/// A connection; it ends with this value.
struct Admitted {
    lender: Arc<Lender>,
    number: u64,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.lender.end(self.number);
    }
}

impl Lender {
    /// Lends `weights` as `manifest` describes them.
    pub(crate) fn new(weights: Arc<SharedWeights>, manifest: Manifest, engine: Arc<dyn Engine>) -> Lender {
        Lender { weights, manifest, engine, state: Mutex::default() }
    }

    /// The process that has the lease.
    pub(crate) fn leased_by(&self) -> Option<u32> {
        self.lock().lease.map(|(_, pid)| pid)
    }

    /// Ends every connection; the next one that is accepted ends [`Lender::accept`].
    pub(crate) fn stop(&self) {
        let connections = {
            let mut state = self.lock();
            state.stopping = true;
            std::mem::take(&mut state.connections)
        };
        // Best effort on the way out: a connection that has ended already cannot be shut down.
        for stream in connections.into_values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Lent> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Accepts connections until the listener is shut down.
    pub(crate) fn accept(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            let stream = listener.accept();
            if self.lock().stopping {
                return;
            }
            match stream {
                Ok((stream, _)) => self.admit(stream),
                // Out of descriptors or memory: wait for some to come back.
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// Gives a connection a thread. One that cannot be served is closed by being dropped.
    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let Ok(copy) = stream.try_clone() else { return };
        let number = {
            let mut state = self.lock();
            if state.connections.len() >= CONNECTIONS_MAX {
                return;
            }
            state.last += 1;
            let number = state.last;
            state.connections.insert(number, copy);
            number
        };
        let lender = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("weight-lease".into()).spawn(move || {
            // Also if the engine panics in what it is asked for: the lease must not stay with a trainer that is gone.
            let admitted = Admitted { lender, number };
            // An error ends this connection; the trainer sees its end and says so.
            let _ = admitted.lender.converse(number, stream);
        });
        if spawned.is_err() {
            self.end(number);
        }
    }

    fn end(&self, number: u64) {
        let mut state = self.lock();
        if let Some(stream) = state.connections.remove(&number) {
            // The reader has ended, so the peer has closed already or deserves to be told.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if state.lease.take_if(|(holder, _)| *holder == number).is_some() {
            // A hold ends with the connection.
            self.engine.release();
        }
    }

    fn converse(&self, number: u64, stream: UnixStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(HANDSHAKE))?;
        stream.set_write_timeout(Some(HANDSHAKE))?;
        let pid = rustix::net::sockopt::socket_peercred(&stream)?.pid.as_raw_nonzero().get().unsigned_abs();
        let (mut reader, mut line) = (BufReader::new(stream), Vec::new());
        let Some(hello) = read_line(&mut reader, &mut line, REQUEST_BYTES_MAX, None)? else { return Ok(()) };
        let refused = match serde_json::from_slice(&hello) {
            Ok(Request::Hello(HELLO)) => self.lend(number, pid).err(),
            Ok(Request::Hello(version)) => Some(format!("protocol version {version} is not spoken here, want {HELLO}")),
            Ok(other) => Some(format!("say hello before {}", other.name())),
            Err(error) => Some(format!("want {{\"hello\":1}}: {error}")),
        };
        if let Some(error) = refused {
            return write_line(reader.get_ref(), &Refusal { error });
        }
        write_line(reader.get_ref(), &self.manifest)?;
        reader.get_ref().set_read_timeout(None)?;
        while let Some(request) = read_line(&mut reader, &mut line, REQUEST_BYTES_MAX, None)? {
            let answer = match serde_json::from_slice(&request) {
                Ok(request) => self.answer(request),
                Err(error) => Err(format!("that is no request: {error}")),
            };
            write_line(reader.get_ref(), &answer.unwrap_or_else(|error| Answer::Refused(Refusal { error })))?;
        }
        Ok(())
    }

    fn answer(&self, request: Request) -> Result<Answer, String> {
        let offers = |control| {
            let offered = self.manifest.controls.contains(&control);
            if offered { Ok(()) } else { Err(format!("this exporter does not offer {control:?}")) }
        };
        Ok(match request {
            Request::Hello(_) => return Err("hello was said before".into()),
            Request::Ping(pong) => Answer::Pong { pong, epoch: self.weights.epoch().to_owned() },
            Request::Invalidate(how) => {
                offers(Control::Invalidate)?;
                Answer::Invalidated { invalidated: self.engine.invalidate(how)? }
            }
            Request::Hold(ms) => {
                offers(Control::Hold)?;
                Answer::Held { held: self.engine.hold(Duration::from_millis(ms)) }
            }
            Request::Release(_) => Answer::Released { released: self.engine.release() },
            Request::Score(ids) => {
                offers(Control::Score)?;
                Answer::Logprobs { logprobs: self.engine.score(&ids)? }
            }
        })
    }

    fn lend(&self, number: u64, pid: u32) -> Result<(), String> {
        let mut state = self.lock();
        match state.lease {
            Some((_, holder)) => Err(format!("{LEASED}{holder}")),
            None => {
                state.lease = Some((number, pid));
                Ok(())
            }
        }
    }
}
