// The product on Hopper: boxes by the copy engine (TMA), products of warpgroups (wgmma), accumulated in float.
//     out = A B + S B2 + bias,    [A | S] [B | B2] as one sum over k: the low-rank term is a few more steps of the same ring.
//
// A block is a producer, one thread that copies ahead into a ring of STAGES, and two warpgroups that multiply, each 64 rows by N columns.
// Blocks stay (persistent) and take every grid-th tile, so that the next tile's boxes arrive while this one is stored. Two blocks of a
// cluster have the same columns: each copies half of B to both, which takes a third off what the second-level cache has to deliver.
//
// A row's bits depend on that row, its weight and its adapter alone: k is summed in steps of 16 in ascending order whatever the tile.
// README.md beside this has the floors and the steps that led here.
#pragma once

#include "hopper.cuh"
#include "rows.cuh"
#include "within.cuh"

namespace warpgroup {

using namespace hopper;

constexpr int TILE_ROWS = 128;    // of a block
constexpr int DEPTH = 64;         // k of a stage: lines of 128 bytes
constexpr int LINE = 128;         // bytes
constexpr int BOX = 64 * LINE;    // 64 lines
constexpr int CONSUMERS = 2;      // warpgroups
constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(registers_suffice(CONSUMERS, PRODUCER_REGISTERS, CONSUMER_REGISTERS), "setmaxnreg would wait for ever");
constexpr int GROUP_ROWS = 2048;  // rows of tiles that are taken together, for the second-level cache's sake

// What a launch is about, as the launcher builds it (padding at the end alone).
struct Sizes {
    Rows rows;
    const bf16* bias;
    bf16* out;
    // Columns, k of A B and of S B2, ranks of a part; `parts`: equal parts of the columns, each with ranks of its own in S.
    int n, k, k2, ranks, parts;
};

// Where a part's boxes of S start: at its first rank, or up to 7 before it, as the copy engine wants multiples of 16 bytes. B2 has zeros
// for what comes before (see placing.cuh).
__device__ __forceinline__ int first_of_s(const Sizes& s, int part) { return part * s.ranks / PACK<bf16> * PACK<bf16>; }

// What fits beside the stores, the barriers and the alignment.
template <int N>
constexpr int MOST_STAGES = N == 256 ? 4 : N == 128 ? 5 : 6;

// Which sides lie along k, columns of a tile, blocks of a cluster, slots of the ring, whether stores go through shared memory and the copy
// engine, and whether S is computed here too (within.cuh).
template <bool A_ALONG, bool B_ALONG, int COLUMNS, int BLOCKS, int SLOTS = MOST_STAGES<COLUMNS>, bool ENGINE_STORES = true,
          bool WITH_S = false>
struct Config {
    static constexpr bool A_ALONG_K = A_ALONG, B_ALONG_K = B_ALONG, STORES = ENGINE_STORES, MAKES_S = WITH_S;
    static constexpr int N = COLUMNS, CLUSTER = BLOCKS, STAGES = SLOTS;
    static constexpr int A_BYTES = TILE_ROWS * LINE, STAGE = A_BYTES + N * LINE, OUT = STORES ? 2 * CONSUMERS * BOX : 0;
};

// The tile of a block: its columns end at `end`, with its part of them.
struct Tile {
    RowTile rows;
    int row, column, end, part;
};

template <class C>
__device__ __forceinline__ Tile tile(const Sizes& s, int i, int rank) {
    constexpr int HEIGHT = TILE_ROWS * C::CLUSTER, GROUP = GROUP_ROWS / HEIGHT;
    int width = s.n / s.parts, across = (width + C::N - 1) / C::N, columns = across * s.parts;
    int group = i / (GROUP * columns), within = i % (GROUP * columns), height = min(GROUP, s.rows.count - group * GROUP);
    int column = within / height;
    Tile t;
    t.rows = row_tile<HEIGHT>(s.rows, group * GROUP + within % height);
    t.row = t.rows.row + rank * TILE_ROWS;
    t.part = column / across;
    t.column = t.part * width + column % across * C::N;
    t.end = (t.part + 1) * width;
    return t;
}

// A number of products in a type, so that a lambda can be told.
template <int N>
struct Steps {
    static constexpr int value = N;
};

struct Barriers {
    uint64_t *full, *empty;
};

// Copies one stage: A's box at (ka, row) of matrix 0, B's at (kb, column) of matrix z. The cluster's blocks share B's boxes out.
template <class C>
__device__ __forceinline__ void fill(unsigned char* stage, uint64_t* full, const CUtensorMap* a, const CUtensorMap* b, int ka, int row,
                                     int kb, int column, int z, int rank) {
    barrier_expect(full, C::STAGE);
    if (C::A_ALONG_K) {
        load_box(stage, a, full, ka, row, 0);
    } else {
#pragma unroll
        for (int i = 0; i < TILE_ROWS / 64; i++) load_box(stage + i * BOX, a, full, row + 64 * i, ka, 0);
    }
    unsigned char* to = stage + C::A_BYTES;
    auto load_b = [&](unsigned char* to, int x, int y) {
        if (C::CLUSTER == 1)
            load_box(to, b, full, x, y, z);
        else
            load_box_multicast(to, b, full, x, y, z, (1 << C::CLUSTER) - 1);
    };
    if (C::B_ALONG_K) {
        constexpr int SHARE = C::N / C::CLUSTER;
        load_b(to + rank * SHARE * LINE, kb, column + rank * SHARE);
    } else {
        constexpr int SHARE = C::N / 64 / C::CLUSTER;
#pragma unroll
        for (int i = 0; i < SHARE; i++) load_b(to + (rank * SHARE + i) * BOX, column + 64 * (rank * SHARE + i), kb);
    }
}

template <class C>
__device__ __forceinline__ void produce(const CUtensorMap& a, const CUtensorMap& b, const CUtensorMap& a2, const CUtensorMap& b2,
                                        const Sizes& s, const within::Work* work, unsigned char* stages, Barriers bars, int first,
                                        int step, int tiles, int rank) {
    RingPlace<C::STAGES> at;
    auto stage = [&]() {
        // Nobody reads this slot any more, in any block that this one copies to.
        barrier_wait(bars.empty + at.slot, at.parity ^ 1);
        return stages + at.slot * C::STAGE;
    };
    for (int i = first; i < tiles; i += step) {
        Tile t = tile<C>(s, i, rank);
        for (int k = 0; k < s.k; k += DEPTH, at.next()) {
            unsigned char* to = stage();
            fill<C>(to, bars.full + at.slot, &a, &b, k, t.row, k, t.column, t.rows.weight, rank);
        }
        for (int j = t.rows.first; j < t.rows.last; j++) {
            Segment g = segment(s.rows, j);
            // The band beside the instance where this block has none of its rows.
            int low = g.low + min(max(t.row - g.row, -BAND), g.rows);
            if (C::MAKES_S) within::wait(*work, low, TILE_ROWS);
            for (int k = 0; k < s.k2; k += DEPTH, at.next()) {
                unsigned char* to = stage();
                fill<C>(to, bars.full + at.slot, &a2, &b2, first_of_s(s, t.part) + k, low, k, t.column, g.adapter, rank);
            }
        }
    }
}

// d += this warpgroup's 64 rows of the stage times all its columns, over STEPS times 16 of its k.
template <class C, int STEPS>
__device__ __forceinline__ void multiply(float (&d)[C::N / 2], const unsigned char* stage, int group, bool add) {
    constexpr uint32_t A_STEP = C::A_ALONG_K ? 32 : 16 * LINE, B_STEP = C::B_ALONG_K ? 32 : 16 * LINE;
    uint64_t a = descriptor(stage + group * BOX, 16, 8 * LINE);
    uint64_t b = descriptor(stage + C::A_BYTES, C::B_ALONG_K ? 16 : BOX, 8 * LINE);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        wgmma<C::N, C::A_ALONG_K, C::B_ALONG_K>(d, a + (i * A_STEP >> 4), b + (i * B_STEP >> 4), add || i > 0);
    wgmma_commit();
}

__device__ __forceinline__ void bias_pair(const bf16* bias, int column, float& low, float& high) {
    widen(bias ? *reinterpret_cast<const uint32_t*>(bias + column) : 0, low, high);
}

// Straight from registers, for tiles with rows or columns that are not to be written.
template <int N>
__device__ __forceinline__ void store_pairs(const float (&d)[N / 2], const Sizes& s, const bf16* bias, int row, int last_row,
                                            int column, int last_column) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        int c = column + 8 * j + lane % 4 * 2;
        if (c >= last_column) continue;
        float low, high;
        bias_pair(bias, c, low, high);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = row + lane / 4 + 8 * i;
            if (r < last_row)
                *reinterpret_cast<uint32_t*>(s.out + int64_t(r) * s.n + c) = narrow(d[4 * j + 2 * i] + low, d[4 * j + 2 * i + 1] + high);
        }
    }
}

