// Operations element by element, sums over many buffers, and the outer product that checks need.
#include "common.cuh"

namespace pointwise_kernels {

constexpr int THREADS = 256;

__device__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Calls four(i) for whole groups of four elements 4·i.., one(i) for those left. The buffers begin at 16 bytes.
template <class Four, class One>
__device__ void for_each(size_t len, Four four, One one) {
    const size_t index = (size_t)blockIdx.x * THREADS + threadIdx.x, whole = len / 4;
    if (index < whole) {
        four(index);
    } else if (index - whole < len % 4) {
        one(4 * whole + (index - whole));
    }
}

__device__ float4& quad(float* x, size_t i) { return reinterpret_cast<float4*>(x)[i]; }
__device__ float4 quad(const float* x, size_t i) { return reinterpret_cast<const float4*>(x)[i]; }

__device__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// (dgate, dup) = (dh·up·σ(g)·(1 + g·(1 - σ(g))), dh·silu(g))
__device__ float2 swiglu_backward(float dh, float gate, float up) {
    const float s = sigmoid(gate);
    return make_float2(dh * up * s * (1.f + gate * (1.f - s)), dh * gate * s);
}

// A buffer of a list and how many of its elements count. It begins at 16 bytes.
struct Item {
    const float* data;
    uint64_t len;
};

// parts[item·gridDim.x + part] = Σ of term(x) over a part of the item: blockIdx.y is the item, blockIdx.x the part.
template <class Term>
__device__ void sum_parts(double* parts, const Item* items, Term term) {
    const Item item = items[blockIdx.y];
    double sum = 0.0;
    const uint64_t first = (uint64_t)blockIdx.x * THREADS + threadIdx.x, whole = item.len / 4;
    // A logit's gradients are millions of elements: many loads under way in each thread.
#pragma unroll 4
    for (uint64_t i = first; i < whole; i += (uint64_t)gridDim.x * THREADS) {
        const float4 v = quad(item.data, i);
        sum += (term(v.x) + term(v.y)) + (term(v.z) + term(v.w));
    }
    if (first < item.len % 4) sum += term(item.data[4 * whole + first]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

}  // namespace pointwise_kernels

// x[i] += y[i]
extern "C" __global__ void __launch_bounds__(256) add(float* x, const float* y, uint64_t len) {
    using namespace pointwise_kernels;
    for_each(
        len,
        [=](size_t i) {
            const float4 b = quad(y, i);
            float4& a = quad(x, i);
            a = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
        },
        [=](size_t i) { x[i] += y[i]; });
}

// h = silu(gate)·up
extern "C" __global__ void __launch_bounds__(256) swiglu(float* h, const float* gate, const float* up, uint64_t len) {
    using namespace pointwise_kernels;
    for_each(
        len,
        [=](size_t i) {
            const float4 g = quad(gate, i), u = quad(up, i);
            quad(h, i) = make_float4(pointwise_kernels::swiglu(g.x, u.x), pointwise_kernels::swiglu(g.y, u.y),
                                     pointwise_kernels::swiglu(g.z, u.z), pointwise_kernels::swiglu(g.w, u.w));
        },
        [=](size_t i) { h[i] = pointwise_kernels::swiglu(gate[i], up[i]); });
}

extern "C" __global__ void __launch_bounds__(256) swiglu_backward(float* dgate, float* dup, const float* dh,
                                                                  const float* gate, const float* up, uint64_t len) {
    using namespace pointwise_kernels;
    for_each(
        len,
        [=](size_t i) {
            const float4 d = quad(dh, i), g = quad(gate, i), u = quad(up, i);
            const float2 x = pointwise_kernels::swiglu_backward(d.x, g.x, u.x);
            const float2 y = pointwise_kernels::swiglu_backward(d.y, g.y, u.y);
            const float2 z = pointwise_kernels::swiglu_backward(d.z, g.z, u.z);
            const float2 w = pointwise_kernels::swiglu_backward(d.w, g.w, u.w);
            quad(dgate, i) = make_float4(x.x, y.x, z.x, w.x);
            quad(dup, i) = make_float4(x.y, y.y, z.y, w.y);
        },
        [=](size_t i) {
            const float2 both = pointwise_kernels::swiglu_backward(dh[i], gate[i], up[i]);
            dgate[i] = both.x;
            dup[i] = both.y;
        });
}

// h = x·σ(gate)
extern "C" __global__ void __launch_bounds__(256) sigmoid_gate(float* h, const float* x, const float* gate, uint64_t len) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len) h[i] = x[i] * pointwise_kernels::sigmoid(gate[i]);
}

