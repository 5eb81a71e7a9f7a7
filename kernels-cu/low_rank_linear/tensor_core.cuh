// The product in bf16 on tensor cores, accumulated in float: mma.sync, fed through shared memory by cp.async, STAGES deep.
//
// Every element of the result is the sum over k in steps of 16, in ascending order, whatever the tile: a row's bits depend neither on the
// tile nor on how many other rows there are. Steps that reach past k multiply zeros.
#pragma once

#include "mma.cuh"
#include "product.cuh"

namespace tensor_core {

constexpr int DEPTH = 32;
constexpr int STAGES = 3;

// A stage of one side in shared memory. Lines are 16 bytes longer than what they hold: the eight lines that ldmatrix reads at a time
// then lie in different banks (80 bytes, or 16 more than a multiple of 128).
template <bool ALONG_K, int TILE, int DEPTH = tensor_core::DEPTH>
struct Stage {
    static constexpr int LINES = ALONG_K ? TILE : DEPTH;
    static constexpr int WIDTH = ALONG_K ? DEPTH : TILE;
    static constexpr int PITCH = WIDTH + 8;
    static constexpr int SIZE = LINES * PITCH;

    template <int THREADS>
    static __device__ __forceinline__ void fill(bf16* stage, const Source<bf16>& source) {
        constexpr int CHUNKS = WIDTH / 8;
#pragma unroll
        for (int i = 0; i < LINES * CHUNKS / THREADS; i++) {
            int c = threadIdx.x + i * THREADS, line = c / CHUNKS, at = c % CHUNKS * 8;
            Chunk<bf16> chunk = ::chunk<ALONG_K>(source, line, at);
            bf16* to = stage + line * PITCH + at;
            if (source.aligned)
                cp_async_16(to, chunk.from, chunk.count > 0);
            else
                *reinterpret_cast<uint4*>(to) = pack_bits(chunk.from, chunk.count);
        }
    }

    // The four 8x8 matrices of 16 rows x 16 k, from (row, k) on: `inner` says whether k (or the rows) changes fastest among them.
    static __device__ __forceinline__ void fragment(uint32_t (&f)[4], const bf16* stage, int row, int k, bool k_fastest) {
        int lane = threadIdx.x % WARP, line = lane % 8, fast = lane / 8 % 2 * 8, slow = lane / 16 * 8;
        int r = row + (k_fastest ? slow : fast), q = k + (k_fastest ? fast : slow);
        if (ALONG_K)
            ldmatrix_x4(f, stage + (r + line) * PITCH + q);
        else
            ldmatrix_x4_trans(f, stage + (q + line) * PITCH + r);
    }
};

// Writes alpha * sum + bias: rounded, then through shared memory, which nobody needs any more, so that memory gets whole packs. A thread
// holds pairs of neighbours: (row, column), (row + 8, column) of every 16 x 8.
template <int HEIGHT, int WIDTH, int THREADS, int ROWS, int COLUMNS, class B>
__device__ __forceinline__ void write_tile(bf16* shared, const float (&sum)[ROWS][COLUMNS][4], int row, int column,
                                           const Work<bf16, B>& w, bf16* out, const bf16* bias, const Sizes& s) {
    if (bias) bias += w.index * s.bias + w.part * s.n + w.column;
    constexpr int PITCH = WIDTH + 8;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        int c = column + 8 * j;
        float low = 0.0f, high = 0.0f;
        if (bias && c < w.width) low = to_float(bias[c]);
        if (bias && c + 1 < w.width) high = to_float(bias[c + 1]);
#pragma unroll
        for (int i = 0; i < 2 * ROWS; i++) {
            const float* v = sum[i / 2][j] + i % 2 * 2;
            *reinterpret_cast<uint32_t*>(shared + (row + 8 * i) * PITCH + c) =
                narrow(fmaf(s.alpha, v[0], low), fmaf(s.alpha, v[1], high));
        }
    }
    __syncthreads();
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll
    for (int i = 0; i < HEIGHT * CHUNKS / THREADS; i++) {
        int chunk = threadIdx.x + i * THREADS, r = chunk / CHUNKS, c = chunk % CHUNKS * 8;
        int count = min(8, w.width - c);
        if (r >= w.height || count <= 0) continue;
        const bf16* from = shared + r * PITCH + c;
        bf16* to = out + w.out + int64_t(r) * s.out.pitch + c;
        if (whole(to, count))
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (j < count) to[j] = from[j];
    }
}

