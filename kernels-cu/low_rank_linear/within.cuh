// S = scale X A^T within the launch of the product that needs it (warpgroup.cuh), by the clusters that have a tile fewer than others: they
// compute S first, which the others want at the end of their first tile only. So S costs no time of its own where it takes less than a
// tile does.
//
// Who computes S is who starts first, and takes the next window of it when it is done with one: nobody waits for what a block has not
// begun that may never start. A counter for every BAND lines of S says how many of its windows are there.
//
// The sums are those of shrink.cuh, bit for bit. Rows of X and of A come by cp.async, far ahead, into places of a lane's own, so that
// few blocks read as fast as they can: nobody waits for another thread's copies.
#pragma once

#include "hopper.cuh"
#include "placing.cuh"
#include "shrink.cuh"

namespace within {

using namespace hopper;

constexpr int HEIGHT = 64, GROUPS = HEIGHT / 16;
constexpr int WINDOWS = BAND / HEIGHT;  // of a band
constexpr int PACE = 3;                 // the number of the barrier of those that compute S
constexpr int CHUNK = 8 * WARP;         // packs of B that a warp places at a time

// What is counted: clusters that have started, windows that were taken, chunks of B that were taken and that are there, blocks that are
// done; from FIRST_BAND on the windows of each band that are there. All zero before and after a launch.
enum Counter { STARTED, TAKEN, PLACING, PLACED, DONE, FIRST_BAND };

// As the launcher builds it (padding at the end alone). `makers`: clusters that compute S, and place B where it has to be.
struct Work {
    const bf16 *x, *a;
    bf16* s;
    uint32_t* counters;
    shrink::Sizes sizes;
    Placing placing;
    int makers;

    __device__ __forceinline__ uint32_t bands() const { return uint32_t(sizes.total + BAND - 1) / BAND; }
    __device__ __forceinline__ uint32_t windows() const { return bands() * WINDOWS; }
    __device__ __forceinline__ uint32_t chunks() const { return placing.from ? uint32_t((placing.packs() + CHUNK - 1) / CHUNK) : 0; }
};

// Slots of the ring of a warp, each of 32 columns of HEIGHT rows of X and 8 * N of A.
template <int N>
constexpr int SLOTS = N == 2 ? 4 : 3;
template <int N>
constexpr int PIECES = 2 * GROUPS + N;
template <int N>
constexpr int RING = shrink::WARPS * SLOTS<N> * PIECES<N> * WARP * 16;  // bytes
template <int N>
constexpr int BYTES = RING<N> + 4 * shrink::PARTS<GROUPS, N>;

// Who makes S: the warps that sum, and one that takes the windows which they will do.
constexpr int THREADS = BLOCK + WARP;

// The next of what a counter counts, for a whole warp.
__device__ __forceinline__ uint32_t next(uint32_t* counter) {
    uint32_t number = threadIdx.x % WARP == 0 ? counter_next(counter) : 0;
    return __shfl_sync(0xffffffffu, number, 0);
}

// What the warp has written is there for the copy engine of whoever waits for this counter.
__device__ __forceinline__ void there(uint32_t* counter) {
    fence_async_global();
    __syncwarp();
    if (threadIdx.x % WARP == 0) counter_add(counter);
}

// Chunks of B while there are any, each by a whole warp.
__device__ __forceinline__ void place_all(const Work& work) {
    for (uint32_t chunk; (chunk = next(work.counters + PLACING)) < work.chunks();) {
        for (int j = threadIdx.x % WARP; j < CHUNK; j += WARP) {
            int64_t i = int64_t(chunk) * CHUNK + j;
            if (i < work.placing.packs()) work.placing.place(i);
        }
        there(work.counters + PLACED);
    }
}

// The window of the turn, taken by a whole warp: the next that has rows of a segment. Others are zeros, written here.
__device__ __forceinline__ void take(const Work& work, uint32_t* turns, int turn) {
    const shrink::Sizes& z = work.sizes;
    int lane = threadIdx.x % WARP, pitch = z.rows.pitch;
    for (;;) {
        uint32_t number = next(work.counters + TAKEN);
        if (number >= work.windows() || !shrink::window<HEIGHT>(z, int(number)).empty()) {
            if (lane == 0) turns[turn % 3] = number;
            return;
        }
        int first = int(number) * HEIGHT, packs = min(HEIGHT, z.total - first) * pitch / PACK<bf16>;
        uint4* to = reinterpret_cast<uint4*>(work.s + int64_t(first) * pitch);
        for (int i = lane; i < packs; i += WARP) to[i] = make_uint4(0, 0, 0, 0);
        there(work.counters + FIRST_BAND + number / WINDOWS);
    }
}

// Takes windows two turns ahead of those that make them.
__device__ __forceinline__ void take_all(const Work& work, uint32_t* turns) {
    take(work, turns, 0), take(work, turns, 1);
    named_barrier(PACE, THREADS);
    for (int turn = 0; turns[turn % 3] < work.windows(); turn++) {
        take(work, turns, turn + 2);
        named_barrier(PACE, THREADS);
        named_barrier(PACE, THREADS);
    }
}

// Windows of S, of 8 * N ranks at most, while there are any. `turns`: three words of shared memory. Every warp has SLOTS spans of k at
// least, so that what is fetched ahead is of the next window.
template <int N>
__device__ __forceinline__ void make(const Work& work, unsigned char* shared, const uint32_t* turns) {
    const shrink::Sizes& z = work.sizes;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = lane / 4, within = lane % 4 * 8, k = z.k;
    uint4* ring = reinterpret_cast<uint4*>(shared) + warp * SLOTS<N> * PIECES<N> * WARP + lane;
    float* parts = reinterpret_cast<float*>(shared + RING<N>);
    uint32_t windows = work.windows();
    named_barrier(PACE, THREADS);

    // What is fetched next: columns from `ahead` on of the rows of a turn's window.
    int start = warp * shrink::CHUNK, fetching = -1, ahead = k, to = 0;
    bool there = true;
    shrink::Plain<GROUPS, true> x(work.x, {}, k, k, 0);
    const bf16* a = work.a;
    auto fetch = [&]() {
        if (there && ahead >= k) {
            uint32_t number = turns[++fetching % 3];
            there = number < windows;
            if (there) {
                shrink::Window w = shrink::window<HEIGHT>(z, int(number));
                x = shrink::Plain<GROUPS, true>(work.x, w, k, k, 0);
                a = work.a + (int64_t(w.adapter) * z.ranks + rank) * k;
                ahead = start;
            }
        }
        if (there) {
            uint4* slot = ring + to * PIECES<N> * WARP;
            int column = ahead + within;
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) cp_async_16(slot + i * WARP, x.x + (i * x.step + column), x.rest(i, column) > 0);
#pragma unroll
            for (int j = 0; j < N; j++)
                cp_async_16(slot + (2 * GROUPS + j) * WARP, a + (8 * j * k + column), rank + 8 * j < z.ranks && column < k);
            ahead = shrink::next_span(ahead);
        }
        cp_async_commit();
        to = to + 1 == SLOTS<N> ? 0 : to + 1;
    };
    for (int i = 0; i + 1 < SLOTS<N>; i++) fetch();

