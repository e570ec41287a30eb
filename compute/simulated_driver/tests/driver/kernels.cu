// Kernels of the simulated driver's own tests: barriers, shuffles, shared memory and the tensor-core product.
#include "common.cuh"

extern "C" __global__ void test_scale(float* y, const float* x, uint32_t n, float factor) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = factor * x[i];
}

// Sums of a block, twice reversed through dynamic shared memory: out[block] is the sum, out[grid + i] is x[i].
extern "C" __global__ void __launch_bounds__(256) test_block(float* out, const float* x) {
    DYNAMIC_SHARED(float, reversed);
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, mirror = blockDim.x - 1 - threadIdx.x;
    reversed[mirror] = x[i];
    __syncthreads();
    float v = reversed[threadIdx.x];
    __syncthreads();
    reversed[mirror] = v;
    __syncthreads();
    out[gridDim.x + i] = reversed[threadIdx.x];
    float sum = block_sum(v);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// One warp, or a part of one: row k of out is what shuffle k gave each lane.
extern "C" __global__ void test_shuffles(uint32_t* out) {
    uint32_t lane = threadIdx.x, n = blockDim.x;
    out[lane] = __shfl_xor_sync(ALL_LANES, lane, 5);
    out[n + lane] = __shfl_down_sync(ALL_LANES, lane, 3);
    out[2 * n + lane] = __shfl_up_sync(ALL_LANES, lane, 3);
    out[3 * n + lane] = __shfl_sync(ALL_LANES, lane, 9);
    out[4 * n + lane] = __shfl_down_sync(ALL_LANES, lane, 3, 8);
    out[5 * n + lane] = __ballot_sync(ALL_LANES, lane % 3 == 0);
    out[6 * n + lane] = lane < 8 ? __shfl_sync(0x000000FF, lane, 2) : __shfl_sync(0xFFFFFF00, lane, 10);
}

// C (16,8) = A (16,16) · B (16,8); B is given as columns, (8,16). One warp.
extern "C" __global__ void test_product(float* c, const bf16* a, const bf16* b) {
    uint32_t g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto pair = [](const bf16* at) { return *reinterpret_cast<const uint32_t*>(at); };
    uint32_t fa[4] = {pair(a + g * 16 + 2 * q), pair(a + (g + 8) * 16 + 2 * q), pair(a + g * 16 + 2 * q + 8),
                      pair(a + (g + 8) * 16 + 2 * q + 8)};
    uint32_t fb[2] = {pair(b + g * 16 + 2 * q), pair(b + g * 16 + 2 * q + 8)};
    float fc[4] = {};
    mma_bf16(fc, fa, fb);
    for (uint32_t i = 0; i < 4; i++) c[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = fc[i];
}

// The 16-bit numbers, normal numbers and rounded values of elements 0..n, for comparison with compute.
extern "C" __global__ void test_random(uint32_t* numbers, float* normal, bf16* rounded_bf16, f16* rounded_f16,
                                       const float* values, RandomStream stream, uint32_t n) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint32_t random = random_u16(stream, i);
    double z[4];
    random_normal4(z, stream, i / 4);
    numbers[i] = random;
    normal[i] = static_cast<float>(z[i % 4]);
    rounded_bf16[i] = round_stochastic<bf16>(values[i], random);
    rounded_f16[i] = round_stochastic<f16>(values[i], random);
}

// What shared memory holds at the start of every block, and what a block leaves behind.
extern "C" __global__ void test_fresh_shared(uint32_t* out) {
    __shared__ float variable[2];
    DYNAMIC_SHARED(float, dynamic);
    out[2 * blockIdx.x] = __float_as_uint(variable[1]);
    out[2 * blockIdx.x + 1] = __float_as_uint(dynamic[0]);
    variable[1] = dynamic[0] = 1.0f;
}

extern "C" __global__ void test_store(float* at, int64_t index) { at[index] = 1.0f; }

extern "C" __global__ void test_load16(float* out, const float* at) {
    *out = reinterpret_cast<const float4*>(at)->x;
}

extern "C" __global__ void test_index(float* out, uint32_t index) {
    __shared__ float few[8];
    few[index] = 1.0f;
    *out = few[0];
}

extern "C" __global__ void test_divergent(float* out) {
    if (threadIdx.x < 10) return;
    __syncthreads();
    *out = 1.0f;
}