// By the copy engine, 64 columns at a time, through the warpgroup's two boxes of shared memory, which take turns.
template <int N>
__device__ __forceinline__ void store_boxes(const float (&d)[N / 2], const CUtensorMap* out, unsigned char* boxes, const bf16* bias,
                                            int& turn, int group, int row, int column, int last_column) {
    int thread = threadIdx.x % 128, lane = threadIdx.x % WARP, line = thread / WARP * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < N / 64; c++) {
        int first = column + 64 * c;
        if (first >= last_column) break;
        unsigned char* box = boxes + turn * BOX;
        turn ^= 1;
        // The engine has read what this box held before.
        if (thread == 0) store_wait_read<1>();
        named_barrier(1 + group, 128);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int col = first + 8 * j + lane % 4 * 2;
            float low, high;
            bias_pair(col < last_column ? bias : nullptr, col, low, high);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* v = d + 32 * c + 4 * j + 2 * i;
                // Eight lines at a time: the swizzle puts their chunks into different banks.
                *reinterpret_cast<uint32_t*>(box + (line + 8 * i) * LINE + ((j ^ line % 8) << 4) + lane % 4 * 4) =
                    narrow(v[0] + low, v[1] + high);
            }
        }
        fence_async();
        named_barrier(1 + group, 128);
        if (thread == 0) {
            store_box(out, box, first, row);
            store_commit();
        }
    }
}

