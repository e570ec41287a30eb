//! `apollod bench`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use compute::Dtype;

use crate::backend::DeviceChoice;
use crate::bench::{self, Options, Pattern, SyncOptions};
use crate::config::{Activations, Moments, Rule, TensorRule, TrainConfig};

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// One training step by phase, beside the machine's floor.
    Step(StepArgs),
    /// How fast a GPU hashes its weights, which is what an idle sync does.
    Scan(ScanArgs),
    /// A sync of changed weights to disk, beside saving everything anew and beside rsync.
    Sync(SyncArgs),
}

/// `apollod bench sync`
#[derive(Debug, Args)]
#[command(after_help = "\
Three ways to bring the same weights to the same disk take turns: a sync, the safetensors crate's save (onto new files,
then over them), and `rsync --inplace --no-whole-file` from the new files onto the old, where it is installed. Each
ends when everything is on the disk; files are in the page cache before. The sync also writes an optimizer state of the
size that APOLLO has at this rank (two moments, `--moments`), which the others do not. The ratio is to the median of the
best of them.

Files are made in a folder of their own, which is removed at the end; how much room that takes is said first. A run that
is killed leaves it: apollod-bench-sync-*. Memory: the weights and the state once, and as much page cache as there is.

Examples:
  apollod bench sync --gib 4 --dirty 0.1 --json
  apollod bench sync --gib 4 --dirty 0.1 --pattern blocks --dir /models")]
pub struct SyncArgs {
    /// GiB of bf16 weights.
    #[arg(long, default_value_t = 4.0)]
    gib: f64,
    /// Share of the weights that changes before each sync, above 0 and at most 1.
    #[arg(long, default_value_t = 0.1)]
    dirty: f64,
    /// What changes. Training writes whole matrices, and whole rows of an embedding; single blocks drawn at random are the
    /// worst that a disk can meet.
    #[arg(long, value_enum, default_value_t = Pattern::Tensors)]
    pattern: Pattern,
    /// Rank of the optimizer.
    #[arg(long, default_value_t = TrainConfig::default().rank)]
    rank: usize,
    /// What its moments are stored in, of which the state is made; `auto` is a CPU's bf16.
    #[arg(long, value_enum, default_value_t = TrainConfig::default().moments)]
    moments: Moments,
    /// Runs, which all count.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Runs that rsync takes part in: it is slow.
    #[arg(long, default_value_t = 1)]
    rsync_runs: usize,
    /// Where the files are made: their file system is measured.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Of weights, changes and state.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// One line of JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// `apollod bench scan`
#[derive(Debug, Args)]
#[command(after_help = "\
Time is the GPU's, for one hash of every 4 KiB block: every byte is read once.

Examples:
  apollod bench scan --device cuda --bytes 16000000000")]
pub struct ScanArgs {
    /// cuda, cuda:1, or a GPU's UUID.
    #[arg(long, default_value = "cuda")]
    device: DeviceChoice,
    /// Bytes of weights.
    #[arg(long, default_value_t = 1_000_000_000)]
    bytes: usize,
    /// One line of JSON.
    #[arg(long)]
    json: bool,
}

/// `apollod bench step`
#[derive(Debug, Args)]
#[command(after_help = "\
The floor is what the machine could do at best, measured in the same run: 2*N*context over the rate of dot products
(on a GPU: of large matrix products) for prefill; for the decision the larger of 6*N*T over that rate and (4 * bytes of
W + 2 * bytes of optimizer state) over the bandwidth of memory (on a GPU: of a copy on the device, bytes read and
written), N being the parameters of the matrices that train.

Examples:
  apollod bench step --shape qwen3-0.6b --context 512 --decision 32 --rank 256 --dtype bf16 --steps 5
  apollod bench step --shape qwen3-8b --device cuda --json")]
pub struct StepArgs {
    /// tiny, small, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, or the path of a config.json; random weights.
    #[arg(long, default_value = "qwen3-0.6b")]
    shape: String,
    /// Tokens of frozen context.
    #[arg(long, default_value_t = 512)]
    context: usize,
    /// Decision tokens.
    #[arg(long, default_value_t = 32)]
    decision: usize,
    /// Rank of the optimizer.
    #[arg(long, default_value_t = 256)]
    rank: usize,
    /// bf16, f16 or f32.
    #[arg(long, default_value = "bf16", value_parser = super::dtype)]
    dtype: Dtype,
    /// What the moments are stored in; `auto` is bf16 on a CPU, f32 on a GPU.
    #[arg(long, value_enum, default_value_t = TrainConfig::default().moments)]
    moments: Moments,
    /// What products of the decision tokens take activations in: `bf16` is faster where the processor has dot products of it.
    #[arg(long, value_enum, default_value_t = TrainConfig::default().activations)]
    activations: Activations,
    /// Steps that count, after one that does not.
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// cpu, cuda, cuda:1, or a GPU's UUID.
    #[arg(long, default_value = "cpu")]
    device: DeviceChoice,
    /// Compute threads of the CPU; 0 is one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Train the tied embedding by AdamW with full moments instead of APOLLO, as apollo-torch's users do.
    #[arg(long)]
    head_adamw: bool,
    /// One line of JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Measures.
pub fn run(command: &BenchCommand) -> Result<ExitCode> {
    let args = match command {
        BenchCommand::Step(args) => args,
        BenchCommand::Scan(args) => {
            bench::scan(&args.device, args.bytes, args.json)?;
            return Ok(ExitCode::SUCCESS);
        }
        BenchCommand::Sync(args) => {
            bench::sync(&SyncOptions {
                gib: args.gib,
                dirty: args.dirty,
                pattern: args.pattern,
                rank: args.rank,
                moments: args.moments,
                runs: args.runs,
                rsync_runs: args.rsync_runs,
                dir: args.dir.clone(),
                seed: args.seed,
                json: args.json,
            })?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let mut train = TrainConfig {
        rank: args.rank,
        threads: args.threads,
        moments: args.moments,
        activations: args.activations,
        ..TrainConfig::default()
    };
    if args.head_adamw {
        let adamw = |pattern: &str| TensorRule { pattern: pattern.into(), rule: Rule::Adamw };
        train.rules = vec![adamw("model.embed_tokens.*"), adamw("lm_head.*")];
    }
    bench::step(&Options {
        shape: args.shape.clone(),
        context: args.context,
        decision: args.decision,
        dtype: args.dtype,
        steps: args.steps,
        json: args.json,
        device: args.device.clone(),
        train,
    })?;
    Ok(ExitCode::SUCCESS)
}
