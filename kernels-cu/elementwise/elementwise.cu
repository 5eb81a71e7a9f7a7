// Sums, gated residuals, copies of blocks, reductions over rows. All memory-bound: a thread moves 16 bytes of each operand.
#ifndef Element
#include "common.cuh"
#include "reduce.cuh"

// out[i] = f(a[i], b[i]) over n elements.
template <class T, class F>
__device__ void zip(const T* a, const T* b, T* out, int64_t n, F f) {
    int64_t at = thread_index() * PACK<T>;
    if (at >= n) return;
    int count = pack_count<T>(n, at);
    float x[PACK<T>], y[PACK<T>];
    load(x, a + at, count);
    load(y, b + at, count);
#pragma unroll
    for (int i = 0; i < PACK<T>; i++) x[i] = f(x[i], y[i]);
    store(out + at, x, count);
}

template <class To, class From>
__device__ void cast(const From* x, To* out, int64_t n) {
    // A pack of the narrower type, so that both sides move whole 16 bytes.
    int64_t at = thread_index() * PACK<bf16>;
    if (at >= n) return;
    if (n - at >= PACK<bf16>) {
#pragma unroll
        for (int half = 0; half < PACK<bf16>; half += 4) {
            if constexpr (sizeof(To) == 2) {
                float4 q = *reinterpret_cast<const float4*>(x + at + half);
                *reinterpret_cast<uint2*>(out + at + half) = make_uint2(narrow(q.x, q.y), narrow(q.z, q.w));
            } else {
                uint2 q = *reinterpret_cast<const uint2*>(x + at + half);
                float v[4];
                widen(q.x, v[0], v[1]), widen(q.y, v[2], v[3]);
                store_pack(out + at + half, v);
            }
        }
    } else {
        for (int64_t i = at; i < n; i++) out[i] = from_float<To>(to_float(x[i]));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) cast_bf16(const float* x, bf16* out, int64_t n) {
    cast(x, out, n);
}

extern "C" __global__ void __launch_bounds__(BLOCK) cast_f32(const bf16* x, float* out, int64_t n) {
    cast(x, out, n);
}

// Sums the parts of a reduction: out[i] = factor * sum of partial[s][i]. Lane l of an element adds up the parts l, l + lanes, .. in order,
// then the lanes' sums are added up in order: a wait for memory is shared by all lanes, where one thread would have it for every few parts.
template <class T>
__device__ __forceinline__ void sum_parts(const float* partial, T* out, int64_t n, int splits, int lanes, float factor) {
    __shared__ float sums[BLOCK];
    int columns = BLOCK / lanes, column = threadIdx.x % columns, lane = threadIdx.x / columns;
    int64_t i = int64_t(blockIdx.x) * columns + column;
    float sum = 0.0f;
    if (i < n) {
#pragma unroll 8
        for (int s = lane; s < splits; s += lanes) sum += partial[s * n + i];
    }
    if (lanes > 1) {
        sums[threadIdx.x] = sum;
        __syncthreads();
        for (int l = 1; lane == 0 && l < lanes; l++) sum += sums[l * columns + column];
    }
    if (lane == 0 && i < n) out[i] = from_float<T>(factor * sum);
}

#define KERNELS "elementwise/elementwise.cu"
#include "instantiate.cuh"

#else  // once per element type
extern "C" __global__ void __launch_bounds__(BLOCK) KERNEL(add)(const Element* a, const Element* b, Element* out, int64_t n) {
    zip(a, b, out, n, [](float x, float y) { return x + y; });
}

extern "C" __global__ void __launch_bounds__(BLOCK) KERNEL(scale)(const Element* x, Element* out, int64_t n, float f) {
    zip(x, x, out, n, [f](float v, float) { return f * v; });
}

// a + rate * (b - a), never contracted to an FMA: the CPU's bits.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(lerp)(const Element* a, const Element* b, Element* out, int64_t n, float rate) {
    zip(a, b, out, n, [rate](float x, float y) { return __fadd_rn(x, __fmul_rn(rate, __fsub_rn(y, x))); });
}

// Copies `length` of every `from` elements, from `start` on, to `at` of every `to` elements.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(copy_blocks)(Element* out, int64_t at, int64_t to, const Element* x, int64_t start, int64_t from, int length,
                    uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, length)) return;
    float v[PACK<Element>];
    load(v, x + int64_t(p.row) * from + start + p.column, p.count);
    store(out + int64_t(p.row) * to + at + p.column, v, p.count);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(add_blocks)(Element* sum, int64_t at, int64_t to, const Element* x, int length, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, length)) return;
    float v[PACK<Element>], s[PACK<Element>];
    Element* place = sum + int64_t(p.row) * to + at + p.column;
    load(v, x + int64_t(p.row) * length + p.column, p.count);
    load(s, place, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) s[i] += v[i];
    store(place, s, p.count);
}

