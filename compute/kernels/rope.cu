// Rotary embedding in the rotate-half layout (Su et al., RoFormer, as Hugging Face stores it).
#include "common.cuh"

// x (t, heads, d) in place: the pair (i, i + rotated/2) of a head turns by the angle of position `*position` + row; what lies
// beyond `rotated` stays. `table` is (positions, rotated): cos then sin halves. Rows beyond the table are padding and turn as
// its last. `sign` -1 undoes it.
extern "C" __global__ void __launch_bounds__(256) rope(float* x, const float* table, const uint32_t* position, uint32_t t,
                                                       uint32_t heads, uint32_t d, uint32_t rotated, uint32_t positions, float sign) {
    const uint32_t half = rotated / 2;
    const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= (size_t)t * heads * half) return;
    const uint32_t pair = (uint32_t)(index % half), row = (uint32_t)(index / half / heads);
    const uint32_t at = *position + row < positions ? *position + row : positions - 1;
    const float* angles = table + (size_t)at * rotated;
    const float c = angles[pair], s = sign * angles[half + pair];
    float* head = x + index / half * d;
    const float a = head[pair], b = head[half + pair];
    head[pair] = a * c - b * s;
    head[half + pair] = b * c + a * s;
}
