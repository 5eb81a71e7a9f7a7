// The threads of a block are fibers of one host thread.

#include "worker.h"

#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <link.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// What `extern __shared__ ... dynamic_shared[]` of the kernels means. Every other thread-local variable of
// this library is a kernel's static shared memory: the emulator itself must have none, since they are
// poisoned for every block.
alignas(1024) thread_local unsigned char dynamic_shared[emu::SHARED_SLOT];

// Saves the callee's registers on this stack and takes up the other one; r15 is the running thread.
asm(R"(
.text
.hidden hywu_switch
.globl hywu_switch
.type hywu_switch, @function
hywu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hywu_switch, .-hywu_switch
)");
extern "C" void hywu_switch(void** save, void* to);

namespace emu {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr size_t GUARD = 4096;
constexpr unsigned STACKS_AT_ONCE = 32;

/// A stack; runs one thread after the other until one has to wait.
struct Fiber {
    void* sp;
    char* bottom;
    Fiber* next;
    void* fake_stack;
};

// Switches

static void to_fiber(Worker& w, Fiber& f) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&w.host_fake_stack, f.bottom, STACK - GUARD);
#endif
    hywu_switch(&w.sp, f.sp);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(w.host_fake_stack, nullptr, nullptr);
#endif
}

static void arrive_on_fiber([[maybe_unused]] Worker& w, [[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, &w.host_bottom, &w.host_size);
#endif
}

static void to_scheduler(Worker& w, Fiber& f) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&f.fake_stack, w.host_bottom, w.host_size);
#endif
    hywu_switch(&f.sp, w.sp);
    arrive_on_fiber(w, f.fake_stack);
}

void yield(Thread& t) {
    t.yielded = true;
    to_scheduler(*t.worker, *t.fiber);
}

void maybe_yield() {
    Thread& t = self();
    if (!chance(*t.worker, 8)) return;
    t.state = State::Ready;
    yield(t);
}

void wake(Thread& t) {
    t.state = State::Ready;
    t.worker->woken = true;
    t.worker->idle = 0;
}

static void finish(Thread& t);

[[noreturn]] static void fiber_main(Fiber* f, Worker* w, Thread* t) {
    arrive_on_fiber(*w, nullptr);
    for (;;) {
        hywu_thread = t;
        t->fiber = f;
        w->launch->kernel->invoke(w->launch->parameters);
        finish(*t);
        // A thread that never waited is followed by the next one without a switch.
        Thread* next = nullptr;
        if (!t->yielded) {
            while (w->cursor + 1 < w->end) {
                Thread& candidate = w->thread[w->order[w->cursor + 1]];
                if (candidate.state == State::Ready) break;
                w->cursor++;
                if (candidate.state == State::Fresh) {
                    next = &candidate;
                    break;
                }
            }
        }
        if (!next) {
            f->next = w->free;
            w->free = f;
            to_scheduler(*w, *f);
            // Whoever resumes a free fiber has put the thread to run at the cursor.
            next = &w->thread[w->order[w->cursor]];
        }
        t = next;
    }
}

extern "C" __attribute__((visibility("hidden"))) void hywu_fiber_entry(Fiber* f, Worker* w, Thread* t) {
    fiber_main(f, w, t);
}
// The first switch to a fiber comes here, with its arguments in the saved registers.
asm(R"(
.text
hywu_fiber_start:
    movq %r12, %rdi
    movq %r13, %rsi
    movq %r14, %rdx
    xorl %ebp, %ebp
    call hywu_fiber_entry
    ud2
)");
extern "C" void hywu_fiber_start();

static void add_stacks(Worker& w) {
    size_t bytes = STACK * STACKS_AT_ONCE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (base == MAP_FAILED) {
        fprintf(stderr, "emulator: no memory for stacks\n");
        abort();
    }
    for (unsigned i = STACKS_AT_ONCE; i-- > 0;) {
        char* low = static_cast<char*>(base) + i * STACK;
        mprotect(low, GUARD, PROT_NONE);
        w.free = new Fiber{nullptr, low + GUARD, w.free, nullptr};
    }
}

