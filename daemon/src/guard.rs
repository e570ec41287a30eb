//! The guard: whether the model still knows what it must.
//!
//! Probes are examples that are never trained. l: loss of each in nats a decision token, of the live weights · r: the same
//! when the guard first saw the probe (its reference) · d = l - r · limit: `guard.max_rise`
//!
//! harm ⇔ some l is not finite, or the mean of d without the probe that rose most is above the limit. That one is left out (of
//! four probes or more) because a lesson may rightly overturn what one of them says. References are kept, in `guard.json` of the
//! state directory, so that many small harms are noticed as one.
//!
//! Where the weights that training begins from are harmed by that measure already, nothing that comes after is to blame: until
//! they are no longer, d is the rise above those.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use model::Example;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::protocol::{Probed, WorstProbe};

/// From so many probes on, the one that rose most is left out.
const PROBES_WITHOUT_ONE: usize = 4;
/// Where the references are kept.
const FILE: &str = "guard.json";

/// References as they are kept: loss by BLAKE3 of a probe's tokens, of all probes that were ever seen.
#[derive(Debug, Default, Serialize, Deserialize)]
struct References(BTreeMap<String, f64>);

/// Judges losses of probes.
#[derive(Debug)]
pub struct Guard {
    limit: f64,
    /// Each probe's line in its file.
    lines: Vec<usize>,
    references: Vec<f64>,
    /// What rises are counted from, if not from the references: losses that are beyond the limit themselves.
    base: Option<Vec<f64>>,
}

impl Guard {
    /// Begins on weights whose losses these are; they become the references of probes that have none.
    ///
    /// # Errors
    /// References that cannot be read or written.
    pub fn begin(state_dir: &Path, probes: &[(usize, Example)], limit: f64, losses: &[f64]) -> Result<Guard> {
        let mut known = read(state_dir)?;
        let before = known.0.len();
        // A loss that is no number is nobody's reference: the next start looks again.
        for ((_, probe), loss) in probes.iter().zip(losses).filter(|(_, loss)| loss.is_finite()) {
            known.0.entry(digest(probe)).or_insert(*loss);
        }
        if known.0.len() > before {
            durable::replace(state_dir, FILE, &serde_json::to_vec(&known)?)
                .with_context(|| format!("cannot write {}", state_dir.join(FILE).display()))?;
        }
        let reference = |((_, probe), loss): (&(usize, Example), &f64)| *known.0.get(&digest(probe)).unwrap_or(loss);
        let references = probes.iter().zip(losses).map(reference).collect();
        let lines = probes.iter().map(|(line, _)| *line).collect();
        let mut guard = Guard { limit, lines, references, base: None };
        guard.begin_from(losses);
        Ok(guard)
    }

    /// Takes weights with these losses as what training goes on from, because they are what somebody wants.
    pub fn begin_from(&mut self, losses: &[f64]) {
        self.base = Rise::of(&self.references, losses).is_beyond(self.limit).then(|| losses.to_vec());
    }

    /// Takes losses that were not judged as harm for those of a new generation.
    pub fn accept(&mut self, losses: &[f64]) {
        if !Rise::of(&self.references, losses).is_beyond(self.limit) {
            self.base = None;
        }
    }