    int at = 0;
    for (int turn = 0; turns[turn % 3] < windows; turn++) {
        uint32_t number = turns[turn % 3];
        float sum[GROUPS][N][4] = {};
        for (int column = start; column < k; column = shrink::next_span(column)) {
            cp_async_wait<SLOTS<N> - 2>();
            // Into the slot that was read last.
            fetch();
            const uint4* slot = ring + at * PIECES<N> * WARP;
            at = at + 1 == SLOTS<N> ? 0 : at + 1;
            uint4 b[N];
#pragma unroll
            for (int j = 0; j < N; j++) b[j] = slot[(2 * GROUPS + j) * WARP];
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                uint4 upper = slot[2 * i * WARP], lower = slot[(2 * i + 1) * WARP];
#pragma unroll
                for (int j = 0; j < N; j++) shrink::multiply(sum[i][j], upper, lower, b[j]);
            }
        }
        shrink::put_sums(sum, parts, 0);
        named_barrier(PACE, THREADS);
        shrink::add_sums<GROUPS, N>(parts, work.s, shrink::window<HEIGHT>(z, int(number)), z, 0, 0, z.rows.pitch);
        // The copy engine reads what was written.
        fence_async_global();
        named_barrier(PACE, THREADS);
        if (threadIdx.x == 0) counter_add(work.counters + FIRST_BAND + number / WINDOWS);
    }
    // So will it write where the ring was.
    fence_async();
}

// Until the `lines` <= BAND lines of S from `line` on are there, and B.
__device__ __forceinline__ void wait(const Work& work, int line, int lines) {
    uint32_t* bands = work.counters + FIRST_BAND;
    int first = line / BAND, last = (line + lines - 1) / BAND;
    if (work.placing.from) counter_wait(work.counters + PLACED, work.chunks());
    counter_wait(bands + first, WINDOWS);
    if (last != first) counter_wait(bands + last, WINDOWS);
}

// This block counts no more; the last one leaves the counters as they were.
__device__ __forceinline__ void pass(const Work& work) {
    if (counter_pass(work.counters + DONE) + 1 < gridDim.x) return;
    for (uint32_t i = 0; i < FIRST_BAND + work.bands(); i++) work.counters[i] = 0;
}

} // namespace within
