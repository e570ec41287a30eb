// APOLLO (arXiv:2412.05270, Algorithm 1) on gradients that stay in factors, for all tensors of a model per launch.
//
// G (m,n) = dyᵀ x over t rows, never formed as a whole · big (t,C), C = max(m,n): the factor with the channels ·
// small (t,d), d = min(m,n) · P (r,d) · q = small Pᵀ (t,r) · R = bigᵀ q (C,r), channel-major · exp_avg, exp_avg_sq (C,r)
// N = exp_avg/(sqrt(exp_avg_sq) + eps) · s[c] = ‖N_c‖/(‖R_c‖ + 1e-8) · U = G·diag(s) or diag(s)·G.
//
// First pass: project, channels (squares of N and R, and s), gram, norm. Second pass: project, channels (moments),
// write. ‖U‖² = <A Aᵀ, B Bᵀ> over two (t,t) Gram matrices in f64, for every t: the rounding of f64 leaves nothing to
// fear from cancellation, and where t is so large that forming G were cheaper, the product is a small part of a step.
//
// The write is the one kernel that moves as many bytes as the weights have. G is formed on tensor cores from factors
// split in two bf16 (hi·hi + hi·lo + lo·hi, relative error 2^-16), and a lane owns the eight elements that share a
// block of random numbers: columns l, l + 16, ..., l + 112 of a group of 128.

#include "tasks.cuh"

struct ApolloTask {
    const float* x;           // (t,n)
    const float* dy;          // (t,m)
    const float* projection;  // (r,d)
    float* q;                 // scratch (t,r)
    float* squares;           // scratch (C,2): of N and R
    double* grams;            // scratch: tiles of the Gram matrices
    float* exp_avg;
    float* exp_avg_sq;
    float* s;
    float* norms;  // the NORM_SLOTS of this tensor
    void* w;
    uint32_t m, n, t, rank;
    uint32_t per_tensor;    // tensor scaling
    uint32_t gram_columns;  // columns of a factor in one partial Gram matrix
    Decay decay;
    float step, keep;  // W' = (W - step·NORM_FACTOR·U)·keep
    uint32_t dtype;
    RandomStream stream;

    __device__ bool rows() const { return m >= n; }
    __device__ uint32_t channels() const { return rows() ? m : n; }
    __device__ uint32_t dim() const { return rows() ? n : m; }
    __device__ const float* big() const { return as_global(rows() ? dy : x); }
    __device__ const float* small() const { return as_global(rows() ? x : dy); }
};

// Slots of `norms`, as compute/src/lib.rs numbers them.
constexpr uint32_t NORM_PREVIOUS = 0, NORM_UPDATE = 1, NORM_FACTOR = 2, NORM_NEXT = 3;

// q = small Pᵀ in f32: a block makes 32 rows by 64 ranks, a thread 2 by 4.
constexpr uint32_t PROJECT_ROWS = 32, PROJECT_RANKS = 64;
extern "C" __global__ void __launch_bounds__(256) apollo_project(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    constexpr uint32_t K = 32;
    __align__(16) __shared__ float a[K][PROJECT_ROWS + 2];
    __align__(16) __shared__ float b[K][PROJECT_RANKS + 4];
    const uint32_t which = find_task(first, count, blockIdx.x), tile = blockIdx.x - first[which];
    const ApolloTask& task = tasks[which];
    const uint32_t t = task.t, rank = task.rank, dim = task.dim();
    const float* const small = task.small();
    const float* const p = as_global(task.projection);
    const uint32_t across = (rank + PROJECT_RANKS - 1) / PROJECT_RANKS;
    const uint32_t row0 = tile / across * PROJECT_ROWS, rank0 = tile % across * PROJECT_RANKS;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    // The next step's elements travel through registers while this one's are multiplied.
    float next_a[4], next_b[8];
    auto fetch = [&](uint32_t k0) {
        const bool inside = k0 + lane < dim;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t row = row0 + warp + 8 * i;
            next_a[i] = inside && row < t ? small[static_cast<size_t>(row) * dim + k0 + lane] : 0.0f;
        }
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            const uint32_t row = rank0 + warp + 8 * i;
            next_b[i] = inside && row < rank ? p[static_cast<size_t>(row) * dim + k0 + lane] : 0.0f;
        }
    };
    float sum[2][4] = {};
    fetch(0);
    for (uint32_t k0 = 0; k0 < dim; k0 += K) {
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) a[lane][warp + 8 * i] = next_a[i];
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) b[lane][warp + 8 * i] = next_b[i];
        __syncthreads();
        if (k0 + K < dim) fetch(k0 + K);