    /// How the probes do, and in words what is wrong if weights with these losses are harmed.
    pub fn judge(&self, losses: &[f64]) -> (Probed, Option<String>) {
        let (from, whose) = match &self.base {
            Some(base) => (base, "when training began, although they were beyond it already"),
            None => (&self.references, "when the guard first saw them"),
        };
        let (rise, known) = (Rise::of(&self.references, losses), Rise::of(from, losses));
        // Of a model that is ruined already, nothing can be said.
        let ruined = from.iter().any(|loss| !loss.is_finite());
        let harm = (known.is_beyond(self.limit) && !ruined).then(|| {
            format!(
                "the loss of {} is {:.3} nats a token higher in the mean than {whose}; guard.max_rise allows {}. Most it rose on \
                 line {}, from {:.3} to {:.3}",
                known.of_whom(losses.len()),
                known.mean,
                self.limit,
                self.lines[known.worst],
                from[known.worst],
                losses[known.worst]
            )
        });
        let finite = |value: f64| Some(value).filter(|value| value.is_finite());
        let probed = Probed {
            probes: losses.len() as u64,
            loss: finite(mean(losses)),
            reference: mean(&self.references),
            rise: finite(rise.mean),
            limit: self.limit,
            worst: WorstProbe {
                line: self.lines[rise.worst] as u64,
                loss: finite(losses[rise.worst]),
                reference: finite(self.references[rise.worst]),
            },
            warning: self.warning(),
        };
        (probed, harm)
    }

    fn warning(&self) -> Option<String> {
        let base = self.base.as_ref()?;
        let rise = Rise::of(&self.references, base);
        Some(format!(
            "the probes' loss was {:.3} nats a token higher than guard.max_rise allows from, before anything was trained on top: \
             the guard counts from there. Go back to a better generation, or take this one as it is: stop the daemon and remove \
             guard.json from .apollod in the model directory",
            rise.mean
        ))
    }
}

/// How far losses have risen.
#[derive(Debug)]
struct Rise {
    /// Of all probes, or of all but the worst.
    mean: f64,
    worst: usize,
    without_one: bool,
}

impl Rise {
    fn of(from: &[f64], losses: &[f64]) -> Rise {
        let rises: Vec<f64> = losses.iter().zip(from).map(|(loss, from)| loss - from).collect();
        let rank = |i: &usize| if losses[*i].is_finite() { rises[*i] } else { f64::INFINITY };
        let worst = (0..rises.len()).max_by(|a, b| rank(a).total_cmp(&rank(b))).expect("there is a probe");
        // One that is no number is left out of nothing.
        let without_one = rises.len() >= PROBES_WITHOUT_ONE && losses[worst].is_finite();
        let left: Vec<f64> =
            rises.iter().enumerate().filter(|(i, _)| !without_one || *i != worst).map(|(_, rise)| *rise).collect();
        Rise { mean: mean(&left), worst, without_one }
    }

    /// A rise that is no number is beyond any limit.
    fn is_beyond(&self, limit: f64) -> bool {
        !self.mean.is_finite() || self.mean > limit
    }

    fn of_whom(&self, probes: usize) -> String {
        match (self.without_one, probes) {
            (true, probes) => format!("{} of {probes} probes", probes - 1),
            (false, 1) => "the probe".into(),
            (false, probes) => format!("{probes} probes"),
        }
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn digest(probe: &Example) -> String {
    blake3::hash(format!("{:?} {:?}", probe.ids(), probe.spans()).as_bytes()).to_hex().to_string()
}

fn read(state_dir: &Path) -> Result<References> {
    let path = state_dir.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
            format!("{} is damaged: remove it to take the model as it is now for the reference", path.display())
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(References::default()),
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
        Guard::begin(dir, &probes(losses.len() as u32), 0.1, losses).unwrap()
    }

    #[test]
    fn a_rise_beyond_the_limit_is_harm_unless_one_probe_alone_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let guard = begin(dir.path(), &[1.0, 2.0, 3.0, 4.0]);
        let harm = |losses: &[f64]| guard.judge(losses).1;
        assert_eq!(harm(&[1.1, 2.1, 3.0, 4.1]), None, "within the limit");
        assert_eq!(harm(&[0.1, 0.2, 0.3, 0.4]), None, "better");
        assert_eq!(harm(&[1.0, 2.0, 3.0, 44.0]), None, "one fact is another now");
        let said = harm(&[1.2, 2.3, 3.1, 4.2]).unwrap();
        assert!(
            said.contains("of 3 of 4 probes is 0.167 nats") && said.contains("line 2, from 2.000 to 2.300"),
            "{said}"
        );
        assert!(harm(&[1.0, 2.4, 3.0, 44.0]).is_some(), "two facts");
        assert!(harm(&[1.0, f64::NAN, 3.0, 4.0]).unwrap().contains("line 2"), "no number");
        assert!(harm(&[1.0, 2.0, f64::INFINITY, 4.0]).unwrap().contains("line 3"));
        assert_eq!(guard.judge(&[1.0, f64::NAN, 3.0, 4.0]).0.rise, None);
    }

