// A merged weight: W' = W + scale * B A, summed over the ranks in float and rounded once. Reads W once and writes W' once; A and B are
// small and come from the second-level cache. Where the sum is zero, W keeps its bits (-0 too).
//
// The rows of W and B are `parts` equal parts (the grid's z), each with `rank` rows of A of its own.
#pragma once

#include "common.cuh"
#include "mma.cuh"

// As the launcher passes it (no padding). `rows`: of one part.
struct MergeSizes {
    int rows, columns, rank;
    float scale;
};

constexpr int MERGE_THREADS = 256;

__device__ __forceinline__ float merged(float w, float scale, float sum) {
    return scale * sum == 0.0f ? w : fmaf(scale, sum, w);
}

namespace simt {

// A thread per pack of a row; the grid's x covers the packs of one part.
__device__ void merge(const float* weight, const float* a, const float* b, float* out, const MergeSizes& s) {
    Place at;
    if (!row_place<float>(at, uint32_t(s.rows), s.columns)) return;
    int64_t row = int64_t(blockIdx.z) * s.rows + at.row;
    a += int64_t(blockIdx.z) * s.rank * s.columns + at.column;
    b += row * s.rank;
    float sum[4] = {};
    for (int k = 0; k < s.rank; k++) {
        float v[4];
        load(v, a + int64_t(k) * s.columns, at.count);
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(b[k], v[i], sum[i]);
    }
    float w[4];
    load(w, weight + row * s.columns + at.column, at.count);
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = merged(w[i], s.scale, sum[i]);
    store(out + row * s.columns + at.column, w, at.count);
}

} // namespace simt

namespace tensor_core {

// A block of a row-major matrix in shared memory. Lines are 16 bytes longer than what they hold: the eight lines that ldmatrix reads at a
// time then lie in different banks.
template <int LINES, int WIDTH>
struct MergeBlock {
    static constexpr int PITCH = WIDTH + 8, CHUNKS = WIDTH / 8, SIZE = LINES * PITCH;

    // From line `line` of `lines` and element `at` of `length` on; zeros outside of the matrix.
    static __device__ __forceinline__ void fill(bf16* to, const bf16* from, int line, int lines, int at, int length) {
#pragma unroll
        for (int i = 0; i < LINES * CHUNKS / MERGE_THREADS; i++) {
            int c = int(threadIdx.x) + i * MERGE_THREADS, l = line + c / CHUNKS, e = at + c % CHUNKS * 8;
            int count = l < lines ? min(8, length - e) : 0;
            // Outside of the matrix nothing is read; the address still has to be one.
            const bf16* source = count > 0 ? from + int64_t(l) * length + e : from;
            bf16* place = to + c / CHUNKS * PITCH + c % CHUNKS * 8;
            if (length % 8 == 0 && (reinterpret_cast<uintptr_t>(from) & 15) == 0)
                cp_async_16(place, source, count > 0);
            else
                *reinterpret_cast<uint4*>(place) = pack_bits(source, count);
        }
    }
};

// 64 x 128 of W a block, 32 x 32 a warp. Three blocks on a multiprocessor have 48 KiB of W on the way, more than what its share of the
// memory's bandwidth takes.
__device__ void merge(const bf16* weight, const bf16* a, const bf16* b, bf16* out, const MergeSizes& s) {
    constexpr int ROWS = 64, COLUMNS = 128, DEPTH = 32;
    using W = MergeBlock<ROWS, COLUMNS>;
    using A = MergeBlock<DEPTH, COLUMNS>;
    using B = MergeBlock<ROWS, DEPTH>;
    __shared__ __align__(16) bf16 tile[W::SIZE];
    __shared__ __align__(16) bf16 tile_a[A::SIZE];
    __shared__ __align__(16) bf16 tile_b[B::SIZE];
    int64_t first = int64_t(blockIdx.z) * s.rows;
    weight += first * s.columns;
    out += first * s.columns;
    b += first * s.rank;
    a += int64_t(blockIdx.z) * s.rank * s.columns;
    int row = int(blockIdx.y) * ROWS, column = int(blockIdx.x) * COLUMNS;
    int warp = int(threadIdx.x) / WARP, lane = int(threadIdx.x) % WARP;
    int warp_row = warp / 4 * 32, warp_column = warp % 4 * 32;

    float sum[2][4][4] = {};
    W::fill(tile, weight, row, s.rows, column, s.columns);
    for (int k0 = 0; k0 < s.rank; k0 += DEPTH) {
        if (k0 > 0) __syncthreads();
        A::fill(tile_a, a, k0, s.rank, column, s.columns);
        B::fill(tile_b, b, row, s.rows, k0, s.rank);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            if (k0 + k >= s.rank) break;
            uint32_t left[2][4], right[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ldmatrix_x4(left[i], tile_b + (warp_row + 16 * i + lane % 16) * B::PITCH + k + lane / 16 * 8);
                ldmatrix_x4_trans(right[i], tile_a + (k + lane % 16) * A::PITCH + warp_column + 16 * i + lane / 16 * 8);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma_m16n8k16_bf16(sum[i][j], left[i], right[j / 2] + j % 2 * 2);
        }
    }

    // Every pair of W is read and written by the thread that has its sums.
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int r = warp_row + 8 * i + lane / 4, c = warp_column + 8 * j + lane % 4 * 2;
            uint32_t* pair = reinterpret_cast<uint32_t*>(tile + r * W::PITCH + c);
            const float* v = sum[i / 2][j] + i % 2 * 2;
            float low, high;
            widen(*pair, low, high);
            *pair = narrow(merged(low, s.scale, v[0]), merged(high, s.scale, v[1]));
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS * W::CHUNKS / MERGE_THREADS; i++) {
        int chunk = int(threadIdx.x) + i * MERGE_THREADS, r = chunk / W::CHUNKS, c = chunk % W::CHUNKS * 8;
        int count = min(8, s.columns - column - c);
        if (row + r >= s.rows || count <= 0) continue;
        const bf16* from = tile + r * W::PITCH + c;
        bf16* to = out + int64_t(row + r) * s.columns + column + c;
        if (whole(to, count))
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (j < count) to[j] = from[j];
    }
}

} // namespace tensor_core
