//! The optimizer's state as bytes, saved and restored bit for bit.
//!
//! Layout, little-endian: `APOLLO1\n` · u64 length of the header · header (JSON) · then, for each
//! tensor in the header, exp_avg and exp_avg_sq, f32. Norms and counters are in the header: an f32
//! is written there as its bits.

use crate::optimizer::{Optimizer, Slot, moments_len, rank_of};
use crate::settings::{Rule, TensorKind};
use compute::{Device, NORM_PREVIOUS, NORM_SLOTS};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};

const MAGIC: &[u8; 8] = b"APOLLO1\n";
/// Values moved between device and file at a time.
const CHUNK: usize = 1 << 16;
/// No header is longer; what says otherwise is not a state.
const HEADER_MAX: u64 = 1 << 30;

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
    norm_bits: u32,
    lookup: BTreeMap<u32, Slot>,
}

/// What [`Optimizer::load`] took over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Applied steps.
    pub steps: u64,
    /// Tensors whose rank, shape or rule changed since: their moments start from zero.
    pub reset: Vec<String>,
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
            len: self.device.len(&self.states[i].exp_avg),
            norm_bits: norms[i * NORM_SLOTS + NORM_PREVIOUS].to_bits(),
            lookup: self.states[i].lookup.slots.iter().map(|(k, v)| (*k, *v)).collect(),
        });
        let header = Header { steps: self.steps, seed: self.settings.seed, tensors: tensors.collect() };
        let header = serde_json::to_vec(&header)?;
        out.write_all(MAGIC)?;
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for state in &self.states {
            for buffer in [&state.exp_avg, &state.exp_avg_sq] {
                write_buffer(&*self.device, buffer, out)?;
            }
        }
        Ok(())
    }

    /// Takes over a state that [`Optimizer::save`] wrote. A tensor that has since got another rank,
    /// shape or rule starts fresh and is named in the result. After an error the optimizer is as new.
    pub fn load(&mut self, input: &mut dyn Read) -> Result<Restored, StateError> {
        let result = self.try_load(input);
        if result.is_err() {
            let settings = self.settings.clone();
            *self = Optimizer::new(self.device.clone(), std::mem::take(&mut self.tensors), settings);
        }
        result
    }

    fn try_load(&mut self, input: &mut dyn Read) -> Result<Restored, StateError> {
        let header = read_header(input)?;
        let index: HashMap<String, usize> = self.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let mut restored = Restored { steps: header.steps, reset: Vec::new() };
        self.steps = header.steps;
        for saved in &header.tensors {
            let same = index.get(&saved.name).copied().filter(|&i| self.matches(i, saved));
            let Some(i) = same else {
                restored.reset.push(saved.name.clone());
                skip(input, saved.len * 8)?;
                continue;
            };
            check_lookup(saved)?;
            let norm = f32::from_bits(saved.norm_bits);
            self.device.write(&mut self.norms, i * NORM_SLOTS + NORM_PREVIOUS, &[norm]);
            let state = &mut self.states[i];
            state.lookup.slots = saved.lookup.iter().map(|(k, v)| (*k, *v)).collect();
            state.exp_avg = read_buffer(&*self.device, saved.len, input)?;
            state.exp_avg_sq = read_buffer(&*self.device, saved.len, input)?;
        }
        Ok(restored)
    }

    fn matches(&self, i: usize, saved: &Saved) -> bool {
        let t = &self.tensors[i];
        let len_fits = match t.kind {
            TensorKind::Lookup => saved.len.is_multiple_of(t.cols) && saved.len <= t.rows.saturating_mul(t.cols) * 2,
            _ => saved.len == moments_len(t, &self.settings),
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
    if &magic != MAGIC {
        return Err(StateError::Format(format!("begins with {magic:02x?}, not with {:?}", "APOLLO1")));
    }
    input.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_MAX {
        return Err(StateError::Format(format!("header of {length} bytes")));
    }
    let mut json = Vec::new();
    input.take(length).read_to_end(&mut json)?;
    serde_json::from_slice(&json).map_err(|e| StateError::Format(format!("header: {e}")))
}

/// Every slot lies inside the moments and belongs to one row.
fn check_lookup(saved: &Saved) -> Result<(), StateError> {
    let slots = saved.len / saved.cols.max(1);
    let mut seen = vec![false; saved.lookup.len()];
    for (row, slot) in &saved.lookup {
        let slot = slot.slot as usize;
        if slot >= slots || slot >= seen.len() || std::mem::replace(&mut seen[slot], true) {
            return Err(StateError::Format(format!("{}: row {row} has no slot of its own", saved.name)));
        }
    }
    Ok(())
}

fn write_buffer<D: Device>(device: &D, buffer: &D::Buffer, out: &mut dyn Write) -> io::Result<()> {
    let (len, mut values) = (device.len(buffer), [0f32; CHUNK].to_vec());
    let mut bytes = Vec::with_capacity(CHUNK * 4);
    for at in (0..len).step_by(CHUNK) {
        let values = &mut values[..CHUNK.min(len - at)];
        device.read(buffer, at, values);
        bytes.clear();
        values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
        out.write_all(&bytes)?;
    }
    Ok(())
}

fn read_buffer<D: Device>(device: &D, len: usize, input: &mut dyn Read) -> io::Result<D::Buffer> {
    let mut buffer = device.zeros(len);
    let mut bytes = vec![0; CHUNK * 4];
    for at in (0..len).step_by(CHUNK) {
        let bytes = &mut bytes[..CHUNK.min(len - at) * 4];
        input.read_exact(bytes)?;
        let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        device.write(&mut buffer, at, &values);
    }
    Ok(buffer)
}

fn skip(input: &mut dyn Read, len: usize) -> Result<(), StateError> {
    let copied = io::copy(&mut input.take(len as u64), &mut io::sink())?;
    if copied != len as u64 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(())
}