template <class C>
__device__ __forceinline__ void consume(const CUtensorMap& out, const Sizes& s, unsigned char* stages, Barriers bars, int first,
                                        int step, int tiles, int rank, int group) {
    unsigned char* boxes = stages + C::STAGES * C::STAGE + group * 2 * BOX;
    bool leader = threadIdx.x % 128 == 0;
    int turn = 0;
    RingPlace<C::STAGES> at;
    float d[C::N / 2];
    for (int i = first; i < tiles; i += step) {
        Tile t = tile<C>(s, i, rank);
        int used = -1;
        auto release = [&](int slot) {
            if (!leader) return;
            if (C::CLUSTER == 1)
                barrier_arrive(bars.empty + slot);
            else
#pragma unroll
                for (int b = 0; b < C::CLUSTER; b++) barrier_arrive_in(bars.empty + slot, b);
        };
        // `count` stages, of each STEPS times 16 of its k: where there are less, that is zeros.
        auto sum = [&](auto steps, int count, bool add) {
            for (int j = 0; j < count; j++) {
                barrier_wait(bars.full + at.slot, at.parity);
                multiply<C, decltype(steps)::value>(d, stages + at.slot * C::STAGE, group, add || j > 0);
                // Products run while the next are issued, so a slot is free one step later; a ring of one can't wait for that.
                if (C::STAGES == 1) {
                    wgmma_wait<0>();
                    release(at.slot);
                } else {
                    wgmma_wait<1>();
                    if (used >= 0) release(used);
                    used = at.slot;
                }
                at.next();
            }
        };
        sum(Steps<4>(), (s.k + DEPTH - 1) / DEPTH, false);
        // The tables may know of adapters where the product has none.
        int adapters = s.k2 > 0 ? t.rows.last - t.rows.first : 0;
        if (s.k2 <= 16) sum(Steps<1>(), adapters, true);
        else if (s.k2 <= 32) sum(Steps<2>(), adapters, true);
        else sum(Steps<4>(), adapters * ((s.k2 + DEPTH - 1) / DEPTH), true);
        wgmma_wait<0>();
        if (C::STAGES > 1) release(used);
        const bf16* bias = s.bias ? s.bias + int64_t(t.rows.weight) * s.n : nullptr;
        int row = t.row + 64 * group;
        // Rows beyond the tensor and columns beyond it the engine leaves out by itself.
        bool whole_rows = row + 64 <= t.rows.end || t.rows.end == s.rows.m;
        bool whole_columns = t.column + C::N <= t.end || t.end == s.n;
        if (C::STORES && whole_rows && whole_columns) {
            if (row < t.rows.end) store_boxes<C::N>(d, &out, boxes, bias, turn, group, row, t.column, t.end);
        } else {
            store_pairs<C::N>(d, s, bias, row + threadIdx.x % 128 / WARP * 16, t.rows.end, t.column, t.end);
        }
    }
    // Shared memory stays until the engine has read it.
    if (C::STORES && leader) store_wait<0>();
}

