//! The command line. Each subcommand is a module with its arguments and a `run`; adding one is a variant of
//! [`Command`] and a line in [`Cli::run`].

mod bench;
mod checkpoints;
mod client;
mod demo;
mod doctor;
mod engine;
mod grads;
mod serve;
mod stage;
mod status;
mod train;
mod trainer;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{Config, Sources};

/// apollod: a daemon that makes a language model learn while it is being served.
#[derive(Debug, Parser)]
#[command(
    name = "apollod",
    version,
    about,
    after_help = "\
Examples:
  apollod demo                              see it work, here and now
  apollod stage ./model /dev/shm/live       make the live copy that a server maps
  apollod serve --config apollod.toml       train it while it is served
  apollod train examples.jsonl              post examples and watch them being learned
  apollod status                            what the daemon is doing
  apollod checkpoint sync ./model           write the live weights into the model directory now"
)]
pub struct Cli {
    /// What logs on stderr look like. APOLLOD_LOG says how much: error, warn, info (default), debug.
    #[arg(long, global = true, env = "APOLLOD_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What logs look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a served model: HTTP, queue, schedule, and the trainer that it starts.
    Serve(serve::ServeArgs),
    /// Copy a model directory onto tmpfs, for a server that maps its weights.
    Stage(stage::StageArgs),
    /// Post examples to a running daemon and watch them being learned.
    Train(train::TrainArgs),
    /// Say what a running daemon is doing.
    Status(status::StatusArgs),
    /// Write, check, list, restore and copy the generations of a model directory.
    Checkpoint(checkpoints::CheckpointArgs),
    /// The main job from end to end on an embedded model: about half a minute.
    Demo(demo::DemoArgs),
    /// Serve a model with the embedded engine, its weights in shared memory.
    Engine(engine::EngineArgs),
    /// Prove the kernels on a model's own weights.
    Doctor(doctor::DoctorArgs),
    /// Loss and full gradients of examples, to compare with another implementation.
    Grads(grads::GradsArgs),
    /// Measure this machine.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// The process that `serve` starts: it owns the live weights and speaks JSON lines.
    #[command(hide = true)]
    Trainer(trainer::TrainerArgs),
}

/// Where the configuration comes from.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// Configuration file; apollod.example.toml states every key.
    #[arg(long, short, env = "APOLLOD_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Set one key over file and environment, such as --set train.lr=1e-5; may be repeated.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
}

impl ConfigArgs {
    /// Loads and validates.
    fn load(&self) -> Result<Config> {
        let config = Sources::of_process(self.config.clone(), self.set.clone()).load()?.absolute()?;
        config.validate()?;
        Ok(config)
    }
}

impl Cli {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// What the operator has to know, in words.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Serve(args) => serve::run(&args, self.log_format),
            Command::Stage(args) => stage::run(&args),
            Command::Train(args) => train::run(&args),
            Command::Status(args) => status::run(&args),
            Command::Checkpoint(args) => checkpoints::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Engine(args) => engine::run(args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Grads(args) => grads::run(&args),
            Command::Bench(command) => bench::run(&command),
            Command::Trainer(args) => trainer::run(&args),
        }
    }
}

/// Logs go to stderr: stdout belongs to results and, in the trainer, to the protocol.
pub fn start_logging(format: LogFormat) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("APOLLOD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
