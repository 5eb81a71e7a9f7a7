// QK norm and rotation of queries in shared memory, where the copy engine has put them: they are read once, so this saves writing them to
// the device's memory and reading them again.
#pragma once

#include "attention/boxes.cuh"
#include "attention/rows.cuh"

namespace warpgroup {

// A row's change, of `channels` in boxes of 64 rows; `first`: the number of the first row in its entry, which has `count`. By the threads
// of a warpgroup: neighbours share a row, 8 channels each, so that its angles are read in one piece.
template <int WIDTH, int BOX>
__device__ __forceinline__ void change_queries(unsigned char* queries, const Change& change, int channels, int first, int count) {
    constexpr int LANES = WIDTH <= 64 ? 8 : 16, ROWS = 64, STEP = 128 / LANES;
    int lane = threadIdx.x % LANES, there = lane < WIDTH / 8 ? max(min(channels - 8 * lane, 8), 0) : 0;
    float w[8] = {};
    if (change.weight) load(w, static_cast<const bf16*>(change.weight) + 8 * lane, there);
#pragma unroll
    for (int row = threadIdx.x % 128 / LANES; row < ROWS; row += STEP) {
        uint4* at = reinterpret_cast<uint4*>(queries + chunk_place(row, lane, BOX));
        float x[8] = {}, cos[4] = {}, sin[4] = {};
        int token = first + row;
        bool turned = change.cos && token < count;
        if (turned) {
            int64_t angles = int64_t(token) * (channels / 2) + 4 * lane;
            load_angles<bf16>(cos, change.cos + angles, there, channels % 8 == 0);
            load_angles<bf16>(sin, change.sin + angles, there, channels % 8 == 0);
        }
        if (there > 0) widen(*at, x);
        if (change.weight) {
            float squares = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) squares = fmaf(x[i], x[i], squares);
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
            float factor = 1.0f / sqrtf(squares / channels + NORM_EPS);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= w[i] * factor;
        }
        if (turned) {
#pragma unroll
            for (int i = 0; i < 8; i += 2) {
                float a = x[i], b = x[i + 1];
                x[i] = cos[i / 2] * a - sin[i / 2] * b;
                x[i + 1] = sin[i / 2] * a + cos[i / 2] * b;
            }
        }
        if (there > 0) *at = narrow(x);
    }
}

} // namespace warpgroup
