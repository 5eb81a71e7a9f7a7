// The running softmax over tiles of scores that lie in the accumulators of wgmma: a thread has two rows, g and g + 8 of its warp, and
// with t == lane % 4 the columns 8 j + 2 t and + 1 of each. Exponents are of base 2.
#pragma once

#include "hopper.cuh"

namespace warpgroup {

// Scores from the rows' limits on become minus infinity; `first`: the number of the tile's first key.
template <int N>
__device__ __forceinline__ void mask(float (&scores)[N], int first, const int (&limits)[2]) {
    int key = first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < N; i++)
        if (key + i / 4 * 8 + i % 2 >= limits[i / 2 % 2]) scores[i] = -INFINITY;
}

// The exponent that a weight may have before the reference follows: 2^8 is nothing to a float, and narrowing rounds relatively.
constexpr float SLACK = 8.0f;

struct Softmax {
    // What the weights of a row refer to, the largest scaled score when it was last set; minus infinity until a key is seen. The sum of
    // the weights that this thread has seen, and what the sums so far are to be multiplied with.
    float reference[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, before[2];
    // The largest of the scores that this thread has, unscaled.
    float most[2];

    // Scores of minus infinity alone: any finite number gives them weights of 0.
    static __device__ __forceinline__ float finite(float reference) { return reference == -INFINITY ? 0.0f : reference; }

    // Looks for the largest of this thread's scores.
    template <int N>
    __device__ __forceinline__ void look(const float (&scores)[N]) {
        // Chains that don't wait for one another. Maxima ignore NaN; the exponentials and with them the sums do not.
        float chain[8];
#pragma unroll
        for (int i = 0; i < N; i++) chain[i % 8] = i < 8 ? scores[i] : fmaxf(chain[i % 8], scores[i]);
#pragma unroll
        for (int r = 0; r < 2; r++) most[r] = fmaxf(fmaxf(chain[2 * r], chain[2 * r + 1]), fmaxf(chain[2 * r + 4], chain[2 * r + 5]));
    }
    // Replaces the scores, after the look at them, by weights, 2^(scale score - reference).
    template <int N>
    __device__ __forceinline__ void weigh(float (&scores)[N], float scale) {
        float to[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], 1));
            most[r] = fmaxf(most[r], __shfl_xor_sync(0xffffffffu, most[r], 2));
            // A rounded product, and the same wherever it is used: a difference of it to itself in a fused multiply-add would be of its
            // rounding.
            float now = __fmul_rn(most[r], scale), from = reference[r];
            // Each row decides for itself; where another one of the warp moves, it is multiplied by 1.
            if (now > from + SLACK) reference[r] = now;
            before[r] = from == -INFINITY ? 0.0f : hopper::exp2_approximate(from - reference[r]);
            to[r] = finite(reference[r]);
        }
        // Two sums for a row, as one would wait for itself.
        float here[2][2] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            int r = i / 2 % 2;
            scores[i] = hopper::exp2_approximate(fmaf(scores[i], scale, -to[r]));
            here[r][i % 2] += scores[i];
        }
#pragma unroll
        for (int r = 0; r < 2; r++) sum[r] = fmaf(sum[r], before[r], here[r][0] + here[r][1]);
    }
    // Never so, but only the weights tell: a branch on it comes after them.
    __device__ __forceinline__ bool impossible() const { return fminf(sum[0], sum[1]) < 0.0f; }
    // Makes the output so far refer to the reference.
    template <int N>
    __device__ __forceinline__ void rescale(float (&sums)[N]) const {
        // Mostly no reference of the warp's rows has moved.
        if (!__any_sync(0xffffffffu, before[0] != 1.0f || before[1] != 1.0f)) return;
#pragma unroll
        for (int i = 0; i < N; i++) sums[i] *= before[i / 2 % 2];
    }
    // Adds up over the four threads that share a row.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        }
    }
    // The base-2 logarithm of the sum of 2^(scale score).
    __device__ __forceinline__ float lse(int r) const { return finite(reference[r]) + log2f(sum[r]); }
};

} // namespace warpgroup
