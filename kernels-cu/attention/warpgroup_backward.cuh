// The backward pass on Hopper: boxes by the copy engine (TMA), products of warpgroups (wgmma), five of them for a pair of tiles.
//     S' = K Q',  P' = 2^(factor S' - lse),  dP' = V dO',  dS' = P' (dP' - delta)          (' transposes: rows are keys)
//     dV += P' dO,  dK += dS' Q,  dQ += dS K
//
// A block owns 128 keys of a head, two warpgroups 64 each, with dK and dV in their registers. The queries that see them come through two
// rings, those of all heads of the group one after the other. P' is A of its next product as it is, from registers. dS' goes through
// shared memory; of dQ each warpgroup computes a piece of 64 x 64 of the tile.
//
// Pieces of dQ are added up in global memory by the copy engine, in the order of the key blocks: a counter for every piece says whose turn
// it is. A block waits for blocks of smaller numbers alone, and draws its number when it starts, so that those run already. All take
// the tiles from the last one down: where queries see keys up to a limit, blocks begin together and end one after the other.
// README.md beside this has the counting.
#pragma once

#include "attention/boxes.cuh"
#include "attention/rows.cuh"

namespace warpgroup_backward {

using namespace hopper;

constexpr int KEYS = 128;           // of a block
constexpr int GROUPS = 2;           // warpgroups that compute
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int PIECE = 64 * 64 * 4;  // bytes of dQ that a warpgroup computes at a time
// Queries are read in two steps, by the scores of the one and the products of the other.
constexpr int QUERY_STAGES = 3, GRAD_STAGES = 2;

// Where gradients of keys or of values go, times `factor`: to `rows` in bf16, or if that is null, as they are, to packed rows of the width,
// [entry][key head][key], or [batch1][key head][key] where entries are ragged.
struct Target {
    float* packed;
    bf16* rows;
    Rows layout;
    float factor;
    int none;
};

// What a launch is about, as the launcher builds it (no padding).
struct Sizes {
    // Per row of queries: [entry][head][query], or [batch1][head][query] where entries are ragged.
    const float *lse, *delta;
    Extents extents;
    // Pieces of the gradient of queries: [entry][head][tile][piece], see rows.cuh; ragged as above.
    float* d_q;
    Target d_k, d_v;
    // Zeros: how many blocks have started, and per piece how many have added to it.
    uint32_t* counters;
    // Of the scores: log2(e) / sqrt(channels).
    float factor;
    // Size of the second batch axis; heads of queries, and of keys; rows of queries and of keys in a head, tiles that a head has room for,
    // and key blocks of the longest entry; units (an entry's head of keys), and how many of them are worked on side by side.
    int size1, heads, key_heads, queries, keys, tiles, blocks, units, together;
    Axes q, k, v, grad;
};

// A tile of queries is 16 KB whatever the width; then what lies where in shared memory: keys, values, the two rings, dS of two steps, the
// pieces of dQ, and what comes with the rings' rows: logarithms and limits, deltas.
template <int WIDTH>
struct Config {
    static constexpr int D = WIDTH, QUERIES = D == 64 ? 128 : 64, BOXES = D / 64;
    static constexpr int OWN = KEYS * D * 2, ROWS = QUERIES * D * 2, SCORES = KEYS * QUERIES * 2;
    // Numbers of the rows lie as the accumulators' columns do: those of a thread together, and 16 bytes between for the banks.
    static constexpr int NUMBERS = QUERIES * 4 + 4 * 16;
    static __device__ __forceinline__ int number(int row) { return row % 8 / 2 * (QUERIES / 4 + 4) + row / 8 * 2 + row % 2; }
    static constexpr int VALUES = OWN, RING = 2 * OWN, GRADS = RING + QUERY_STAGES * ROWS, D_SCORES = GRADS + GRAD_STAGES * ROWS;
    static constexpr int PIECES = D_SCORES + 2 * SCORES, LSE = PIECES + GROUPS * PIECE, LIMITS = LSE + QUERY_STAGES * NUMBERS;
    static constexpr int PRODUCER_REGISTERS = D == 64 ? 40 : 24, CONSUMER_REGISTERS = D == 64 ? 232 : 240;
    static_assert(registers_suffice(GROUPS, PRODUCER_REGISTERS, CONSUMER_REGISTERS), "setmaxnreg would wait for ever");
    static constexpr int DELTA = LIMITS + QUERY_STAGES * NUMBERS, BARRIERS = DELTA + GRAD_STAGES * NUMBERS;
};

// The work of a block: 128 keys of a head from `key` on, and the tiles of queries that see them, `last` down to `first`, of every head of
// the group.
struct Work {
    Entry tokens;
    int entry, head, block, key, first, last, steps;
};

// Behind the tiles in shared memory. The work is there too, since the warpgroups that compute have no registers to spare for it.
struct Barriers {
    uint64_t own, full[QUERY_STAGES], empty[QUERY_STAGES], grad_full[GRAD_STAGES], grad_empty[GRAD_STAGES];
    uint64_t piece_full[GROUPS], piece_empty[GROUPS];
    Work work;
    // Rows of a tile in its slot that are there.
    int rows[QUERY_STAGES], grad_rows[GRAD_STAGES];
    uint32_t number;
};

template <class C>
__device__ __forceinline__ Work find_work(const Sizes& s, int number) {
    Work w;
    // Blocks of several units take turns, so that one does not begin long before its turn to add.
    int group = number / (s.blocks * s.together), unit = group * s.together, count = min(s.together, s.units - unit);
    number -= unit * s.blocks;
    w.block = number / count, unit += number - w.block * count;
    w.entry = unit / s.key_heads, w.head = unit - w.entry * s.key_heads;
    w.key = w.block * KEYS;
    w.tokens = s.extents.entry(w.entry);
    int tiles = (w.tokens.queries + C::QUERIES - 1) / C::QUERIES;
    w.last = tiles - 1, w.first = 0;
    // Limits do not fall, so tiles that don't see the keys come first.
    for (int from = 0; s.extents.limits && from < tiles; from += THREADS) {
        int tile = from + threadIdx.x;
        w.first += __syncthreads_count(
            tile < tiles && s.extents.limit(w.tokens, min((tile + 1) * C::QUERIES, w.tokens.queries) - 1) <= w.key);
    }
    w.steps = w.key < w.tokens.keys ? max(tiles - w.first, 0) * (s.heads / s.key_heads) : 0;
    return w;
}

// The entry's place among those that have heads of their own.
__device__ __forceinline__ int64_t place(const Sizes& s, const Work& w) { return s.extents.ragged ? w.entry % s.size1 : w.entry; }

// The query head and the tile of a step.
struct Step {
    int head, tile;
    __device__ __forceinline__ Step(const Sizes& s, const Work& w) : head(w.head * (s.heads / s.key_heads)), tile(w.last) {}
    __device__ __forceinline__ void next(const Work& w) {
        if (--tile < w.first) tile = w.last, head++;
    }
};

// One thread copies the block's own rows, and a warp for each ring copies ahead: rows of queries with their logarithms and limits, rows of
// gradients (GRADS) with their deltas.
template <class C>
__device__ __forceinline__ void copy_own(const CUtensorMap& k, const CUtensorMap& v, const Sizes& s, const Work& w, unsigned char* shared,
                                         uint64_t* own) {
    int b0 = w.entry / s.size1;
    Coordinates from = {b0, w.entry - b0 * s.size1, w.tokens.key + w.key, w.head};
    barrier_expect(own, 2 * C::OWN);
    load_rows<C::BOXES>(shared, &k, own, s.k, from, KEYS * LINE);
    load_rows<C::BOXES>(shared + C::VALUES, &v, own, s.v, from, KEYS * LINE);
}

template <class C, bool GRADS>
__device__ __forceinline__ void produce(const CUtensorMap& map, const Axes& axes, const Sizes& s, const Work& w, unsigned char* shared,
                                        uint64_t* full, uint64_t* empty, int* rows) {
    int lane = threadIdx.x % WARP, b0 = w.entry / s.size1, b1 = w.entry - b0 * s.size1;
    RingPlace<GRADS ? GRAD_STAGES : QUERY_STAGES> at;
    Step step(s, w);
    for (int i = 0; i < w.steps; i++, at.next(), step.next(w)) {
        int first = step.tile * C::QUERIES, rest = w.tokens.queries - first, token = w.tokens.query + first;
        barrier_wait(empty + at.slot, at.parity ^ 1);
        if (lane == 0) {
            barrier_expect(full + at.slot, C::ROWS);
            load_rows<C::BOXES>(shared + (GRADS ? C::GRADS : C::RING) + at.slot * C::ROWS, &map, full + at.slot, axes,
                                {b0, b1, token, step.head}, C::QUERIES * LINE);
        }
        const float* from = (GRADS ? s.delta : s.lse) + (place(s, w) * s.heads + step.head) * s.queries + token;
        float* to = reinterpret_cast<float*>(shared + (GRADS ? C::DELTA : C::LSE) + at.slot * C::NUMBERS);
        int* limits = reinterpret_cast<int*>(shared + C::LIMITS + at.slot * C::NUMBERS);
#pragma unroll
        for (int j = lane; j < C::QUERIES; j += WARP) {
            // Weights of queries that are not there are 2^-infinity.
            to[C::number(j)] = j < rest ? from[j] : GRADS ? 0.0f : INFINITY;
            if (!GRADS) limits[C::number(j)] = s.extents.limit(w.tokens, first + min(j, rest - 1));
        }
        __syncwarp();
        if (lane == 0) {
            rows[at.slot] = min(rest, C::QUERIES);
            barrier_arrive(full + at.slot);
        }
    }
}

// One thread adds a warpgroup's pieces to the gradient of queries, after those of the key blocks before this one.
template <class C>
__device__ __forceinline__ void add_pieces(const Sizes& s, const Work& w, const unsigned char* from, int piece, Barriers& bars) {
    uint32_t parity = 0;
    Step step(s, w);
    for (int i = 0; i < w.steps; i++, parity ^= 1, step.next(w)) {
        int tile = first_tile(s.extents, w.tokens, w.entry / s.size1, C::D) + step.tile;
        int64_t number = ((place(s, w) * s.heads + step.head) * s.tiles + tile) * GROUPS + piece;
        float* to = s.d_q + number * (PIECE / 4);
        // After the number of the next block.
        uint32_t* counter = s.counters + 1 + number;
        barrier_wait(bars.piece_full + piece, parity);
        if (w.block == 0) {
            store_linear(to, from, PIECE);
        } else {
            counter_wait(counter, w.block);
            add_linear(to, from, PIECE);
        }
        store_commit();
        store_wait_read<0>();
        barrier_arrive(bars.piece_empty + piece);
        store_wait<0>();
        counter_add(counter);
    }
}

// Makes lines from `first` on of a tile zero, by the threads of the warpgroups that compute.
template <int BOXES>
__device__ __forceinline__ void clear_lines(unsigned char* tile, int lines, int first) {
    int thread = threadIdx.x - 128, chunks = (lines - first) * 8;
    // Rare, and not to take registers.
#pragma unroll 1
    for (int i = thread; i < chunks * BOXES; i += 128 * GROUPS) {
        int box = i / chunks, chunk = i - box * chunks;
        *reinterpret_cast<uint4*>(tile + box * lines * LINE + first * LINE + chunk * 16) = make_uint4(0, 0, 0, 0);
    }
}

template <bool VALUE>
struct Bool {
    static constexpr bool value = VALUE;
};

// The barrier of the threads that compute.
__device__ __forceinline__ void meet() { named_barrier(1, 128 * GROUPS); }

// A descriptor of what lies so many bytes behind: its lower half counts them in 16.
__device__ __forceinline__ uint64_t behind(uint64_t descriptor, int bytes) {
    return (descriptor & ~0xffffffffull) | (uint32_t(descriptor) + (bytes >> 4));
}

// d = or += A B over 16 STEPS of k. Of A in registers, a[i] is that of step i.
template <int N, bool A_ALONG_K, bool B_ALONG_K, int STEPS>
__device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        wgmma<N, A_ALONG_K, B_ALONG_K>(d, behind(a, i * (A_ALONG_K ? 32 : 16 * LINE)), behind(b, i * (B_ALONG_K ? 32 : 16 * LINE)),
                                       add || i > 0);
}
template <int N, int STEPS>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const uint32_t (&a)[STEPS][4], uint64_t b, bool add) {
#pragma unroll
    for (int i = 0; i < STEPS; i++) wgmma<N, false>(d, a[i], behind(b, i * 16 * LINE), add || i > 0);
}

