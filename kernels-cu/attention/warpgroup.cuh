// The forward pass on Hopper, after FlashAttention-3 (arXiv 2407.08608): tiles by the copy engine (TMA), products of warpgroups (wgmma)
// with the running softmax between them in registers.
//
// A block is a producer, a thread that copies keys and values ahead into two rings and one for queries, and warpgroups of 64 queries each.
// Warpgroups issue their products in turns (ping-pong): while one takes exponentials, the tensor cores belong to another. Within a
// warpgroup the scores of the next tile are multiplied under the exponentials of this one, and so are its values (overlap). Blocks stay
// (persistent) and take tile after tile of queries.
//
// A row's bits depend on that row, its keys and the kernel alone: tiles start at multiples of KEYS whatever a row sees of them, and what
// it does not see adds zeros. README.md beside this has the floors and the steps that led here.
#pragma once

#include "attention/boxes.cuh"
#include "attention/queries.cuh"
#include "attention/rows.cuh"
#include "attention/softmax.cuh"

namespace warpgroup {

using namespace hopper;

constexpr int GROUP_ROWS = 64;    // queries of a warpgroup
constexpr int GROUP_THREADS = 128;

// Channels of a row, padded; keys of a tile; warpgroups that multiply; slots of each ring; see above for the rest.
template <int CHANNELS, int TILE_KEYS, int GROUPS, int SLOTS, bool TURNS = true, bool AHEAD = true>
struct Config {
    static constexpr int WIDTH = CHANNELS, KEYS = TILE_KEYS, CONSUMERS = GROUPS, STAGES = SLOTS;
    static constexpr bool PING_PONG = TURNS, OVERLAP = AHEAD;
    static constexpr int THREADS = GROUP_THREADS * (CONSUMERS + 1), ROWS = GROUP_ROWS * CONSUMERS;
    // The output's product takes whole lines: a side across k is not divided within one.
    static constexpr int LINES = (WIDTH + LINE_CHANNELS - 1) / LINE_CHANNELS, COLUMNS = LINES * LINE_CHANNELS;
    static constexpr int QUERY_BOX = GROUP_ROWS * LINE, KEY_BOX = KEYS * LINE;
    static constexpr int QUERIES = LINES * QUERY_BOX, STAGE = LINES * KEY_BOX;
    // Steps of the output's product, and how many of them follow the next scores' product at once.
    static constexpr int VALUE_STEPS = KEYS / 16, AHEAD_STEPS = VALUE_STEPS / 2;
    // Registers of a thread: 64 K divided, in steps of 8.
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 32, CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
    static_assert(registers_suffice(CONSUMERS, PRODUCER_REGISTERS, CONSUMER_REGISTERS), "setmaxnreg would wait for ever");
};

// What a launch is about, as the launcher builds it (no padding).
struct Sizes {
    Extents extents;
    Rows out_rows;
    Axes q, k, v;
    Change change;
    bf16* out;
    float* lse;
    // The tiles of each block, [round][block]: unit * tiles + tile, and `count` behind a block's last; null: all of them, one after the
    // other. A unit is (batch0, batch1, head).
    const int* list;
    // log2(e) / sqrt(channels).
    float scale;
    // Query heads that share a key head; tiles of queries of the longest entry, and of all if each had as many.
    int shared_heads, tiles, count;
};

// Keys that a query sees; those behind the last one see what that does.
__device__ __forceinline__ int limit(const Extents& extents, const Entry& entry, int query) {
    return entry.queries > 0 ? extents.limit(entry, min(query, entry.queries - 1)) : 0;
}

// A tile of queries of a unit, from `row` of its entry on, which has the number `index`; `most`: keys that its last row sees, the largest
// number.
struct Item {
    Entry entry;
    int index, head, row, most;

