// Root-mean-square norm of rows and its backward. Zhang & Sennrich, "Root Mean Square Layer Normalization".
//
// x, y, dx, dy (rows,n) · w, dw (n) · r = 1/sqrt(mean(x²) + eps)
// y = x·r·g, g = w + offset · dx += r·dy·g - x·r³/n·Σ(dy·g·x) · dw = Σ_rows dy·x·r
//
// A row is a hidden state (thousands of elements, a block takes it) or a head (some hundred, a warp takes it, eight rows
// a block): the number of threads of a row is a template's argument. dw needs sums down the columns: a second kernel
// takes them, with the r that the first left.
#include "common.cuh"

namespace norm_kernels {

constexpr int THREADS = 256;

// One row's place: its number and what its threads share.
template <int SHARE>
struct Row {
    static_assert(SHARE == 32 || SHARE == THREADS, "a warp or the block takes a row");
    const uint32_t index = blockIdx.x * (THREADS / SHARE) + threadIdx.x / SHARE;
    const uint32_t thread = threadIdx.x % SHARE;

    // Over the threads of the row, in every one of them.
    __device__ float sum(float v) const {
        if constexpr (SHARE == 32) {
            return warp_sum(v);
        } else {
            return block_sum(v);
        }
    }
};

template <typename T, int SHARE>
__device__ void norm(float* y, const float* x, const T* w, float eps, float offset, uint32_t n, uint32_t rows) {
    const Row<SHARE> row;
    if (row.index >= rows) return;
    x += (size_t)row.index * n;
    y += (size_t)row.index * n;
    float squares = 0.f;
    for (uint32_t i = row.thread; i < n; i += SHARE) squares = fmaf(x[i], x[i], squares);
    const float r = 1.f / sqrtf(row.sum(squares) / n + eps);
    for (uint32_t i = row.thread; i < n; i += SHARE) y[i] = x[i] * r * (load(w, i) + offset);
}

template <typename T, int SHARE>
__device__ void norm_backward(float* dx, float* inverse, const float* dy, const float* x, const T* w, float eps, float offset,
                              uint32_t n, uint32_t rows) {
    const Row<SHARE> row;
    if (row.index >= rows) return;
    dx += (size_t)row.index * n;
    dy += (size_t)row.index * n;
    x += (size_t)row.index * n;
    float squares = 0.f, products = 0.f;
    for (uint32_t i = row.thread; i < n; i += SHARE) {
        squares = fmaf(x[i], x[i], squares);
        products = fmaf(dy[i] * (load(w, i) + offset), x[i], products);
    }
    const float r = 1.f / sqrtf(row.sum(squares) / n + eps);
    const float pull = row.sum(products) * r * r * r / n;
    for (uint32_t i = row.thread; i < n; i += SHARE) dx[i] += dy[i] * (load(w, i) + offset) * r - x[i] * pull;
    if (row.thread == 0) inverse[row.index] = r;
}

// Threads of a block that sums columns: 32 columns, and as many rows at a time.
constexpr int LANES = 32;

// sums[c] = Σ_rows term(row, c): a thread takes every 32nd row of a column, then the 32 sums are added in order.
template <class Term>
__device__ void column_sums(float* sums, uint32_t rows, uint32_t n, Term term) {
    __shared__ float partial[LANES][LANES + 1];
    const uint32_t lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
    const uint32_t column = blockIdx.x * LANES + lane;
    float sum = 0.f;
    if (column < n) {
#pragma unroll 8
        for (uint32_t row = first; row < rows; row += LANES) sum += term(row, column);
    }
    partial[first][lane] = sum;
    __syncthreads();
    if (first == 0 && column < n) {
        sum = 0.f;
        for (int i = 0; i < LANES; i++) sum += partial[i][lane];
        sums[column] = sum;
    }
}

}  // namespace norm_kernels

#define RMS_NORM(NAME, T, SIZE, SHARE)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_##SIZE##_##NAME(                                              \
        float* y, const float* x, const T* w, float eps, float offset, uint32_t n, uint32_t rows) {                          \
        norm_kernels::norm<T, SHARE>(y, x, w, eps, offset, n, rows);                                                         \
    }                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) rms_norm_backward_##SIZE##_##NAME(                                     \
        float* dx, float* inverse, const float* dy, const float* x, const T* w, float eps, float offset, uint32_t n,         \
        uint32_t rows) {                                                                                                     \
        norm_kernels::norm_backward<T, SHARE>(dx, inverse, dy, x, w, eps, offset, n, rows);                                  \
    }
RMS_NORM(f32, float, head, 32)
RMS_NORM(f16, f16, head, 32)
RMS_NORM(bf16, bf16, head, 32)
RMS_NORM(f32, float, hidden, 256)
RMS_NORM(f16, f16, hidden, 256)
RMS_NORM(bf16, bf16, hidden, 256)

// dw (n) = Σ_rows dy·x·inverse.
extern "C" __global__ void __launch_bounds__(1024) rms_norm_dw(float* dw, const float* dy, const float* x,
                                                               const float* inverse, uint32_t n, uint32_t rows) {
    norm_kernels::column_sums(dw, rows, n, [=](uint32_t row, uint32_t column) {
        const size_t at = (size_t)row * n + column;
        return dy[at] * x[at] * inverse[row];
    });
}

// db (n) = Σ_rows dy.
extern "C" __global__ void __launch_bounds__(1024) sum_rows(float* db, const float* dy, uint32_t n, uint32_t rows) {
    norm_kernels::column_sums(db, rows, n, [=](uint32_t row, uint32_t column) { return dy[(size_t)row * n + column]; });
}
