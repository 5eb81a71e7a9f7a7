// Kernels for the test of the emulator with Hopper's instructions; plain CUDA, so that nvcc takes them too.

#include "hopper.cuh"

#include <cuda_bf16.h>
#include <stdint.h>

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name)                                                                        \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];                                       \
    type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

using namespace hopper;

typedef __nv_bfloat16 bf16;
#define MAP const __grid_constant__ CUtensorMap

/// From where dynamic shared memory has the alignment that swizzled boxes take.
static __device__ unsigned char* shared_memory() {
    DYNAMIC_SHARED(unsigned char, raw);
    return raw + (-shared_address(raw) & 1023);
}

// A box as it lies in shared memory; without a wait what is read is not there yet.
extern "C" __global__ void test_load(MAP map, unsigned char* out, int bytes, int x, int y, int z, int wait) {
    unsigned char* box = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(box + bytes);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        prefetch(&map);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_expect(full, bytes);
        load_box(box, &map, full, x, y, z);
    }
    if (wait) barrier_wait(full, 0);
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = box[i];
    if (!wait) {
        while (!barrier_passed(full, 0)) {}
    }
}

// A box of five dimensions, by a tensor's coordinates, to another tensor at the same place.
extern "C" __global__ void test_five(MAP from, MAP to, int bytes, int x, int y, int z, int u, int v) {
    unsigned char* box = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(box + bytes);
    if (threadIdx.x != 0) return;
    barrier_init(full, 1);
    barrier_init_fence();
    barrier_expect(full, bytes);
    load_box(box, &from, full, x, y, z, u, v);
    barrier_wait(full, 0);
    store_box(&to, box, x, y, z, u, v);
    store_commit();
    store_wait<0>();
}

// A box of 64 x 8, with the numbers 0, 1 ...; without a wait the box is overwritten too early.
extern "C" __global__ void test_store(MAP map, int x, int y, int wait) {
    bf16* box = reinterpret_cast<bf16*>(shared_memory());
    for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) box[i] = __float2bfloat16(float(i));
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_box(&map, box, x, y);
        store_commit();
        if (wait) store_wait_read<0>();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) box[i] = __float2bfloat16(-1.0f);
    if (threadIdx.x == 0) store_wait<0>();
}

// Every block adds values[number] to 1024 floats, in the order in which they have started; the first stores them. Without a wait what is
// added is overwritten too early.
extern "C" __global__ void test_turns_of_blocks(const float* values, float* out, uint32_t* counters, int wait) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    uint32_t* drawn = reinterpret_cast<uint32_t*>(shared + 1024);
    if (threadIdx.x == 0) *drawn = counter_next(counters);
    __syncthreads();
    uint32_t number = *drawn;
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) shared[i] = values[number] + float(i);
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        counter_wait(counters + 1, number);
        if (number == 0) store_linear(out, shared, 4096);
        else add_linear(out, shared, 4096);
        store_commit();
        if (wait) store_wait_read<0>();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) shared[i] = -1.0f;
    if (threadIdx.x == 0) {
        store_wait<0>();
        counter_add(counters + 1);
    }
}

// out (64 x N) = a b by a warpgroup, over 128 of k in two steps. Sides along k have lines of 64 k, others of 64 rows.
// `mistake` 1: no wait.
template <int N, bool A_ALONG_K, bool B_ALONG_K>
static __device__ void products(const CUtensorMap& a, const CUtensorMap& b, float* out, int mistake) {
    unsigned char *left = shared_memory(), *right = left + 2 * 64 * 128;
    uint64_t* full = reinterpret_cast<uint64_t*>(right + 2 * N * 128);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_expect(full, 2 * (64 + N) * 128);
        for (int step = 0; step < 2; step++) {
            int k = step * 64;
            if (A_ALONG_K) load_box(left + step * 64 * 128, &a, full, k, 0, 0);
            else load_box(left + step * 64 * 128, &a, full, 0, k, 0);
            unsigned char* to = right + step * N * 128;
            if (B_ALONG_K) load_box(to, &b, full, k, 0, 0);
            else
                for (int n = 0; n < N; n += 64) load_box(to + n * 128, &b, full, n, k, 0);
        }
    }
    barrier_wait(full, 0);
    float d[N / 2];
    wgmma_fence();
    for (int step = 0; step < 2; step++) {
        for (int k = 0; k < 64; k += 16) {
            uint64_t da = A_ALONG_K ? descriptor(left + step * 64 * 128 + k * 2, 0, 1024)
                                    : descriptor(left + step * 64 * 128 + k * 128, 64 * 128, 1024);
            uint64_t db = B_ALONG_K ? descriptor(right + step * N * 128 + k * 2, 0, 1024)
                                    : descriptor(right + step * N * 128 + k * 128, 64 * 128, 1024);
            wgmma<N, A_ALONG_K, B_ALONG_K>(d, da, db, step + k > 0);
        }
    }
    wgmma_commit();
    if (mistake != 1) wgmma_wait<0>();
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    for (int i = 0; i < N / 2; i++) {
        out[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
    }
    wgmma_wait<0>();
}
#define PRODUCTS(name, ...)                                                                              \
    extern "C" __global__ void __launch_bounds__(128) name(MAP a, MAP b, float* out, int mistake) {       \
        products<__VA_ARGS__>(a, b, out, mistake);                                                        \
    }
