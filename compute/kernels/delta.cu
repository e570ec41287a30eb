// The gated delta rule (Yang et al., "Gated Delta Networks", arXiv:2412.06464) and its backward, token by token.
//
// For each value head, with its key head's q and k of unit length, q besides times kd^-1/2 (compute/src/cpu/delta.rs):
//   S' = e^g·S · r = v - S'ᵀk · δ = β·r · S ← S' + k·δᵀ · out = Sᵀq, S (kd,vd)
//
// A block has 32 columns of one head's state, one a lane; its eight warps have every eighth row each, in registers. Columns do
// not meet but in sums for q, k and the gates: those are left in parts, one for each block, and added in order afterwards.
// Backward goes through chunks of tokens from the last to the first: `delta_rule` keeps the states of a chunk for it.
#include "tasks.cuh"

namespace delta_kernels {

constexpr uint32_t WIDTH = 32, WARPS = 8, THREADS = WARPS * WIDTH, DIM_MAX = 256;
constexpr float EPS = 1e-6f;

struct Shape {
    uint32_t key_heads, value_heads, kd, vd;
    __device__ uint32_t keys() const { return key_heads * kd; }
    __device__ uint32_t values() const { return value_heads * vd; }
    __device__ uint32_t channels() const { return 2 * keys() + values(); }
    __device__ uint32_t group() const { return value_heads / key_heads; }
};

// The tokens as `delta_tokens` and `delta_gates` leave them, and the values where they lie.
struct Tokens {
    const float* mixed;       // (t, channels)
    const float *q, *k;       // (t, key_heads, kd), normalised
    const float *decay, *beta;  // (value_heads, t)
    uint32_t t;
};

// What is kept of a chunk of n tokens.
struct Kept {
    float* states;  // (n + 1, value_heads, kd, vd): before each token, and after the last
    float* delta;   // (n, value_heads, vd)
    float* rest;    // likewise
};

// A thread's place: its head, column and warp.
struct Place {
    const uint32_t head = blockIdx.x, lane = threadIdx.x % WIDTH, warp = threadIdx.x / WIDTH;
    const uint32_t column = blockIdx.y * WIDTH + lane;
};

__device__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// q and k of a token into shared memory. Nobody reads those of the token before any more.
__device__ void load_keys(float* q, float* k, const Tokens& tokens, const Shape& s, uint32_t key_head, uint32_t token) {
    const size_t at = ((size_t)token * s.key_heads + key_head) * s.kd;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < s.kd; i += THREADS) {
        q[i] = tokens.q[at + i];
        k[i] = tokens.k[at + i];
    }
    __syncthreads();
}

// The sum over the warps of a column's parts, in order.
__device__ float over_warps(const float (&parts)[WARPS][WIDTH], uint32_t lane) {
    float sum = 0.f;
    for (uint32_t w = 0; w < WARPS; w++) sum += parts[w][lane];
    return sum;
}

// Tokens first..first + n from `state` on; `next` and what is kept may be absent.
template <int ROWS>
__device__ void forward(float* out, float* next, Kept kept, const float* state, Tokens tokens, Shape s, uint32_t first, uint32_t n) {
    __shared__ float q[DIM_MAX], k[DIM_MAX], reads[WARPS][WIDTH], sums[WARPS][WIDTH];
    const Place p;
    const bool inside = p.column < s.vd;
    const size_t base = (size_t)p.head * s.kd * s.vd + p.column, all = (size_t)s.value_heads * s.kd * s.vd;
    float rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const uint32_t row = r * WARPS + p.warp;
        rows[r] = inside && row < s.kd ? state[base + (size_t)row * s.vd] : 0.f;
    }
    for (uint32_t i = 0; i <= n; i++) {
        if (kept.states != nullptr && inside) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const uint32_t row = r * WARPS + p.warp;
                if (row < s.kd) kept.states[i * all + base + (size_t)row * s.vd] = rows[r];
            }
        }
        if (i == n) break;
        const uint32_t token = first + i;
        load_keys(q, k, tokens, s, p.head / s.group(), token);
        const float decay = tokens.decay[(size_t)p.head * tokens.t + token], beta = tokens.beta[(size_t)p.head * tokens.t + token];
        float part = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint32_t row = r * WARPS + p.warp;
            if (row >= s.kd) break;
            rows[r] *= decay;
            part = fmaf(k[row], rows[r], part);
        }
        reads[p.warp][p.lane] = part;
        __syncthreads();
        const size_t value = (size_t)token * s.channels() + 2 * s.keys() + p.head * s.vd + p.column;
        const float rest = (inside ? tokens.mixed[value] : 0.f) - over_warps(reads, p.lane), delta = beta * rest;
        part = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint32_t row = r * WARPS + p.warp;
            if (row >= s.kd) break;
            rows[r] = fmaf(k[row], delta, rows[r]);
            part = fmaf(q[row], rows[r], part);
        }
        sums[p.warp][p.lane] = part;
        __syncthreads();
        if (p.warp == 0 && inside) {
            out[(size_t)token * s.values() + p.head * s.vd + p.column] = over_warps(sums, p.lane);
            if (kept.states != nullptr) {
                kept.delta[((size_t)i * s.value_heads + p.head) * s.vd + p.column] = delta;
                kept.rest[((size_t)i * s.value_heads + p.head) * s.vd + p.column] = rest;
            }
        }
    }
    if (next == nullptr || !inside) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const uint32_t row = r * WARPS + p.warp;
        if (row < s.kd) next[base + (size_t)row * s.vd] = rows[r];
    }
}

