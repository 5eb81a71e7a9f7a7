// The emulated driver's devices, contexts, modules and launches.

#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <pthread.h>

namespace emu {

std::recursive_mutex state;

static std::atomic<bool> initialized{false};
static std::atomic<int> failed{0};
static std::atomic<uint64_t> launches{0};

int sticky() { return failed; }
void fail_device() { failed = LAUNCH_FAILED; }

static int device_count() {
    static const int count = int(std::min(setting("HYWU_EMULATOR_DEVICES", 1), 64ull));
    return count;
}

Device* device(int ordinal) {
    static auto* devices = [] {
        auto* all = new std::vector<Device>(64);
        for (int i = 0; i < 64; i++) (*all)[size_t(i)].ordinal = i;
        return all;
    }();
    return ordinal < 0 || ordinal >= device_count() ? nullptr : &(*devices)[size_t(ordinal)];
}

// Not thread_local: see the scheduler's `dynamic_shared`.
static std::vector<Device*>& contexts() {
    static const pthread_key_t key = [] {
        pthread_key_t k;
        pthread_key_create(&k, [](void* p) { delete static_cast<std::vector<Device*>*>(p); });
        return k;
    }();
    void* mine = pthread_getspecific(key);
    if (!mine) pthread_setspecific(key, mine = new std::vector<Device*>);
    return *static_cast<std::vector<Device*>*>(mine);
}

Device* current() { return contexts().empty() ? nullptr : contexts().back(); }
uintptr_t this_thread() { return uintptr_t(pthread_self()); }

static bool is_device(const void* context) {
    for (int i = 0; i < device_count(); i++) {
        if (device(i) == context) return true;
    }
    return false;
}

} // namespace emu

using namespace emu;

// Devices

API cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (device_count() == 0) return NO_DEVICE;
    initialized = true;
    return SUCCESS;
}

API cuDriverGetVersion(int* version) {
    if (!version) return INVALID_VALUE;
    *version = int(setting("HYWU_EMULATOR_DRIVER", 13000));
    return SUCCESS;
}

API cuDeviceGetCount(int* count) {
    if (!initialized) return NOT_INITIALIZED;
    if (!count) return INVALID_VALUE;
    *count = device_count();
    return SUCCESS;
}

API cuDeviceGet(int* handle, int ordinal) {
    if (!initialized) return NOT_INITIALIZED;
    if (!handle) return INVALID_VALUE;
    if (!device(ordinal)) return INVALID_DEVICE;
    *handle = ordinal;
    return SUCCESS;
}

API cuDeviceGetName(char* name, int length, int handle) {
    if (!device(handle)) return INVALID_DEVICE;
    if (!name || length < 1) return INVALID_VALUE;
    snprintf(name, size_t(length), "emulated device");
    return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int handle) {
    if (!device(handle)) return INVALID_DEVICE;
    if (!bytes) return INVALID_VALUE;
    *bytes = total_memory();
    return SUCCESS;
}

API cuDeviceGetUuid_v2(unsigned char* uuid, int handle) {
    if (!device(handle)) return INVALID_DEVICE;
    if (!uuid) return INVALID_VALUE;
    memcpy(uuid, "emulated device", 16);
    uuid[15] = static_cast<unsigned char>(handle);
    return SUCCESS;
}
API cuDeviceGetUuid(unsigned char* uuid, int handle) { return cuDeviceGetUuid_v2(uuid, handle); }

API cuDeviceGetAttribute(int* value, int attribute, int handle) {
    // As on an H100.
    static const struct {
        int attribute, value;
    } table[] = {
        {1, 1024},        // threads of a block
        {2, 1024},        // x, y and z of a block
        {3, 1024},        //
        {4, 64},          //
        {5, 2147483647},  // x, y and z of a grid
        {6, 65535},       //
        {7, 65535},       //
        {8, 48 << 10},    // shared memory of a block
        {9, 64 << 10},    // constant memory
        {10, 32},         // warp
        {12, 65536},      // registers of a block
        {13, 1980000},    // clock, kHz
        {16, 132},        // multiprocessors
        {31, 1},          // concurrent kernels
        {32, 1},          // ECC
        {36, 2619000},    // memory clock, kHz
        {37, 5120},       // bits of the memory bus
        {38, 50 << 20},   // L2
        {39, 2048},       // threads of a multiprocessor
        {40, 3},          // copy engines
        {41, 1},          // unified addressing
        {75, 9},          // compute capability
        {76, 0},          //
        {78, 1},          // stream priorities
        {81, 228 << 10},  // shared memory of a multiprocessor
        {82, 65536},      // registers of a multiprocessor
        {95, 0},          // cooperative launches
        {97, MAX_DYNAMIC},
        {106, 32},        // blocks of a multiprocessor
        {111, 1 << 10},   // shared memory that the driver keeps of a block
        {115, 1},         // memory pools
        {120, 1},         // clusters
        {127, 1},         // tensor maps
    };
    if (!device(handle)) return INVALID_DEVICE;
    if (!value || attribute < 1) return INVALID_VALUE;
    // What is not in the table is not supported.
    *value = attribute == 33 ? handle + 1 : 0;
    for (auto& row : table) {
        if (row.attribute == attribute) *value = row.value;
    }
    return SUCCESS;
}

