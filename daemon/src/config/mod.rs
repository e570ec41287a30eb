//! The daemon's configuration: `apollod.toml`, with `APOLLOD_SECTION_KEY` environment variables over it and
//! `--set section.key=value` over both.
//!
//! One struct per section, every key with its unit, default and consequence; `apollod.example.toml` says the same for
//! operators, and a test holds the two together. A key that does not exist is refused with the nearest that does
//! (`load`); a value that makes no sense is refused with the reason (`validate`).

mod dream;
#[cfg(test)]
mod example_file;
mod load;
mod train;
mod validate;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use dream::{DreamConfig, Judge};
pub use load::{ConfigError, Sources, hint, is_config_variable, plain};
pub use train::{
    Activations, Convention, GrowthLimit, Moments, Rule, ScaleType, TensorRule, TrainConfig, Window, glob_matches,
};
pub use validate::no_model;

/// Everything that can be configured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The model that learns.
    pub model: ModelConfig,
    /// Where its live weights are.
    pub server: ServerConfig,
    /// The HTTP interface.
    pub http: HttpConfig,
    /// The training step.
    pub train: TrainConfig,
    /// The durable queue of examples.
    pub queue: QueueConfig,
    /// Writing the live weights back into the model directory.
    pub sync: SyncConfig,
    /// Noticing harm.
    pub guard: GuardConfig,
    /// Making examples of scenarios.
    pub dream: DreamConfig,
}

/// `[model]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Model directory as Hugging Face writes it (config.json, tokenizer.json, *.safetensors). No default. It is the
    /// checkpoint: sync writes its safetensors files in place.
    pub dir: PathBuf,
}

/// What happens to a server's prefix cache when the weights have moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefixCache {
    /// It is emptied.
    Reset,
    /// New requests are salted, so that they match no older block.
    Salt,
    /// Nothing: the server has none, or stale answers are acceptable.
    Ignore,
}

/// When a step's writes may fall.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Update {
    /// At any time.
    Hogwild,
    /// Between two steps of the engine, which is held meanwhile.
    Between,
}

/// `[server]`: exactly one of `socket`, `manifest` and `live`, and how to get along with the server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Unix socket on which the inference server offers its manifest. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Manifest file that the inference server has written. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<PathBuf>,
    /// Staged copy of the model directory on tmpfs (`apollod stage MODEL LIVE`) that a server maps. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub live: Option<PathBuf>,
    /// Base URL of the server's OpenAI-compatible API, such as `http://127.0.0.1:8000`. No default. Dreams need it, and it is used
    /// to compare log-probabilities with a server that cannot be asked for them over its socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// What is done with the server's prefix cache after the weights have moved: `reset` (default), `salt`, `ignore`.
    /// Keys and values of older weights give answers that neither the old nor the new weights would give.
    pub prefix_cache: PrefixCache,
    /// Seconds between two such resets or salts, at least. Default 10. Shorter costs cache hits, longer stale answers.
    pub prefix_cache_interval: f64,
    /// `hogwild` (default): a step writes while the server computes. `between`: the engine is held between two of its
    /// steps for the writes of each update, so that no token is computed from half an update.
    pub update: Update,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            socket: None,
            manifest: None,
            live: None,
            url: None,
            prefix_cache: PrefixCache::Reset,
            prefix_cache_interval: 10.0,
            update: Update::Hogwild,
        }
    }
}

/// The one way to the live weights that `[server]` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach<'a> {
    /// A Unix socket that answers with the manifest.
    Socket(&'a Path),
    /// A file that holds the manifest.
    Manifest(&'a Path),
    /// A directory of safetensors files that a server maps.
    Live(&'a Path),
}

impl ServerConfig {
    /// The way to the live weights; `None` unless exactly one is set (`Config::validate` says so to the operator).
    pub fn attach(&self) -> Option<Attach<'_>> {
        match (&self.socket, &self.manifest, &self.live) {
            (Some(path), None, None) => Some(Attach::Socket(path)),
            (None, Some(path), None) => Some(Attach::Manifest(path)),
            (None, None, Some(path)) => Some(Attach::Live(path)),
            _ => None,
        }
    }
}

/// `[http]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Address and port. Default `127.0.0.1:8844`; port 0 takes a free one, which is logged. An address other than
    /// loopback needs `api_key`: whoever can post examples decides what the model says.
    pub listen: SocketAddr,
    /// Clients send it as `Authorization: Bearer KEY`. No default (no key is asked for). At least 16 characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key: Option<String>,
    /// Bytes of the largest request body. Default 33554432 (32 MiB); a larger one is answered 413.
    pub max_body_bytes: usize,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 8844)), api_key: None, max_body_bytes: 32 << 20 }
    }
}