// Sums over the columns of one block, to be added up in the order of the blocks.
struct Parts {
    float *dq, *dk;      // (blocks, value_heads, n, kd) of a chunk
    float *dbeta, *dg;   // (blocks, value_heads, t)
};

// A chunk from its last token to its first. `ds` is the gradient of the state after it, then of the one before it.
template <int ROWS>
__device__ void backward(float* dmixed, float* ds, Parts parts, const float* dout, Kept kept, Tokens tokens, Shape s,
                         uint32_t first, uint32_t n) {
    __shared__ float q[DIM_MAX], k[DIM_MAX], sums[WARPS][WIDTH];
    const Place p;
    const bool inside = p.column < s.vd;
    const size_t base = (size_t)p.head * s.kd * s.vd + p.column, all = (size_t)s.value_heads * s.kd * s.vd;
    const size_t of_block = (size_t)blockIdx.y * s.value_heads + p.head;
    float rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const uint32_t row = r * WARPS + p.warp;
        rows[r] = inside && row < s.kd ? ds[base + (size_t)row * s.vd] : 0.f;
    }
    for (uint32_t i = n; i-- > 0;) {
        const uint32_t token = first + i;
        load_keys(q, k, tokens, s, p.head / s.group(), token);
        const float decay = tokens.decay[(size_t)p.head * tokens.t + token], beta = tokens.beta[(size_t)p.head * tokens.t + token];
        const size_t here = ((size_t)i * s.value_heads + p.head) * s.vd + p.column;
        const float d = inside ? dout[(size_t)token * s.values() + p.head * s.vd + p.column] : 0.f;
        const float delta = inside ? kept.delta[here] : 0.f, rest = inside ? kept.rest[here] : 0.f;
        float* const dq = parts.dq + (of_block * n + i) * s.kd;
        float* const dk = parts.dk + (of_block * n + i) * s.kd;
        const float* const before = kept.states + i * all + base;
        const float* const after = before + all;
        float part = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint32_t row = r * WARPS + p.warp;
            if (row >= s.kd) break;
            rows[r] = fmaf(q[row], d, rows[r]);
            part = fmaf(k[row], rows[r], part);
            const float of_q = warp_sum(inside ? after[(size_t)row * s.vd] * d : 0.f), of_k = warp_sum(rows[r] * delta);
            if (p.lane == 0) {
                dq[row] = of_q;
                dk[row] = of_k;
            }
        }
        sums[p.warp][p.lane] = part;
        __syncthreads();
        const float ddelta = over_warps(sums, p.lane), dv = beta * ddelta;
        if (p.warp == 0) {
            const float dbeta = warp_sum(ddelta * rest);
            if (p.lane == 0) parts.dbeta[of_block * tokens.t + token] = dbeta;
            if (inside) dmixed[(size_t)token * s.channels() + 2 * s.keys() + p.head * s.vd + p.column] = dv;
        }
        float pull = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const uint32_t row = r * WARPS + p.warp;
            if (row >= s.kd) break;
            const float decayed = inside ? decay * before[(size_t)row * s.vd] : 0.f;
            rows[r] = fmaf(-k[row], dv, rows[r]);
            pull = fmaf(rows[r], decayed, pull);
            const float of_k = warp_sum(decayed * dv);
            if (p.lane == 0) dk[row] -= of_k;
            rows[r] *= decay;
        }
        pull = block_sum(pull);
        if (threadIdx.x == 0) parts.dg[of_block * tokens.t + token] = pull;
    }
    if (!inside) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const uint32_t row = r * WARPS + p.warp;
        if (row < s.kd) ds[base + (size_t)row * s.vd] = rows[r];
    }
}

