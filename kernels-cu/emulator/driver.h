// The objects of the emulated driver, and what its parts share. Work is done at once, in the calling thread,
// unless a stream is capturing.
#pragma once

#include "scheduler.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

// An entry point. The library's symbols are hidden otherwise.
#define API extern "C" __attribute__((visibility("default"))) int

namespace emu {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_WRONG_THREAD = 908,
    INVALID_CLUSTER = 912,
};

/// A device, its primary context and its memory pool: the handles of all three point here.
struct Device {
    int ordinal = 0;
    uint64_t used = 0, high = 0, release_threshold = 0;
};

/// What a capture recorded, or what was put together node by node.
struct Graph {
    std::vector<std::function<int()>> nodes;
    /// Device memory that the capture allocated.
    std::vector<uint64_t> memory;
    ~Graph();
};

struct Capture {
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
    int mode = 0;
    uintptr_t thread = 0;
    bool invalid = false;
};

struct Stream {
    Device* device;
    int priority;
    std::shared_ptr<Capture> capture;
    bool origin = false;
    /// Held while work runs, which several host threads may ask for: a stream does one thing after the other.
    std::shared_ptr<std::mutex> order = std::make_shared<std::mutex>();
};

/// Guards all bookkeeping; not held while kernels run.
extern std::recursive_mutex state;

uintptr_t this_thread();
/// The device whose context is current, or null.
Device* current();
Device* device(int ordinal);
/// What every call gives after a launch failed; 0 before.
int sticky();
void fail_device();
/// Null for a handle that is none; null streams give `default_stream`.
Stream* stream(void* handle);
/// Marks captures that this thread may not disturb as invalid: CAPTURE_UNSUPPORTED if there are any.
int unsafe_call();
/// Does the work now, or records it.
int submit(void* stream_handle, std::function<int()> work);
int free_memory(uint64_t address);
/// The work of a launch, a copy or a fill, after the driver's checks.
int launch_work(void* function, dim3 grid, dim3 block, unsigned dynamic, void** parameters, void** extra,
                std::function<int()>& work);
int copy_work(uint64_t to, bool to_device, uint64_t from, bool from_device, size_t bytes,
              std::function<int()>& work);
int clear_work(uint64_t to, unsigned char value, size_t bytes, std::function<int()>& work);
uint64_t total_memory();

} // namespace emu

// How an entry point that needs a context begins.
#define ENTER()                                                                                           \
    if (int error = emu::sticky()) return error;                                                          \
    if (!emu::current()) return emu::INVALID_CONTEXT