static void start(Worker& w, Thread& t) {
    if (!w.free) add_stacks(w);
    Fiber* f = w.free;
    w.free = f->next;
    if (!f->sp) {
        // Stacks that all end at the same offset would share their cache sets.
        size_t colour = reinterpret_cast<uintptr_t>(f->bottom) / STACK * 13 % 128 * 64;
        auto** sp = reinterpret_cast<void**>(f->bottom + (STACK - GUARD) - colour - 64);
        // What hywu_switch pops: r15, r14, r13, r12, rbx, rbp, and where it returns to.
        void* saved[] = {nullptr, &t, &w, f, nullptr, nullptr, reinterpret_cast<void*>(hywu_fiber_start)};
        sp -= 7;
        memcpy(static_cast<void*>(sp), saved, sizeof saved);
        f->sp = sp;
    }
    to_fiber(w, *f);
}

// Ends of the process and of launches

static const char* describe(State state) {
    switch (state) {
    case State::Fresh: return "has not started";
    case State::Ready: return "is ready";
    case State::Barrier: return "waits at a barrier of the block";
    case State::Collective: return "waits for its warp";
    case State::Mbarrier: return "waits for a barrier in shared memory";
    case State::Named: return "waits at a named barrier";
    case State::Cluster: return "waits at a barrier of the cluster";
    case State::Products: return "waits for products that not all of its warpgroup have issued";
    case State::Counter: return "waits for a counter in global memory";
    case State::Done: return "has exited";
    }
    return "?";
}

static void print_thread(const Thread& t) {
    const Worker& w = *t.worker;
    const uint3 &b = t.block->index, &i = t.index;
    fprintf(stderr, "kernel %s (%s), block (%u, %u, %u), thread (%u, %u, %u)", w.launch->kernel->name,
            w.launch->kernel->unit, b.x, b.y, b.z, i.x, i.y, i.z);
}

void fail(const char* what) {
    fprintf(stderr, "emulator: %s: ", what);
    print_thread(self());
    fprintf(stderr, "\n");
    abort();
}

[[noreturn]] static void deadlock(const Worker& w) {
    fprintf(stderr, "emulator: deadlock: %u of %u threads have not exited, all of them wait\n", w.live,
            w.threads);
    // One thread of every kind that there is, and how many they are.
    struct Kind {
        const Thread* thread;
        unsigned number, count;
        const Mbarrier* barrier;
    };
    std::vector<Kind> kinds;
    for (const Thread& t : w.thread) {
        Kind kind{&t, 0, 1, nullptr};
        const Pending* p = w.asynchronous ? &w.pending[size_t(&t - w.thread.data())] : nullptr;
        if (t.state == State::Mbarrier) kind.barrier = p->barrier;
        if (t.state == State::Named) kind.number = p->number;
        auto same = std::find_if(kinds.begin(), kinds.end(), [&](const Kind& k) {
            return k.thread->state == t.state && k.number == kind.number && k.barrier == kind.barrier;
        });
        if (same == kinds.end()) kinds.push_back(kind);
        else same->count++;
    }
    for (const Kind& k : kinds) {
        const Thread& t = *k.thread;
        fprintf(stderr, "  ");
        print_thread(t);
        fprintf(stderr, " %s", describe(t.state));
        unsigned lane = t.number % WARP;
        if (t.state == State::Collective) {
            fprintf(stderr, " in %s, mask %08x, here %08x", t.warp->name[lane], t.warp->mask[lane], t.warp->waiting);
        }
        if (t.state == State::Named) {
            const NamedBarrier& b = running(t).named[k.number];
            fprintf(stderr, ", number %u: %u of %u threads are here", k.number, unsigned(b.arrived.size()), b.threads);
        }
        if (const Mbarrier* b = k.barrier) {
            const auto* from = reinterpret_cast<const unsigned char*>(b->address);
            fprintf(stderr, " at %td of dynamic shared memory: parity %u of phase %u, %u of %u arrivals and %lld bytes missing",
                    from - t.block->dynamic, b->phase & 1, b->phase, b->pending, b->expected,
                    static_cast<long long>(b->bytes));
        }
        if (k.count > 1) fprintf(stderr, " (and %u others)", k.count - 1);
        fprintf(stderr, "\n");
    }
    abort();
}

void trap() {
    Thread& t = self();
    fprintf(stderr, "emulator: trap: ");
    print_thread(t);
    fprintf(stderr, "\n");
    t.worker->trapped = true;
    for (;;) yield(t);
}

// Barriers