// One head of q or k in unit length times `scale`; a warp has it. `factor` is what it was multiplied with.
__device__ void normalise(float* out, float* factor, const float* from, uint32_t dim, float scale) {
    const uint32_t lane = threadIdx.x % 32;
    float squares = 0.f;
    for (uint32_t i = lane; i < dim; i += 32) squares = fmaf(from[i], from[i], squares);
    const float f = scale / sqrtf(warp_sum(squares) + EPS);
    for (uint32_t i = lane; i < dim; i += 32) out[i] = f * from[i];
    if (lane == 0) *factor = f;
}

// With unit = factor·x and factor = scale/sqrt(x² + eps): dx = factor·(d - unit·(unit·d)/scale²), d the sum of `count` parts
// that lie `stride` apart for each of `group` heads that lie `n·dim` apart.
__device__ void normalise_backward(float* out, const float* parts, const float* unit, float factor, float scale, uint32_t dim,
                                   uint32_t blocks, size_t block_stride, uint32_t group, size_t head_stride) {
    const uint32_t lane = threadIdx.x % 32;
    float d[DIM_MAX / 32], along = 0.f;
#pragma unroll
    for (uint32_t j = 0; j < DIM_MAX / 32; j++) {
        const uint32_t i = j * 32 + lane;
        d[j] = 0.f;
        if (i >= dim) continue;
        for (uint32_t member = 0; member < group; member++) {
            for (uint32_t block = 0; block < blocks; block++) d[j] += parts[block * block_stride + member * head_stride + i];
        }
        along = fmaf(unit[i], d[j], along);
    }
    along = warp_sum(along) / (scale * scale);
#pragma unroll
    for (uint32_t j = 0; j < DIM_MAX / 32; j++) {
        const uint32_t i = j * 32 + lane;
        if (i < dim) out[i] = factor * (d[j] - unit[i] * along);
    }
}

}  // namespace delta_kernels

// q, k (t, key_heads, kd) normalised, and their factors (t, key_heads); a warp has a token's head.
extern "C" __global__ void __launch_bounds__(256) delta_tokens(float* q, float* k, float* q_factor, float* k_factor,
                                                               const float* mixed, delta_kernels::Shape s, uint32_t t) {
    const uint32_t index = blockIdx.x * delta_kernels::WARPS + threadIdx.x / 32;
    if (index >= t * s.key_heads) return;
    const float* from = mixed + (size_t)(index / s.key_heads) * s.channels() + index % s.key_heads * s.kd;
    delta_kernels::normalise(q + (size_t)index * s.kd, q_factor + index, from, s.kd, 1.f / sqrtf((float)s.kd));
    delta_kernels::normalise(k + (size_t)index * s.kd, k_factor + index, from + s.keys(), s.kd, 1.f);
}

// g = -e^A·softplus(a + dt), e^g and β = σ(b), all (value_heads, t); a thread has one element.
extern "C" __global__ void __launch_bounds__(256) delta_gates(float* log_decay, float* decay, float* beta, const float* a,
                                                              const float* b, const void* a_log, uint32_t a_log_dtype,
                                                              const void* dt_bias, uint32_t dt_bias_dtype, uint32_t heads, uint32_t t) {
    const uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= heads * t) return;
    const uint32_t head = index / t, from = index % t * heads + head;
    const float rate = expf(read_element(a_log, a_log_dtype, head));
    const float g = -rate * delta_kernels::softplus(a[from] + read_element(dt_bias, dt_bias_dtype, head));
    log_decay[index] = g;
    decay[index] = expf(g);
    beta[index] = delta_kernels::sigmoid(b[from]);
}

