// Causal grouped-query attention of t window queries over a frozen past and the window's own keys, and its backward.
//
// h heads · g kv_heads · G = h/g query heads that share a kv head · d head_dim
// q, out (t, h·d) · own k, v (t, g·d) at positions len.. · past k, v (capacity, g·d) at positions 0..len
// lse (h, t) · S = scale·q kᵀ · P = softmax(S) over the keys that a query sees · out = P v
//
// A block takes one kv head and a tile of 64 query rows: row r is query r / G of head r % G of the group, so keys are
// read once for the whole group. Keys are split over blocks, because a decision has few queries and a long past. How
// many splits there are is known at launch, how long the past is only on the device (a recorded launch is replayed with
// another length): the tiles of keys that the queries see are dealt out evenly, and a split that gets none ends at
// once. Each split leaves its part in a workspace, and a second kernel adds the parts in order: no result depends on
// the order in which blocks run.
//
// A query that sees one key has a softmax that is constant: its dS is exactly 0 by rule, not by rounding.
// Head sizes that are no multiple of four, and those
// beyond the columns of one block (blockIdx.z counts such pieces, each with its own scores), take the same code.
#include "common.cuh"

namespace attention_kernels {

constexpr int THREADS = 256;
// Query rows of a block, and keys that it takes at a time.
constexpr int TILE = 64;
// Elements of a head in shared memory at a time.
constexpr int DEPTH = 16;
// Floats of a row in shared memory: a multiple of four for 16-byte reads, and not of 32 for the banks.
constexpr int PITCH = TILE + 4;
// Columns of dk and dv in one block; two accumulators of 128 columns would not fit the registers.
constexpr int OWN_COLUMNS = 64;

struct Shape {
    int t, len, heads, kv_heads, d, window;  // window 0: none
    float scale;

    __device__ int group() const { return heads / kv_heads; }
    __device__ int rows() const { return t * group(); }
    __device__ bool sees(int query, int position) const {
        const int own = len + query;
        return position <= own && (window == 0 || position > own - window);
    }
    __device__ bool sees_one(int query) const { return len + query == 0 || window == 1; }
};

// A stretch of keys or query rows, first..end.
struct Span {
    int first, end;

    __device__ int tiles() const { return (end - first + TILE - 1) / TILE; }
    __device__ int tiles_of_part(int parts) const { return (tiles() + parts - 1) / parts; }
    // Part `index` of `parts`, whole tiles each; empty if the tiles do not reach that far.
    __device__ Span part(int index, int parts) const {
        const int size = tiles_of_part(parts) * TILE;
        return {first + index * size, min(end, first + (index + 1) * size)};
    }
    __device__ bool empty() const { return first >= end; }
    // Parts that are not empty; they come first.
    __device__ int parts_in_use(int parts) const {
        const int size = tiles_of_part(parts);
        return (tiles() + size - 1) / size;
    }
};

// Positions that any of a tile's queries sees.
__device__ Span keys_of(int tile, const Shape& s) {
    const int first = tile * TILE / s.group();
    const int last = min(s.t - 1, (tile * TILE + TILE - 1) / s.group());
    const int lowest = s.window == 0 ? 0 : max(0, s.len + first + 1 - s.window);
    return {lowest, s.len + last + 1};
}

// Query rows that see any of a tile of own keys.
__device__ Span queries_of(int tile, const Shape& s) {
    const int first = tile * TILE, last = min(s.t - 1, first + TILE - 1);
    // Not last + window: an enormous window would overflow.
    const int end = s.window == 0 || s.window > s.t - last ? s.t : last + s.window;
    return {first * s.group(), end * s.group()};
}

// Query rows of one kv head in a (t, h·d) buffer. Instead of a row beyond the last, the last is given: what becomes of it
// is masked or not written.
struct QueryRows {
    const float* head;
    int rows, group, stride, d;

    __device__ QueryRows(const float* data, int kv_head, const Shape& s)
        : head(data + (size_t)kv_head * s.group() * s.d), rows(s.rows()), group(s.group()), stride(s.heads * s.d), d(s.d) {}
    __device__ size_t at(int row) const { return (size_t)(row / group) * stride + row % group * d; }
    __device__ const float* row(int row) const { return head + at(min(row, rows - 1)); }
};

// Keys or values of one kv head by position, past before own; the last again beyond it.
struct KeyRows {
    const float *past, *own;
    int len, end, stride;

