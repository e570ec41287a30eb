// AdamW (Loshchilov & Hutter, arXiv:1711.05101), with the bias correction in the step.
//
// exp_avg, exp_avg_sq as the gradient · W' = (W - step·exp_avg/(sqrt(exp_avg_sq) + eps))·keep. Arithmetic is not
// contracted, so that moments and weights are those of the CPU wherever the gradient is.

#include "tasks.cuh"

// One element; the moments are written, the new weight is returned.
__device__ __forceinline__ float adamw(
    float w, float g, float* exp_avg, float* exp_avg_sq, const Decay& k, float step, float keep) {
    const float m = next_exp_avg(*exp_avg, g, k), v = next_exp_avg_sq(*exp_avg_sq, g, k);
    *exp_avg = m;
    *exp_avg_sq = v;
    return (w - step * m / (sqrtf(v) + k.eps)) * keep;
}

// One row of W that has a gradient, as `AdamRow` on the host.
struct AdamRow {
    uint32_t row, slot;
    float step;
};

// Rows of one tensor: row i of g (rows, n) belongs to rows[i].row of W and to rows[i].slot of the moments.
struct AdamwTask {
    void* w;
    const AdamRow* rows;
    const float* g;
    float* exp_avg;
    float* exp_avg_sq;
    uint32_t n, count;
    float keep;
    uint32_t dtype;
    RandomStream stream;
};

// Tiles of 1024 elements of g.
constexpr uint32_t ADAMW_TILE = 1024;
extern "C" __global__ void __launch_bounds__(256) adamw_rows(
    const AdamwTask* tasks, const uint32_t* first, uint32_t count, float beta1, float beta2, float eps) {
    const uint32_t which = find_task(first, count, blockIdx.x);
    const AdamwTask& task = tasks[which];
    const uint64_t begin = static_cast<uint64_t>(blockIdx.x - first[which]) * ADAMW_TILE;
    const uint64_t end = min(begin + ADAMW_TILE, static_cast<uint64_t>(task.count) * task.n);
    const Decay decay = {beta1, beta2, eps};
    for (uint64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const AdamRow row = task.rows[i / task.n];
        const uint64_t column = i % task.n, element = static_cast<uint64_t>(row.row) * task.n + column;
        const uint64_t slot = static_cast<uint64_t>(row.slot) * task.n + column;
        const float old = read_element(task.w, task.dtype, element);
        const float w = adamw(old, task.g[i], task.exp_avg + slot, task.exp_avg_sq + slot, decay, row.step, task.keep);
        write_element(task.w, task.dtype, element, w, task.stream);
    }
}

// A matrix whose gradient G = dyᵀ x is formed tile by tile.
extern "C" __global__ void __launch_bounds__(256) adamw_factors(
    void* w, uint32_t dtype, float* exp_avg, float* exp_avg_sq, const float* x, const float* dy, uint32_t t, uint32_t m,
    uint32_t n, float beta1, float beta2, float eps, float step, float keep, uint32_t key0, uint32_t key1,
    uint32_t stream_step, uint32_t stream_tensor) {
    const uint32_t across = (n + FORMED - 1) / FORMED;
    const uint32_t row0 = blockIdx.x / across * FORMED, column0 = blockIdx.x % across * FORMED;
    const RandomStream stream = {{key0, key1}, stream_step, stream_tensor};
    const Decay decay = {beta1, beta2, eps};
    float g[4][4];
    form_tile(g, x, dy, t, m, n, row0, column0);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t row = row0 + threadIdx.x / 16 * 4 + i, column = column0 + threadIdx.x % 16 * 4 + j;
            if (row >= m || column >= n) continue;
            const uint64_t element = static_cast<uint64_t>(row) * n + column;
            const float old = read_element(w, dtype, element);
            const float value = adamw(old, g[i][j], exp_avg + element, exp_avg_sq + element, decay, step, keep);
            write_element(w, dtype, element, value, stream);
        }
    }
}
