//! The optimizer's state as bytes, saved and restored bit for bit.
//!
//! Layout, little-endian: `APOLLO2\n` · u64 length of the header · header (JSON) · then, for each
//! tensor in the header, exp_avg and exp_avg_sq, f32 or bf16 as the header says. Norms and counters are in the header:
//! an f32 is written there as its bits. Of a lookup the slots in use are written. `APOLLO1\n`, which is read too, knew
//! f32 only.
//!
//! Moments that are to be of another type than they were saved in are converted: to f32 exactly, to bf16 by stochastic
//! rounding, with the same random numbers each time that the same state is read.
//!
//! Reading trusts nothing: no length is allocated that the optimizer's own tensors do not ask for,
//! and values that no step can leave are refused.

use crate::moments::{Slot, moments_dtype, moments_len, rank_of};
use crate::optimizer::Optimizer;
use crate::settings::{Rule, TensorKind};
use compute::{Device, Dtype, NORM_PREVIOUS, NORM_SLOTS, Stream, narrow, widen};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"APOLLO2\n";
const MAGIC_OF_F32: &[u8; 8] = b"APOLLO1\n";
/// Values moved between device and file at a time.
const CHUNK: usize = 1 << 16;
/// No header is longer; what says otherwise is not a state.
const HEADER_MAX: u64 = 1 << 30;
/// Random streams count steps in 32 bits.
const STEPS_MAX: u64 = u32::MAX as u64;

#[derive(Serialize, Deserialize)]
struct Header {
    steps: u64,
    seed: u64,
    tensors: Vec<Saved>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    name: String,
    rows: usize,
    cols: usize,
    rule: String,
    rank: usize,
    len: usize,
    #[serde(default)]
    moments: Element,
    norm_bits: u32,
    /// Steps in which it had a gradient; all of them, where a state does not say.
    #[serde(default)]
    gradients: Option<u64>,
    lookup: BTreeMap<u32, Slot>,
}

/// Type of a tensor's moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Element {
    #[default]
    F32,
    Bf16,
}

impl Element {
    fn of(dtype: Dtype) -> Element {
        if dtype == Dtype::F32 { Element::F32 } else { Element::Bf16 }
    }
    fn dtype(self) -> Dtype {
        match self {
            Element::F32 => Dtype::F32,
            Element::Bf16 => Dtype::BF16,
        }
    }
}

/// What [`Optimizer::load`] took over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Applied steps.
    pub steps: u64,
    /// Tensors that are not in the state, or whose rank, shape or rule changed since: their moments
    /// start from zero. Also tensors of the state that the optimizer does not have.
    pub reset: Vec<String>,
    /// Tensors whose moments were saved in another type than they have now: they were converted.
    pub converted: Vec<String>,
}

/// A state that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Reading failed.
    #[error("optimizer state: {0}")]
    Io(#[from] io::Error),
    /// The bytes are not a state.
    #[error("optimizer state: {0}; delete it to start with fresh moments")]
    Format(String),
}

impl<D: Device> Optimizer<D> {
    /// Writes the state.
    pub fn save(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut norms = vec![0.0; self.device.len(&self.norms)];
        self.device.read(&self.norms, 0, &mut norms);
        let tensors = self.tensors.iter().enumerate().map(|(i, t)| Saved {
            name: t.name.clone(),
            rows: t.rows,
            cols: t.cols,
            rule: rule_name(t.effective_rule()).into(),
            rank: rank_of(t, &self.settings),
            len: self.saved_len(i),
            moments: Element::of(moments_dtype(t, &self.settings)),
            norm_bits: norms[i * NORM_SLOTS + NORM_PREVIOUS].to_bits(),
            gradients: Some(self.states[i].gradients),
            lookup: self.states[i].lookup.slots.iter().map(|(k, v)| (*k, *v)).collect(),
        });
        let header = Header { steps: self.steps, seed: self.settings.seed, tensors: tensors.collect() };
        let header = serde_json::to_vec(&header)?;
        out.write_all(MAGIC)?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (i, state) in self.states.iter().enumerate() {
            for moment in [&state.exp_avg, &state.exp_avg_sq] {
                write_moment(&*self.device, moment, self.saved_len(i), out)?;
            }
        }
        Ok(())
    }

