//! General examples, mixed in so that what is not dreamt of stays.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::config::Config;
use crate::examples;

/// What is drawn from, and how much of it is due.
pub struct Replay {
    examples: Vec<Value>,
    /// Those that have not had their turn since all had.
    left: Vec<usize>,
    share: f64,
    owed: f64,
}

impl Replay {
    /// Reads what the configuration names, every line as the daemon will take it.
    ///
    /// # Errors
    /// What is wrong, with the file and the line.
    pub fn read(config: &Config, random: &mut fastrand::Rng) -> Result<Self> {
        let dream = &config.dream;
        let mut replay = Self { examples: Vec::new(), left: Vec::new(), share: dream.replay, owed: random.f64() };
        let Some(path) = dream.replay_examples.as_ref().filter(|_| dream.replay > 0.0) else { return Ok(replay) };
        examples::read(&config.model.dir, config.train.max_tokens, path).context("dream.replay_examples")?;
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let filled = text.lines().filter(|line| !line.trim().is_empty());
        replay.examples = filled.map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(replay)
    }

    /// The examples that are due after one that was dreamt, so that they come to their share of all in the mean.
    pub fn due(&mut self, random: &mut fastrand::Rng) -> Vec<Value> {
        if self.examples.is_empty() {
            return Vec::new();
        }
        self.owed += self.share / (1.0 - self.share);
        let mut due = Vec::new();
        while self.owed >= 1.0 {
            self.owed -= 1.0;
            if self.left.is_empty() {
                self.left = (0..self.examples.len()).collect();
                random.shuffle(&mut self.left);
            }
            due.extend(self.left.pop().map(|index| self.examples[index].clone()));
        }
        due
    }
}
