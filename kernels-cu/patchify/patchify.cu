// Images to patches and back: both exchange two axes of runs of pixels that stay together.
#ifndef Element
#include "common.cuh"

#define KERNELS "patchify/patchify.cu"
#include "instantiate.cuh"

#else  // once per element type

// out[a][i][j] = x[a][j][i]: runs of `length` elements, i below m and j below n, `runs` in all.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(exchange_runs)(const Element* __restrict__ x, Element* __restrict__ out, int m, int n, int length, uint32_t runs) {
    Place p;
    if (!row_place<Element>(p, runs, length)) return;
    uint32_t line = p.row / uint32_t(n), j = p.row - line * n, a = line / uint32_t(m), i = line - a * m;
    int64_t from = (int64_t(a) * n + j) * m + i;
    float v[PACK<Element>];
    load(v, x + from * length + p.column, p.count);
    store(out + int64_t(p.row) * length + p.column, v, p.count);
}

#endif
