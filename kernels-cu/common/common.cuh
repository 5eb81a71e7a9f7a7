// What every kernel shares: element types, 16-byte accesses, instantiation.
//
// Elements are float or bf16; arithmetic is float. A tensor starts at a multiple of 16 bytes (the launcher checks it). Kernels are
// extern "C" and named <function>_f32 and <function>_bf16; see instantiate.cuh.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;

// Dynamic shared memory, as a pointer to `type`.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name)                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];    \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

constexpr int BLOCK = 256;
constexpr int WARP = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Elements in 16 bytes.
template <class T> constexpr int PACK = 16 / sizeof(T);

// The bits of two bf16 as floats: the upper half of a float is a bf16.
__device__ __forceinline__ void widen(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ uint32_t narrow(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ void load_pack(float (&v)[4], const float* p) {
    float4 q = *reinterpret_cast<const float4*>(p);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
}

__device__ __forceinline__ void widen(const uint4& q, float (&v)[8]) {
    widen(q.x, v[0], v[1]), widen(q.y, v[2], v[3]), widen(q.z, v[4], v[5]), widen(q.w, v[6], v[7]);
}

__device__ __forceinline__ uint4 narrow(const float (&v)[8]) {
    return make_uint4(narrow(v[0], v[1]), narrow(v[2], v[3]), narrow(v[4], v[5]), narrow(v[6], v[7]));
}

__device__ __forceinline__ void load_pack(float (&v)[8], const bf16* p) { widen(*reinterpret_cast<const uint4*>(p), v); }

__device__ __forceinline__ void store_pack(float* p, const float (&v)[4]) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}

__device__ __forceinline__ void store_pack(bf16* p, const float (&v)[8]) { *reinterpret_cast<uint4*>(p) = narrow(v); }

// Is it a whole pack that one 16-byte access moves? Rows of odd lengths start anywhere.
template <class T> __device__ __forceinline__ bool whole(const T* p, int count) {
    return count == PACK<T> && (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// The first `count` <= PACK elements at p; the rest is zero.
template <class T> __device__ __forceinline__ void load(float (&v)[PACK<T>], const T* p, int count) {
    if (whole(p, count)) {
        load_pack(v, p);
    } else {
#pragma unroll
        for (int i = 0; i < PACK<T>; i++) v[i] = i < count ? to_float(p[i]) : 0.0f;
    }
}

template <class T> __device__ __forceinline__ void store(T* p, const float (&v)[PACK<T>], int count) {
    if (whole(p, count)) {
        store_pack(p, v);
    } else {
#pragma unroll
        for (int i = 0; i < PACK<T>; i++)
            if (i < count) p[i] = from_float<T>(v[i]);
    }
}

// Stores the first `count` of 8 neighbours, which may start anywhere, by their bits.
__device__ __forceinline__ void store_bits(bf16* p, const uint4& bits, int count) {
    if (whole(p, count)) {
        *reinterpret_cast<uint4*>(p) = bits;
    } else {
        float v[8];
        widen(bits, v);
        store(p, v, count);
    }
}

// The bits of the first `count` of 8 neighbours, which may start anywhere; zeros for the others.
__device__ __forceinline__ uint4 pack_bits(const bf16* p, int count) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(p);
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t low = 2 * i < count ? from[2 * i] : 0, high = 2 * i + 1 < count ? from[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Index of the thread in the grid's x.
__device__ __forceinline__ int64_t thread_index() {
    return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}

// Elements of a row of `length`, of which the thread's pack starts at `at`.
template <class T> __device__ __forceinline__ int pack_count(int64_t length, int64_t at) {
    int64_t rest = length - at;
    return rest < PACK<T> ? int(rest) : PACK<T>;
}

// A thread's pack of rows of `length` elements.
struct Place {
    uint32_t row;
    int column, count;
};

// One thread per pack, row after row; the launcher keeps the number of packs below 2^32, as a 64-bit division would take longer
// than the memory.
template <class T> __device__ __forceinline__ bool row_place(Place& p, uint32_t rows, int length) {
    uint32_t packs = (uint32_t(length) + PACK<T> - 1) / PACK<T>, i = blockIdx.x * blockDim.x + threadIdx.x;
    p.row = i / packs;
    p.column = int(i - p.row * packs) * PACK<T>;
    p.count = pack_count<T>(length, p.column);
    return p.row < rows;
}
