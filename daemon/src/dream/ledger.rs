//! What dreams remember of one another: how the scenarios did, and the temperature.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::scenario::Scenario;
use crate::config::DreamConfig;
use crate::durable;

/// The file in the state directory.
const FILE: &str = "dream.json";
const VERSION: u32 = 1;
/// The least share of a new outcome in a scenario's rate: the model changes, so early outcomes fade.
const NEWEST: f64 = 0.2;
/// Distance from the wanted rate at which a scenario is chosen 1/e times as often.
const WIDTH: f64 = 0.25;
/// How often one that is known is chosen, and the least of all others.
const RARELY: f64 = 0.05;
/// How far an answer that is accepted or not moves the temperature, at most.
const STEP: f64 = 0.1;

/// How a scenario did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Record {
    /// Answers that were judged.
    judged: u64,
    /// Share of accepted ones, of which the later count more.
    rate: f64,
    /// Whether the model knew it without the instruction, the last time.
    known: bool,
}

/// The file.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Memory {
    version: u32,
    temperature: f64,
    scenarios: BTreeMap<String, Record>,
}

/// What is remembered, and what follows from it.
#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    memory: Memory,
    success_rate: f64,
    temperature_max: f64,
    /// How often each scenario was chosen in this dream.
    chosen: Vec<u32>,
}

/// What became of a scenario's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The judges accepted the answer.
    Accepted,
    /// They did, and that which is given without the instruction as well.
    Known,
    /// They did not.
    Rejected,
}

