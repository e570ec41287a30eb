//! `apollod stage`: a live copy on tmpfs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::gguf::{self, Gguf};
use crate::reading::{checksums, reading};

/// `apollod stage`
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  apollod stage ./model /dev/shm/live
  transformers serve /dev/shm/live --host 127.0.0.1 --port 8000 --device cpu --dtype auto &
  apollod serve --set model.dir=./model --set server.live=/dev/shm/live --set server.prefix_cache=ignore

For llama.cpp, which serves one GGUF file:
  apollod stage ./model /dev/shm/live --gguf                    written from the model directory
  apollod stage ./model /dev/shm/live --gguf=model-bf16.gguf    or a copy of one that llama.cpp's converter made of it
  llama-server -m /dev/shm/live/model.gguf -ngl 0 --no-cache-prompt --port 8000 &

The copy is memory: server and trainer see the same pages. The model directory is only written by sync.
After a reboot tmpfs is empty: stage again before the server starts.
Where .apollod has checksums, the files are compared with them first.")]
pub struct StageArgs {
    /// Model directory as Hugging Face writes it.
    model: PathBuf,
    /// Folder of the copy, on tmpfs; made if it is not there.
    live: PathBuf,
    /// Make model.gguf in it, for llama.cpp, instead of safetensors files; with =FILE a copy of that file, which must
    /// hold the model directory's weights, unquantized.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    gguf: Option<Option<PathBuf>>,
    /// Copy the model although its files are not as their checksums in .apollod say.
    #[arg(long)]
    unchecked: bool,
}

/// Copies and says what was copied.
pub fn run(args: &StageArgs) -> Result<ExitCode> {
    super::need_model(&args.model)?;
    let config = model::Config::read(&args.model).with_context(|| args.model.display().to_string())?;
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
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let report = reading(&args.model, || {
        if let (false, Some(checksums)) = (args.unchecked, checksums(&args.model)?) {
            checksums.check_all(&ipc::SafetensorsDir::open(&args.model)?)?;
        }
        match &args.gguf {
            None => Ok(ipc::stage(&args.model, &args.live, &mut progress)?),
            Some(None) => {
                let file = Gguf::of(&args.model, &gguf::name(&args.model), None)?;
                Ok(ipc::stage_gguf(&args.model, &args.live, file.bytes(), |path| file.write(path, &mut progress))?)
            }
            Some(Some(file)) => copy(&args.model, &args.live, file, &config),
        }
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

/// Stages a GGUF file that was made elsewhere, if it holds the model directory's weights.
fn copy(model_dir: &Path, live: &Path, file: &Path, config: &model::Config) -> Result<ipc::StageReport> {
    let source = ipc::GgufFile::open(file)?;
    gguf::check(&source, config)?;
    gguf::compare(&source, model_dir, config)?;
    ipc::stage_gguf(model_dir, live, source.len(), |path| {
        std::fs::copy(file, path).with_context(|| format!("cannot copy {} to {}", file.display(), path.display()))?;
        Ok(())
    })
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
