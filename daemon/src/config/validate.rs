//! Values that parse and make no sense, refused before anything starts, each with what to do.

use std::io::ErrorKind;
use std::path::Path;

use super::{Config, ConfigError, GrowthLimit, Update};
use crate::dream::Judges;
use crate::schedule::{Schedule, ScheduleError};

/// Shortest API key, in characters.
const API_KEY_CHARS_MIN: usize = 16;

impl Config {
    /// Checks what `apollod serve` and its trainer need.
    ///
    /// # Errors
    /// The first key whose value cannot work, with the reason.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_model_and_server()?;
        self.validate_http()?;
        self.validate_train()?;
        check(self.queue.capacity > 0, "queue.capacity", || "must be at least 1".into())?;
        check(self.sync.keep > 0, "sync.keep", || "must be at least 1: the current generation is one".into())?;
        check(self.sync.keep_bytes > 0, "sync.keep_bytes", || {
            "must be at least 1; to keep nothing for rollback set sync.keep = 1".into()
        })?;
        check((0.0..=36_500.0).contains(&self.sync.keep_days), "sync.keep_days", || {
            range("[0, 36500] days", self.sync.keep_days)
        })?;
        let named = self.guard.probes.as_ref().is_none_or(|probes| !probes.as_os_str().is_empty());
        check(named, "guard.probes", || "is empty: name a file, or leave the key out".into())?;
        check((1e-6..=100.0).contains(&self.guard.max_rise), "guard.max_rise", || {
            range("[1e-6, 100] nats a token", self.guard.max_rise)
        })?;
        self.validate_dream()?;
        Schedule::parse(&self.sync.schedule, &self.sync.timezone).map_err(|error| {
            let key = if matches!(error, ScheduleError::Zone(_)) { "sync.timezone" } else { "sync.schedule" };
            invalid(key, error.to_string())
        })?;
        Ok(())
    }

    fn validate_model_and_server(&self) -> Result<(), ConfigError> {
        let dir = &self.model.dir;
        check(!dir.as_os_str().is_empty(), "model.dir", || {
            "not set: name the model directory, in the file or with --set model.dir=DIR".into()
        })?;
        no_model(dir).map_or(Ok(()), |reason| Err(invalid("model.dir", reason)))?;
        check(self.server.attach().is_some(), "server", || {
            "set exactly one of server.socket, server.manifest and server.live".into()
        })?;
        let server = &self.server;
        check(
            server.url.as_ref().is_none_or(|url| url.starts_with("http://") && !url.ends_with("/v1")),
            "server.url",
            || "must be the base URL of the server's API without /v1, such as http://127.0.0.1:8000".into(),
        )?;
        check((0.1..=86_400.0).contains(&server.prefix_cache_interval), "server.prefix_cache_interval", || {
            range("[0.1, 86400] seconds", server.prefix_cache_interval)
        })?;
        check(server.update == Update::Hogwild || server.socket.is_some(), "server.update", || {
            "\"between\" needs server.socket: a server that cannot be asked cannot be held; use \"hogwild\"".into()
        })
    }

    fn validate_http(&self) -> Result<(), ConfigError> {
        match &self.http.api_key {
            None => check(self.http.listen.ip().is_loopback(), "http.api_key", || {
                format!(
                    "required because http.listen is {}: whoever can post examples decides what the model says; \
                     set a key, or listen on 127.0.0.1",
                    self.http.listen
                )
            })?,
            Some(key) => check(
                key.chars().count() >= API_KEY_CHARS_MIN && key.bytes().all(|b| b.is_ascii_graphic()),
                "http.api_key",
                || format!("must be at least {API_KEY_CHARS_MIN} printable ASCII characters without spaces"),
            )?,
        }
        check(self.http.max_body_bytes >= 1024, "http.max_body_bytes", || "must be at least 1024 bytes".into())
    }

    fn validate_dream(&self) -> Result<(), ConfigError> {
        let dream = &self.dream;
        let share = |value: f64| value > 0.0 && value < 1.0;
        if let Some(schedule) = &dream.schedule {
            Schedule::parse(schedule, &self.sync.timezone)
                .map_err(|error| invalid("dream.schedule", error.to_string()))?;
            check(dream.scenarios.is_some(), "dream.scenarios", || {
                "not set, although dream.schedule is: name a JSONL file of scenarios or a folder of notes".into()
            })?;
        }
        Judges::new(&dream.judge).map_err(|error| invalid("dream.judge", format!("{error:#}")))?;
        check(dream.examples > 0, "dream.examples", || "must be at least 1".into())?;
        check(dream.attempts > 0, "dream.attempts", || "must be at least 1".into())?;
        check(dream.max_tokens > 0, "dream.max_tokens", || "must be at least 1".into())?;
        check(share(dream.success_rate), "dream.success_rate", || range("(0, 1)", dream.success_rate))?;
        check((0.0..=10.0).contains(&dream.temperature_max), "dream.temperature_max", || {
            range("[0, 10]", dream.temperature_max)
        })?;
        check((0.0..=dream.temperature_max).contains(&dream.temperature), "dream.temperature", || {
            range("[0, dream.temperature_max]", dream.temperature)
        })?;
        check((0.0..=1.0).contains(&dream.similarity_max), "dream.similarity_max", || {
            range("[0, 1]", dream.similarity_max)
        })?;
        check((0.0..=0.9).contains(&dream.replay), "dream.replay", || range("[0, 0.9]", dream.replay))?;
        check(dream.examples <= dream.attempts, "dream.attempts", || {
            format!("is {}, fewer than dream.examples, which is {}", dream.attempts, dream.examples)
        })?;
        let said = dream.instruction.as_ref().is_none_or(|instruction| !instruction.trim().is_empty());
        check(said, "dream.instruction", || "is empty: say what the model is to be told, or leave the key out".into())
    }

    fn validate_train(&self) -> Result<(), ConfigError> {
        let train = &self.train;
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        let decay = |value: f64| (0.0..1.0).contains(&value);
        check(positive(train.lr) && train.lr < 1.0, "train.lr", || range("(0, 1)", train.lr))?;
        check(train.rank > 0, "train.rank", || "must be at least 1".into())?;
        check(positive(train.scale), "train.scale", || range("(0, inf)", train.scale))?;
        check(decay(train.beta1), "train.beta1", || range("[0, 1)", train.beta1))?;
        check(decay(train.beta2), "train.beta2", || range("[0, 1)", train.beta2))?;
        check(positive(train.eps), "train.eps", || range("(0, inf)", train.eps))?;
        check(not_negative(train.weight_decay), "train.weight_decay", || range("[0, inf)", train.weight_decay))?;
        check(train.update_proj_gap > 0, "train.update_proj_gap", || "must be at least 1 step".into())?;
        if let GrowthLimit::At(limit) = train.norm_growth_limit {
            check(limit.is_finite() && limit >= 1.0, "train.norm_growth_limit", || {
                format!("is {limit}, must be at least 1, or \"off\"")
            })?;
        }
        check(not_negative(train.norm_growth_floor), "train.norm_growth_floor", || {
            range("[0, inf)", train.norm_growth_floor)
        })?;
        check(train.batch_examples > 0, "train.batch_examples", || "must be at least 1".into())?;
        check(train.prefix_cache_tokens == 0 || train.prefix_cache_tokens >= 32, "train.prefix_cache_tokens", || {
            format!("is {}, must be 0 or at least 32: keys and values are kept in blocks", train.prefix_cache_tokens)
        })?;
        check(train.prefix_max_updates == 0 || train.prefix_cache_tokens > 0, "train.prefix_max_updates", || {
            "has no effect while train.prefix_cache_tokens is 0: set how many tokens are kept".into()
        })?;
        check((1..=64).contains(&train.workers), "train.workers", || {
            format!("is {}, must lie in [1, 64]", train.workers)
        })?;
        check(train.nice <= 19, "train.nice", || format!("is {}, must lie in [0, 19]", train.nice))?;
        check((0.01..=1.0).contains(&train.duty_cycle), "train.duty_cycle", || range("[0.01, 1]", train.duty_cycle))?;
        check(train.max_tokens >= 2, "train.max_tokens", || "must be at least 2: one of context, one learned".into())?;
        check(ordered(train.loss_min, train.loss_max), "train.loss_min", || "must be below train.loss_max".into())?;
        check(ordered(train.update_norm_min, train.update_norm_max), "train.update_norm_min", || {
            "must be below train.update_norm_max".into()
        })
    }
}

