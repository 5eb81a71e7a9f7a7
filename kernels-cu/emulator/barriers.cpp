// Barriers in shared memory that count arrivals and bytes, named barriers and those of clusters.

#include "worker.h"

#include <algorithm>
#include <cstring>

namespace emu {

/// Upper half of what a barrier's 8 bytes hold; the lower one is its number.
constexpr uint64_t MARK = 0x4d426172ull << 32;
constexpr unsigned MOST = (1u << 20) - 1;

Pending& pending() {
    Thread& t = self();
    Worker& w = *t.worker;
    if (!w.asynchronous) {
        w.asynchronous = true;
        w.pending.assign(w.threads, {});
    }
    return w.pending[size_t(&t - w.thread.data())];
}

bool is_shared(const void* address, size_t bytes) {
    const Running& block = running(self());
    const auto* from = static_cast<const unsigned char*>(address);
    const unsigned char* end = block.dynamic + self().worker->launch->dynamic;
    return from >= block.dynamic && from <= end && bytes <= size_t(end - from);
}

Running& peer(uint32_t rank, const char* what) {
    Worker& w = *self().worker;
    if (rank >= w.blocks) fail(what);
    return w.block[rank];
}

unsigned char* in_block(const Running& block, const void* address) {
    const Running& mine = running(self());
    if (&mine == &block) return static_cast<unsigned char*>(const_cast<void*>(address));
    if (!is_shared(address, 1)) fail("an address in another block of the cluster is outside shared memory");
    return block.origin + (static_cast<const unsigned char*>(address) - mine.origin);
}

uint32_t word_in(const uint32_t* word, uint32_t rank) {
    const Running& block = peer(rank, "a word of a block that the cluster does not have");
    if (!block.live) fail("a word of a block that has exited");
    if (reinterpret_cast<uintptr_t>(word) % 4) fail("a word in shared memory is not aligned to 4 bytes");
    uint32_t value;
    memcpy(&value, in_block(block, word), 4);
    return value;
}

// In shared memory

static Mbarrier* look_up(Running& block, const uint64_t* address) {
    uint64_t word;
    memcpy(&word, address, 8);
    uint64_t number = word ^ MARK;
    if (number >= block.mbarriers.size()) return nullptr;
    Mbarrier& barrier = block.mbarriers[number];
    return barrier.address == address ? &barrier : nullptr;
}

Mbarrier& find_barrier(Running& block, uint64_t* address) {
    if (reinterpret_cast<uintptr_t>(address) % 8) fail("a barrier is not aligned to 8 bytes");
    if (!is_shared(address)) fail("a barrier is outside shared memory");
    Mbarrier* barrier = look_up(block, reinterpret_cast<uint64_t*>(in_block(block, address)));
    if (!barrier) fail("a barrier was not initialised, or was written over");
    return *barrier;
}

void barrier_init(uint64_t* address, uint32_t arrivals) {
    Running& block = running(self());
    pending();
    if (reinterpret_cast<uintptr_t>(address) % 8) fail("a barrier is not aligned to 8 bytes");
    if (!is_shared(address)) fail("a barrier is outside shared memory");
    if (arrivals < 1 || arrivals > MOST) fail("a barrier of no arrivals, or of too many");
    if (look_up(block, address)) fail("a barrier is initialised a second time");
    uint64_t word = MARK | block.mbarriers.size();
    memcpy(address, &word, 8);
    block.mbarriers.push_back({address, arrivals, arrivals, 0, 0, {}});
}

/// Ends the phase if nothing is missing.
static void settle(Mbarrier& b) {
    if (b.pending) return;
    if (b.bytes < 0) fail("more bytes came to a barrier than were announced");
    if (b.bytes) return;
    b.phase++;
    b.pending = b.expected;
    for (Thread* t : b.waiting) wake(*t);
    b.waiting.clear();
}

void complete_bytes(Mbarrier& b, size_t bytes) {
    b.bytes -= int64_t(bytes);
    if (b.bytes < -int64_t(MOST)) fail("too many bytes came to a barrier that did not announce them");
    settle(b);
}

void barrier_arrive(uint64_t* address, uint32_t bytes, uint32_t rank) {
    pending();
    Running& block = peer(rank, "an arrival in a block that the cluster does not have");
    if (!block.live) fail("an arrival at a barrier of a block that has exited");
    Mbarrier& b = find_barrier(block, address);
    if (!b.pending) fail("more arrivals at a barrier than it was initialised for");
    b.bytes += bytes;
    if (b.bytes > int64_t(MOST)) fail("a barrier can't count that many bytes");
    b.pending--;
    settle(b);
    maybe_yield();
}

bool barrier_wait(uint64_t* address, uint32_t parity, bool once) {
    Thread& t = self();
    Pending& p = pending();
    if (parity > 1) fail("a barrier's parity is 0 or 1");
    Mbarrier& b = find_barrier(running(t), address);
    maybe_yield();
    unsigned phase = b.phase;
    if ((phase & 1) != parity) return true;
    if (once && chance(*t.worker, 4)) return false;
    p.barrier = &b;
    p.once = once;
    b.waiting.push_back(&t);
    t.state = State::Mbarrier;
    yield(t);
    // Whoever waits looks at the parity again and again, and may look too late.
    if (b.phase > phase + 1) fail("a barrier went on to the phase after the next before a thread that waits for it saw its end");
    return b.phase != phase;
}

// Named

/// True for the last one that the barrier is for.
static bool arrive(uint32_t number, uint32_t threads) {
    Thread& t = self();
    pending();
    if (number < 1 || number > 15) fail("named barriers have the numbers 1 to 15");
    if (!threads || threads % WARP || threads > t.worker->block_threads) fail("a named barrier is of whole warps of the block");
    NamedBarrier& b = running(t).named[number];
    if (!b.arrived.empty() && b.threads != threads) fail("a named barrier is told different numbers of threads");
    b.threads = threads;
    b.arrived.push_back(&t);
    if (b.arrived.size() < threads) return false;
    // Warps arrive as a whole.
    unsigned here[MAX_THREADS / WARP] = {};
    for (const Thread* other : b.arrived) here[other->number / WARP]++;
    for (unsigned i : here) {
        if (i != 0 && i != WARP) fail("a named barrier is met by a part of a warp");
    }
    b.arrived.clear();
    for (Thread* other : b.waiting) wake(*other);
    b.waiting.clear();
    return true;
}

void named_barrier(uint32_t number, uint32_t threads) {
    Thread& t = self();
    if (arrive(number, threads)) {
        if (seed()) {
            wake(t);
            yield(t);
        }
        return;
    }
    pending().number = number;
    running(t).named[number].waiting.push_back(&t);
    t.state = State::Named;
    yield(t);
}

void named_barrier_arrive(uint32_t number, uint32_t threads) {
    arrive(number, threads);
    maybe_yield();
}

// Clusters

uint32_t cluster_rank() { return running(self()).rank; }

void release_cluster(Worker& w) {
    w.arrived = 0;
    for (Thread& t : w.thread) {
        if (t.state == State::Cluster) wake(t);
    }
}

void cluster_sync() {
    Thread& t = self();
    Worker& w = *t.worker;
    t.state = State::Cluster;
    bool last = ++w.arrived == w.live;
    if (last) release_cluster(w);
    if (!last || seed()) yield(t);
}

} // namespace emu
