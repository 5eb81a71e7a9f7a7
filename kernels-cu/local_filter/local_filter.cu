// Features of pixels, and a filter per patch over them.
#ifndef Element
#include "common.cuh"
#include "reduce.cuh"

// As in ops/local_filter.rs.
constexpr int FEATURES = 31, HIDDEN = 32, COEFFICIENTS = 3 * FEATURES + 4 * HIDDEN;
// Where mix and shift start in a patch's coefficients.
constexpr int MIX = 3 * FEATURES, SHIFT = MIX + 3 * HIDDEN;

// N floats, N a multiple of 4, at a multiple of 16 bytes.
template <int N> __device__ __forceinline__ void load_floats(float (&v)[N], const float* p) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        float4 q = *reinterpret_cast<const float4*>(p + i);
        v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
    }
}

template <int N> __device__ __forceinline__ void store_floats(float* p, const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
}

// The pixel that mirror padding shows at place i of an axis of n.
__device__ __forceinline__ int reflect(int i, int n) {
    i = abs(i);
    if (i < n) return i;
    if (n < 2) return 0;
    int period = 2 * (n - 1);
    i %= period;
    return min(i, period - i);
}

// One level of the a trous transform: the B3 spline along both axes, `hole` pixels from tap to tap. A thread per element; the 25 taps
// come from the L1 cache.
template <class T>
__device__ __forceinline__ void smooth(const T* x, float* out, int h, int w, int hole, uint32_t rows) {
    constexpr float SPLINE[5] = {1.0f / 16.0f, 4.0f / 16.0f, 6.0f / 16.0f, 4.0f / 16.0f, 1.0f / 16.0f};
    uint32_t length = 3 * w, i = blockIdx.x * blockDim.x + threadIdx.x, row = i / length;
    if (row >= rows) return;
    int y = int(row % uint32_t(h)), element = int(i - row * length), px = element / 3;
    const T* picture = x + int64_t(row - y) * length + (element - 3 * px);
    int from[5];
#pragma unroll
    for (int tap = 0; tap < 5; tap++) from[tap] = 3 * reflect(px + (tap - 2) * hole, w);
    float sum = 0.0f;
#pragma unroll
    for (int down = 0; down < 5; down++) {
        const T* line = picture + int64_t(reflect(y + (down - 2) * hole, h)) * length;
        float across = 0.0f;
#pragma unroll
        for (int tap = 0; tap < 5; tap++) across += SPLINE[tap] * to_float(line[from[tap]]);
        sum += SPLINE[down] * across;
    }
    out[i] = sum;
}

// Mean colour of every patch, p x p pixels: a warp each. `across` patches of w = across * p columns; rows of all pictures together.
template <class T>
__device__ __forceinline__ void patch_means(const T* x, float* out, int across, int p, uint32_t patches) {
    uint32_t patch = blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
    if (patch >= patches) return;
    int lane = threadIdx.x % WARP;
    uint32_t down = patch / uint32_t(across);
    const T* corner = x + (int64_t(down) * p * across * p + int64_t(patch - down * across) * p) * 3;
    float sum[3] = {};
    for (int i = lane; i < p * p; i += WARP) {
        const T* pixel = corner + (int64_t(i / p) * across * p + i % p) * 3;
#pragma unroll
        for (int c = 0; c < 3; c++) sum[c] += to_float(pixel[c]);
    }
#pragma unroll
    for (int c = 0; c < 3; c++) sum[c] = warp_sum(sum[c]);
    if (lane == 0) {
#pragma unroll
        for (int c = 0; c < 3; c++) out[int64_t(patch) * 3 + c] = sum[c] / float(p * p);
    }
}

// Strength of the edge at (y, x) of a picture: Sobel / 4 of the luma.
__device__ __forceinline__ float edge(const float* picture, int y, int x, int h, int w) {
    int ys[3] = {reflect(y - 1, h), y, reflect(y + 1, h)}, xs[3] = {reflect(x - 1, w), x, reflect(x + 1, w)};
    float luma[3][3];
#pragma unroll
    for (int j = 0; j < 3; j++)
#pragma unroll
        for (int i = 0; i < 3; i++) {
            const float* c = picture + (int64_t(ys[j]) * w + xs[i]) * 3;
            luma[j][i] = 0.299f * c[0] + 0.587f * c[1] + 0.114f * c[2];
        }
    float gx = luma[0][2] + 2.0f * luma[1][2] + luma[2][2] - luma[0][0] - 2.0f * luma[1][0] - luma[2][0];
    float gy = luma[2][0] + 2.0f * luma[2][1] + luma[2][2] - luma[0][0] - 2.0f * luma[0][1] - luma[0][2];
    return 0.25f * sqrtf(gx * gx + gy * gy);
}

