//! Wrappers of the causal convolution's kernels.

use super::launch::Launch;
use super::optimizer::dtype_number;
use super::{Buffer, Cuda, Weight};
use crate::{Convolution, Device};

const THREADS: usize = 256;

/// As the kernels are given them.
#[repr(C)]
struct Inputs {
    x: u64,
    before: u64,
    w: u64,
    dtype: u32,
    t: u32,
    channels: u32,
    width: u32,
}

impl Inputs {
    fn new(x: &Buffer, before: &Buffer, w: &Weight, t: usize, shape: Convolution) -> Inputs {
        let Convolution { channels, width } = shape;
        assert_eq!((w.rows(), w.cols()), (1, channels * width), "weights of a convolution");
        Inputs {
            x: x.range(0, t * channels),
            before: before.range(0, (width - 1) * channels),
            w: w.ptr(),
            dtype: dtype_number(w.dtype()),
            t: t as u32,
            channels: channels as u32,
            width: width as u32,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let numbers = [self.dtype, self.t, self.channels, self.width].map(u32::to_ne_bytes);
        [self.x, self.before, self.w].map(u64::to_ne_bytes).concat().into_iter().chain(numbers.concat()).collect()
    }
}

/// See [`crate::Device::causal_conv`].
pub(super) fn causal_conv(
    cuda: &Cuda,
    y: &mut Buffer,
    x: &Buffer,
    before: &Buffer,
    w: &Weight,
    t: usize,
    shape: Convolution,
) {
    let len = t * shape.channels;
    Launch::new("causal_conv")
        .grid(len.div_ceil(THREADS), 1, 1)
        .block(THREADS)
        .arg(y.range(0, len))
        .bytes(&Inputs::new(x, before, w, t, shape).bytes())
        .run(cuda);
}

/// See [`crate::Device::causal_conv_backward`].
#[allow(clippy::too_many_arguments)]
pub(super) fn causal_conv_backward(
    cuda: &Cuda,
    dx: &mut Buffer,
    dw: &mut Buffer,
    dy: &Buffer,
    x: &Buffer,
    before: &Buffer,
    w: &Weight,
    t: usize,
    shape: Convolution,
) {
    let (len, weights, inputs) =
        (t * shape.channels, shape.channels * shape.width, Inputs::new(x, before, w, t, shape).bytes());
    let dp = cuda.uninit(len);
    let launch = |kernel, elements: usize, out: u64, from: u64| {
        let launch = Launch::new(kernel).grid(elements.div_ceil(THREADS), 1, 1).block(THREADS);
        launch.arg(out).arg(from).bytes(&inputs).run(cuda);
    };
    launch("causal_conv_dp", len, dp.ptr(), dy.range(0, len));
    launch("causal_conv_dx", len, dx.range(0, len), dp.ptr());
    launch("causal_conv_dw", weights, dw.range(0, weights), dp.ptr());
}
