// What one host thread needs to run blocks; between scheduler.cpp and launches.cpp.
#pragma once

#include "scheduler.h"

#include <cstdint>

extern thread_local unsigned char dynamic_shared[emu::MAX_DYNAMIC] __attribute__((visibility("hidden")));

namespace emu {

struct Warp {
    unsigned alive, waiting;
    unsigned mask[WARP];
    void* operand[WARP];
    Collective run[WARP];
    const char* name[WARP];
};

/// All that one host thread needs to run blocks.
struct Worker {
    const Launch* launch;
    Block block;
    void* sp;
    unsigned threads, live, arrived;
    Barrier kind;
    int any, all, count;
    bool trapped;
    uint64_t random;
    unsigned cursor, end;
    Fiber* free = nullptr;
    unsigned order[MAX_THREADS];
    Thread thread[MAX_THREADS];
    Warp warp[MAX_THREADS / WARP];
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
/// Runs the block of this number in the grid.
void run_block(Worker& w, uint64_t number);
/// 0: threads run in the order of their index.
uint64_t seed();

} // namespace emu
