// Tests of the emulated driver, with the kernels of kernels.cu. main LIBRARY --all runs every case in a
// process of its own, main LIBRARY CASE: some need another environment, some end the process.

#include "test.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

static const char* path;
void* library;
void* module;
int failures = 0;

static void add() {
    constexpr size_t n = 1000;
    Array<float> a(numbers(n)), b(numbers(n)), out(n);
    EXPECT(launch("test_add", 4, 256, 0, a.address, b.address, out.address, int64_t(n)) == 0);
    auto x = numbers(n), y = out.get();
    for (size_t i = 0; i < n; i++) EXPECT(y[i] == x[i] + x[i]);
}

struct Scale {
    float factor;
    int64_t n;
};

static void scale() {
    auto x = numbers(100);
    x[7] = NAN, x[8] = INFINITY;
    std::vector<uint16_t> half;
    for (float v : x) half.push_back(to_bf16(v));
    Array<float> a(x);
    Array<uint16_t> b(half);
    EXPECT(launch("test_scale_f32", 1, 128, 0, a.address, Scale{1.1f, 100}) == 0);
    EXPECT(launch("test_scale_bf16", 1, 128, 0, b.address, Scale{1.1f, 100}) == 0);
    auto y = a.get();
    auto z = b.get();
    for (size_t i = 0; i < x.size(); i++) {
        if (i == 7) {
            EXPECT(std::isnan(y[i]) && z[i] == 0x7fff);
            continue;
        }
        EXPECT(y[i] == x[i] * 1.1f);
        EXPECT(z[i] == to_bf16(from_bf16(half[i]) * 1.1f));
    }
}

static bool block_sum_is_right(const char* name) {
    auto x = numbers(256 * 5);
    for (auto& v : x) v = std::round(v * 4);
    Array<float> a(x), out(5);
    EXPECT(launch(name, 5, 256, 0, a.address, out.address) == 0);
    auto y = out.get();
    bool right = true;
    for (size_t b = 0; b < 5; b++) {
        float sum = 0;
        for (size_t i = 0; i < 256; i++) sum += x[b * 256 + i];
        right &= y[b] == sum;
    }
    return right;
}

static void warp() {
    constexpr size_t n = 128;
    auto x = numbers(n);
    for (auto& v : x) v = std::round(v * 4);
    Array<float> a(x), sums(n);
    Array<int64_t> scans(n);
    Array<uint32_t> ballots(n);
    EXPECT(launch("test_warp_sum", 2, 64, 0, a.address, sums.address, scans.address, ballots.address) == 0);
    auto y = sums.get();
    auto s = scans.get();
    auto b = ballots.get();
    for (size_t i = 0; i < n; i++) {
        float sum = 0;
        int64_t scan = 0;
        for (size_t j = i / 32 * 32; j < i / 32 * 32 + 32; j++) {
            sum += x[j];
            if (j <= i) scan += int64_t(j);
        }
        EXPECT(y[i] == sum && s[i] == scan && b[i] == 0x49249249u);
    }
}

/// The largest error of a 16 x 8 product, NaN if there is one.
static float mma_error(int wait) {
    constexpr int k = 64;
    std::vector<uint16_t> a, b;
    for (float v : numbers(16 * k)) a.push_back(to_bf16(v));
    for (float v : numbers(k * 8)) b.push_back(to_bf16(v + 0.5f));
    Array<uint16_t> da(a), db(b);
    Array<float> dc(16 * 8);
    constexpr unsigned shared = (16 * 16 + 16 * 8) * 2;
    EXPECT(launch("test_mma", 1, 32, shared, da.address, db.address, dc.address, k, wait) == 0);
    auto c = dc.get();
    float worst = 0;
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 8; n++) {
            float sum = 0;
            for (int i = 0; i < k; i++) {
                sum += from_bf16(a[size_t(m * k + i)]) * from_bf16(b[size_t(i * 8 + n)]);
            }
            float error = std::fabs(sum - c[size_t(m * 8 + n)]);
            if (!(error <= worst)) worst = error;
        }
    }
    return worst;
}