    /// Takes over a state that [`Optimizer::save`] wrote, in place of what was there. A tensor that
    /// has since got another rank, shape or rule starts fresh and is named in the result. After an
    /// error the optimizer is as new.
    pub fn load(&mut self, input: &mut dyn Read) -> Result<Restored, StateError> {
        self.reset();
        let result = self.try_load(input);
        if result.is_err() {
            self.reset();
        }
        result
    }

    fn try_load(&mut self, input: &mut dyn Read) -> Result<Restored, StateError> {
        let header = read_header(input)?;
        let mut missing: BTreeMap<String, usize> =
            self.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let mut restored = Restored { steps: header.steps, ..Restored::default() };
        self.steps = header.steps;
        for saved in &header.tensors {
            let same = missing.get(&saved.name).copied().filter(|&i| self.matches(i, saved));
            missing.remove(&saved.name);
            let Some(i) = same else {
                restored.reset.push(saved.name.clone());
                skip(input, saved)?;
                continue;
            };
            check_norm(saved)?;
            check_lookup(saved, header.steps)?;
            let gradients = saved.gradients.unwrap_or(header.steps);
            if gradients > header.steps {
                let reason = format!("{} had {gradients} gradients in {} steps", saved.name, header.steps);
                return Err(StateError::Format(reason));
            }
            let norm = f32::from_bits(saved.norm_bits);
            self.device.write(&mut self.norms, i * NORM_SLOTS + NORM_PREVIOUS, &[norm]);
            let dtype = moments_dtype(&self.tensors[i], &self.settings);
            if saved.moments.dtype() != dtype {
                restored.converted.push(saved.name.clone());
            }
            // Of a step that is none: steps are counted from 1.
            let streams = Stream::rounding(self.settings.seed, 0, i).of_moments();
            let mut moment =
                |stream, possible: fn(f32) -> bool| read_moment(&*self.device, saved, dtype, stream, input, possible);
            let exp_avg = moment(streams[0], |v| v.is_finite())?;
            let exp_avg_sq = moment(streams[1], |v| v.is_finite() && v >= 0.0)?;
            let state = &mut self.states[i];
            (state.exp_avg, state.exp_avg_sq, state.gradients) = (exp_avg, exp_avg_sq, gradients);
            state.lookup.slots = saved.lookup.iter().map(|(k, v)| (*k, *v)).collect();
        }
        restored.reset.extend(missing.into_keys());
        Ok(restored)
    }

    /// Values of each moment that are worth saving.
    fn saved_len(&self, i: usize) -> usize {
        match self.tensors[i].kind {
            TensorKind::Lookup => self.states[i].lookup.slots.len() * self.tensors[i].cols,
            _ => self.device.stored_len(&self.states[i].exp_avg),
        }
    }

    fn matches(&self, i: usize, saved: &Saved) -> bool {
        let t = &self.tensors[i];
        let len_fits = match t.kind {
            // Rows are below t.rows and differ, so that this bounds the length.
            TensorKind::Lookup => {
                saved.len == saved.lookup.len() * t.cols && saved.lookup.keys().all(|&row| (row as usize) < t.rows)
            }
            _ => saved.len == moments_len(t, &self.settings) && saved.lookup.is_empty(),
        };
        let rank = t.effective_rule() != Rule::Apollo || saved.rank == rank_of(t, &self.settings);
        len_fits && rank && (saved.rows, saved.cols) == (t.rows, t.cols) && saved.rule == rule_name(t.effective_rule())
    }
}