// d = rows of `own` times N rows of `other`, over all channels: both lie along k, in boxes of 64 channels.
template <class C, int N>
__device__ __forceinline__ void rows_by_rows(float (&d)[N / 2], const unsigned char* own, const unsigned char* other) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::BOXES; i++)
        multiply<N, true, true, 4>(d, descriptor(own + i * KEYS * LINE, 16, 8 * LINE),
                                   descriptor(other + i * C::QUERIES * LINE, 16, 8 * LINE), i > 0);
    wgmma_commit();
}

// Zeros as the gradients of keys that nobody sees, where rows are written. Packed ones are not read then.
__device__ __forceinline__ void clear_rows(const Target& to, const Sizes& s, const Work& w) {
    if (!to.rows) return;
    int column = threadIdx.x % WARP * 8, count = column < to.layout.channels ? min(w.tokens.keys - w.key, KEYS) : 0;
    bf16* rows = to.rows + to.layout.start(int(place(s, w)), w.head) + column;
#pragma unroll 1
    for (int line = threadIdx.x / WARP; line < count; line += THREADS / WARP)
        *reinterpret_cast<uint4*>(rows + (w.tokens.key + w.key + line) * to.layout.token) = make_uint4(0, 0, 0, 0);
}

// Of 4 x 4 words, a lane of a quad has a column, and then that row.
__device__ __forceinline__ void transpose(uint32_t (&words)[4]) {
    int lane = threadIdx.x;
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            bool second = lane & bit;
            uint32_t other = __shfl_xor_sync(0xffffffffu, second ? words[i] : words[i + bit], bit);
            (second ? words[i] : words[i + bit]) = other;
        }
}

