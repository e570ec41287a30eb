// The 16-bit floating-point types of cuda_bf16.h and cuda_fp16.h, as far as kernels here use them: to move, to widen,
// and to round to nearest even. No arithmetic: kernels compute in f32.
#pragma once

#include "language.h"

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
};
struct __half {
    unsigned short bits;
    __half() = default;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 v;
    v.bits = bits;
    return v;
}
inline __half __ushort_as_half(unsigned short bits) {
    __half v;
    v.bits = bits;
    return v;
}

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t bits = __float_as_uint(v);
    if (v != v) return __ushort_as_bfloat16(0x7FFF);
    return __ushort_as_bfloat16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline __nv_bfloat16 __float2bfloat16(float v) { return __float2bfloat16_rn(v); }

inline float __half2float(__half v) {
    uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
    uint32_t exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | mantissa << 13);
    if (exponent == 0) {
        // Subnormal: the mantissa counts steps of 2^-24, exact in f32.
        return __uint_as_float(sign | __float_as_uint(static_cast<float>(mantissa) * 0x1p-24f));
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline __half __float2half_rn(float v) {
    uint32_t sign = __float_as_uint(v) >> 16 & 0x8000, bits = __float_as_uint(v) & 0x7FFFFFFF;
    if (bits > 0x7F800000) return __ushort_as_half(0x7FFF);
    // From 65520 on, half way to the next power of two, the nearest is infinity.
    if (bits >= 0x477FF000) return __ushort_as_half(sign | 0x7C00);
    if (bits < 0x38800000) {
        // Below 2^-14: adding 1/2 leaves a multiple of 2^-24 in the mantissa, rounded to nearest even.
        uint32_t steps = __float_as_uint(__uint_as_float(bits) + 0.5f) - __float_as_uint(0.5f);
        return __ushort_as_half(sign | steps);
    }
    bits += 0xFFF + (bits >> 13 & 1);
    return __ushort_as_half(sign | (bits - (112u << 23)) >> 13);
}
inline __half __float2half(float v) { return __float2half_rn(v); }

// `x` is the lower half of the word.
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
