//! Talking to a running daemon.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::Value;
use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::typestate::AgentScope;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// Which daemon.
#[derive(Debug, Clone, Args)]
pub struct ClientArgs {
    /// The daemon's address.
    #[arg(long, env = "APOLLOD_URL", default_value = "http://127.0.0.1:8844", global = true)]
    pub url: String,
    /// Its API key, where it asks for one. Better given by the environment than on the command line.
    #[arg(long, env = "APOLLOD_API_KEY", hide_env_values = true, global = true)]
    pub api_key: Option<String>,
}

/// A connection to a daemon.
pub struct Client {
    agent: Agent,
    url: String,
    api_key: Option<String>,
}

/// An answer, whatever its status.
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The JSON, or null when there was none.
    pub body: Value,
    /// Seconds after which to try again, where the daemon says so.
    pub retry_after: Option<u64>,
    /// Who answered.
    url: String,
}

impl Answer {
    /// The body of a success.
    ///
    /// # Errors
    /// The problem's detail.
    pub fn ok(self) -> Result<Value> {
        if (200..300).contains(&self.status) {
            return Ok(self.body);
        }
        bail!("{}", self.problem())
    }

    /// What a problem document says.
    pub fn problem(&self) -> String {
        let ours = self.body["type"].as_str().is_some_and(|kind| kind.starts_with("urn:apollod:problem:"));
        let (true, Some(detail)) = (ours, self.body["detail"].as_str()) else {
            return format!("what answers at {} is not apollod (HTTP {})", self.url, self.status);
        };
        let hint = if self.status == 401 { "; give the key with --api-key or APOLLOD_API_KEY" } else { "" };
        format!("the daemon answered {}: {detail}{hint}", self.status)
    }
}

impl Client {
    /// A client of the daemon that the arguments name.
    pub fn new(args: &ClientArgs) -> Self {
        let agent = agent().build().new_agent();
        let scheme = if args.url.contains("://") { "" } else { "http://" };
        let url = format!("{scheme}{}", args.url.trim_end_matches('/'));
        Self { agent, url, api_key: args.api_key.clone() }
    }

    /// A client of the daemon that runs on a model directory; `None` when none does.
    pub fn of_model(model: &Path, args: &ClientArgs) -> Option<Self> {
        if !is_served(model) {
            return None;
        }
        let url = std::fs::read_to_string(address_file(model)).ok()?;
        Some(Self::new(&ClientArgs { url: url.trim().to_owned(), ..args.clone() }))
    }

    /// `GET path`
    ///
    /// # Errors
    /// When nothing answers at the address.
    pub fn get(&self, path: &str) -> Result<Answer> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        self.read(request.call())
    }

    /// `POST path` with a body and more headers.
    ///
    /// # Errors
    /// When nothing answers at the address.
    pub fn post(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer> {
        let mut request = self.agent.post(format!("{}{path}", self.url));
        if let Some(key) = &self.api_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.read(request.send(body))
    }

    fn read(&self, response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Answer> {
        let mut response = response
            .map_err(|error| anyhow!("no daemon answers at {} ({error}); start one with `apollod serve`", self.url))?;
        let retry_after = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let text = response.body_mut().with_config().limit(u64::MAX).read_to_string();
        let text = text.with_context(|| format!("the answer of {} broke off", self.url))?;
        Ok(Answer {
            status: response.status().as_u16(),
            body: serde_json::from_str(&text).unwrap_or_default(),
            retry_after,
            url: self.url.clone(),
        })
    }

    /// The address.
    pub fn url(&self) -> &str {
        &self.url
    }
}

/// Requests of ours: every status is an answer, and no proxy of the environment sees what goes to this machine.
pub fn agent() -> ConfigBuilder<AgentScope> {
    Agent::config_builder().http_status_as_error(false).proxy(None).timeout_connect(Some(CONNECT))
}

/// Whether a daemon runs on a model directory.
pub fn is_served(model: &Path) -> bool {
    let Ok(lock) = File::open(lock_file(model)) else { return false };
    matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// Where the daemon on this model directory says its address.
pub fn address_file(model: &Path) -> PathBuf {
    model.join(".apollod/address")
}

/// What the daemon on this model directory keeps locked while it runs.
pub fn lock_file(model: &Path) -> PathBuf {
    model.join(".apollod/serve.lock")
}
