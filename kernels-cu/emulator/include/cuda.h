// The language is in emulator.h, which the compiler includes by itself; here is what kernels take of the driver's.
#pragma once

#include <cstdint>

/// A description of a tensor for the copy engine, by cuTensorMapEncodeTiled.
struct alignas(64) CUtensorMap {
    uint64_t opaque[16];
};
