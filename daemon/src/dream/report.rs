//! What a dream says of itself.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What became of one turn.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It became an example.
    Accepted {
        /// Its id; none where nothing is posted.
        example: Option<String>,
    },
    /// A judge did not accept it.
    Rejected {
        /// Which, by its key in the configuration.
        by: &'static str,
        /// Why.
        reason: String,
    },
    /// The model says the like without the instruction.
    Known,
    /// Too near to an example of this dream.
    Duplicate,
    /// It could not be asked, judged or posted.
    Failed {
        /// Why.
        reason: String,
    },
}

/// One turn, for whoever watches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TurnReport {
    /// Which scenario.
    pub scenario: String,
    /// What was asked.
    pub asked: String,
    /// What the model said to it with the instruction.
    pub answer: String,
    /// At which temperature.
    pub temperature: f64,
    /// How much more likely the instruction made it, in nats a token, where that was asked.
    pub divergence: Option<f64>,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a dream.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Tells this dream from others; its examples have the tag `dream:ID`.
    pub id: String,
    /// Examples that were to be made.
    pub wanted: u64,
    /// Answers asked for, one a turn.
    pub turns: u64,
    /// Of these, the ones that became examples.
    pub accepted: u64,
    /// The ones that judges rejected, by the judge's key.
    pub rejected: BTreeMap<String, u64>,
    /// The ones that the model gives untold.
    pub known: u64,
    /// The ones that were too near to others.
    pub duplicates: u64,
    /// The ones that could not be asked, judged or posted.
    pub failed: u64,
    /// General examples that were posted among them.
    pub replayed: u64,
    /// The temperature that the next dream begins with.
    pub temperature: f64,
    /// How long it took.
    pub seconds: f64,
    /// The last rejection or failure, in words.
    pub last_reason: Option<String>,
    /// Why it broke off.
    pub broke_off: Option<String>,
}

impl Summary {
    /// Takes in a turn.
    pub(super) fn count(&mut self, report: &TurnReport) {
        self.turns += 1;
        match &report.outcome {
            Outcome::Accepted { .. } => self.accepted += 1,
            Outcome::Known => self.known += 1,
            Outcome::Duplicate => self.duplicates += 1,
            Outcome::Rejected { by, reason } => {
                *self.rejected.entry((*by).to_owned()).or_default() += 1;
                self.last_reason = Some(format!("{by}: {reason}"));
            }
            Outcome::Failed { reason } => {
                self.failed += 1;
                self.last_reason = Some(format!("{}: {reason}", report.scenario));
            }
        }
    }

    /// Answers that judges rejected.
    pub fn rejections(&self) -> u64 {
        self.rejected.values().sum()
    }

    /// What somebody should look at.
    pub fn trouble(&self) -> Option<String> {
        self.broke_off.as_ref().map(|why| format!("it broke off: {why}")).or_else(|| self.advice())
    }

    /// What to do where too few examples were made; `None` where there were enough, or nothing is left to learn.
    pub fn advice(&self) -> Option<String> {
        if self.accepted >= self.wanted || self.broke_off.is_some() {
            return None;
        }
        let said = self.last_reason.as_ref().map(|reason| format!(" (the last: {reason})")).unwrap_or_default();
        if self.rejections() > self.known.max(self.failed) {
            return Some(format!(
                "most answers were rejected{said}: does the model follow the instruction, does the judge ask for what the instruction says?"
            ));
        }
        if self.failed > self.known {
            return Some(format!("most answers failed{said}"));
        }
        (self.accepted == 0 && self.known < self.turns).then(|| format!("no example was made{said}"))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            wanted, turns, accepted, rejected, known, duplicates, failed, replayed, temperature, seconds, ..
        } = self;
        let by: Vec<String> = rejected.iter().map(|(by, count)| format!("{count} by {by}")).collect();
        let by = if by.is_empty() { "0".to_owned() } else { by.join(", ") };
        write!(
            f,
            "{accepted} of {wanted} examples made of {turns} answers in {seconds:.1} s; rejected {by}; {known} known, {duplicates} \
             duplicates, {failed} failed; {replayed} replayed; temperature {temperature:.2}"
        )?;
        self.broke_off.as_ref().map_or(Ok(()), |why| write!(f, "; broke off: {why}"))
    }
}
