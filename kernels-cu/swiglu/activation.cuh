// What the kernels of SwiGLU share, so that they agree in every bit.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// up *= silu(gate)
template <class T>
__device__ __forceinline__ void gate(float (&up)[PACK<T>], const float (&gate)[PACK<T>]) {
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) up[i] *= gate[i] * sigmoid(gate[i]);
}