static void mma() {
    EXPECT(mma_error(1) < 1e-4f);
    EXPECT(!(mma_error(0) < 1e-4f)); // the wait is missed
}

static void ldmatrix() {
    std::vector<uint16_t> x(256);
    for (size_t i = 0; i < 256; i++) x[i] = uint16_t(i);
    Array<uint16_t> a(x);
    Array<uint32_t> plain(128), transposed(128);
    EXPECT(launch("test_ldmatrix", 1, 32, 512, a.address, plain.address, transposed.address) == 0);
    auto p = plain.get(), t = transposed.get();
    for (uint32_t lane = 0; lane < 32; lane++) {
        for (uint32_t m = 0; m < 4; m++) {
            uint32_t row = lane / 4, column = lane % 4 * 2, at = m * 64 + row * 8 + column;
            EXPECT(p[lane * 4 + m] == (at | (at + 1) << 16));
            uint32_t first = m * 64 + column * 8 + row;
            EXPECT(t[lane * 4 + m] == (first | (first + 8) << 16));
        }
    }
}

static void poison() {
    Array<float> out(64);
    for (float v : out.get()) EXPECT(std::isnan(v));
    EXPECT(launch("test_poison", 32, 8, 32, out.address) == 0);
    for (float v : out.get()) EXPECT(std::isnan(v));
}

static void count() {
    Array<uint32_t> counter(std::vector<uint32_t>{0});
    Array<int> out(3);
    EXPECT(launch("test_count", 100, 96, 0, counter.address, out.address) == 0);
    EXPECT(counter.get()[0] == 9600);
    EXPECT((out.get() == std::vector<int>{35, 1, 0}));
}

static void clusters() {
    Array<uint32_t> out(6 * 4 * 64);
    auto* f = function("test_cluster_index");
    void* parameters[] = {&out.address};
    void** extra = nullptr;
    auto launch = [&](unsigned x, unsigned y) {
        return call("cuLaunchKernel", f, x, y, 1u, 64u, 1u, 1u, 256u, null, &parameters[0], extra);
    };
    EXPECT(launch(5, 4) == 1 && launch(6, 3) == 1 && launch(6, 4) == 0);
    auto got = out.get();
    for (uint32_t i = 0; i < got.size(); i++) EXPECT(got[i] == i / 64 % 6 + i / 64 / 6 * 100);
}
static void cluster_shared() {
    Array<float> out(64);
    launch("test_cluster_shared", 2, 32, 0, out.address);
}

static void graph() {
    void *stream = nullptr, *graph = nullptr, *executable = nullptr;
    EXPECT(call("cuStreamCreate", &stream, 1u) == 0);
    Array<float> x(std::vector<float>(100, 1)), y(100);
    int status = -1;
    EXPECT(call("cuStreamBeginCapture_v2", stream, 1) == 0);
    EXPECT(call("cuStreamIsCapturing", stream, &status) == 0 && status == 1);
    uint64_t scratch = 0;
    EXPECT(call("cuMemAllocAsync", &scratch, size_t(400), stream) == 0);
    EXPECT(launch_on(stream, "test_scale_f32", 1, 128, 0, x.address, Scale{2, 100}) == 0);
    EXPECT(call("cuMemcpyDtoDAsync_v2", scratch, x.address, size_t(400), stream) == 0);
    EXPECT(call("cuMemcpyDtoDAsync_v2", y.address, scratch, size_t(400), stream) == 0);
    EXPECT(call("cuMemFreeAsync", scratch, stream) == 0);
    EXPECT(call("cuStreamEndCapture", stream, &graph) == 0);
    EXPECT(x.get()[0] == 1);
    EXPECT(call("cuGraphInstantiateWithFlags", &executable, graph, 0ull) == 0);
    EXPECT(call("cuGraphDestroy", graph) == 0);
    for (int i = 1; i <= 3; i++) {
        EXPECT(call("cuGraphLaunch", executable, stream) == 0);
        EXPECT(x.get()[99] == float(1 << i) && y.get()[99] == float(1 << i));
    }
    EXPECT(call("cuGraphExecDestroy", executable) == 0);
    // What a capture forbids ends it.
    EXPECT(call("cuStreamBeginCapture_v2", stream, 0) == 0);
    EXPECT(call("cuStreamSynchronize", stream) == 900);
    EXPECT(call("cuStreamEndCapture", stream, &graph) == 901);
    EXPECT(call("cuStreamSynchronize", stream) == 0);
    EXPECT(call("cuStreamDestroy_v2", stream) == 0);
    EXPECT(call("cuStreamSynchronize", stream) == 400);
}

