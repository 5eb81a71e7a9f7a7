// The optimiser's step over all weights at once: gradient norm, clipping, AdamW (arXiv 1711.05101), average. The host does not wait
// between them: the factor that clips stays on the device.
//
// Weights, moments and average are flat float tensors; gradients are one tensor per weight. A block takes one chunk of one weight.
// Floor of the step: 30 bytes moved per weight with an average (p, m, v, average read and written, a bf16 gradient read), 22 without.
#ifndef Element
#include "common.cuh"
#include "reduce.cuh"

// Part of a weight, at most CHUNK elements.
struct Chunk {
    uint64_t grad;    // address of its first gradient
    uint64_t offset;  // of its first weight in the flat tensors
    uint32_t length;
    uint32_t decays;
};

struct Rates {
    float lr, beta1, beta2, correct1, correct2, eps, decay;
};

// Four elements of a gradient.
__device__ __forceinline__ void load_four(float (&v)[4], const float* p) { load_pack(v, p); }
__device__ __forceinline__ void load_four(float (&v)[4], const bf16* p) {
    uint2 q = *reinterpret_cast<const uint2*>(p);
    widen(q.x, v[0], v[1]), widen(q.y, v[2], v[3]);
}

// The gradient's norm and the factor that clips it to `most`, from the chunks' sums of squares: norm[0], norm[1]. A norm that is not
// finite gives a factor that is not, which the step takes as a sign to do nothing. One block.
extern "C" __global__ void __launch_bounds__(BLOCK)
    finish_norm(const float* squares, float* norm, int n, float most) {
    double sum = sum_in_double(squares, n);
    if (threadIdx.x == 0) {
        float total = float(sqrt(sum));
        norm[0] = total;
        norm[1] = isfinite(total) ? (total > most ? most / total : 1.0f) : total;
    }
}

#define KERNELS "optim/optim.cu"
#include "instantiate.cuh"

#else  // once per element type of the gradients

extern "C" __global__ void __launch_bounds__(BLOCK) KERNEL(gradient_squares)(const Chunk* chunks, float* squares) {
    __shared__ float scratch[WARP];
    Chunk c = chunks[blockIdx.x];
    const Element* grad = reinterpret_cast<const Element*>(c.grad);
    float sum = 0.0f;
    for (uint32_t at = threadIdx.x * PACK<Element>; at < c.length; at += BLOCK * PACK<Element>) {
        float g[PACK<Element>];
        load(g, grad + at, pack_count<Element>(c.length, at));
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) sum += g[i] * g[i];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// `average` may be null; it moves by `share` of the way to the new weights.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(adamw)(const Chunk* chunks, const float* norm, float* weights, float* m, float* v, float* average, Rates r,
                  float share) {
    Chunk c = chunks[blockIdx.x];
    const Element* grad = reinterpret_cast<const Element*>(c.grad);
    float factor = norm[1], decay = c.decays ? r.decay : 1.0f;
    if (!isfinite(factor)) return;
    for (uint32_t at = threadIdx.x * 4; at < c.length; at += BLOCK * 4) {
        int64_t place = c.offset + at;
        // Flat tensors are padded, so the moments and weights of a ragged end may be touched; gradients may not.
        float g[4], w[4], m4[4], v4[4];
        if (c.length - at >= 4) {
            load_four(g, grad + at);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) g[i] = at + i < c.length ? to_float(grad[at + i]) : 0.0f;
        }
        load_pack(w, weights + place);
        load_pack(m4, m + place);
        load_pack(v4, v + place);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            g[i] *= factor;
            m4[i] = r.beta1 * m4[i] + (1.0f - r.beta1) * g[i];
            v4[i] = r.beta2 * v4[i] + (1.0f - r.beta2) * g[i] * g[i];
            w[i] = w[i] * decay - r.lr * (m4[i] / r.correct1) / (sqrtf(v4[i] / r.correct2) + r.eps);
        }
        store_pack(weights + place, w);
        store_pack(m + place, m4);
        store_pack(v + place, v4);
        if (average) {
            float a[4];
            load_pack(a, average + place);
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] += share * (w[i] - a[i]);
            store_pack(average + place, a);
        }
    }
}

#endif