    __device__ KeyRows(const float* past, const float* own, int kv_head, const Shape& s)
        : past(past + (size_t)kv_head * s.d), own(own + (size_t)kv_head * s.d), len(s.len), end(s.len + s.t),
          stride(s.kv_heads * s.d) {}
    __device__ const float* row(int position) const {
        position = min(position, end - 1);
        return position < len ? past + (size_t)position * stride : own + (size_t)(position - len) * stride;
    }
};

// Four elements of a row from `at` on, zeros beyond its d elements. VECTOR: d is a multiple of four.
template <bool VECTOR>
__device__ float4 fetch(const float* row, int at, int d) {
    if (at >= d) return make_float4(0.f, 0.f, 0.f, 0.f);
    if constexpr (VECTOR) return *reinterpret_cast<const float4*>(row + at);
    return make_float4(row[at], at + 1 < d ? row[at + 1] : 0.f, at + 2 < d ? row[at + 2] : 0.f,
                       at + 3 < d ? row[at + 3] : 0.f);
}

// What the products below stage: two transposed tiles (DEPTH, TILE), or rows of the second factor of a mix.
union Stage {
    struct {
        float a[DEPTH][PITCH];
        float b[DEPTH][PITCH];
    };
    float rows[TILE * 32];
};

// Where a thread stands: its four output rows and four output columns, and what it stages for a product.
struct Place {
    int row, column;
    // Row of either tile, and first of its four elements.
    int staged, depth;

    __device__ Place() {
        const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
        row = thread / 16 * 4;
        column = thread % 16 * 4;
        // 16 rows and two quads of each row in a warp: whole sectors from memory, no two banks alike.
        staged = warp % 4 * 16 + lane % 16;
        depth = 4 * (lane / 16 + warp / 4 * 2);
    }
};

__device__ void stage(float (*tile)[PITCH], const Place& me, const float4& v) {
    float(*at)[PITCH] = tile + me.depth;
    at[0][me.staged] = v.x;
    at[1][me.staged] = v.y;
    at[2][me.staged] = v.z;
    at[3][me.staged] = v.w;
}

// c[i][j] = a-row (me.row + i) · b-row (me.column + j); `a` and `b` are the rows that this thread stages. The next
// elements are on their way from memory while these are multiplied.
template <bool VECTOR>
__device__ void product(float (&c)[4][4], const float* a, const float* b, const Shape& s, Stage& shared, const Place& me) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) c[i][j] = 0.f;
    float4 next_a = fetch<VECTOR>(a, me.depth, s.d), next_b = fetch<VECTOR>(b, me.depth, s.d);
    for (int at = 0; at < s.d; at += DEPTH) {
        __syncthreads();
        stage(shared.a, me, next_a);
        stage(shared.b, me, next_b);
        __syncthreads();
        next_a = fetch<VECTOR>(a, at + DEPTH + me.depth, s.d);
        next_b = fetch<VECTOR>(b, at + DEPTH + me.depth, s.d);
#pragma unroll 2
        for (int k = 0; k < DEPTH; k++) {
            const float4 x = *reinterpret_cast<const float4*>(&shared.a[k][me.row]);
            const float4 y = *reinterpret_cast<const float4*>(&shared.b[k][me.column]);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) c[i][j] = fmaf(xs[i], ys[j], c[i][j]);
        }
    }
}

// Output rows me.row.. and columns me.column + 64·n + 0..4 of a thread.
template <int COLUMNS>
using Sums = float[4][COLUMNS / 16];

template <int COLUMNS>
__device__ void clear(Sums<COLUMNS>& sums) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; j++) sums[i][j] = 0.f;
}