// Contexts

API cuDevicePrimaryCtxRetain(void** context, int handle) {
    if (!initialized) return NOT_INITIALIZED;
    if (!context) return INVALID_VALUE;
    if (!device(handle)) return INVALID_DEVICE;
    if (int error = sticky()) return error;
    *context = device(handle);
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int handle) { return device(handle) ? SUCCESS : INVALID_DEVICE; }

API cuCtxGetCurrent(void** context) {
    if (!context) return INVALID_VALUE;
    *context = current();
    return SUCCESS;
}

API cuCtxSetCurrent(void* context) {
    if (context && !is_device(context)) return INVALID_CONTEXT;
    if (!contexts().empty()) contexts().pop_back();
    if (context) contexts().push_back(static_cast<Device*>(context));
    return SUCCESS;
}

API cuCtxPushCurrent_v2(void* context) {
    if (!is_device(context)) return INVALID_CONTEXT;
    contexts().push_back(static_cast<Device*>(context));
    return SUCCESS;
}

API cuCtxPopCurrent_v2(void** context) {
    if (contexts().empty()) return INVALID_CONTEXT;
    if (context) *context = contexts().back();
    contexts().pop_back();
    return SUCCESS;
}

API cuCtxGetDevice(int* handle) {
    if (!current()) return INVALID_CONTEXT;
    if (!handle) return INVALID_VALUE;
    *handle = current()->ordinal;
    return SUCCESS;
}

API cuCtxSynchronize() {
    ENTER();
    return unsafe_call();
}

API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// Modules: an image of any kind stands for all kernels

API cuModuleLoadData(void** module, const void* image) {
    ENTER();
    if (!module || !image) return INVALID_VALUE;
    if (setting("HYWU_EMULATOR_NO_IMAGE", 0)) return NO_BINARY_FOR_GPU;
    static int any;
    *module = &any;
    return SUCCESS;
}
API cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
API cuModuleLoadFatBinary(void** module, const void* image) { return cuModuleLoadData(module, image); }

API cuModuleUnload(void* module) {
    ENTER();
    return module ? SUCCESS : INVALID_HANDLE;
}

API cuModuleGetFunction(void** function, void* module, const char* name) {
    ENTER();
    if (!function || !name) return INVALID_VALUE;
    if (!module) return INVALID_HANDLE;
    *function = find_kernel(name);
    return *function ? SUCCESS : NOT_FOUND;
}

API cuFuncSetAttribute(void* function, int attribute, int value) {
    ENTER();
    auto* kernel = static_cast<Kernel*>(function);
    if (!kernel) return INVALID_HANDLE;
    std::lock_guard lock(state);
    switch (attribute) {
    case 8: // MAX_DYNAMIC_SHARED_SIZE_BYTES
        if (value < 0 || unsigned(value) > MAX_DYNAMIC) return INVALID_VALUE;
        kernel->max_dynamic = unsigned(value);
        return SUCCESS;
    case 9: // PREFERRED_SHARED_MEMORY_CARVEOUT
        return value < -1 || value > 100 ? INVALID_VALUE : SUCCESS;
    default:
        return INVALID_VALUE;
    }
}

