// A causal depthwise convolution with SiLU behind it, and its backward.
//
// x, y, dx, dy, dp (t,C) · before (K-1,C): the inputs of the tokens before · w, dw (C,K)
// p = Σ_j w[c,j]·x[i-K+1+j,c] · y = p·σ(p) · dp = dy·σ(p)·(1 + p·(1 - σ(p)))
#include "tasks.cuh"

namespace conv_kernels {

// What every kernel here is given, by value.
struct Inputs {
    const float* x;
    const float* before;
    const void* w;
    uint32_t dtype, t, channels, width;

    // Element j of the window of token i.
    __device__ float input(uint32_t i, uint32_t j, uint32_t c) const {
        const uint32_t past = width - 1;
        return i + j < past ? before[(size_t)(i + j) * channels + c] : x[(size_t)(i + j - past) * channels + c];
    }
    __device__ float weight(uint32_t c, uint32_t j) const { return read_element(w, dtype, (uint64_t)c * width + j); }
    __device__ float sum(uint32_t i, uint32_t c) const {
        float sum = 0.f;
        for (uint32_t j = 0; j < width; j++) sum = fmaf(weight(c, j), input(i, j, c), sum);
        return sum;
    }
};

}  // namespace conv_kernels

// A thread has one element of y.
extern "C" __global__ void __launch_bounds__(256) causal_conv(float* y, conv_kernels::Inputs in) {
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (size_t)in.t * in.channels) return;
    const float p = in.sum((uint32_t)(index / in.channels), (uint32_t)(index % in.channels));
    y[index] = p / (1.f + expf(-p));
}

// dp from dy; a thread has one element.
extern "C" __global__ void __launch_bounds__(256) causal_conv_dp(float* dp, const float* dy, conv_kernels::Inputs in) {
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (size_t)in.t * in.channels) return;
    const float p = in.sum((uint32_t)(index / in.channels), (uint32_t)(index % in.channels));
    const float s = 1.f / (1.f + expf(-p));
    dp[index] = dy[index] * s * (1.f + p * (1.f - s));
}

// Token i is element j of the window of token i + K - 1 - j; a thread has one element of dx.
extern "C" __global__ void __launch_bounds__(256) causal_conv_dx(float* dx, const float* dp, conv_kernels::Inputs in) {
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (size_t)in.t * in.channels) return;
    const uint32_t i = (uint32_t)(index / in.channels), c = (uint32_t)(index % in.channels);
    float sum = 0.f;
    for (uint32_t j = 0; j < in.width; j++) {
        const uint32_t of = i + in.width - 1 - j;
        if (of < in.t) sum = fmaf(in.weight(c, j), dp[(size_t)of * in.channels + c], sum);
    }
    dx[index] = sum;
}

// A thread has one element of dw and adds up its tokens in order.
extern "C" __global__ void __launch_bounds__(256) causal_conv_dw(float* dw, const float* dp, conv_kernels::Inputs in) {
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= in.channels * in.width) return;
    // Neighbours have neighbouring channels, so that a warp reads whole lines.
    const uint32_t c = index % in.channels, j = index / in.channels;
    float sum = 0.f;
    for (uint32_t i = 0; i < in.t; i++) sum = fmaf(dp[(size_t)i * in.channels + c], in.input(i, j, c), sum);
    dw[(size_t)c * in.width + j] = sum;
}