// Gradients of a warpgroup's keys from registers: this warp's begin with `key` of the block's `count`. The lanes of a quad exchange theirs,
// so that each has whole chunks of 8 channels.
template <int D>
__device__ __forceinline__ void write_rows(const float (&d)[D / 2], const Target& to, const Sizes& s, const Work& w, int key, int count) {
    int lane = threadIdx.x % WARP;
    int64_t packed = (place(s, w) * s.key_heads + w.head) * s.keys + w.tokens.key + w.key;
    int64_t start = to.rows ? to.layout.start(int(place(s, w)), w.head) : 0;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int line = key + lane / 4 + 8 * r;
        bf16* row = to.rows + start + (w.tokens.key + w.key + line) * to.layout.token;
        float* packed_row = to.packed + (packed + line) * D;
#pragma unroll
        for (int j = 0; j < D / 8; j += 4) {
            int column = 8 * (j + lane % 4);
            uint32_t low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float x = d[4 * (j + i) + 2 * r], y = d[4 * (j + i) + 2 * r + 1];
                low[i] = to.rows ? narrow(to.factor * x, to.factor * y) : __float_as_uint(x), high[i] = __float_as_uint(y);
            }
            transpose(low);
            if (to.rows) {
                if (line < count && column < to.layout.channels) *reinterpret_cast<uint4*>(row + column) = make_uint4(low[0], low[1], low[2], low[3]);
            } else {
                transpose(high);
                uint4* chunk = reinterpret_cast<uint4*>(packed_row + column);
                if (line < count) chunk[0] = make_uint4(low[0], high[0], low[1], high[1]), chunk[1] = make_uint4(low[2], high[2], low[3], high[3]);
            }
        }
    }
}

