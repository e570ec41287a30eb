// Softmax cross entropy over large vocabularies, in place.
//
// logits (t,v) become scale·(softmax - onehot) · losses (t) = log Σ exp(logit) - logit[target]
//
// A row is cut into pieces of SEGMENT elements, a block each, because a decision has few rows and a vocabulary some
// hundred thousand tokens. The first kernel leaves each piece's maximum and Σ exp(x - maximum); the second adds a row's
// pieces in order and writes the gradient. Parts are f32, their sum f64.
#include "common.cuh"

namespace loss_kernels {

constexpr int THREADS = 256;
// Elements of a thread.
constexpr int EACH = 32;
constexpr uint32_t SEGMENT = THREADS * EACH;
constexpr uint32_t NO_TARGET = 0xFFFFFFFF;

}  // namespace loss_kernels

// stats (t, pieces, 2). A NaN among the logits makes its piece's sum NaN; infinity does too.
extern "C" __global__ void __launch_bounds__(256) cross_entropy_stats(float* stats, const float* logits,
                                                                      const uint32_t* targets, uint32_t v) {
    using namespace loss_kernels;
    const uint32_t row = blockIdx.y, piece = blockIdx.x;
    if (targets[row] == NO_TARGET) return;
    const float* x = logits + (size_t)row * v;
    const uint32_t first = piece * SEGMENT + threadIdx.x;
    float values[EACH], top = -INFINITY;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const uint32_t at = first + i * THREADS;
        values[i] = at < v ? x[at] : -INFINITY;
        top = fmaxf(top, values[i]);
    }
    top = block_max(top);
    // Of a piece that is minus infinity throughout, every term is exp(-inf - 0) = 0.
    const float from = top == -INFINITY ? 0.f : top;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += expf(values[i] - from);
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        float* out = stats + 2 * ((size_t)row * gridDim.x + piece);
        out[0] = from;
        out[1] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(256) cross_entropy_gradient(float* losses, float* logits, const float* stats,
                                                                         const uint32_t* targets, const float* scale,
                                                                         uint32_t v) {
    using namespace loss_kernels;
    const uint32_t row = blockIdx.y, piece = blockIdx.x, target = targets[row];
    float* x = logits + (size_t)row * v;
    const uint32_t first = piece * SEGMENT + threadIdx.x;
    if (target == NO_TARGET) {
        for (int i = 0; i < EACH; i++) {
            const uint32_t at = first + i * THREADS;
            if (at < v) x[at] = 0.f;
        }
        if (piece == 0 && threadIdx.x == 0) losses[row] = 0.f;
        return;
    }
    // Every warp computes the row's sum in the same order.
    const float* pieces = stats + 2 * (size_t)row * gridDim.x;
    const uint32_t lane = threadIdx.x % 32;
    float top = -INFINITY;
    for (uint32_t i = lane; i < gridDim.x; i += 32) {
        if (pieces[2 * i + 1] != 0.f) top = fmaxf(top, pieces[2 * i]);
    }
    top = warp_max(top);
    double sum = 0.0;
    for (uint32_t i = lane; i < gridDim.x; i += 32) {
        if (pieces[2 * i + 1] != 0.f) sum += static_cast<double>(pieces[2 * i + 1]) * expf(pieces[2 * i] - top);
    }
    sum = warp_sum(sum);
    const float factor = static_cast<float>(*scale / sum);
#pragma unroll 8
    for (int i = 0; i < EACH; i++) {
        const uint32_t at = first + i * THREADS;
        if (at >= v) break;
        const float before = x[at], gradient = expf(before - top) * factor;
        x[at] = at == target ? gradient - *scale : gradient;
        if (at == target) losses[row] = static_cast<float>(log(sum) + (static_cast<double>(top) - before));
    }
    // A target outside the vocabulary is the caller's mistake, and must not look like a loss.
    if (target >= v && piece == 0 && threadIdx.x == 0) losses[row] = NAN;
}