    // Of a token of an operand's tensor that has `size1` entries along the second axis.
    __device__ __forceinline__ Coordinates at(int size1, int token, int of_head) const {
        int batch0 = index / size1;
        return {batch0, index - batch0 * size1, token, of_head};
    }
};

// The tiles of a block, one after the other; `at`: the place of the present one.
template <class C>
struct Items {
    const Sizes& s;
    int at = blockIdx.x;

    __device__ __forceinline__ int number(int place) const { return s.list ? s.list[place] : place; }
    // It is found again wherever it is needed: kept, it would take registers of the products.
    __device__ __forceinline__ Item item() const {
        int place = at;
        asm volatile("" : "+r"(place));
        int now = number(place), unit = now / s.tiles;
        Item item;
        item.index = unit / s.out_rows.heads;
        item.head = unit - item.index * s.out_rows.heads;
        item.entry = s.extents.entry(item.index);
        item.row = (now - unit * s.tiles) * C::ROWS;
        item.most = limit(s.extents, item.entry, item.row + C::ROWS - 1);
        return item;
    }
    __device__ __forceinline__ bool more() const { return number(at) < s.count; }
    __device__ __forceinline__ void next() { at += gridDim.x; }
};

// Tiles with their barriers: a ring of keys or of values, or the queries of each warpgroup.
struct Ring {
    unsigned char* tiles;
    uint64_t *full, *empty;
};

struct Maps {
    const CUtensorMap &q, &k, &v;
};

template <class C>
__device__ __forceinline__ void fill(const Ring& ring, RingPlace<C::STAGES>& at, const CUtensorMap* map, const Axes& axes,
                                     const Coordinates& from) {
    // Nobody reads this slot any more.
    barrier_wait(ring.empty + at.slot, at.parity ^ 1);
    barrier_expect(ring.full + at.slot, C::STAGE);
    load_rows<C::LINES>(ring.tiles + at.slot * C::STAGE, map, ring.full + at.slot, axes, from, C::KEY_BOX);
    at.next();
}

// In the order in which the tiles are used: a tile's values come after the next tile's keys.
template <class C>
__device__ __forceinline__ void produce(const Maps& maps, const Sizes& s, const Ring& keys, const Ring& values) {
    RingPlace<C::STAGES> k, v;
    for (Items<C> items{s}; items.more(); items.next()) {
        Item i = items.item();
        // Where the values are; keys are a tile ahead.
        Coordinates from = i.at(s.out_rows.size1, i.entry.key - C::KEYS, i.head / s.shared_heads);
        int tiles = (i.most + C::KEYS - 1) / C::KEYS;
        for (int j = 0; j <= tiles; j++) {
            if (j < tiles) fill<C>(keys, k, &maps.k, s.k, from.ahead(C::KEYS));
            if (j > 0) fill<C>(values, v, &maps.v, s.v, from);
            from.token += C::KEYS;
        }
    }
}

// The queries of one tile after the other, for each warpgroup as soon as it has read those before.
template <class C>
__device__ __forceinline__ void produce_queries(const Maps& maps, const Sizes& s, const Ring& queries) {
    uint32_t parity = 1;
    for (Items<C> items{s}; items.more(); items.next(), parity ^= 1) {
        Item i = items.item();
        for (int group = 0; group < C::CONSUMERS; group++) {
            Coordinates from = i.at(s.out_rows.size1, i.entry.query + i.row + group * GROUP_ROWS, i.head);
            barrier_wait(queries.empty + group, parity);
            barrier_expect(queries.full + group, C::QUERIES);
            load_rows<C::LINES>(queries.tiles + group * C::QUERIES, &maps.q, queries.full + group, s.q, from, C::QUERY_BOX);
        }
    }
}

// Four neighbouring lanes have 4 bytes each of four packs of 16 bytes; lane number i of them gets pack i.
__device__ __forceinline__ uint4 own_pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    bool odd = threadIdx.x % 2, upper = threadIdx.x / 2 % 2;
    uint32_t ab = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1), cd = __shfl_xor_sync(0xffffffffu, odd ? c : d, 1);
    // Halves of the packs 0 + odd and 2 + odd.
    uint2 low = odd ? uint2{ab, b} : uint2{a, ab}, high = odd ? uint2{cd, d} : uint2{c, cd};
    uint32_t x = __shfl_xor_sync(0xffffffffu, upper ? low.x : high.x, 2), y = __shfl_xor_sync(0xffffffffu, upper ? low.y : high.y, 2);
    return upper ? uint4{x, y, high.x, high.y} : uint4{low.x, low.y, x, y};
}

