// Philox4x32-10 and Box-Muller: the bits of hywu_core::Philox. Every operation on floats is rounded on its own (the intrinsics are
// never contracted to an FMA), as on the CPU. About 200 instructions for 16 bytes: arithmetic and memory take as long.
#ifndef Element
#include "common.cuh"

// A generator's key.
struct Seed {
    uint32_t low, high;
};

__device__ __forceinline__ uint4 philox(Seed seed, uint64_t stream, uint64_t block) {
    uint4 c = make_uint4(uint32_t(block), uint32_t(block >> 32), uint32_t(stream), uint32_t(stream >> 32));
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = uint64_t(c.x) * 0xD2511F53u, p1 = uint64_t(c.z) * 0xCD9E8D57u;
        c = make_uint4(uint32_t(p1 >> 32) ^ c.y ^ seed.low, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ seed.high,
                       uint32_t(p0));
        seed.low += 0x9E3779B9u;
        seed.high += 0xBB67AE85u;
    }
    return c;
}

// sqrt(-2 ln u) for the u in (0, 1) of a word.
__device__ __forceinline__ float radius(uint32_t word) {
    float u = __fmul_rn(__fadd_rn(float(word >> 9), 0.5f), 1.0f / 8388608.0f);
    uint32_t bits = __float_as_uint(u);
    int e = int(bits >> 23) - 127;
    float m = __uint_as_float((bits & 0x007fffffu) | 0x3f800000u);
    if (m > 1.41421356237309504880f) {
        m = __fmul_rn(m, 0.5f);
        e += 1;
    }
    float z = __fdiv_rn(__fsub_rn(m, 1.0f), __fadd_rn(m, 1.0f)), q = __fmul_rn(z, z);
    float series = 1.0f / 9.0f;
    series = __fadd_rn(1.0f / 7.0f, __fmul_rn(q, series));
    series = __fadd_rn(1.0f / 5.0f, __fmul_rn(q, series));
    series = __fadd_rn(1.0f / 3.0f, __fmul_rn(q, series));
    series = __fadd_rn(1.0f, __fmul_rn(q, series));
    series = __fmul_rn(__fmul_rn(2.0f, z), series);
    float ln = __fadd_rn(__fmul_rn(float(e), 0.693147180559945309417f), series);
    return __fsqrt_rn(fmaxf(__fmul_rn(-2.0f, ln), 0.0f));
}

// radius times cos and sin of 2 pi * word / 2^32: the top three bits choose the octant.
__device__ __forceinline__ void on_circle(float& x, float& y, float radius, uint32_t word) {
    uint32_t octant = word >> 29, part = (word << 3) >> 9;
    if (octant & 1) part = (1u << 23) - part;
    float a = __fmul_rn(float(part), 0.785398163397448309616f / 8388608.0f), q = __fmul_rn(a, a);
    float s = __fsub_rn(1.0f / 5040.0f, __fmul_rn(q, 1.0f / 362880.0f));
    s = __fsub_rn(1.0f / 120.0f, __fmul_rn(q, s));
    s = __fsub_rn(1.0f / 6.0f, __fmul_rn(q, s));
    s = __fmul_rn(a, __fsub_rn(1.0f, __fmul_rn(q, s)));
    float c = __fsub_rn(1.0f / 720.0f, __fmul_rn(q, 1.0f / 40320.0f));
    c = __fsub_rn(1.0f / 24.0f, __fmul_rn(q, c));
    c = __fsub_rn(0.5f, __fmul_rn(q, c));
    c = __fsub_rn(1.0f, __fmul_rn(q, c));
    // Octants 1, 2, 5 and 6 exchange both; cos is negative in 2 .. 5, sin in 4 .. 7.
    bool exchanged = (octant + 1) & 2;
    float cosine = exchanged ? s : c, sine = exchanged ? c : s;
    x = __fmul_rn(radius, octant >= 2 && octant < 6 ? -cosine : cosine);
    y = __fmul_rn(radius, octant >= 4 ? -sine : sine);
}

// Normal numbers 4 * block .. of a stream.
__device__ __forceinline__ void draw(float (&v)[4], Seed seed, uint64_t stream, uint64_t block) {
    uint4 w = philox(seed, stream, block);
    on_circle(v[0], v[1], radius(w.x), w.y);
    on_circle(v[2], v[3], radius(w.z), w.w);
}

// Row r of `out` = numbers start .. start + length of stream first + r.
extern "C" __global__ void __launch_bounds__(BLOCK)
    noise_window(Seed seed, int64_t first, int64_t start, float* out, int length, uint32_t rows) {
    // A thread takes a whole block of four numbers; `skip` of a row's first block lie before it.
    int skip = int(start & 3);
    Place p;
    if (!row_place<float>(p, rows, skip + length)) return;
    float v[4];
    draw(v, seed, uint64_t(first) + p.row, uint64_t(start >> 2) + uint64_t(p.column >> 2));
    float* row = out + int64_t(p.row) * length;
    if (skip == 0) {
        store(row + p.column, v, p.count);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int x = p.column + i - skip;
            if (x >= 0 && x < length) row[x] = v[i];
        }
    }
}

#define KERNELS "noise/noise.cu"
#include "instantiate.cuh"

#else  // once per element type

// out = t * x + (1 - t) * numbers 0 .. of stream entry + 1, for every entry of `each` elements.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(noised)(const Element* x, const float* t, Element* out, Seed seed, int each, uint32_t entries) {
    Place p;
    if (!row_place<Element>(p, entries, each)) return;
    int64_t at = int64_t(p.row) * each + p.column;
    float v[PACK<Element>], share = t[p.row], rest = __fsub_rn(1.0f, share);
    load(v, x + at, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i += 4) {
        float n[4];
        draw(n, seed, uint64_t(p.row) + 1, uint64_t((p.column + i) >> 2));
#pragma unroll
        for (int j = 0; j < 4; j++) v[i + j] = __fadd_rn(__fmul_rn(share, v[i + j]), __fmul_rn(rest, n[j]));
    }
    store(out + at, v, p.count);
}

#endif
