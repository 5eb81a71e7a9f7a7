// Copies of boxes of tensors. They happen late, or at random points with a seed: what is read too early, or
// overwritten too early, shows.

#include "worker.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

namespace emu {

// Maps

static TensorMap read_map(const CUtensorMap* map) {
    TensorMap m;
    if (reinterpret_cast<uintptr_t>(map) % 64) fail("a tensor map is not aligned to 64 bytes");
    memcpy(&m, map, sizeof m);
    if (m.magic != TENSOR_MAP) fail("this is no tensor map");
    return m;
}

/// Checks what a copy of the map's box, between the tensor's coordinates `at` and `shared` of this block, takes.
static TensorMap check(const CUtensorMap* map, std::initializer_list<int> at, const void* shared) {
    TensorMap m = read_map(map);
    if (m.rank != at.size()) fail("a copy of another number of dimensions than its tensor map's");
    if (!is_device_memory(m.address, m.extent())) fail("a tensor map's tensor is not within an allocation");
    if (*at.begin() * int(m.element) % 16) fail("a box in the tensor does not start at a multiple of 16 bytes of its lines");
    if (m.swizzle && m.line() != m.swizzle) fail("lines of a swizzled box that are shorter than the swizzle's are not emulated");
    if (reinterpret_cast<uintptr_t>(shared) % 128) fail("a box in shared memory is not aligned to 128 bytes");
    if (m.swizzle && reinterpret_cast<uintptr_t>(shared) % (8u * m.swizzle)) {
        fail("a swizzled box in shared memory does not start where the swizzle's pattern does");
    }
    if (!is_shared(shared, m.box_bytes())) fail("a box is not within the dynamic shared memory");
    return m;
}

void prefetch(const CUtensorMap* map) { read_map(map); }

// Boxes

/// The part of a line of the box that lies in the tensor, and where that is.
struct Line {
    /// Null if there is none.
    unsigned char* tensor;
    /// Its first byte in the line, and after its last one.
    size_t begin, end;
};

static Line find_line(const TensorMap& m, const int* at, const unsigned* index) {
    int64_t first = std::max(0, -at[0]), last = std::min<int64_t>(m.box[0], int64_t(m.size(0)) - at[0]);
    if (first >= last) return {nullptr, 0, 0};
    uint64_t offset = uint64_t(at[0] + first) * m.element;
    for (unsigned i = 1; i < m.rank; i++) {
        int64_t place = int64_t(at[i]) + index[i];
        if (place < 0 || place > int64_t(m.last[i])) return {nullptr, 0, 0};
        offset += uint64_t(place) * m.stride[i - 1];
    }
    return {reinterpret_cast<unsigned char*>(m.address) + offset, size_t(first) * m.element, size_t(last) * m.element};
}

/// Calls f(line, where it starts in the box) for every line.
template <class F>
static void for_each_line(const TensorMap& m, const int* at, F f) {
    unsigned index[5] = {};
    size_t lines = m.box_bytes() / m.line();
    for (size_t i = 0; i < lines; i++) {
        f(find_line(m, at, index), i * m.line());
        for (unsigned d = 1; d < m.rank && ++index[d] == m.box[d]; d++) index[d] = 0;
    }
}

/// Where the chunk of 16 bytes goes or comes from: bits of the address from 4 up are turned by those from 7 up.
template <class T>
static T* swizzled(const TensorMap& m, T* p) {
    if (!m.swizzle) return p;
    auto address = reinterpret_cast<uintptr_t>(p);
    return reinterpret_cast<T*>(address ^ ((address >> 7 & (m.swizzle / 16u - 1)) << 4));
}

/// For what the scheduler does in a thread's name.
struct As {
    Thread* before = hywu_thread;
    explicit As(Thread* t) { hywu_thread = t; }
    ~As() { hywu_thread = before; }
};

static void deliver(Load& l) {
    As thread(l.thread);
    unsigned char line[256 * 8];
    const TensorMap& m = l.map;
    for_each_line(m, l.at, [&](const Line& from, size_t start) {
        const unsigned char* bytes = from.tensor;
        if (from.end - from.begin < m.line()) {
            memset(line, 0, m.line());
            if (from.tensor) memcpy(line + from.begin, from.tensor, from.end - from.begin);
            bytes = line;
        }
        for (size_t i = 0; i < m.line(); i += 16) memcpy(swizzled(m, l.to + start + i), bytes + i, 16);
    });
    complete_bytes(*l.barrier, m.box_bytes());
}

/// Takes what the store's box in shared memory holds.
static void read(Store& s) {
    s.read = true;
    if (s.linear) {
        memcpy(s.bytes.data(), s.from, s.bytes.size());
        return;
    }
    s.bytes.resize(s.map.box_bytes());
    for (size_t i = 0; i < s.bytes.size(); i += 16) memcpy(&s.bytes[i], swizzled(s.map, s.from + i), 16);
}

static void write(Store& s) {
    if (s.linear && s.adds) {
        for (size_t i = 0; i < s.bytes.size(); i += 4) {
            float sum, term;
            memcpy(&sum, s.linear + i, 4);
            memcpy(&term, &s.bytes[i], 4);
            sum += term;
            memcpy(s.linear + i, &sum, 4);
        }
        return;
    }
    if (s.linear) {
        memcpy(s.linear, s.bytes.data(), s.bytes.size());
        return;
    }
    for_each_line(s.map, s.at, [&](const Line& to, size_t start) {
        if (to.tensor) memcpy(to.tensor, &s.bytes[start + to.begin], to.end - to.begin);
    });
}

// By threads

void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, std::initializer_list<int> at, uint32_t blocks) {
    Thread& t = self();
    Worker& w = *t.worker;
    pending();
    TensorMap m = check(map, at, to);
    if (!blocks) fail("a copy to no block");
    for (unsigned rank = 0; blocks >> rank; rank++) {
        if (!(blocks >> rank & 1)) continue;
        Running& block = peer(rank, "a copy to a block that the cluster does not have");
        if (!block.live) fail("a copy to a block that has exited");
        unsigned char* there = in_block(block, to);
        w.loads.push_back({m, {}, &t, &block, there, &find_barrier(block, barrier)});
        std::copy(at.begin(), at.end(), w.loads.back().at);
        // What is there from now on, until the barrier is passed, is anything.
        memset(there, 0xff, m.box_bytes());
    }
    maybe_yield();
}