static void release_barrier(Running& block) {
    int result = block.kind == Barrier::Or ? block.any : block.kind == Barrier::And ? block.all : block.count;
    block.arrived = 0;
    for (unsigned i = 0, count = self().worker->block_threads; i < count; i++) {
        Thread& t = block.thread[i];
        if (t.state != State::Barrier) continue;
        t.state = State::Ready;
        t.result = result;
    }
}

int barrier(Barrier kind, int predicate) {
    Thread& t = self();
    Running& block = running(t);
    if (block.arrived++ == 0) {
        block.kind = kind;
        block.any = 0, block.all = 1, block.count = 0;
    } else if (block.kind != kind) {
        fail("threads of a block meet at barriers of different kinds");
    }
    block.any |= predicate != 0;
    block.all &= predicate != 0;
    block.count += predicate != 0;
    t.state = State::Barrier;
    bool last = block.arrived == block.live;
    if (last) release_barrier(block);
    // The last one to arrive must not always be the first one to go on.
    if (!last || seed()) yield(t);
    return t.result;
}

unsigned alive() {
    return self().warp->alive;
}

/// Runs the collective that lanes with this mask wait for, if nobody is missing.
static bool complete(Warp& warp, unsigned mask) {
    unsigned need = mask & warp.alive;
    if ((warp.waiting & need) != need || !need) return false;
    unsigned first = unsigned(__builtin_ctz(need));
    void* operands[WARP] = {};
    for (unsigned i = first; i < WARP; i++) {
        if (!(need >> i & 1)) continue;
        if (warp.mask[i] != mask) fail("lanes of a warp meet with different masks");
        if (warp.run[i] != warp.run[first]) {
            fprintf(stderr, "emulator: %s meets %s\n", warp.name[first], warp.name[i]);
            fail("lanes of a warp meet in different operations");
        }
        operands[i] = warp.operand[i];
    }
    warp.run[first](operands);
    warp.waiting &= ~need;
    for (unsigned i = first; i < WARP; i++) {
        if (need >> i & 1) warp.threads[i].state = State::Ready;
    }
    return true;
}

void collective(unsigned mask, void* operand, Collective run, const char* name) {
    Thread& t = self();
    Warp& warp = *t.warp;
    unsigned lane = t.number % WARP;
    if (!(mask >> lane & 1)) fail("a lane calls a warp operation with a mask that leaves it out");
    warp.waiting |= 1u << lane;
    warp.mask[lane] = mask;
    warp.operand[lane] = operand;
    warp.run[lane] = run;
    warp.name[lane] = name;
    t.state = State::Collective;
    bool last = complete(warp, mask);
    if (!last || seed()) yield(t);
}

/// Exited threads are not waited for, as on the device.
static void finish(Thread& t) {
    Worker& w = *t.worker;
    Running& block = running(t);
    if (w.asynchronous) finish_asynchronous(t);
    t.state = State::Done;
    w.live--;
    block.live--;
    Warp& warp = *t.warp;
    warp.alive &= ~(1u << (t.number % WARP));
    for (unsigned left = warp.waiting; left;) {
        unsigned mask = warp.mask[__builtin_ctz(left)];
        complete(warp, mask);
        left &= ~mask;
    }
    if (block.arrived && block.arrived == block.live) release_barrier(block);
    if (w.arrived && w.arrived == w.live) release_cluster(w);
    if (w.asynchronous && !block.live) finish_asynchronous(w, block);
    if (!t.copies.empty()) t.copies.clear();
}

// Shared memory

const Segment& segment() {
    static const Segment found = [] {
        struct Search {
            Segment segment;
            const unsigned char* dynamic;
        } search = {{0, sizeof dynamic_shared}, dynamic_shared};
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* data) {
                auto* s = static_cast<Search*>(data);
                auto* start = static_cast<const unsigned char*>(info->dlpi_tls_data);
                for (unsigned i = 0; start && i < info->dlpi_phnum; i++) {
                    const auto& header = info->dlpi_phdr[i];
                    if (header.p_type != PT_TLS) continue;
                    if (s->dynamic < start || s->dynamic >= start + header.p_memsz) continue;
                    s->segment = {start - s->dynamic, header.p_memsz};
                    return 1;
                }
                return 0;
            },
            &search);
        return search.segment;
    }();
    return found;
}

bool is_shared(const void* address) {
    const Worker& w = *self().worker;
    if (w.blocks > 1) return is_shared(address, 1);
    const unsigned char* start = w.block[0].origin + segment().start;
    return address >= start && address < start + segment().bytes;
}

