// A batch of matrix products, what the kernels of low_rank_linear compute: for every entry of the batch
//     out = alpha * (A B + A2 B2) + bias,
// the second term (a low-rank update: a few more steps of the same sum) and the bias being optional. All matrices are row-major. Each
// side of a term lies either along k (its rows are rows of A, or columns of B: k is contiguous) or across it (every line is one k).
#pragma once

#include "common.cuh"

// Where one side of a term lies: entry b starts at element b * stride (0: one matrix serves all), a line has `pitch` elements. `aligned`:
// every line is whole packs of 16 bytes and starts at one.
struct Side {
    int64_t stride;
    int pitch, aligned;
};

// The numbers of a launch, as the launcher builds them (no padding). Grid (tiles, batch, splits); split s takes the steps
// s * split_steps .. of DEPTH each, those of the first term first.
struct Sizes {
    Side a, b, a2, b2;
    int m, n, k, k2;
    float alpha;
    int split_steps;
};

// Where a block works: its tile's first row and column, its steps.
struct Work {
    int row, column, first, last;
};

constexpr __device__ int ceil_div(int n, int d) { return (n + d - 1) / d; }

// Blocks that run together share rows and columns: the tiles are numbered down bands of 8 rows of tiles, so that what they read
// stays in the second-level cache.
template <int TILE, int DEPTH>
__device__ __forceinline__ Work work(const Sizes& s) {
    constexpr int BAND = 8;
    int rows = ceil_div(s.m, TILE), columns = ceil_div(s.n, TILE);
    int band = int(blockIdx.x) / (BAND * columns), within = int(blockIdx.x) % (BAND * columns);
    int height = min(BAND, rows - band * BAND);
    Work w;
    w.row = (band * BAND + within % height) * TILE;
    w.column = within / height * TILE;
    int steps = ceil_div(s.k, DEPTH) + ceil_div(s.k2, DEPTH);
    w.first = int(blockIdx.z) * s.split_steps;
    w.last = min(steps, w.first + s.split_steps);
    return w;
}

// One side of the term that a step belongs to, and the first k of the step within the term.
template <class T>
struct Source {
    const T* data;
    int pitch, k, k0;
    bool aligned;
};

template <class T, int DEPTH>
__device__ __forceinline__ Source<T> source(const T* x, const Side& side, const T* x2, const Side& side2, const Sizes& s,
                                            int step) {
    int steps = ceil_div(s.k, DEPTH);
    bool second = step >= steps;
    const T* data = second ? x2 : x;
    int64_t stride = second ? side2.stride : side.stride;
    Source<T> from;
    from.data = data + blockIdx.y * stride;
    from.pitch = second ? side2.pitch : side.pitch;
    from.aligned = second ? side2.aligned : side.aligned;
    from.k = second ? s.k2 : s.k;
    from.k0 = (second ? step - steps : step) * DEPTH;
    return from;
}

// A chunk of 16 bytes of a tile: where it starts, and how many of its elements are inside the matrix (none: `from` may be anywhere).
template <class T>
struct Chunk {
    const T* from;
    int count;
};

// `line` and `at` count within the tile, whose first row is `row` of `rows`.
template <bool ALONG_K, class T>
__device__ __forceinline__ Chunk<T> chunk(const Source<T>& source, int row, int rows, int line, int at) {
    line += ALONG_K ? row : source.k0;
    at += ALONG_K ? source.k0 : row;
    int lines = ALONG_K ? rows : source.k, length = ALONG_K ? source.k : rows;
    int count = line < lines ? min(PACK<T>, length - at) : 0;
    // Outside of the matrix nothing is read; the address still has to be one.
    if (count <= 0) return {source.data, 0};
    return {source.data + int64_t(line) * source.pitch + at, count};
}
