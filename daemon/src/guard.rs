//! The guard: whether the model still knows what it must.
//!
//! Probes are examples that are never trained. l: loss of each in nats a decision token, of the live weights · r: the same
//! when the guard first saw the probe (its reference) · d = l - r · limit: `guard.max_rise`
//!
//! harm ⇔ some l is not finite, or the mean of d without the probe that rose most is above the limit. That one is left out (of
//! four probes or more) because a lesson may rightly overturn what one of them says. References are kept, in `guard.json` of the
//! state directory, so that many small harms are noticed as one.
//!
//! Where weights are beyond the limit that somebody has chosen (rolled back to, adopted), nothing that comes after is to blame: until
//! the probes are within it again, d is the rise above those, the base.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use model::Example;
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::protocol::{Probed, WorstProbe};

/// From so many probes on, the one that rose most is left out.
const PROBES_WITHOUT_ONE: usize = 4;
/// Where references and base are kept.
const FILE: &str = "guard.json";

/// Losses by BLAKE3 of a probe's tokens; only finite ones.
type Losses = BTreeMap<String, f64>;

/// What is kept from one start to the next.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Kept {
    /// Of all probes that were ever seen.
    references: Losses,
    /// The generation that the guard saw last: another one in the files was chosen by somebody.
    generation: Option<u64>,
    base: Option<Losses>,
}

/// Judges losses of probes.
#[derive(Debug)]
pub struct Guard {
    limit: f64,
    state_dir: PathBuf,
    /// Of each probe: its line in the file, and what its losses are kept by.
    lines: Vec<usize>,
    digests: Vec<String>,
    kept: Kept,
}

/// Whether what is kept can be read.
///
/// # Errors
/// It cannot.
pub fn check(state_dir: &Path) -> Result<()> {
    read(state_dir).map(drop)
}

impl Guard {
    /// Begins on the weights of a generation, whose losses these are. They become the references of probes that have none.
    ///
    /// # Errors
    /// What is kept cannot be read or written.
    pub fn begin(
        state_dir: &Path,
        probes: &[(usize, Example)],
        limit: f64,
        generation: u64,
        losses: &[f64],
    ) -> Result<Guard> {
        let kept = read(state_dir)?;
        let known = kept.generation == Some(generation);
        let mut guard = Guard {
            limit,
            state_dir: state_dir.to_owned(),
            lines: probes.iter().map(|(line, _)| *line).collect(),
            digests: probes.iter().map(|(_, probe)| digest(probe)).collect(),
            kept,
        };
        match known {
            true => guard.keep(generation, losses)?,
            false => guard.begin_from(generation, losses)?,
        }
        Ok(guard)
    }

    /// Takes a generation with these losses as what training goes on from, because somebody has chosen it.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn begin_from(&mut self, generation: u64, losses: &[f64]) -> Result<()> {
        let beyond = self.rise(&self.kept.references, losses).is_beyond(self.limit);
        self.kept.base = beyond.then(|| self.finite(losses));
        self.keep(generation, losses)
    }

    /// Takes losses that were not judged as harm for those of a new generation.
    ///
    /// # Errors
    /// It cannot be written down.
    pub fn accept(&mut self, generation: u64, losses: &[f64]) -> Result<()> {
        if !self.rise(&self.kept.references, losses).is_beyond(self.limit) {
            self.kept.base = None;
        }
        self.keep(generation, losses)
    }

    /// Writes down what is to be kept. Probes that have no reference or base get theirs.
    fn keep(&mut self, generation: u64, losses: &[f64]) -> Result<()> {
        for (digest, loss) in self.finite(losses) {
            for kept in std::iter::once(&mut self.kept.references).chain(&mut self.kept.base) {
                kept.entry(digest.clone()).or_insert(loss);
            }
        }
        self.kept.generation = Some(generation);
        durable::replace(&self.state_dir, FILE, &serde_json::to_vec(&self.kept)?)
            .with_context(|| format!("cannot write {}", self.state_dir.join(FILE).display()))
    }

    fn finite(&self, losses: &[f64]) -> Losses {
        let known = self.digests.iter().cloned().zip(losses.iter().copied());
        known.filter(|(_, loss)| loss.is_finite()).collect()
    }

    fn rise(&self, from: &Losses, losses: &[f64]) -> Rise {
        Rise::of(&self.digests.iter().map(|digest| from.get(digest).copied()).collect::<Vec<_>>(), losses)
    }

    /// How the probes do, and in words what is wrong if weights with these losses are harmed.
    pub fn judge(&self, losses: &[f64]) -> (Probed, Option<String>) {
        let (from, whose) = match &self.kept.base {
            Some(base) => (base, "in the generation that somebody chose, which was beyond the limit already"),
            None => (&self.kept.references, "when the guard first saw them"),
        };
        let (rise, known) = (self.rise(&self.kept.references, losses), self.rise(from, losses));
        let harm = known.is_beyond(self.limit).then(|| {
            let worst = known.worst.expect("what is beyond has a worst");
            format!(
                "the loss of {} is {:.3} nats a token higher in the mean than {whose}; guard.max_rise allows {}. Most it rose on \
                 line {}, from {:.3} to {:.3}",
                known.of_whom(),
                known.mean,
                self.limit,
                self.lines[worst],
                from[&self.digests[worst]],
                losses[worst]
            )
        });
        let finite = |value: f64| Some(value).filter(|value| value.is_finite());
        let references: Vec<f64> =
            self.digests.iter().filter_map(|digest| self.kept.references.get(digest).copied()).collect();
        let worst = |worst: usize| WorstProbe {
            line: self.lines[worst] as u64,
            loss: finite(losses[worst]),
            reference: self.kept.references[&self.digests[worst]],
        };
        let probed = Probed {
            probes: losses.len() as u64,
            loss: finite(mean(losses)),
            reference: finite(mean(&references)),
            rise: finite(rise.mean),
            limit: self.limit,
            worst: rise.worst.map(worst),
            warning: self.warning(losses),
        };
        (probed, harm)
    }

    fn warning(&self, losses: &[f64]) -> Option<String> {
        let unknown = self.digests.iter().position(|digest| !self.kept.references.contains_key(digest));
        if let Some(unknown) = unknown {
            return Some(format!(
                "guard.probes, line {}: its loss is {}, so the model is ruined and this probe guards nothing: go back to a better \
                 generation",
                self.lines[unknown], losses[unknown]
            ));
        }
        let base = self.kept.base.as_ref()?;
        let of_base: Vec<f64> =
            self.digests.iter().zip(losses).map(|(digest, now)| base.get(digest).copied().unwrap_or(*now)).collect();
        Some(format!(
            "in the generation that was chosen the probes' loss was already {:.3} nats a token higher than when the guard first saw \
             them, and guard.max_rise allows {}: until it is within that, the guard goes by what comes on top. Go back to a better \
             generation, or take this one as it is: stop the daemon and remove guard.json from .apollod in the model directory",
            self.rise(&self.kept.references, &of_base).mean,
            self.limit
        ))
    }
}

