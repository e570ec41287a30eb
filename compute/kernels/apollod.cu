// All kernels as one translation unit: `ci/kernels.sh` makes apollod.ptx of it.

#include "attention.cu"
#include "embed.cu"
#include "loss.cu"
#include "norm.cu"
#include "pointwise.cu"
#include "rope.cu"