// Pixels of a block of `features`, one a thread.
constexpr int FEATURE_PIXELS = 128;

// All features of every pixel. They are put together in shared memory (the odd stride meets every bank), so that the device's memory
// gets whole 16 bytes: with 31 values written for some 15 read, the writes decide.
template <class T>
__device__ __forceinline__ void features(const T* source, const float* fine, const float* middle, const float* coarse,
                                         const float* means, T* out, int h, int w, int p, uint32_t pixels) {
    __shared__ __align__(16) float tile[FEATURE_PIXELS * FEATURES];
    uint32_t start = blockIdx.x * FEATURE_PIXELS, i = start + threadIdx.x;
    if (i < pixels) {
        uint32_t row = i / uint32_t(w);
        int x = int(i - row * w), y = int(row % uint32_t(h));
        int64_t first = int64_t(i) * 3, patch = int64_t((row - y) / p + y / p) * (w / p) + x / p;
        float* f = tile + threadIdx.x * FEATURES;
        float c[3];
#pragma unroll
        for (int k = 0; k < 3; k++) {
            c[k] = to_float(source[first + k]);
            f[10 + k] = fine[first + k], f[13 + k] = middle[first + k], f[16 + k] = coarse[first + k];
            f[20 + k] = means[patch * 3 + k];
        }
        f[0] = 1.0f;
        f[19] = edge(fine + int64_t(row - y) * w * 3, y, x, h, w);
        float place[2] = {float(2 * (x % p) + 1) / float(p) - 1.0f, float(2 * (y % p) + 1) / float(p) - 1.0f};
#pragma unroll
        for (int k = 0; k < 3; k++) {
            f[1 + k] = c[k], f[4 + k] = c[k] * c[k], f[7 + k] = c[k] * c[(k + 1) % 3];
            f[24 + k] = place[0] * c[k], f[28 + k] = place[1] * c[k];
        }
        f[23] = place[0], f[27] = place[1];
    }
    __syncthreads();
    int count = int(min(pixels - start, uint32_t(FEATURE_PIXELS))) * FEATURES;
    T* block = out + int64_t(start) * FEATURES;
    for (int e = threadIdx.x * PACK<T>; e < count; e += FEATURE_PIXELS * PACK<T>) {
        float v[PACK<T>];
        load_floats(v, tile + e);
        store(block + e, v, pack_count<T>(count, e));
    }
}

// Pixels of a patch that a block of the filter works on at a time.
constexpr int PIXELS = 64;
// Stride of a pixel's hidden values in shared memory, odd as FEATURES is: pixel by pixel and channel by channel all banks are met.
constexpr int HIDDEN_ROW = HIDDEN + 1;

// What the filter reads of up to PIXELS pixels.
struct Pixels {
    __align__(16) float features[PIXELS * FEATURES];
    // relu(hidden + shift)
    float active[PIXELS * HIDDEN_ROW];
};

// Fills it with `count` pixels; THREADS threads, a barrier must follow. Features and hidden are the op's traffic: 2 * 63 bytes a pixel in
// bf16, each read once and in 16 bytes.
template <int THREADS, class T>
__device__ __forceinline__ void stage(Pixels& s, const T* features, const T* hidden, const float (&shift)[PACK<T>], int count) {
    for (int e = threadIdx.x * PACK<T>; e < count * FEATURES; e += THREADS * PACK<T>) {
        float v[PACK<T>];
        load(v, features + e, pack_count<T>(count * FEATURES, e));
        store_floats(s.features + e, v);
    }
    for (int e = threadIdx.x * PACK<T>; e < count * HIDDEN; e += THREADS * PACK<T>) {
        float v[PACK<T>];
        load(v, hidden + e, PACK<T>);
        float* active = s.active + e / HIDDEN * HIDDEN_ROW + e % HIDDEN;
#pragma unroll
        for (int i = 0; i < PACK<T>; i++) active[i] = fmaxf(v[i] + shift[i], 0.0f);
    }
}

