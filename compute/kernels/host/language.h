// The words that CUDA C++ adds to C++: qualifiers, small vectors, and the intrinsics that kernels here may use.
//
// Left out on purpose: float atomics (results must not depend on the order of blocks) and the approximate functions
// (__expf and others), so that a kernel that uses them does not compile here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
// Shared memory belongs to a block and a block to a thread of the system, so thread-local is enough; block.h finds all
// such variables by the program header and fills them with NaN before every block.
#define __shared__ static thread_local
// The list of kernels is made from the preprocessed text, in which these two have to survive.
#ifndef HOST_LISTS_KERNELS
#define __global__
#define __launch_bounds__(...)
#endif

#define HOST_VECTOR(name, type, align)                                            \
    struct alignas(align * sizeof(type)) name##2 { type x, y; };                  \
    struct name##3 { type x, y, z; };                                             \
    struct alignas(2 * align * sizeof(type)) name##4 { type x, y, z, w; };        \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }   \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
HOST_VECTOR(float, float, 2)
HOST_VECTOR(int, int, 2)
HOST_VECTOR(uint, unsigned, 2)
HOST_VECTOR(ushort, unsigned short, 2)
#undef HOST_VECTOR
struct alignas(16) double2 { double x, y; };
inline double2 make_double2(double x, double y) { return {x, y}; }

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <typename To, typename From>
inline To host_bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

inline uint32_t __float_as_uint(float v) { return host_bit_cast<uint32_t>(v); }
inline int __float_as_int(float v) { return host_bit_cast<int>(v); }
inline float __uint_as_float(uint32_t v) { return host_bit_cast<float>(v); }
inline float __int_as_float(int v) { return host_bit_cast<float>(v); }

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __clz(uint32_t v) { return v == 0 ? 32 : __builtin_clz(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(static_cast<int>(v)); }

// Built without contraction, so that each of these is one rounding, as on the device.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }

template <typename T>
inline T __ldg(const T* at) { return *at; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
inline T host_exchange(T* at, T value) {
    static_assert(std::is_same<T, int>::value || std::is_same<T, uint32_t>::value, "atomics are for 32-bit integers");
    T old = *at;
    *at = value;
    return old;
}
inline uint32_t atomicAdd(uint32_t* at, uint32_t v) { return host_exchange(at, *at + v); }
inline int atomicAdd(int* at, int v) { return host_exchange(at, *at + v); }
inline uint32_t atomicMax(uint32_t* at, uint32_t v) { return host_exchange(at, *at > v ? *at : v); }
inline uint32_t atomicMin(uint32_t* at, uint32_t v) { return host_exchange(at, *at < v ? *at : v); }
inline uint32_t atomicOr(uint32_t* at, uint32_t v) { return host_exchange(at, *at | v); }
inline uint32_t atomicExch(uint32_t* at, uint32_t v) { return host_exchange(at, v); }
inline uint32_t atomicCAS(uint32_t* at, uint32_t want, uint32_t v) { return host_exchange(at, *at == want ? v : *at); }
// Wraps: the classic counter of finished blocks.
inline uint32_t atomicInc(uint32_t* at, uint32_t last) { return host_exchange(at, *at >= last ? 0 : *at + 1); }

template <typename A, typename B>
inline typename std::common_type<A, B>::type min(A a, B b) {
    using T = typename std::common_type<A, B>::type;
    if constexpr (std::is_floating_point<T>::value) return std::fmin(T(a), T(b));
    return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
inline typename std::common_type<A, B>::type max(A a, B b) {
    using T = typename std::common_type<A, B>::type;
    if constexpr (std::is_floating_point<T>::value) return std::fmax(T(a), T(b));
    return T(a) < T(b) ? T(b) : T(a);
}