#pragma unroll
        for (uint32_t k = 0; k < K; k++) {
            const float2 u = *reinterpret_cast<const float2*>(&a[k][2 * ty]);
            const float4 v = *reinterpret_cast<const float4*>(&b[k][4 * tx]);
            sum[0][0] = fmaf(u.x, v.x, sum[0][0]), sum[0][1] = fmaf(u.x, v.y, sum[0][1]);
            sum[0][2] = fmaf(u.x, v.z, sum[0][2]), sum[0][3] = fmaf(u.x, v.w, sum[0][3]);
            sum[1][0] = fmaf(u.y, v.x, sum[1][0]), sum[1][1] = fmaf(u.y, v.y, sum[1][1]);
            sum[1][2] = fmaf(u.y, v.z, sum[1][2]), sum[1][3] = fmaf(u.y, v.w, sum[1][3]);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t row = row0 + 2 * ty + i, column = rank0 + 4 * tx + j;
            if (row < t && column < rank) as_global(task.q)[static_cast<size_t>(row) * rank + column] = sum[i][j];
        }
    }
}

// Four f32 from element `at` on; those from `end` on are 0 when read and stay when written.
__device__ __forceinline__ float4 load4(const float* from, uint32_t at, uint32_t end, bool aligned) {
    if (aligned && at + 4 <= end) return *reinterpret_cast<const float4*>(from + at);
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (at < end) v.x = from[at];
    if (at + 1 < end) v.y = from[at + 1];
    if (at + 2 < end) v.z = from[at + 2];
    if (at + 3 < end) v.w = from[at + 3];
    return v;
}
__device__ __forceinline__ void store4(float* to, uint32_t at, uint32_t end, bool aligned, const float4& v) {
    if (aligned && at + 4 <= end) {
        *reinterpret_cast<float4*>(to + at) = v;
        return;
    }
    if (at < end) to[at] = v.x;
    if (at + 1 < end) to[at + 1] = v.y;
    if (at + 2 < end) to[at + 2] = v.z;
    if (at + 3 < end) to[at + 3] = v.w;
}