// Where a thread's part of an accumulator is: the line of its warpgroup's 64 that d[0] belongs to, and its first column. It is found again
// wherever it is needed, and with it the addresses that follow: kept, they would take registers of the products.
struct Part {
    unsigned line, column;
    __device__ __forceinline__ Part(unsigned thread) {
        asm volatile("" : "+r"(thread));
        line = thread % 128 / WARP * 16 + thread % WARP / 4, column = thread % 4 * 2;
    }
    // In a box of lines of `bytes` whose chunk c of 1 << SHIFT bytes lies where c ^ line % 8 would.
    template <int SHIFT>
    __device__ __forceinline__ unsigned chunk(unsigned c) const {
        return (line * (8 << SHIFT) + (line % 8 << SHIFT)) ^ (c << SHIFT);
    }
    // The numbers of its columns in those of all: four for every two chunks.
    template <class C, class Four>
    __device__ __forceinline__ const Four* numbers(const void* all) const {
        return reinterpret_cast<const Four*>(static_cast<const unsigned char*>(all) + column / 2 * (C::NUMBERS / 4));
    }
};

// The numbers of a thread's columns of 64 rows, four for every two chunks. They are loaded ahead of the products that are waited for.
struct Numbers {
    float4 of[4];
    __device__ __forceinline__ explicit Numbers(const float4* from) {
#pragma unroll
        for (int j = 0; j < 4; j++) of[j] = from[j];
    }
};