void store_box(const CUtensorMap* map, const void* from, std::initializer_list<int> at) {
    Thread& t = self();
    TensorMap m = check(map, at, from);
    unsigned group = pending().store_group;
    auto& stores = t.worker->stores;
    stores.push_back({m, nullptr, false, {}, &t, static_cast<const unsigned char*>(from), group, false, false, {}});
    std::copy(at.begin(), at.end(), stores.back().at);
    maybe_yield();
}

void store_linear(void* to, const void* from, uint32_t bytes, bool adds) {
    Thread& t = self();
    auto address = reinterpret_cast<uintptr_t>(to);
    if (bytes % 16 || address % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("a copy of neighbours is not of multiples of 16 bytes");
    if (!is_shared(from, bytes)) fail("a copy of neighbours is not from the dynamic shared memory");
    if (!is_device_memory(address, bytes)) fail("a copy of neighbours is not to within an allocation");
    unsigned group = pending().store_group;
    t.worker->stores.push_back({{}, static_cast<unsigned char*>(to), adds, {}, &t, static_cast<const unsigned char*>(from), group, false,
                                false, std::vector<unsigned char>(bytes)});
    maybe_yield();
}

void store_commit() { pending().store_group++; }

void store_wait(unsigned left, bool done) {
    Thread& t = self();
    unsigned open = pending().store_group;
    auto& stores = t.worker->stores;
    maybe_yield();
    for (Store& s : stores) {
        if (s.thread != &t || s.group + left >= open) continue;
        if (!s.read) read(s);
        // What is only waited for to be read is written by the next wait.
        if (done || s.waited) {
            write(s);
            s.thread = nullptr;
        }
        s.waited = true;
    }
    stores.erase(std::remove_if(stores.begin(), stores.end(), [](const Store& s) { return !s.thread; }), stores.end());
}

// Counters

uint32_t counter_next(uint32_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }

static bool reached(const Pending& p) { return __atomic_load_n(p.counter, __ATOMIC_ACQUIRE) == p.value; }

void counter_wait(uint32_t* counter, uint32_t value) {
    Thread& t = self();
    Pending& p = pending();
    p.counter = counter;
    p.value = value;
    maybe_yield();
    if (reached(p)) return;
    t.state = State::Counter;
    yield(t);
}

/// Wakes those whose counters other blocks have brought where they should be; false where nobody waits for any.
static bool poll_counters(Worker& w) {
    bool waits = false;
    for (size_t i = 0; i < w.thread.size(); i++) {
        if (w.thread[i].state != State::Counter) continue;
        waits = true;
        if (reached(w.pending[i])) wake(w.thread[i]);
    }
    return waits;
}

// By the scheduler

void drift(Worker& w) {
    if (!seed()) return;
    for (size_t i = 0; i < w.loads.size(); i++) {
        if (!chance(w, 4)) continue;
        deliver(w.loads[i]);
        w.woken = true;
        std::swap(w.loads[i], w.loads.back());
        w.loads.pop_back();
    }
    for (size_t i = 0; i < w.stores.size(); i++) {
        Store& s = w.stores[i];
        if (!chance(w, 4)) continue;
        if (!s.read) {
            read(s);
        } else if (s.waited) { // a later wait still finds it otherwise
            write(s);
            w.stores.erase(w.stores.begin() + std::ptrdiff_t(i));
            break;
        }
    }
}

bool advance(Worker& w) {
    if (w.woken) return true;
    while (!w.loads.empty() && !w.woken) {
        Load first = w.loads.front();
        w.loads.erase(w.loads.begin());
        deliver(first);
    }
    if (w.woken) return true;
    // Other blocks run on other threads of the host. Where nothing moves for long, it is a deadlock.
    constexpr unsigned POLLS = 600'000;
    if (poll_counters(w)) {
        if (w.woken) return true;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        return ++w.idle < POLLS;
    }
    // Those that only look whether a phase is over go on; for ever would be a deadlock too.
    constexpr unsigned PATIENCE = 1000;
    if (++w.idle > PATIENCE) return false;
    for (size_t i = 0; i < w.thread.size(); i++) {
        Pending& p = w.pending[i];
        Thread& t = w.thread[i];
        if (t.state != State::Mbarrier || !p.once) continue;
        auto& waiting = p.barrier->waiting;
        waiting.erase(std::find(waiting.begin(), waiting.end(), &t));
        t.state = State::Ready;
        w.woken = true;
    }
    return w.woken;
}

void finish_asynchronous(Thread& t) {
    Pending& p = pending();
    for (const Store& s : t.worker->stores) {
        if (s.thread == &t && !s.waited) fail("a thread exits without a wait for its stores to have read shared memory");
    }
    if (!p.product_groups.empty()) fail("a thread exits without a wait for its products");
}

void finish_asynchronous(Worker& w, Running& block) {
    for (const Load& l : w.loads) {
        if (l.block == &block) fail("a block exits while a copy to it is under way");
    }
}

void finish_asynchronous(Worker& w) {
    if (!w.trapped) {
        for (Store& s : w.stores) write(s);
    }
    w.loads.clear();
    w.stores.clear();
    for (unsigned i = 0; i < w.blocks; i++) {
        Running& block = w.block[i];
        block.mbarriers.clear();
        for (Warpgroup& g : block.warpgroups) g.clear();
        for (NamedBarrier& b : block.named) b.arrived.clear(), b.waiting.clear();
    }
    w.asynchronous = false;
    w.idle = 0;
}

} // namespace emu