// sums += weights (TILE, count) · rows first.. of `rows`, columns `column`.. of theirs. The weights need no barrier
// before; one is needed before they are overwritten.
template <int COLUMNS, bool VECTOR, class Rows>
__device__ void mix(Sums<COLUMNS>& sums, const float (*weights)[PITCH], const Rows& rows, int first, int count, int column,
                    const Shape& s, Stage& shared, const Place& me) {
    // Rows in shared memory at a time, and quads of columns in one.
    constexpr int CHUNK = TILE * 32 / COLUMNS, QUADS = COLUMNS / 4;
    constexpr int EACH = CHUNK * QUADS / THREADS;
    static_assert(CHUNK * COLUMNS == TILE * 32, "the rows fill the stage");
    float(*staged)[COLUMNS] = reinterpret_cast<float(*)[COLUMNS]>(shared.rows);
    const int quad = threadIdx.x % QUADS, lead = threadIdx.x / QUADS;
    float4 next[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        next[e] = fetch<VECTOR>(rows.row(first + lead + e * (THREADS / QUADS)), column + 4 * quad, s.d);
    }
    for (int at = 0; at < count; at += CHUNK) {
        __syncthreads();
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            *reinterpret_cast<float4*>(&staged[lead + e * (THREADS / QUADS)][4 * quad]) = next[e];
        }
        __syncthreads();
        if (at + CHUNK < count) {
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                next[e] = fetch<VECTOR>(rows.row(first + at + CHUNK + lead + e * (THREADS / QUADS)), column + 4 * quad, s.d);
            }
        }
#pragma unroll 1
        for (int k = 0; k < CHUNK; k += 4) {
            float w[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float4 four = *reinterpret_cast<const float4*>(&weights[me.row + i][at + k]);
                w[i][0] = four.x, w[i][1] = four.y, w[i][2] = four.z, w[i][3] = four.w;
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
#pragma unroll
                for (int n = 0; n < COLUMNS / 64; n++) {
                    const float4 v = *reinterpret_cast<const float4*>(&staged[k + e][me.column + 64 * n]);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        sums[i][4 * n + 0] = fmaf(w[i][e], v.x, sums[i][4 * n + 0]);
                        sums[i][4 * n + 1] = fmaf(w[i][e], v.y, sums[i][4 * n + 1]);
                        sums[i][4 * n + 2] = fmaf(w[i][e], v.z, sums[i][4 * n + 2]);
                        sums[i][4 * n + 3] = fmaf(w[i][e], v.w, sums[i][4 * n + 3]);
                    }
                }
            }
        }
    }
}

// Columns `column`.. of one row from a thread's sums, times `factor`.
template <int COLUMNS>
__device__ void write_row(float* row, const float (&sums)[COLUMNS / 16], float factor, int column, int d, const Place& me) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++) {
        const int at = column + me.column + j / 4 * 64 + j % 4;
        if (at < d) row[at] = sums[j] * factor;
    }
}

