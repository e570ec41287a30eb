// Hashes of blocks of weights where they lie, to find those that changed since the last sync; and the gathering of
// those that did.
//
// B: bytes of a block, a multiple of 16 of at most 4096 · w_0, w_1, ...: a block's 32-bit words, its last 16 bytes
// filled up with zeros · piece j of lane l: the 16 bytes at 16·(32j + l), words w_4(32j+l) and on ·
// k_0, ..., k_512: pairs of 32-bit keys, drawn on the host, `.x` in the lower half of a word.
//
// NH of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway, CRYPTO 1999), twice: for t = 0, 1
//   H_t = Σ_p (a_p + k_{p+t}.x) · (b_p + k_{p+t}.y)  mod 2^64,   sums in brackets mod 2^32,
// over the pairs (a_p, b_p) of neighbouring words, numbered lane by lane so that a lane's keys follow each other:
// p = 16·l + 2j for the first pair of piece j of lane l, 16·l + 2j + 1 for the second. For two different contents of a
// block the probability over the keys that H_0 agrees is at most 2^-32, that both agree at most 2^-64 (their theorem on
// the Toeplitz construction). Whoever knows the keys can make collisions: this tells changed weights, it does not
// authenticate them.
//
// A lane keeps its 17 key pairs in registers for all its blocks, and has all its loads of a block on their way before it
// uses the first. 3 operations for 8 bytes and each H: far from what limits it, which is reading. compute/src/hash.rs is
// the same in Rust, bit for bit. Not run on a GPU yet.
#include "common.cuh"

constexpr uint32_t HASH_LANES = 32;
// 16-byte pieces of a lane, and pairs of words in them.
constexpr uint32_t HASH_PIECES = 8;
constexpr uint32_t HASH_PAIRS = 2 * HASH_PIECES;
// Blocks that a warp takes in a row, so that it looks up their tensor once.
constexpr uint32_t HASH_RUN = 8;

// A tensor: where its bytes lie, how many, and the number of its first block among those of all tensors.
struct HashTask {
    uint64_t ptr, bytes, first;
};

__device__ __forceinline__ uint64_t hash_product(uint32_t a, uint32_t b, uint2 key) {
    return static_cast<uint64_t>(a + key.x) * static_cast<uint64_t>(b + key.y);
}

// The lane's 16 bytes at `first` of a block that is aligned to 2 bytes only, or cut short: what is beyond is zero.
__device__ __forceinline__ uint4 hash_piece_by_halves(const unsigned char* block, uint32_t first, uint32_t bytes) {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        if (first + 2 * i < bytes) {
            uint32_t half = *reinterpret_cast<const uint16_t*>(block + first + 2 * i);
            words[i / 2] |= half << (16 * (i % 2));
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The lane's part of both sums of a block. WHOLE: 4096 bytes, aligned to 16.
template <bool WHOLE>
__device__ __forceinline__ void hash_block(uint64_t (&h)[2], const unsigned char* block, uint32_t bytes, uint32_t lane,
                                           const uint2 (&keys)[HASH_PAIRS + 1]) {
    uint4 v[HASH_PIECES];
#pragma unroll
    for (uint32_t j = 0; j < HASH_PIECES; j++) {
        const uint32_t first = 16 * (HASH_LANES * j + lane);
        v[j] = WHOLE ? *reinterpret_cast<const uint4*>(block + first) : hash_piece_by_halves(block, first, bytes);
    }
    h[0] = h[1] = 0;
#pragma unroll
    for (uint32_t j = 0; j < HASH_PIECES; j++) {
        if (!WHOLE && 16 * (HASH_LANES * j + lane) >= bytes) continue;
#pragma unroll
        for (uint32_t t = 0; t < 2; t++) {
            h[t] += hash_product(v[j].x, v[j].y, keys[2 * j + t]);
            h[t] += hash_product(v[j].z, v[j].w, keys[2 * j + 1 + t]);
        }
    }
}

// The last task that begins at `block` or before.
__device__ __forceinline__ uint32_t hash_task_of(const HashTask* tasks, uint32_t count, uint64_t block) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (tasks[middle].first <= block) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Blocks begin..end of all, 16 bytes each to `out` from its start. A warp for HASH_RUN blocks at a time.
extern "C" __global__ void __launch_bounds__(256) block_hashes(uint64_t* out, const HashTask* tasks, const uint2* keys,
                                                               uint32_t count, uint64_t begin, uint64_t end,
                                                               uint32_t block_bytes) {
    const uint32_t lane = threadIdx.x % HASH_LANES;
    const uint64_t warp = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / HASH_LANES;
    const uint64_t warps = static_cast<uint64_t>(gridDim.x) * blockDim.x / HASH_LANES;
    uint2 mine[HASH_PAIRS + 1];
#pragma unroll
    for (uint32_t p = 0; p <= HASH_PAIRS; p++) mine[p] = keys[HASH_PAIRS * lane + p];
    for (uint64_t run = begin + warp * HASH_RUN; run < end; run += warps * HASH_RUN) {
        uint32_t task = hash_task_of(tasks, count, run);
        for (uint64_t block = run; block < run + HASH_RUN && block < end; block++) {
            while (task + 1 < count && tasks[task + 1].first <= block) task++;
            const uint64_t offset = (block - tasks[task].first) * block_bytes;
            const uint64_t left = tasks[task].bytes - offset;
            const uint32_t bytes = left < block_bytes ? static_cast<uint32_t>(left) : block_bytes;
            const unsigned char* at = reinterpret_cast<const unsigned char*>(tasks[task].ptr + offset);
            uint64_t h[2];
            if (bytes == 16 * HASH_LANES * HASH_PIECES && aligned16(at)) {
                hash_block<true>(h, at, bytes, lane, mine);
            } else {
                hash_block<false>(h, at, bytes, lane, mine);
            }
            h[0] = warp_sum(h[0]);
            h[1] = warp_sum(h[1]);
            if (lane == 0) {
                out[2 * (block - begin)] = h[0];
                out[2 * (block - begin) + 1] = h[1];
            }
        }
    }
}

// Some bytes to copy, an even number from even addresses.
struct GatherTask {
    uint64_t from, to, bytes;
};

// Copies scattered parts of weights side by side. A block for a task.
extern "C" __global__ void __launch_bounds__(256) gather_bytes(const GatherTask* tasks) {
    const GatherTask task = tasks[blockIdx.x];
    const unsigned char* from = reinterpret_cast<const unsigned char*>(task.from);
    unsigned char* to = reinterpret_cast<unsigned char*>(task.to);
    uint64_t whole = 0;
    if (aligned16(from) && aligned16(to)) {
        whole = task.bytes / 16 * 16;
        for (uint64_t at = 16 * threadIdx.x; at < whole; at += 16 * blockDim.x) {
            *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
        }
    }
    for (uint64_t at = whole + 2 * threadIdx.x; at < task.bytes; at += 2 * blockDim.x) {
        *reinterpret_cast<uint16_t*>(to + at) = *reinterpret_cast<const uint16_t*>(from + at);
    }
}