/// What is in the place of a model directory; `None` if it is one, by the look of it.
pub fn no_model(dir: &Path) -> Option<String> {
    let (shown, config) = (dir.display(), dir.join("config.json"));
    match std::fs::metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Some(format!("{shown} does not exist: name a model directory"))
        }
        Err(error) => Some(format!("cannot read {shown}: {error}")),
        Ok(there) if !there.is_dir() => {
            Some(format!("{shown} is no directory: name the model directory, not a file in it"))
        }
        Ok(_) if !config.is_file() => {
            Some(format!("{shown} has no config.json: it is no model directory as Hugging Face writes it"))
        }
        Ok(_) => None,
    }
}

fn invalid(key: &'static str, reason: String) -> ConfigError {
    ConfigError::Invalid { key, reason }
}

fn check(holds: bool, key: &'static str, reason: impl FnOnce() -> String) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(invalid(key, reason())) }
}

fn range(range: &str, value: f64) -> String {
    format!("is {value}, must lie in {range}")
}

fn ordered(low: Option<f64>, high: Option<f64>) -> bool {
    low.is_none_or(f64::is_finite)
        && high.is_none_or(f64::is_finite)
        && low.zip(high).is_none_or(|(low, high)| low < high)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let mut config = Config::default();
        config.model.dir = dir.path().into();
        config.server.live = Some("/dev/shm/live".into());
        (dir, config)
    }

    fn refusal(change: impl FnOnce(&mut Config)) -> String {
        let (_dir, mut config) = valid();
        config.validate().unwrap();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn another_address_than_loopback_needs_a_key() {
        let error = refusal(|c| c.http.listen = "0.0.0.0:8844".parse().unwrap());
        assert!(error.starts_with("http.api_key: required because http.listen is 0.0.0.0:8844"), "{error}");
        assert!(refusal(|c| c.http.api_key = Some("short".into())).contains("at least 16"));
        let (_dir, mut config) = valid();
        config.http.listen = "0.0.0.0:8844".parse().unwrap();
        config.http.api_key = Some("0123456789abcdef".into());
        config.validate().unwrap();
    }

    #[test]
    fn exactly_one_way_to_the_server_is_asked_for() {
        assert!(refusal(|c| c.server.live = None).contains("exactly one of"));
        assert!(refusal(|c| c.server.socket = Some("/s".into())).contains("exactly one of"));
    }

    #[test]
    fn a_server_that_cannot_be_asked_cannot_be_held() {
        let error = refusal(|c| c.server.update = Update::Between);
        assert!(error.starts_with("server.update:") && error.contains("needs server.socket"), "{error}");
        assert!(refusal(|c| c.server.prefix_cache_interval = 0.0).starts_with("server.prefix_cache_interval:"));
        assert!(refusal(|c| c.server.prefix_cache_interval = f64::NAN).starts_with("server.prefix_cache_interval:"));
        assert!(refusal(|c| c.server.url = Some("127.0.0.1:8000".into())).contains("http://127.0.0.1:8000"));
        assert!(refusal(|c| c.server.url = Some("http://127.0.0.1:8000/v1".into())).contains("without /v1"));
    }

    #[test]
    fn values_out_of_range_are_refused_by_key() {
        assert!(refusal(|c| c.train.lr = f64::NAN).starts_with("train.lr:"));
        assert!(refusal(|c| c.train.beta2 = 1.0).starts_with("train.beta2:"));
        assert!(refusal(|c| c.train.norm_growth_limit = GrowthLimit::At(0.9)).starts_with("train.norm_growth_limit:"));
        assert!(refusal(|c| c.train.batch_examples = 0).starts_with("train.batch_examples:"));
        assert!(refusal(|c| c.train.prefix_cache_tokens = 31).starts_with("train.prefix_cache_tokens:"));
        assert!(refusal(|c| c.train.prefix_max_updates = 1).contains("while train.prefix_cache_tokens is 0"));
        assert!(refusal(|c| c.train.workers = 0).starts_with("train.workers: is 0"));
        assert!(refusal(|c| c.train.nice = 20).starts_with("train.nice:"));
        for share in [0.0, -0.5, 1.5, f64::NAN] {
            assert!(refusal(|c| c.train.duty_cycle = share).starts_with("train.duty_cycle:"), "{share}");
        }
        assert!(refusal(|c| (c.train.loss_min, c.train.loss_max) = (Some(2.0), Some(1.0))).contains("loss_max"));
        assert!(refusal(|c| c.model.dir = "/nonexistent".into()).contains("/nonexistent does not exist"));
        assert!(refusal(|c| c.model.dir = "/dev/null".into()).contains("/dev/null is no directory"));
        assert!(refusal(|c| c.model.dir = "/dev".into()).contains("/dev has no config.json"));
    }

    #[test]
    fn bounds_of_the_history_that_make_no_sense_are_refused() {
        assert!(refusal(|c| c.sync.keep = 0).starts_with("sync.keep:"));
        assert!(refusal(|c| c.sync.keep_bytes = 0).contains("set sync.keep = 1"));
        assert!(refusal(|c| c.sync.keep_days = -1.0).starts_with("sync.keep_days:"));
        assert!(refusal(|c| c.sync.keep_days = f64::NAN).starts_with("sync.keep_days:"));
        assert!(refusal(|c| c.sync.keep_days = f64::INFINITY).starts_with("sync.keep_days:"));
    }

    #[test]
    fn dreams_that_cannot_be_are_refused_by_key() {
        assert!(refusal(|c| c.dream.schedule = Some("@hourly".into())).starts_with("dream.scenarios: not set"));
        assert!(refusal(|c| c.dream.schedule = Some("hourly".into())).starts_with("dream.schedule:"));
        assert!(refusal(|c| c.dream.judge.matches = Some("(".into())).starts_with("dream.judge: matches:"));
        assert!(refusal(|c| c.dream.examples = 0).starts_with("dream.examples:"));
        assert!(refusal(|c| c.dream.attempts = 0).starts_with("dream.attempts:"));
        assert!(refusal(|c| c.dream.max_tokens = 0).starts_with("dream.max_tokens:"));
        for rate in [0.0, 1.0, f64::NAN] {
            assert!(refusal(|c| c.dream.success_rate = rate).starts_with("dream.success_rate:"), "{rate}");
        }
        assert!(refusal(|c| c.dream.temperature = 1.3).starts_with("dream.temperature:"));
        assert!(refusal(|c| c.dream.temperature_max = f64::NAN).starts_with("dream.temperature_max:"));
        assert!(refusal(|c| c.dream.similarity_max = 1.1).starts_with("dream.similarity_max:"));
        assert!(refusal(|c| c.dream.replay = 0.95).starts_with("dream.replay:"));
        assert!(refusal(|c| c.dream.examples = 65).starts_with("dream.attempts: is 64, fewer than"));
        assert!(refusal(|c| c.dream.instruction = Some(" ".into())).starts_with("dream.instruction: is empty"));
    }

    #[test]
    fn a_schedule_that_is_no_crontab_line_is_refused() {
        assert!(refusal(|c| c.sync.schedule = "0 */10 * * * *".into()).contains("five fields"));
        let error = refusal(|c| c.sync.timezone = "Mars/Olympus".into());
        assert!(error.starts_with("sync.timezone:") && error.contains("time zone"), "{error}");
        let error = refusal(|c| c.sync.schedule = "0 24 * * *".into());
        assert!(error.starts_with("sync.schedule:") && error.contains("hour `24` is none: 0 to 23"), "{error}");
    }
}