/// How far losses have risen from those that are known.
#[derive(Debug)]
struct Rise {
    /// Of all of these probes, or of all but the worst.
    mean: f64,
    /// The one that rose most; none if nothing is known of any.
    worst: Option<usize>,
    probes: usize,
    without_one: bool,
}

impl Rise {
    fn of(from: &[Option<f64>], losses: &[f64]) -> Rise {
        let known = from.iter().zip(losses).enumerate();
        let rise = |(i, (from, loss)): (usize, (&Option<f64>, &f64))| {
            // What is no number has risen beyond everything.
            let loss = if loss.is_finite() { *loss } else { f64::INFINITY };
            from.map(|from| (i, loss - from))
        };
        let rises: Vec<(usize, f64)> = known.filter_map(rise).collect();
        let worst = rises.iter().max_by(|a, b| a.1.total_cmp(&b.1)).copied();
        // One that is no number is left out of nothing.
        let without_one = rises.len() >= PROBES_WITHOUT_ONE && worst.is_some_and(|(_, rise)| rise.is_finite());
        let left = rises.iter().filter(|rise| !without_one || Some(**rise) != worst);
        let left: Vec<f64> = left.map(|(_, rise)| *rise).collect();
        Rise { mean: mean(&left), worst: worst.map(|(i, _)| i), probes: rises.len(), without_one }
    }

    /// A rise that is no number is beyond any limit, but for one of no probes.
    fn is_beyond(&self, limit: f64) -> bool {
        self.probes > 0 && (!self.mean.is_finite() || self.mean > limit)
    }