// A warp's part of a tile: 16 x ROWS rows, 16 x COLUMNS columns; COLUMN_WARPS warps side by side.
template <int TILE>
struct Shape;
template <>
struct Shape<128> {
    static constexpr int THREADS = 256, ROWS = 4, COLUMNS = 2, COLUMN_WARPS = 4;
};
template <>
struct Shape<64> {
    static constexpr int THREADS = 128, ROWS = 2, COLUMNS = 2, COLUMN_WARPS = 2;
};

// 128 x 128 tiles: 60 KiB of shared memory and at most 128 registers a thread, so two blocks on a multiprocessor hide each other's waits.
template <bool A_ALONG_K, bool B_ALONG_K, int TILE>
__device__ void product(const bf16* a, const bf16* b, const bf16* a2, const bf16* b2, bf16* out, const bf16* bias, float* partial,
                        const Sizes& s) {
    using A = Stage<A_ALONG_K, TILE>;
    using B = Stage<B_ALONG_K, TILE>;
    constexpr int THREADS = Shape<TILE>::THREADS, ROWS = Shape<TILE>::ROWS, COLUMNS = Shape<TILE>::COLUMNS;
    DYNAMIC_SHARED(bf16, shared);
    bf16 *stages_a = shared, *stages_b = shared + STAGES * A::SIZE;
    Work<bf16> w;
    if (!work<A_ALONG_K, B_ALONG_K, TILE, TILE, DEPTH>(w, a, b, s)) return;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int warp_row = warp / Shape<TILE>::COLUMN_WARPS * (16 * ROWS);
    int warp_column = warp % Shape<TILE>::COLUMN_WARPS * (16 * COLUMNS);

    auto fill = [&](int step, int slot) {
        if (step < w.last) {
            Source<bf16> from_a, from_b;
            sources<A_ALONG_K, B_ALONG_K, DEPTH>(from_a, from_b, w, a2, b2, s, step);
            A::template fill<THREADS>(stages_a + slot * A::SIZE, from_a);
            B::template fill<THREADS>(stages_b + slot * B::SIZE, from_b);
        }
        // An empty group too, so that the number of groups tells which stage has come.
        cp_async_commit();
    };

    float sum[ROWS][2 * COLUMNS][4] = {};
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fill(w.first + i, i);
    int slot = 0, free_slot = STAGES - 1;
    for (int step = w.first; step < w.last; step++) {
        cp_async_wait<STAGES - 2>();
        // The stage has come for every thread, and nobody reads the one that is filled next any more.
        __syncthreads();
        fill(step + STAGES - 1, free_slot);
        const bf16 *stage_a = stages_a + slot * A::SIZE, *stage_b = stages_b + slot * B::SIZE;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t fa[ROWS][4], fb[COLUMNS][4];
#pragma unroll
            for (int i = 0; i < ROWS; i++) A::fragment(fa[i], stage_a, warp_row + 16 * i, k, false);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) B::fragment(fb[j], stage_b, warp_column + 16 * j, k, true);
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < 2 * COLUMNS; j++) mma_m16n8k16_bf16(sum[i][j], fa[i], fb[j / 2] + j % 2 * 2);
        }
        free_slot = slot;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    cp_async_wait<0>();

    static_assert(TILE * (TILE + 8) <= STAGES * (A::SIZE + B::SIZE), "the tile fits where the stages were");
    // A thread holds pairs of neighbours: (row, column), (row + 8, column) of every 16 x 8.
    int row = warp_row + lane / 4, column = warp_column + lane % 4 * 2;
    if (partial) {
        // A part of the sum, as it is: 8 bytes from each of four lanes are a whole sector.
        float* plane = partial + blockIdx.z * s.plane + w.out;
#pragma unroll
        for (int i = 0; i < 2 * ROWS; i++) {
            int r = row + 8 * i;
            if (r >= w.height) continue;
#pragma unroll
            for (int j = 0; j < 2 * COLUMNS; j++) {
                int c = column + 8 * j;
                float* to = plane + int64_t(r) * s.out.pitch + c;
                float low = sum[i / 2][j][i % 2 * 2], high = sum[i / 2][j][i % 2 * 2 + 1];
                if (c + 1 < w.width && (reinterpret_cast<uintptr_t>(to) & 7) == 0)
                    *reinterpret_cast<float2*>(to) = make_float2(low, high);
                else {
                    if (c < w.width) to[0] = low;
                    if (c + 1 < w.width) to[1] = high;
                }
            }
        }
        return;
    }
    write_tile<TILE, TILE, THREADS>(shared, sum, row, column, w, out, bias, s);
}

} // namespace tensor_core