/// NaN in every float type, so that what a kernel reads before it wrote it shows.
static void poison_shared(const Worker& w) {
    for (unsigned i = 0; i < w.blocks; i++) {
        const Running& block = w.block[i];
        memset(block.origin, 0xff, size_t(block.dynamic - block.origin) + w.launch->dynamic);
    }
    unsigned char *start = dynamic_shared + segment().start, *end = start + segment().bytes;
    if (w.blocks > 1) {
        if (w.launch->kernel->has_named_shared) memset(start, 0xff, size_t(end - start));
    } else if (w.launch->kernel->has_static_shared) {
        memset(start, 0xff, size_t(dynamic_shared - start));
        memset(dynamic_shared + SHARED_SLOT, 0xff, size_t(end - dynamic_shared - SHARED_SLOT));
    }
}

/// Blocks of a cluster would share the one copy that there is of variables.
static void check_named_shared(const Worker& w) {
    if (w.blocks == 1 || !w.launch->kernel->has_named_shared) return;
    unsigned char *start = dynamic_shared + segment().start, *end = start + segment().bytes;
    if (std::all_of(start, end, [](unsigned char byte) { return byte == 0xff; })) return;
    fprintf(stderr, "emulator: kernel %s (%s) with a cluster has __shared__ variables; it may have DYNAMIC_SHARED alone\n",
            w.launch->kernel->name, w.launch->kernel->unit);
    abort();
}

// Blocks

static uint64_t next_random(uint64_t& state) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dull >> 32;
}

bool chance(Worker& w, unsigned one_in) { return seed() && next_random(w.random) % one_in == 0; }

static void shuffle_order(Worker& w) {
    for (unsigned i = w.threads; i > 1; i--) std::swap(w.order[i - 1], w.order[next_random(w.random) % i]);
}

static bool run_some(Worker& w, unsigned begin, unsigned end) {
    bool ran = false;
    w.end = end;
    for (w.cursor = begin; w.cursor < end && !w.trapped; w.cursor++) {
        Thread& t = w.thread[w.order[w.cursor]];
        if (t.state == State::Fresh) start(w, t);
        else if (t.state == State::Ready) to_fiber(w, *t.fiber);
        else continue;
        ran = true;
    }
    return ran;
}

void run_cluster(Worker& w, uint64_t number) {
    const Launch& l = *w.launch;
    const dim3& c = l.kernel->cluster;
    unsigned gx = l.grid.x / c.x, gy = l.grid.y / c.y;
    for (unsigned i = 0; i < w.blocks; i++) {
        Running& block = w.block[i];
        block.index = {unsigned(number % gx) * c.x + i % c.x, unsigned(number / gx % gy) * c.y + i / c.x % c.y,
                       unsigned(number / gx / gy) * c.z + i / c.x / c.y};
        block.live = w.block_threads;
        block.arrived = 0;
    }
    poison_shared(w);
    w.live = w.threads;
    w.arrived = 0;
    for (unsigned i = 0; i < w.threads; i++) {
        Thread& t = w.thread[i];
        t.state = State::Fresh;
        t.yielded = false;
        t.group = 0;
    }
    for (unsigned i = 0; i * WARP < w.threads; i++) {
        unsigned lanes = std::min(WARP, w.threads - i * WARP);
        w.warp[i].alive = lanes == WARP ? 0xffffffffu : (1u << lanes) - 1;
        w.warp[i].waiting = 0;
    }
    if (seed()) {
        w.random = (seed() + number * 0x9e3779b97f4a7c15ull) | 1;
        for (int i = 0; i < 8; i++) next_random(w.random);
    }
    while (w.live > 0 && !w.trapped) {
        bool ran = false;
        w.woken = false;
        if (seed()) {
            shuffle_order(w);
            ran = run_some(w, 0, w.threads);
        } else {
            // Warp by warp, each as far as it gets: the stacks in use are few.
            for (unsigned i = 0; i < w.threads; i += WARP) {
                while (run_some(w, i, std::min(i + WARP, w.threads))) ran = true;
            }
        }
        if (w.asynchronous && !w.trapped) drift(w);
        if (!ran && w.live > 0 && !w.trapped && !(w.asynchronous && advance(w))) deadlock(w);
    }
    if (w.asynchronous) finish_asynchronous(w);
    if (!w.trapped) check_named_shared(w);
}

} // namespace emu