/// A graph put together node by node: a fill, a launch and a copy.
static void nodes() {
    struct {
        void* function;
        unsigned dims[6], dynamic;
        void **parameters, **extra, *kernel, *context;
    } kernel{};
    struct {
        uint64_t to;
        size_t pitch;
        unsigned value, element;
        size_t width, height;
    } fill{};
    struct {
        struct {
            size_t xyz[4];
            int type;
            void* host;
            uint64_t device;
            void* array[2];
            size_t pitch[2];
        } from, to;
        size_t size[3];
    } copy{};
    void *graph = nullptr, *executable = nullptr, *context = nullptr, *node[3] = {};
    Array<float> x(std::vector<float>(100, 3)), y(100);
    EXPECT(call("cuCtxGetCurrent", &context) == 0 && call("cuGraphCreate", &graph, 0u) == 0);
    std::vector<float> host(100, 5);
    copy.from.type = 1, copy.from.host = host.data(), copy.to.type = 2, copy.to.device = x.address;
    copy.size[0] = 400, copy.size[1] = copy.size[2] = 1;
    fill.to = x.address, fill.element = 1, fill.width = 200, fill.height = 1;
    uint64_t address = x.address;
    Scale scale{2, 100};
    void* parameters[] = {&address, &scale};
    kernel.function = function("test_scale_f32"), kernel.parameters = parameters;
    for (int i = 0; i < 6; i++) kernel.dims[i] = i == 3 ? 128 : 1;
    auto no = static_cast<void**>(nullptr);
    EXPECT(call("cuGraphAddMemcpyNode", &node[0], graph, no, size_t(0), &copy, context) == 0);
    EXPECT(call("cuGraphAddMemsetNode", &node[1], graph, &node[0], size_t(1), &fill, context) == 0);
    EXPECT(call("cuGraphAddKernelNode_v2", &node[2], graph, &node[1], size_t(1), &kernel) == 0);
    EXPECT(call("cuGraphInstantiateWithFlags", &executable, graph, 0ull) == 0);
    EXPECT(x.get()[0] == 3);
    EXPECT(call("cuGraphLaunch", executable, null) == 0);
    EXPECT(x.get()[49] == 0 && x.get()[50] == 10);
    // The parameters were copied; others are for the next launch, and what the host holds is read anew.
    scale.factor = 3, host[99] = 7;
    EXPECT(call("cuGraphLaunch", executable, null) == 0 && x.get()[50] == 10 && x.get()[99] == 14);
    EXPECT(call("cuGraphExecKernelNodeSetParams_v2", executable, node[2], &kernel) == 0);
    EXPECT(call("cuGraphLaunch", executable, null) == 0 && x.get()[50] == 15);
    EXPECT(call("cuGraphExecKernelNodeSetParams_v2", executable, node[1], &kernel) == 1);
    copy.to.device = y.address, fill.to = x.address + 100, fill.width = 100;
    EXPECT(call("cuGraphExecMemcpyNodeSetParams", executable, node[0], &copy, context) == 0);
    EXPECT(call("cuGraphExecMemsetNodeSetParams", executable, node[1], &fill, context) == 0);
    EXPECT(call("cuGraphLaunch", executable, null) == 0);
    EXPECT(y.get()[99] == 7 && x.get()[25] == 0 && x.get()[50] == 45);
    EXPECT(call("cuGraphDestroy", graph) == 0 && call("cuGraphExecDestroy", executable) == 0);
    EXPECT(call("cuGraphLaunch", executable, null) == 1);
}

