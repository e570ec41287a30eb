//! `apollod stage`: a live copy on tmpfs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

/// `apollod stage`
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  apollod stage ./model /dev/shm/live
  transformers serve /dev/shm/live --host 127.0.0.1 --port 8000 --device cpu --dtype auto &
  apollod serve --set model.dir=./model --set server.live=/dev/shm/live

The copy is memory: server and trainer see the same pages. The model directory is only written by sync.
After a reboot tmpfs is empty: stage again before the server starts.")]
pub struct StageArgs {
    /// Model directory as Hugging Face writes it.
    model: PathBuf,
    /// Folder of the copy, on tmpfs; made if it is not there.
    live: PathBuf,
}

/// Copies and says what was copied.
pub fn run(args: &StageArgs) -> Result<ExitCode> {
    model::Config::read(&args.model).with_context(|| args.model.display().to_string())?;
    if !is_memory(&args.live) {
        eprintln!(
            "warning: {} is not on tmpfs: every trained weight is then also written to its disk; use a folder of \
             /dev/shm",
            args.live.display()
        );
    }
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

/// Whether a folder, which need not be there yet, is or would be on tmpfs. What cannot be told counts as such.
fn is_memory(live: &Path) -> bool {
    let Ok(live) = std::path::absolute(live) else { return true };
    let there = live.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    // TMPFS_MAGIC of linux/magic.h.
    rustix::fs::statfs(there).map_or(true, |stat| stat.f_type == 0x0102_1994)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_told_from_disk_before_the_folder_is_there() {
        assert!(is_memory(Path::new("/dev/shm/apollod-not-there/live")));
        assert!(!is_memory(Path::new("/proc/self")));
    }
}
