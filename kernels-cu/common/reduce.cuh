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

// Threads of a block of column_sums: 32 columns by 8 rows.
constexpr int COLUMN_ROWS = BLOCK / WARP;

// Partial sums over rows: out[split][group][column] = sum of value(row, column) over the split's part of the group's `rows` rows.
// Grid (columns / 32, groups, splits), BLOCK threads. value(row, column) -> float, row counted over all groups.
template <class Value>
__device__ void column_sums(float* out, int rows, int columns, Value value) {
    __shared__ float tile[COLUMN_ROWS][WARP + 1];
    int column = blockIdx.x * WARP + threadIdx.x % WARP, lane_row = threadIdx.x / WARP;
    int group = blockIdx.y, split = blockIdx.z, splits = gridDim.z;
    int part = (rows + splits - 1) / splits;
    int first = split * part, last = min(rows, first + part);
    float sum = 0.0f;
    if (column < columns)
        for (int row = first + lane_row; row < last; row += COLUMN_ROWS)
            sum += value(int64_t(group) * rows + row, column);
    tile[lane_row][threadIdx.x % WARP] = sum;
    __syncthreads();
    if (lane_row == 0 && column < columns) {
#pragma unroll
        for (int i = 1; i < COLUMN_ROWS; i++) sum += tile[i][threadIdx.x];
        out[(int64_t(split) * gridDim.y + group) * columns + column] = sum;
    }
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
