// Rows of the operands by the copy engine: tensor maps of five axes, channels first, and the other four in the order of their strides, as
// the engine wants them. Boxes are lines of 64 channels of consecutive tokens of one head.
#pragma once

#include "common.cuh"
#include "hopper.cuh"

constexpr int LINE = 128;           // bytes
constexpr int LINE_CHANNELS = 64;

// Which axis of the map counts what: 1 to 4; 0: none does, as there is one only, or all are the same.
struct Axes {
    int batch0, batch1, token, head;
};

struct Coordinates {
    int batch0, batch1, token, head;

    __device__ __forceinline__ Coordinates ahead(int tokens) const { return {batch0, batch1, token + tokens, head}; }
};

__device__ __forceinline__ int coordinate(const Axes& axes, const Coordinates& at, int axis) {
    return (axes.batch0 == axis ? at.batch0 : 0) + (axes.batch1 == axis ? at.batch1 : 0) + (axes.token == axis ? at.token : 0) +
           (axes.head == axis ? at.head : 0);
}

// Loads LINES boxes, one behind the other, of `bytes` each. Channels and tokens outside the tensor are zero.
template <int LINES>
__device__ __forceinline__ void load_rows(unsigned char* to, const CUtensorMap* map, uint64_t* barrier, const Axes& axes,
                                          const Coordinates& at, int bytes) {
    int x = coordinate(axes, at, 1), y = coordinate(axes, at, 2), z = coordinate(axes, at, 3), w = coordinate(axes, at, 4);
#pragma unroll
    for (int i = 0; i < LINES; i++) hopper::load_box(to + i * bytes, map, barrier, i * LINE_CHANNELS, x, y, z, w);
}

// Where the 16 bytes of 8 channels are in boxes of `lines` tokens, with the 128-byte swizzle; boxes start at multiples of 1024 bytes.
__device__ __forceinline__ int chunk_place(int row, int chunk, int box) {
    return chunk / 8 * box + row * LINE + ((chunk % 8 ^ row % 8) << 4);
}
