//! What dreams remember of one another: how the scenarios did, and the temperature.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::report::Outcome;
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
    /// `dream.temperature` when it was last begun with: another value begins with that one.
    begun_with: f64,
    temperature: f64,
    /// By [`Scenario::key`].
    scenarios: BTreeMap<String, Record>,
}

/// What is remembered, and what follows from it.
#[derive(Debug)]
pub struct Ledger {
    /// Where the file is; `None` for a dream that leaves no trace.
    folder: Option<PathBuf>,
    memory: Memory,
    success_rate: f64,
    temperature_max: f64,
    /// How often each scenario was chosen in this dream.
    chosen: Vec<u32>,
    /// Whether another turn of it in this dream would come to the same.
    spent: Vec<bool>,
}

impl Ledger {
    /// Reads what earlier dreams on this model left, and will `keep` what this one sees.
    ///
    /// # Errors
    /// The file is there and cannot be read.
    pub fn open(folder: &Path, config: &DreamConfig, scenarios: &[Scenario], keep: bool) -> Result<Self> {
        let path = folder.join(FILE);
        let begin = config.temperature;
        let mut memory = match std::fs::read(&path) {
            Ok(bytes) => read(&bytes)
                .with_context(|| format!("{}: remove it to begin anew, which loses no example", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Memory { version: VERSION, begun_with: begin, temperature: begin, scenarios: BTreeMap::new() }
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        if memory.begun_with != begin {
            (memory.begun_with, memory.temperature) = (begin, begin);
        }
        memory.temperature = memory.temperature.clamp(0.0, config.temperature_max);
        memory.scenarios.retain(|key, _| scenarios.iter().any(|scenario| scenario.key == *key));
        Ok(Self {
            folder: keep.then(|| folder.into()),
            memory,
            success_rate: config.success_rate,
            temperature_max: config.temperature_max,
            chosen: vec![0; scenarios.len()],
            spent: vec![false; scenarios.len()],
        })
    }

    /// The temperature of the next answer.
    pub fn temperature(&self) -> f64 {
        self.memory.temperature
    }

    /// Chooses a scenario: those that were never tried and those whose rate is near the wanted one more often, those that
    /// had their turn in this dream less. `None` when no other turn could come to anything else.
    pub fn choose(&mut self, scenarios: &[Scenario], random: &mut fastrand::Rng) -> Option<usize> {
        let weight = |(index, scenario): (usize, &Scenario)| match self.spent[index] {
            true => 0.0,
            false => self.weight(&scenario.key, self.chosen[index]),
        };
        let weights: Vec<f64> = scenarios.iter().enumerate().map(weight).collect();
        let mut left = random.f64() * weights.iter().sum::<f64>();
        let found = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        let index = found.or_else(|| weights.iter().rposition(|weight| *weight > 0.0))?;
        self.chosen[index] += 1;
        Some(index)
    }

    fn weight(&self, key: &str, chosen: u32) -> f64 {
        let weight = match self.memory.scenarios.get(key) {
            None => 1.0,
            Some(Record { known: true, .. }) => RARELY,
            Some(Record { rate, .. }) => (-((rate - self.success_rate) / WIDTH).powi(2)).exp().max(RARELY),
        };
        weight / f64::from(1 + chosen).powi(4)
    }

    /// Takes in what became of a scenario, and moves the temperature: up by `1 - p` of a step after an accepted answer, down
    /// by `p` of it after a rejected one, which settles where `p`, the wanted rate, of these are accepted (the weighted up-down rule;
    /// Kaernbach 1991). What is known, or much like another, moves nothing: it would be no harder at a higher temperature.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn note(&mut self, index: usize, scenario: &Scenario, outcome: &Outcome) -> Result<()> {
        let (failed, rejected) =
            (matches!(outcome, Outcome::Failed { .. }), matches!(outcome, Outcome::Rejected { .. }));
        self.spent[index] |= failed || (rejected && self.memory.temperature <= 0.0);
        if failed {
            return Ok(());
        }
        let record = self.memory.scenarios.entry(scenario.key.clone()).or_default();
        record.judged = record.judged.saturating_add(1);
        let share = (1.0 / record.judged as f64).max(NEWEST);
        record.rate += share * (f64::from(u8::from(!rejected)) - record.rate);
        record.known = *outcome == Outcome::Known;
        let step = match outcome {
            Outcome::Accepted { .. } => 1.0 - self.success_rate,
            Outcome::Rejected { .. } => -self.success_rate,
            _ => 0.0,
        };
        self.memory.temperature = (self.memory.temperature + STEP * step).clamp(0.0, self.temperature_max);
        let Some(folder) = &self.folder else { return Ok(()) };
        let bytes = serde_json::to_vec_pretty(&self.memory).context("plain values")?;
        durable::replace(folder, FILE, &bytes).with_context(|| format!("cannot write {}", folder.join(FILE).display()))
    }
}

fn read(bytes: &[u8]) -> Result<Memory> {
    let memory: Memory = serde_json::from_slice(bytes)?;
    if memory.version != VERSION {
        bail!("is of version {}, this apollod reads {VERSION}", memory.version);
    }
    if !memory.temperature.is_finite() || memory.scenarios.values().any(|record| !(0.0..=1.0).contains(&record.rate)) {
        bail!("holds a temperature or a rate that is none");
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Judge;
    use crate::dream::judge::Judges;
    use crate::dream::scenario::Task;

    fn accepted() -> Outcome {
        Outcome::Accepted { example: None }
    }

    fn rejected() -> Outcome {
        Outcome::Rejected { by: "matches", reason: String::new() }
    }

    fn failed() -> Outcome {
        Outcome::Failed { reason: String::new() }
    }

    fn scenarios(count: usize) -> Vec<Scenario> {
        let judges = || Judges::new(&Judge::default()).unwrap();
        let one = |i| {
            let (id, key, task) = (format!("s{i}"), format!("k{i}"), Task::Note(String::new()));
            Scenario { id, key, task, instruction: String::new(), judges: judges() }
        };
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
            let mut ledger = Ledger::open(dir.path(), &config, &scenarios, true).unwrap();
            let mut count = 0;
            for turn in 0..600 {
                // The hotter, the worse: certain at 0, hopeless at 2.
                let good = random.f64() < 1.0 - ledger.temperature() / 2.0;
                count += u32::from(turn >= 100 && good);
                ledger.note(0, &scenarios[0], &if good { accepted() } else { rejected() }).unwrap();
            }
            let share = f64::from(count) / 500.0;
            // Three standard errors of 500 independent answers are 0.067 at most.
            assert!((share - wanted).abs() < 0.07, "wanted {wanted}, got {share}; seed 7");
        }
    }

    #[test]
    fn what_is_hopeless_or_known_is_chosen_rarely_and_what_is_new_often() {
        let dir = tempfile::tempdir().unwrap();
        let scenarios = scenarios(4);
        let config = DreamConfig::default();
        let mut ledger = Ledger::open(dir.path(), &config, &scenarios, true).unwrap();
        for turn in 0..10 {
            ledger.note(0, &scenarios[0], &rejected()).unwrap();
            ledger.note(1, &scenarios[1], &Outcome::Known).unwrap();
            ledger.note(2, &scenarios[2], &if turn % 10 < 7 { accepted() } else { rejected() }).unwrap();
        }
        let mut ledger = Ledger::open(dir.path(), &config, &scenarios, true).unwrap();
        let weights: Vec<f64> = scenarios.iter().map(|scenario| ledger.weight(&scenario.key, 0)).collect();
        assert!(weights[0] <= RARELY && weights[1] <= RARELY, "{weights:?}");
        assert!(weights[2] > 2.0 * RARELY && weights[3] == 1.0, "{weights:?}");
        let mut random = fastrand::Rng::with_seed(1);
        let mut turns = [0; 4];
        for _ in 0..40 {
            turns[ledger.choose(&scenarios, &mut random).unwrap()] += 1;
        }
        assert!(turns.iter().all(|turns| *turns > 0), "each has its turn in a long dream: {turns:?}");
        assert!(turns[3] > turns[0] && turns[3] > turns[1], "{turns:?}");
    }

    #[test]
    fn a_dream_that_leaves_no_trace_leaves_none_and_a_changed_temperature_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let scenarios = scenarios(1);
        let config = DreamConfig::default();
        let temperature =
            |config: &DreamConfig| Ledger::open(dir.path(), config, &scenarios, false).unwrap().temperature();
        Ledger::open(dir.path(), &config, &scenarios, false).unwrap().note(0, &scenarios[0], &rejected()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        Ledger::open(dir.path(), &config, &scenarios, true).unwrap().note(0, &scenarios[0], &rejected()).unwrap();
        assert!(temperature(&config) < 0.7);
        assert_eq!(temperature(&DreamConfig { temperature: 0.9, ..config }), 0.9);
    }

    #[test]
    fn what_would_come_to_the_same_has_no_other_turn() {
        let dir = tempfile::tempdir().unwrap();
        let scenarios = scenarios(2);
        let config = DreamConfig { temperature: 0.0, temperature_max: 0.0, ..DreamConfig::default() };
        let mut ledger = Ledger::open(dir.path(), &config, &scenarios, false).unwrap();
        let mut random = fastrand::Rng::with_seed(1);
        ledger.note(0, &scenarios[0], &failed()).unwrap();
        assert_eq!(ledger.choose(&scenarios, &mut random), Some(1));
        ledger.note(1, &scenarios[1], &rejected()).unwrap();
        assert_eq!(ledger.choose(&scenarios, &mut random), None);
    }

    #[test]
    fn a_file_of_nonsense_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let later = r#"{"version": 2, "begun_with": 1.0, "temperature": 1.0, "scenarios": {}}"#;
        let odd = r#"{"version": 1, "begun_with": 1, "temperature": 1, "scenarios": {"a": {"judged": 1, "rate": 2, "known": false}}}"#;
        for text in ["", "{}", "[1]", later, odd] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let error =
                format!("{:#}", Ledger::open(dir.path(), &DreamConfig::default(), &scenarios(1), true).unwrap_err());
            assert!(error.contains("remove it to begin anew"), "{error}");
        }
    }
}
