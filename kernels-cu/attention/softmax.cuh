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

struct Softmax {
    // The largest score, and the sum of the weights that this thread has seen; what the sums before are to be multiplied with.
    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, before[2];

    // What the weights refer to. With scores of minus infinity alone, any finite number gives weights of 0. It is a rounded product, and
    // the same wherever it is used: a difference of it to itself in a fused multiply-add would be of its rounding.
    static __device__ __forceinline__ float reference(float most, float scale) {
        return most == -INFINITY ? 0.0f : __fmul_rn(most, scale);
    }
    // Replaces the scores by weights, 2^(scale (score - largest)).
    template <int N>
    __device__ __forceinline__ void weigh(float (&scores)[N], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Maxima ignore NaN; the exponentials and with them the sums do not.
            float largest = -INFINITY;
#pragma unroll
            for (int i = 2 * r; i < N; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = fmaxf(fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2)), most[r]);
            float to = reference(largest, scale);
            before[r] = most[r] == -INFINITY ? 0.0f : hopper::exp2_approximate(reference(most[r], scale) - to);
            most[r] = largest;
            // Two sums, as one would wait for itself.
            float here[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 2 * r; i < N; i += 4)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    scores[i + j] = hopper::exp2_approximate(fmaf(scores[i + j], scale, -to));
                    here[j] += scores[i + j];
                }
            sum[r] = fmaf(sum[r], before[r], here[0] + here[1]);
        }
    }
    template <int N>
    __device__ __forceinline__ void rescale(float (&sums)[N]) const {
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
    __device__ __forceinline__ float lse(int r, float scale) const { return reference(most[r], scale) + log2f(sum[r]); }
};

} // namespace warpgroup
