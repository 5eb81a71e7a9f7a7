// Cutting a canvas into tiles, and blending them to a canvas again. Memory-bound; neighbouring threads take neighbouring elements. The
// sums are rounded operation by operation as on the CPU (the intrinsics are never contracted to an FMA), so the bits are the same.
#include "common.cuh"

// Side of the cells of the canvas that each have a list of the tiles that meet them; the launcher's constant.
constexpr int CELL = 64;

// Tiles [n, size, size, channels] of field [height, width, channels]; at: (y, x) of each. A row of a tile is `length` elements.
extern "C" __global__ void __launch_bounds__(BLOCK)
    gather_tiles(const float* field, const int* at, float* out, int size, int channels, int width, int length, uint32_t rows) {
    Place p;
    if (!row_place<float>(p, rows, length)) return;
    uint32_t tile = p.row / uint32_t(size);
    int y = at[2 * tile] + int(p.row - tile * size), x = at[2 * tile + 1];
    float v[4];
    load(v, field + (int64_t(y) * width + x) * channels + p.column, p.count);
    store(out + int64_t(p.row) * length + p.column, v, p.count);
}

// out[tile, y, x] = (down[top + y], across[left + x]).
extern "C" __global__ void __launch_bounds__(BLOCK)
    tile_positions(const float* down, const float* across, const int* at, float2* out, int size, uint32_t rows) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, row = i / uint32_t(size);
    if (row >= rows) return;
    uint32_t tile = row / uint32_t(size);
    int y = int(row - tile * size), x = int(i - row * size);
    out[i] = make_float2(down[at[2 * tile] + y], across[at[2 * tile + 1] + x]);
}

// Weight of row (or column) i of a tile: a ramp that falls to its edges.
__device__ __forceinline__ float ramp(int i, int size) { return float(min(i + 1, size - i)); }

// Weighted mean of the tiles over every element of a canvas whose rows are `length` = width * channels. entries[starts[cell]] .. are
// the (tile, y, x) that meet a cell, in the order of the tiles.
extern "C" __global__ void __launch_bounds__(BLOCK)
    tile_blend(const float* tiles, const int* starts, const int* entries, float* out, int size, int channels, int length,
               int cells_across, uint32_t rows) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, row = i / uint32_t(length);
    if (row >= rows) return;
    int y = int(row), column = int(i - row * length), x = column / channels, channel = column - x * channels;
    int cell = y / CELL * cells_across + x / CELL, end = starts[cell + 1];
    float sum = 0.0f, weight = 0.0f;
    for (int k = starts[cell]; k < end; k++) {
        int dy = y - entries[3 * k + 1], dx = x - entries[3 * k + 2];
        if (dy < 0 || dy >= size || dx < 0 || dx >= size) continue;
        int64_t pixel = (int64_t(entries[3 * k]) * size + dy) * size + dx;
        float w = __fmul_rn(ramp(dy, size), ramp(dx, size));
        weight = __fadd_rn(weight, w);
        sum = __fadd_rn(sum, __fmul_rn(w, tiles[pixel * channels + channel]));
    }
    out[i] = __fdiv_rn(sum, weight);
}

// sum[at + row * stride + column] += down[row] * across[column / channels] * part[row, column]; rows of `length`.
extern "C" __global__ void __launch_bounds__(BLOCK)
    add_tents(float* sum, int64_t at, int64_t stride, const float* part, const float* down, const float* across, int channels,
              int length, uint32_t rows) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, row = i / uint32_t(length);
    if (row >= rows) return;
    int column = int(i - row * length);
    float* place = sum + at + int64_t(row) * stride + column;
    *place = __fadd_rn(*place, __fmul_rn(__fmul_rn(down[row], across[column / channels]), part[i]));
}
