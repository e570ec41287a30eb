// What the kernels share: element types, sums over a warp and a block, random numbers, stochastic rounding, and the
// one tensor-core product.
//
// The same sources are compiled by nvcc for a GPU and by a C++ compiler for tests (host/shim.h). Conventions:
//   - A kernel is `extern "C" __global__ void name(...)`, with `__launch_bounds__(n)` before the name if any; a macro may
//     write it. Tests find kernels by this text after preprocessing.
//   - Shared memory is `__shared__`, or `DYNAMIC_SHARED(float, name)` for what the launch gives.
//   - A block that uses warp or block operations has a multiple of 32 threads, and all of them come.
//   - Foreign weights (an inference server's) change under us: no `__restrict__` on them and no `__ldg`, both of which
//     let the compiler use the read-only cache. They are written by aligned stores of whole elements.
//   - Floating-point atomics are not used: results do not depend on the order of blocks.
//   - The compiler fuses no product with a sum (ci/kernels.py): write fmaf where one is wanted.
#pragma once

#ifdef __CUDACC__
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DYNAMIC_SHARED(type, name)                                    \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];   \
    type* const name = reinterpret_cast<type*>(dynamic_shared)

// D = A·B + C over a warp: A (16,16) row-major and B (16,8) in bf16, C = D (16,8) in f32. The lower half of a word is
// the element of the lower index. With g = lane / 4 and q = lane % 4 (PTX ISA, mma.m16n8k16):
//   a[0] = A[g][2q, 2q+1]      a[1] = A[g+8][2q, 2q+1]      a[2] = A[g][2q+8, 2q+9]      a[3] = A[g+8][2q+8, 2q+9]
//   b[0] = B[2q, 2q+1][g]      b[1] = B[2q+8, 2q+9][g]
//   c[0], c[1] = C[g][2q, 2q+1]                             c[2], c[3] = C[g+8][2q, 2q+1]
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
#include "host/shim.h"
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr uint32_t ALL_LANES = 0xFFFFFFFF;

// --- Elements ---

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(f16 v) { return __half2float(v); }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }

// To the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float v) {
    return __float2bfloat16_rn(v);
}

template <typename T>
__device__ __forceinline__ float load(const T* at, size_t i) {
    return widen(at[i]);
}
template <typename T>
__device__ __forceinline__ void store(T* at, size_t i, float v) {
    at[i] = narrow<T>(v);
}

// The two bf16 of a word; the lower half is `x`.
__device__ __forceinline__ float2 unpack_bf16(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000));
}
// Two values rounded to the nearest bf16; `x` goes to the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float x, float y) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(y))) << 16;
}
__device__ __forceinline__ float2 unpack_f16(uint32_t word) {
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(word))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16))));
}

// Eight elements from `at`, which is aligned to 16 bytes.
__device__ __forceinline__ void load8(float (&v)[8], const bf16* at) {
    uint4 raw = *reinterpret_cast<const uint4*>(at);
    float2 a = unpack_bf16(raw.x), b = unpack_bf16(raw.y), c = unpack_bf16(raw.z), d = unpack_bf16(raw.w);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}
__device__ __forceinline__ void load8(float (&v)[8], const f16* at) {
    uint4 raw = *reinterpret_cast<const uint4*>(at);
    float2 a = unpack_f16(raw.x), b = unpack_f16(raw.y), c = unpack_f16(raw.z), d = unpack_f16(raw.w);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}
__device__ __forceinline__ void load8(float (&v)[8], const float* at) {
    float4 a = *reinterpret_cast<const float4*>(at), b = *reinterpret_cast<const float4*>(at + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ bool aligned16(const void* at) { return (reinterpret_cast<uintptr_t>(at) & 15) == 0; }

// The same pointer, known to point to global memory: one that comes out of a struct is generic to the compiler, whose
// accesses through it then keep their order with those of shared memory.
template <typename T>
__device__ __forceinline__ T* as_global(T* at) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(at));
#endif
    return at;
}

// --- Reductions: the order of the additions is fixed, so a result is the same on every run ---

// The sum over the warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
    for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(ALL_LANES, v, distance);
    return v;
}

// The largest of the warp, in every lane.
__device__ __forceinline__ float warp_max(float v) {
    for (int distance = 16; distance > 0; distance /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, distance));
    return v;
}

// The sum over a block of one dimension, in every thread.
template <typename T>
__device__ __forceinline__ T block_sum(T v) {
    __shared__ T partial[32];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_sum(v);
    // Whoever still reads the partial sums of the call before has to be done.
    __syncthreads();
    if (lane == 0) partial[warp] = v;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? partial[lane] : T(0));
}

