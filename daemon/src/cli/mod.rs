//! The command line. Each subcommand is a module with its arguments and a `run`; adding one is a variant of
//! [`Command`] and a line in [`Cli::run`].

mod bench;
mod checkpoints;
mod demo;
mod doctor;
mod dream;
mod engine;
mod forget;
mod grads;
mod pause;
mod plan;
mod serve;
mod stage;
mod status;
mod train;
mod trainer;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use compute::Dtype;
use tracing::level_filters::LevelFilter;

use crate::config::{self, Config, Sources};

/// apollod: a daemon that makes a language model learn while it is being served.
#[derive(Debug, Parser)]
#[command(
    name = "apollod",
    version,
    about,
    after_help = "\
Examples:
  apollod demo                              see it work, here and now
  apollod plan --model ./model --gpu h100   what training it will take
  apollod stage ./model /dev/shm/live       make the live copy that a server maps
  apollod serve --config apollod.toml       train it while it is served
  apollod train examples.jsonl              post examples and watch them being learned
  apollod status                            what the daemon is doing
  apollod dream --config apollod.toml       let it make examples of scenarios by itself
  apollod checkpoint sync ./model           write the live weights into the model directory now"
)]
pub struct Cli {
    /// What logs on stderr look like. APOLLOD_LOG says how much: off, error, warn, info (default), debug,
    /// trace.
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
    /// Copy a model directory onto tmpfs, for a server that maps its weights (safetensors, or --gguf for llama.cpp).
    Stage(stage::StageArgs),
    /// Post examples to a running daemon and watch them being learned.
    Train(train::TrainArgs),
    /// Say what a running daemon is doing.
    Status(status::StatusArgs),
    /// Make examples of scenarios: the served model answers with an instruction, and learns to do without it.
    Dream(dream::DreamArgs),
    /// List the examples that made a generation, with their loss before and now.
    Blame(forget::BlameArgs),
    /// Take the effect of examples back: the weights become those that never saw them.
    Forget(forget::ForgetArgs),
    /// Stop training; what is posted waits.
    Pause(pause::PauseArgs),
    /// Go on training after `pause`, or after failures that made the daemon pause itself.
    Resume(pause::PauseArgs),
    /// Write, check, list, restore, repair and copy the generations of a model directory.
    Checkpoint(checkpoints::CheckpointArgs),
    /// The main job from end to end on an embedded model: a few seconds.
    Demo(demo::DemoArgs),
    /// Serve a model with the embedded engine, its weights in shared memory.
    Engine(engine::EngineArgs),
    /// Say what training a model will take, from its config.json alone: state, memory, the least time of a step.
    Plan(plan::PlanArgs),
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
        need_tokenizer(&config.model.dir)?;
        Ok(config)
    }
}

/// An element type by its short name.
fn dtype(name: &str) -> Result<Dtype, String> {
    match name.to_ascii_lowercase().as_str() {
        "bf16" => Ok(Dtype::BF16),
        "f16" | "fp16" => Ok(Dtype::F16),
        "f32" | "fp32" => Ok(Dtype::F32),
        _ => Err("use bf16, f16 or f32".into()),
    }
}

/// Refuses what is no model directory.
///
/// # Errors
/// What is in its place.
pub fn need_model(model: &Path) -> Result<()> {
    match config::no_model(model) {
        Some(reason) => bail!(reason),
        None => Ok(()),
    }
}

/// Refuses a model directory without the tokenizer that makes tokens of texts.
///
/// # Errors
/// It is missing.
pub fn need_tokenizer(model: &Path) -> Result<()> {
    let path = model.join("tokenizer.json");
    if !path.exists() {
        bail!(
            "{} is missing: copy it from where the model came from, or write it with \
             `AutoTokenizer.from_pretrained(...).save_pretrained({:?})`",
            path.display(),
            model.display().to_string()
        );
    }
    Ok(())
}

