// All kernels as one translation unit: `ci/kernels.sh` makes apollod.ptx of it.

#include "adamw.cu"
#include "apollo.cu"
#include "attention.cu"
#include "embed.cu"
#include "hash.cu"
#include "linear.cu"
#include "loss.cu"
#include "norm.cu"
#include "pointwise.cu"
#include "projection.cu"
#include "rope.cu"
