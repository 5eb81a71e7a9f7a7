// Matrix products over the rows of segments, what the kernels of low_rank_linear compute (see rows.cuh for how rows divide):
//     out = alpha * (A B + A2 B2) + bias,
// the second term (a low-rank update: a few more steps of the same sum) and the bias being optional. All matrices are row-major. Each
// side of a term lies either along k (its rows are rows of A, or columns of B: k is contiguous) or across it (every line is one k).
//
// A product is one of three, where an entry is a segment with a matrix of its own:
//     - A along k, over tiles of rows: the rows of the result are those of x, B is the tile's weight; then come the low-rank steps of
//       every segment that touches the tile, with A2 (S or dS) zero outside of the segment and B2 of its adapter
//     - A along k, over entries: B is the entry's, the rows of the result lie where S has them
//     - A across k, over entries: k are the entry's rows, of both sides, and the result is the entry's matrix
// The columns of the result (A across k: its rows) may be in parts, with operands that lie somewhere else for each.
#pragma once

#include "rows.cuh"

// Where one matrix lies: matrix i starts at element i * stride, what part p has of it p * part later; a line has `pitch`
// elements.
struct Side {
    int64_t stride, part;
    int pitch, flags;
};

// Every line of every part starts at a multiple of 16 bytes, and is whole packs, of which those beyond its length may be read: they are
// zero, or belong to rows and columns that nobody asks for.
constexpr int ALIGNED = 1;
// Of an entry's rows it has those where S has them.
constexpr int BANDED = 2;

// The numbers of a launch, as the launcher builds them (no padding). Grid (tiles, entries or 1, splits).
struct Sizes {
    Side a, b, a2, b2, out;
    Rows rows;
    int64_t plane;             // elements of the result
    int m, n;                  // rows (A across k) and columns of a part of the result
    int k, k2;                 // of the terms; A across k: k are the entry's rows
    int parts, over_entries;
    int bias;                  // elements from one weight's bias to the next
    // Parts that the sum over k is cut into. A along k: of so many elements each (0: one part). A across k: at most so many parts, of at
    // least `least` elements each.
    int split, least;
    float alpha;
};

// Where a block works. `height` and `width` are the rows and columns of its tile that there are.
template <class T>
struct Work {
    const T *a, *b;            // the first term, where the tile starts, at k = 0
    int row, height;           // `row` of x (A along k)
    int column, width;
    int part, index;           // of the columns; of the weight or adapter
    int segment;               // the first that touches the tile
    int k, first, last;        // of the first term; the block's steps of DEPTH, those of the second term after those of the first
    int64_t out;               // element of the result
};

constexpr __device__ int ceil_div(int n, int d) { return (n + d - 1) / d; }

// Blocks that run together share rows and columns: the tiles are numbered down groups of 8 rows of tiles, so that what they read stays
// in the second-level cache. False: there is no work, as entries have fewer rows than the longest.
template <bool A_ALONG_K, bool B_ALONG_K, int TILE, int DEPTH, class T>
__device__ __forceinline__ bool work(Work<T>& w, const T* a, const T* b, const Sizes& s) {
    constexpr int GROUP = 8;
    int across = ceil_div(s.n, TILE), columns = s.parts * across, rows = int(gridDim.x) / columns;
    int group = int(blockIdx.x) / (GROUP * columns), within = int(blockIdx.x) % (GROUP * columns);
    int deep = min(GROUP, rows - group * GROUP);
    int tile = group * GROUP + within % deep, column = within / deep;
    w.part = column / across;
    w.column = column % across * TILE;
    w.width = min(TILE, s.n - w.column);

    // Lines of A, B and the result before the tile's first.
    int line_a, line_b = 0, line_out, segments = 0;
    w.segment = 0;
    if (A_ALONG_K && !s.over_entries) {
        RowTile t = row_tile<TILE>(s.rows, tile);
        line_a = line_out = w.row = t.row;
        w.height = t.end - t.row;
        w.index = t.weight;
        w.segment = t.first;
        segments = t.last - t.first;
        w.k = s.k;
    } else {
        Segment entry = segment(s.rows, int(blockIdx.y));
        int from = tile * TILE;
        w.index = entry.adapter;
        w.row = entry.row + from;
        if (A_ALONG_K) {
            w.height = min(TILE, entry.rows - from);
            w.k = s.k;
            line_a = w.row;
            line_out = entry.low + from;
        } else {
            w.height = min(TILE, s.m - from);
            w.k = entry.rows;
            line_a = s.a.flags & BANDED ? entry.low : entry.row;
            line_b = s.b.flags & BANDED ? entry.low : entry.row;
            line_out = from;
        }
        if (!A_ALONG_K) a += from;
    }
    if (B_ALONG_K) line_b = w.column;
    w.a = a + w.part * s.a.part + int64_t(line_a) * s.a.pitch;
    w.b = b + w.index * s.b.stride + w.part * s.b.part + int64_t(line_b) * s.b.pitch + (B_ALONG_K ? 0 : w.column);
    w.out = w.index * s.out.stride + w.part * s.out.part + int64_t(line_out) * s.out.pitch + w.column;

    // Parts of a sum are whole steps of any depth.
    constexpr int UNIT = 32;
    int steps = ceil_div(w.k, DEPTH) + segments * ceil_div(s.k2, DEPTH), length = s.split;
    if (!A_ALONG_K) {
        int splits = min(s.split, max(1, w.k / s.least));
        length = ceil_div(ceil_div(w.k, UNIT), splits) * UNIT;
    }
    w.first = int(blockIdx.z) * (length / DEPTH);
    w.last = length == 0 ? steps : min(steps, w.first + length / DEPTH);
    return w.height > 0;
}

