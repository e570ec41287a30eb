// All kernels as one translation unit: `ci/kernels.sh` makes apollod.ptx of it.

#include "adamw.cu"
#include "apollo.cu"
#include "linear.cu"
#include "projection.cu"