// R of 32 channels, 4 per warp, in steps of 128 ranks, 4 per lane. First pass: squares of N and R of each channel with
// the moments as they would become, and s. Second pass: the moments.
constexpr uint32_t CHANNELS = 32;
template <bool COMMIT>
__device__ __forceinline__ void apollo_channels(const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    constexpr uint32_t ROWS = 32, RANKS = 128, OWN = 4;
    __align__(16) __shared__ float q[ROWS][RANKS];
    __align__(16) __shared__ float big[ROWS][CHANNELS];
    const uint32_t which = find_task(first, count, blockIdx.x), tile = blockIdx.x - first[which];
    const ApolloTask& task = tasks[which];
    const uint32_t t = task.t, rank = task.rank, channels = task.channels();
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t channel0 = tile * CHANNELS, own0 = channel0 + warp * OWN;
    const Decay decay = task.decay;
    const bool aligned = rank % 4 == 0;
    const float* const from_big = task.big();
    float squares_n[OWN] = {}, squares_r[OWN] = {};
    if (COMMIT && tile == 0 && threadIdx.x == 0) task.norms[NORM_PREVIOUS] = task.norms[NORM_NEXT];
    for (uint32_t rank0 = 0; rank0 < rank; rank0 += RANKS) {
        const uint32_t at = rank0 + 4 * lane;
        // The moments are under way while R is computed.
        float4 exp_avg[OWN], exp_avg_sq[OWN];
#pragma unroll
        for (uint32_t i = 0; i < OWN; i++) {
            const size_t row = static_cast<size_t>(own0 + i) * rank;
            const uint32_t end = own0 + i < channels ? rank : 0;
            exp_avg[i] = load4(as_global(task.exp_avg) + row, at, end, aligned);
            exp_avg_sq[i] = load4(as_global(task.exp_avg_sq) + row, at, end, aligned);
        }
        float r[OWN][4] = {};
        for (uint32_t row0 = 0; row0 < t; row0 += ROWS) {
            const uint32_t rows = min(ROWS, t - row0);
            __syncthreads();
            for (uint32_t row = warp; row < rows; row += blockDim.x / 32) {
                const size_t of = row0 + row;
                *reinterpret_cast<float4*>(&q[row][4 * lane]) = load4(as_global(task.q) + of * rank, at, rank, aligned);
                big[row][lane] = channel0 + lane < channels ? from_big[of * channels + channel0 + lane] : 0.0f;
            }
            __syncthreads();
#pragma unroll 4
            for (uint32_t row = 0; row < rows; row++) {
                const float4 u = *reinterpret_cast<const float4*>(&q[row][4 * lane]);
                const float4 four = *reinterpret_cast<const float4*>(&big[row][warp * OWN]);
                const float v[OWN] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (uint32_t i = 0; i < OWN; i++) {
                    r[i][0] = fmaf(v[i], u.x, r[i][0]), r[i][1] = fmaf(v[i], u.y, r[i][1]);
                    r[i][2] = fmaf(v[i], u.z, r[i][2]), r[i][3] = fmaf(v[i], u.w, r[i][3]);
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < OWN; i++) {
            float m[4] = {exp_avg[i].x, exp_avg[i].y, exp_avg[i].z, exp_avg[i].w};
            float v[4] = {exp_avg_sq[i].x, exp_avg_sq[i].y, exp_avg_sq[i].z, exp_avg_sq[i].w};
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) {
                m[j] = next_exp_avg(m[j], r[i][j], decay);
                v[j] = next_exp_avg_sq(v[j], r[i][j], decay);
                if constexpr (!COMMIT) {
                    // Ranks beyond the last have zero moments and r, and would divide by eps, which may be 0.
                    const float normalised = at + j < rank ? m[j] / (sqrtf(v[j]) + decay.eps) : 0.0f;
                    squares_n[i] += normalised * normalised;
                    squares_r[i] += r[i][j] * r[i][j];
                }
            }
            if constexpr (COMMIT) {
                const size_t row = static_cast<size_t>(own0 + i) * rank;
                const uint32_t end = own0 + i < channels ? rank : 0;
                store4(as_global(task.exp_avg) + row, at, end, aligned, make_float4(m[0], m[1], m[2], m[3]));
                store4(as_global(task.exp_avg_sq) + row, at, end, aligned, make_float4(v[0], v[1], v[2], v[3]));
            }
        }
    }
    if constexpr (!COMMIT) {
#pragma unroll
        for (uint32_t i = 0; i < OWN; i++) {
            const float n = warp_sum(squares_n[i]), r = warp_sum(squares_r[i]);
            const uint32_t channel = own0 + i;
            if (lane != 0 || channel >= channels) continue;
            task.squares[2 * channel] = n;
            task.squares[2 * channel + 1] = r;
            if (!task.per_tensor) {
                task.s[channel] = static_cast<float>(sqrt(static_cast<double>(n)) / (sqrt(static_cast<double>(r)) + 1e-8));
            }
        }
    }
}
extern "C" __global__ void __launch_bounds__(256, 2) apollo_scaling(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    apollo_channels<false>(tasks, first, count);
}
extern "C" __global__ void __launch_bounds__(256, 2) apollo_moments(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    apollo_channels<true>(tasks, first, count);
}

// Gram matrices of both factors in f64, big's scaled by s: a block makes one tile of 32 by 32 rows over some of the
// columns. Tiles of the lower triangle only, counted along rows: (0,0), (1,0), (1,1), (2,0), ...
constexpr uint32_t GRAM = 32;
__device__ __forceinline__ uint32_t gram_pairs(uint32_t t) {
    const uint32_t tiles = (t + GRAM - 1) / GRAM;
    return tiles * (tiles + 1) / 2;
}
extern "C" __global__ void __launch_bounds__(256) apollo_gram(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    constexpr uint32_t K = 32, ROW = GRAM + 1;
    __shared__ double a[K * ROW], b[K * ROW];
    const uint32_t which = find_task(first, count, blockIdx.x), tile = blockIdx.x - first[which];
    const ApolloTask& task = tasks[which];
    const uint32_t t = task.t, pairs = gram_pairs(t);
    const uint32_t pair = tile % pairs;
    uint32_t chunk = tile / pairs;
    const uint32_t chunks_big = (task.channels() + task.gram_columns - 1) / task.gram_columns;
    const bool is_big = chunk < chunks_big;
    if (!is_big) chunk -= chunks_big;
    uint32_t i0 = 0;
    while ((i0 + 1) * (i0 + 2) / 2 <= pair) i0++;
    const uint32_t j0 = pair - i0 * (i0 + 1) / 2;
    const float* const x = is_big ? task.big() : task.small();
    const float* const s = is_big && !task.per_tensor ? task.s : nullptr;
    const uint32_t width = is_big ? task.channels() : task.dim();
    const uint32_t begin = chunk * task.gram_columns, end = min(begin + task.gram_columns, width);
    // 64 threads make the tile, 4 by 4 each, from every fourth column; the four sums are added at the end.
    const uint32_t part = threadIdx.x / 64, ti = threadIdx.x % 64 / 8, tj = threadIdx.x % 8;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double sum[4][4] = {};
    for (uint32_t k0 = begin; k0 < end; k0 += K) {
        const uint32_t k = k0 + lane;
        const double scale = s && k < end ? s[k] : 1.0;
        __syncthreads();
#pragma unroll
        for (uint32_t i = 0; i < GRAM / 8; i++) {
            const uint32_t row = warp + 8 * i, of_a = i0 * GRAM + row, of_b = j0 * GRAM + row;
            a[lane * ROW + row] = k < end && of_a < t ? scale * x[static_cast<size_t>(of_a) * width + k] : 0.0;
            b[lane * ROW + row] = k < end && of_b < t ? scale * x[static_cast<size_t>(of_b) * width + k] : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (uint32_t step = 0; step < K / 4; step++) {
            const double* const u = a + (4 * step + part) * ROW + ti;
            const double* const v = b + (4 * step + part) * ROW + tj;
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) sum[i][j] = fma(u[8 * i], v[8 * j], sum[i][j]);
            }
        }
    }
    double* const out = task.grams + static_cast<size_t>(tile) * GRAM * GRAM;
    for (uint32_t from = 3; from > 0; from--) {
        __syncthreads();
        if (part == from) {
#pragma unroll
            for (uint32_t e = 0; e < 16; e++) a[e * 64 + threadIdx.x % 64] = sum[e / 4][e % 4];
        }
        __syncthreads();
        if (part == 0) {
#pragma unroll
            for (uint32_t e = 0; e < 16; e++) sum[e / 4][e % 4] += a[e * 64 + threadIdx.x];
        }
    }
    if (part == 0) {
        // Both factors in the same order, which is all that their inner product needs.
#pragma unroll
        for (uint32_t e = 0; e < 16; e++) out[e * 64 + threadIdx.x] = sum[e / 4][e % 4];
    }
}

