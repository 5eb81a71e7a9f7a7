// The forward pass: a block per 64 queries of an entry's head, tile after tile of keys with the running softmax of FlashAttention-2
// (arXiv 2307.08691). Scores are exponents of 2: the products times log2(e) / sqrt(channels).
#pragma once

#include "attention/tiles.cuh"

constexpr int FORWARD_ROWS = 64, FORWARD_THREADS = FORWARD_ROWS / WARP_ROWS * WARP;

// Keys of a tile. The launcher counts the shared memory by it.
template <class T, int D> constexpr int FORWARD_KEYS = sizeof(T) * D > 512 ? 32 : 64;

// out: through out_rows; lse: [row], base-2 logarithm of the sum of 2^score. tiles: blocks of an entry's head.
// One tile of keys and one of values: while one is multiplied, the other one arrives.
template <class T, int D>
__device__ void forward(const T* q, const T* k, const T* v, const Rows& q_rows, const Rows& k_rows, const Rows& v_rows,
                        const Rows& out_rows, const Extents& extents, float factor, T* out, float* lse, int tiles) {
    constexpr int KEYS = FORWARD_KEYS<T, D>, N = KEYS / 8, ROW = STRIDE<T, D>;
    DYNAMIC_SHARED(T, shared);
    T *queries = shared, *keys = queries + FORWARD_ROWS * ROW, *values = keys + KEYS * ROW;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
    float* scratch = reinterpret_cast<float*>(values + KEYS * ROW) + warp * WARP_ROWS * SCRATCH_STRIDE<N>;
    // The last rows of a causal entry see most, and start first.
    int unit = blockIdx.x / tiles, first_row = (tiles - 1 - (blockIdx.x - unit * tiles)) * FORWARD_ROWS;
    int index = unit / q_rows.heads, head = unit - index * q_rows.heads, kv_head = head / (q_rows.heads / k_rows.heads);
    Entry entry = extents.entry(index);
    if (first_row >= entry.queries) return;
    q += q_rows.start(index, head) + entry.query * q_rows.token;
    k += k_rows.start(index, kv_head) + entry.key * k_rows.token;
    v += v_rows.start(index, kv_head) + entry.key * v_rows.token;
    T* own = queries + warp * WARP_ROWS * ROW;
    // Keys that some row of the block sees, and those that all see.
    int last_row = min(first_row + FORWARD_ROWS, entry.queries) - 1;
    int seen = extents.limit(entry, last_row), by_all = extents.limit(entry, first_row);
    int limits[2];
#pragma unroll
    for (int r = 0; r < 2; r++) limits[r] = extents.limit(entry, min(first_row + warp * WARP_ROWS + lane / 4 + 8 * r, last_row));

    load_tile<T, D, FORWARD_ROWS, FORWARD_THREADS>(queries, q, q_rows.token, first_row, entry.queries, q_rows.channels);
    load_tile<T, D, KEYS, FORWARD_THREADS>(keys, k, k_rows.token, 0, seen, k_rows.channels);
    cp_async_commit();

    float acc[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    for (int first = 0; first < seen; first += KEYS) {
        cp_async_wait<0>();
        __syncthreads();  // The keys are there, and nobody reads the values any more.
        load_tile<T, D, KEYS, FORWARD_THREADS>(values, v, v_rows.token, first, seen, v_rows.channels);
        cp_async_commit();
        float p[N][4] = {};
        rows_by_rows<N, D>(p, own, keys);
        // Not contracted with the difference below: the largest score has weight 1 exactly.
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) p[n][i] = __fmul_rn(p[n][i], factor);
        if (first + KEYS > by_all) {
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (first + n * 8 + t2 + i % 2 >= limits[i / 2]) p[n][i] = -INFINITY;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // Maxima ignore NaN; the exponentials and with them the sums do not.
            float largest = -INFINITY;
#pragma unroll
            for (int n = 0; n < N; n++) largest = fmaxf(largest, fmaxf(p[n][2 * r], p[n][2 * r + 1]));
            largest = fmaxf(most[r], quad_max(largest));
            // Scores of minus infinity only: any finite reference gives them weight 0.
            float reference = largest == -INFINITY ? 0.0f : largest;
            float before = most[r] == largest ? 1.0f : exp2f(most[r] - reference), here = 0.0f;
            most[r] = largest;
#pragma unroll
            for (int n = 0; n < N; n++) {
                p[n][2 * r] = exp2f(p[n][2 * r] - reference);
                p[n][2 * r + 1] = exp2f(p[n][2 * r + 1] - reference);
                here += p[n][2 * r] + p[n][2 * r + 1];
            }
            sum[r] = sum[r] * before + here;
#pragma unroll
            for (int m = 0; m < D / 8; m++) acc[m][2 * r] *= before, acc[m][2 * r + 1] *= before;
        }
        cp_async_wait<0>();
        __syncthreads();  // The values are there, and nobody reads the keys any more.
        if (first + KEYS < seen) load_tile<T, D, KEYS, FORWARD_THREADS>(keys, k, k_rows.token, first + KEYS, seen, k_rows.channels);
        cp_async_commit();
        weights_by_rows<N, D>(acc, p, values, scratch);
    }
    cp_async_wait<0>();
    // The other threads' copies of this warp's queries have ended too; then these are its own to overwrite.
    __syncthreads();
    lse += q_rows.number(extents, index, head, entry.query);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = quad_sum(sum[r]);
        int row = lane / 4 + 8 * r, query = first_row + warp * WARP_ROWS + row;
        if (lane % 4 == 0 && query < entry.queries) lse[query] = most[r] + log2f(sum[r]);
        float inverse = 1.0f / sum[r];
#pragma unroll
        for (int m = 0; m < D / 8; m++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                own[row * ROW + m * 8 + t2 + i] = from_float<T>(limits[r] > 0 ? acc[m][2 * r + i] * inverse : 0.0f);
    }
    __syncwarp();
    // Whole rows, 16 bytes a lane.
    out += out_rows.start(index, head) + entry.query * out_rows.token;
    for (int i = lane; i < WARP_ROWS * (D / PACK<T>); i += WARP) {
        int row = i / (D / PACK<T>), column = i % (D / PACK<T>) * PACK<T>, query = first_row + warp * WARP_ROWS + row;
        int there = min(out_rows.channels - column, PACK<T>);
        if (query >= entry.queries || there <= 0) continue;
        float x[PACK<T>];
        load_pack(x, own + row * ROW + column);
        store(out + query * out_rows.token + column, x, there);
    }
}