#define DELTA_RULE(DIM, ROWS)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) delta_rule_##DIM(                                                        \
        float* out, float* next, delta_kernels::Kept kept, const float* state, delta_kernels::Tokens tokens,                   \
        delta_kernels::Shape s, uint32_t first, uint32_t n) {                                                                  \
        delta_kernels::forward<ROWS>(out, next, kept, state, tokens, s, first, n);                                             \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) delta_rule_backward_##DIM(                                               \
        float* dmixed, float* ds, delta_kernels::Parts parts, const float* dout, delta_kernels::Kept kept,                     \
        delta_kernels::Tokens tokens, delta_kernels::Shape s, uint32_t first, uint32_t n) {                                    \
        delta_kernels::backward<ROWS>(dmixed, ds, parts, dout, kept, tokens, s, first, n);                                     \
    }
DELTA_RULE(128, 16)
DELTA_RULE(256, 32)

// dmixed of q and k of a chunk's tokens from the parts; a warp has a token's head.
extern "C" __global__ void __launch_bounds__(256)
    delta_keys_backward(float* dmixed, delta_kernels::Parts parts, delta_kernels::Tokens tokens, const float* q_factor,
                        const float* k_factor, delta_kernels::Shape s, uint32_t first, uint32_t n, uint32_t blocks) {
    using namespace delta_kernels;
    const uint32_t index = blockIdx.x * WARPS + threadIdx.x / 32;
    if (index >= n * s.key_heads) return;
    const uint32_t i = index / s.key_heads, key_head = index % s.key_heads, token = first + i;
    const size_t head_stride = (size_t)n * s.kd, block_stride = s.value_heads * head_stride;
    const size_t part = key_head * s.group() * head_stride + (size_t)i * s.kd;
    const size_t unit = ((size_t)token * s.key_heads + key_head) * s.kd;
    float* const out = dmixed + (size_t)token * s.channels() + key_head * s.kd;
    const uint32_t factor = token * s.key_heads + key_head;
    normalise_backward(out, parts.dq + part, tokens.q + unit, q_factor[factor], 1.f / sqrtf((float)s.kd), s.kd, blocks,
                       block_stride, s.group(), head_stride);
    normalise_backward(out + s.keys(), parts.dk + part, tokens.k + unit, k_factor[factor], 1.f, s.kd, blocks, block_stride,
                       s.group(), head_stride);
}

// da, db (t, value_heads) from the parts, and the sums over the tokens that A_log and dt_bias get; a block has a head.
extern "C" __global__ void __launch_bounds__(256)
    delta_gates_backward(float* da, float* db, float* da_log, float* ddt_bias, delta_kernels::Parts parts, const float* log_decay,
                         const float* beta, const float* a, const void* a_log, uint32_t a_log_dtype, const void* dt_bias,
                         uint32_t dt_bias_dtype, uint32_t heads, uint32_t t, uint32_t blocks) {
    const uint32_t head = blockIdx.x;
    const float rate = expf(read_element(a_log, a_log_dtype, head)), bias = read_element(dt_bias, dt_bias_dtype, head);
    float sum_a_log = 0.f, sum_dt = 0.f;
    for (uint32_t token = threadIdx.x; token < t; token += blockDim.x) {
        float dg = 0.f, dbeta = 0.f;
        for (uint32_t block = 0; block < blocks; block++) {
            const size_t at = ((size_t)block * heads + head) * t + token;
            dg += parts.dg[at];
            dbeta += parts.dbeta[at];
        }
        const size_t to = (size_t)token * heads + head, gate = (size_t)head * t + token;
        const float d = -rate * delta_kernels::sigmoid(a[to] + bias) * dg;
        da[to] = d;
        db[to] = dbeta * beta[gate] * (1.f - beta[gate]);
        sum_dt += d;
        sum_a_log = fmaf(dg, log_decay[gate], sum_a_log);
    }
    sum_dt = block_sum(sum_dt);
    sum_a_log = block_sum(sum_a_log);
    if (threadIdx.x == 0) {
        da_log[head] = sum_a_log;
        ddt_bias[head] = sum_dt;
    }
}
