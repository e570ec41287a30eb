//! The guard: whether the model still knows what it must.
//!
//! Probes are examples that are never trained. l: loss of each in nats a decision token, of the live weights · r: the same
//! when the guard first saw these probes (the reference) · d = l - r · limit: `guard.max_rise`
//!
//! harm ⇔ mean(d) > limit and mean(d) > 2·sd(d)/√n: probes have risen further than is allowed, and not by chance of which they
//! are. Each probe counts the same. The reference is kept, in `guard.json` of the state directory, so that many small harms are
//! noticed as one. Where the last good generation is beyond the limit already, nothing that came after it is to blame: then d is
//! the rise since that one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use model::Example;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::protocol::{Probed, WorstProbe};

/// Standard errors that a rise has to exceed.
const ERRORS: f64 = 2.0;
/// Where the reference is kept.
const FILE: &str = "guard.json";

/// The reference as it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Reference {
    /// BLAKE3 of the probes' tokens.
    probes: String,
    /// The generation whose weights these are the losses of.
    generation: u64,
    losses: Vec<f64>,
}

/// Judges losses of probes.
#[derive(Debug)]
pub struct Guard {
    limit: f64,
    /// Each probe's line in its file.
    lines: Vec<usize>,
    reference: Reference,
    /// Those of the last good generation.
    last: Vec<f64>,
}

impl Guard {
    /// Begins with the losses of `generation`, which become the reference if there is none for these probes.
    ///
    /// # Errors
    /// A loss that is not finite; a reference that cannot be read or written.
    pub fn begin(
        state_dir: &Path,
        probes: &[(usize, Example)],
        limit: f64,
        generation: u64,
        losses: Vec<f64>,
    ) -> Result<Guard> {
        if let Some(((line, _), loss)) = probes.iter().zip(&losses).find(|(_, loss)| !loss.is_finite()) {
            bail!(
                "guard.probes, line {line}: its loss is {loss} with generation {generation}: that model is ruined. Roll the \
                 files back (`apollod checkpoint rollback`), or leave guard.probes out"
            );
        }
        let known = read(state_dir)?.filter(|known| known.probes == digest(probes));
        let reference = match known {
            Some(known) if known.losses.len() == probes.len() => known,
            _ => {
                let new = Reference { probes: digest(probes), generation, losses: losses.clone() };
                durable::replace(state_dir, FILE, &serde_json::to_vec(&new)?)
                    .with_context(|| format!("cannot write {}", state_dir.join(FILE).display()))?;
                new
            }
        };
        let lines = probes.iter().map(|(line, _)| *line).collect();
        Ok(Guard { limit, lines, reference, last: losses })
    }

    /// Takes losses as those of the last good generation.
    pub fn accept(&mut self, losses: Vec<f64>) {
        self.last = losses;
    }

    /// What there is to say of a generation that is beyond the limit itself.
    pub fn warning(&self) -> Option<String> {
        let rise = Rise::of(&self.reference.losses, &self.last);
        rise.is_beyond(self.limit).then(|| {
            format!(
                "the model was already worse than guard.max_rise allows before anything was trained ({}): the guard goes by \
                 what comes on top of that. Roll back, or remove guard.json from the state directory to take it as it is",
                self.said(&rise, "the reference", &self.reference.losses, &self.last)
            )
        })
    }

    /// How the probes do with the last good generation.
    pub fn judge_last(&self) -> Probed {
        self.judge(&self.last).0
    }

    /// How the probes do, and in words what is wrong if the weights with these losses are harmed.
    pub fn judge(&self, losses: &[f64]) -> (Probed, Option<String>) {
        let rise = Rise::of(&self.reference.losses, losses);
        let beyond_before = Rise::of(&self.reference.losses, &self.last).is_beyond(self.limit);
        let (from, whose) = match beyond_before {
            true => (&self.last, "the last good generation"),
            false => (&self.reference.losses, "the reference"),
        };
        let of_base = Rise::of(from, losses);
        let harm = of_base.is_beyond(self.limit).then(|| self.said(&of_base, whose, from, losses));
        let finite = |value: f64| Some(value).filter(|value| value.is_finite());
        let worst = worst(&self.reference.losses, losses);
        let probed = Probed {
            probes: losses.len() as u64,
            loss: finite(mean(losses.iter().copied())),
            reference: mean(self.reference.losses.iter().copied()),
            reference_generation: self.reference.generation,
            rise: finite(rise.mean),
            error: finite(rise.error),
            limit: self.limit,
            worst: WorstProbe {
                line: self.lines[worst] as u64,
                loss: finite(losses[worst]),
                reference: self.reference.losses[worst],
            },
        };
        (probed, harm)
    }

    fn said(&self, rise: &Rise, whose: &str, from: &[f64], losses: &[f64]) -> String {
        let worst = worst(from, losses);
        format!(
            "the loss of {} probes rose by {:.3} nats a token (standard error {:.3}) over that of {whose}, {:.3}; allowed is \
             {}. Most it did on line {}, from {:.3} to {:.3}",
            losses.len(),
            rise.mean,
            rise.error,
            mean(from.iter().copied()),
            self.limit,
            self.lines[worst],
            from[worst],
            losses[worst]
        )
    }
}