    fn of_whom(&self) -> String {
        match (self.without_one, self.probes) {
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
    let mut hasher = blake3::Hasher::new();
    for at in probe.spans().iter().flat_map(|span| [span.start as u64, span.end as u64]) {
        hasher.update(&at.to_le_bytes());
    }
    // There may be any number of spans: no span is this.
    hasher.update(&u64::MAX.to_le_bytes());
    for id in probe.ids() {
        hasher.update(&id.to_le_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn read(state_dir: &Path) -> Result<Kept> {
    let path = state_dir.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
            format!("{} is damaged: remove it to take the model as it is now for the reference", path.display())
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Kept::default()),
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

    fn begin_at(dir: &Path, generation: u64, losses: &[f64]) -> Guard {
        Guard::begin(dir, &probes(losses.len() as u32), 0.1, generation, losses).unwrap()
    }

    fn begin(dir: &Path, losses: &[f64]) -> Guard {
        begin_at(dir, 0, losses)
    }

    fn is_harm(guard: &Guard, losses: &[f64]) -> bool {
        guard.judge(losses).1.is_some()
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
        for nan in [f64::NAN, -f64::NAN] {
            assert!(harm(&[1.0, nan, 3.0, 4.5]).unwrap().contains("line 2"), "no number");
        }
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
        assert_eq!((probed.probes, probed.loss, probed.reference, probed.rise), (1, Some(1.25), Some(1.0), Some(0.25)));
        assert_eq!(probed.worst, Some(WorstProbe { line: 1, loss: Some(1.25), reference: 1.0 }));
        assert!(is_harm(&begin(dir.path(), &[1.0, 1.0, 1.0]), &[1.0, 1.0, 1.5]));
    }

    #[test]
    fn small_harms_add_up_over_restarts_and_generations() {
        let dir = tempfile::tempdir().unwrap();
        let mut guard = begin(dir.path(), &[1.0, 2.0]);
        guard.accept(1, &[1.08, 2.07]).unwrap();
        assert!(is_harm(&guard, &[1.15, 2.14]));
        // The losses at a later start are not the references.
        let guard = begin_at(dir.path(), 1, &[1.08, 2.07]);
        assert!(is_harm(&guard, &[1.15, 2.14]));
        assert_eq!(guard.judge(&[1.0, 2.0]).0.reference, Some(1.5));
    }

    #[test]
    fn a_generation_that_was_let_through_is_not_measured_into_another_base() {
        let dir = tempfile::tempdir().unwrap();
        let mut guard = begin(dir.path(), &[1.0, 2.0]);
        guard.accept(1, &[1.0999, 2.0999]).unwrap();
        // On other kernels.
        let guard = begin_at(dir.path(), 1, &[1.1001, 2.1001]);
        assert!(is_harm(&guard, &[1.15, 2.15]) && guard.judge(&[1.0, 2.0]).0.warning.is_none());
    }

    #[test]
    fn a_probe_keeps_its_reference_whatever_other_probes_there_are() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &[1.0]);
        let mut reversed = probes(2);
        reversed.reverse();
        let guard = Guard::begin(dir.path(), &reversed, 0.1, 0, &[5.0, 7.0]).unwrap();
        assert_eq!(guard.judge(&[5.0, 1.0]).0.reference, Some(3.0));
        assert_eq!(begin(dir.path(), &[9.0, 9.0]).judge(&[1.0, 5.0]).0.reference, Some(3.0));
    }

    #[test]
    fn what_somebody_chose_is_what_counts_until_the_probes_are_within_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        begin(dir.path(), &[1.0, 2.0]);
        let guard = begin_at(dir.path(), 3, &[2.0, 3.1]);
        assert!(guard.judge(&[2.0, 3.1]).0.warning.unwrap().contains("already 1.050 nats"));
        assert_eq!(guard.judge(&[2.05, 3.15]).1, None, "what came after is not to blame");
        // Neither a sync nor a start moves that.
        for generation in 4..8 {
            let mut guard = begin_at(dir.path(), generation - 1, &[2.08, 3.18]);
            guard.accept(generation, &[2.08, 3.18]).unwrap();
            assert!(guard.judge(&[2.15, 3.25]).1.unwrap().contains("somebody chose"));
        }
        // A probe that is new there has what it is then for its base.
        let with_another = begin_at(dir.path(), 7, &[2.08, 3.18, 5.0]);
        assert!(is_harm(&with_another, &[2.08, 3.18, 5.5]) && !is_harm(&with_another, &[2.08, 3.18, 5.0]));
        let mut guard = begin_at(dir.path(), 7, &[2.08, 3.18]);
        guard.accept(8, &[1.0, 2.1]).unwrap();
        assert!(is_harm(&guard, &[2.05, 3.15]) && guard.judge(&[1.0, 2.1]).0.warning.is_none());
        guard.begin_from(9, &[2.0, 3.1]).unwrap();
        assert!(!is_harm(&guard, &[2.05, 3.15]), "chosen by somebody");
    }

    #[test]
    fn a_ruined_model_is_said_and_is_no_reference() {
        let dir = tempfile::tempdir().unwrap();
        let mut guard = begin(dir.path(), &[f64::NAN, 1.0]);
        let (probed, harm) = guard.judge(&[f64::NAN, 1.0]);
        assert!(harm.is_none() && probed.warning.as_ref().unwrap().contains("line 1"), "{probed:?}");
        // It can be told: JSON has no NaN.
        let sent: Probed = serde_json::from_str(&serde_json::to_string(&probed).unwrap()).unwrap();
        assert_eq!(sent, probed);
        assert!(is_harm(&guard, &[f64::NAN, 1.2]), "the other guards still");
        guard.begin_from(2, &[2.0, 1.0]).unwrap();
        assert!(is_harm(&guard, &[2.3, 1.0]) && guard.judge(&[2.0, 1.0]).0.warning.is_none());
        let nothing = begin(tempfile::tempdir().unwrap().path(), &[f64::NAN]);
        assert!(!is_harm(&nothing, &[f64::NAN]));
    }

    #[test]
    fn what_was_kept_and_is_damaged_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(check(dir.path()).unwrap_err().to_string().contains("guard.json is damaged"));
    }
}
