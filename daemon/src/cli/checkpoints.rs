//! `apollod checkpoint`: the generations of a model directory.
//!
//! `sync`, `rollback` and `repair` go through the daemon that runs on the directory, which says its address there; `verify`,
//! `list` and `export` read the files and are safe beside it; `rollback` and `repair` without a daemon, `recover` and `adopt`
//! work on the files alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use checkpoint::{Checkpoint, Damage, Generation, Recovery};
use clap::{Args, Subcommand};
use serde_json::Value;

use crate::client::{Client, ClientArgs, is_served};
use crate::config::Sources;
use crate::http::GenerationView;
use crate::lineage;
use crate::protocol::{Repaired, Synced};
use crate::queue::Queue;
use crate::trainer;

/// `apollod checkpoint`
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  apollod checkpoint list ./model
  apollod checkpoint rollback ./model --to 12
  apollod checkpoint export ./model /backup/model-2026-11-20   safe while the daemon runs
  apollod checkpoint export ./model --gguf model.gguf          for llama.cpp
  apollod checkpoint recover ./model                           after a crash, if nothing else opens it
  apollod checkpoint repair ./model                            after `verify` or a sync has found damage
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
    #[command(after_help = "\
Where no example was trained or skipped since the current generation, it says so and makes none.

Example:\n  apollod checkpoint sync ./model")]
    Sync {
        /// The model directory; without it the daemon at --url.
        dir: Option<PathBuf>,
    },
    /// Compare every byte with its checksum: files, optimizer state, and what rollback needs. Exit status 1 when one differs.
    #[command(after_help = "\
Not covered, because a sync does not write them: config.json, the tokenizer's files, and the queue (.apollod/queue.sqlite,
which SQLite checks).

Example:
  apollod checkpoint verify ./model && echo intact")]
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
    #[command(after_help = "\
It can be undone by another rollback, and as every generation it may push the oldest out of the history (sync.keep), which it
says. To the current generation it makes none: it takes back what was trained since. Without a daemon it changes the files alone.

Example:
  apollod checkpoint rollback ./model --to 12")]
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
    /// Put damage right that `verify` or a sync has found: blocks, headers, deltas, optimizer states, documents of generations.
    #[command(after_help = "\
What is written has the recorded checksum, so it is right wherever it comes from: the live weights of the running server (as
far as they have not moved since the current generation), MODEL.generations, the copies that --from names, or the damaged
block itself with one bit turned back. Deltas and optimizer states come from a copy that has .apollod. It says what was repaired and what not; exit status 1 when something is damaged still.
It may be stopped and started again at any moment.

Examples:
  apollod checkpoint repair ./model
  apollod checkpoint repair ./model --from /backup/model-2026-11-20 --from /dev/shm/live")]
    Repair {
        /// The model directory.
        dir: PathBuf,
        /// A copy of it, of any generation: an export, a backup with .apollod, a staged live copy. May be repeated.
        #[arg(long, value_name = "DIR")]
        from: Vec<PathBuf>,
    },
    /// Take the files as they are as a new generation, after somebody changed them on purpose.
    #[command(after_help = "\
