// Step 1 of the ladder (README.md): what the product computes, one thread an element, nothing shared. The other steps are tensor_core.cuh
// (2) and warpgroup.cuh with one thing after the other switched on (3 to 8).
#pragma once

#include "rows.cuh"

// out = X W^T + S B^T, grid (columns / 16, rows / 16), for adapters that divide the rows evenly.
extern "C" __global__ void __launch_bounds__(256)
    ladder_1(const bf16* x, const bf16* w, const bf16* low, const bf16* b, bf16* out, Rows rows, int n, int k, int ranks) {
    int column = blockIdx.x * 16 + threadIdx.x % 16, row = blockIdx.y * 16 + threadIdx.x / 16;
    if (row >= rows.m || column >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < k; i++) sum = fmaf(to_float(x[int64_t(row) * k + i]), to_float(w[int64_t(column) * k + i]), sum);
    if (ranks) {
        Segment s = segment(rows, row / rows.each);
        low += int64_t(s.low + row - s.row) * rows.pitch, b += (int64_t(s.adapter) * n + column) * ranks;
        for (int i = 0; i < ranks; i++) sum = fmaf(to_float(low[i]), to_float(b[i]), sum);
    }
    out[int64_t(row) * n + column] = from_float<bf16>(sum);
}
