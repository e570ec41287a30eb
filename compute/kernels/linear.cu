// Products with foreign weights: y = x Wᵀ + b and dx = Σ dy W, for up to four weights in one launch.
//
// x (t,n) · W (m,n) · y, dy (t,m) · dx (t,n); x, dy, y, dx are f32, W and b have the server's dtype.
//
// `linear_bf16_*` and `linear_dx_bf16_*` are for the few rows of a decision: t <= 64. Such a product is a stream of W,
// so everything is made for bytes in flight: W goes from global memory straight into tensor-core fragments, three
// chunks ahead of its use, and passes through no shared memory. What makes that possible is that the order of k within
// a chunk is free as long as both operands have the same:
//   y = x Wᵀ   A is W, 16 rows of m by 64 of k = n: a lane's 16-byte load is the k of two steps of one row
//   dx = dy W  A is Wᵀ, 32 columns by 32 of k = m: a lane loads 8 bytes of 8 rows and pairs rows by byte permutes
// B is x or dy in shared memory, each value as the sum of two bf16 (relative error 2^-17): a product takes two of the
// tensor cores' multiplications, which the stream of W hides, and has the precision of f32. Warps of a block share the work on k, and so do blocks where the outputs are
// few; sums are formed in a fixed order, by a tree in the block and by the last block to arrive.
//
// `product_*` is the plain product in f32 arithmetic, for f32 and f16 weights.

#include "common.cuh"

// One weight of a group.
struct Product {
    const uint16_t* w;     // bf16
    const bf16* bias;      // forward: (m), or null
    const float* in;       // forward: x; backward: dy
    float* out;            // forward: y; backward: dx
    uint32_t m;
    uint32_t first;  // forward: its first tile; backward: its first chunk of k
};

struct ProductGroup {
    Product of[4];
    uint32_t count;
    uint32_t t;
    uint32_t n;
    uint32_t chunks;      // of k: 64 elements of n forward, 32 of m backward, a weight's last one perhaps not full
    uint32_t warps_k;     // warps of a block that share a tile, a power of two
    uint32_t splits;      // blocks that share a tile
    uint32_t accumulate;  // backward: dx += instead of dx =
    float* partial;       // sums of the blocks of a tile, if splits > 1
    uint32_t* counters;   // one per tile, zero between launches
};

// The product to which a tile or a chunk belongs. Indices are constants so that the group stays in parameter memory.
__device__ __forceinline__ Product product_at(const ProductGroup& group, uint32_t at) {
    Product p = group.of[0];
#pragma unroll
    for (uint32_t i = 1; i < 4; i++) {
        if (i < group.count && at >= group.of[i].first) p = group.of[i];
    }
    return p;
}

// Four f32 of a row from element k on, zeros from `end` on.
__device__ __forceinline__ float4 four_values(const float* row, uint32_t k, uint32_t end, bool aligned) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (aligned && k + 4 <= end) {
        v = *reinterpret_cast<const float4*>(row + k);
    } else {
        if (k < end) v.x = row[k];
        if (k + 1 < end) v.y = row[k + 1];
        if (k + 2 < end) v.z = row[k + 2];
        if (k + 3 < end) v.w = row[k + 3];
    }
    return v;
}

// 2·WORDS elements from `row` + k on, packed in words; zeros from `end` on.
template <int WORDS, bool VECTOR>
__device__ __forceinline__ void load_weights(uint32_t (&out)[WORDS], const uint16_t* row, uint32_t k, uint32_t end) {
    if constexpr (VECTOR) {
        if (k >= end) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) out[i] = 0;
        } else if constexpr (WORDS == 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(row + k);
            out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        } else {
            const uint2 v = *reinterpret_cast<const uint2*>(row + k);
            out[0] = v.x, out[1] = v.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const uint32_t low = k + 2 * i < end ? row[k + 2 * i] : 0;
            const uint32_t high = k + 2 * i + 1 < end ? row[k + 2 * i + 1] : 0;
            out[i] = low | high << 16;
        }
    }
}

