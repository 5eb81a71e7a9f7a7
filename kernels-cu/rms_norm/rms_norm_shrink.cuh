// RMSNorm that also gives S = scale * Y A^T of its result Y: a block takes 16 rows (see low_rank_linear/shrink.cuh), sums their squares, and
// reads them again, from L1 or L2, to write Y and to multiply what it has written. So S costs no reading of Y. Rows are whole packs.
#pragma once

#include "low_rank_linear/shrink.cuh"
#include "norm.cuh"
#include "reduce.cuh"

// The sums of squares of two rows by one warp, as `threads` threads of rms_norm add them up: the same parts, in the same order. `there`
// says which rows there are.
__device__ __forceinline__ void warp_squares(float (&total)[2], const bf16* const (&row)[2], const bool (&there)[2], int channels,
                                             int threads) {
    constexpr int AHEAD = 4;
    int lane = threadIdx.x % WARP, step = threads * PACK<bf16>;
    float mine[2] = {};
    for (int first = 0; first < threads; first += WARP) {
        float square[2] = {};
        // Lanes beyond the threads of a narrow row have nothing.
        int start = first + lane < threads ? (first + lane) * PACK<bf16> : channels;
        for (int column = start; column < channels; column += AHEAD * step) {
            uint4 q[AHEAD][2];
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int at = column + j * step;
                    q[j][r] = shrink::words<true>(row[r] + at, there[r] ? channels - at : 0);
                }
#pragma unroll
            for (int j = 0; j < AHEAD; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float v[8];
                    widen(q[j][r], v);
#pragma unroll
                    for (int i = 0; i < 8; i++) square[r] = fmaf(v[i], v[i], square[r]);
                }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = square[r];
            for (int offset = min(threads, WARP) / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (lane == first / WARP || threads <= WARP) mine[r] = sum;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) total[r] = threads > WARP ? warp_sum(mine[r]) : __shfl_sync(0xffffffffu, mine[r], 0);
}

// The operand of shrink::sums that normalises x and writes the result.
struct Normalised {
    typedef uint4 Loaded;
    shrink::Plain<1, true> plain;
    Gains<bf16, true> gains[2];
    const bf16* shift[2];
    bf16* out; // the lane's first row
    float inverse[2];

    __device__ __forceinline__ Loaded load(int i, int column) const { return plain.load(i, column); }
    __device__ __forceinline__ uint4 take(const Loaded& loaded, int i, int column) const {
        if (plain.rest(i, column) <= 0) return make_uint4(0, 0, 0, 0);
        float v[8];
        widen(loaded, v);
        normalise(v, inverse[i], gains[i], shift[i], column, 8);
        uint4 q = narrow(v);
        *reinterpret_cast<uint4*>(out + (i * plain.step + column)) = q;
        return q;
    }
};

template <int N>
__device__ __forceinline__ void rms_norm_shrink(const bf16* x, const bf16* weight, const bf16* scale, const bf16* shift, bf16* out,
                                                const bf16* a, bf16* s, const shrink::Sizes& z, int rows_per_entry, int threads,
                                                float eps) {
    __shared__ float inverses[16];
    shrink::Window w = shrink::window<16>(z, blockIdx.x);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, channels = z.k;
    float sum[1][N][4] = {};
    if (!w.empty()) {
        const bf16* row[2] = {x + int64_t(w.row + warp) * channels, x + int64_t(w.row + warp + 8) * channels};
        bool there[2] = {w.inside(warp), w.inside(warp + 8)};
        float squares[2];
        warp_squares(squares, row, there, channels, threads);
        if (lane < 2) inverses[warp + 8 * lane] = inverse_rms(lane == 0 ? squares[0] : squares[1], channels, eps);
        __syncthreads();

        int first = w.row + lane / 4;
        auto entry = [&](int i) { return w.inside(lane / 4 + 8 * i) ? int64_t((first + 8 * i) / rows_per_entry) : 0; };
        auto of_entry = [&](const bf16* p, int i) { return p ? p + entry(i) * channels : nullptr; };
        Normalised normalised = {
            shrink::Plain<1, true>(x, w, channels, channels, 0),
            {{weight, scale, entry(0), channels}, {weight, scale, entry(1), channels}},
            {of_entry(shift, 0), of_entry(shift, 1)},
            out + int64_t(first) * channels,
            {inverses[lane / 4], inverses[lane / 4 + 8]},
        };
        shrink::sums<1, N, true>(sum, normalised, a, w, z);
    }
    shrink::store_sums(sum, s, w, z);
}