// out[row] = x[row / k], rows of `each`.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(repeat_each)(const Element* x, Element* out, int each, int k, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, each)) return;
    float v[PACK<Element>];
    load(v, x + int64_t(p.row / uint32_t(k)) * each + p.column, p.count);
    store(out + int64_t(p.row) * each + p.column, v, p.count);
}

// out[row] = sum over j of x[row * k + j].
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(sum_each)(const Element* x, Element* out, int each, int k, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, each)) return;
    float sum[PACK<Element>] = {}, v[PACK<Element>];
    for (int j = 0; j < k; j++) {
        load(v, x + (int64_t(p.row) * k + j) * each + p.column, p.count);
#pragma unroll
        for (int i = 0; i < PACK<Element>; i++) sum[i] += v[i];
    }
    store(out + int64_t(p.row) * each + p.column, sum, p.count);
}

// out = base + gate[row / rows_per_entry] * y; no base: only the product.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(gated)(const Element* base, const Element* y, const Element* gate, Element* out, int channels, int rows_per_entry,
              uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, channels)) return;
    int64_t at = int64_t(p.row) * channels + p.column;
    float v[PACK<Element>], g[PACK<Element>], b[PACK<Element>] = {};
    load(v, y + at, p.count);
    load(g, gate + int64_t(p.row / uint32_t(rows_per_entry)) * channels + p.column, p.count);
    if (base) load(b, base + at, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) b[i] += g[i] * v[i];
    store(out + at, b, p.count);
}

// out = x + row, over every row.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(add_row)(const Element* x, const Element* row, Element* out, int channels, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, channels)) return;
    int64_t at = int64_t(p.row) * channels + p.column;
    float v[PACK<Element>], r[PACK<Element>];
    load(v, x + at, p.count);
    load(r, row + p.column, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) v[i] += r[i];
    store(out + at, v, p.count);
}

// out = (x - mean) * scale, over every row.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(standardise)(const Element* x, const Element* mean, const Element* scale, Element* out, int channels, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, channels)) return;
    int64_t at = int64_t(p.row) * channels + p.column;
    float v[PACK<Element>], m[PACK<Element>], s[PACK<Element>];
    load(v, x + at, p.count);
    load(m, mean + p.column, p.count);
    load(s, scale + p.column, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) v[i] = (v[i] - m[i]) * s[i];
    store(out + at, v, p.count);
}

// Tokens from lengths[entry] on become zero.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(mask_tokens)(const Element* x, const int* lengths, Element* out, int channels, int tokens,
                    uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, channels)) return;
    int64_t at = int64_t(p.row) * channels + p.column, entry = p.row / uint32_t(tokens);
    float v[PACK<Element>] = {};
    if (int(p.row - entry * tokens) < lengths[entry]) load(v, x + at, p.count);
    store(out + at, v, p.count);
}

// out[row] = factor * x[row / rows_per_entry].
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(broadcast)(const Element* x, Element* out, int channels, int rows_per_entry, uint32_t rows, float factor) {
    Place p;
    if (!row_place<Element>(p, rows, channels)) return;
    float v[PACK<Element>];
    load(v, x + int64_t(p.row / uint32_t(rows_per_entry)) * channels + p.column, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) v[i] *= factor;
    store(out + int64_t(p.row) * channels + p.column, v, p.count);
}

// Parts of sums over the rows of each group, [splits][groups][channels]; see RowPart. `y` is a factor, or null.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(column_parts)(const Element* x, const Element* y, float* partial, int rows, int channels, int lanes) {
    RowPart<Element> part(rows, channels, lanes);
    pack_sums<Element, 1>(
        part.first, part.last, part.column_block, channels, lanes,
        [=](float(&sum)[1][PACK<Element>], int row, int column, int count) {
            int64_t at = (part.start + row) * channels + column;
            float v[PACK<Element>], f[PACK<Element>];
            load(v, x + at, count);
            if (y) load(f, y + at, count);
#pragma unroll
            for (int i = 0; i < PACK<Element>; i++) sum[0][i] += y ? v[i] * f[i] : v[i];
        },
        [=](int, int column, float total) { partial[part.out * channels + column] = total; });
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(sum_parts)(const float* partial, Element* out, int64_t n, int splits, int lanes, float factor) {
    sum_parts(partial, out, n, splits, lanes, factor);
}

#endif