// Tokens in groups of 8: `NT` of them. A block's copy of the activations has `K` elements of k per token; rows are 64
// bytes off a multiple of 128, so that the 16-byte loads of a quarter of a warp meet no bank twice.
template <int NT>
struct Staged {
    static constexpr uint32_t K = 2048 / NT;
    static constexpr uint32_t ROW = K + 32;
};

template <bool FORWARD, int NT, bool VECTOR>
__device__ __forceinline__ void skinny_product(const ProductGroup& group) {
    constexpr uint32_t CHUNK = FORWARD ? 64 : 32;  // of k
    constexpr uint32_t COLS = FORWARD ? 16 : 32;   // outputs of a warp
    constexpr int TILES = COLS / 16;
    constexpr int DEPTH = 3;
    // Both at once do not fit in the registers of a thread there.
    constexpr int PARTS = FORWARD || NT != 4 ? 2 : 1;
    constexpr uint32_t ROW = Staged<NT>::ROW;
    // The upper bf16 of every value, and then the lower.
    DYNAMIC_SHARED(uint16_t, staged);
    uint16_t* const lower = staged + 8 * NT * ROW;
    __shared__ uint32_t is_last;

    const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const uint32_t warps_k = group.warps_k, warps_o = blockDim.x / 32 / warps_k;
    const uint32_t wk = threadIdx.x / 32 / warps_o, wo = threadIdx.x / 32 % warps_o;
    const uint32_t t = group.t, n = group.n, tile = blockIdx.x;

    const Product own = FORWARD ? product_at(group, tile) : group.of[0];
    const uint32_t outputs = FORWARD ? own.m : n;
    const uint32_t first = ((FORWARD ? tile - own.first : tile) * warps_o + wo) * COLS;
    const uint32_t c0 = static_cast<uint64_t>(group.chunks) * blockIdx.y / group.splits;
    const uint32_t c1 = static_cast<uint64_t>(group.chunks) * (blockIdx.y + 1) / group.splits;

    // Rows of W beyond the outputs are not read: the last one stands for them, and its results are dropped.
    const uint32_t output = min(first + (FORWARD ? g : 4 * g), outputs - (FORWARD || !VECTOR ? 1 : 4));
    const uint32_t output8 = min(first + g + 8, outputs - 1);
    const uint16_t* const row = as_global(own.w + static_cast<size_t>(output) * n);
    const uint16_t* const row8 = as_global(own.w + static_cast<size_t>(output8) * n);

    uint32_t w[DEPTH][16];
    float acc[TILES][NT][4];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) acc[i][j][0] = acc[i][j][1] = acc[i][j][2] = acc[i][j][3] = 0.0f;
    }

    // The chunk that this warp meets in iteration i, if there is one.
    const uint32_t iterations = (c1 - c0 + warps_k - 1) / warps_k;
    auto load = [&](uint32_t (&to)[16], uint32_t i) {
        const uint32_t c = c0 + i * warps_k + wk;
        if (c >= c1) return;
        if constexpr (FORWARD) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t k = c * CHUNK + 32 * h + 8 * q;
                load_weights<4, VECTOR>(reinterpret_cast<uint32_t(&)[4]>(to[8 * h]), row, k, n);
                load_weights<4, VECTOR>(reinterpret_cast<uint32_t(&)[4]>(to[8 * h + 4]), row8, k, n);
            }
        } else {
            const Product p = product_at(group, c);
            const uint32_t k = (c - p.first) * CHUNK + 8 * q;
            const uint16_t* const from = as_global(p.w + static_cast<size_t>(k) * n);
#pragma unroll
            for (uint32_t r = 0; r < 8; r++) {
                const uint16_t* const line = from + static_cast<size_t>(r) * n;
                load_weights<2, VECTOR>(reinterpret_cast<uint32_t(&)[2]>(to[2 * r]), line, output, k + r < p.m ? n : 0);
            }
        }
    };
    auto multiply = [&](const uint32_t (&from)[16], uint32_t local) {
        const uint32_t b_at = g * ROW + local * CHUNK + 8 * q;
#pragma unroll
        for (int h = 0; h < (FORWARD ? 2 : 1); h++) {
            // Both steps of 16 of this half, for each tile of 16 outputs.
            uint32_t a[2][TILES][4];
#pragma unroll
            for (int s = 0; s < 2; s++) {
                if constexpr (FORWARD) {
                    a[s][0][0] = from[8 * h + 2 * s], a[s][0][1] = from[8 * h + 4 + 2 * s];
                    a[s][0][2] = from[8 * h + 2 * s + 1], a[s][0][3] = from[8 * h + 4 + 2 * s + 1];
                } else {
                    // Tile p: rows g are columns 4g + 2p, rows g + 8 columns 4g + 2p + 1.
#pragma unroll
                    for (int p = 0; p < TILES; p++) {
                        const uint32_t r0 = from[8 * s + p], r1 = from[8 * s + 2 + p];
                        const uint32_t r2 = from[8 * s + 4 + p], r3 = from[8 * s + 6 + p];
                        a[s][p][0] = (r0 & 0xffffu) | r1 << 16, a[s][p][1] = r0 >> 16 | (r1 & 0xffff0000u);
                        a[s][p][2] = (r2 & 0xffffu) | r3 << 16, a[s][p][3] = r2 >> 16 | (r3 & 0xffff0000u);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
#pragma unroll PARTS
                for (int part = 0; part < 2; part++) {
                    const uint16_t* const at = (part == 0 ? lower : staged) + b_at + 8 * j * ROW + 32 * h;
                    const uint4 b = *reinterpret_cast<const uint4*>(at);
                    const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
#pragma unroll
                    for (int p = 0; p < TILES; p++) {
                        mma_bf16(acc[p][j], a[0][p], b0);
                        mma_bf16(acc[p][j], a[1][p], b1);
                    }
                }
            }
        }
    };
    // Copies the activations of the chunks from c on, as many as fit.
    auto stage = [&](uint32_t c) {
        const uint32_t fours = min(Staged<NT>::K, (c1 - c) * CHUNK) / 4;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < 8 * NT * fours; i += blockDim.x) {
            const uint32_t token = i / fours, at = i % fours * 4;
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (token < t) {
                if (FORWARD) {
                    v = four_values(as_global(own.in) + static_cast<size_t>(token) * n, c * CHUNK + at, n, n % 4 == 0);
                } else {
                    const Product p = product_at(group, c + at / CHUNK);
                    const uint32_t k = (c - p.first) * CHUNK + at;
                    v = four_values(as_global(p.in) + static_cast<size_t>(token) * p.m, k, p.m, p.m % 4 == 0);
                }
            }
            const uint2 high = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
            const float2 xy = unpack_bf16(high.x), zw = unpack_bf16(high.y);
            *reinterpret_cast<uint2*>(staged + token * ROW + at) = high;
            *reinterpret_cast<uint2*>(lower + token * ROW + at) =
                make_uint2(pack_bf16(v.x - xy.x, v.y - xy.y), pack_bf16(v.z - zw.x, v.w - zw.y));
        }
        __syncthreads();
    };

#pragma unroll
    for (int s = 0; s < DEPTH; s++) load(w[s], s);
    const uint32_t per_stage = Staged<NT>::K / CHUNK / warps_k;
    for (uint32_t i = 0; i < iterations; i += DEPTH) {
#pragma unroll
        for (int s = 0; s < DEPTH; s++) {
            if (i + s >= iterations) break;
            const uint32_t local = (i + s) % per_stage;
            if (local == 0) stage(c0 + (i + s) * warps_k);
            if (c0 + (i + s) * warps_k + wk < c1) multiply(w[s], local * warps_k + wk);
            load(w[s], i + s + DEPTH);
        }
    }

    // Sum over the warps of a tile.
    constexpr uint32_t VALUES = TILES * NT * 4;
    float* const sums = reinterpret_cast<float*>(staged);
    for (uint32_t half = warps_k / 2; half > 0; half /= 2) {
        __syncthreads();
        float* const slot = sums + (wk % half * warps_o + wo) * VALUES * 32 + lane;
        if (wk >= half && wk < 2 * half) {
#pragma unroll
            for (uint32_t v = 0; v < VALUES; v++) slot[v * 32] = acc[v / (4 * NT)][v / 4 % NT][v % 4];
        }
        __syncthreads();
        if (wk < half) {
#pragma unroll
            for (uint32_t v = 0; v < VALUES; v++) acc[v / (4 * NT)][v / 4 % NT][v % 4] += slot[v * 32];
        }
    }
    // Sum over the blocks of a tile, by the last to arrive.
    if (group.splits > 1) {
        const uint32_t per_block = warps_o * VALUES * 32;
        float* const of_tile = group.partial + static_cast<size_t>(tile) * group.splits * per_block + wo * VALUES * 32 + lane;
        if (wk == 0) {
            float* const slot = of_tile + static_cast<size_t>(blockIdx.y) * per_block;
#pragma unroll
            for (uint32_t v = 0; v < VALUES; v++) slot[v * 32] = acc[v / (4 * NT)][v / 4 % NT][v % 4];
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            // Between the barriers a fence of one thread is one of the block's: what was written above is seen before
            // the count, and what is read below was written before the last count.
            __threadfence();
            is_last = atomicAdd(group.counters + tile, 1u) + 1 == group.splits;
            __threadfence();
            if (is_last) group.counters[tile] = 0;
        }
        __syncthreads();
        if (!is_last) return;
        if (wk == 0) {
#pragma unroll
            for (uint32_t v = 0; v < VALUES; v++) acc[v / (4 * NT)][v / 4 % NT][v % 4] = of_tile[v * 32];
            for (uint32_t split = 1; split < group.splits; split++) {
                const float* const slot = of_tile + static_cast<size_t>(split) * per_block;
#pragma unroll
                for (uint32_t v = 0; v < VALUES; v++) acc[v / (4 * NT)][v / 4 % NT][v % 4] += slot[v * 32];
            }
        }
    }
    if (wk != 0) return;

    float* const all_out = as_global(own.out);
    if constexpr (FORWARD) {
        float b[2] = {0.0f, 0.0f};
        if (own.bias) b[0] = widen(own.bias[output]), b[1] = widen(own.bias[output8]);
#pragma unroll
        for (int v = 0; v < 4 * NT; v++) {
            const uint32_t token = v / 4 * 8 + 2 * q + v % 2, to = first + g + (v % 4 < 2 ? 0 : 8);
            if (token < t && to < outputs) all_out[static_cast<size_t>(token) * outputs + to] = acc[0][v / 4][v % 4] + b[v % 4 / 2];
        }
    } else {
#pragma unroll
        for (int v = 0; v < 2 * NT; v++) {
            const uint32_t token = v / 2 * 8 + 2 * q + v % 2, to = first + 4 * g;
            if (token >= t) continue;
            float* const out = all_out + static_cast<size_t>(token) * n + to;
            const int j = v / 2, b = v % 2;
            float4 sum = make_float4(acc[0][j][b], acc[0][j][2 + b], acc[1][j][b], acc[1][j][2 + b]);
            if (VECTOR) {
                if (to >= n) continue;
                if (group.accumulate) {
                    const float4 old = *reinterpret_cast<const float4*>(out);
                    sum = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
                }
                *reinterpret_cast<float4*>(out) = sum;
            } else {
                const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) {
                    if (to + i < n) out[i] = group.accumulate ? out[i] + four[i] : four[i];
                }
            }
        }
    }
}

