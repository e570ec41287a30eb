// Work on many tensors in one launch: an array of tasks in device memory, and tiles that are counted through them.
#pragma once

#include "common.cuh"

// The last of `count` tasks whose first tile is at most `tile`, by a search with 32 probes at a time. All lanes come.
__device__ __forceinline__ uint32_t find_task(const uint32_t* first, uint32_t count, uint32_t tile) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t low = 0, stride = 1;
    while (stride * 32 < count) stride *= 32;
    for (; stride > 0; stride /= 32) {
        const uint32_t at = low + lane * stride;
        const bool before = at < count && first[at] <= tile;
        low += (__popc(__ballot_sync(ALL_LANES, before)) - 1) * stride;
    }
    return low;
}

// As `Dtype` on the host.
constexpr uint32_t DTYPE_F32 = 0, DTYPE_F16 = 1, DTYPE_BF16 = 2;

// Adam's constants, as the CPU computes with them.
struct Decay {
    float beta1, beta2, eps;
};

__device__ __forceinline__ float next_exp_avg(float exp_avg, float g, const Decay& k) {
    return k.beta1 * exp_avg + (1.0f - k.beta1) * g;
}
__device__ __forceinline__ float next_exp_avg_sq(float exp_avg_sq, float g, const Decay& k) {
    return k.beta2 * exp_avg_sq + (1.0f - k.beta2) * (g * g);
}

// One element of a foreign weight; 16-bit ones are rounded stochastically by their index.
__device__ __forceinline__ float read_element(const void* w, uint32_t dtype, uint64_t element) {
    if (dtype == DTYPE_F32) return static_cast<const float*>(w)[element];
    if (dtype == DTYPE_F16) return widen(static_cast<const f16*>(w)[element]);
    return widen(static_cast<const bf16*>(w)[element]);
}
__device__ __forceinline__ void write_element(
    void* w, uint32_t dtype, uint64_t element, float value, const RandomStream& stream) {
    if (dtype == DTYPE_F32) {
        static_cast<float*>(w)[element] = value;
    } else if (dtype == DTYPE_F16) {
        static_cast<f16*>(w)[element] = round_stochastic<f16>(value, random_u16(stream, element));
    } else {
        static_cast<bf16*>(w)[element] = round_stochastic<bf16>(value, random_u16(stream, element));
    }
}

// A tile of G, 64 by 64, in f32 arithmetic: a thread has rows 4·(thread/16).. +3, columns 4·(thread%16).. +3.
constexpr uint32_t FORMED = 64;
__device__ __forceinline__ void form_tile(
    float (&g)[4][4], const float* x, const float* dy, uint32_t t, uint32_t m, uint32_t n, uint32_t row0, uint32_t column0) {
    constexpr uint32_t K = 16;
    __align__(16) __shared__ float rows[K][FORMED];
    __align__(16) __shared__ float columns[K][FORMED];
    const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; i++) g[i][0] = g[i][1] = g[i][2] = g[i][3] = 0.0f;
    for (uint32_t top = 0; top < t; top += K) {
        const uint32_t depth = min(K, t - top);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < depth * FORMED; i += blockDim.x) {
            const uint32_t k = i / FORMED, c = i % FORMED;
            rows[k][c] = row0 + c < m ? dy[static_cast<size_t>(top + k) * m + row0 + c] : 0.0f;
            columns[k][c] = column0 + c < n ? x[static_cast<size_t>(top + k) * n + column0 + c] : 0.0f;
        }
        __syncthreads();
        for (uint32_t k = 0; k < depth; k++) {
            const float4 u = *reinterpret_cast<const float4*>(&rows[k][4 * ty]);
            const float4 v = *reinterpret_cast<const float4*>(&columns[k][4 * tx]);
            const float a[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                g[i][0] = fmaf(a[i], v.x, g[i][0]), g[i][1] = fmaf(a[i], v.y, g[i][1]);
                g[i][2] = fmaf(a[i], v.z, g[i][2]), g[i][3] = fmaf(a[i], v.w, g[i][3]);
            }
        }
    }
}
