// The emulated driver's streams, events and graphs.

#include "driver.h"

#include <algorithm>
#include <chrono>
#include <set>

namespace emu {

struct Event {
    unsigned flags;
    double milliseconds = -1;
    std::shared_ptr<Capture> capture = nullptr;
};

struct Executable {
    std::shared_ptr<Graph> graph;
};

/// The handles that are valid.
template <class T>
static std::set<void*>& live() {
    static auto* set = new std::set<void*>;
    return *set;
}
template <class T>
T* find(void* handle) {
    return live<T>().count(handle) ? static_cast<T*>(handle) : nullptr;
}
template <class T>
T* keep(T* made) {
    live<T>().insert(made);
    return made;
}
template <class T>
int destroy(void* handle) {
    std::lock_guard lock(state);
    if (!live<T>().erase(handle)) return INVALID_HANDLE;
    delete static_cast<T*>(handle);
    return SUCCESS;
}

Stream* stream(void* handle) {
    static auto* default_stream = new Stream{nullptr, 0, nullptr};
    // 1 and 2: the legacy and the thread's default stream.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return default_stream;
    return find<Stream>(handle);
}

int unsafe_call() {
    std::lock_guard lock(state);
    int result = SUCCESS;
    for (void* handle : live<Stream>()) {
        auto& capture = static_cast<Stream*>(handle)->capture;
        if (!capture || capture->mode == 2) continue;
        if (capture->mode == 1 && capture->thread != this_thread()) continue;
        capture->invalid = true;
        result = CAPTURE_UNSUPPORTED;
    }
    return result;
}

int submit(void* stream_handle, std::function<int()> work) {
    {
        std::lock_guard lock(state);
        Stream* s = stream(stream_handle);
        if (!s) return INVALID_HANDLE;
        if (s->capture) {
            if (s->capture->invalid) return CAPTURE_INVALIDATED;
            s->capture->graph->nodes.push_back(std::move(work));
            return SUCCESS;
        }
    }
    return work();
}

/// For a call that a capturing stream does not allow.
static int check_idle(void* handle) {
    std::lock_guard lock(state);
    Stream* s = stream(handle);
    if (!s) return INVALID_HANDLE;
    if (!s->capture) return SUCCESS;
    s->capture->invalid = true;
    return CAPTURE_UNSUPPORTED;
}

static double now() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

} // namespace emu

using namespace emu;

// Streams

API cuStreamCreateWithPriority(void** made, unsigned flags, int priority) {
    ENTER();
    if (!made || flags > 1) return INVALID_VALUE;
    std::lock_guard lock(state);
    *made = keep(new Stream{current(), std::clamp(priority, -5, 0), nullptr});
    return SUCCESS;
}
API cuStreamCreate(void** made, unsigned flags) { return cuStreamCreateWithPriority(made, flags, 0); }

API cuStreamDestroy_v2(void* handle) {
    ENTER();
    return destroy<Stream>(handle);
}

API cuStreamSynchronize(void* handle) {
    ENTER();
    return check_idle(handle);
}
API cuStreamQuery(void* handle) {
    ENTER();
    return check_idle(handle);
}

API cuStreamGetPriority(void* handle, int* priority) {
    ENTER();
    std::lock_guard lock(state);
    Stream* s = stream(handle);
    if (!s) return INVALID_HANDLE;
    *priority = s->priority;
    return SUCCESS;
}

API cuStreamWaitEvent(void* handle, void* event, unsigned) {
    ENTER();
    std::lock_guard lock(state);
    Stream* s = stream(handle);
    auto* e = find<Event>(event);
    if (!s || !e) return INVALID_HANDLE;
    // Waiting for what is being captured joins the capture; calls are replayed in their order.
    if (e->capture && !s->capture) {
        if (reinterpret_cast<uintptr_t>(handle) <= 2) return CAPTURE_UNSUPPORTED;
        s->capture = e->capture;
    }
    return SUCCESS;
}

// Events

API cuEventCreate(void** made, unsigned flags) {
    ENTER();
    if (!made || flags > 7) return INVALID_VALUE;
    std::lock_guard lock(state);
    *made = keep(new Event{flags});
    return SUCCESS;
}

API cuEventDestroy_v2(void* handle) {
    ENTER();
    return destroy<Event>(handle);
}

API cuEventRecord(void* handle, void* stream_handle) {
    ENTER();
    std::lock_guard lock(state);
    auto* e = find<Event>(handle);
    Stream* s = stream(stream_handle);
    if (!e || !s) return INVALID_HANDLE;
    e->capture = s->capture;
    if (!s->capture) e->milliseconds = now();
    return SUCCESS;
}

