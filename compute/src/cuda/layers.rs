//! Wrappers of the kernels of a layer.

use super::{Buffer, Cuda, Ids, Weight};
use crate::{Attention, AttentionGrads, AttentionSaved, Factors, Past};

#[allow(clippy::too_many_arguments)]
pub(super) fn embed(_: &Cuda, _: &mut Buffer, _: &Weight, _: &Ids) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn sum_rows(_: &Cuda, _: &mut Buffer, _: &Buffer, _: usize, _: usize) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn outer_accumulate(_: &Cuda, _: &mut Buffer, _: &Factors<Buffer>) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn add(_: &Cuda, _: &mut Buffer, _: &Buffer, _: usize) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm(_: &Cuda, _: &mut Buffer, _: &Buffer, _: &Weight, _: f32, _: usize) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm_backward(
    _: &Cuda,
    _: &mut Buffer,
    _: &mut Buffer,
    _: &Buffer,
    _: &Buffer,
    _: &Weight,
    _: f32,
    _: usize,
) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rope(_: &Cuda, _: &mut Buffer, _: &Buffer, _: &Ids, _: usize, _: usize, _: usize, _: bool) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn attention(
    _: &Cuda,
    _: &mut Buffer,
    _: &mut Buffer,
    _: &Buffer,
    _: &Buffer,
    _: &Buffer,
    _: Past<Cuda>,
    _: usize,
    _: &Attention,
) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn attention_backward(
    _: &Cuda,
    _: AttentionGrads<Buffer>,
    _: AttentionSaved<Cuda>,
    _: usize,
    _: &Attention,
) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn swiglu(_: &Cuda, _: &mut Buffer, _: &Buffer, _: &Buffer, _: usize) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn swiglu_backward(_: &Cuda, _: &mut Buffer, _: &mut Buffer, _: &Buffer, _: &Buffer, _: &Buffer, _: usize) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn cross_entropy(_: &Cuda, _: &mut Buffer, _: &mut Buffer, _: &Ids, _: usize, _: &Buffer) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn count_nonfinite(_: &Cuda, _: &mut Buffer, _: usize, _: &[(&Buffer, usize)]) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn sum_squares(_: &Cuda, _: &mut Buffer, _: &[(&Buffer, usize)]) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn scatter_add_rows(_: &Cuda, _: &mut Buffer, _: &Buffer, _: &Ids, _: usize) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn one_hot(_: &Cuda, _: &mut Buffer, _: usize, _: &Ids, _: usize) {
    unimplemented!()
}