// One side of the term that a step belongs to: data is where the tile starts, at k = 0; of the tile's rows (or columns) it has those in
// [low, high), of k those below `k`; the step starts at k0.
template <class T>
struct Source {
    const T* data;
    int pitch, low, high, k, k0;
    bool aligned;
};

template <bool A_ALONG_K, bool B_ALONG_K, int DEPTH, class T>
__device__ __forceinline__ void sources(Source<T>& a, Source<T>& b, const Work<T>& w, const T* a2, const T* b2, const Sizes& s,
                                        int step) {
    int steps = ceil_div(w.k, DEPTH);
    if (!A_ALONG_K || step < steps) {
        a = {w.a, s.a.pitch, 0, w.height, w.k, step * DEPTH, (s.a.flags & ALIGNED) != 0};
        b = {w.b, s.b.pitch, 0, w.width, w.k, step * DEPTH, (s.b.flags & ALIGNED) != 0};
        return;
    }
    int each = ceil_div(s.k2, DEPTH), at = step - steps, k0 = at % each * DEPTH;
    Segment seg = segment(s.rows, w.segment + at / each);
    // Where S has the tile's first row if the segment has that, too; the others are not read.
    a.data = a2 + w.part * s.a2.part + int64_t(seg.low + w.row - seg.row) * s.a2.pitch;
    a.low = seg.row - w.row;
    a.high = min(w.height, seg.row + seg.rows - w.row);
    a.pitch = s.a2.pitch, a.k = s.k2, a.k0 = k0, a.aligned = s.a2.flags & ALIGNED;
    b.data = b2 + seg.adapter * s.b2.stride + w.part * s.b2.part + (B_ALONG_K ? int64_t(w.column) * s.b2.pitch : w.column);
    b.low = 0, b.high = w.width;
    b.pitch = s.b2.pitch, b.k = s.k2, b.k0 = k0, b.aligned = s.b2.flags & ALIGNED;
}

// A chunk of 16 bytes of a tile: where it starts, and how many of its elements are inside the matrix (none: `from` may be anywhere).
template <class T>
struct Chunk {
    const T* from;
    int count;
};

// `line` and `at` count within the step's tile.
template <bool ALONG_K, class T>
__device__ __forceinline__ Chunk<T> chunk(const Source<T>& source, int line, int at) {
    bool inside = ALONG_K ? line >= source.low && line < source.high : source.k0 + line < source.k;
    if (ALONG_K)
        at += source.k0;
    else
        line += source.k0;
    int count = inside ? min(PACK<T>, (ALONG_K ? source.k : source.high) - at) : 0;
    // Outside of the matrix nothing is read; the address still has to be one.
    if (count <= 0) return {source.data, 0};
    return {source.data + int64_t(line) * source.pitch + at, count};
}