PRODUCTS(test_products_64, 64, true, true)
PRODUCTS(test_products_128, 128, true, false)
PRODUCTS(test_products_256, 256, false, true)
PRODUCTS(test_products_across, 256, false, false)
PRODUCTS(test_products_176, 176, true, true)

// The same with a (64 x 64 in memory) from registers, b in a step of 64 of k. `mistake` 2: registers of a are written too early.
template <int N, bool B_ALONG_K>
static __device__ void products_of_registers(const bf16* a, const CUtensorMap& b, float* out, int mistake) {
    unsigned char* right = shared_memory();
    uint64_t* full = reinterpret_cast<uint64_t*>(right + N * 128);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init_fence();
        barrier_expect(full, N * 128);
        if (B_ALONG_K) load_box(right, &b, full, 0, 0, 0);
        else
            for (int n = 0; n < N; n += 64) load_box(right + n * 128, &b, full, n, 0, 0);
    }
    __syncthreads();
    barrier_wait(full, 0);
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    uint32_t words[4][4];
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++)
            words[k][i] = *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * 64 + k * 16 + column + i / 2 * 8);
    float d[N / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
        uint64_t db = B_ALONG_K ? descriptor(right + k * 32, 0, 1024) : descriptor(right + k * 2048, 64 * 128, 1024);
        wgmma<N, B_ALONG_K>(d, words[k], db, k > 0);
    }
    wgmma_commit();
    if (mistake == 2) words[3][3] = 0;
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) out[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}
#define REGISTERS(name, ...)                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) name(const bf16* a, MAP b, float* out, int mistake) {    \
        products_of_registers<__VA_ARGS__>(a, b, out, mistake);                                                \
    }
REGISTERS(test_registers_64, 64, true)
REGISTERS(test_registers_128, 128, false)

// Two warpgroups take turns, `rounds` each: out[i] says whose the i-th turn was.
extern "C" __global__ void __launch_bounds__(256) test_turns(int* out, int rounds) {
    int* count = reinterpret_cast<int*>(shared_memory());
    int group = threadIdx.x / 128;
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    if (group == 1) named_barrier_arrive(1, 256);
    for (int i = 0; i < rounds; i++) {
        named_barrier(1 + group, 256);
        if (threadIdx.x % 128 == 0) out[(*count)++] = group;
        named_barrier_arrive(2 - group, 256);
    }
    if (group == 0) named_barrier(1, 256);
}

// c (rows x columns) = a b': a warpgroup copies, two multiply; persistent, with a ring of stages. Of a PAIR of blocks,
// one above the other, each loads a half of b's tile for both. Grid: any number of (pairs of) blocks.
enum Mistake { NONE, NO_FULL_WAIT, NO_EMPTY_WAIT, NO_PRODUCT_WAIT, BYTES_MISSING, TOO_MANY_ARRIVALS, NO_STORE_WAIT, EXIT_EARLY };