static void events() {
    void *a = nullptr, *b = nullptr;
    float ms = -1;
    EXPECT(call("cuEventCreate", &a, 0u) == 0 && call("cuEventCreate", &b, 0u) == 0);
    EXPECT(call("cuEventElapsedTime_v2", &ms, a, b) == 400);
    EXPECT(call("cuEventRecord", a, null) == 0 && call("cuEventRecord", b, null) == 0);
    EXPECT(call("cuEventElapsedTime_v2", &ms, a, b) == 0 && ms >= 0);
    EXPECT(call("cuEventQuery", a) == 0);
    EXPECT(call("cuEventDestroy_v2", a) == 0 && call("cuEventDestroy_v2", b) == 0);
}

static void limits() {
    EXPECT(launch("test_deadlock", 0, 32, 0) == 1);
    EXPECT(launch("test_deadlock", 1, 1025, 0) == 1);
    Array<float> x(1000);
    // Its bound is 256.
    EXPECT(launch("test_add", 1, 512, 0, x.address, x.address, x.address, int64_t(1000)) == 1);
    constexpr unsigned KB = 1024;
    EXPECT(launch("test_outside_shared", 1, 1, 48 * KB + 4, x.address, 48 * 256) == 1);
    EXPECT(call("cuFuncSetAttribute", function("test_outside_shared"), 8, int(227 * KB + 1)) == 1);
    EXPECT(call("cuFuncSetAttribute", function("test_outside_shared"), 8, int(227 * KB)) == 0);
    EXPECT(launch("test_outside_shared", 1, 1, 227 * KB, x.address, 227 * 256 - 1) == 0);
    EXPECT(x.get()[0] == 1);
    void* f = nullptr;
    EXPECT(call("cuModuleGetFunction", &f, module, "no_such_kernel") == 500);
    EXPECT(call("cuMemFree_v2", x.address + 4) == 1);
    EXPECT(call("cuMemsetD8Async", x.address + 1, (unsigned char)0, size_t(4000), null) == 1);
    EXPECT(call("cuMemsetD32Async", x.address, 0x3f800000u, size_t(1000), null) == 0);
    EXPECT(x.get()[999] == 1);
    size_t unused = 0, total = 0;
    EXPECT(call("cuMemGetInfo_v2", &unused, &total) == 0 && total - unused == 4000);
}

/// Host threads that launch at the same time.
static void threads() {
    std::vector<std::thread> all;
    std::atomic<int> wrong{0};
    void* context = nullptr;
    EXPECT(call("cuCtxGetCurrent", &context) == 0);
    for (int i = 0; i < 8; i++) {
        all.emplace_back([&wrong, context] {
            call("cuCtxSetCurrent", context);
            for (int n = 0; n < 50; n++) wrong += !block_sum_is_right("test_block_sum");
        });
    }
    for (auto& thread : all) thread.join();
    EXPECT(wrong == 0);
}

static void speed() {
    constexpr size_t n = 256000;
    Array<float> x(numbers(n)), y(n), sums(1000);
    for (int i = 0; i < 2; i++) { // the first time allocates the stacks
        auto start = std::chrono::steady_clock::now();
        launch("test_add", 1000, 256, 0, x.address, x.address, y.address, int64_t(n));
        auto middle = std::chrono::steady_clock::now();
        launch("test_block_sum", 1000, 256, 0, x.address, sums.address);
        auto end = std::chrono::steady_clock::now();
        if (i == 0) continue;
        using ms = std::chrono::duration<double, std::milli>;
        printf("1000 blocks of 256 threads: %.1f ms, with 9 barriers %.1f ms\n", ms(middle - start).count(),
               ms(end - middle).count());
    }
}