Where nothing was changed it does nothing. Otherwise it names the tensors that it takes, the history ends there (no earlier
generation can be restored) and the optimizer starts afresh. What was not changed on purpose is for `repair`. Not while a
daemon serves the directory; a staged copy of it has to be staged again.

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
        Action::Repair { dir, from } => return repair(dir, from, &args.client),
        Action::Verify { dir } => {
            generations(dir)?;
            let report = checkpoint::verify(dir)?;
            println!("{report}");
            println!("not covered: config.json, the tokenizer's files, the queue");
            if !report.is_ok() {
                println!("{}", advice(dir, &report.damage));
            }
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

/// The generations of a model directory, which must have some: nothing here makes the first.
fn generations(dir: &Path) -> Result<Vec<Generation>> {
    need_directory(dir)?;
    let generations = checkpoint::list(dir)?;
    if !generations.is_empty() {
        return Ok(generations);
    }
    let dir_is = dir.display();
    if !["model.safetensors", "model.safetensors.index.json"].iter().any(|name| dir.join(name).exists()) {
        bail!("{dir_is}: no model directory: it holds neither model.safetensors nor model.safetensors.index.json");
    }
    if dir.join("generation.json").exists() {
        bail!(
            "{dir_is}: a copy of one generation, which nobody writes into and which has no history: give the model \
             directory that it was made from"
        );
    }
    bail!(
        "{dir_is}: no generations, so no history and no checksums to compare with: an export carries none, and a model \
         has them from the first `apollod serve` on it"
    )
}

/// What helps against damage that a check has found.
fn advice(dir: &Path, damage: &[Damage]) -> String {
    let repair = format!("apollod checkpoint repair {}", dir.display());
    if damage.iter().all(|damage| matches!(damage, Damage::History { .. })) {
        return format!(
            "the files are whole; what is damaged is needed only to go back. From a copy that has .apollod: {repair} --from \
             COPY. Without one it can stay: it goes when the history has moved on (sync.keep)"
        );
    }
    let missing = damage.iter().any(|damage| matches!(damage, Damage::File { .. }));
    let first = match missing {
        true => {
            "a file that is missing or of another length first has to be copied there, from any copy of the model; then, "
        }
        false => "",
    };
    format!("{first}to put it right from the live weights, MODEL.generations or a copy (--from): {repair}")
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
    match done.unchanged {
        true => println!("nothing changed since generation {}: no new generation was made", done.generation),
        false => println!(
            "generation {}: {} of {} blocks changed, {} bytes written, {:.2} s",
            done.generation, done.blocks_changed, done.blocks_total, done.bytes_written, done.seconds
        ),
    }
    if let Some(why) = done.directory_failed {
        bail!("generation {} is in the files, and got no directory of its own: {why}", done.generation);
    }
    Ok(())
}

fn list(dir: &Path, json: bool) -> Result<()> {
    let generations = generations(dir)?;
    if json {
        let views: Vec<GenerationView> = generations.iter().rev().map(GenerationView::from).collect();
        println!("{}", serde_json::to_string_pretty(&views)?);
        return Ok(());
    }
    println!(
        "{:>10}  {:20}  {:>8}  {:>8}  {:>8}  {:>13}  {:>13}  {:>6}",
        "generation", "created", "version", "examples", "loss", "bytes written", "bytes journal", "ratio"
    );
    for of in generations.iter().rev() {
        if let Some(damage) = &of.damage {
            println!("{:>10}  DAMAGED: {damage}", of.generation);
            continue;
        }
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
        let (generation, cursor) = (&done["generation"], &done["cursor"]);
        match generation.as_u64() == Some(to) {
            true => println!("generation {to} is what the files hold already; live weights are it again"),
            false => println!("back at the content of {to}: generation {generation}; live weights and files"),
        }
        println!(
            "examples after number {cursor} are taken back and are not trained again unless they are posted again"
        );
        let no_longer: Vec<u64> = serde_json::from_value(done["no_longer"].clone()).unwrap_or_default();
        say_no_longer(&no_longer);
        return Ok(());
    }
    let of: Vec<u64> = lineage::ancestors(&generations(dir)?, to).iter().flat_map(lineage::Ancestor::numbers).collect();
    let queue = dir.join(".apollod/queue.sqlite");
    if queue.exists() && Queue::open(&queue, 1)?.holds_forgotten(&of)?.is_some() {
        bail!("generation {to} holds what was forgotten since: nothing brings it back");
    }
    let (mut checkpoint, recovery) = Checkpoint::open(dir)?;
    eprintln!("{recovery}");
    let done = checkpoint.rollback(to)?;
    say_warnings(&mut checkpoint);
    match done.sync.unchanged {
        true => println!(
            "generation {to} is what the files hold already: nothing was done; what is in the queue after it is trained when \
             `apollod serve` starts"
        ),
        false => println!("{done}; files only: no daemon runs on {}", dir.display()),
    }
    Ok(())
}

fn say_warnings(checkpoint: &mut Checkpoint) {
    checkpoint.take_warnings().iter().for_each(|warning| eprintln!("{warning}"));
}

pub(super) fn say_no_longer(generations: &[u64]) {
    match (generations.first(), generations.last()) {
        (Some(first), Some(last)) if first == last => {
            println!("generation {first} went from the history for it (sync.keep) and cannot be restored any more");
        }
        (Some(first), Some(last)) => {
            println!(
                "generations {first} to {last} went from the history for it (sync.keep) and cannot be restored any more"
            );
        }
        _ => {}
    }
}

fn recover(dir: &Path) -> Result<()> {
    generations(dir)?;
    let (mut checkpoint, recovery) = Checkpoint::open(dir)?;
    say_warnings(&mut checkpoint);
    match recovery {
        // Only what is undone is compared, byte by byte, before its journal goes.
        Recovery::Clean { .. } | Recovery::Finished { .. } => {
            println!("{recovery}; contents not compared, `apollod checkpoint verify {}` does", dir.display());
        }
        Recovery::Created | Recovery::Undone { .. } => println!("{recovery}"),
    }
    Ok(())
}

/// How long a repair without the daemon waits for a trainer that holds the directory to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(60);

fn repair(dir: &Path, from: &[PathBuf], client: &ClientArgs) -> Result<ExitCode> {
    generations(dir)?;
    let from = from.iter().map(std::path::absolute).collect::<std::io::Result<Vec<_>>>()?;
    if let Some(client) = Client::of_model(dir, client) {
        let body = serde_json::json!({ "from": from }).to_string();
        let answer = client.post("/v1/checkpoints/repair", &[("content-type", "application/json")], body.as_bytes())?;
        // The damage may be what keeps a trainer from starting.
        let no_trainer =
            answer.status == 503 && answer.body["type"].as_str().is_some_and(|kind| kind.ends_with("not-ready"));
        if !no_trainer {
            return Ok(say_repaired(&serde_json::from_value(answer.ok()?)?));
        }
        eprintln!("no trainer is attached, so the files are repaired without the daemon");
    }
    let config = dir.join(".apollod/trainer.toml");
    let config = config.exists().then(|| Sources::of_process(Some(config), Vec::new()).load()).transpose()?;
    let patience = Instant::now() + LOCK_PATIENCE;
    let (report, not_looked) = loop {
        match trainer::repair_files(dir, config.as_ref(), &from) {
            Err(error) if is_locked(&error) && Instant::now() < patience => {
                std::thread::sleep(Duration::from_millis(50))
            }
            done => break done?,
        }
    };
    if let Some(why) = not_looked {
        eprintln!("live weights were not looked at: {why}");
    }
    Ok(say_repaired(&trainer::repaired(&report)))
}

fn is_locked(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(checkpoint::Error::Locked { .. }))
}

