//! The embedded engine: a small OpenAI-compatible server whose weights lie in shared memory, or in a GPU's.
//!
//! It stands in for vLLM or `transformers serve` where neither is installed: the demo, tests, and a
//! first try on any machine. It reads its weights on every token and never keeps a copy, so what a
//! trainer writes is in the next token. One request at a time generates; others wait.

mod api;
mod gate;
mod generate;

use crate::backend::{Backend, DeviceChoice, OnDevice};
use crate::examples::Templates;
use crate::reading::{checksums, reading};
use crate::signals::StopSignals;
use anyhow::{Context, Result};
use ipc::{Control, Invalidation, Server, SharedWeights};
use model::{Config, Model};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;

pub use api::prompt;
pub use generate::{Finish, Sampling};

/// What `apollod engine` is told.
pub struct Options {
    /// Model directory.
    pub model: PathBuf,
    /// Address of the HTTP interface; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Unix socket on which the manifest is offered.
    pub socket: PathBuf,
    /// Longest context and answer together, in tokens.
    pub max_tokens: usize,
    /// Where the weights lie.
    pub device: DeviceChoice,
    /// Compute threads of the CPU; 0 is one per core.
    pub threads: usize,
    /// Take the files as they are, whatever their checksums say.
    pub unchecked: bool,
}

/// Continues a text by these tokens: the logits that follow.
type Continue<'a> = Box<dyn FnMut(&[u32]) -> Vec<f32> + 'a>;

/// A model on some device.
trait Network: Send {
    /// Number of tokens.
    fn vocab(&self) -> usize;
    /// Of `ids[1..]`, each given those before it.
    fn logprobs(&self, ids: &[u32]) -> Vec<f32>;
    /// The start of a text of up to so many tokens.
    fn text(&self, capacity: usize) -> Continue<'_>;
}

impl<D: Backend> Network for Model<D> {
    fn vocab(&self) -> usize {
        self.config().decoder.vocab
    }
    fn logprobs(&self, ids: &[u32]) -> Vec<f32> {
        let mut cache = self.cache(0);
        self.device().run(|| Model::logprobs(self, &mut cache, ids))
    }
    fn text(&self, capacity: usize) -> Continue<'_> {
        let mut cache = self.cache_in(compute::Dtype::F32, capacity);
        Box::new(move |ids| self.device().run(|| self.next_logits(&mut cache, ids)))
    }
}

/// Reads a model directory into memory that others can open, and makes the model of it.
struct Load<'a> {
    options: &'a Options,
    config: Config,
    max_tokens: usize,
}

impl OnDevice for Load<'_> {
    type Output = Result<(Box<dyn Network>, Arc<SharedWeights>)>;

    fn on<D: Backend>(self, device: Arc<D>) -> Self::Output {
        let (dir, tensors) = (&self.options.model, self.config.decoder.tensors());
        let load = || {
            let checksums = if self.options.unchecked { None } else { checksums(dir)? };
            SharedWeights::load_checked(dir, &tensors, device.gpu(), |name, bytes| {
                checksums.as_ref().map_or(Ok(()), |checksums| checksums.check(name, bytes))
            })
        };
        let weights = Arc::new(reading(dir, load)?);
        let model = Model::new(device.clone(), self.config, D::shared(&device, &weights), self.max_tokens);
        Ok((Box::new(model), weights))
    }
}

/// A loaded model that can answer.
pub struct Engine {
    model: Mutex<Box<dyn Network>>,
    gate: gate::Gate,
    templates: Templates,
    name: String,
    max_tokens: usize,
}

impl Engine {
    fn load(options: &Options) -> Result<(Engine, Arc<SharedWeights>)> {
        let config = Config::read(&options.model)?;
        let max_tokens = options.max_tokens.min(config.max_position_embeddings);
        let (model, weights) = options.device.run(options.threads, Load { options, config, max_tokens })?;
        let templates = Templates::load(&options.model, max_tokens)?;
        let name = options.model.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
        let (model, gate) = (Mutex::new(model), gate::Gate::default());
        Ok((Engine { model, gate, templates, name, max_tokens }, weights))
    }
}

/// What a trainer may ask for.
impl ipc::Engine for Engine {
    fn server(&self) -> Option<Server> {
        Some(Server { name: "apollod engine".into(), version: env!("CARGO_PKG_VERSION").into() })
    }

    fn controls(&self) -> Vec<Control> {
        vec![Control::Invalidate, Control::Hold, Control::Score]
    }

    /// Nothing is kept from one request to the next, so there is never anything older to be found.
    fn invalidate(&self, _: Invalidation) -> Result<Invalidation, String> {
        Ok(Invalidation::Reset)
    }

    fn hold(&self, longest: Duration) -> bool {
        self.gate.hold(longest)
    }

    fn release(&self) -> bool {
        self.gate.release()
    }

    fn score(&self, ids: &[u32]) -> Result<Vec<f32>, String> {
        let model = self.model.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (vocab, most) = (model.vocab(), self.max_tokens);
        if !(2..=most).contains(&ids.len()) || ids.iter().any(|&id| id as usize >= vocab) {
            return Err(format!("want 2 to {most} token ids below {vocab}"));
        }
        Ok(model.logprobs(ids))
    }
}

/// Serves until SIGTERM or SIGINT. Says on stdout, as one line of JSON, where it listens.
pub async fn run(options: Options) -> Result<()> {
    let (engine, weights) = Engine::load(&options)?;
    let engine = Arc::new(engine);
    let export = weights.serve(&options.socket, engine.clone())?;
    let listener =
        TcpListener::bind(options.listen).await.with_context(|| format!("cannot listen on {}", options.listen))?;
    let mut stop = StopSignals::new()?;
    announce(&listener, export.socket())?;
    axum::serve(listener, api::router(engine)).with_graceful_shutdown(async move { stop.next().await }).await?;
    Ok(())
}

fn announce(listener: &TcpListener, socket: &Path) -> Result<()> {
    let line = serde_json::json!({
        "listening": listener.local_addr()?.to_string(),
        "socket": socket,
        "pid": std::process::id(),
    });
    println!("{line}");
    Ok(())
}