template <class C>
__device__ __forceinline__ void product(const CUtensorMap& a, const CUtensorMap& b, const CUtensorMap& a2, const CUtensorMap& b2,
                                        const CUtensorMap& out, const Sizes& s, const within::Work* work = nullptr) {
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char* stages = shared + (-reinterpret_cast<uintptr_t>(shared) & 1023);
    uint64_t* words = reinterpret_cast<uint64_t*>(stages + C::STAGES * C::STAGE + C::OUT);
    Barriers bars = {words, words + C::STAGES};
    uint32_t* turns = reinterpret_cast<uint32_t*>(words + 2 * C::STAGES);
    int rank = C::CLUSTER == 1 ? 0 : int(cluster_rank());
    if (threadIdx.x == 0) {
        if (C::MAKES_S && rank == 0) turns[3] = counter_next(work->counters + within::STARTED);
#pragma unroll
        for (int i = 0; i < C::STAGES; i++) {
            barrier_init(bars.full + i, 1);
            barrier_init(bars.empty + i, CONSUMERS * C::CLUSTER);
        }
        barrier_init_fence();
    }
    if (C::CLUSTER == 1) __syncthreads();
    else cluster_sync();

    int columns = (s.n / s.parts + C::N - 1) / C::N * s.parts, tiles = s.rows.count * columns;
    int first = int(blockIdx.x) / C::CLUSTER, step = int(gridDim.x) / C::CLUSTER;
    if constexpr (C::MAKES_S) {
        static_assert(C::CLUSTER == 2, "a pair has a number");
        static_assert(within::BYTES<2> <= C::STAGES * C::STAGE + C::OUT && within::BYTES<4> <= C::STAGES * C::STAGE + C::OUT,
                      "what computes S fits where the stages will be");
        int number = int(word_in(turns + 3, 0));
        if (number < work->makers) {
            if (threadIdx.x < BLOCK) {
                if (work->sizes.rows.pitch <= 16) within::make<2>(*work, stages, turns);
                else within::make<4>(*work, stages, turns);
            } else if (threadIdx.x < within::THREADS) {
                within::take_all(*work, turns);
            } else {
                within::place_all(*work);
            }
            // The other block copies to this one's stages too.
            cluster_sync();
        }
        // Who starts first has a tile fewer, if anybody has.
        first = step - 1 - number;
    }
    if (threadIdx.x < 128) {
        fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            prefetch(&a), prefetch(&b);
            if (s.k2) prefetch(&a2), prefetch(&b2);
            produce<C>(a, b, a2, b2, s, work, stages, bars, first, step, tiles, rank);
            if (C::MAKES_S) within::pass(*work);
        }
        __syncwarp();
    } else {
        more_registers<CONSUMER_REGISTERS>();
        consume<C>(out, s, stages, bars, first, step, tiles, rank, int(threadIdx.x) / 128 - 1);
    }
    // The other block may still copy to this one's shared memory, or arrive at its barriers.
    if (C::CLUSTER > 1) cluster_sync();
}

} // namespace warpgroup
