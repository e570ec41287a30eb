// Projections: P (r,d) with entries N(0, 1/r), four per block of random numbers.
//
// P · len = r·d · sigma = 1/sqrt(r). In f64, so that the numbers are those of the CPU to the last bit of its sine and
// logarithm.

#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) normal_projection(
    float* p, uint64_t len, float sigma, uint32_t key0, uint32_t key1, uint32_t step, uint32_t tensor) {
    const RandomStream stream = {{key0, key1}, step, tensor};
    const uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * index >= len) return;
    double z[4];
    random_normal4(z, stream, index);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (4 * index + i < len) p[4 * index + i] = sigma * static_cast<float>(z[i]);
    }
}
