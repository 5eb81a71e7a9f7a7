// What one host thread needs to run blocks; between scheduler.cpp and launches.cpp.
#pragma once

#include "hopper.h"
#include "scheduler.h"

#include <cstdint>

namespace emu {
/// From where dynamic shared memory starts at most: a device promises no more than a multiple of this.
constexpr unsigned SHARED_ALIGN = 16;
/// What one block's takes, up to where another's may start.
constexpr size_t SHARED_SLOT = (MAX_DYNAMIC + SHARED_ALIGN + 1023) / 1024 * 1024;
} // namespace emu

extern thread_local unsigned char dynamic_shared[emu::SHARED_SLOT] __attribute__((visibility("hidden")));

namespace emu {

struct Warp {
    Thread* threads;
    unsigned alive, waiting;
    unsigned mask[WARP];
    void* operand[WARP];
    Collective run[WARP];
    const char* name[WARP];
};

/// A block with its barriers.
struct Running : Block {
    unsigned rank;
    /// A multiple of 1024, at or just before `dynamic`.
    unsigned char* origin;
    Thread* thread;
    unsigned live, arrived;
    Barrier kind;
    int any, all, count;
    std::deque<Mbarrier> mbarriers;
    NamedBarrier named[16];
    Warpgroup warpgroups[MAX_THREADS / WARPGROUP];
};

/// All that one host thread needs to run blocks, a cluster at a time.
struct Worker {
    const Launch* launch;
    Running block[MAX_CLUSTER];
    /// Dynamic shared memory of clusters of several blocks.
    unsigned char* cluster_memory = nullptr;
    void* sp;
    /// In the cluster, in a block, in the cluster that have not exited, and at the cluster's barrier.
    unsigned blocks, threads, block_threads, live, arrived;
    bool trapped;
    /// Set when a thread was woken or a copy was done.
    bool woken;
    /// Whether what follows is in use.
    bool asynchronous = false;
    std::vector<Load> loads;
    std::vector<Store> stores;
    std::vector<Pending> pending;
    unsigned idle = 0;
    uint64_t random;
    unsigned cursor, end;
    Fiber* free = nullptr;
    std::vector<unsigned> order;
    std::vector<Thread> thread;
    std::vector<Warp> warp;
    // Where the host's stack is, for the sanitizer.
    const void* host_bottom;
    size_t host_size;
    void* host_fake_stack;
};

/// Where the library's thread-local variables lie.
struct Segment {
    /// From `dynamic_shared` to the library's first thread-local byte.
    ptrdiff_t start;
    size_t bytes;
};

const Segment& segment();
/// Runs the cluster of this number in the grid: a block, for most kernels.
void run_cluster(Worker& w, uint64_t number);
void wake(Thread& t);
void yield(Thread& t);
/// Lets others go first, by chance.
void maybe_yield();
/// Drawn with the seed; false without one.
bool chance(Worker& w, unsigned one_in);
inline Running& running(const Thread& t) { return *static_cast<Running*>(t.block); }
/// 0: threads run in the order of their index.
uint64_t seed();

} // namespace emu
