//! `apollod checkpoint`: the generations of a model directory.
//!
//! `sync` and `rollback` go through the daemon that runs on the directory, which says its address there; `verify`,
//! `list` and `export` read the files and are safe beside it; `rollback` without a daemon, `recover` and `adopt` work on the
//! files alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use checkpoint::{Checkpoint, Generation};
use clap::{Args, Subcommand};
use serde_json::Value;

use super::client::{Client, ClientArgs, is_served};
use crate::http::GenerationView;
use crate::protocol::Synced;

/// `apollod checkpoint`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  apollod checkpoint list ./model
  apollod checkpoint rollback ./model --to 12
  apollod checkpoint export ./model /backup/model-2026-11-20   safe while the daemon runs
  apollod checkpoint export ./model --gguf model.gguf          for llama.cpp
  apollod checkpoint recover ./model                           after a crash, if nothing else opens it
  apollod checkpoint adopt ./model                             after files were changed on purpose")]
pub struct CheckpointArgs {
    #[command(subcommand)]
    action: Action,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Write the live weights of the running daemon into its model directory now.
    #[command(after_help = "Example:\n  apollod checkpoint sync ./model")]
    Sync {
        /// The model directory; without it the daemon at --url.
        dir: Option<PathBuf>,
    },
    /// Compare every byte with its checksum: files, optimizer state, and what rollback needs. Exit status 1 when one differs.
    #[command(after_help = "Example:\n  apollod checkpoint verify ./model && echo intact")]
    Verify {
        /// The model directory.
        dir: PathBuf,
    },
    /// List the generations, newest first.
    #[command(after_help = "\
Version counts the updates that the weights have had; loss is the last one measured; ratio is bytes of the journal, which
is what the history keeps, over bytes written into the files.

Example:
  apollod checkpoint list ./model --json | jq '.[0].generation'")]
    List {
        /// The model directory.
        dir: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Go back to the content of an earlier generation, as a new one.
    #[command(after_help = "Example:\n  apollod checkpoint rollback ./model --to 12")]
    Rollback {
        /// The model directory.
        dir: PathBuf,
        /// The generation to return to; `list` says which can be.
        #[arg(long, value_name = "GENERATION")]
        to: u64,
    },
    /// Copy the directory as one generation, without .apollod, even while syncs go on.
    #[command(after_help = "\
Examples:
  apollod checkpoint export ./model /backup/model-2026-11-20
  apollod checkpoint export ./model --gguf model.gguf                                  for llama.cpp
  apollod checkpoint export ./model --gguf model.gguf --gguf-template original.gguf

A GGUF file has matrices in the directory's element type and vectors in F32, as llama.cpp's converter writes them; quantize
it with llama-quantize. Its metadata come from config.json and the tokenizer's files. A tokenizer that is no byte-level BPE
is not written; --gguf-template then copies all metadata, the tokenizer's too, from another GGUF of the same model. Writing
takes room for the weights twice beside FILE.")]
    Export {
        /// The model directory.
        dir: PathBuf,
        /// The copy, which must not exist.
        #[arg(required_unless_present = "gguf", conflicts_with = "gguf")]
        to: Option<PathBuf>,
        /// Write one GGUF file instead, which must not exist.
        #[arg(long, value_name = "FILE")]
        gguf: Option<PathBuf>,
        /// Take the metadata from this GGUF of the same model, of any element type.
        #[arg(long, value_name = "FILE", requires = "gguf")]
        gguf_template: Option<PathBuf>,
    },
    /// Finish or take back what a crash left half written, and say what was done.
    #[command(after_help = "\
`apollod serve`, `engine` and `stage` do this by themselves; other programs that find a half-written model ask for it.

Example:
  apollod checkpoint recover ./model")]
    Recover {
        /// The model directory.
        dir: PathBuf,
    },
    /// Take the files as they are as a new generation, after somebody changed them on purpose.
    #[command(after_help = "\
The optimizer starts afresh and no earlier generation can be restored. Not while a daemon serves the directory; a staged
copy of it has to be staged again.

Example:
  apollod checkpoint adopt ./model")]
    Adopt {
        /// The model directory.
        dir: PathBuf,
    },
}

/// Does it and says what was done.
pub fn run(args: &CheckpointArgs) -> Result<ExitCode> {
    match &args.action {
        Action::Sync { dir } => sync(dir.as_deref(), &args.client)?,
        Action::List { dir, json } => list(dir, *json)?,
        Action::Rollback { dir, to } => rollback(dir, *to, &args.client)?,
        Action::Export { dir, to, gguf, gguf_template } => {
            need_directory(dir)?;
            if let Some(to) = to {
                println!("{}: {}", to.display(), checkpoint::export(dir, to)?);
            }
            if let Some(to) = gguf {
                println!(
                    "{}: {}",
                    to.display(),
                    crate::gguf::export(dir, to, gguf_template.as_deref(), &mut |_, _| {})?
                );
            }
        }
        Action::Recover { dir } => recover(dir)?,
        Action::Adopt { dir } => adopt(dir)?,
        Action::Verify { dir } => {
            need_directory(dir)?;
            // A damaged document is for verify to tell.
            if checkpoint::list(dir).is_ok_and(|list| list.is_empty()) {
                bail!(
                    "{}: no generations, so no checksums to compare with: an export carries none, and a model has \
                     them from the first `apollod serve` on it",
                    dir.display()
                );
            }
            let report = checkpoint::verify(dir)?;
            println!("{report}");
            return Ok(if report.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn need_directory(dir: &Path) -> Result<()> {
    match dir.is_dir() {
        true => Ok(()),
        false => bail!("{}: no such directory", dir.display()),
    }
}

fn generations(dir: &Path) -> Result<Vec<Generation>> {
    need_directory(dir)?;
    Ok(checkpoint::list(dir)?)
}

fn sync(dir: Option<&Path>, client: &ClientArgs) -> Result<()> {
    let client = match dir {
        None => Client::new(client),
        Some(dir) => match Client::of_model(dir, client) {
            Some(client) => client,
            None => bail!("no daemon runs on {}: there are no live weights to write", dir.display()),
        },
    };
    let done: Synced = serde_json::from_value(client.post("/v1/checkpoint", &[], b"")?.ok()?)?;
    println!(
        "generation {}: {} of {} blocks changed, {} bytes written, {:.2} s",
        done.generation, done.blocks_changed, done.blocks_total, done.bytes_written, done.seconds
    );
    Ok(())
}

fn list(dir: &Path, json: bool) -> Result<()> {
    let generations = generations(dir)?;
    if json {
        let views: Vec<GenerationView> = generations.iter().rev().map(GenerationView::from).collect();
        println!("{}", serde_json::to_string_pretty(&views)?);
        return Ok(());
    }
    if generations.is_empty() {
        println!("no generations yet: the first `apollod serve` on it makes one");
        return Ok(());
    }
    println!(
        "{:>10}  {:20}  {:>8}  {:>8}  {:>8}  {:>13}  {:>13}  {:>6}",
        "generation", "created", "version", "examples", "loss", "bytes written", "bytes journal", "ratio"
    );
    for of in generations.iter().rev() {
        let mut note = of.rollback_of.map_or_else(String::new, |to| format!("  content of {to}"));
        if !of.restorable {
            note.push_str("  no longer restorable");
        }
        let loss = of.progress.loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"));
        let ratio = if of.written_bytes > 0 { format!("{:.3}", of.ratio) } else { "-".into() };
        println!(
            "{:>10}  {:20}  {:>8}  {:>8}  {loss:>8}  {:>13}  {:>13}  {ratio:>6}{note}",
            of.generation,
            of.created,
            of.progress.weight_version,
            of.progress.examples,
            of.written_bytes,
            of.journal_bytes
        );
    }
    Ok(())
}

fn rollback(dir: &Path, to: u64, client: &ClientArgs) -> Result<()> {
    if let Some(client) = Client::of_model(dir, client) {
        let done: Value = client.post(&format!("/v1/checkpoints/{to}/rollback"), &[], b"")?.ok()?;
        println!("back at the content of {to}: generation {}; live weights and files", done["generation"]);
        return Ok(());
    }
    let (mut checkpoint, recovery) = Checkpoint::open(dir)?;
    eprintln!("{recovery}");
    println!("{}; files only: no daemon runs on {}", checkpoint.rollback(to)?, dir.display());
    Ok(())
}

fn recover(dir: &Path) -> Result<()> {
    if generations(dir)?.is_empty() {
        println!("no generations yet, so nothing to recover");
        return Ok(());
    }
    let (_, recovery) = Checkpoint::open(dir)?;
    println!("{recovery}");
    Ok(())
}

fn adopt(dir: &Path) -> Result<()> {
    need_directory(dir)?;
    if is_served(dir) {
        bail!("a daemon serves {}: stop it first, it holds the weights that the files had", dir.display());
    }
    let (mut checkpoint, recovery) = Checkpoint::open(dir)?;
    eprintln!("{recovery}");
    let progress = checkpoint.current().progress.clone();
    println!("adopted the files as they are: {}", checkpoint.adopt(progress)?);
    Ok(())
}
