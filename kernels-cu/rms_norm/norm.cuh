// What the kernels of a norm share, so that they agree in every bit.
#pragma once

#include "common.cuh"

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