// NORM_UPDATE, and s for tensor scaling: a block per tensor, of as many threads as a tile has elements. A head has
// some hundred thousand channels and nothing else to wait for.
extern "C" __global__ void __launch_bounds__(1024) apollo_norm(const ApolloTask* tasks) {
    const ApolloTask& task = tasks[blockIdx.x];
    const uint32_t channels = task.channels(), pairs = gram_pairs(task.t);
    double n = 0.0, r = 0.0;
    uint32_t infinite = 0;
    const float2* const squares = reinterpret_cast<const float2*>(as_global(task.squares));
#pragma unroll 8
    for (uint32_t c = threadIdx.x; c < channels; c += blockDim.x) {
        const float n_c = squares[c].x, r_c = squares[c].y;
        infinite += !(n_c < INFINITY && r_c < INFINITY);
        n += n_c, r += r_c;
    }
    const uint32_t chunks_big = (channels + task.gram_columns - 1) / task.gram_columns;
    const uint32_t chunks_small = (task.dim() + task.gram_columns - 1) / task.gram_columns;
    const size_t per_chunk = static_cast<size_t>(pairs) * GRAM * GRAM;
    double inner = 0.0;
    uint32_t row = 0;
    for (uint32_t pair = 0; pair < pairs; pair++) {
        if ((row + 1) * (row + 2) / 2 <= pair) row++;
        const double twice = pair == row * (row + 1) / 2 + row ? 1.0 : 2.0;
        for (uint32_t e = threadIdx.x; e < GRAM * GRAM; e += blockDim.x) {
            const double* at = as_global(task.grams) + static_cast<size_t>(pair) * GRAM * GRAM + e;
            double a = 0.0, b = 0.0;
#pragma unroll 8
            for (uint32_t c = 0; c < chunks_big; c++, at += per_chunk) a += *at;
            for (uint32_t c = 0; c < chunks_small; c++, at += per_chunk) b += *at;
            inner += twice * (a * b);
        }
    }
    inner = block_sum(inner);
    n = block_sum(n);
    r = block_sum(r);
    infinite = block_sum(infinite);
    if (threadIdx.x != 0) return;
    // Not fmax, which would turn a NaN into 0.
    float norm = static_cast<float>(sqrt(inner < 0.0 ? 0.0 : inner));
    if (task.per_tensor) {
        const float s = static_cast<float>(sqrt(n) / (sqrt(r) + 1e-8));
        task.s[0] = s;
        norm = s * norm;
    }
    // A square that overflows would make s zero, hide in ‖U‖ and stay in exp_avg_sq for ever.
    task.norms[NORM_UPDATE] = infinite ? NAN : norm;
}

