//! Products with weights.

use super::{Buffer, Cuda, Weight};
use crate::LinearOutput;

pub(super) fn linear_group(_: &Cuda, _: &mut [LinearOutput<Cuda>], _: &Buffer, _: usize) {
    unimplemented!()
}

pub(super) fn linear_dx_group(_: &Cuda, _: &mut Buffer, _: &[(&Buffer, &Weight)], _: usize, _: bool) {
    unimplemented!()
}
