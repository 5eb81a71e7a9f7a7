// Hopper's own instructions, which on the device come from common/hopper.cuh: what they mean stands there.
#pragma once

#include "cuda.h"
#include "emulator_core.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>

#define HOPPER 1

namespace emu {

// Memory barriers
void barrier_init(uint64_t* barrier, uint32_t arrivals);
/// Arrives once and announces `bytes`, in the block of this rank of the cluster.
void barrier_arrive(uint64_t* barrier, uint32_t bytes, uint32_t rank);
/// Until the phase of this parity is over; false if the wait was given up before (only where `once`).
bool barrier_wait(uint64_t* barrier, uint32_t parity, bool once);

// Other barriers
void named_barrier(uint32_t number, uint32_t threads);
void named_barrier_arrive(uint32_t number, uint32_t threads);
uint32_t cluster_rank();
void cluster_sync();
uint32_t word_in(const uint32_t* word, uint32_t rank);

// Copies; `at`: coordinates from the innermost on, `blocks`: a bit for every rank of the cluster
void prefetch(const CUtensorMap* map);
void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, std::initializer_list<int> at, uint32_t blocks);
void store_box(const CUtensorMap* map, const void* from, std::initializer_list<int> at);
void store_linear(void* to, const void* from, uint32_t bytes, bool adds);
void store_commit();
/// Until at most `left` groups of this thread's stores still read, or are not `done`.
void store_wait(unsigned left, bool done);

// Counters in global memory
uint32_t counter_next(uint32_t* counter);
void counter_wait(uint32_t* counter, uint32_t value);

// Products
uint32_t shared_address(const void* p);
void multiply(float* d, unsigned columns, bool a_along_k, bool b_along_k, uint64_t a, uint64_t b, bool add);
/// With A from the threads' registers.
void multiply(float* d, unsigned columns, bool b_along_k, const uint32_t* a, uint64_t b, bool add);
void multiply_commit();
void multiply_wait(unsigned left);

} // namespace emu

namespace hopper {

using emu::barrier_init, emu::cluster_rank, emu::counter_next, emu::counter_wait, emu::cluster_sync, emu::named_barrier, emu::named_barrier_arrive, emu::prefetch, emu::word_in,
    emu::shared_address, emu::store_commit;

// Barriers

static inline void barrier_init_fence() {}
static inline void barrier_arrive(uint64_t* barrier) { emu::barrier_arrive(barrier, 0, cluster_rank()); }
static inline void barrier_arrive_in(uint64_t* barrier, uint32_t block) { emu::barrier_arrive(barrier, 0, block); }
static inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    emu::barrier_arrive(barrier, bytes, cluster_rank());
}
static inline bool barrier_passed(uint64_t* barrier, uint32_t parity) { return emu::barrier_wait(barrier, parity, true); }
static inline void barrier_wait(uint64_t* barrier, uint32_t parity) { emu::barrier_wait(barrier, parity, false); }

// Copies

static inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    emu::load_box(to, map, barrier, {x, y, z}, 1u << cluster_rank());
}
static inline void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, int u, int v) {
    emu::load_box(to, map, barrier, {x, y, z, u, v}, 1u << cluster_rank());
}
static inline void load_box_multicast(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z,
                                      uint16_t blocks) {
    emu::load_box(to, map, barrier, {x, y, z}, blocks);
}
static inline void store_box(const CUtensorMap* map, const void* from, int x, int y) { emu::store_box(map, from, {x, y}); }
static inline void store_box(const CUtensorMap* map, const void* from, int x, int y, int z, int u, int v) {
    emu::store_box(map, from, {x, y, z, u, v});
}
static inline void store_linear(void* to, const void* from, uint32_t bytes) { emu::store_linear(to, from, bytes, false); }
static inline void add_linear(float* to, const void* from, uint32_t bytes) { emu::store_linear(to, from, bytes, true); }
template <int N>
inline void store_wait_read() {
    emu::store_wait(N, false);
}
template <int N>
inline void store_wait() {
    emu::store_wait(N, true);
}
static inline void fence_async() {}
static inline void fence_async_global() {}
static inline uint32_t counter_pass(uint32_t* counter) { return emu::counter_next(counter); }
static inline void counter_add(uint32_t* counter) { emu::counter_next(counter); }

// Products

static inline uint64_t descriptor(const void* start, uint32_t leading, uint32_t stride) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62;
    return SWIZZLE_128 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 | shared_address(start) >> 4;
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() { emu::multiply_commit(); }
template <int N>
inline void wgmma_wait() {
    emu::multiply_wait(N);
}
template <int N, bool A_ALONG_K, bool B_ALONG_K>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    emu::multiply(d, N, A_ALONG_K, B_ALONG_K, a, b, add);
}
template <int N, bool B_ALONG_K>
inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    emu::multiply(d, N, B_ALONG_K, a, b, add);
}
template <int N>
inline void wgmma_hold(float (&)[N]) {}
static inline float exp2_approximate(float x) { return exp2f(x); }

template <int N>
inline void fewer_registers() {}
template <int N>
inline void more_registers() {}

} // namespace hopper
