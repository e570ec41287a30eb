// Every kernel, as one translation unit: what the PTX is made of.
#include "hash.cu"