// Scores of 64 queries, from the PART of them on, become weights: 2^(factor score - lse), and zero for queries that don't see this thread's
// two keys, `key` and the eighth after.
template <bool MASKED, int PART, int N>
__device__ __forceinline__ void weigh(float (&scores)[N], const Numbers& lse, const int4* limits, float factor, int key) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float4 sums = lse.of[j];
        int4 limit = MASKED ? limits[j] : make_int4(0, 0, 0, 0);
        auto weight = [&](int i, float sum, int limit) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float& x = scores[32 * PART + 8 * j + i + 2 * r];
                x = exp2_approximate(fmaf(x, factor, -sum));
                if (MASKED) x = key + 8 * r < limit ? x : 0.0f;
            }
        };
        weight(0, sums.x, limit.x), weight(1, sums.y, limit.y), weight(4, sums.z, limit.z), weight(5, sums.w, limit.w);
    }
}

// Gradients of scores for 64 queries, as a box in shared memory: a line for each key.
__device__ __forceinline__ void differentiate(const uint32_t (&weights)[4][4], const float (&d_weights)[32], const Numbers& delta,
                                              const Part& part, unsigned char* lines) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float4 deltas = delta.of[j];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // The chunk's column, and the key or the eighth after it.
            int chunk = 2 * j + i / 2, r = i % 2;
            float low, high, x = i < 2 ? deltas.x : deltas.z, y = i < 2 ? deltas.y : deltas.w;
            widen(weights[j][i], low, high);
            *reinterpret_cast<uint32_t*>(lines + part.chunk<4>(chunk) + 8 * r * LINE + part.column * 2) =
                narrow(low * (d_weights[8 * j + 2 * i] - x), high * (d_weights[8 * j + 2 * i + 1] - y));
        }
    }
}

