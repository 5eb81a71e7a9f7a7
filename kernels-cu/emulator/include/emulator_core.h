// What kernels and the scheduler share: the running thread, barriers, warp collectives, the registry.
#pragma once

#include "emulator_types.h"

#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

namespace emu {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_DYNAMIC = 227 << 10;
constexpr unsigned FREE_DYNAMIC = 48 << 10;
/// Blocks of a cluster.
constexpr unsigned MAX_CLUSTER = 8;

struct Fiber;
struct Warp;
struct Worker;

/// A block as kernels see it.
struct Block {
    uint3 index;
    dim3 size, grid;
    unsigned char* dynamic;
};

/// What a thread does; those between Ready and Done say what it waits for.
enum class State : unsigned char { Fresh, Ready, Barrier, Collective, Mbarrier, Named, Cluster, Products, Counter, Done };

/// A cp.async that has not happened yet.
struct Copy {
    void* to;
    const void* from;
    bool valid;
    unsigned group;
};

struct Thread {
    uint3 index;
    unsigned number;
    Block* block;
    Worker* worker;
    Warp* warp;
    Fiber* fiber;
    State state;
    bool yielded;
    /// What the barrier that was passed last returns.
    int result;
    /// The open cp.async group; groups before it are committed.
    unsigned group;
    std::vector<Copy> copies;
};

/// Runs once for the whole warp when its last lane arrives: `operands` has null for lanes that take no part.
using Collective = void (*)(void* const operands[WARP]);

enum class Barrier : unsigned char { Plain, Or, And, Count };

int barrier(Barrier kind, int predicate);
/// Waits for all lanes of `mask` that have not exited.
void collective(unsigned mask, void* operand, Collective run, const char* name);
/// Lanes of the running thread's warp that have not exited.
unsigned alive();
bool is_shared(const void* address);
/// Ends the launch with CUDA_ERROR_LAUNCH_FAILED.
[[noreturn]] void trap();
/// Ends the process; the message names the kernel, the block and the thread.
[[noreturn]] void fail(const char* what);

struct Kernel {
    const char* unit;
    const char* name;
    void (*invoke)(void** parameters);
    const unsigned* sizes;
    unsigned parameters;
    unsigned max_threads;
    /// Whether its file has `__shared__` variables other than the dynamic one.
    bool has_static_shared;
    /// Whether it has any, named by `__shared__` (rather than DYNAMIC_SHARED).
    bool has_named_shared;
    /// Its `__cluster_dims__`, or 1, 1, 1.
    dim3 cluster;
    unsigned max_dynamic = FREE_DYNAMIC;
};

void add_kernel(const Kernel& kernel);

template <auto F>
struct Invoker;

template <class... A, void (*F)(A...)>
struct Invoker<F> {
    static constexpr unsigned count = sizeof...(A);
    // The last one keeps the array from being empty.
    static constexpr unsigned sizes[count + 1] = {unsigned(sizeof(A))..., 0};
    template <std::size_t... I>
    static void unpack([[maybe_unused]] void** parameters, std::index_sequence<I...>) {
        F(*static_cast<std::remove_reference_t<A>*>(parameters[I])...);
    }
    static void invoke(void** parameters) { unpack(parameters, std::index_sequence_for<A...>()); }
};

/// `max_threads`: the first argument of `__launch_bounds__`.
constexpr unsigned bounds(unsigned max_threads = MAX_THREADS, unsigned = 0, unsigned = 0) {
    return max_threads;
}

template <auto F>
void add(const char* unit, const char* name, unsigned max_threads, dim3 cluster, bool has_static_shared,
         bool has_named_shared) {
    using I = Invoker<F>;
    add_kernel({unit, name, I::invoke, I::sizes, I::count, max_threads, has_static_shared, has_named_shared, cluster});
}

} // namespace emu

// The running thread. A register, since thread-local variables of a loaded library cost a call each.
register emu::Thread* hywu_thread asm("r15");

namespace emu {
inline Thread& self() { return *hywu_thread; }
inline unsigned lane() { return self().number % WARP; }
} // namespace emu
