//! How a session begins: what is taken before anybody computes, and what is checked of it.

use super::prefix_cache::PrefixCache;
use super::shadow::Failure;
use super::{probes, settings, watch};
use crate::backend::Backend;
use crate::config::{self, Attach, Config, Update};
use crate::weights::Fit;
use anyhow::{Context, Result, bail};
use apollo::Rule;
use checkpoint::Checkpoint;
use compute::Dtype;
use ipc::{Attachment, Control, Invalidation, Source};
use model::{Example, Model};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Why a session did not begin.
pub enum StartError {
    /// No server to attach to; try again.
    ServerGone(String),
    /// Anything else; an operator has to look.
    Failed(anyhow::Error),
}

impl From<Failure> for StartError {
    fn from(failure: Failure) -> StartError {
        match failure {
            Failure::NoAnswer(reason) => StartError::ServerGone(reason),
            Failure::Differs(error) => StartError::Failed(error),
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for StartError {
    fn from(error: E) -> StartError {
        StartError::Failed(error.into())
    }
}

/// What has been taken before anybody computes: the files, the server's memory, the settings.
pub struct Start<'a> {
    pub(super) config: &'a Config,
    pub(super) told: u64,
    pub(super) model: model::Config,
    pub(super) tensors: Vec<apollo::Tensor>,
    pub(super) checkpoint: Checkpoint,
    pub(super) recovery: String,
    pub(super) attachment: Arc<Attachment>,
    /// The guard's, with their lines.
    pub(super) probes: Option<Vec<(usize, Example)>>,
}

impl<'a> Start<'a> {
    /// Takes the model directory's lock and attaches. `told` is the highest weight version that anybody was told.
    pub fn new(config: &'a Config, told: u64) -> Result<Start<'a>, StartError> {
        let model = model::Config::read(&config.model.dir)?;
        let tensors = settings::tensors(&model, &config.train);
        let probes = probes::read(config, &model)?;
        let options = settings::checkpoint_options(&config.sync);
        let (mut checkpoint, recovery) = Checkpoint::open_with(&config.model.dir, options)?;
        tell_pruned(&mut checkpoint);
        require_intact(&checkpoint, &config.model.dir)?;
        let attachment = Arc::new(attach(config, &model)?);
        watch::start(attachment.clone())?;
        Ok(Start { config, told, model, tensors, checkpoint, recovery: recovery.to_string(), attachment, probes })
    }

    /// The UUID of the GPU that the weights lie on, if they do.
    pub fn gpu(&self) -> Option<&str> {
        self.attachment.device().map(|device| device.uuid.as_str())
    }

    /// The server's process, as far as it is known.
    pub fn server_pid(&self) -> Option<u32> {
        self.attachment.pid()
    }
}

/// Attaches to the server that the configuration names.
pub(super) fn attach(config: &Config, model: &model::Config) -> Result<Attachment, StartError> {
    let source = match config.server.attach().context("[server] names no way to the weights")? {
        Attach::Socket(path) => Source::Socket(path.into()),
        Attach::Manifest(path) => Source::Manifest(path.into()),
        Attach::Live(path) => {
            let path = PathBuf::from(path);
            let gguf = path.join(ipc::GGUF_FILE);
            if gguf.exists() {
                crate::gguf::check(&ipc::GgufFile::open(&gguf)?, model)?;
            }
            Source::Staged(path)
        }
    };
    Attachment::open(&source, &model.decoder.tensors()).map_err(|error| {
        let absent = match &error {
            ipc::Error::Io { error, .. } => {
                matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused)
            }
            // It is loading, or lends the weights to another trainer.
            ipc::Error::Gone(_) | ipc::Error::Refused { .. } | ipc::Error::Leased { .. } => true,
            _ => false,
        };
        let is_there = matches!(error, ipc::Error::Leased { .. } | ipc::Error::Refused { .. });
        match (absent, &source) {
            (true, Source::Socket(_)) if !is_there => StartError::ServerGone(format!(
                "{error}; is the server running, with its weights offered there (vLLM: the plugin, and APOLLOD_SOCKET)?"
            )),
            (true, _) => StartError::ServerGone(error.to_string()),
            (false, _) => StartError::Failed(error.into()),
        }
    })
}

/// Files that somebody changed since the last generation would make every sync fail, and a restore of
/// live weights wrong.
fn require_intact(checkpoint: &Checkpoint, dir: &Path) -> Result<()> {
    let report = checkpoint.verify()?;
    if !report.is_ok() {
        let dir = dir.display();
        bail!(
            "{report}; a disk flipped bits, or somebody else wrote into the files: `apollod checkpoint repair {dir}` puts \
             them right from the live weights or a copy (--from). Only if they were changed on purpose, stop the daemon, \
             take them as they are with `apollod checkpoint adopt {dir}`, and restart the server"
        );
    }
    Ok(())
}

/// The server must serve the directory that sync will write.
pub(super) fn same_directory(served: &Path, configured: &Path) -> Result<()> {
    let real = |path: &Path| path.canonicalize().with_context(|| format!("cannot find {}", path.display()));
    let (served, configured) = (real(served)?, real(configured)?);
    if served != configured {
        bail!(
            "the server loaded {}, model.dir is {}: point one of them at the other, nothing was written",
            served.display(),
            configured.display()
        );
    }
    Ok(())
}

pub(super) fn can_be_held(update: Update, attachment: &Attachment) -> Result<()> {
    if update == Update::Between && !attachment.controls().contains(&Control::Hold) {
        bail!(
            "server.update is \"between\", but the server at {} does not offer `hold`: set it to \"hogwild\", or use a \
             plugin that can hold its engine",
            attachment.source()
        );
    }
    Ok(())
}

/// The policy of the configuration, as far as the server can follow it.
pub(super) fn prefix_cache(
    server: &config::ServerConfig,
    attachment: &Attachment,
    warnings: &mut Vec<String>,
) -> PrefixCache {
    let mut how = match server.prefix_cache {
        config::PrefixCache::Reset => Some(Invalidation::Reset),
        config::PrefixCache::Salt => Some(Invalidation::Salt),
        config::PrefixCache::Ignore => None,
    };
    if how.is_some() && !attachment.controls().contains(&Control::Invalidate) {
        how = None;
        warnings.push(
            "the server offers no way to invalidate its prefix cache, so answers may rest on keys of older weights: \
             switch its prefix cache off and set server.prefix_cache = \"ignore\""
                .into(),
        );
    }
    PrefixCache::new(how, Duration::from_secs_f64(server.prefix_cache_interval))
}

/// Freezes the vectors that the server holds in f32 and the files in 16 bits; what there is to say about it.
pub(super) fn freeze_widened<D: Backend>(
    tensors: &mut [apollo::Tensor],
    model: &Model<D>,
    files: &[Dtype],
) -> Result<Option<String>> {
    let mut frozen = Vec::new();
    let held = model.tensors().iter().zip(model.weights());
    for ((tensor, (expected, weight)), files) in tensors.iter_mut().zip(held).zip(files) {
        let fit = Fit::of(&expected.name, &expected.shape, model.device().dtype(weight), *files)?;
        if fit == Fit::Widened && tensor.rule != Rule::Frozen {
            tensor.rule = Rule::Frozen;
            frozen.push(expected.name.clone());
        }
    }
    let Some(first) = frozen.first() else { return Ok(None) };
    Ok(Some(format!(
        "{} vectors are frozen: the server holds them in F32, the files in 16 bits ({first}, ...)",
        frozen.len()
    )))
}

/// Generations of the history whose documents cannot be read.
pub(super) fn damaged_documents(checkpoint: &Checkpoint) -> Result<Vec<String>> {
    Ok(checkpoint.generations()?.into_iter().filter_map(|generation| generation.damage).collect())
}

/// Says in the log which generations the history has lost.
pub(super) fn tell_pruned(checkpoint: &mut Checkpoint) -> Vec<u64> {
    checkpoint.take_warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
    let pruned = checkpoint.take_pruned();
    if let (Some(first), Some(last)) = (pruned.first(), pruned.last()) {
        let which =
            if first == last { format!("generation {first}") } else { format!("generations {first} to {last}") };
        tracing::warn!(
            "{which} went from the history by sync.keep, keep_bytes or keep_days, and cannot be restored any more"
        );
    }
    pruned
}