fn say_repaired(done: &Repaired) -> ExitCode {
    done.repaired.iter().for_each(|what| println!("repaired: {what}"));
    done.damage.iter().for_each(|what| println!("still damaged: {what}"));
    if done.damage.is_empty() {
        match done.repaired.is_empty() {
            true => println!("generation {}: all checksums match, nothing to repair", done.generation),
            false => println!("generation {}: all checksums match now", done.generation),
        }
        return ExitCode::SUCCESS;
    }
    println!(
        "what is damaged still has its content nowhere that was looked at: name a copy with --from (one that has .apollod for \
         deltas and optimizer states; a file that is missing or of another length has to be copied there first)"
    );
    ExitCode::FAILURE
}

fn adopt(dir: &Path) -> Result<()> {
    need_directory(dir)?;
    if is_served(dir) {
        bail!("a daemon serves {}: stop it first, it holds the weights that the files had", dir.display());
    }
    generations(dir)?;
    let (mut checkpoint, recovery) = Checkpoint::open(dir)?;
    eprintln!("{recovery}");
    let before = checkpoint.current().generation;
    let changed = checkpoint.verify()?.damage;
    if changed.is_empty() {
        println!(
            "nothing to adopt: every byte of the weights and of the optimizer state is that of generation {before}"
        );
        return Ok(());
    }
    let progress = checkpoint.current().progress.clone();
    let adopted = checkpoint.adopt(progress)?.generation;
    say_warnings(&mut checkpoint);
    println!("generation {adopted} is the files as they are. Accepted:");
    for changed in &changed {
        match changed {
            Damage::Tensor { file, tensor, blocks } => {
                println!("  {file}: tensor `{tensor}`, {} blocks of 16 KiB", blocks.len());
            }
            Damage::Header { file } => println!("  {file}: its header"),
            Damage::File { .. } => println!("  {changed}"),
            // What its text advises is done with.
            Damage::Other { .. } | Damage::History { .. } => {
                let what = changed.to_string();
                println!("  {}", what.split(';').next().unwrap_or(&what));
            }
        }
    }
    println!("the optimizer begins with a fresh state");
    let pruned = checkpoint.take_pruned();
    println!(
        "history ends here: {}",
        match (pruned.first(), pruned.last()) {
            (Some(first), Some(last)) =>
                format!("generations {first} to {last} and {before} cannot be restored any more"),
            _ => format!("generation {before} cannot be restored any more"),
        }
    );
    Ok(())
}