/// `[queue]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QueueConfig {
    /// SQLite file of the queue. Default `MODEL/.apollod/queue.sqlite`. Must be on a disk that survives a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Examples that may wait. Default 10000; when it is full, posting is answered 429.
    pub capacity: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self { path: None, capacity: 10_000 }
    }
}

/// What other readers of the model directory get of a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncMode {
    /// The files, written in place while nobody who takes the lock is loading them.
    InPlace,
    /// Besides, a directory for each generation, and a link that names the last.
    Generation,
}

/// `[sync]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SyncConfig {
    /// When to write the changed blocks into the model directory: five crontab fields (minute hour day-of-month month
    /// day-of-week). Default `*/10 * * * *`. What was trained since the last sync is trained again after a crash.
    pub schedule: String,
    /// IANA time zone of the schedule. Default `UTC`.
    pub timezone: String,
    /// `in_place` (default): a sync writes the files of the model directory, and nothing else. `generation`: it then makes
    /// `MODEL.generations/G`, a whole directory that is never written again, and lets `MODEL.generations/current` name it,
    /// for programs that load the model and take no lock. Costs a clone of the files, or a copy where the file system
    /// cannot clone; the last two are kept.
    pub mode: SyncMode,
    /// Generations kept for rollback, the current one included. Default 4. Each costs the compressed change it made and
    /// a copy of the optimizer's state. From 2 on the last sync can always be taken back, whatever the two keys below;
    /// 1 keeps no history. What no longer fits goes at a start or a sync, and the log says which generations.
    pub keep: u64,
    /// Bytes that those before the current one may take together. Default 68719476736 (64 GiB); the oldest go first.
    pub keep_bytes: u64,
    /// How many days older than the current generation they may be. Default 30. Counted between syncs, not by the clock,
    /// and at most two go with one sync, so that a clock that jumps does not cost the history.
    pub keep_days: f64,
    /// Whether to sync when the daemon is asked to stop. Default true.
    pub on_shutdown: bool,
}

impl Default for SyncConfig {
    fn default() -> Self {
        Self {
            schedule: "*/10 * * * *".into(),
            timezone: "UTC".into(),
            mode: SyncMode::InPlace,
            keep: 4,
            keep_bytes: 64 << 30,
            keep_days: 30.0,
            on_shutdown: true,
        }
    }
}

/// `[guard]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuardConfig {
    /// What the model must still know: examples as `POST /v1/examples` takes them, one JSON object a line, which are never
    /// trained. No default: nothing is guarded. Their loss is measured when a trainer starts, before each sync and after a
    /// rollback, which takes as long as to read them once. The file is read when the daemon starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probes: Option<PathBuf>,
    /// How far that loss may rise in the mean over the probes, in nats a token, above what it was when the guard first saw
    /// each; of four probes or more the one that rose most is left out. Default 0.1. Beyond it what was trained since the last
    /// sync is taken back, and training pauses.
    pub max_rise: f64,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self { probes: None, max_rise: 0.1 }
    }
}

impl Config {
    /// The daemon's own folder in the model directory.
    pub fn state_dir(&self) -> PathBuf {
        self.model.dir.join(".apollod")
    }

    /// Where the queue lies.
    pub fn queue_path(&self) -> PathBuf {
        self.queue.path.clone().unwrap_or_else(|| self.state_dir().join("queue.sqlite"))
    }

    /// The same with every path absolute, so that it means the same in another file and another process.
    ///
    /// # Errors
    /// When there is no working directory.
    pub fn absolute(mut self) -> std::io::Result<Self> {
        let Self { model, server, queue, guard, dream, .. } = &mut self;
        let of_server = [&mut server.socket, &mut server.manifest, &mut server.live];
        let others = [&mut queue.path, &mut guard.probes, &mut dream.scenarios, &mut dream.replay_examples];
        for path in of_server.into_iter().chain(others).flatten().chain([&mut model.dir]) {
            if !path.as_os_str().is_empty() {
                *path = std::path::absolute(&*path)?;
            }
        }
        Ok(self)
    }

    /// What the trainer child runs under: the same, without the HTTP section and its key, and without dreams.
    pub fn for_trainer(&self) -> Self {
        Self { http: HttpConfig::default(), dream: DreamConfig::default(), ..self.clone() }
    }

    /// As TOML, every key that is set written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("the sections are tables of plain values")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trainers_configuration_does_not_carry_the_key() {
        let mut config = Config::default();
        config.http.api_key = Some("0123456789abcdef".into());
        config.train.norm_growth_limit = GrowthLimit::Off;
        let text = config.for_trainer().to_toml();
        assert!(!text.contains("0123456789abcdef"));
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config.for_trainer());
    }
}