// A warpgroup.
template <class C>
struct Consumer {
    const Sizes& s;
    Ring queries, keys, values;
    int group;
    RingPlace<C::STAGES> k, v;
    // Scores of a tile, then their weights; weights narrowed; the output.
    float scores[C::KEYS / 2], sums[C::COLUMNS / 2];
    uint32_t weights[C::KEYS / 16][4];

    __device__ __forceinline__ Consumer(const Sizes& s, Ring queries, Ring keys, Ring values, int group)
        : s(s), queries(queries), keys(keys), values(values), group(group) {}

    __device__ __forceinline__ int thread() const { return threadIdx.x % GROUP_THREADS; }
    __device__ __forceinline__ bool leader() const { return thread() == 0; }
    // A barrier of this warpgroup; those before are the turns of each.
    __device__ __forceinline__ void together() const { named_barrier(1 + C::CONSUMERS + group, GROUP_THREADS); }
    // Of C::CONSUMERS warpgroups one after the other: waits for this one's turn, and gives the next one its turn.
    __device__ __forceinline__ void take_turn() const {
        if (C::PING_PONG) named_barrier(1 + group, 2 * GROUP_THREADS);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (C::PING_PONG) named_barrier_arrive(1 + (group + 1) % C::CONSUMERS, 2 * GROUP_THREADS);
    }
    __device__ __forceinline__ void release(const Ring& ring, RingPlace<C::STAGES>& at) const {
        if (leader()) barrier_arrive(ring.empty + at.slot);
        at.next();
    }

    __device__ __forceinline__ unsigned char* own_queries() const { return queries.tiles + group * C::QUERIES; }
    // After the last product of scores, so that the next ones come under the last weights and the output.
    __device__ __forceinline__ void release_queries() const {
        if (leader()) barrier_arrive(queries.empty + group);
    }

