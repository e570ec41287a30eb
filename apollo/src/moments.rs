//! Moments of one tensor, and the slots of a lookup's rows.
//!
//! C = max(m,n) · r = min(rank, m, n) · compressed moments (C,r) · dense moments (m,n) ·
//! moments of a lookup (slots, n): only rows that had a gradient have a slot, under a cap.

use crate::settings::{Rule, Settings, Tensor, TensorKind};
use compute::{AdamRow, Device, Dtype};
use std::collections::HashMap;

/// Compressed or dense moments of one tensor; empty for a frozen one.
pub(crate) struct State<D: Device> {
    pub exp_avg: D::Stored,
    pub exp_avg_sq: D::Stored,
    /// Steps in which the tensor had a gradient: fewer than all, if it is an expert's. Those of a lookup are counted by rows.
    pub gradients: u64,
    pub lookup: Lookup,
}

/// Which rows of a lookup have moments, and how many gradients each has had.
#[derive(Default)]
pub(crate) struct Lookup {
    /// row -> (slot, gradients so far, step of the last one)
    pub slots: HashMap<u32, Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Slot {
    pub slot: u32,
    pub gradients: u64,
    pub last_step: u64,
}

impl<D: Device> State<D> {
    pub fn new(device: &D, tensor: &Tensor, settings: &Settings) -> State<D> {
        let zeros = || device.stored(moments_dtype(tensor, settings), moments_len(tensor, settings));
        State { exp_avg: zeros(), exp_avg_sq: zeros(), gradients: 0, lookup: Lookup::default() }
    }

    /// Gives each row a slot of moments: its own, a free one, or that of the row unused for longest.
    pub fn assign_slots(
        &mut self,
        device: &D,
        rows: &[u32],
        cols: usize,
        capacity: usize,
        now: u64,
        step_of: impl Fn(u64) -> f32,
    ) -> Vec<AdamRow> {
        let wanted = self.lookup.slots.len() + rows.iter().filter(|r| !self.lookup.slots.contains_key(r)).count();
        self.grow(device, wanted.min(capacity) * cols, capacity * cols);
        // First, so that no row of this step makes room for another.
        for row in rows {
            if let Some(slot) = self.lookup.slots.get_mut(row) {
                slot.last_step = now;
            }
        }
        rows.iter()
            .map(|&row| {
                let slot = self.lookup.take(row, capacity as u32, now, |slot| {
                    let zeros = vec![0.0; cols];
                    device.write_stored(&mut self.exp_avg, slot as usize * cols, &zeros);
                    device.write_stored(&mut self.exp_avg_sq, slot as usize * cols, &zeros);
                });
                AdamRow { row, slot: slot.slot, step: step_of(slot.gradients) }
            })
            .collect()
    }

    /// To at least `len` values, which is at most `most`.
    fn grow(&mut self, device: &D, len: usize, most: usize) {
        for buffer in [&mut self.exp_avg, &mut self.exp_avg_sq] {
            let old = device.stored_len(buffer);
            if len > old {
                // Doubling keeps the number of copies small.
                let mut larger = device.stored(device.stored_dtype(buffer), len.max((2 * old).min(most)));
                device.copy_stored(&mut larger, 0, buffer, 0, old);
                *buffer = larger;
            }
        }
    }
}

impl Lookup {
    /// The slot of `row` with this gradient counted; `clear` zeroes a slot that changes hands.
    fn take(&mut self, row: u32, capacity: u32, now: u64, mut clear: impl FnMut(u32)) -> Slot {
        if let Some(slot) = self.slots.get_mut(&row) {
            slot.gradients += 1;
            slot.last_step = now;
            return *slot;
        }
        let used = self.slots.len() as u32;
        let slot = if used < capacity {
            used
        } else {
            let oldest = self.slots.iter().map(|(row, s)| (s.last_step, *row)).min().expect("capacity is above 0").1;
            let slot = self.slots.remove(&oldest).expect("it was just found").slot;
            clear(slot);
            slot
        };
        let slot = Slot { slot, gradients: 1, last_step: now };
        self.slots.insert(row, slot);
        slot
    }
}

/// What the moments of a tensor are stored in. A vector has so few that halving them saves nothing.
pub(crate) fn moments_dtype(tensor: &Tensor, settings: &Settings) -> Dtype {
    if tensor.kind == TensorKind::Vector { Dtype::F32 } else { settings.moments }
}

/// Values in each moment of a tensor; a lookup grows with the rows that it sees.
pub(crate) fn moments_len(tensor: &Tensor, settings: &Settings) -> usize {
    match (tensor.effective_rule(), tensor.kind) {
        (Rule::Frozen, _) | (_, TensorKind::Lookup) => 0,
        (Rule::Apollo, _) => rank_of(tensor, settings) * tensor.rows.max(tensor.cols),
        (Rule::AdamW, _) => tensor.rows * tensor.cols,
    }
}

/// Bytes of the moments of these tensors before any row of a lookup was seen: what [`crate::Optimizer::state_bytes`] says then.
pub fn state_bytes(tensors: &[Tensor], settings: &Settings) -> u64 {
    let bytes = |tensor: &Tensor| 2 * moments_len(tensor, settings) * moments_dtype(tensor, settings).size();
    tensors.iter().map(|tensor| bytes(tensor) as u64).sum()
}

/// min(rank, m, n).
pub(crate) fn rank_of(tensor: &Tensor, settings: &Settings) -> usize {
    settings.rank.min(tensor.rows).min(tensor.cols)
}
