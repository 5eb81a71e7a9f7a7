// What the tests share: calls of the library's driver, arrays on its device, launches.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <string>
#include <vector>

extern void* library;
extern void* module;
extern int failures;

inline void expect(bool ok, const char* what, const char* file, int line) {
    if (ok) return;
    fprintf(stderr, "%s:%d: %s\n", file, line, what);
    failures++;
}
#define EXPECT(X) expect(X, #X, __FILE__, __LINE__)

template <class... A>
int call(const char* name, A... arguments) {
    auto* f = reinterpret_cast<int (*)(A...)>(dlsym(library, name));
    if (!f) {
        fprintf(stderr, "no %s in the library\n", name);
        exit(1);
    }
    return f(arguments...);
}

inline void* null = nullptr;

/// An array on the device.
template <class T>
struct Array {
    uint64_t address = 0;
    size_t n;
    explicit Array(size_t n) : n(n) { EXPECT(call("cuMemAllocAsync", &address, n * sizeof(T), null) == 0); }
    explicit Array(const std::vector<T>& v) : Array(v.size()) {
        EXPECT(call("cuMemcpyHtoD_v2", address, static_cast<const void*>(v.data()), n * sizeof(T)) == 0);
    }
    ~Array() { call("cuMemFreeAsync", address, null); }
    Array(const Array&) = delete;
    std::vector<T> get() const {
        std::vector<T> v(n);
        EXPECT(call("cuMemcpyDtoH_v2", static_cast<void*>(v.data()), address, n * sizeof(T)) == 0);
        return v;
    }
};

inline void* function(const char* name) {
    void* f = nullptr;
    EXPECT(call("cuModuleGetFunction", &f, module, name) == 0);
    return f;
}

template <class... A>
int launch_on(void* stream, const char* name, unsigned grid, unsigned block, unsigned shared,
              A... arguments) {
    void* parameters[] = {&arguments..., nullptr};
    void** extra = nullptr;
    return call("cuLaunchKernel", function(name), grid, 1u, 1u, block, 1u, 1u, shared, stream,
                &parameters[0], extra);
}
template <class... A>
int launch(const char* name, unsigned grid, unsigned block, unsigned shared, A... arguments) {
    return launch_on(nullptr, name, grid, block, shared, arguments...);
}

inline float from_bf16(uint16_t v) {
    uint32_t bits = uint32_t(v) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::vector<float> numbers(size_t n) {
    std::vector<float> v(n);
    uint32_t state = 1;
    for (auto& x : v) x = float(int((state = state * 1664525u + 1013904223u) >> 16) % 1000 - 500) / 250;
    return v;
}

using Cases = std::map<std::string, void (*)()>;
/// Those of Hopper's instructions: the first is to pass with any seed.
extern const Cases HOPPER_CASES;