impl Cli {
    /// Runs the subcommand.
    ///
    /// # Errors
    /// What the operator has to know, in words.
    pub fn run(self) -> Result<ExitCode> {
        if !matches!(self.command, Command::Serve(_) | Command::Engine(_) | Command::Trainer(_) | Command::Demo(_)) {
            end_on_closed_pipe();
        }
        match self.command {
            Command::Serve(args) => serve::run(&args, self.log_format),
            Command::Stage(args) => stage::run(&args),
            Command::Train(args) => train::run(&args),
            Command::Status(args) => status::run(&args),
            Command::Dream(args) => dream::run(&args),
            Command::Blame(args) => forget::blame(&args),
            Command::Forget(args) => forget::forget(&args),
            Command::Pause(args) => pause::run(&args, true),
            Command::Resume(args) => pause::run(&args, false),
            Command::Checkpoint(args) => checkpoints::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Engine(args) => engine::run(args),
            Command::Plan(args) => plan::run(&args),
            Command::Doctor(args) => doctor::run(&args),
            Command::Grads(args) => grads::run(&args),
            Command::Bench(command) => bench::run(&command),
            Command::Trainer(args) => trainer::run(&args),
        }
    }
}

/// Logs go to stderr: stdout belongs to results and, in the trainer, to the protocol.
///
/// # Errors
/// APOLLOD_LOG is no level.
pub fn start_logging(format: LogFormat) -> Result<()> {
    let level = std::env::var_os("APOLLOD_LOG").map(|level| level.to_string_lossy().into_owned());
    let level = log_level(level.as_deref())?;
    let builder = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

fn log_level(name: Option<&str>) -> Result<LevelFilter> {
    let Some(name) = name else { return Ok(LevelFilter::INFO) };
    // LevelFilter also reads numbers and nothing at all, which would be levels by accident.
    let named = ["off", "error", "warn", "info", "debug", "trace"].contains(&name.to_ascii_lowercase().as_str());
    match name.parse() {
        Ok(level) if named => Ok(level),
        _ => bail!("APOLLOD_LOG={name}: use off, error, warn, info, debug or trace"),
    }
}

/// An error with its causes, each said once: many of ours already quote the system's words.
pub fn words(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

/// Lets a reader that has seen enough (`apollod status | head -1`) end the command, as it ends others; Rust's runtime
/// ignores the signal, and printing would panic.
fn end_on_closed_pipe() {
    // SAFETY: SIG_DFL installs no handler, so nothing runs in a signal's context; no other thread runs yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_values_that_are_taken() {
        for command in [&["plan", "--model", "m"][..], &["bench", "step"], &["bench", "sync"], &["demo"]] {
            let parsed = Cli::try_parse_from(["apollod"].iter().chain(command));
            assert!(parsed.is_ok(), "{command:?}: {}", parsed.err().map(|error| error.to_string()).unwrap_or_default());
        }
        let error =
            Cli::try_parse_from(["apollod", "plan", "--model", "m", "--dtype", "int8"]).unwrap_err().to_string();
        assert!(error.contains("bf16, f16 or f32"), "{error}");
    }

    #[test]
    fn only_levels_by_name_are_taken_for_logs() {
        assert_eq!(log_level(None).unwrap(), LevelFilter::INFO);
        assert_eq!(log_level(Some("Debug")).unwrap(), LevelFilter::DEBUG);
        assert_eq!(log_level(Some("off")).unwrap(), LevelFilter::OFF);
        for bad in ["bogus", "", "3", "apollod=debug"] {
            let error = log_level(Some(bad)).unwrap_err().to_string();
            assert!(error.contains("off, error, warn, info, debug or trace"), "{bad}: {error}");
        }
    }

    #[test]
    fn each_cause_is_said_once() {
        let io = || std::io::Error::from_raw_os_error(2);
        let error = crate::config::ConfigError::Read { path: "x.toml".into(), source: io() };
        assert_eq!(words(&error.into()).matches("No such file").count(), 1);
        let error = anyhow::Error::from(io()).context("cannot read x");
        assert_eq!(words(&error), "cannot read x: No such file or directory (os error 2)");
    }
}