// Largest or sum of the 16 threads that share output rows; every one of them gets it.
__device__ float row_max(float x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
__device__ float row_sum(float x) {
#pragma unroll
    for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// A tile's part of the softmax over a split's keys: with m the largest score and l the sum of exp(S - m), leaves
// out = sums / l and lse = m + log l if there is one split, else sums, m and l in the workspace.
template <int COLUMNS, bool VECTOR>
__device__ void forward(float* out, float* lse, float* sums_of_splits, float* stats, const float* q, const float* k,
                        const float* v, const float* past_k, const float* past_v, int splits, const Shape& s) {
    __align__(16) __shared__ Stage shared;
    __align__(16) __shared__ float weights[TILE][PITCH];
    const Place me;
    const int tile = blockIdx.x / splits, split = blockIdx.x % splits, kv_head = blockIdx.y;
    const int column = blockIdx.z * COLUMNS, group = s.group();
    const Span keys = keys_of(tile, s).part(split, splits);
    if (keys.empty()) return;
    const QueryRows queries(q, kv_head, s);
    const KeyRows key_rows(past_k, k, kv_head, s), value_rows(past_v, v, kv_head, s);
    const float* query = queries.row(tile * TILE + me.staged);
    float top[4], total[4];
    int index[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        top[i] = -INFINITY, total[i] = 0.f;
        index[i] = min(s.t - 1, (tile * TILE + me.row + i) / group);
    }
    Sums<COLUMNS> sums;
    clear<COLUMNS>(sums);
    for (int first = keys.first; first < keys.end; first += TILE) {
        float c[4][4];
        product<VECTOR>(c, query, key_rows.row(first + me.staged), s, shared, me);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bool seen[4];
            float highest = top[i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                seen[j] = s.sees(index[i], first + me.column + j);
                c[i][j] *= s.scale;
                if (seen[j]) highest = fmaxf(highest, c[i][j]);
            }
            highest = row_max(highest);
            const float keep = top[i] == -INFINITY ? 0.f : expf(top[i] - highest);
            top[i] = highest;
            total[i] *= keep;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                c[i][j] = seen[j] ? expf(c[i][j] - highest) : 0.f;
                total[i] += c[i][j];
            }
            *reinterpret_cast<float4*>(&weights[me.row + i][me.column]) = make_float4(c[i][0], c[i][1], c[i][2], c[i][3]);
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; j++) sums[i][j] *= keep;
        }
        mix<COLUMNS, VECTOR>(sums, weights, value_rows, first, min(TILE, keys.end - first), column, s, shared, me);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = tile * TILE + me.row + i;
        const float sum = row_sum(total[i]);
        if (row >= queries.rows) continue;
        const bool first_thread = me.column == 0 && blockIdx.z == 0;
        if (splits == 1) {
            write_row<COLUMNS>(out + (size_t)kv_head * group * s.d + queries.at(row), sums[i], 1.f / sum, column, s.d, me);
            if (first_thread) lse[(size_t)(kv_head * group + row % group) * s.t + row / group] = top[i] + logf(sum);
        } else {
            const size_t part = (size_t)(split * s.kv_heads + kv_head) * queries.rows + row;
            write_row<COLUMNS>(sums_of_splits + part * s.d, sums[i], 1.f, column, s.d, me);
            if (first_thread) stats[2 * part] = top[i], stats[2 * part + 1] = sum;
        }
    }
}

// exp(S - lse) and the gradient of the score of every query of a tile: what both halves of backward begin with.
struct Rowwise {
    float lse[TILE];
    // rowsum(dout·out) = rowsum(P·dP).
    float delta[TILE];
};

// Needs a barrier before it is read, which the products have.
template <bool VECTOR>
__device__ void load_rowwise(Rowwise& into, const float* lse, const QueryRows& dout, const QueryRows& out, int kv_head,
                             int first, const Shape& s) {
    // Four threads a row.
    const int i = threadIdx.x / 4, row = first + i;
    float sum = 0.f;
    if (row < dout.rows) {
        const float *a = dout.row(row), *b = out.row(row);
#pragma unroll 1
        for (int at = threadIdx.x % 4 * 4; at < s.d; at += 16) {
            const float4 x = fetch<VECTOR>(a, at, s.d), y = fetch<VECTOR>(b, at, s.d);
            sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
        }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (threadIdx.x % 4 == 0) {
        const int head = kv_head * s.group() + row % s.group();
        into.delta[i] = sum;
        into.lse[i] = row < dout.rows ? lse[(size_t)head * s.t + row / s.group()] : 0.f;
    }
}

struct Saved {
    const float *dout, *out, *lse, *q, *k, *v, *past_k, *past_v;
};

// dq of a tile of queries from the keys of one split: dS = P·(dP - delta)·scale, dP = dout vᵀ, dq = dS k.
template <int COLUMNS, bool VECTOR>
__device__ void backward_queries(float* dq, float* dq_of_splits, const Saved& saved, int tile, int split, int splits,
                                 const Shape& s, Stage& shared, float (*weights)[PITCH], Rowwise& rowwise) {
    const Place me;
    const int kv_head = blockIdx.y, column = blockIdx.z * COLUMNS;
    const Span keys = keys_of(tile, s).part(split, splits);
    if (keys.empty()) return;
    const QueryRows queries(saved.q, kv_head, s), dout(saved.dout, kv_head, s), out(saved.out, kv_head, s);
    const KeyRows key_rows(saved.past_k, saved.k, kv_head, s), value_rows(saved.past_v, saved.v, kv_head, s);
    load_rowwise<VECTOR>(rowwise, saved.lse, dout, out, kv_head, tile * TILE, s);
    Sums<COLUMNS> sums;
    clear<COLUMNS>(sums);
    for (int first = keys.first; first < keys.end; first += TILE) {
        float c[4][4], dp[4][4];
        product<VECTOR>(c, queries.row(tile * TILE + me.staged), key_rows.row(first + me.staged), s, shared, me);
        product<VECTOR>(dp, dout.row(tile * TILE + me.staged), value_rows.row(first + me.staged), s, shared, me);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int query = min(s.t - 1, (tile * TILE + me.row + i) / s.group());
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool counts = s.sees(query, first + me.column + j) && !s.sees_one(query);
                const float p = counts ? expf(c[i][j] * s.scale - rowwise.lse[me.row + i]) : 0.f;
                weights[me.row + i][me.column + j] = p * (dp[i][j] - rowwise.delta[me.row + i]) * s.scale;
            }
        }
        mix<COLUMNS, VECTOR>(sums, weights, key_rows, first, min(TILE, keys.end - first), column, s, shared, me);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = tile * TILE + me.row + i;
        if (row >= queries.rows) continue;
        const size_t whole = (size_t)kv_head * s.group() * s.d + queries.at(row);
        const size_t part = ((size_t)(split * s.kv_heads + kv_head) * queries.rows + row) * s.d;
        write_row<COLUMNS>(splits == 1 ? dq + whole : dq_of_splits + part, sums[i], 1.f, column, s.d, me);
    }
}

