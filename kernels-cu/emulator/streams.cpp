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

/// A graph as its maker holds it.
struct Handle {
    std::shared_ptr<Graph> graph;
};

/// A node of a graph that was put together; it lives as long as its graph.
struct Node {
    std::shared_ptr<Graph> graph;
    size_t index;
    enum Kind { LAUNCH, COPY, FILL } kind;
};

/// An instance has its own nodes, in the graph's order.
struct Executable {
    std::shared_ptr<Graph> graph;
    std::vector<std::function<int()>> nodes;
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
    std::shared_ptr<std::mutex> order;
    {
        std::lock_guard lock(state);
        Stream* s = stream(stream_handle);
        if (!s) return INVALID_HANDLE;
        if (s->capture) {
            if (s->capture->invalid) return CAPTURE_INVALIDATED;
            s->capture->graph->nodes.push_back(std::move(work));
            return SUCCESS;
        }
        order = s->order;
    }
    std::lock_guard hold(*order);
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
    *graph = keep(new Handle{capture->graph});
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

// Graphs: nodes run in the order in which they were added

// As in cuda.h.
struct KernelNodeParams { // CUDA_KERNEL_NODE_PARAMS_v2
    void* function;
    unsigned grid[3], block[3], dynamic;
    void **parameters, **extra;
    void *kernel, *context;
};
struct CopyEnd {
    size_t x, y, z, lod;
    int memory_type; // 1: host, 2: device
    void* host;
    uint64_t device;
    void *array, *reserved;
    size_t pitch, height;
};
struct Memcpy3D { // CUDA_MEMCPY3D
    CopyEnd from, to;
    size_t width, height, depth;
};
struct MemsetNodeParams { // CUDA_MEMSET_NODE_PARAMS
    uint64_t to;
    size_t pitch;
    unsigned value, element;
    size_t width, height;
};
static_assert(sizeof(KernelNodeParams) == 72 && sizeof(Memcpy3D) == 200 && sizeof(MemsetNodeParams) == 40);

API cuGraphCreate(void** made, unsigned flags) {
    ENTER();
    if (!made || flags) return INVALID_VALUE;
    std::lock_guard lock(state);
    *made = keep(new Handle{std::make_shared<Graph>()});
    return SUCCESS;
}

static int add_node(void** made, void* graph, void* const* before, size_t count, Node::Kind kind,
                    std::function<int()> work) {
    std::lock_guard lock(state);
    auto* to = find<Handle>(graph);
    if (!made || !to || (count && !before)) return INVALID_VALUE;
    for (size_t i = 0; i < count; i++) {
        auto* node = find<Node>(before[i]);
        if (!node || node->graph != to->graph) return INVALID_VALUE;
    }
    to->graph->nodes.push_back(std::move(work));
    *made = keep(new Node{to->graph, to->graph->nodes.size() - 1, kind});
    return SUCCESS;
}

static int kernel_work(const KernelNodeParams* p, std::function<int()>& work) {
    // A CUkernel, which stands for a function in every context, is not emulated.
    if (!p || p->kernel) return INVALID_VALUE;
    auto dims = [](const unsigned* d) { return dim3{d[0], d[1], d[2]}; };
    return launch_work(p->function, dims(p->grid), dims(p->block), p->dynamic, p->parameters, p->extra, work);
}

API cuGraphAddKernelNode_v2(void** made, void* graph, void* const* before, size_t count,
                            const KernelNodeParams* p) {
    ENTER();
    std::function<int()> work;
    int error = kernel_work(p, work);
    return error ? error : add_node(made, graph, before, count, Node::LAUNCH, std::move(work));
}

static int copy_node_work(const Memcpy3D* p, void* context, std::function<int()>& work) {
    if (!p || context != current()) return INVALID_VALUE;
    // Of one row only.
    if (!p->width || p->height != 1 || p->depth != 1) return INVALID_VALUE;
    for (auto* end : {&p->from, &p->to}) {
        if (end->memory_type != 1 && end->memory_type != 2) return INVALID_VALUE;
        if (end->y || end->z || end->lod || end->reserved) return INVALID_VALUE;
    }
    auto start = [](const CopyEnd& end) {
        return (end.memory_type == 2 ? end.device : reinterpret_cast<uint64_t>(end.host)) + end.x;
    };
    return copy_work(start(p->to), p->to.memory_type == 2, start(p->from), p->from.memory_type == 2, p->width,
                     work);
}

API cuGraphAddMemcpyNode(void** made, void* graph, void* const* before, size_t count, const Memcpy3D* p,
                         void* context) {
    ENTER();
    std::function<int()> work;
    int error = copy_node_work(p, context, work);
    return error ? error : add_node(made, graph, before, count, Node::COPY, std::move(work));
}

static int fill_node_work(const MemsetNodeParams* p, void* context, std::function<int()>& work) {
    // Of one row of bytes only.
    if (!p || context != current() || p->element != 1 || p->height != 1 || !p->width) return INVALID_VALUE;
    return clear_work(p->to, static_cast<unsigned char>(p->value), p->width, work);
}

API cuGraphAddMemsetNode(void** made, void* graph, void* const* before, size_t count,
                         const MemsetNodeParams* p, void* context) {
    ENTER();
    std::function<int()> work;
    int error = fill_node_work(p, context, work);
    return error ? error : add_node(made, graph, before, count, Node::FILL, std::move(work));
}

API cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
    ENTER();
    if (!made) return INVALID_VALUE;
    std::lock_guard lock(state);
    auto* from = find<Handle>(graph);
    if (!from) return INVALID_VALUE;
    *made = keep(new Executable{from->graph, from->graph->nodes});
    return SUCCESS;
}

