//! `apollod stage`: a live copy on tmpfs.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

/// `apollod stage`
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  apollod stage ./model /dev/shm/live
  transformers serve --force-model /dev/shm/live --dtype bfloat16 &
  apollod serve --set model.dir=./model --set server.live=/dev/shm/live

The copy is memory: server and trainer see the same pages. The model directory is only written by sync.")]
pub struct StageArgs {
    /// Model directory as Hugging Face writes it.
    model: PathBuf,
    /// Folder of the copy, on tmpfs; made if it is not there.
    live: PathBuf,
}

/// Copies and says what was copied.
pub fn run(args: &StageArgs) -> Result<ExitCode> {
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec}").expect("a valid template"),
    );
    let report = ipc::stage(&args.model, &args.live, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    println!(
        "{}: {} tensors, {} bytes, epoch {}",
        report.live_dir.display(),
        report.tensors,
        report.bytes,
        report.epoch
    );
    if !report.left_out.is_empty() {
        println!("left out, as the model ties them to its embedding: {}", report.left_out.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