// dk and dv of a tile of own keys from one split of the query rows that see them: dk = dSᵀ q, dv = Pᵀ dout. Scores lie
// transposed here, a thread's rows are keys.
template <bool VECTOR>
__device__ void backward_keys(float* dk, float* dv, const Saved& saved, int tile, int split, int splits, int column,
                              const Shape& s, Stage& shared, float (*weights)[PITCH], float (*slopes)[PITCH], Rowwise& rowwise) {
    const Place me;
    const int kv_head = blockIdx.y;
    const Span rows = queries_of(tile, s).part(split, splits);
    if (rows.empty() || column >= s.d) return;
    const QueryRows queries(saved.q, kv_head, s), dout(saved.dout, kv_head, s), out(saved.out, kv_head, s);
    const KeyRows key_rows(saved.past_k, saved.k, kv_head, s), value_rows(saved.past_v, saved.v, kv_head, s);
    Sums<OWN_COLUMNS> dk_sums, dv_sums;
    clear<OWN_COLUMNS>(dk_sums);
    clear<OWN_COLUMNS>(dv_sums);
    for (int first = rows.first; first < rows.end; first += TILE) {
        const int count = min(TILE, rows.end - first);
        // Whoever read those of the tile before has passed the barriers of its mix.
        load_rowwise<VECTOR>(rowwise, saved.lse, dout, out, kv_head, first, s);
        float c[4][4], dp[4][4];
        product<VECTOR>(c, key_rows.row(s.len + tile * TILE + me.staged), queries.row(first + me.staged), s, shared, me);
        product<VECTOR>(dp, value_rows.row(s.len + tile * TILE + me.staged), dout.row(first + me.staged), s, shared, me);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int at = me.column + j, query = (first + at) / s.group();
            const float scale = s.sees_one(query) ? 0.f : s.scale;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const bool counts = at < count && s.sees(query, s.len + tile * TILE + me.row + i);
                const float p = counts ? expf(c[i][j] * s.scale - rowwise.lse[at]) : 0.f;
                weights[me.row + i][at] = p;
                slopes[me.row + i][at] = p * (dp[i][j] - rowwise.delta[at]) * scale;
            }
        }
        mix<OWN_COLUMNS, VECTOR>(dv_sums, weights, dout, first, count, column, s, shared, me);
        mix<OWN_COLUMNS, VECTOR>(dk_sums, slopes, queries, first, count, column, s, shared, me);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int key = tile * TILE + me.row + i;
        if (key >= s.t) continue;
        const size_t row = ((size_t)(splits == 1 ? 0 : split) * s.t + key) * key_rows.stride + (size_t)kv_head * s.d;
        write_row<OWN_COLUMNS>(dk + row, dk_sums[i], 1.f, column, s.d, me);
        write_row<OWN_COLUMNS>(dv + row, dv_sums[i], 1.f, column, s.d, me);
    }
}