// The shifts of a thread's packs in `stage`: the same for all, as a step over THREADS packs is a multiple of HIDDEN.
template <class T> __device__ __forceinline__ void own_shift(float (&shift)[PACK<T>], const T* coef) {
    load(shift, coef + SHIFT + threadIdx.x * PACK<T> % HIDDEN, PACK<T>);
}

// y[c] = sum over k of w[k][c] * v[k]: a read of shared memory each for v and, by all threads alike, for three weights.
template <int N> __device__ __forceinline__ void mix_three(float (&y)[3], const float* v, const float4* weights) {
    y[0] = y[1] = y[2] = 0.0f;
#pragma unroll
    for (int k = 0; k < N; k++) {
        float4 w = weights[k];
        y[0] += w.x * v[k], y[1] += w.y * v[k], y[2] += w.z * v[k];
    }
}

constexpr int FILTER_THREADS = 2 * PIXELS;

// A block per patch: for every pixel one thread adds up the features, one in another warp the hidden channels.
template <class T>
__device__ __forceinline__ void local_filter(const T* coef, const T* features, const T* hidden, T* out, int pixels) {
    __shared__ Pixels s;
    __shared__ float4 linear[FEATURES], mix[HIDDEN];
    __shared__ float sums[PIXELS][3];
    int64_t patch = blockIdx.x;
    coef += patch * COEFFICIENTS, out += patch * pixels * 3;
    features += patch * pixels * FEATURES, hidden += patch * pixels * HIDDEN;
    int half = threadIdx.x / PIXELS, pixel = threadIdx.x % PIXELS;
    for (int k = threadIdx.x; k < FEATURES + HIDDEN; k += FILTER_THREADS) {
        bool first = k < FEATURES;
        const T* w = first ? coef + k : coef + MIX + (k - FEATURES);
        int row = first ? FEATURES : HIDDEN;
        float4* place = first ? linear + k : mix + (k - FEATURES);
        *place = make_float4(to_float(w[0]), to_float(w[row]), to_float(w[2 * row]), 0.0f);
    }
    float shift[PACK<T>];
    own_shift(shift, coef);
    for (int start = 0; start < pixels; start += PIXELS) {
        int count = min(pixels - start, PIXELS);
        stage<FILTER_THREADS>(s, features + int64_t(start) * FEATURES, hidden + int64_t(start) * HIDDEN, shift, count);
        __syncthreads();
        float y[3];
        if (half == 0) {
            mix_three<FEATURES>(y, s.features + pixel * FEATURES, linear);
        } else {
            mix_three<HIDDEN>(y, s.active + pixel * HIDDEN_ROW, mix);
#pragma unroll
            for (int c = 0; c < 3; c++) sums[pixel][c] = y[c];
        }
        // Also: all have read s before the next pixels come. The next sums are written behind the next barrier.
        __syncthreads();
        if (half == 0 && pixel < count) {
#pragma unroll
            for (int c = 0; c < 3; c++) out[int64_t(start + pixel) * 3 + c] = from_float<T>(y[c] + sums[pixel][c]);
        }
    }
}

// Columns of the gradient's sums: features in one warp, hidden channels in the next.
constexpr int COLUMNS = 2 * WARP;
// Groups of threads that share a patch's pixels.
constexpr int GROUPS = BLOCK / COLUMNS;

