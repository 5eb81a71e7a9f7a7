// The emulated driver's memory: allocations, pinned memory, copies, fills.

#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <unistd.h>

namespace emu {

struct Allocation {
    size_t bytes;
    Device* device;
    /// Belongs to a graph, which frees it.
    bool of_graph = false;
};

static std::map<uint64_t, Allocation>& allocations() {
    static auto* map = new std::map<uint64_t, Allocation>;
    return *map;
}
static std::map<void*, size_t>& pinned() {
    static auto* map = new std::map<void*, size_t>;
    return *map;
}

uint64_t total_memory() {
    static const uint64_t total = setting("HYWU_EMULATOR_MEMORY", 80ull << 30);
    return total;
}

/// Every allocation is filled, so more than the host has would end the process rather than give an error.
static uint64_t least_memory() {
    static const uint64_t least = [] {
        uint64_t host = uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE));
        return std::min(total_memory(), host / 4 * 3);
    }();
    return least;
}

static int allocate(uint64_t* address, size_t bytes) {
    if (!address || !bytes) return INVALID_VALUE;
    Device& d = *current();
    std::lock_guard lock(state);
    if (bytes > least_memory() || d.used > least_memory() - bytes) return OUT_OF_MEMORY;
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes)) return OUT_OF_MEMORY;
    memset(memory, 0xff, bytes);
    *address = reinterpret_cast<uint64_t>(memory);
    allocations()[*address] = {bytes, &d};
    d.used += bytes;
    d.high = std::max(d.high, d.used);
    return SUCCESS;
}

static int release(uint64_t address) {
    auto found = allocations().find(address);
    if (found == allocations().end()) return INVALID_VALUE;
    auto* memory = reinterpret_cast<void*>(address);
    // What is used after this is NaN.
    memset(memory, 0xff, found->second.bytes);
    free(memory);
    found->second.device->used -= found->second.bytes;
    allocations().erase(found);
    return SUCCESS;
}

int free_memory(uint64_t address) {
    if (!address) return SUCCESS;
    std::lock_guard lock(state);
    auto found = allocations().find(address);
    if (found == allocations().end()) return INVALID_VALUE;
    if (found->second.of_graph) {
        memset(reinterpret_cast<void*>(address), 0xff, found->second.bytes);
        return SUCCESS;
    }
    return release(address);
}

Graph::~Graph() {
    std::lock_guard lock(state);
    for (uint64_t address : memory) release(address);
}

bool is_device_memory(uint64_t address, size_t bytes) {
    std::lock_guard lock(state);
    auto after = allocations().upper_bound(address);
    if (after == allocations().begin()) return false;
    auto& [start, allocation] = *std::prev(after);
    return address - start <= allocation.bytes && bytes <= allocation.bytes - (address - start);
}

int copy_work(uint64_t to, bool to_device, uint64_t from, bool from_device, size_t bytes,
              std::function<int()>& work) {
    if (!to || !from) return INVALID_VALUE;
    if (to_device && !is_device_memory(to, bytes)) return INVALID_VALUE;
    if (from_device && !is_device_memory(from, bytes)) return INVALID_VALUE;
    work = [=] {
        memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
        return int(SUCCESS);
    };
    return SUCCESS;
}

static int copy(void* stream, uint64_t to, bool to_device, uint64_t from, bool from_device, size_t bytes) {
    if (!bytes) return SUCCESS;
    std::function<int()> work;
    int error = copy_work(to, to_device, from, from_device, bytes, work);
    return error ? error : submit(stream, std::move(work));
}

int clear_work(uint64_t to, unsigned char value, size_t bytes, std::function<int()>& work) {
    if (!is_device_memory(to, bytes)) return INVALID_VALUE;
    work = [=] {
        memset(reinterpret_cast<void*>(to), value, bytes);
        return int(SUCCESS);
    };
    return SUCCESS;
}

template <class T>
int fill(void* stream, uint64_t to, T value, size_t count) {
    if (!count) return SUCCESS;
    if (count > SIZE_MAX / sizeof(T) || to % sizeof(T)) return INVALID_VALUE;
    if (!is_device_memory(to, count * sizeof(T))) return INVALID_VALUE;
    return submit(stream, [=] {
        std::fill_n(reinterpret_cast<T*>(to), count, value);
        return int(SUCCESS);
    });
}

static int allocate_host(void** memory, size_t bytes) {
    if (int error = unsafe_call()) return error;
    if (!memory || !bytes) return INVALID_VALUE;
    static const uint64_t fail_at = setting("HYWU_EMULATOR_FAIL_PINNED", 0);
    static std::atomic<uint64_t> asked{0};
    if (fail_at && ++asked == fail_at) return OUT_OF_MEMORY;
    if (posix_memalign(memory, 4096, bytes)) return OUT_OF_MEMORY;
    std::lock_guard lock(state);
    pinned()[*memory] = bytes;
    return SUCCESS;
}

/// At the end of the process, if HYWU_EMULATOR_LEAKS asks for it.
static struct Leaks {
    ~Leaks() {
        if (!setting("HYWU_EMULATOR_LEAKS", 0)) return;
        std::lock_guard lock(state);
        for (auto& [address, a] : allocations()) {
            fprintf(stderr, "emulator: leak: %zu bytes at %#llx on device %d\n", a.bytes,
                    static_cast<unsigned long long>(address), a.device->ordinal);
        }
        for (auto& [address, bytes] : pinned()) {
            fprintf(stderr, "emulator: leak: %zu bytes of pinned memory at %p\n", bytes, address);
        }
    }
} leaks;

} // namespace emu

