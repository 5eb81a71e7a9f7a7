// CUDA C++ for g++: what a kernel's source needs of the language and of the device functions.
#pragma once

#define HYWU_EMULATOR 1
#define __CUDA_ARCH__ 900

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <math.h>
#include <stdint.h>

#include "include/emulator_core.h"

// build.sh looks for kernels in what the preprocessor gives with HYWU_SCAN.
#ifdef HYWU_SCAN
#define __global__ __hywu_kernel__
#define __shared__ __hywu_shared__
#define __launch_bounds__(...) __hywu_bounds__(__VA_ARGS__)
#define __cluster_dims__(...) __hywu_cluster__(__VA_ARGS__)
#define __grid_constant__ __hywu_constant__
#else
#define __grid_constant__
#define __global__
// Within a function this is static too; after `extern` it declares the dynamic array of the scheduler.
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#endif
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::emu::self().block->dynamic)

#define threadIdx (::emu::self().index)
#define blockIdx (::emu::self().block->index)
#define blockDim (::emu::self().block->size)
#define gridDim (::emu::self().block->grid)
constexpr int warpSize = 32;

// Barriers

static inline void __syncthreads() { emu::barrier(emu::Barrier::Plain, 0); }
static inline int __syncthreads_or(int p) { return emu::barrier(emu::Barrier::Or, p); }
static inline int __syncthreads_and(int p) { return emu::barrier(emu::Barrier::And, p); }
static inline int __syncthreads_count(int p) { return emu::barrier(emu::Barrier::Count, p); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __nanosleep(unsigned) {}
[[noreturn]] static inline void __trap() { emu::trap(); }

// Warps

namespace emu {

template <class T>
struct Shuffle {
    T value, result;
    unsigned source;
    static void run(void* const operands[WARP]) {
        for (unsigned i = 0; i < WARP; i++) {
            auto* mine = static_cast<Shuffle*>(operands[i]);
            if (!mine) continue;
            auto* from = static_cast<const Shuffle*>(operands[mine->source]);
            // What a lane without a value gives is undefined: NaN where T has one.
            if (from) mine->result = from->value;
            else memset(static_cast<void*>(&mine->result), 0xff, sizeof(T));
        }
    }
};

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* name) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles take 4 or 8 bytes");
    Shuffle<T> s{value, value, source % WARP};
    collective(mask, &s, Shuffle<T>::run, name);
    return s.result;
}

struct Vote {
    unsigned predicate, ballot, lanes;
    static void run(void* const operands[WARP]) {
        unsigned ballot = 0, lanes = 0;
        for (unsigned i = 0; i < WARP; i++) {
            auto* v = static_cast<const Vote*>(operands[i]);
            if (!v) continue;
            lanes |= 1u << i;
            ballot |= v->predicate << i;
        }
        for (unsigned i = 0; i < WARP; i++) {
            if (auto* v = static_cast<Vote*>(operands[i])) *v = {v->predicate, ballot, lanes};
        }
    }
};

inline Vote vote(unsigned mask, int predicate, const char* name) {
    Vote v{predicate != 0, 0, 0};
    collective(mask, &v, Vote::run, name);
    return v;
}

template <class T, T (*F)(T, T)>
struct Reduce {
    T value;
    static void run(void* const operands[WARP]) {
        Reduce* first = nullptr;
        T sum{};
        for (unsigned i = 0; i < WARP; i++) {
            auto* r = static_cast<Reduce*>(operands[i]);
            if (!r) continue;
            sum = first ? F(sum, r->value) : r->value;
            first = r;
        }
        for (unsigned i = 0; i < WARP; i++) {
            if (auto* r = static_cast<Reduce*>(operands[i])) r->value = sum;
        }
    }
};

inline void no_work(void* const*) {}

} // namespace emu

constexpr unsigned HYWU_FULL_WARP = 0xffffffffu;

static inline void __syncwarp(unsigned mask = HYWU_FULL_WARP) {
    emu::collective(mask, nullptr, emu::no_work, "__syncwarp");
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned lane = emu::lane(), w = width;
    return emu::shuffle(mask, value, (lane & ~(w - 1)) | (source & (w - 1)), "__shfl_sync");
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emu::lane(), w = width;
    return emu::shuffle(mask, value, (lane & (w - 1)) < delta ? lane : lane - delta, "__shfl_up_sync");
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = emu::lane(), w = width;
    return emu::shuffle(mask, value, (lane & (w - 1)) + delta >= w ? lane : lane + delta, "__shfl_down_sync");
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
    unsigned lane = emu::lane(), w = width, source = lane ^ unsigned(flip);
    return emu::shuffle(mask, value, source > (lane | (w - 1)) ? lane : source, "__shfl_xor_sync");
}
static inline unsigned __ballot_sync(unsigned mask, int p) {
    return emu::vote(mask, p, "__ballot_sync").ballot;
}
static inline int __any_sync(unsigned mask, int p) { return emu::vote(mask, p, "__any_sync").ballot != 0; }
static inline int __all_sync(unsigned mask, int p) {
    emu::Vote v = emu::vote(mask, p, "__all_sync");
    return v.ballot == v.lanes;
}
static inline unsigned __activemask() { return emu::alive(); }

#define HYWU_REDUCE(NAME, T, EXPRESSION)                                                                  \
    static inline T hywu_##NAME(T a, T b) { return EXPRESSION; }                                          \
    static inline T __##NAME##_sync(unsigned mask, T value) {                                             \
        emu::Reduce<T, hywu_##NAME> r{value};                                                             \
        emu::collective(mask, &r, emu::Reduce<T, hywu_##NAME>::run, "__" #NAME "_sync");                  \
        return r.value;                                                                                   \
    }
HYWU_REDUCE(reduce_add, unsigned, a + b)
HYWU_REDUCE(reduce_add, int, int(unsigned(a) + unsigned(b)))
HYWU_REDUCE(reduce_min, unsigned, a < b ? a : b)
HYWU_REDUCE(reduce_min, int, a < b ? a : b)
HYWU_REDUCE(reduce_max, unsigned, a > b ? a : b)
HYWU_REDUCE(reduce_max, int, a > b ? a : b)
HYWU_REDUCE(reduce_and, unsigned, a & b)
HYWU_REDUCE(reduce_or, unsigned, a | b)
HYWU_REDUCE(reduce_xor, unsigned, a ^ b)
#undef HYWU_REDUCE

#include "include/emulator_math.h"
