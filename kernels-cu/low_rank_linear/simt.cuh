// The product in true f32 (tensor cores would round to tf32): 256 threads, each a square of the tile in registers.
//
// Every element is one chain of fused multiply-adds over ascending k, whatever the tile, as in tensor_core.cuh.
#pragma once

#include "product.cuh"

namespace simt {

// A step of either tile is 1024 elements of each side: 4 a thread, 16 bytes.
template <int TILE>
constexpr int DEPTH = 1024 / TILE;
// Lines of shared memory, one per k, start 4 banks apart: the scattered stores of a side along k do not collide.
template <int TILE>
constexpr int PITCH = TILE + 4;

template <bool ALONG_K, int TILE>
struct Fetch {
    static constexpr int CHUNKS = (ALONG_K ? DEPTH<TILE> : TILE) / 4;
    float v[4];

    __device__ __forceinline__ void load(const Source<float>& source) {
        Chunk<float> c = chunk<ALONG_K>(source, int(threadIdx.x) / CHUNKS, int(threadIdx.x) % CHUNKS * 4);
        if (source.aligned && c.count > 0)
            load_pack(v, c.from);
        else
#pragma unroll
            for (int i = 0; i < 4; i++) v[i] = i < c.count ? c.from[i] : 0.0f;
    }
    __device__ __forceinline__ void store(float* stage) const {
        int line = int(threadIdx.x) / CHUNKS, at = int(threadIdx.x) % CHUNKS * 4;
        if (ALONG_K)
#pragma unroll
            for (int i = 0; i < 4; i++) stage[(at + i) * PITCH<TILE> + line] = v[i];
        else
            store_pack(stage + line * PITCH<TILE> + at, v);
    }
};

// A thread's rows and columns are groups of 4, 64 apart.
template <bool A_ALONG_K, bool B_ALONG_K, int TILE>
__device__ void product(const float* a, const float* b, const float* a2, const float* b2, float* out, const float* bias,
                        float* partial, const Sizes& s) {
    constexpr int GROUPS = TILE / 64, DEEP = DEPTH<TILE>, SIZE = DEEP * PITCH<TILE>;
    __shared__ __align__(16) float stages_a[2 * SIZE];
    __shared__ __align__(16) float stages_b[2 * SIZE];
    Work<float> w;
    if (!work<A_ALONG_K, B_ALONG_K, TILE, DEEP>(w, a, b, s)) return;
    int row = int(threadIdx.x) / 16 * 4, column = int(threadIdx.x) % 16 * 4;

    Fetch<A_ALONG_K, TILE> next_a;
    Fetch<B_ALONG_K, TILE> next_b;
    auto fetch = [&](int step) {
        Source<float> from_a, from_b;
        sources<A_ALONG_K, B_ALONG_K, DEEP>(from_a, from_b, w, a2, b2, s, step);
        next_a.load(from_a);
        next_b.load(from_b);
    };
    float sum[GROUPS * 4][GROUPS * 4] = {};
    if (w.first < w.last) fetch(w.first);
    for (int step = w.first; step < w.last; step++) {
        float *stage_a = stages_a + step % 2 * SIZE, *stage_b = stages_b + step % 2 * SIZE;
        next_a.store(stage_a);
        next_b.store(stage_b);
        // One barrier a step: whoever stores to this stage again has passed the next one, and so has every reader.
        __syncthreads();
        if (step + 1 < w.last) fetch(step + 1);
#pragma unroll
        for (int k = 0; k < DEEP; k++) {
            float x[GROUPS * 4], y[GROUPS * 4];
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                float4 p = *reinterpret_cast<const float4*>(stage_a + k * PITCH<TILE> + 64 * g + row);
                float4 q = *reinterpret_cast<const float4*>(stage_b + k * PITCH<TILE> + 64 * g + column);
                x[4 * g] = p.x, x[4 * g + 1] = p.y, x[4 * g + 2] = p.z, x[4 * g + 3] = p.w;
                y[4 * g] = q.x, y[4 * g + 1] = q.y, y[4 * g + 2] = q.z, y[4 * g + 3] = q.w;
            }
#pragma unroll
            for (int i = 0; i < GROUPS * 4; i++)
#pragma unroll
                for (int j = 0; j < GROUPS * 4; j++) sum[i][j] = fmaf(x[i], y[j], sum[i][j]);
        }
    }

    float* to = (partial ? partial + blockIdx.z * s.plane : out) + w.out;
    float alpha = partial ? 1.0f : s.alpha;
    if (bias) bias += w.index * s.bias + w.part * s.n + w.column;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        int c = 64 * g + column, count = min(4, w.width - c);
        if (count <= 0) continue;
        float add[4] = {};
        if (bias && !partial) load(add, bias + c, count);
#pragma unroll
        for (int i = 0; i < GROUPS * 4; i++) {
            int r = i / 4 * 64 + row + i % 4;
            if (r >= w.height) continue;
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; j++) v[j] = fmaf(alpha, sum[i][4 * g + j], add[j]);
            store(to + int64_t(r) * s.out.pitch + c, v, count);
        }
    }
}

} // namespace simt
