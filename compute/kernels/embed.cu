// Rows by token: lookup, its gradient, and rows of the identity.
//
// W (vocab, n) in an inference server's memory · ids (t)
#include "common.cuh"

namespace embed_kernels {

// x (t,n): row i is row ids[i] of W. A block of the grid takes one row, blockIdx.y a piece of it. An id beyond W gives
// NaN, which the gates of a step find, rather than somebody else's memory.
template <typename T>
__device__ void lookup(float* x, const T* w, const uint32_t* ids, uint32_t n, uint32_t vocab) {
    const uint32_t id = ids[blockIdx.x];
    const uint32_t column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= n) return;
    x[(size_t)blockIdx.x * n + column] = id < vocab ? load(w, (size_t)id * n + column) : NAN;
}

}  // namespace embed_kernels

#define EMBED(NAME, T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) embed_##NAME(float* x, const T* w, const uint32_t* ids,           \
                                                                   uint32_t n, uint32_t vocab) {                        \
        embed_kernels::lookup<T>(x, w, ids, n, vocab);                                                                  \
    }
EMBED(f32, float)
EMBED(f16, f16)
EMBED(bf16, bf16)

// dst (rows,n) row index[i] += src row i, i < count. The block of the first i of a row adds all of that row's, in order,
// so a sum has one order and no atomics. Rows beyond dst are left out.
extern "C" __global__ void __launch_bounds__(256) scatter_add_rows(float* dst, const float* src, const uint32_t* index,
                                                                   uint32_t count, uint32_t n, uint32_t rows) {
    const uint32_t first = blockIdx.x, row = index[first];
    __shared__ uint32_t found;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    bool before = false;
    for (uint32_t i = threadIdx.x; i < first; i += blockDim.x) before |= index[i] == row;
    if (before) atomicAdd(&found, 1u);
    __syncthreads();
    if (found != 0 || row >= rows) return;
    for (uint32_t column = blockIdx.y * blockDim.x + threadIdx.x; column < n; column += gridDim.y * blockDim.x) {
        float sum = dst[(size_t)row * n + column];
        for (uint32_t i = first; i < count; i++) {
            if (index[i] == row) sum += src[(size_t)i * n + column];
        }
        dst[(size_t)row * n + column] = sum;
    }
}

// Rows of y (count,m) become zeros with a 1 in column ids[i]; a block takes a piece of one row.
extern "C" __global__ void __launch_bounds__(256) one_hot(float* y, const uint32_t* ids, uint32_t m) {
    const uint32_t column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column < m) y[(size_t)blockIdx.x * m + column] = column == ids[blockIdx.x] ? 1.f : 0.f;
}