template <bool PAIR>
static __device__ void pipeline(const CUtensorMap& a, const CUtensorMap& b, const CUtensorMap& c, int row_tiles,
                                int column_tiles, int steps, int mistake) {
    constexpr int STAGES = 3, TILE = 128, SIDE = TILE * 128, BLOCKS = PAIR ? 2 : 1;
    unsigned char *stages = shared_memory(), *staging = stages + STAGES * 2 * SIDE;
    uint64_t *full = reinterpret_cast<uint64_t*>(staging + TILE * TILE * 2), *empty = full + STAGES;
    int group = threadIdx.x / 128, rank = PAIR ? cluster_rank() : 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 2 * BLOCKS);
        }
        barrier_init_fence();
    }
    if (PAIR) cluster_sync();
    else __syncthreads();
    int tiles = row_tiles / BLOCKS * column_tiles, first = blockIdx.x / BLOCKS, stride = gridDim.x / BLOCKS;
    int stage = 0, parity = 0;
    if (group == 0) {
        fewer_registers<40>();
        for (int tile = first; threadIdx.x == 0 && tile < tiles; tile += stride) {
            int row = (tile / column_tiles * BLOCKS + rank) * TILE, column = tile % column_tiles * TILE;
            for (int k = 0; k < steps; k++) {
                if (mistake != NO_EMPTY_WAIT) barrier_wait(empty + stage, parity ^ 1);
                unsigned char *left = stages + stage * 2 * SIDE, *right = left + SIDE;
                barrier_expect(full + stage, 2 * SIDE + (mistake == BYTES_MISSING ? 16 : 0));
                load_box(left, &a, full + stage, k * 64, row, 0);
                if (PAIR) {
                    load_box_multicast(right + rank * SIDE / 2, &b, full + stage, k * 64, column + rank * TILE / 2, 0, 3);
                } else {
                    load_box(right, &b, full + stage, k * 64, column, 0);
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
    } else {
        more_registers<232>();
        int consumer = group - 1, thread = threadIdx.x % 128;
        float d[TILE / 2];
        unsigned char* mine = staging + consumer * TILE * TILE;
        for (int tile = first; tile < tiles; tile += stride) {
            int row = (tile / column_tiles * BLOCKS + rank) * TILE + consumer * 64, column = tile % column_tiles * TILE;
            for (int k = 0; k < steps; k++) {
                if (mistake != NO_FULL_WAIT) barrier_wait(full + stage, parity);
                unsigned char *left = stages + stage * 2 * SIDE + consumer * SIDE / 2, *right = stages + (stage * 2 + 1) * SIDE;
                wgmma_fence();
                for (int i = 0; i < 64; i += 16) {
                    wgmma<TILE, true, true>(d, descriptor(left + i * 2, 0, 1024), descriptor(right + i * 2, 0, 1024), k + i > 0);
                }
                wgmma_commit();
                // The products of the step before are done: its stage is free. Or the right one after the last step.
                int done = stage == 0 ? STAGES - 1 : stage - 1;
                if (mistake == NO_PRODUCT_WAIT) {
                    done = stage;
                } else {
                    wgmma_wait<1>();
                }
                if (thread == 0 && (k > 0 || mistake == NO_PRODUCT_WAIT)) {
                    for (int i = 0; i < BLOCKS; i++) barrier_arrive_in(empty + done, i);
                    if (mistake == TOO_MANY_ARRIVALS) barrier_arrive(empty + done), barrier_arrive(empty + done);
                }
                if (k == steps - 1) {
                    wgmma_wait<0>();
                    if (thread == 0 && mistake != NO_PRODUCT_WAIT) {
                        for (int i = 0; i < BLOCKS; i++) barrier_arrive_in(empty + stage, i);
                    }
                }
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
            if (thread == 0 && mistake != NO_STORE_WAIT) store_wait_read<0>();
            named_barrier(1 + consumer, 128);
            for (int i = 0; i < TILE / 2; i++) {
                int y = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, x = i / 4 * 8 + thread % 4 * 2 + i % 2;
                reinterpret_cast<bf16*>(mine)[x / 64 * 64 * 64 + y * 64 + x % 64] = __float2bfloat16(d[i]);
            }
            fence_async();
            named_barrier(1 + consumer, 128);
            if (thread == 0) {
                store_box(&c, mine, column, row);
                store_box(&c, mine + 64 * 128, column + 64, row);
                store_commit();
            }
        }
        if (thread == 0) store_wait<0>();
    }
    if (PAIR && mistake != EXIT_EARLY) cluster_sync();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    test_pipeline(MAP a, MAP b, MAP c, int row_tiles, int column_tiles, int steps, int mistake) {
    pipeline<false>(a, b, c, row_tiles, column_tiles, steps, mistake);
}
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    test_pair(MAP a, MAP b, MAP c, int row_tiles, int column_tiles, int steps, int mistake) {
    pipeline<true>(a, b, c, row_tiles, column_tiles, steps, mistake);
}

// Threads wait for what nobody does.
extern "C" __global__ void test_no_arrival(int what) {
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
    if (what != 2 && threadIdx.x == 0) barrier_init(barrier, 1);
    __syncthreads();
    if (what == 3 && threadIdx.x == 0) barrier_init(barrier, 1);
    if (what == 4) barrier[0] = 0;
    if (what == 1) {
        named_barrier(2 + threadIdx.x / 32, 64);
    } else if (what == 5) {
        while (!barrier_passed(barrier, 0)) {}
    } else {
        barrier_wait(barrier, 0);
    }
}
