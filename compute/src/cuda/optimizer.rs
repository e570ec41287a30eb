//! The optimizer's kernels.

use super::{Buffer, Cuda, Weight};
use crate::{AdamwRows, ApolloCommit, ApolloPrepare, Factors, Limiter, Moments, Stream as RandomStream, Write};

#[allow(clippy::too_many_arguments)]
pub(super) fn normal_projection(_: &Cuda, _: &mut Buffer, _: usize, _: usize, _: RandomStream) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn prepare(_: &Cuda, _: &mut Buffer, _: &mut [ApolloPrepare<Buffer>]) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn limit(_: &Cuda, _: &mut Buffer, _: &[(usize, Limiter)]) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn commit(_: &Cuda, _: &mut Buffer, _: &mut [ApolloCommit<Cuda>]) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn adamw_factors(
    _: &Cuda,
    _: &Weight,
    _: &mut Buffer,
    _: &mut Buffer,
    _: &Factors<Buffer>,
    _: Moments,
    _: Write,
) {
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn adamw_rows(_: &Cuda, _: &mut [AdamwRows<Cuda>], _: Moments) {
    unimplemented!()
}