static void out_of_memory() { // HYWU_EMULATOR_MEMORY=1000000
    uint64_t a = 0, b = 0;
    size_t unused = 0, total = 0;
    EXPECT(call("cuMemAllocAsync", &a, size_t(600000), null) == 0);
    EXPECT(call("cuMemAllocAsync", &b, size_t(600000), null) == 2);
    EXPECT(call("cuMemGetInfo_v2", &unused, &total) == 0 && unused == 400000 && total == 1000000);
    EXPECT(call("cuMemFreeAsync", a, null) == 0);
    EXPECT(call("cuMemAllocAsync", &b, size_t(600000), null) == 0);
}

static void fail_launch() { // HYWU_EMULATOR_FAIL_LAUNCH=2
    Array<float> x(10);
    EXPECT(launch("test_scale_f32", 1, 32, 0, x.address, Scale{1, 10}) == 0);
    void* f = function("test_scale_f32");
    EXPECT(launch("test_scale_f32", 1, 32, 0, x.address, Scale{1, 10}) == 719);
    EXPECT(call("cuStreamSynchronize", null) == 719);
    EXPECT(f != nullptr);
}

static void trap() {
    EXPECT(launch("test_trap", 1, 32, 0, 0) == 0 && call("cuStreamSynchronize", null) == 0);
    EXPECT(launch("test_trap", 1, 32, 0, 1) == 0 && call("cuStreamSynchronize", null) == 719);
}

static void outside() {
    Array<float> x(10);
    launch("test_outside", 1, 1, 0, x.address, int64_t(10));
}
static void outside_shared() {
    Array<float> x(10);
    launch("test_outside_shared", 1, 1, 400, x.address, 100);
}

static void aligned() {
    Array<float> x(10);
    launch("test_misaligned", 1, 1, 0, x.address, 4);
}
static void misaligned() {
    Array<float> x(10);
    launch("test_misaligned", 1, 1, 0, x.address, 2);
}
static void missing_barrier() { exit(block_sum_is_right("test_missing_barrier") ? 0 : 3); }
static void deadlock() { launch("test_deadlock", 1, 32, 0); }
static void no_image() { exit(call("cuModuleLoadData", &module, "image")); }

static void standard() {
    for (auto test : {add, scale, warp, mma, ldmatrix, poison, count, clusters, graph, nodes, events, limits, threads}) test();
    speed();
    EXPECT(block_sum_is_right("test_block_sum"));
}

static const Cases CASES = {
    {"standard", standard},   {"missing_barrier", missing_barrier},
    {"deadlock", deadlock},   {"out_of_memory", out_of_memory},
    {"trap", trap},           {"fail_launch", fail_launch},
    {"no_image", no_image},   {"outside", outside},
    {"outside_shared", outside_shared}, {"aligned", aligned}, {"misaligned", misaligned},
    {"cluster_shared", cluster_shared},
};

