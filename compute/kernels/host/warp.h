// Barriers and the operations that the lanes of a warp do together, among them the tensor core's product.
#pragma once

#include "block.h"
#include "half.h"

namespace host {

// Joins an operation of the warp; the last member to come does it for all.
inline void join(Collective& mine) {
    Block& b = *block;
    Warp& w = b.warps[b.warp];
    uint32_t members = mine.mask & w.exists, self = 1u << b.lane;
    if (!(members & self)) fail("a warp operation whose mask leaves out the lane itself");
    if (members & w.done) fail_divergent(w);
    w.posted[b.lane] = &mine;
    w.at_warp |= self;
    bool complete = (w.at_warp & members) == members;
    if (!complete) return wait();
    Collective* lanes[LANES] = {};
    for (unsigned i = 0; i < LANES && complete; i++) {
        if (!(members >> i & 1)) continue;
        lanes[i] = w.posted[i];
        complete = lanes[i]->mask == mine.mask;
        if (lanes[i]->name != mine.name && strcmp(lanes[i]->name, mine.name) != 0) fail_divergent(w);
    }
    if (!complete) return wait();
    mine.exchange(lanes, members);
    w.at_warp &= ~members;
    w.ready |= members & ~self;
}

struct Shuffle : Collective {
    uint64_t value, result;
    unsigned source;
};

inline void exchange_shuffle(Collective* const* lanes, uint32_t members) {
    for (unsigned i = 0; i < LANES; i++) {
        if (!(members >> i & 1)) continue;
        auto* mine = static_cast<Shuffle*>(lanes[i]);
        bool there = members >> mine->source & 1;
        mine->result = there ? static_cast<Shuffle*>(lanes[mine->source])->value : ~uint64_t{0};
    }
}

template <typename T>
T shuffle(const char* name, uint32_t mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    Shuffle mine{{name, mask, exchange_shuffle}, 0, 0, source};
    memcpy(&mine.value, &value, sizeof(T));
    join(mine);
    memcpy(&value, &mine.result, sizeof(T));
    return value;
}

struct Vote : Collective {
    bool value;
    uint32_t result;
};

inline void exchange_votes(Collective* const* lanes, uint32_t members) {
    uint32_t votes = 0;
    for (unsigned i = 0; i < LANES; i++) {
        if (members >> i & 1 && static_cast<Vote*>(lanes[i])->value) votes |= 1u << i;
    }
    for (unsigned i = 0; i < LANES; i++) {
        if (members >> i & 1) static_cast<Vote*>(lanes[i])->result = votes;
    }
}

inline uint32_t vote(const char* name, uint32_t mask, bool value) {
    Vote mine{{name, mask, exchange_votes}, value, 0};
    join(mine);
    return mine.result;
}

inline void exchange_nothing(Collective* const*, uint32_t) {}

// One lane's part of D = A·B + C: A (16,16) and B (16,8) in bf16, C and D (16,8) in f32.
struct Product : Collective {
    float* c;
    const uint32_t *a, *b;
};

// The half of a word that holds element `i` of the lane's fragment; even elements are in the lower half.
inline float fragment(const uint32_t* words, unsigned i) {
    return __uint_as_float(words[i / 2] >> 16 * (i % 2) << 16);
}

// Where the lanes hold what is PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"; with g the lane
// divided by 4 and q the rest:
//   element i < 8 of A: row g + 8·(i / 2 odd), column 2q + i % 2 + 8·(i >= 4)
//   element i < 4 of B: row 2q + i % 2 + 8·(i >= 2), column g
//   element i < 4 of C: row g + 8·(i >= 2), column 2q + i % 2
inline void exchange_product(Collective* const* lanes, uint32_t members) {
    if (members != ~0u) fail("a tensor-core product needs all 32 lanes");
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < LANES; lane++) {
        auto* p = static_cast<Product*>(lanes[lane]);
        unsigned g = lane / 4, q = lane % 4;
        for (unsigned i = 0; i < 8; i++) a[g + 8 * (i / 2 % 2)][2 * q + i % 2 + 8 * (i / 4)] = fragment(p->a, i);
        for (unsigned i = 0; i < 4; i++) b[2 * q + i % 2 + 8 * (i / 2)][g] = fragment(p->b, i);
    }
    float d[16][8] = {};
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned col = 0; col < 8; col++) d[row][col] += a[row][k] * b[k][col];
        }
    }
    for (unsigned lane = 0; lane < LANES; lane++) {
        auto* p = static_cast<Product*>(lanes[lane]);
        for (unsigned i = 0; i < 4; i++) p->c[i] += d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
}

}  // namespace host

inline void __syncthreads() {
    host::Block& b = *host::block;
    b.warps[b.warp].at_block |= 1u << b.lane;
    host::wait();
}

inline void __syncwarp(uint32_t mask = ~0u) {
    host::Collective mine{"__syncwarp", mask, host::exchange_nothing};
    host::join(mine);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    unsigned first = host::block->lane & ~(width - 1);
    return host::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int flipped, int width = 32) {
    unsigned lane = host::block->lane, source = lane ^ flipped;
    return host::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
    unsigned lane = host::block->lane, source = lane + distance;
    return host::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
    unsigned lane = host::block->lane, first = lane & ~(width - 1);
    return host::shuffle("__shfl_up_sync", mask, value, lane < first + distance ? lane : lane - distance);
}

inline uint32_t __ballot_sync(uint32_t mask, bool value) { return host::vote("__ballot_sync", mask, value); }
inline int __any_sync(uint32_t mask, bool value) { return host::vote("__any_sync", mask, value) != 0; }
inline int __all_sync(uint32_t mask, bool value) {
    host::Block& b = *host::block;
    uint32_t members = mask & b.warps[b.warp].exists;
    return host::vote("__all_sync", mask, value) == members;
}
