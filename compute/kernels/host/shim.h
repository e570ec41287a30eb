// CUDA C++ for a compiler that knows only C++: include this instead of CUDA's headers, before the kernels.
//
// c++ -std=c++17 -x c++ kernels.cu; `host::Kernel<name>::launch(grid, block, dynamic_bytes, arguments...)` runs one.
#pragma once

#include "warp.h"

// D = A·B + C of a warp; see common.cuh.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    host::Product mine{{"mma_bf16", ~0u, host::exchange_product}, c, a, b};
    host::join(mine);
}

// The block's dynamic shared memory, aligned to 16 bytes.
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::host::block->dynamic)