impl Ledger {
    /// Reads what earlier dreams on this model left.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn open(folder: &Path, config: &DreamConfig, scenarios: usize) -> Result<Self> {
        let path = folder.join(FILE);
        let mut memory = match std::fs::read(&path) {
            Ok(bytes) => read(&bytes)
                .with_context(|| format!("{}: remove it to begin anew, which loses no example", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Memory { version: VERSION, temperature: config.temperature, scenarios: BTreeMap::new() }
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        memory.temperature = memory.temperature.clamp(0.0, config.temperature_max);
        let (success_rate, temperature_max) = (config.success_rate, config.temperature_max);
        Ok(Self { folder: folder.into(), memory, success_rate, temperature_max, chosen: vec![0; scenarios] })
    }

    /// The temperature of the next answer.
    pub fn temperature(&self) -> f64 {
        self.memory.temperature
    }

    /// Chooses a scenario: those that were never tried and those whose rate is near the wanted one more often, those that
    /// had their turn in this dream less.
    pub fn choose(&mut self, scenarios: &[Scenario], random: &mut fastrand::Rng) -> usize {
        let weights: Vec<f64> =
            scenarios.iter().zip(&self.chosen).map(|(scenario, chosen)| self.weight(&scenario.id, *chosen)).collect();
        let mut left = random.f64() * weights.iter().sum::<f64>();
        let found = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        let index = found.unwrap_or(scenarios.len() - 1);
        self.chosen[index] += 1;
        index
    }

    fn weight(&self, id: &str, chosen: u32) -> f64 {
        let weight = match self.memory.scenarios.get(id) {
            None => 1.0,
            Some(Record { known: true, .. }) => RARELY,
            Some(Record { rate, .. }) => (-((rate - self.success_rate) / WIDTH).powi(2)).exp().max(RARELY),
        };
        weight / f64::from(1 + chosen).powi(2)
    }

    /// Takes in what became of a scenario, and moves the temperature: up by `1 - p` of a step after an accepted answer, down
    /// by `p` of it after another, which settles where `p`, the wanted rate, of all are accepted (the weighted up-down rule;
    /// Kaernbach 1991).
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn note(&mut self, scenario: &Scenario, turn: Turn) -> Result<()> {
        let accepted = turn != Turn::Rejected;
        let record = self.memory.scenarios.entry(scenario.id.clone()).or_default();
        record.judged += 1;
        let share = (1.0 / record.judged as f64).max(NEWEST);
        record.rate += share * (f64::from(u8::from(accepted)) - record.rate);
        record.known = turn == Turn::Known;
        let step = if accepted { 1.0 - self.success_rate } else { -self.success_rate };
        self.memory.temperature = (self.memory.temperature + STEP * step).clamp(0.0, self.temperature_max);
        let bytes = serde_json::to_vec_pretty(&self.memory).context("plain values")?;
        durable::replace(&self.folder, FILE, &bytes)
            .with_context(|| format!("cannot write {}", self.folder.join(FILE).display()))
    }
}

fn read(bytes: &[u8]) -> Result<Memory> {
    let memory: Memory = serde_json::from_slice(bytes)?;
    if memory.version != VERSION {
        bail!("is of version {}, this apollod reads {VERSION}", memory.version);
    }
    if !memory.temperature.is_finite() || memory.scenarios.values().any(|record| !record.rate.is_finite()) {
        bail!("holds what is no number");
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Judge;
    use crate::dream::judge::Judges;
    use crate::dream::scenario::Task;

    fn scenarios(count: usize) -> Vec<Scenario> {
        let judges = || Judges::new(&Judge::default()).unwrap();
        let one = |i| Scenario { id: format!("s{i}"), task: Task::Note, instruction: String::new(), judges: judges() };
        (0..count).map(one).collect()
    }

    #[test]
    fn the_temperature_settles_where_the_wanted_share_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let scenarios = scenarios(1);
        let mut random = fastrand::Rng::with_seed(7);
        for wanted in [0.5, 0.7, 0.9] {
            let config = DreamConfig { success_rate: wanted, temperature_max: 2.0, ..DreamConfig::default() };
            let _ = std::fs::remove_file(dir.path().join(FILE));
            let mut ledger = Ledger::open(dir.path(), &config, 1).unwrap();
            let mut accepted = 0;
            for turn in 0..600 {
                // The hotter, the worse: certain at 0, hopeless at 2.
                let good = random.f64() < 1.0 - ledger.temperature() / 2.0;
                accepted += u32::from(turn >= 100 && good);
                ledger.note(&scenarios[0], if good { Turn::Accepted } else { Turn::Rejected }).unwrap();
            }
            let share = f64::from(accepted) / 500.0;
            // Three standard errors of 500 independent answers are 0.067 at most.
            assert!((share - wanted).abs() < 0.07, "wanted {wanted}, got {share}; seed 7");
        }
    }

    #[test]
    fn what_is_hopeless_or_known_is_chosen_rarely_and_what_is_new_often() {
        let dir = tempfile::tempdir().unwrap();
        let scenarios = scenarios(4);
        let config = DreamConfig::default();
        let mut ledger = Ledger::open(dir.path(), &config, 4).unwrap();
        for turn in 0..10 {
            ledger.note(&scenarios[0], Turn::Rejected).unwrap();
            ledger.note(&scenarios[1], Turn::Known).unwrap();
            ledger.note(&scenarios[2], if turn % 10 < 7 { Turn::Accepted } else { Turn::Rejected }).unwrap();
        }
        let mut ledger = Ledger::open(dir.path(), &config, 4).unwrap();
        let weights: Vec<f64> = scenarios.iter().map(|scenario| ledger.weight(&scenario.id, 0)).collect();
        assert!(weights[0] <= RARELY && weights[1] <= RARELY, "{weights:?}");
        assert!(weights[2] > 2.0 * RARELY && weights[3] == 1.0, "{weights:?}");
        let mut random = fastrand::Rng::with_seed(1);
        let mut turns = [0; 4];
        for _ in 0..40 {
            turns[ledger.choose(&scenarios, &mut random)] += 1;
        }
        assert!(turns.iter().all(|turns| *turns > 0), "each has its turn in a long dream: {turns:?}");
        assert!(turns[3] > turns[0] && turns[3] > turns[1], "{turns:?}");
    }

    #[test]
    fn a_file_of_nonsense_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let later = r#"{"version": 2, "temperature": 1.0, "scenarios": {}}"#;
        for text in ["", "{}", "[1]", later] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let error = format!("{:#}", Ledger::open(dir.path(), &DreamConfig::default(), 1).unwrap_err());
            assert!(error.contains("remove it to begin anew"), "{error}");
        }
    }
}