// The norm-growth limiter of one tensor.
struct LimitTask {
    uint32_t at;
    float growth;  // 0: no limit
    float floor;   // of the stored norm
};
extern "C" __global__ void __launch_bounds__(256) apollo_limit(float* norms, const LimitTask* tasks, uint32_t count) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const LimitTask task = tasks[i];
    float* const slots = norms + task.at;
    const float previous = slots[NORM_PREVIOUS], update = slots[NORM_UPDATE];
    float growth = 1.0f;
    if (task.growth > 0.0f && previous > 0.0f) growth = fmaxf(update / (previous + 1e-8f), task.growth) / task.growth;
    slots[NORM_FACTOR] = 1.0f / growth;
    slots[NORM_NEXT] = update > 0.0f ? fmaxf(update / growth, task.floor) : previous;
}

// --- The write ---

// Rows 32·chunk.. of a factor (t, width), columns from `column` on, as fragments of two bf16 per value: entry
// (step of 16 rows, quarter q, column) holds rows 2q, 2q+1 and 2q+8, 2q+9 of its step as {hi, hi, lo, lo}. Two entries
// of padding per (step, q) keep a quarter of a warp off each other's banks.
constexpr uint32_t FACTOR_COLUMNS = 128, FACTOR_ROW = FACTOR_COLUMNS + 2, FACTOR_ROWS = 32;
__device__ __forceinline__ void stage_factor(
    uint4* out, const float* x, uint32_t t, uint32_t width, uint32_t row0, uint32_t column) {
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < 8 * FACTOR_COLUMNS; i += 256) {
        const uint32_t c = i % FACTOR_COLUMNS, slot = i / FACTOR_COLUMNS;
        const uint32_t row = row0 + slot / 4 * 16 + slot % 4 * 2;
        const bool inside = column + c < width;
        const float* const at = x + static_cast<size_t>(row) * width + column + c;
        const float v0 = inside && row < t ? at[0] : 0.0f;
        const float v1 = inside && row + 1 < t ? at[width] : 0.0f;
        const float v2 = inside && row + 8 < t ? at[static_cast<size_t>(width) * 8] : 0.0f;
        const float v3 = inside && row + 9 < t ? at[static_cast<size_t>(width) * 9] : 0.0f;
        uint4 split;
        split.x = pack_bf16(v0, v1);
        split.y = pack_bf16(v2, v3);
        const float2 high0 = unpack_bf16(split.x), high1 = unpack_bf16(split.y);
        split.z = pack_bf16(v0 - high0.x, v1 - high0.y);
        split.w = pack_bf16(v2 - high1.x, v3 - high1.y);
        out[slot * FACTOR_ROW + c] = split;
    }
}