using namespace emu;

// Device memory

API cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    ENTER();
    if (int error = unsafe_call()) return error;
    return allocate(address, bytes);
}

API cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream_handle) {
    ENTER();
    std::lock_guard lock(state);
    Stream* s = stream(stream_handle);
    if (!s) return INVALID_HANDLE;
    if (!s->capture) return allocate(address, bytes);
    if (s->capture->invalid) return CAPTURE_INVALIDATED;
    if (int error = allocate(address, bytes)) return error;
    // The graph has the memory from now on; every replay finds it fresh.
    allocations()[*address].of_graph = true;
    s->capture->graph->memory.push_back(*address);
    return submit(stream_handle, [to = *address, bytes] {
        memset(reinterpret_cast<void*>(to), 0xff, bytes);
        return int(SUCCESS);
    });
}
API cuMemAllocFromPoolAsync(uint64_t* address, size_t bytes, void*, void* stream_handle) {
    return cuMemAllocAsync(address, bytes, stream_handle);
}

API cuMemFree_v2(uint64_t address) {
    ENTER();
    if (int error = unsafe_call()) return error;
    return free_memory(address);
}

API cuMemFreeAsync(uint64_t address, void* stream_handle) {
    ENTER();
    if (!is_device_memory(address, 0)) return INVALID_VALUE;
    return submit(stream_handle, [=] { return free_memory(address); });
}

API cuMemGetInfo_v2(size_t* unused, size_t* total) {
    ENTER();
    std::lock_guard lock(state);
    if (unused) *unused = total_memory() - std::min(total_memory(), current()->used);
    if (total) *total = total_memory();
    return SUCCESS;
}

// Pinned memory

API cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    ENTER();
    return allocate_host(memory, bytes);
}
API cuMemAllocHost_v2(void** memory, size_t bytes) {
    ENTER();
    return allocate_host(memory, bytes);
}

API cuMemFreeHost(void* memory) {
    ENTER();
    if (int error = unsafe_call()) return error;
    std::lock_guard lock(state);
    if (!pinned().erase(memory)) return INVALID_VALUE;
    free(memory);
    return SUCCESS;
}

API cuMemHostGetDevicePointer_v2(uint64_t* address, void* memory, unsigned) {
    ENTER();
    if (!address) return INVALID_VALUE;
    *address = reinterpret_cast<uint64_t>(memory);
    return SUCCESS;
}

// Copies

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream_handle) {
    ENTER();
    return copy(stream_handle, to, true, reinterpret_cast<uint64_t>(from), false, bytes);
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream_handle) {
    ENTER();
    return copy(stream_handle, reinterpret_cast<uint64_t>(to), false, from, true, bytes);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream_handle) {
    ENTER();
    return copy(stream_handle, to, true, from, true, bytes);
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    if (int error = unsafe_call()) return error;
    return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    if (int error = unsafe_call()) return error;
    return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) {
    if (int error = unsafe_call()) return error;
    return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}

// Fills

#define FILLS(BITS, T, SYNC)                                                                              \
    API cuMemsetD##BITS##Async(uint64_t to, T value, size_t count, void* stream_handle) {                 \
        ENTER();                                                                                          \
        return fill(stream_handle, to, value, count);                                                     \
    }                                                                                                     \
    API SYNC(uint64_t to, T value, size_t count) {                                                        \
        ENTER();                                                                                          \
        if (int error = unsafe_call()) return error;                                                      \
        return fill(nullptr, to, value, count);                                                           \
    }
FILLS(8, unsigned char, cuMemsetD8_v2)
FILLS(16, unsigned short, cuMemsetD16_v2)
FILLS(32, unsigned, cuMemsetD32_v2)

// Pools: the default one of every device

API cuDeviceGetDefaultMemPool(void** pool, int handle) {
    if (!device(handle)) return INVALID_DEVICE;
    if (!pool) return INVALID_VALUE;
    *pool = device(handle);
    return SUCCESS;
}
API cuDeviceGetMemPool(void** pool, int handle) { return cuDeviceGetDefaultMemPool(pool, handle); }

API cuMemPoolSetAttribute(void* pool, int attribute, void* value) {
    if (int error = sticky()) return error;
    auto* d = static_cast<Device*>(pool);
    if (!d || !value) return INVALID_VALUE;
    std::lock_guard lock(state);
    switch (attribute) {
    case 1:
    case 2:
    case 3: return SUCCESS; // how memory is used again
    case 4: d->release_threshold = *static_cast<uint64_t*>(value); return SUCCESS;
    case 6:
    case 8: // the high marks can only be reset
        if (*static_cast<uint64_t*>(value)) return INVALID_VALUE;
        d->high = d->used;
        return SUCCESS;
    default: return INVALID_VALUE;
    }
}

API cuMemPoolGetAttribute(void* pool, int attribute, void* value) {
    if (int error = sticky()) return error;
    auto* d = static_cast<const Device*>(pool);
    if (!d || !value) return INVALID_VALUE;
    std::lock_guard lock(state);
    switch (attribute) {
    case 1:
    case 2:
    case 3: *static_cast<int*>(value) = 1; return SUCCESS;
    case 4: *static_cast<uint64_t*>(value) = d->release_threshold; return SUCCESS;
    case 5:
    case 7: *static_cast<uint64_t*>(value) = d->used; return SUCCESS;
    case 6:
    case 8: *static_cast<uint64_t*>(value) = d->high; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

API cuMemPoolTrimTo(void* pool, size_t) {
    if (int error = sticky()) return error;
    return pool ? SUCCESS : INVALID_VALUE;
}