API cuFuncGetAttribute(int* value, int attribute, void* function) {
    ENTER();
    auto* kernel = static_cast<Kernel*>(function);
    if (!kernel) return INVALID_HANDLE;
    if (!value || attribute < 0) return INVALID_VALUE;
    std::lock_guard lock(state);
    switch (attribute) {
    case 0: *value = int(kernel->max_threads); break;
    case 4: *value = 32; break; // registers
    case 5:
    case 6: *value = 90; break; // PTX and binary version
    case 8: *value = int(kernel->max_dynamic); break;
    case 9: *value = -1; break;
    default: *value = 0;
    }
    return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t dynamic) {
    ENTER();
    auto* kernel = static_cast<Kernel*>(function);
    if (!blocks || threads < 1) return INVALID_VALUE;
    if (!kernel) return INVALID_HANDLE;
    if (unsigned(threads) > kernel->max_threads || dynamic > kernel->max_dynamic) {
        *blocks = 0;
        return SUCCESS;
    }
    int warps = (threads + 31) / 32;
    *blocks = std::min({32, 64 / warps, int((228 << 10) / (dynamic + (1 << 10)))});
    return SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* function, int threads,
                                                         size_t dynamic, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, dynamic);
}

// Launches

/// Parameters, each aligned for any type; the caller's may change after the call.
static std::shared_ptr<void*[]> copy_parameters(const Kernel& kernel, void** from) {
    constexpr size_t ALIGN = 64;
    size_t head = (kernel.parameters * sizeof(void*) + ALIGN) / ALIGN * ALIGN, bytes = head;
    for (unsigned i = 0; i < kernel.parameters; i++) bytes += (kernel.sizes[i] + ALIGN - 1) / ALIGN * ALIGN;
    auto* copy = static_cast<char*>(aligned_alloc(ALIGN, bytes));
    auto** pointers = reinterpret_cast<void**>(copy);
    char* at = copy + head;
    for (unsigned i = 0; i < kernel.parameters; i++) {
        memcpy(at, from[i], kernel.sizes[i]);
        pointers[i] = at;
        at += (kernel.sizes[i] + ALIGN - 1) / ALIGN * ALIGN;
    }
    return {pointers, [](void** p) { free(p); }};
}

static int launch(const Launch& l) {
    static const uint64_t fail_at = setting("HYWU_EMULATOR_FAIL_LAUNCH", 0);
    if (fail_at && ++launches >= fail_at) fail_device();
    if (int error = sticky()) return error;
    if (!run(l)) fail_device();
    return SUCCESS;
}

int emu::launch_work(void* function, dim3 grid, dim3 block, unsigned dynamic, void** parameters, void** extra,
                     std::function<int()>& work) {
    auto* kernel = static_cast<const Kernel*>(function);
    auto [gx, gy, gz] = grid;
    auto [bx, by, bz] = block;
    if (!kernel) return INVALID_HANDLE;
    if (!gx || !gy || !gz || gx > 2147483647u || gy > 65535 || gz > 65535) return INVALID_VALUE;
    if (!bx || !by || !bz || bx > 1024 || by > 1024 || bz > 64) return INVALID_VALUE;
    if (uint64_t(bx) * by * bz > kernel->max_threads) return INVALID_VALUE;
    if (extra || (kernel->parameters && !parameters)) return INVALID_VALUE;
    {
        std::lock_guard lock(state);
        if (dynamic > kernel->max_dynamic) return INVALID_VALUE;
    }
    auto [cx, cy, cz] = kernel->cluster;
    if (uint64_t(cx) * cy * cz > MAX_CLUSTER) return INVALID_CLUSTER;
    if (gx % cx || gy % cy || gz % cz) return INVALID_VALUE;
    if (cx * cy * cz > 1 && bx * by * bz % WARP) {
        fprintf(stderr, "emulator: kernel %s: blocks of clusters have to be of whole warps here\n", kernel->name);
        return INVALID_VALUE;
    }
    auto copies = copy_parameters(*kernel, parameters);
    Launch l{kernel, grid, block, dynamic, copies.get()};
    work = [l, copies] { return launch(l); };
    return SUCCESS;
}

API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned dynamic, void* stream_handle, void** parameters, void** extra) {
    ENTER();
    std::function<int()> work;
    int error = launch_work(function, {gx, gy, gz}, {bx, by, bz}, dynamic, parameters, extra, work);
    return error ? error : submit(stream_handle, std::move(work));
}

// Errors

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not ended in the same stream as it began"},
    {INVALID_CLUSTER, "CUDA_ERROR_INVALID_CLUSTER_SIZE", "cluster misconfiguration"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
};

API cuGetErrorName(int code, const char** name) {
    for (auto& e : ERRORS) {
        if (e.code == code) return *name = e.name, SUCCESS;
    }
    return *name = nullptr, INVALID_VALUE;
}

API cuGetErrorString(int code, const char** text) {
    for (auto& e : ERRORS) {
        if (e.code == code) return *text = e.text, SUCCESS;
    }
    return *text = nullptr, INVALID_VALUE;
}