// The two elements of a word, as f32 and rounded back.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack_pair<bf16>(uint32_t word) {
    return unpack_bf16(word);
}
template <>
__device__ __forceinline__ float2 unpack_pair<f16>(uint32_t word) {
    return unpack_f16(word);
}
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high, uint32_t random_low, uint32_t random_high);
// `round_stochastic<bf16>` of both in fewer instructions: clamped first, neither can run over into infinity or the sign.
template <>
__device__ __forceinline__ uint32_t round_pair<bf16>(float low, float high, uint32_t random_low, uint32_t random_high) {
    const float largest = __uint_as_float(0x7F7F0000);
    const uint32_t a = __float_as_uint(fminf(fmaxf(low, -largest), largest)) + random_low;
    const uint32_t b = __float_as_uint(fminf(fmaxf(high, -largest), largest)) + random_high;
    return a >> 16 | (b & 0xFFFF0000);
}
template <>
__device__ __forceinline__ uint32_t round_pair<f16>(float low, float high, uint32_t random_low, uint32_t random_high) {
    return __half_as_ushort(round_stochastic<f16>(low, random_low)) |
           static_cast<uint32_t>(__half_as_ushort(round_stochastic<f16>(high, random_high))) << 16;
}

// For 16-bit weights with n a multiple of 128 and rows aligned to 8 bytes. A block writes 128 rows by up to 1024
// columns, in groups of 128; a warp has 16 of the rows. Tensor-core column c of tile (h, pass) stands for column
// 16h + 4(c/2) + 2·pass + c%2 of the group, so that lane q of a row has columns 16h + 4q.. +3 for all h: whole blocks of
// random numbers, and loads and stores of 8 bytes of which four lanes make a sector.
constexpr uint32_t WRITE_ROWS = 128, WRITE_GROUPS = 8;
template <typename T>
__device__ __forceinline__ void apollo_write(const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    __shared__ uint4 dy[8 * FACTOR_ROW];
    __shared__ uint4 x[8 * FACTOR_ROW];
    const uint32_t which = find_task(first, count, blockIdx.x), tile = blockIdx.x - first[which];
    const ApolloTask& task = tasks[which];
    const uint32_t n = task.n, t = task.t;
    const uint32_t across = (n / 128 + WRITE_GROUPS - 1) / WRITE_GROUPS;
    const uint32_t row0 = tile / across * WRITE_ROWS, column0 = tile % across * WRITE_GROUPS * 128;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const uint32_t row = row0 + warp * 16 + g;  // and row + 8
    const bool inside[2] = {row < task.m, row + 8 < task.m};
    const bool by_column = !task.per_tensor && !task.rows();
    // -step·s of both rows, or -step.
    float factor[2];
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        factor[r] = -task.step * task.norms[NORM_FACTOR];
        if (task.per_tensor) factor[r] *= task.s[0];
        else if (!by_column && inside[r]) factor[r] *= task.s[row + 8 * r];
    }
    uint16_t* w_at = as_global(static_cast<uint16_t*>(task.w)) + static_cast<size_t>(row) * n + column0 + 4 * q;
    // Of the first lane of 16 in the row's first group; a group has 16, and so has each of the 8 rows n / 128 times.
    uint64_t block0 = (static_cast<uint64_t>(row) * n + column0) / 8 + 4 * q;

    if (t <= FACTOR_ROWS) stage_factor(dy, as_global(task.dy), t, task.m, 0, row0);
    const uint32_t end = min(n, column0 + WRITE_GROUPS * 128);
    for (uint32_t column = column0; column < end; column += 128, w_at += 128, block0 += 16) {
        uint2 w[2][8];
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
#pragma unroll
            for (uint32_t h = 0; h < 8; h++) {
                const uint16_t* const at = w_at + static_cast<size_t>(8 * r) * n + 16 * h;
                w[r][h] = inside[r] ? *reinterpret_cast<const uint2*>(at) : make_uint2(0, 0);
            }
        }
        if (t <= FACTOR_ROWS) {
            __syncthreads();
            stage_factor(x, as_global(task.x), t, n, 0, column);
            __syncthreads();
        }
