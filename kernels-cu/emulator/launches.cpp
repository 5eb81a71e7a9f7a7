// The kernels by name, and the host threads that share the blocks of a launch.

#include "worker.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emu {

unsigned long long setting(const char* name, unsigned long long otherwise) {
    const char* text = getenv(name);
    return text && *text ? strtoull(text, nullptr, 0) : otherwise;
}

uint64_t seed() {
    static const uint64_t value = setting("HYWU_EMULATOR_SEED", 0);
    return value;
}

// Kernels

static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> map;
    return map;
}
void add_kernel(const Kernel& kernel) { kernels().emplace(kernel.name, kernel); }
Kernel* find_kernel(const std::string& name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

struct Work {
    const Launch* launch;
    uint64_t clusters;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> trapped{false};
};

static std::mutex workers_lock;
static std::vector<Worker*>& workers() {
    static auto* free = new std::vector<Worker*>;
    return *free;
}

/// Gives the launch's threads and blocks their places.
static void set_up(Worker& w) {
    const Launch& l = *w.launch;
    const dim3& c = l.kernel->cluster;
    w.blocks = c.x * c.y * c.z;
    w.block_threads = l.block.x * l.block.y * l.block.z;
    w.threads = w.blocks * w.block_threads;
    w.trapped = false;
    if (w.blocks > 1 && !w.cluster_memory) {
        w.cluster_memory = static_cast<unsigned char*>(aligned_alloc(1024, MAX_CLUSTER * SHARED_SLOT));
    }
    w.thread.resize(w.threads);
    w.warp.resize((w.threads + WARP - 1) / WARP);
    w.order.resize(w.threads);
    for (unsigned i = 0; i < w.blocks; i++) {
        Running& block = w.block[i];
        block.size = l.block;
        block.grid = l.grid;
        block.rank = i;
        block.origin = w.blocks > 1 ? w.cluster_memory + i * SHARED_SLOT : dynamic_shared;
        block.dynamic = block.origin + seed() % 2 * SHARED_ALIGN;
        block.thread = &w.thread[i * w.block_threads];
    }
    for (unsigned i = 0; i < w.threads; i++) {
        Thread& t = w.thread[i];
        unsigned number = i % w.block_threads;
        t.index = {number % l.block.x, number / l.block.x % l.block.y, number / l.block.x / l.block.y};
        t.number = number;
        t.block = &w.block[i / w.block_threads];
        t.worker = &w;
        t.warp = &w.warp[i / WARP];
        w.order[i] = i;
    }
    for (unsigned i = 0; i * WARP < w.threads; i++) w.warp[i].threads = &w.thread[i * WARP];
}

static void run_blocks(Work& work) {
    Worker* worker = nullptr;
    {
        std::lock_guard lock(workers_lock);
        if (!workers().empty()) {
            worker = workers().back();
            workers().pop_back();
        }
    }
    if (!worker) worker = new Worker;
    Worker& w = *worker;
    const Launch& l = *work.launch;
    w.launch = &l;
    set_up(w);
#ifdef __SANITIZE_ADDRESS__
    for (unsigned i = 0; i < w.blocks; i++) {
        const unsigned char* end = w.block[i].dynamic + l.dynamic;
        __asan_poison_memory_region(end, size_t(w.block[i].origin + SHARED_SLOT - end));
    }
#endif
    for (;;) {
        uint64_t i = work.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= work.clusters || work.trapped) break;
        // Another seed takes the blocks in another order too.
        if (seed() % 2) i = work.clusters - 1 - i;
        run_cluster(w, i);
        if (w.trapped) work.trapped = true;
    }
#ifdef __SANITIZE_ADDRESS__
    for (unsigned i = 0; i < w.blocks; i++) __asan_unpoison_memory_region(w.block[i].origin, SHARED_SLOT);
#endif
    // The fibers of a trapped block never end: their stacks are given up, and the device with them.
    if (w.trapped) return;
    std::lock_guard lock(workers_lock);
    workers().push_back(worker);
}

/// Host threads that help with a launch, and wait for the next one.
struct Pool {
    std::mutex busy;
    std::mutex lock;
    std::condition_variable wake, idle;
    std::shared_ptr<Work> work;
    unsigned helpers, wanted = 0, working = 0;
    explicit Pool(unsigned threads) : helpers(threads - 1) {
        for (unsigned i = 0; i < helpers; i++) std::thread([this] { help(); }).detach();
    }
    [[noreturn]] void help() {
        std::unique_lock hold(lock);
        for (;;) {
            wake.wait(hold, [this] { return wanted > 0; });
            wanted--;
            working++;
            auto mine = work;
            hold.unlock();
            run_blocks(*mine);
            hold.lock();
            if (--working == 0) idle.notify_all();
        }
    }
};

bool run(const Launch& launch) {
    // Never destroyed: its threads may be at work when the process ends.
    static auto* pool = [] {
        unsigned cores = std::max(1u, std::thread::hardware_concurrency());
        return new Pool(std::max(1u, unsigned(setting("HYWU_EMULATOR_THREADS", cores))));
    }();
    segment();
    auto work = std::make_shared<Work>();
    work->launch = &launch;
    const dim3& c = launch.kernel->cluster;
    work->clusters = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z / (c.x * c.y * c.z);
    // A launch that finds the pool at work runs on its own thread alone.
    std::unique_lock busy(pool->busy, std::try_to_lock);
    unsigned helpers = busy ? unsigned(std::min<uint64_t>(pool->helpers, work->clusters - 1)) : 0;
    if (helpers) {
        std::lock_guard hold(pool->lock);
        pool->work = work;
        pool->wanted = helpers;
        pool->wake.notify_all();
    }
    run_blocks(*work);
    if (helpers) {
        std::unique_lock hold(pool->lock);
        pool->wanted = 0;
        pool->idle.wait(hold, [&] { return pool->working == 0; });
    }
    return !work->trapped;
}

} // namespace emu