// dx = dh·σ(g) · dgate = dh·x·σ(g)·(1 - σ(g))
extern "C" __global__ void __launch_bounds__(256) sigmoid_gate_backward(float* dx, float* dgate, const float* dh, const float* x,
                                                                        const float* gate, uint64_t len) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const float s = pointwise_kernels::sigmoid(gate[i]);
    dx[i] = dh[i] * s;
    dgate[i] = dh[i] * x[i] * s * (1.f - s);
}

// The first `columns` of each row from `src` to `dst`, whose rows have that many elements.
extern "C" __global__ void __launch_bounds__(256) copy_columns(float* dst, uint32_t dst_row, const float* src, uint32_t src_row,
                                                               uint32_t columns, uint64_t len) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const size_t row = i / columns, column = i % columns;
    dst[row * dst_row + column] = src[row * src_row + column];
}

extern "C" __global__ void __launch_bounds__(256) count_nonfinite_parts(double* parts, const pointwise_kernels::Item* items) {
    // The largest finite magnitude is below infinity; NaN is below nothing.
    pointwise_kernels::sum_parts(parts, items, [](float x) { return fabsf(x) < INFINITY ? 0.0 : 1.0; });
}

// *counter += the sum of all parts; one block.
extern "C" __global__ void __launch_bounds__(256) count_nonfinite_total(float* counter, const double* parts, uint32_t count) {
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *counter += static_cast<float>(sum);
}

extern "C" __global__ void __launch_bounds__(256) sum_squares_parts(double* parts, const pointwise_kernels::Item* items) {
    pointwise_kernels::sum_parts(parts, items, [](float x) { return static_cast<double>(x) * x; });
}

// out[i] = the sum of item i's parts, rounded once.
extern "C" __global__ void __launch_bounds__(256) sum_squares_total(float* out, const double* parts, uint32_t items,
                                                                    uint32_t parts_each) {
    const uint32_t item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= items) return;
    double sum = 0.0;
    for (uint32_t i = 0; i < parts_each; i++) sum += parts[(size_t)item * parts_each + i];
    out[item] = static_cast<float>(sum);
}

// g (m,n) += dyᵀ x over t rows: for collectors and checks, not for a step. A block takes (16,16) elements.
extern "C" __global__ void __launch_bounds__(256) outer_accumulate(float* g, const float* dy, const float* x, uint32_t t,
                                                                   uint32_t m, uint32_t n) {
    constexpr int TILE = 16;
    __shared__ float rows[TILE][TILE], columns[TILE][TILE];
    const uint32_t i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const uint32_t row = blockIdx.y * TILE + i, column = blockIdx.x * TILE + j;
    float sum = 0.f;
    for (uint32_t first = 0; first < t; first += TILE) {
        const bool inside = first + i < t;
        rows[i][j] = inside && blockIdx.y * TILE + j < m ? dy[(size_t)(first + i) * m + blockIdx.y * TILE + j] : 0.f;
        columns[i][j] = inside && column < n ? x[(size_t)(first + i) * n + column] : 0.f;
        __syncthreads();
#pragma unroll
        for (int k = 0; k < TILE; k++) sum = fmaf(rows[k][i], columns[k][j], sum);
        __syncthreads();
    }
    if (row < m && column < n) g[(size_t)row * n + column] += sum;
}
