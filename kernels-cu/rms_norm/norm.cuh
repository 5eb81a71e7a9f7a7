// What the kernels of a norm share, so that they agree in every bit.
#pragma once

#include "common.cuh"
#include "reduce.cuh"

// Sum over the threads of a row; every thread of the block takes part.
__device__ __forceinline__ float row_sum(float x, int threads, float* scratch) {
    if (threads > WARP) return block_sum(x, scratch);
    for (int offset = threads / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The block's place: row, first pack and step of the thread. Rows beyond the last have no packs, but take part in the sums.
struct RowThread {
    int row, lane;
    bool there;

    __device__ __forceinline__ RowThread(int threads, int rows)
        : row(blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads), lane(threadIdx.x % threads), there(row < rows) {}
};

__device__ __forceinline__ float inverse_rms(float squares, int channels, float eps) {
    return 1.0f / sqrtf(squares / channels + eps);
}

// Factors of a pack. `WHOLE`: they are whole packs, at multiples of 16 bytes.
template <bool WHOLE, class T>
__device__ __forceinline__ void load_factors(float (&v)[PACK<T>], const T* p, int count) {
    if constexpr (WHOLE)
        widen(__ldg(reinterpret_cast<const uint4*>(p)), v);
    else
        load(v, p, count);
}

// The factors of a row: absent ones are null.
template <class T, bool WHOLE = false> struct Gains {
    const T *weight, *scale;

    __device__ __forceinline__ Gains(const T* weight, const T* scale, int64_t entry, int channels)
        : weight(weight), scale(scale ? scale + entry * channels : nullptr) {}

    // v *= weight * (1 + scale)
    __device__ __forceinline__ void apply(float (&v)[PACK<T>], int column, int count) const {
        float f[PACK<T>];
        if (weight) {
            load_factors<WHOLE>(f, weight + column, count);
#pragma unroll
            for (int i = 0; i < PACK<T>; i++) v[i] *= f[i];
        }
        if (scale) {
            load_factors<WHOLE>(f, scale + column, count);
#pragma unroll
            for (int i = 0; i < PACK<T>; i++) v[i] *= 1.0f + f[i];
        }
    }
};

// v = v * inverse * weight * (1 + scale) + shift. No sum is contracted with the product before it here, whatever surrounds it.
template <class T, bool WHOLE>
__device__ __forceinline__ void normalise(float (&v)[PACK<T>], float inverse, const Gains<T, WHOLE>& gains, const T* shift,
                                          int column, int count) {
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) v[i] *= inverse;
    gains.apply(v, column, count);
    if (shift) {
        float s[PACK<T>];
        load_factors<WHOLE>(s, shift + column, count);
#pragma unroll
        for (int i = 0; i < PACK<T>; i++) v[i] = __fadd_rn(v[i], s[i]);
    }
}