/// How far losses have risen.
#[derive(Debug)]
struct Rise {
    mean: f64,
    /// Standard error of the mean; 0 of one probe.
    error: f64,
}

impl Rise {
    fn of(from: &[f64], losses: &[f64]) -> Rise {
        let rises = || losses.iter().zip(from).map(|(loss, from)| loss - from);
        let n = losses.len() as f64;
        let mean = mean(rises());
        let squares: f64 = rises().map(|rise| (rise - mean).powi(2)).sum();
        let error = if n > 1.0 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 };
        Rise { mean, error }
    }

    /// A rise that is no number is beyond any limit.
    fn is_beyond(&self, limit: f64) -> bool {
        !(self.mean <= limit || self.mean <= ERRORS * self.error)
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    values.sum::<f64>() / n
}

/// The probe that rose most; one that is no number before any other.
fn worst(from: &[f64], losses: &[f64]) -> usize {
    let rise = |i: &usize| match losses[*i] - from[*i] {
        rise if rise.is_nan() => f64::INFINITY,
        rise => rise,
    };
    (0..losses.len()).max_by(|a, b| rise(a).total_cmp(&rise(b))).expect("there is a probe")
}

fn digest(probes: &[(usize, Example)]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (_, probe) in probes {
        hasher.update(format!("{:?} {:?};", probe.ids(), probe.spans()).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn read(state_dir: &Path) -> Result<Option<Reference>> {
    let path = state_dir.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).with_context(|| {
            format!("{} is damaged: remove it to take the model as it is now for the reference", path.display())
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probes(n: u32) -> Vec<(usize, Example)> {
        let example = |i| Example::new(vec![i, 2, 3], std::iter::once(1..3).collect()).unwrap();
        (0..n).map(|i| (i as usize + 1, example(i))).collect()
    }

    fn begin(dir: &Path, losses: &[f64]) -> Guard {
        Guard::begin(dir, &probes(losses.len() as u32), 0.1, 7, losses.to_vec()).unwrap()
    }

    #[test]
    fn a_rise_beyond_the_limit_is_harm_unless_it_may_be_chance() {
        let dir = tempfile::tempdir().unwrap();
        let guard = begin(dir.path(), &[1.0, 2.0, 3.0, 4.0]);
        let harm = |losses: &[f64]| guard.judge(losses).1;
        assert_eq!(harm(&[1.1, 2.1, 3.0, 4.1]), None, "within the limit");
        assert_eq!(harm(&[0.1, 0.2, 0.3, 0.4]), None, "better");
        let said = harm(&[1.2, 2.3, 3.1, 4.2]).unwrap();
        assert!(said.contains("rose by 0.200") && said.contains("line 2, from 2.000 to 2.300"), "{said}");
        // The mean is the same, and one probe alone makes it: 0.2 with a standard error of 0.2.
        assert_eq!(harm(&[1.0, 2.0, 3.0, 4.8]), None);
        assert!(harm(&[1.0, f64::NAN, 3.0, 4.0]).unwrap().contains("line 2"), "no number");
        assert!(harm(&[1.0, 2.0, f64::INFINITY, 4.0]).unwrap().contains("line 3"));
    }

    #[test]
    fn the_limit_of_one_probe_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let guard = begin(dir.path(), &[1.0]);
        assert_eq!(guard.judge(&[1.05]).1, None);
        let (probed, harm) = guard.judge(&[1.2]);
        assert!(harm.is_some());
        assert_eq!((probed.probes, probed.loss, probed.reference, probed.error), (1, Some(1.2), 1.0, Some(0.0)));
        assert_eq!(probed.worst, WorstProbe { line: 1, loss: Some(1.2), reference: 1.0 });
    }

    #[test]
    fn small_harms_add_up_over_restarts_and_generations() {
        let dir = tempfile::tempdir().unwrap();
        let mut guard = begin(dir.path(), &[1.0, 2.0]);
        guard.accept(vec![1.08, 2.07]);
        assert!(guard.judge(&[1.15, 2.14]).1.is_some());
        // The losses at a later start are not the reference.
        let guard = begin(dir.path(), &[1.08, 2.07]);
        assert!(guard.warning().is_none() && guard.judge(&[1.15, 2.14]).1.is_some());
        assert_eq!(guard.judge(&[1.0, 2.0]).0.reference, 1.5);
    }

    #[test]
    fn other_probes_have_another_reference() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &[1.0, 2.0]);
        assert_eq!(begin(dir.path(), &[5.0]).judge(&[5.0]).0.reference, 5.0);
    }

    #[test]
    fn a_model_that_is_beyond_the_limit_already_is_said_and_is_what_counts() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &[1.0, 2.0]);
        let guard = begin(dir.path(), &[2.0, 3.1]);
        assert!(guard.warning().unwrap().contains("guard.json"));
        assert_eq!(guard.judge(&[2.05, 3.15]).1, None, "what came after is not to blame");
        assert!(guard.judge(&[2.3, 3.4]).1.unwrap().contains("the last good generation"));
    }

    #[test]
    fn a_ruined_model_and_a_damaged_reference_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let begin = |loss| Guard::begin(dir.path(), &probes(1), 0.1, 3, vec![loss]);
        assert!(begin(f64::NAN).unwrap_err().to_string().contains("generation 3"));
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(begin(1.0).unwrap_err().to_string().contains("guard.json is damaged"));
    }
}
