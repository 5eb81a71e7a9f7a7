// RMSNorm with an optional weight and modulation. Memory-bound: x is read and out written once (4 bytes an element in bf16); backward
// reads x and grad, writes dx, and reads both again for the sums where those are wanted (6 + 4 bytes).
//
// A row belongs to `threads` neighbouring threads, a power of two: a part of a warp, a warp, or a whole block. It is read twice, the
// second time from L1, which costs nothing beside the first and keeps registers for more warps.
#ifndef Element
#include "norm.cuh"
#include "rms_norm_shrink.cuh"

// The norm, and S = X A^T of its result for blocks of RANKS ranks; bf16, whole packs.
#define RMS_NORM_SHRINK(RANKS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) rms_norm_shrink_##RANKS##_bf16(                                  \
        const bf16* __restrict__ x, const bf16* __restrict__ weight, const bf16* __restrict__ scale,                        \
        const bf16* __restrict__ shift, bf16* __restrict__ out, const bf16* __restrict__ a, bf16* __restrict__ s,           \
        shrink::Sizes sizes, int rows_per_entry, int threads, float eps) {                                                  \
        rms_norm_shrink<RANKS / 8>(x, weight, scale, shift, out, a, s, sizes, rows_per_entry, threads, eps);                \
    }
RMS_NORM_SHRINK(16)
RMS_NORM_SHRINK(32)
RMS_NORM_SHRINK(64)

#define KERNELS "rms_norm/rms_norm.cu"
#include "instantiate.cuh"

#else  // once per element type

// out = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift; scale and shift of the entry, `rows_per_entry` rows each.
extern "C" __global__ void __launch_bounds__(1024)
    KERNEL(rms_norm)(const Element* __restrict__ x, const Element* __restrict__ weight, const Element* __restrict__ scale,
                     const Element* __restrict__ shift, Element* __restrict__ out, int rows, int channels, int rows_per_entry,
                     int threads, float eps) {
    __shared__ float scratch[WARP];
    RowThread t(threads, rows);
    int end = t.there ? channels : 0, step = threads * PACK<Element>, first = t.lane * PACK<Element>;
    int64_t at = int64_t(t.row) * channels, entry = t.row / rows_per_entry;
    float v[PACK<Element>], square = 0.0f;
    for (int column = first; column < end; column += step) {
        load(v, x + at + column, pack_count<Element>(channels, column));
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) square = fmaf(v[i], v[i], square);
    }
    float inverse = inverse_rms(row_sum(square, threads, scratch), channels, eps);
    Gains<Element> gains(weight, scale, entry, channels);
    if (shift) shift += entry * channels;
    for (int column = first; column < end; column += step) {
        int count = pack_count<Element>(channels, column);
        load(v, x + at + column, count);
        normalise(v, inverse, gains, shift, column, count);
        store(out + at + column, v, count);
    }
}

// dx = r * (d - x * mean(d * x) * r^2) with d = grad * weight * (1 + scale) and r = 1 / sqrt(mean(x^2) + eps), which is kept for
// rms_norm_parts, if that follows.
extern "C" __global__ void __launch_bounds__(1024)
    KERNEL(rms_norm_dx)(const Element* __restrict__ x, const Element* __restrict__ grad, const Element* __restrict__ weight,
                        const Element* __restrict__ scale, Element* __restrict__ dx, float* __restrict__ inverses, int rows,
                        int channels, int rows_per_entry, int threads, float eps) {
    __shared__ float scratch[WARP];
    RowThread t(threads, rows);
    int end = t.there ? channels : 0, step = threads * PACK<Element>, first = t.lane * PACK<Element>;
    int64_t at = int64_t(t.row) * channels;
    Gains<Element> gains(weight, scale, t.row / rows_per_entry, channels);
    float v[PACK<Element>], d[PACK<Element>], square = 0.0f, product = 0.0f;
    for (int column = first; column < end; column += step) {
        int count = pack_count<Element>(channels, column);
        load(v, x + at + column, count);
        load(d, grad + at + column, count);
        gains.apply(d, column, count);
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) square += v[i] * v[i], product += d[i] * v[i];
    }
    float inverse = inverse_rms(row_sum(square, threads, scratch), channels, eps);
    float mean = row_sum(product, threads, scratch) * inverse * inverse / channels;
    for (int column = first; column < end; column += step) {
        int count = pack_count<Element>(channels, column);
        load(v, x + at + column, count);
        load(d, grad + at + column, count);
        gains.apply(d, column, count);
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) d[i] = inverse * (d[i] - v[i] * mean);
        store(dx + at + column, d, count);
    }
    if (inverses && t.there && t.lane == 0) inverses[t.row] = inverse;
}

// Parts of two sums over the rows of each group: grad * x * inverse, and grad where `shifts` is wanted; both
// [splits][groups][channels]; see RowPart.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    KERNEL(rms_norm_parts)(const Element* __restrict__ x, const Element* __restrict__ grad, const float* __restrict__ inverses,
                           float* __restrict__ norms, float* __restrict__ shifts, int rows, int channels, int lanes) {
    RowPart<Element> part(rows, channels, lanes);
    x += part.start * channels, grad += part.start * channels, inverses += part.start;
    pack_sums<Element, 2>(
        part.first, part.last, part.column_block, channels, lanes,
        [=](float(&sum)[2][PACK<Element>], int row, int column, int count) {
            int64_t at = int64_t(row) * channels + column;
            float v[PACK<Element>], g[PACK<Element>], inverse = inverses[row];
            load(v, x + at, count);
            load(g, grad + at, count);
#pragma unroll
            for (int i = 0; i < PACK<Element>; i++) sum[0][i] += g[i] * (v[i] * inverse), sum[1][i] += g[i];
        },
        [=](int k, int column, float total) {
            float* to = k == 0 ? norms : shifts;
            if (to) to[part.out * channels + column] = total;
        });
}

// Adds the parts up: dscale = weight * N, dshift, and what each entry gives to the weight's gradient, (1 + scale) * N, with N the sum
// of `norms`. `n` = entries * channels.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(rms_norm_finish)(const float* __restrict__ norms, const float* __restrict__ shifts, const Element* __restrict__ weight,
                            const Element* __restrict__ scale, Element* __restrict__ dscale, Element* __restrict__ dshift,
                            float* __restrict__ dweight, int n, int channels, int splits) {
    int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= n) return;
    float norm = 0.0f, shift = 0.0f;
    for (int s = 0; s < splits; s++) norm += norms[int64_t(s) * n + i], shift += shifts[int64_t(s) * n + i];
    dscale[i] = from_float<Element>(weight ? norm * to_float(weight[i % channels]) : norm);
    dshift[i] = from_float<Element>(shift);
    if (dweight) dweight[i] = norm * (1.0f + to_float(scale[i]));
}

#endif