/// The exit status, or minus the signal, of a case in a process of its own.
static int run(const char* name, std::vector<const char*> environment, bool quiet = false) {
    pid_t child = fork();
    if (child == 0) {
        for (const char* variable : environment) putenv(const_cast<char*>(variable));
        if (quiet && !freopen("/dev/null", "w", stderr)) _exit(1);
        execl("/proc/self/exe", "main", path, name, nullptr);
        _exit(1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static bool finds_missing_barrier() {
    for (const char* seed : {"HYWU_EMULATOR_SEED=1", "HYWU_EMULATOR_SEED=2", "HYWU_EMULATOR_SEED=3"}) {
        if (run("missing_barrier", {seed}) == 3) return true;
    }
    return false;
}

static void hopper() {
    for (const char* seed : {"HYWU_EMULATOR_SEED=0", "HYWU_EMULATOR_SEED=1", "HYWU_EMULATOR_SEED=2"}) {
        EXPECT(run("hopper", {seed}) == 0);
        // What the emulator ends the process for.
        for (const char* mistake : {"freed", "too_large", "between", "no_map", "pipeline_full", "pipeline_empty", "pipeline_bytes",
                                    "pipeline_arrivals", "pair_full", "pair_empty", "pair_exit", "no_arrival", "no_named",
                                    "no_init", "init_twice", "overwritten", "no_arrival_poll", "registers_written"}) {
            if (run(mistake, {seed}, true) != -SIGABRT) expect(false, mistake, __FILE__, __LINE__);
        }
        // Wrong numbers.
        EXPECT(run("pipeline_products", {seed}) == 3);
    }
    EXPECT(run("early_store", {}) == 0 && run("early_turns", {}) == 0 && run("pipeline_store", {}) == 3);
    EXPECT(run("pipeline_store", {"HYWU_EMULATOR_SEED=2"}) == 3);
}

int main(int count, char** arguments) {
    if (count < 2) return 2;
    path = arguments[1];
    if (count > 2 && !strcmp(arguments[2], "--all")) {
        EXPECT(run("standard", {}) == 0);
        EXPECT(run("standard", {"HYWU_EMULATOR_THREADS=1"}) == 0);
        EXPECT(run("standard", {"HYWU_EMULATOR_THREADS=7"}) == 0);
        EXPECT(run("standard", {"HYWU_EMULATOR_SEED=1"}) == 0);
        EXPECT(run("standard", {"HYWU_EMULATOR_SEED=2", "HYWU_EMULATOR_THREADS=1"}) == 0);
        EXPECT(run("out_of_memory", {"HYWU_EMULATOR_MEMORY=1000000"}) == 0);
        EXPECT(run("fail_launch", {"HYWU_EMULATOR_FAIL_LAUNCH=2"}) == 0);
        EXPECT(run("trap", {}, true) == 0);
        EXPECT(run("no_image", {"HYWU_EMULATOR_NO_IMAGE=1"}) == 209);
        EXPECT(finds_missing_barrier());
        EXPECT(run("deadlock", {}) == -SIGABRT);
        EXPECT(run("aligned", {}) == 0);
        EXPECT(run("misaligned", {}, true) != 0);
        EXPECT(run("cluster_shared", {}, true) == -SIGABRT);
        EXPECT(run("hopper_speed", {}) == 0);
        hopper();
    } else if (count > 2 && !strcmp(arguments[2], "--asan")) {
        EXPECT(run("standard", {}) == 0);
        EXPECT(run("standard", {"HYWU_EMULATOR_SEED=5"}) == 0);
        EXPECT(run("hopper", {}) == 0);
        EXPECT(run("hopper", {"HYWU_EMULATOR_SEED=5"}) == 0);
        EXPECT(run("outside", {}, true) != 0);
        EXPECT(run("outside_shared", {}, true) != 0);
    } else {
        library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        int devices = 0;
        void* context = nullptr;
        EXPECT(call("cuInit", 0u) == 0);
        EXPECT(call("cuDeviceGetCount", &devices) == 0 && devices == 1);
        EXPECT(call("cuDevicePrimaryCtxRetain", &context, 0) == 0);
        EXPECT(call("cuCtxSetCurrent", context) == 0);
        const std::string name = count > 2 ? arguments[2] : "standard";
        if (name != "no_image") EXPECT(call("cuModuleLoadData", &module, "image") == 0);
        (CASES.count(name) ? CASES : HOPPER_CASES).at(name)();
    }
    if (!failures && count > 2 && arguments[2][0] == '-') printf("the emulator works (%s)\n", arguments[2]);
    return failures != 0;
}
