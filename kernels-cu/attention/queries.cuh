// QK norm and rotation of queries in shared memory, where the copy engine has put them: they are read once, so this saves writing them to
// the device's memory and reading them again.
#pragma once

#include "attention/boxes.cuh"
#include "attention/rows.cuh"

namespace warpgroup {

// A row's change, of `channels` in boxes of 64 rows; `first`: the number of the first row in its entry, which has `count`. By the threads
// of a warpgroup, two for each row, which take chunks of 8 channels in turns.
template <int WIDTH, int BOX>
__device__ __forceinline__ void change_queries(unsigned char* queries, const Change& change, int channels, int first, int count) {
    int row = threadIdx.x % 128 / 2, half = threadIdx.x % 2, token = first + row;
    float factor = 1.0f;
    auto chunk = [&](int c) { return reinterpret_cast<uint4*>(queries + chunk_place(row, c, BOX)); };
    if (change.weight) {
        float squares = 0.0f;
#pragma unroll
        for (int c = half; c < WIDTH / 8; c += 2) {
            float x[8];
            widen(*chunk(c), x);
#pragma unroll
            for (int i = 0; i < 8; i++) squares = fmaf(x[i], x[i], squares);
        }
        squares += __shfl_xor_sync(0xffffffffu, squares, 1);
        factor = 1.0f / sqrtf(squares / channels + NORM_EPS);
    }
#pragma unroll
    for (int c = half; c < WIDTH / 8; c += 2) {
        int there = min(channels - 8 * c, 8);
        if (there <= 0) break;
        float x[8];
        widen(*chunk(c), x);
        if (change.weight) {
            float w[8];
            load(w, static_cast<const bf16*>(change.weight) + 8 * c, there);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= w[i] * factor;
        }
        if (change.cos && token < count) {
            int64_t angles = int64_t(token) * (channels / 2) + 4 * c;
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                if (i >= there) break;
                float cos = change.cos[angles + i / 2], sin = change.sin[angles + i / 2], a = x[i], b = x[i + 1];
                x[i] = cos * a - sin * b;
                x[i + 1] = sin * a + cos * b;
            }
        }
        *chunk(c) = narrow(x);
    }
}

} // namespace warpgroup