// The order of the products is such that the tensor cores have work meanwhile: gradients of values and the next scores while gradients of
// scores are computed, the gradients of queries and keys while the next weights are computed and the piece is stored. So that the
// next scores have a place, gradients of scores are computed from the narrowed weights.
template <class C>
__device__ __forceinline__ void consume(const Sizes& s, const Work& w, unsigned char* shared, Barriers& bars) {
    constexpr int N = C::QUERIES;
    // Taken from one lane, so that the compiler knows them for the same in all, and keeps what follows in registers of the warp.
    int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1, steps = __shfl_sync(0xffffffffu, w.steps, 0);
    unsigned thread = threadIdx.x;
    int own_rows = min(w.tokens.keys - w.key, KEYS);
    // Is any tile short, and may any query not see all these keys? Most often not, and then nobody looks.
    bool short_tiles = __shfl_sync(0xffffffffu, w.tokens.queries % N != 0, 0);
    bool masks = __shfl_sync(0xffffffffu, s.extents.limits || own_rows < KEYS, 0);
    const unsigned char *own_keys = shared + group * 64 * LINE, *own_values = own_keys + C::VALUES;

    // Scores, then their weights; gradients of weights, or a piece of the gradient of queries.
    float d_keys[C::D / 2], d_values[C::D / 2], weights[N / 2], piece[32];
    uint32_t rounded[N / 64][4][4];
    // The step. Slots follow from it, of queries and of gradients of the output, which share theirs with the gradients of scores.
    int i = 0;
    auto queries = [&](int step) { return shared + C::RING + step % QUERY_STAGES * C::ROWS; };
    auto d_scores = [&]() { return shared + C::D_SCORES + i % GRAD_STAGES * C::SCORES; };

    // Rows of a tile, with zeros in place of those of others.
    auto wait_rows = [&](unsigned char* tile, uint64_t* full, uint32_t parity, const int* rows) {
        barrier_wait(full, parity);
        if (short_tiles && *rows < N) {
            clear_lines<C::BOXES>(tile, N, *rows);
            fence_async();
            meet();
        }
    };
    // All lanes have read what the slot holds.
    auto release = [&](uint64_t* empty) {
        __syncwarp();
        if (thread % WARP == 0) barrier_arrive(empty);
    };
    auto begin_scores = [&](int step) {
        int slot = step % QUERY_STAGES;
        wait_rows(queries(step), bars.full + slot, step / QUERY_STAGES & 1, bars.rows + slot);
        rows_by_rows<C, N>(weights, own_keys, queries(step));
    };
    auto lse = [&](int step) {
        return Part(thread).numbers<C, float4>(shared + C::LSE + step % QUERY_STAGES * C::NUMBERS);
    };
    auto weigh_scores = [&](int step, const Numbers& first) {
        const unsigned char* limits = shared + C::LIMITS + step % QUERY_STAGES * C::NUMBERS;
        auto parts = [&](auto masked) {
            constexpr bool MASKED = decltype(masked)::value;
            Part part(thread);
            const int4* own_limits = part.numbers<C, int4>(limits);
            int key = w.key + group * 64 + part.line;
            weigh<MASKED, 0>(weights, first, own_limits, s.factor, key);
            if constexpr (N > 64) weigh<MASKED, 1>(weights, Numbers(lse(step) + 4), own_limits + 4, s.factor, key);
        };
        if (masks && *reinterpret_cast<const int*>(limits) < w.key + KEYS) parts(Bool<true>());
        else parts(Bool<false>());
    };
    // A stored piece may be added. The next products need not wait for its stores.
    auto publish_piece = [&]() {
        fence_async();
        release(bars.piece_full + group);
    };
    // Of 64 queries of the step, in turn: gradients of weights, those of values, left under way, and of scores. After the last ones, NEXT
    // scores are begun. What was before has ended when the first ones are at hand.
    auto take_weights = [&](auto next) {
        constexpr bool NEXT = decltype(next)::value;
        int slot = i % GRAD_STAGES;
        unsigned char* grads = shared + C::GRADS + slot * C::ROWS;
        wait_rows(grads, bars.grad_full + slot, i / GRAD_STAGES & 1, bars.grad_rows + slot);
#pragma unroll
        for (int part = 0; part < N / 64; part++) {
            rows_by_rows<C, 64>(piece, own_values, grads + part * 64 * LINE);
            if (part == 0 && i > 0) publish_piece();
#pragma unroll
            for (int j = 0; j < 16; j++) rounded[part][j / 4][j % 4] = narrow(weights[part * 32 + 2 * j], weights[part * 32 + 2 * j + 1]);
            wgmma_fence();
            multiply<C::D>(d_values, rounded[part], descriptor(grads + part * 64 * LINE, N * LINE, 8 * LINE), true);
            wgmma_commit();
            Part own(thread);
            Numbers delta(own.numbers<C, float4>(shared + C::DELTA + slot * C::NUMBERS) + part * 4);
            if (NEXT && part + 1 == N / 64) {
                begin_scores(i + 1);
                wgmma_wait<2>();
            } else {
                wgmma_wait<1>();
            }
            if (part == 0 && i > 0) release(bars.empty + (i - 1) % QUERY_STAGES);
            differentiate(rounded[part], piece, delta, own, d_scores() + (part * KEYS + group * 64) * LINE);
        }
        fence_async();
    };
    auto begin_queries_and_keys = [&]() {
        meet();
        wgmma_fence();
        multiply<64, false, false, KEYS / 16>(piece,
                                              descriptor(d_scores() + (C::D == 64 ? group * KEYS * LINE : 0), 64 * LINE, 8 * LINE),
                                              descriptor(shared + (C::D == 64 ? 0 : group * KEYS * LINE), 64 * LINE, 8 * LINE), false);
        wgmma_commit();
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < N / 64; j++)
            multiply<C::D, true, false, 4>(d_keys, descriptor(d_scores() + j * KEYS * LINE + group * 64 * LINE, 16, 8 * LINE),
                                           descriptor(queries(i) + j * 64 * LINE, N * LINE, 8 * LINE), true);
        wgmma_commit();
    };
    auto store_piece = [&]() {
        barrier_wait(bars.piece_empty + group, ~i & 1);
        Part part(thread);
        unsigned char* pieces = shared + C::PIECES + group * PIECE;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int r = 0; r < 2; r++)
                *reinterpret_cast<float2*>(pieces + part.chunk<5>(j) + 8 * r * 256 + part.column * 4) =
                    make_float2(piece[4 * j + 2 * r], piece[4 * j + 2 * r + 1]);
    };

    barrier_wait(&bars.own, 0);
    if (own_rows < KEYS) {
        clear_lines<C::BOXES>(shared, KEYS, own_rows);
        clear_lines<C::BOXES>(shared + C::VALUES, KEYS, own_rows);
        fence_async();
        meet();
    }
