// Training losses: sums of products to one float, and their gradients.
#ifndef Element
#include "common.cuh"
#include "reduce.cuh"

// Partial sums, added up in double: out = factor * sum. One block.
extern "C" __global__ void __launch_bounds__(BLOCK) finish_loss(const float* partial, float* out, int n, float factor) {
    double sum = sum_in_double(partial, n);
    if (threadIdx.x == 0) *out = float(sum * factor);
}

// weight[i / each] of the `count` elements i from `at` on: one division for all, as one of 64 bits takes longer than the memory.
template <class T>
__device__ __forceinline__ void entry_weights(float (&w)[PACK<T>], const float* weight, int64_t at, int64_t each, int count) {
    int64_t entry = at / each, left = each - (at - entry * each);
    weight += entry;
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) {
        if (i == left) weight++, left += each;
        w[i] = i < count ? *weight : 0.0f;
    }
}

// Packs that a thread of a loss adds up.
constexpr int PACKS = 4;

// Sum over the block's part of n elements of what value(a, b, at, count) makes, in place of a, of packs of two tensors.
template <class T, class F>
__device__ void sum_block(const T* a, const T* b, float* partial, int64_t n, F value) {
    __shared__ float scratch[WARP];
    float sum = 0.0f;
    int64_t first = int64_t(blockIdx.x) * (BLOCK * PACKS * PACK<T>);
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
        int64_t at = first + int64_t(j * BLOCK + threadIdx.x) * PACK<T>;
        if (at < n) {
            int count = pack_count<T>(n, at);
            float x[PACK<T>], y[PACK<T>];
            load(x, a + at, count);
            load(y, b + at, count);
            value(x, y, at, count);
#pragma unroll
            for (int i = 0; i < PACK<T>; i++)
                if (i < count) sum += x[i];
        }
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

#define KERNELS "loss/loss.cu"
#include "instantiate.cuh"

#else  // once per element type

// Parts of sum over entries b of weight[b] * (pred - target)^2, `each` elements an entry.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(squares)(const Element* pred, const Element* target, const float* weight, float* partial, int64_t n,
                    int64_t each) {
    using Pack = float[PACK<Element>];
    sum_block(pred, target, partial, n, [=](Pack& p, const Pack& t, int64_t at, int count) {
        Pack w;
        entry_weights<Element>(w, weight, at, each, count);
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) {
            float d = p[i] - t[i];
            p[i] = w[i] * d * d;
        }
    });
}

// Parts of sum(x * weights).
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(products)(const Element* x, const Element* weights, float* partial, int64_t n) {
    using Pack = float[PACK<Element>];
    sum_block(x, weights, partial, n, [](Pack& v, const Pack& w, int64_t, int) {
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) v[i] *= w[i];
    });
}

// factor * grad * weight[b] * (pred - target).
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(squares_gradient)(const Element* pred, const Element* target, const float* weight, const float* grad,
                             Element* out, int64_t n, int64_t each, float factor) {
    int64_t at = thread_index() * PACK<Element>;
    if (at >= n) return;
    int count = pack_count<Element>(n, at);
    float p[PACK<Element>], t[PACK<Element>], w[PACK<Element>], g = factor * *grad;
    load(p, pred + at, count);
    load(t, target + at, count);
    entry_weights<Element>(w, weight, at, each, count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) p[i] = g * w[i] * (p[i] - t[i]);
    store(out + at, p, count);
}

// grad * weights.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(products_gradient)(const Element* weights, const float* grad, Element* out, int64_t n) {
    int64_t at = thread_index() * PACK<Element>;
    if (at >= n) return;
    int count = pack_count<Element>(n, at);
    float w[PACK<Element>], g = *grad;
    load(w, weights + at, count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) w[i] *= g;
    store(out + at, w, count);
}

#endif
