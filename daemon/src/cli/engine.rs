//! `apollod engine`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::backend::DeviceChoice;
use crate::engine::{self, Options};

/// `apollod engine`
#[derive(Debug, Args)]
#[command(after_help = "\
The first line on stdout is JSON: where it listens, its socket, its process id.
Where .apollod has checksums, every tensor is compared with its own as it is loaded.

Examples:
  apollod engine ./model --socket /tmp/engine.sock
  apollod serve --set model.dir=./model --set server.socket=/tmp/engine.sock
  curl -s localhost:8845/v1/chat/completions -H 'content-type: application/json' \\
       -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'")]
pub struct EngineArgs {
    /// Model directory as Hugging Face writes it.
    model: PathBuf,
    /// Unix socket on which the weights are offered to `apollod serve` (server.socket).
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Address of the OpenAI interface; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8845", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Longest prompt and answer together, in tokens; the model may hold fewer.
    #[arg(long, default_value_t = 4096, value_name = "TOKENS")]
    max_tokens: usize,
    /// Where the weights lie: cpu, cuda, cuda:1, or a GPU's UUID.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Compute threads of the CPU; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Load the model although its files are not as their checksums in .apollod say.
    #[arg(long)]
    unchecked: bool,
}

/// Serves until told to stop.
pub fn run(args: EngineArgs) -> Result<ExitCode> {
    let EngineArgs { model, socket, listen, max_tokens, device, threads, unchecked } = args;
    if !listen.ip().is_loopback() {
        anyhow::bail!("--listen {listen}: the embedded engine has no access control and stays on loopback");
    }
    super::need_model(&model)?;
    super::need_tokenizer(&model)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(engine::run(Options { model, listen, socket, max_tokens, device, threads, unchecked }))?;
    Ok(ExitCode::SUCCESS)
}