// `linear_bf16_t32` is for t <= 32 and so on; the accumulators of 64 tokens leave room for 256 threads a block. `any`:
// rows of W that are not aligned to the vector loads (16 bytes forward, 8 backward), for all t <= 64.
#define SKINNY(suffix, groups, vector, threads)                                                              \
    extern "C" __global__ void __launch_bounds__(threads, 1) linear_bf16_##suffix(const ProductGroup group) {   \
        skinny_product<true, groups, vector>(group);                                                         \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(threads, 1) linear_dx_bf16_##suffix(const ProductGroup group) { \
        skinny_product<false, groups, vector>(group);                                                        \
    }
SKINNY(t8, 1, true, 512)
SKINNY(t16, 2, true, 512)
SKINNY(t32, 4, true, 512)
SKINNY(t64, 8, true, 256)
SKINNY(any, 8, false, 256)

// out (t, outputs) = in (t, depth) B, or += if `accumulate`; B (depth, outputs) is W read with strides: element (k,o)
// of B lies at k·stride_k + o·stride_o, one of which is 1. A block makes 32 rows by 64 outputs, a thread 2 by 4.
template <typename T>
__device__ __forceinline__ void plain_product(
    float* out, const float* in, const T* w, const T* bias, uint32_t t, uint32_t depth, uint32_t outputs,
    uint32_t stride_k, uint32_t stride_o, uint32_t accumulate) {
    constexpr uint32_t K = 16, ROWS = 32, OUTPUTS = 64;
    __shared__ float a[K][ROWS + 1];
    __shared__ float b[K][OUTPUTS + 1];
    const uint32_t first = blockIdx.x * OUTPUTS, top = blockIdx.y * ROWS;
    const uint32_t x = threadIdx.x % 16, y = threadIdx.x / 16;
    float sum[2][4] = {};
    for (uint32_t k0 = 0; k0 < depth; k0 += K) {
        for (uint32_t i = threadIdx.x; i < K * ROWS; i += blockDim.x) {
            const uint32_t k = i % K, row = i / K;
            const bool inside = k0 + k < depth && top + row < t;
            a[k][row] = inside ? in[static_cast<size_t>(top + row) * depth + k0 + k] : 0.0f;
        }
        for (uint32_t i = threadIdx.x; i < K * OUTPUTS; i += blockDim.x) {
            const uint32_t k = stride_k == 1 ? i % K : i / OUTPUTS, o = stride_k == 1 ? i / K : i % OUTPUTS;
            const bool inside = k0 + k < depth && first + o < outputs;
            const size_t at = static_cast<size_t>(k0 + k) * stride_k + static_cast<size_t>(first + o) * stride_o;
            b[k][o] = inside ? widen(w[at]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (uint32_t k = 0; k < K; k++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(a[k][y + 16 * i], b[k][x + 16 * j], sum[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t row = top + y + 16 * i, o = first + x + 16 * j;
            if (row >= t || o >= outputs) continue;
            float* const to = out + static_cast<size_t>(row) * outputs + o;
            const float value = sum[i][j] + (bias ? widen(bias[o]) : 0.0f);
            *to = accumulate ? *to + value : value;
        }
    }
}

#define PLAIN(suffix, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) product_##suffix(                                       \
        float* out, const float* in, const T* w, const T* bias, uint32_t t, uint32_t depth, uint32_t outputs, \
        uint32_t stride_k, uint32_t stride_o, uint32_t accumulate) {                                          \
        plain_product<T>(out, in, w, bias, t, depth, outputs, stride_k, stride_o, accumulate);                \
    }
PLAIN(f32, float)
PLAIN(f16, f16)

// Activations for a matrix library's products: each as the sum of two bf16, rounded to nearest even.
extern "C" __global__ void activations_bf16(uint16_t* upper, uint16_t* lower, const float* in, uint64_t len) {
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += stride) {
        const float x = in[i];
        const uint32_t high = pack_bf16(x, 0.0f);
        upper[i] = high & 0xffffu;
        lower[i] = pack_bf16(x - unpack_bf16(high).x, 0.0f) & 0xffffu;
    }
}

// y (t,m) += b (m) in every row, after a matrix library's product.
extern "C" __global__ void __launch_bounds__(256) add_bias_bf16(float* y, const bf16* bias, uint32_t m) {
    const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column < m) y[static_cast<size_t>(blockIdx.y) * m + column] += widen(bias[column]);
}
