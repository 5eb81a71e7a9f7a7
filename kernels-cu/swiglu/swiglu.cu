// SwiGLU and SiLU: memory-bound, a thread moves 16 bytes of each operand.
#ifndef Element
#include "activation.cuh"
#include "swiglu_shrink.cuh"

// The derivative of silu(x) = x * s, with s = sigmoid(x).
__device__ __forceinline__ float silu_slope(float x, float s) { return s * (1.0f + x * (1.0f - s)); }

// The activation, and S = X A^T of its result for blocks of RANKS ranks; bf16, whole packs.
#define SWIGLU_SHRINK(RANKS)                                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) swiglu_shrink_##RANKS##_bf16(                                    \
        const bf16* __restrict__ x, bf16* __restrict__ out, const bf16* __restrict__ a, bf16* __restrict__ s,               \
        shrink::Sizes sizes) {                                                                                              \
        swiglu_shrink<RANKS / 8>(x, out, a, s, sizes);                                                                      \
    }
SWIGLU_SHRINK(16)
SWIGLU_SHRINK(32)
SWIGLU_SHRINK(64)

#define KERNELS "swiglu/swiglu.cu"
#include "instantiate.cuh"

#else  // once per element type

// Rows [up | gate] of twice `half` elements -> up * silu(gate).
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(swiglu)(const Element* __restrict__ x, Element* __restrict__ out, int half, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, half)) return;
    int64_t at = int64_t(p.row) * half + p.column, up = at + int64_t(p.row) * half;
    float u[PACK<Element>], g[PACK<Element>];
    load(u, x + up, p.count);
    load(g, x + up + half, p.count);
    gate<Element>(u, g);
    store(out + at, u, p.count);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(swiglu_gradient)(const Element* __restrict__ x, const Element* __restrict__ grad, Element* __restrict__ dx, int half,
                            uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, half)) return;
    int64_t at = int64_t(p.row) * half + p.column, up = at + int64_t(p.row) * half;
    float u[PACK<Element>], g[PACK<Element>], d[PACK<Element>];
    load(u, x + up, p.count);
    load(g, x + up + half, p.count);
    load(d, grad + at, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) {
        float s = sigmoid(g[i]), dgate = d[i] * u[i] * silu_slope(g[i], s);
        u[i] = d[i] * g[i] * s;
        g[i] = dgate;
    }
    store(dx + up, u, p.count);
    store(dx + up + half, g, p.count);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(silu)(const Element* __restrict__ x, Element* __restrict__ out, int64_t n) {
    int64_t at = thread_index() * PACK<Element>;
    if (at >= n) return;
    int count = pack_count<Element>(n, at);
    float v[PACK<Element>];
    load(v, x + at, count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) v[i] *= sigmoid(v[i]);
    store(out + at, v, count);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(silu_gradient)(const Element* __restrict__ x, const Element* __restrict__ grad, Element* __restrict__ dx, int64_t n) {
    int64_t at = thread_index() * PACK<Element>;
    if (at >= n) return;
    int count = pack_count<Element>(n, at);
    float v[PACK<Element>], d[PACK<Element>];
    load(v, x + at, count);
    load(d, grad + at, count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) d[i] *= silu_slope(v[i], sigmoid(v[i]));
    store(dx + at, d, count);
}

#endif