    __device__ __forceinline__ void await_keys() const { barrier_wait(keys.full + k.slot, k.parity); }
    // scores = Q K^T of keys that are there, issued.
    __device__ __forceinline__ void multiply_keys() {
        uint64_t q = descriptor(own_queries(), 16, 8 * LINE), tile = descriptor(keys.tiles + k.slot * C::STAGE, 16, 8 * LINE);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < C::WIDTH / 16; i++)
            wgmma<C::KEYS, true, true>(scores, advance(q, i / 4 * C::QUERY_BOX + i % 4 * 32), advance(tile, i / 4 * C::KEY_BOX + i % 4 * 32),
                                       i > 0);
        wgmma_commit();
    }
    // Waits for a tile of values; its descriptor. `keep`: rows of the tile that are anybody's; the others count as zeros, whatever they
    // hold.
    __device__ __forceinline__ uint64_t await_values(int keep) {
        barrier_wait(values.full + v.slot, v.parity);
        unsigned char* from = values.tiles + v.slot * C::STAGE;
        if (keep < C::KEYS) {
            // Every warpgroup writes the same zeros.
            for (int i = thread(); i < (C::KEYS - keep) * (LINE / 16) * C::LINES; i += GROUP_THREADS)
                *reinterpret_cast<uint4*>(from + chunk_place(keep + i / (LINE / 16 * C::LINES), i % (LINE / 16 * C::LINES), C::KEY_BOX)) =
                    uint4{};
            fence_async();
            together();
        }
        return descriptor(from, C::KEY_BOX, 8 * LINE);
    }
    // Of sums += P V the step `i`, sums = P V where not `add`.
    __device__ __forceinline__ void value_step(uint64_t tile, int i, bool add) {
        wgmma<C::COLUMNS, false>(sums, weights[i], advance(tile, i * 16 * LINE), add || i > 0);
    }
    // All of it, issued.
    __device__ __forceinline__ void multiply_values(bool add, int keep) {
        uint64_t tile = await_values(keep);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < C::VALUE_STEPS; i++) value_step(tile, i, add);
        wgmma_commit();
    }
    __device__ __forceinline__ void narrow_weights() {
#pragma unroll
        for (int i = 0; i < C::KEYS / 16; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) weights[i][r] = narrow(scores[8 * i + 2 * r], scores[8 * i + 2 * r + 1]);
    }

    // The rows of a tile of queries against all their tiles of keys.
    __device__ __forceinline__ void attend(const Item& item, Softmax& softmax) {
        int first = item.row + group * GROUP_ROWS, row = first + threadIdx.x % GROUP_THREADS / WARP * 16 + threadIdx.x % WARP / 4;
        int limits[2] = {limit(s.extents, item.entry, row), limit(s.extents, item.entry, row + 8)};
        // Tiles that every row sees whole are not masked.
        int most = item.most, tiles = (most + C::KEYS - 1) / C::KEYS, whole = limit(s.extents, item.entry, first) / C::KEYS;
        auto look = [&](int j) {
            if (j >= whole) mask(scores, j * C::KEYS, limits);
            softmax.look(scores);
        };
        if (C::OVERLAP) {
            await_keys();
            multiply_keys();
            wgmma_wait<0>();
            wgmma_hold(scores);
            release(keys, k);
            if (tiles == 1) release_queries();
            look(0);
            softmax.weigh(scores, s.scale);
            if (tiles > 1) await_keys();
            narrow_weights();
            for (int j = 1; j < tiles; j++) {
                take_turn();
                multiply_keys();
                uint64_t tile = await_values(C::KEYS);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < C::AHEAD_STEPS; i++) value_step(tile, i, j > 1);
                wgmma_commit();
                wgmma_wait<1>();
                wgmma_hold(scores);
                release(keys, k);
                if (j + 1 == tiles) release_queries();
                // A warp can't issue a product with weights from registers until the tensor cores are nearly there, so the largest
                // scores are looked for meanwhile.
                if (j < whole) softmax.look(scores);
                wgmma_fence();
#pragma unroll
                for (int i = C::AHEAD_STEPS; i < C::VALUE_STEPS; i++) value_step(tile, i, true);
                wgmma_commit();
                pass_turn();
                if (j >= whole) look(j);
                softmax.weigh(scores, s.scale);
                // The next keys are waited for here, and as if that depended on the weights: this keeps the assembler from moving the
                // exponentials behind the wait for the product that they are to run beside.
                if (j + 1 < tiles || softmax.impossible()) await_keys();
                wgmma_wait<0>();
                wgmma_hold(sums);
                release(values, v);
                softmax.rescale(sums);
                narrow_weights();
            }
            multiply_values(tiles > 1, most - (tiles - 1) * C::KEYS);
            wgmma_wait<0>();
            wgmma_hold(sums);
            release(values, v);
        } else {
            for (int j = 0; j < tiles; j++) {
                take_turn();
                await_keys();
                multiply_keys();
                wgmma_wait<0>();
                wgmma_hold(scores);
                pass_turn();
                release(keys, k);
                if (j + 1 == tiles) release_queries();
                look(j);
                softmax.weigh(scores, s.scale);
                if (j > 0) softmax.rescale(sums);
                narrow_weights();
                multiply_values(j > 0, most - j * C::KEYS);
                wgmma_wait<0>();
                wgmma_hold(sums);
                release(values, v);
            }
        }
    }

    // A row of 8 channels of four lanes each goes out as packs of 16 bytes.
    __device__ __forceinline__ void store(const Item& item, Softmax& softmax) {
        const Rows& rows = s.out_rows;
        softmax.finish();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = item.row + group * GROUP_ROWS + thread() / WARP * 16 + threadIdx.x % WARP / 4 + 8 * r;
            // Where no key is seen there are no sums.
            float inverse = 1.0f / softmax.sum[r];
            auto word = [&](int chunk) {
                return item.most > 0 ? narrow(sums[4 * chunk + 2 * r] * inverse, sums[4 * chunk + 2 * r + 1] * inverse) : 0;
            };
            bf16* to = s.out + rows.start(item.index, item.head) + (item.entry.query + row) * rows.token;
#pragma unroll
            for (int j = 0; j < C::WIDTH / 8; j += 4) {
                uint4 pack = own_pack(word(j), word(j + 1), word(j + 2), word(j + 3));
                int channel = 8 * (j + threadIdx.x % 4), there = min(rows.channels - channel, 8);
                if (row < item.entry.queries && there > 0) store_bits(to + channel, pack, there);
            }
            if (threadIdx.x % 4 == 0 && row < item.entry.queries)
                s.lse[rows.number(s.extents, item.index, item.head, item.entry.query + row)] = softmax.lse(r);
        }
    }

    __device__ __forceinline__ void run() {
        // The first turn is the first warpgroup's.
        if (group == C::CONSUMERS - 1) pass_turn();
        uint32_t parity = 0;
        for (Items<C> items{s}; items.more(); items.next(), parity ^= 1) {
            Softmax softmax;
            barrier_wait(queries.full + group, parity);
            Item item = items.item();
            if (s.change.weight || s.change.cos) {
                change_queries<C::WIDTH, C::QUERY_BOX>(own_queries(), s.change, s.out_rows.channels, item.row + group * GROUP_ROWS,
                                                       item.entry.queries);
                fence_async();
                together();
            }
            if (item.most > 0)
                attend(item, softmax);
            else
                release_queries();
            store(items.item(), softmax);
        }
        if (group == 0) take_turn();
    }
};

