// The generator's initial grid of parameter tokens.
#ifndef Element
#include "common.cuh"

#define KERNELS "parameter_tokens/parameter_tokens.cu"
#include "instantiate.cuh"

#else  // once per element type

// out[layer][place] = hw[place] + layers[layer]: rows of `channels`, `places` of them a layer.
extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(token_grid)(const Element* __restrict__ hw, const Element* __restrict__ layers, Element* __restrict__ out, int places,
                       int channels, uint32_t rows) {
    Place p;
    if (!row_place<Element>(p, rows, channels)) return;
    uint32_t layer = p.row / uint32_t(places), place = p.row - layer * places;
    float v[PACK<Element>], l[PACK<Element>];
    load(v, hw + int64_t(place) * channels + p.column, p.count);
    load(l, layers + int64_t(layer) * channels + p.column, p.count);
#pragma unroll
    for (int i = 0; i < PACK<Element>; i++) v[i] += l[i];
    store(out + int64_t(p.row) * channels + p.column, v, p.count);
}

#endif