// The first blocks of a row of the grid take dq, the others dk and dv.
template <int COLUMNS, bool VECTOR>
__device__ void backward(float* dq, float* dk, float* dv, float* dq_of_splits, float* dk_of_splits, float* dv_of_splits,
                         const Saved& saved, int key_splits, int query_splits, const Shape& s) {
    __align__(16) __shared__ Stage shared;
    __align__(16) __shared__ float weights[TILE][PITCH], slopes[TILE][PITCH];
    __shared__ Rowwise rowwise;
    const int query_blocks = (s.rows() + TILE - 1) / TILE * key_splits;
    const int block = blockIdx.x;
    if (block < query_blocks) {
        backward_queries<COLUMNS, VECTOR>(dq, dq_of_splits, saved, block / key_splits, block % key_splits, key_splits, s, shared,
                                  weights, rowwise);
        return;
    }
    constexpr int PIECES = COLUMNS / OWN_COLUMNS;
    const int own = (block - query_blocks) / PIECES, piece = (block - query_blocks) % PIECES;
    const bool whole = query_splits == 1;
    backward_keys<VECTOR>(whole ? dk : dk_of_splits, whole ? dv : dv_of_splits, saved, own / query_splits, own % query_splits,
                  query_splits, blockIdx.z * COLUMNS + piece * OWN_COLUMNS, s, shared, weights, slopes, rowwise);
}

// sum over parts 0..count of parts[part·size + at], in order.
__device__ float sum_of_parts(const float* parts, size_t size, size_t at, int count) {
    float sum = 0.f;
#pragma unroll 8
    for (int part = 0; part < count; part++) sum += parts[part * size + at];
    return sum;
}

}  // namespace attention_kernels

// Columns of one block: instances for heads of up to 64 elements, for larger ones in pieces of 128, and in pieces of 64 for
// sizes that are no multiple of four.
#define ATTENTION_FORWARD(NAME, COLUMNS, VECTOR)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256, 2) attention_##NAME(                                           \
        float* out, float* lse, float* sums, float* stats, const float* q, const float* k, const float* v,              \
        const float* past_k, const float* past_v, const uint32_t* len, uint32_t t, uint32_t heads, uint32_t kv_heads,   \
        uint32_t d, uint32_t window, float scale, uint32_t splits) {                                                    \
        const attention_kernels::Shape s{(int)t, (int)*len, (int)heads, (int)kv_heads, (int)d, (int)window, scale};     \
        attention_kernels::forward<COLUMNS, VECTOR>(out, lse, sums, stats, q, k, v, past_k, past_v, (int)splits, s);            \
    }
ATTENTION_FORWARD(64, 64, true)
ATTENTION_FORWARD(128, 128, true)
ATTENTION_FORWARD(any, 64, false)

#define ATTENTION_BACKWARD(NAME, COLUMNS, VECTOR)                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, 2) attention_backward_##NAME(                                  \
        float* dq, float* dk, float* dv, float* dq_parts, float* dk_parts, float* dv_parts, const float* dout,          \
        const float* out, const float* lse, const float* q, const float* k, const float* v, const float* past_k,        \
        const float* past_v, const uint32_t* len, uint32_t t, uint32_t heads, uint32_t kv_heads, uint32_t d,            \
        uint32_t window, float scale, uint32_t key_splits, uint32_t query_splits) {                                     \
        const attention_kernels::Shape s{(int)t, (int)*len, (int)heads, (int)kv_heads, (int)d, (int)window, scale};     \
        const attention_kernels::Saved saved{dout, out, lse, q, k, v, past_k, past_v};                                  \
        attention_kernels::backward<COLUMNS, VECTOR>(dq, dk, dv, dq_parts, dk_parts, dv_parts, saved, (int)key_splits,          \
                                             (int)query_splits, s);                                                     \
    }