// A block per patch: dcoef and dhidden from grad [pixels, 3]. A thread has one column and every GROUPS-th pixel; groups are added up in
// order at the end.
template <class T>
__device__ __forceinline__ void local_filter_gradients(const T* coef, const T* features, const T* hidden, const T* grad,
                                                       T* dcoef, T* dhidden, int pixels) {
    __shared__ Pixels s;
    __shared__ float4 gradient[PIXELS];
    // Per column: three sums of grad * value; for a hidden channel also that of the shift.
    __shared__ float sums[GROUPS][4][COLUMNS];
    int64_t patch = blockIdx.x;
    coef += patch * COEFFICIENTS, dcoef += patch * COEFFICIENTS, grad += patch * pixels * 3;
    features += patch * pixels * FEATURES, hidden += patch * pixels * HIDDEN, dhidden += patch * pixels * HIDDEN;
    int group = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS, channel = column % WARP;
    bool is_hidden = column >= WARP;
    float shift[PACK<T>], mix[3] = {}, sum[4] = {};
    own_shift(shift, coef);
    if (is_hidden) {
#pragma unroll
        for (int c = 0; c < 3; c++) mix[c] = to_float(coef[MIX + c * HIDDEN + channel]);
    }
    for (int start = 0; start < pixels; start += PIXELS) {
        int count = min(pixels - start, PIXELS);
        stage<BLOCK>(s, features + int64_t(start) * FEATURES, hidden + int64_t(start) * HIDDEN, shift, count);
        if (int(threadIdx.x) < count) {
            const T* d = grad + int64_t(start + threadIdx.x) * 3;
            gradient[threadIdx.x] = make_float4(to_float(d[0]), to_float(d[1]), to_float(d[2]), 0.0f);
        }
        __syncthreads();
        if (is_hidden) {
            for (int i = group; i < count; i += GROUPS) {
                float4 d = gradient[i];
                float* active = s.active + i * HIDDEN_ROW + channel;
                float v = *active, back = v > 0.0f ? d.x * mix[0] + d.y * mix[1] + d.z * mix[2] : 0.0f;
                sum[0] += d.x * v, sum[1] += d.y * v, sum[2] += d.z * v, sum[3] += back;
                // In its place: no other thread reads it before it is copied out.
                *active = back;
            }
        } else if (channel < FEATURES) {
            for (int i = group; i < count; i += GROUPS) {
                float4 d = gradient[i];
                float v = s.features[i * FEATURES + channel];
                sum[0] += d.x * v, sum[1] += d.y * v, sum[2] += d.z * v;
            }
        }
        __syncthreads();
        // A thread copies out just what it fills with the next pixels, see `stage`: no barrier is needed between.
        T* rows = dhidden + int64_t(start) * HIDDEN;
        for (int e = threadIdx.x * PACK<T>; e < count * HIDDEN; e += BLOCK * PACK<T>) {
            const float* back = s.active + e / HIDDEN * HIDDEN_ROW + e % HIDDEN;
            float v[PACK<T>];
#pragma unroll
            for (int i = 0; i < PACK<T>; i++) v[i] = back[i];
            store(rows + e, v, PACK<T>);
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) sums[group][c][column] = sum[c];
    __syncthreads();
    // Coefficient by coefficient: linear, mix, shift.
    for (int k = threadIdx.x; k < COEFFICIENTS; k += BLOCK) {
        int c, from;
        if (k < MIX) {
            c = k / FEATURES, from = k % FEATURES;
        } else {
            c = (k - MIX) / HIDDEN, from = WARP + (k - MIX) % HIDDEN;
        }
        float total = sums[0][c][from];
#pragma unroll
        for (int g = 1; g < GROUPS; g++) total += sums[g][c][from];
        dcoef[k] = from_float<T>(total);
    }
}

#define KERNELS "local_filter/local_filter.cu"
#include "instantiate.cuh"

#else  // once per element type

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(smooth)(const Element* x, float* out, int h, int w, int hole, uint32_t rows) {
    smooth(x, out, h, w, hole, rows);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(patch_means)(const Element* x, float* out, int across, int p, uint32_t patches) {
    patch_means(x, out, across, p, patches);
}

extern "C" __global__ void __launch_bounds__(FEATURE_PIXELS)
    KERNEL(pixel_features)(const Element* source, const float* fine, const float* middle, const float* coarse,
                           const float* means, Element* out, int h, int w, int p, uint32_t pixels) {
    features(source, fine, middle, coarse, means, out, h, w, p, pixels);
}

extern "C" __global__ void __launch_bounds__(FILTER_THREADS)
    KERNEL(local_filter)(const Element* coef, const Element* features, const Element* hidden, Element* out, int pixels) {
    local_filter(coef, features, hidden, out, pixels);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(local_filter_gradients)(const Element* coef, const Element* features, const Element* hidden, const Element* grad,
                                   Element* dcoef, Element* dhidden, int pixels) {
    local_filter_gradients(coef, features, hidden, grad, dcoef, dhidden, pixels);
}

#endif
