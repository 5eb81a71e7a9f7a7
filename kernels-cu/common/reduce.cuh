// Sums whose order does not depend on the launch's timing: no atomics, so equal inputs give equal bits.
#pragma once

#include "common.cuh"

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Sum over a block of whole warps, at most 1024 threads; every thread gets it. `scratch` is 32 floats of shared memory.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < int(blockDim.x / WARP) ? scratch[lane] : 0.0f;
    return warp_sum(x);
}

// Sum of n numbers, added up in double by a kernel of one block of BLOCK threads; thread 0 gets it.
__device__ __forceinline__ double sum_in_double(const float* x, int n) {
    __shared__ double sums[BLOCK];
    double sum = 0.0;
    for (int i = threadIdx.x; i < n; i += BLOCK) sum += x[i];
    sums[threadIdx.x] = sum;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

// Sums over rows, K sums for every column. The block's threads share PACK columns each: `lanes` (a power of two, at most WARP) times
// PACK columns, taken by BLOCK / lanes rows at a time. add(sum, row, column, count) adds what a row has in the `count` columns from
// `column` on; take(k, column, sum) gets every finished sum once. The order depends on the number of rows alone.
template <class T, int K, class Add, class Take>
__device__ __forceinline__ void pack_sums(int first, int last, int column_block, int columns, int lanes, Add add, Take take) {
    // The padding keeps neighbouring columns of different packs in different banks.
    __shared__ float tile[K * PACK<T>][BLOCK + WARP / PACK<T>];
    int lane = threadIdx.x % lanes, row_lane = threadIdx.x / lanes, row_lanes = BLOCK / lanes;
    int width = lanes * PACK<T>, start = column_block * width, column = start + lane * PACK<T>;
    float sum[K][PACK<T>] = {};
    if (column < columns) {
        int count = pack_count<T>(columns, column);
        for (int row = first + row_lane; row < last; row += row_lanes) add(sum, row, column, count);
    }
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int i = 0; i < PACK<T>; i++) tile[k * PACK<T> + i][threadIdx.x] = sum[k][i];
    __syncthreads();
    for (int t = threadIdx.x; t < K * width; t += BLOCK) {
        int k = t / width, at = t % width;
        const float* part = tile[k * PACK<T> + at % PACK<T>] + at / PACK<T>;
        float total = 0.0f;
        for (int r = 0; r < row_lanes; r++) total += part[r * lanes];
        if (start + at < columns) take(k, start + at, total);
    }
}

// The rows of a block of a sum over the rows of each group, split in parts: grid (groups x blocks of columns, splits). A grid's y and z
// would not take every number of groups.
template <class T> struct RowPart {
    int64_t start;     // the group's first row
    int64_t out;       // row of the result [splits][groups]
    int first, last;   // rows of the part, counted from `start`
    int column_block;  // `lanes` packs of columns

    __device__ __forceinline__ RowPart(int rows, int columns, int lanes) {
        uint32_t width = lanes * PACK<T>, across = (columns + width - 1) / width, group = blockIdx.x / across;
        int part = (rows + gridDim.y - 1) / gridDim.y;
        first = blockIdx.y * part, last = min(rows, first + part), column_block = int(blockIdx.x - group * across);
        start = int64_t(group) * rows, out = int64_t(blockIdx.y) * (gridDim.x / across) + group;
    }
};