    #[test]
    fn of_few_probes_none_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let guard = begin(dir.path(), &[1.0]);
        assert_eq!(guard.judge(&[1.05]).1, None);
        let (probed, harm) = guard.judge(&[1.25]);
        assert!(harm.unwrap().starts_with("the loss of the probe is 0.250"));
        assert_eq!((probed.probes, probed.loss, probed.reference, probed.rise), (1, Some(1.25), 1.0, Some(0.25)));
        assert_eq!(probed.worst, WorstProbe { line: 1, loss: Some(1.25), reference: Some(1.0) });
        assert!(begin(dir.path(), &[1.0, 1.0, 1.0]).judge(&[1.0, 1.0, 1.5]).1.is_some());
    }

    #[test]
    fn small_harms_add_up_over_restarts_and_generations() {
        let dir = tempfile::tempdir().unwrap();
        let mut guard = begin(dir.path(), &[1.0, 2.0]);
        guard.accept(&[1.08, 2.07]);
        assert!(guard.judge(&[1.15, 2.14]).1.is_some());
        // The losses at a later start are not the references.
        let guard = begin(dir.path(), &[1.08, 2.07]);
        assert!(guard.judge(&[1.15, 2.14]).1.is_some());
        assert_eq!(guard.judge(&[1.0, 2.0]).0.reference, 1.5);
    }

    #[test]
    fn a_probe_keeps_its_reference_whatever_other_probes_there_are() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &[1.0]);
        let mut reversed = probes(2);
        reversed.reverse();
        let guard = Guard::begin(dir.path(), &reversed, 0.1, &[5.0, 7.0]).unwrap();
        assert_eq!(guard.references, [5.0, 1.0]);
        assert_eq!(begin(dir.path(), &[9.0, 9.0]).references, [1.0, 5.0]);
    }

    #[test]
    fn weights_that_are_beyond_the_limit_already_are_what_counts_until_they_are_better() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &[1.0, 2.0]);
        let mut guard = begin(dir.path(), &[2.0, 3.1]);
        assert!(guard.judge(&[2.0, 3.1]).0.warning.unwrap().contains("1.050 nats"));
        assert_eq!(guard.judge(&[2.05, 3.15]).1, None, "what came after is not to blame");
        guard.accept(&[2.05, 3.15]);
        assert!(guard.judge(&[2.12, 3.21]).1.unwrap().contains("when training began"), "nor does that move");
        guard.accept(&[1.0, 2.1]);
        assert!(guard.judge(&[2.05, 3.15]).1.is_some() && guard.judge(&[1.0, 2.1]).0.warning.is_none());
        guard.begin_from(&[2.0, 3.1]);
        assert_eq!(guard.judge(&[2.05, 3.15]).1, None, "chosen by somebody");
    }

    #[test]
    fn a_ruined_model_is_said_and_is_no_reference() {
        let dir = tempfile::tempdir().unwrap();
        let guard = begin(dir.path(), &[f64::NAN, 1.0]);
        let (probed, harm) = guard.judge(&[f64::NAN, 1.0]);
        assert!(harm.is_none() && probed.loss.is_none() && probed.warning.is_some(), "{probed:?}");
        assert_eq!(begin(dir.path(), &[2.0, 2.0]).references, [2.0, 1.0]);
    }

    #[test]
    fn damaged_references_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        let error = Guard::begin(dir.path(), &probes(1), 0.1, &[1.0]).unwrap_err().to_string();
        assert!(error.contains("guard.json is damaged"), "{error}");
    }
}