#pragma unroll
        for (uint32_t pass = 0; pass < 2; pass++) {
            float acc[8][4] = {};
            for (uint32_t top = 0; top < t; top += FACTOR_ROWS) {
                if (t > FACTOR_ROWS) {
                    __syncthreads();
                    stage_factor(dy, as_global(task.dy), t, task.m, top, row0);
                    stage_factor(x, as_global(task.x), t, n, top, column);
                    __syncthreads();
                }
                const uint32_t steps = t - top > 16 ? 2 : 1;
                for (uint32_t k = 0; k < steps; k++) {
                    const uint4 low = dy[(4 * k + q) * FACTOR_ROW + warp * 16 + g];
                    const uint4 high = dy[(4 * k + q) * FACTOR_ROW + warp * 16 + g + 8];
                    const uint32_t a_hi[4] = {low.x, high.x, low.y, high.y}, a_lo[4] = {low.z, high.z, low.w, high.w};
                    const uint4* const b_at = x + (4 * k + q) * FACTOR_ROW + 4 * (g / 2) + 2 * pass + g % 2;
#pragma unroll
                    for (uint32_t h = 0; h < 8; h++) {
                        const uint4 b = b_at[16 * h];
                        const uint32_t b_hi[2] = {b.x, b.y}, b_lo[2] = {b.z, b.w};
                        mma_bf16(acc[h], a_lo, b_hi);
                        mma_bf16(acc[h], a_hi, b_lo);
                        mma_bf16(acc[h], a_hi, b_hi);
                    }
                }
            }
            if (by_column) {
                const float* const s = as_global(task.s) + column + 4 * q + 2 * pass;
#pragma unroll
                for (uint32_t h = 0; h < 8; h++) {
                    const float2 both = *reinterpret_cast<const float2*>(s + 16 * h);
                    acc[h][0] *= both.x, acc[h][1] *= both.y, acc[h][2] *= both.x, acc[h][3] *= both.y;
                }
            }
#pragma unroll
            for (uint32_t r = 0; r < 2; r++) {
                const uint64_t block = block0 + static_cast<uint64_t>(r) * n + 2 * pass;
                const uint4 random[2] = {philox(task.stream, block), philox(task.stream, block + 1)};
#pragma unroll
                for (uint32_t h = 0; h < 8; h++) {
                    uint32_t& word = pass == 0 ? w[r][h].x : w[r][h].y;
                    const float2 old = unpack_pair<T>(word);
                    const float low = fmaf(factor[r], acc[h][2 * r], old.x) * task.keep;
                    const float high = fmaf(factor[r], acc[h][2 * r + 1], old.y) * task.keep;
                    word = round_pair<T>(low, high, random_half(random[0], h), random_half(random[1], h));
                }
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
#pragma unroll
            for (uint32_t h = 0; h < 8; h++) {
                uint16_t* const at = w_at + static_cast<size_t>(8 * r) * n + 16 * h;
                if (inside[r]) *reinterpret_cast<uint2*>(at) = w[r][h];
            }
        }
    }
}
extern "C" __global__ void __launch_bounds__(256, 2) apollo_write_bf16(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    apollo_write<bf16>(tasks, first, count);
}
extern "C" __global__ void __launch_bounds__(256, 2) apollo_write_f16(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    apollo_write<f16>(tasks, first, count);
}

// The write for whatever `apollo_write_*` is not for.
extern "C" __global__ void __launch_bounds__(256) apollo_write_any(
    const ApolloTask* tasks, const uint32_t* first, uint32_t count) {
    const uint32_t which = find_task(first, count, blockIdx.x), tile = blockIdx.x - first[which];
    const ApolloTask& task = tasks[which];
    const uint32_t m = task.m, n = task.n, across = (n + FORMED - 1) / FORMED;
    const uint32_t row0 = tile / across * FORMED, column0 = tile % across * FORMED;
    float g[4][4];
    form_tile(g, as_global(task.x), as_global(task.dy), task.t, m, n, row0, column0);
    const float step = task.step * task.norms[NORM_FACTOR], keep = task.keep;
    const bool rows = task.rows();
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t row = row0 + threadIdx.x / 16 * 4 + i, column = column0 + threadIdx.x % 16 * 4 + j;
            if (row >= m || column >= n) continue;
            const float s = task.s[task.per_tensor ? 0 : rows ? row : column];
            const uint64_t element = static_cast<uint64_t>(row) * n + column;
            const float old = read_element(task.w, task.dtype, element);
            write_element(task.w, task.dtype, element, (old - step * s * g[i][j]) * keep, task.stream);
        }
    }
}