// The largest of a block of one dimension, in every thread.
__device__ __forceinline__ float block_max(float v) {
    __shared__ float partial[32];
    unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_max(v);
    __syncthreads();
    if (lane == 0) partial[warp] = v;
    __syncthreads();
    return warp_max(lane < blockDim.x / 32 ? partial[lane] : -INFINITY);
}

// --- Random numbers: bit for bit those of compute/src/random.rs ---

// The random numbers of one purpose, step and tensor; the key is made on the host.
struct RandomStream {
    uint32_t key[2];
    uint32_t step, tensor;
};

// Philox4x32-10 (Salmon et al., SC 2011) of block `index`.
__device__ __forceinline__ uint4 philox(const RandomStream& stream, uint64_t index) {
    uint32_t key0 = stream.key[0], key1 = stream.key[1];
    uint4 c = make_uint4(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), stream.step, stream.tensor);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t high_x = __umulhi(0xD2511F53, c.x), low_x = 0xD2511F53 * c.x;
        uint32_t high_z = __umulhi(0xCD9E8D57, c.z), low_z = 0xCD9E8D57 * c.z;
        c = make_uint4(high_z ^ c.y ^ key0, low_z, high_x ^ c.w ^ key1, low_x);
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return c;
}

// The block that holds the 16-bit number of an element. Elements e, e + 16, ..., e + 112 of a group of 128 share one,
// so a thread that takes these eight draws once.
__device__ __forceinline__ uint64_t random_block(uint64_t element) { return element / 128 * 16 + element % 16; }

// 16-bit number `half` < 8 of a block; that of element e is half e % 128 / 16.
__device__ __forceinline__ uint32_t random_half(const uint4& words, unsigned half) {
    uint32_t word = half / 2 == 0 ? words.x : half / 2 == 1 ? words.y : half / 2 == 2 ? words.z : words.w;
    return half % 2 == 0 ? word & 0xFFFF : word >> 16;
}

// The 16-bit number of one element, `Stream::fill_u16`.
__device__ __forceinline__ uint32_t random_u16(const RandomStream& stream, uint64_t element) {
    return random_half(philox(stream, random_block(element)), element % 128 / 16);
}

// Four N(0,1) numbers, 4·index and on, `Stream::fill_normal`: Box-Muller in f64. The caller rounds to f32 and scales.
__device__ __forceinline__ void random_normal4(double (&z)[4], const RandomStream& stream, uint64_t index) {
    uint4 words = philox(stream, index);
    uint32_t uniform[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        double radius = sqrt(-2.0 * log((uniform[i] + 0.5) / 4294967296.0));
        double angle = 6.283185307179586476925287 * (uniform[i + 1] / 4294967296.0);
        z[i] = radius * cos(angle);
        z[i + 1] = radius * sin(angle);
    }
}

// --- Stochastic rounding: bit for bit that of compute/src/cpu/foreign.rs; `random` < 2^16 ---

template <typename T>
__device__ __forceinline__ T round_stochastic(float v, uint32_t random);

template <>
__device__ __forceinline__ float round_stochastic<float>(float v, uint32_t) {
    return v;
}

// Adds 16 random bits below the cut, then cuts. A finite value never becomes infinite.
template <>
__device__ __forceinline__ bf16 round_stochastic<bf16>(float v, uint32_t random) {
    uint32_t bits = __float_as_uint(v);
    uint32_t magnitude = ((bits & 0x7FFFFFFF) + random) >> 16;
    magnitude = magnitude < 0x7F7F ? magnitude : 0x7F7F;
    return __ushort_as_bfloat16(static_cast<unsigned short>(magnitude | (bits >> 16 & 0x8000)));
}

// Between the two neighbours on the f16 grid, whose subnormals are denser than those of f32.
template <>
__device__ __forceinline__ f16 round_stochastic<f16>(float v, uint32_t random) {
    float magnitude = fminf(fabsf(v), 65504.0f);
    int exponent = static_cast<int>(__float_as_uint(magnitude) >> 23) - 127;
    exponent = exponent < -14 ? -14 : exponent;
    // The distance of neighbours at this magnitude, and its inverse: powers of two, so the products are exact.
    float ulp = __uint_as_float(static_cast<uint32_t>(exponent - 10 + 127) << 23);
    float steps = magnitude * __uint_as_float(static_cast<uint32_t>(10 - exponent + 127) << 23);
    float below = floorf(steps);
    float up = (steps - below) * 65536.0f > static_cast<float>(random) ? 1.0f : 0.0f;
    float rounded = fminf((below + up) * ulp, 65504.0f);
    unsigned short sign = static_cast<unsigned short>(__float_as_uint(v) >> 16 & 0x8000);
    return __ushort_as_half(__half_as_ushort(__float2half_rn(rounded)) | sign);
}
