// Tiles of rows in shared memory and the two products of attention over them. A warp owns 16 rows. Its sums are in the accumulators of
// mma_m16n8k16 whatever the type: with g == lane / 4 and t == lane % 4, tile n of 8 columns holds [n][0], [n][1] of row g, columns
// 8n + 2t and + 1, and [n][2], [n][3] of row g + 8. bf16 goes through tensor cores, float through plain multiply-adds.
#pragma once

#include "attention/rows.cuh"
#include "mma.cuh"

// From one row of a tile to the next: 16 bytes more than the row, so that eight rows in a row touch different banks.
template <class T, int D> constexpr int STRIDE = D + PACK<T>;

constexpr int WARP_ROWS = 16;

// Starts the copy of `count` - `first` rows, at most ROWS, from `from` (row 0) to a tile; rows and channels that are not there
// become zero. Rows start at multiples of 16 bytes.
template <class T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(T* tile, const T* from, int64_t stride, int first, int count, int channels) {
    constexpr int PER_ROW = D / PACK<T>, STEP = THREADS / PER_ROW;
    static_assert(THREADS % PER_ROW == 0 && ROWS % STEP == 0, "a thread copies the same columns of as many rows");
    int row = threadIdx.x / PER_ROW, column = threadIdx.x % PER_ROW * PACK<T>;
    int rest = column < channels ? count - first : 0;
    tile += row * STRIDE<T, D> + column;
    const T* source = from + (first + row) * stride + column;
#pragma unroll 2
    for (int i = 0; i < ROWS; i += STEP) {
        bool there = row + i < rest;
        cp_async_16(tile + i * STRIDE<T, D>, there ? source + i * stride : from, there);
    }
}

// acc += A B^T: A 16 rows, B 8 N rows, of D channels.
template <int N, int D>
__device__ __forceinline__ void rows_by_rows(float (&acc)[N][4], const bf16* a, const bf16* b) {
    int lane = threadIdx.x % WARP;
    a += lane % 16 * STRIDE<bf16, D> + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * STRIDE<bf16, D> + lane / 8 % 2 * 8;
    // Unrolled further, loads are moved up that far that registers spill.
#pragma unroll 4
    for (int c = 0; c < D; c += 16) {
        uint32_t x[4], y[4];
        ldmatrix_x4(x, a + c);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            ldmatrix_x4(y, b + n * 8 * STRIDE<bf16, D> + c);
            mma_m16n8k16_bf16(acc[n], x, y);
            mma_m16n8k16_bf16(acc[n + 1], x, y + 2);
        }
    }
}

__device__ __forceinline__ void add_dot(float& sum, const float4& a, const float4& b) {
    sum += a.x * b.x;
    sum += a.y * b.y;
    sum += a.z * b.z;
    sum += a.w * b.w;
}

template <int N, int D>
__device__ __forceinline__ void rows_by_rows(float (&acc)[N][4], const float* a, const float* b) {
    constexpr int ROW = STRIDE<float, D>;
    int lane = threadIdx.x % WARP;
    a += lane / 4 * ROW;
    b += lane % 4 * 2 * ROW;
#pragma unroll 1
    for (int c = 0; c < D; c += 4) {
        float4 x0 = *reinterpret_cast<const float4*>(a + c), x1 = *reinterpret_cast<const float4*>(a + 8 * ROW + c);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float* row = b + n * 8 * ROW + c;
            float4 y0 = *reinterpret_cast<const float4*>(row), y1 = *reinterpret_cast<const float4*>(row + ROW);
            add_dot(acc[n][0], x0, y0), add_dot(acc[n][1], x0, y1);
            add_dot(acc[n][2], x1, y0), add_dot(acc[n][3], x1, y1);
        }
    }
}

// acc += P B: P 16 rows of 8 N weights in the accumulators of a product, B 8 N rows of D channels. The weights are rounded to the type.
template <int N, int D>
__device__ __forceinline__ void weights_by_rows(float (&acc)[D / 8][4], const float (&p)[N][4], const bf16* b, float*) {
    int lane = threadIdx.x % WARP;
    b += lane % 16 * STRIDE<bf16, D> + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        // Two tiles of 8 columns are a 16 x 16 operand: the same lanes hold the same elements.
        uint32_t x[4] = {narrow(p[n][0], p[n][1]), narrow(p[n][2], p[n][3]), narrow(p[n + 1][0], p[n + 1][1]),
                         narrow(p[n + 1][2], p[n + 1][3])},
                 y[4];
#pragma unroll
        for (int m = 0; m < D / 8; m += 2) {
            ldmatrix_x4_trans(y, b + n * 8 * STRIDE<bf16, D> + m * 8);
            mma_m16n8k16_bf16(acc[m], x, y);
            mma_m16n8k16_bf16(acc[m + 1], x, y + 2);
        }
    }
}

// Floats from one row of a warp's scratch to the next.
template <int N> constexpr int SCRATCH_STRIDE = 8 * N + 4;

// `scratch`: 16 rows of SCRATCH_STRIDE floats, the warp's own, as a row's weights are spread over four lanes.
template <int N, int D>
__device__ __forceinline__ void weights_by_rows(float (&acc)[D / 8][4], const float (&p)[N][4], const float* b, float* scratch) {
    constexpr int ROW = SCRATCH_STRIDE<N>;
    int lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
    float *upper = scratch + lane / 4 * ROW, *lower = upper + 8 * ROW;
#pragma unroll
    for (int n = 0; n < N; n++) {
        *reinterpret_cast<float2*>(upper + n * 8 + t2) = make_float2(p[n][0], p[n][1]);
        *reinterpret_cast<float2*>(lower + n * 8 + t2) = make_float2(p[n][2], p[n][3]);
    }
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < 8 * N; k++) {
        float x0 = upper[k], x1 = lower[k];
        const float* row = b + k * STRIDE<float, D> + t2;
#pragma unroll
        for (int m = 0; m < D / 8; m++) {
            float2 y = *reinterpret_cast<const float2*>(row + m * 8);
            acc[m][0] += x0 * y.x, acc[m][1] += x0 * y.y;
            acc[m][2] += x1 * y.x, acc[m][3] += x1 * y.y;
        }
    }
    __syncwarp();
}

// Largest and sum over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
