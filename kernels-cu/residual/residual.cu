// A residual stream in f32: its rows are read through an RMSNorm and added to in place, in the type that layers compute in. Memory-bound:
// in bf16 reading moves 6 bytes an element, adding 10, both at once 12.
//
// The rows of a call are runs of `length` neighbours, a run every `pitch`.
#ifndef Element
#include "common.cuh"
#include "rms_norm/norm.cuh"

// Packs of a row that a thread keeps between the sum and the norm; what a wider row has more of is read again.
constexpr int KEPT = 2;

// N neighbours in f32, of which `count` are there; the rest is zero.
template <int N> __device__ __forceinline__ void load_floats(float (&v)[N], const float* p, int count) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float part[4];
        load(part, p + i, min(max(count - i, 0), 4));
#pragma unroll
        for (int j = 0; j < 4; j++) v[i + j] = part[j];
    }
}

template <int N> __device__ __forceinline__ void store_floats(float* p, const float (&v)[N], int count) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float part[4] = {v[i], v[i + 1], v[i + 2], v[i + 3]};
        store(p + i, part, min(max(count - i, 0), 4));
    }
}

// The first `count` of a pack of x, after y is added to it where there is one.
template <class T> __device__ __forceinline__ void load_sum(float (&v)[PACK<T>], float* x, const T* y, int count) {
    load_floats(v, x, count);
    if (!y) return;
    float more[PACK<T>];
    load(more, y, count);
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) v[i] += more[i];
    store_floats(x, v, count);
}

#define KERNELS "residual/residual.cu"
#include "instantiate.cuh"

#else  // once per element type

// out[row] = x[first + row / length * pitch + row % length] / sqrt(mean(x^2) + eps) * weight, after x += y[row] where there is a y.
extern "C" __global__ void __launch_bounds__(1024)
    KERNEL(residual_read)(float* __restrict__ x, const Element* __restrict__ y, const Element* __restrict__ weight,
                          Element* __restrict__ out, int64_t first, int64_t pitch, int length, int rows, int channels, int threads, float eps) {
    __shared__ float scratch[WARP];
    RowThread t(threads, rows);
    constexpr int N = PACK<Element>;
    int end = t.there ? channels : 0, step = threads * N, start = t.lane * N;
    x += (first + t.row / length * pitch + t.row % length) * channels;
    out += int64_t(t.row) * channels;
    if (y) y += int64_t(t.row) * channels;
    float kept[KEPT][N], v[N], square = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int column = start + k * step;
        if (column >= end) continue;
        load_sum(kept[k], x + column, y ? y + column : nullptr, pack_count<Element>(channels, column));
#pragma unroll
        for (int i = 0; i < N; i++) square = fmaf(kept[k][i], kept[k][i], square);
    }
    for (int column = start + KEPT * step; column < end; column += step) {
        load_sum(v, x + column, y ? y + column : nullptr, pack_count<Element>(channels, column));
#pragma unroll
        for (int i = 0; i < N; i++) square = fmaf(v[i], v[i], square);
    }
    float inverse = inverse_rms(row_sum(square, threads, scratch), channels, eps);
    Gains<Element> gains(weight, nullptr, 0, channels);
    const Element* no_shift = nullptr;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int column = start + k * step, count = pack_count<Element>(channels, column);
        if (column >= end) continue;
        normalise(kept[k], inverse, gains, no_shift, column, count);
        store(out + column, kept[k], count);
    }
    for (int column = start + KEPT * step; column < end; column += step) {
        int count = pack_count<Element>(channels, column);
        load_floats(v, x + column, count);
        normalise(v, inverse, gains, no_shift, column, count);
        store(out + column, v, count);
    }
}

// x[first + run * pitch + i] += y[run * length + i] over the elements of `runs` runs.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(residual_add)(float* __restrict__ x, const Element* __restrict__ y, int64_t first, int64_t pitch, int length,
                         uint32_t runs) {
    Place p;
    if (!row_place<Element>(p, runs, length)) return;
    constexpr int N = PACK<Element>;
    float sum[N];
    load_sum(sum, x + first + int64_t(p.row) * pitch + p.column, y + int64_t(p.row) * length + p.column, p.count);
}
#endif