template <class C>
__device__ __forceinline__ void forward(const Maps& maps, const Sizes& s) {
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char* queries = shared + (-reinterpret_cast<uintptr_t>(shared) & 1023);
    unsigned char *keys = queries + C::CONSUMERS * C::QUERIES, *values = keys + C::STAGES * C::STAGE;
    uint64_t* words = reinterpret_cast<uint64_t*>(values + C::STAGES * C::STAGE);
    Ring k = {keys, words, words + C::STAGES}, v = {values, words + 2 * C::STAGES, words + 3 * C::STAGES};
    words += 4 * C::STAGES;
    Ring q = {queries, words, words + C::CONSUMERS};
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < C::STAGES; i++) {
            barrier_init(k.full + i, 1), barrier_init(v.full + i, 1);
            barrier_init(k.empty + i, C::CONSUMERS), barrier_init(v.empty + i, C::CONSUMERS);
        }
#pragma unroll
        for (int i = 0; i < C::CONSUMERS; i++) barrier_init(q.full + i, 1), barrier_init(q.empty + i, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < GROUP_THREADS) {
        fewer_registers<C::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) {
            prefetch(&maps.k), prefetch(&maps.v);
            produce<C>(maps, s, k, v);
        } else if (threadIdx.x == WARP) {
            prefetch(&maps.q);
            produce_queries<C>(maps, s, q);
        }
    } else {
        more_registers<C::CONSUMER_REGISTERS>();
        // The same for all threads of a warp: what follows from it, descriptors above all, may be in uniform registers.
        int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / GROUP_THREADS - 1, 0);
        Consumer<C>(s, q, k, v, group).run();
    }
}

} // namespace warpgroup
