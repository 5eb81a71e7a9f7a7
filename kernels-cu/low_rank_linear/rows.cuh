// How the rows of a product divide: tiles lie within the rows of one weight, and every tile knows whose adapters touch it.
//
// The rows of an instance are contiguous. A tile may hold rows of several instances: it then takes the low-rank steps of each, and S is
// zero outside of an instance's own rows. So a small instance costs a few more steps of k, not a tile of its own.
#pragma once

#include "common.cuh"

// S = X A^T keeps BAND rows of zeros before, between and behind the instances: a box of S that starts up to BAND rows before an
// instance's first row, or ends up to BAND rows behind its last, holds that instance's rows and zeros.
constexpr int BAND = 128;

// Rows [row, end) have one weight; segments [first, last) are those with an adapter that have rows among them.
struct RowTile {
    int row, end, weight, first, last;
};

// Rows [row, row + rows) have this adapter; `low` is the first of them in S.
struct Segment {
    int row, rows, adapter, low;
};

// As the launcher passes it (no padding). Without tables: `m` rows of one weight, adapter i has the rows from i * each on (each == 0: there
// are no adapters). `count`: tiles. `pitch`: elements in a row of S.
struct Rows {
    const RowTile* tiles;
    const Segment* segments;
    int m, each, count, pitch;
};

template <int HEIGHT>
__device__ __forceinline__ RowTile row_tile(const Rows& rows, int i) {
    if (rows.tiles) return rows.tiles[i];
    int row = i * HEIGHT, end = min(row + HEIGHT, rows.m);
    return {row, end, 0, rows.each ? row / rows.each : 0, rows.each ? (end - 1) / rows.each + 1 : 0};
}

__device__ __forceinline__ Segment segment(const Rows& rows, int i) {
    if (rows.segments) return rows.segments[i];
    return {i * rows.each, rows.each, i, i * (rows.each + BAND) + BAND};
}
