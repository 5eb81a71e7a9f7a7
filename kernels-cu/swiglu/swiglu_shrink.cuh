// SwiGLU that also gives S = scale * Y A^T of its result Y (see low_rank_linear/shrink.cuh): what is written is multiplied at once. So S costs
// no reading of Y. Rows are whole packs.
#pragma once

#include "activation.cuh"
#include "low_rank_linear/shrink.cuh"

// The operand of shrink::sums that computes the activation of rows [up | gate] and writes it.
struct Gated {
    struct Loaded {
        uint4 up, gate;
    };
    shrink::Plain<1, true> up;
    bf16* out; // the lane's first row

    __device__ __forceinline__ Loaded load(int i, int column) const {
        const bf16* p = up.x + (i * up.step + column);
        int rest = up.rest(i, column);
        return {shrink::words<true>(p, rest), shrink::words<true>(p + up.k, rest)};
    }
    __device__ __forceinline__ uint4 take(const Loaded& loaded, int i, int column) const {
        if (up.rest(i, column) <= 0) return make_uint4(0, 0, 0, 0);
        float u[8], g[8];
        widen(loaded.up, u);
        widen(loaded.gate, g);
        gate<bf16>(u, g);
        uint4 q = narrow(u);
        *reinterpret_cast<uint4*>(out + (i * 8 * up.k + column)) = q;
        return q;
    }
};

template <int N>
__device__ __forceinline__ void swiglu_shrink(const bf16* x, bf16* out, const bf16* a, bf16* s, const shrink::Sizes& z) {
    shrink::Window w = shrink::window<16>(z, blockIdx.x);
    float sum[1][N][4] = {};
    if (!w.empty()) {
        int64_t first = w.row + int(threadIdx.x) % WARP / 4;
        Gated gated = {shrink::Plain<1, true>(x, w, z.k, 2 * z.k, 0), out + first * z.k};
        shrink::sums<1, N, true>(sum, gated, a, w, z);
    }
    shrink::store_sums(sum, s, w, z);
}