static int set_node(void* executable, void* handle, Node::Kind kind, std::function<int()> work) {
    std::lock_guard lock(state);
    auto* e = find<Executable>(executable);
    auto* node = find<Node>(handle);
    if (!e || !node || node->graph != e->graph || node->kind != kind) return INVALID_VALUE;
    e->nodes[node->index] = std::move(work);
    return SUCCESS;
}

API cuGraphExecKernelNodeSetParams_v2(void* executable, void* node, const KernelNodeParams* p) {
    ENTER();
    std::function<int()> work;
    int error = kernel_work(p, work);
    return error ? error : set_node(executable, node, Node::LAUNCH, std::move(work));
}
API cuGraphExecMemcpyNodeSetParams(void* executable, void* node, const Memcpy3D* p, void* context) {
    ENTER();
    std::function<int()> work;
    int error = copy_node_work(p, context, work);
    return error ? error : set_node(executable, node, Node::COPY, std::move(work));
}
API cuGraphExecMemsetNodeSetParams(void* executable, void* node, const MemsetNodeParams* p, void* context) {
    ENTER();
    std::function<int()> work;
    int error = fill_node_work(p, context, work);
    return error ? error : set_node(executable, node, Node::FILL, std::move(work));
}

API cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
    ENTER();
    std::lock_guard lock(state);
    auto* from = find<Handle>(graph);
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
    std::shared_ptr<Executable> launched;
    {
        std::lock_guard lock(state);
        auto* e = find<Executable>(executable);
        if (!e) return INVALID_VALUE;
        // What is changed afterwards is for later launches.
        launched = std::make_shared<Executable>(*e);
    }
    return submit(stream_handle, [launched] {
        for (auto& node : launched->nodes) {
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
    std::lock_guard lock(state);
    auto* from = find<Handle>(graph);
    if (!from) return INVALID_VALUE;
    // Its nodes go with it.
    auto& nodes = live<Node>();
    for (auto it = nodes.begin(); it != nodes.end();) {
        auto* node = static_cast<Node*>(*it);
        if (node->graph != from->graph) {
            ++it;
            continue;
        }
        it = nodes.erase(it);
        delete node;
    }
    return destroy<Handle>(graph);
}