ATTENTION_BACKWARD(64, 64, true)
ATTENTION_BACKWARD(128, 128, true)
ATTENTION_BACKWARD(any, 64, false)

// out and lse from the parts of all splits; a warp takes one query row of one kv head.
extern "C" __global__ void __launch_bounds__(256) attention_combine(float* out, float* lse, const float* sums, const float* stats,
                                             const uint32_t* len, uint32_t t, uint32_t heads, uint32_t kv_heads, uint32_t d,
                                             uint32_t window, uint32_t splits) {
    using namespace attention_kernels;
    const Shape s{(int)t, (int)*len, (int)heads, (int)kv_heads, (int)d, (int)window, 0.f};
    const int lane = threadIdx.x % 32, group = s.group(), rows = s.rows();
    const size_t index = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (index >= (size_t)kv_heads * rows) return;
    const int kv_head = (int)(index / rows), row = (int)(index % rows);
    const int parts = keys_of(row / TILE, s).parts_in_use((int)splits);
    const size_t size = (size_t)kv_heads * rows;
    float top = -INFINITY, total = 0.f;
    for (int part = lane; part < parts; part += 32) top = fmaxf(top, stats[2 * (part * size + index)]);
    top = warp_max(top);
    const int head = kv_head * group + row % group, query = row / group;
    // A lane has every 32nd column, four of them at a time; weights of 32 parts are made by a lane each.
    for (int column0 = 0; column0 < s.d; column0 += 128) {
        float sum[4] = {};
        total = 0.f;
        for (int part0 = 0; part0 < parts; part0 += 32) {
            const int count = min(32, parts - part0);
            float weight = 0.f, of_part = 0.f;
            if (lane < count) {
                const float* one = stats + 2 * ((part0 + lane) * size + index);
                weight = expf(one[0] - top);
                of_part = one[1] * weight;
            }
            total += warp_sum(of_part);
#pragma unroll 4
            for (int part = 0; part < count; part++) {
                const float* from = sums + ((part0 + part) * size + index) * s.d;
                const float w = __shfl_sync(ALL_LANES, weight, part);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = column0 + 32 * i + lane;
                    if (column < s.d) sum[i] = fmaf(from[column], w, sum[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int column = column0 + 32 * i + lane;
            if (column < s.d) out[((size_t)query * heads + head) * s.d + column] = sum[i] / total;
        }
    }
    if (lane == 0) lse[(size_t)head * s.t + query] = top + logf(total);
}

// dq, dk and dv from their parts; a thread takes one element of the three. What has one split was written already.
extern "C" __global__ void __launch_bounds__(256) attention_backward_combine(float* dq, float* dk, float* dv, const float* dq_parts,
                                                      const float* dk_parts, const float* dv_parts, const uint32_t* len,
                                                      uint32_t t, uint32_t heads, uint32_t kv_heads, uint32_t d,
                                                      uint32_t window, uint32_t key_splits, uint32_t query_splits) {
    using namespace attention_kernels;
    const Shape s{(int)t, (int)*len, (int)heads, (int)kv_heads, (int)d, (int)window, 0.f};
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t queries = (size_t)t * heads * d, own = (size_t)t * kv_heads * d;
    if (index < queries) {
        if (key_splits == 1) return;
        const int rows = s.rows(), column = (int)(index % d), head = (int)(index / d % heads);
        const int row = (int)(index / d / heads) * s.group() + head % s.group();
        const int parts = keys_of(row / TILE, s).parts_in_use((int)key_splits);
        const size_t at = ((size_t)(head / s.group()) * rows + row) * d + column;
        dq[index] = sum_of_parts(dq_parts, queries, at, parts);
    } else if (index < queries + 2 * own) {
        if (query_splits == 1) return;
        const bool value = index >= queries + own;
        const size_t at = index - queries - (value ? own : 0);
        const int key = (int)(at / ((size_t)kv_heads * d));
        const int parts = queries_of(key / TILE, s).parts_in_use((int)query_splits);
        (value ? dv : dk)[at] = sum_of_parts(value ? dv_parts : dk_parts, own, at, parts);
    }
}
