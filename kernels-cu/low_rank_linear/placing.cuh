// B of the low-rank term with lines of whole packs, as the copy engine wants them, in which the ranks lie where a box of S has them (see
// first_of_s in warpgroup.cuh), with zeros elsewhere: every `width` of an adapter's n lines are a part, and the ranks of part p start at
// p * ranks % 8.
#pragma once

#include "common.cuh"

// Lines of `ranks` to lines of `pitch`, as the launcher builds it (no padding). Nothing where `from` is null.
struct Placing {
    const bf16* from;
    bf16* to;
    int64_t lines;
    int n, width, ranks, pitch;

    __device__ __forceinline__ int64_t packs() const { return lines * (pitch / PACK<bf16>); }
    // One of them.
    __device__ __forceinline__ void place(int64_t i) const {
        int64_t in_line = pitch / PACK<bf16>, line = i / in_line;
        int part = int(line % n) / width, first = int(i - line * in_line) * PACK<bf16> - part * ranks % PACK<bf16>;
        float v[PACK<bf16>];
#pragma unroll
        for (int j = 0; j < PACK<bf16>; j++)
            v[j] = uint32_t(first + j) < uint32_t(ranks) ? to_float(from[line * ranks + first + j]) : 0.0f;
        store_pack(to + i * PACK<bf16>, v);
    }
};