static int wait(void* handle) {
    if (int error = unsafe_call()) return error;
    std::lock_guard lock(state);
    auto* e = find<Event>(handle);
    if (!e) return INVALID_HANDLE;
    return e->capture ? CAPTURE_UNSUPPORTED : SUCCESS;
}
API cuEventSynchronize(void* handle) {
    ENTER();
    return wait(handle);
}
API cuEventQuery(void* handle) {
    ENTER();
    return wait(handle);
}

API cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    ENTER();
    std::lock_guard lock(state);
    auto *a = find<Event>(start), *b = find<Event>(end);
    if (!milliseconds) return INVALID_VALUE;
    if (!a || !b || a->milliseconds < 0 || b->milliseconds < 0) return INVALID_HANDLE;
    // 2: made without a time.
    if ((a->flags | b->flags) & 2) return INVALID_HANDLE;
    *milliseconds = float(b->milliseconds - a->milliseconds);
    return SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

// Capture

API cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER();
    std::lock_guard lock(state);
    Stream* s = stream(handle);
    if (!s) return INVALID_HANDLE;
    if (mode < 0 || mode > 2) return INVALID_VALUE;
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return CAPTURE_UNSUPPORTED;
    if (s->capture) return ILLEGAL_STATE;
    s->capture = std::make_shared<Capture>();
    s->capture->mode = mode;
    s->capture->thread = this_thread();
    s->origin = true;
    return SUCCESS;
}

API cuStreamEndCapture(void* handle, void** graph) {
    ENTER();
    std::lock_guard lock(state);
    Stream* s = stream(handle);
    if (!s) return INVALID_HANDLE;
    if (!graph) return INVALID_VALUE;
    *graph = nullptr;
    if (!s->capture) return ILLEGAL_STATE;
    if (!s->origin) return CAPTURE_UNMATCHED;
    auto capture = s->capture;
    if (capture->mode != 2 && capture->thread != this_thread()) return CAPTURE_WRONG_THREAD;
    s->origin = false;
    for (void* other : live<Stream>()) {
        auto& theirs = static_cast<Stream*>(other)->capture;
        if (theirs == capture) theirs = nullptr;
    }
    for (void* event : live<Event>()) {
        auto& theirs = static_cast<Event*>(event)->capture;
        if (theirs == capture) theirs = nullptr;
    }
    if (capture->invalid) return CAPTURE_INVALIDATED;
    *graph = keep(new Executable{capture->graph});
    return SUCCESS;
}

API cuStreamIsCapturing(void* handle, int* status) {
    ENTER();
    std::lock_guard lock(state);
    Stream* s = stream(handle);
    if (!s) return INVALID_HANDLE;
    if (!status) return INVALID_VALUE;
    *status = !s->capture ? 0 : s->capture->invalid ? 2 : 1;
    return SUCCESS;
}

// Graphs: a graph and its executable form are the same here

API cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
    ENTER();
    if (!made) return INVALID_VALUE;
    std::lock_guard lock(state);
    auto* from = find<Executable>(graph);
    if (!from) return INVALID_VALUE;
    *made = keep(new Executable{from->graph});
    return SUCCESS;
}

API cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
    ENTER();
    std::lock_guard lock(state);
    auto* from = find<Executable>(graph);
    if (!from || !count) return INVALID_VALUE;
    if (!nodes) *count = from->graph->nodes.size();
    for (size_t i = 0; nodes && i < *count; i++) nodes[i] = nullptr;
    return SUCCESS;
}

API cuGraphUpload(void* executable, void*) {
    ENTER();
    std::lock_guard lock(state);
    return find<Executable>(executable) ? SUCCESS : INVALID_VALUE;
}

API cuGraphLaunch(void* executable, void* stream_handle) {
    ENTER();
    std::shared_ptr<Graph> graph;
    {
        std::lock_guard lock(state);
        auto* e = find<Executable>(executable);
        if (!e) return INVALID_VALUE;
        graph = e->graph;
    }
    return submit(stream_handle, [graph] {
        for (auto& node : graph->nodes) {
            if (int error = node()) return error;
        }
        return int(SUCCESS);
    });
}

API cuGraphExecDestroy(void* executable) {
    ENTER();
    return destroy<Executable>(executable) ? INVALID_VALUE : SUCCESS;
}
API cuGraphDestroy(void* graph) {
    ENTER();
    return destroy<Executable>(graph) ? INVALID_VALUE : SUCCESS;
}