#pragma unroll
    for (int j = 0; j < C::D / 2; j++) d_keys[j] = d_values[j] = 0.0f;
    begin_scores(0);
    wgmma_wait<0>();
    weigh_scores(0, Numbers(lse(0)));
    for (; i + 1 < steps; i++) {
        take_weights(Bool<true>());
        begin_queries_and_keys();
        Numbers first(lse(i + 1));
        wgmma_wait<2>();  // Gradients of values, and scores.
        release(bars.grad_empty + i % GRAD_STAGES);
        weigh_scores(i + 1, first);
        wgmma_wait<1>();  // The gradient of queries.
        store_piece();
    }
    take_weights(Bool<false>());
    begin_queries_and_keys();
    wgmma_wait<0>();
    store_piece();
    publish_piece();

    int own = (threadIdx.x - 128) / WARP * 16;
    write_rows<C::D>(d_keys, s.d_k, s, w, own, own_rows);
    write_rows<C::D>(d_values, s.d_v, s, w, own, own_rows);
}

template <class C>
__device__ __forceinline__ void gradients(const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v, const CUtensorMap& grad,
                                          const Sizes& s) {
    static_assert(sizeof(Barriers) == 192, "the launcher counts on it");
    DYNAMIC_SHARED(unsigned char, dynamic);
    unsigned char* shared = dynamic + (-shared_address(dynamic) & 1023);
    Barriers& bars = *reinterpret_cast<Barriers*>(shared + C::BARRIERS);
    if (threadIdx.x == WARP) prefetch(&q), prefetch(&k), prefetch(&v), prefetch(&grad);
    if (threadIdx.x == 0) {
        uint32_t number = counter_next(s.counters);
        barrier_init(&bars.own, 1);
        // The boxes, and the numbers that come with them; a lane of each warp that reads them.
        for (int i = 0; i < QUERY_STAGES; i++) barrier_init(bars.full + i, 2), barrier_init(bars.empty + i, 4 * GROUPS);
        for (int i = 0; i < GRAD_STAGES; i++) barrier_init(bars.grad_full + i, 2), barrier_init(bars.grad_empty + i, 4 * GROUPS);
        for (int i = 0; i < GROUPS; i++) barrier_init(bars.piece_full + i, 4), barrier_init(bars.piece_empty + i, 1);
        barrier_init_fence();
        bars.number = number;
    }
    __syncthreads();
    Work w = find_work<C>(s, bars.number);
    if (w.steps == 0) {
        clear_rows(s.d_k, s, w);
        clear_rows(s.d_v, s, w);
        return;
    }
    if (threadIdx.x == 0) bars.work = w;
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<C::PRODUCER_REGISTERS>();
        int warp = threadIdx.x / WARP;
        if (warp == 0) {
            if (threadIdx.x == 0) copy_own<C>(k, v, s, bars.work, shared, &bars.own);
            produce<C, false>(q, s.q, s, bars.work, shared, bars.full, bars.empty, bars.rows);
        } else if (warp == 1) {
            produce<C, true>(grad, s.grad, s, bars.work, shared, bars.grad_full, bars.grad_empty, bars.grad_rows);
        } else if (threadIdx.x % WARP == 0) {
            add_pieces<C>(s, bars.work, shared + C::PIECES + (warp - 2) * PIECE, warp - 2, bars);
        }
        __syncwarp();
    } else {
        more_registers<C::CONSUMER_REGISTERS>();
        consume<C>(s, bars.work, shared, bars);
    }
}

} // namespace warpgroup_backward
