// Tensor maps: the driver's checks, by the documentation of cuTensorMapEncodeTiled.

#include "driver.h"
#include "hopper.h"

#include <cstdio>
#include <cstring>

namespace emu {

size_t TensorMap::box_bytes() const {
    size_t bytes = element;
    for (unsigned i = 0; i < rank; i++) bytes *= box[i];
    return bytes;
}

uint64_t TensorMap::extent() const {
    uint64_t bytes = size(0) * element;
    for (unsigned i = 1; i < rank; i++) bytes += last[i] * stride[i - 1];
    return bytes;
}

/// What the device takes and this does not.
static int unsupported(const char* what) {
    fprintf(stderr, "emulator: a tensor map with %s\n", what);
    return INVALID_VALUE;
}

} // namespace emu

using namespace emu;

API cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const uint64_t* size,
                           const uint64_t* stride, const unsigned* box, const unsigned* step, int interleave, int swizzle,
                           int promotion, int fill) {
    ENTER();
    // From CU_TENSOR_MAP_DATA_TYPE_UINT8 to TFLOAT32_FTZ; those of 4 and 6 bits are of later devices.
    constexpr uint8_t ELEMENT[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    constexpr int TYPES = sizeof ELEMENT;
    constexpr int TYPE_FLOAT16 = 6;
    if (!map || uint64_t(map) % 64) return INVALID_VALUE;
    if (type < 0 || type >= TYPES || rank < 1 || rank > 5) return INVALID_VALUE;
    if (!address || uint64_t(address) % 16) return INVALID_VALUE;
    if (!size || (rank > 1 && !stride) || !box || !step) return INVALID_VALUE;
    if (interleave < 0 || interleave > 2 || promotion < 0 || promotion > 3 || fill < 0 || fill > 1) return INVALID_VALUE;
    // From CU_TENSOR_MAP_SWIZZLE_NONE to 128B; the others are of later devices.
    constexpr uint8_t SWIZZLE[] = {0, 32, 64, 128};
    if (swizzle < 0 || swizzle > 3) return INVALID_VALUE;
    if (fill && type < TYPE_FLOAT16) return INVALID_VALUE;

    TensorMap m{};
    m.magic = TENSOR_MAP;
    m.address = uint64_t(address);
    m.rank = uint8_t(rank);
    m.element = ELEMENT[type];
    m.swizzle = SWIZZLE[swizzle];
    bool steps = false;
    for (unsigned i = 0; i < rank; i++) {
        if (size[i] < 1 || size[i] > 1ull << 32) return INVALID_VALUE;
        if (box[i] < 1 || box[i] > 256) return INVALID_VALUE;
        if (step[i] < 1 || step[i] > 8) return INVALID_VALUE;
        if (i > 0) steps |= step[i] != 1;
        m.last[i] = uint32_t(size[i] - 1);
        m.box[i] = uint16_t(box[i]);
        if (i + 1 == rank) continue;
        if (stride[i] % 16 || stride[i] >= 1ull << 40 || stride[i] < size[i]) return INVALID_VALUE;
        m.stride[i] = stride[i];
    }
    if (interleave) {
        if (rank < 3 || (interleave == 2 && (uint64_t(address) % 32 || swizzle != 1))) return INVALID_VALUE;
        return unsupported("interleaved channels is not emulated");
    }
    if (m.line() % 16) return INVALID_VALUE;
    if (m.swizzle && m.line() > m.swizzle) return INVALID_VALUE;
    if (steps) return unsupported("element strides other than 1 is not emulated");
    if (fill) return unsupported("NaN outside the tensor is not emulated");
    memset(map, 0, sizeof(CUtensorMap));
    memcpy(map, &m, sizeof m);
    return SUCCESS;
}
