// Table lookup. Backward, the positions are grouped by id, so that every row of the table is written by one block.
#ifndef Element
#include "common.cuh"
#include "reduce.cuh"

#define KERNELS "embedding/embedding.cu"
#include "instantiate.cuh"

#else  // once per element type

// out[row] = table[ids[row]], rows of `width`.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(embedding)(const Element* __restrict__ table, const uint32_t* __restrict__ ids, Element* __restrict__ out, int width,
                      uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, width)) return;
    float v[PACK<Element>];
    load(v, table + int64_t(ids[p.row]) * width + p.column, p.count);
    store(out + int64_t(p.row) * width + p.column, v, p.count);
}

// sum[ids[g]] = the sum of grad[positions[i]] over starts[g] <= i < starts[g + 1]. Grid (ids, columns).
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(embedding_gradient)(const Element* __restrict__ grad, const uint32_t* __restrict__ ids, const int* __restrict__ starts,
                               const int* __restrict__ positions, Element* __restrict__ sum, int width, int lanes) {
    int group = blockIdx.x;
    Element* out = sum + int64_t(ids[group]) * width;
    pack_sums<Element, 1>(
        starts[group], starts[group + 1], blockIdx.y, width, lanes,
        [=](float(&s)[1][PACK<Element>], int row, int column, int count) {
            float v[PACK<Element>];
            load(v, grad + int64_t(positions[row]) * width + column, count);
#pragma unroll
            for (int i = 0; i < PACK<Element>; i++) s[0][i] += v[i];
        },
        [=](int, int column, float total) { out[column] = from_float<Element>(total); });
}

#endif