fn rule_name(rule: Rule) -> &'static str {
    match rule {
        Rule::Apollo => "apollo",
        Rule::AdamW => "adamw",
        Rule::Frozen => "frozen",
    }
}

fn read_header(input: &mut dyn Read) -> Result<Header, StateError> {
    let (mut magic, mut length) = ([0; 8], [0; 8]);
    input.read_exact(&mut magic)?;
    if ![MAGIC, MAGIC_OF_F32].contains(&&magic) {
        return Err(StateError::Format(format!("begins with {magic:02x?}, not with {:?}", "APOLLO2")));
    }
    input.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_MAX {
        return Err(StateError::Format(format!("header of {length} bytes")));
    }
    let mut json = Vec::new();
    input.take(length).read_to_end(&mut json)?;
    let header: Header = serde_json::from_slice(&json).map_err(|e| StateError::Format(format!("header: {e}")))?;
    if header.steps > STEPS_MAX {
        return Err(StateError::Format(format!("{} steps", header.steps)));
    }
    Ok(header)
}

/// A stored norm is a norm.
fn check_norm(saved: &Saved) -> Result<(), StateError> {
    let norm = f32::from_bits(saved.norm_bits);
    if norm.is_finite() && norm >= 0.0 {
        return Ok(());
    }
    Err(StateError::Format(format!("{}: stored norm {norm}", saved.name)))
}

/// The slots are 0..len, each of one row, and nothing is later than the last step.
fn check_lookup(saved: &Saved, steps: u64) -> Result<(), StateError> {
    let mut seen = vec![false; saved.lookup.len()];
    for (row, entry) in &saved.lookup {
        let slot = entry.slot as usize;
        if slot >= seen.len() || std::mem::replace(&mut seen[slot], true) {
            return Err(StateError::Format(format!("{}: row {row} has no slot of its own", saved.name)));
        }
        if entry.gradients > steps || entry.last_step > steps {
            return Err(StateError::Format(format!("{}: row {row} is ahead of step {steps}", saved.name)));
        }
    }
    Ok(())
}

fn write_moment<D: Device>(device: &D, moment: &D::Stored, len: usize, out: &mut dyn Write) -> io::Result<()> {
    let mut values = [0f32; CHUNK].to_vec();
    let dtype = device.stored_dtype(moment);
    for at in (0..len).step_by(CHUNK) {
        let values = &mut values[..CHUNK.min(len - at)];
        device.read_stored(moment, at, values);
        // Exact: they were stored in this type.
        out.write_all(&narrow(dtype, values))?;
    }
    Ok(())
}

/// One moment, to be of type `dtype`; every value is one that a step can leave, or it would spread to the weights.
fn read_moment<D: Device>(
    device: &D,
    saved: &Saved,
    dtype: Dtype,
    stream: Stream,
    input: &mut dyn Read,
    possible: fn(f32) -> bool,
) -> Result<D::Stored, StateError> {
    let (len, from) = (saved.len, saved.moments.dtype());
    let mut moment = device.stored(dtype, len);
    let mut bytes = vec![0; CHUNK * from.size()];
    for at in (0..len).step_by(CHUNK) {
        let bytes = &mut bytes[..CHUNK.min(len - at) * from.size()];
        input.read_exact(bytes)?;
        let mut values = widen(from, bytes);
        if let Some(v) = values.iter().find(|v| !possible(**v)) {
            return Err(StateError::Format(format!("{}: moment {v}", saved.name)));
        }
        if (from, dtype) == (Dtype::F32, Dtype::BF16) {
            stream.round_to_bf16(at as u64, &mut values);
        }
        device.write_stored(&mut moment, at, &values);
    }
    Ok(moment)
}

/// Passes over both moments of a tensor.
fn skip(input: &mut dyn Read, saved: &Saved) -> Result<(), StateError> {
    let bytes = (saved.len as u64).saturating_mul(2 * saved.moments.dtype().size() as u64);
    if io::copy(&mut input.take(bytes), &mut io::sink())? != bytes {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(())
}
