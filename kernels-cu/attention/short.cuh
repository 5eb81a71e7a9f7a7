// Few keys: at most 64 queries and 64 keys of at most 128 channels, in bf16 on every device. Such calls are bound by memory: every
// operand is read once and every result written once, by a block that holds whole units in shared memory. All scores of a row are in
// registers, so there is no running softmax, and the backward pass needs nothing from other blocks.
//
// Norm and rotation happen in shared memory, on the rows that a thread has copied itself. The blocks of a multiprocessor are at
// different points: while one computes, the rows of others are on their way.
#pragma once

#include "attention/tiles.cuh"

namespace few_keys {

// The most threads of a block.
constexpr int THREADS = 128;

// As the launcher passes it (no padding).
struct Sizes {
    int units;             // in all
    int together;          // neighbouring units of a block, a power of two
    int warps;             // of a unit
    int queries;           // rows of a tile of queries: a multiple of WARP_ROWS
    float exponent, scale; // log2(e) / sqrt(channels), 1 / sqrt(channels)
};

// One of a block's units: a head of an entry, and how many queries and keys there are, none beyond the last unit.
struct Unit {
    int index, entry, head, kv_head;
    Entry tokens;

    __device__ __forceinline__ Unit(const Sizes& z, int local, const Rows& q, const Rows& k, const Extents& extents) {
        index = int(blockIdx.x) * z.together + local;
        bool inside = index < z.units;
        if (!inside) index = 0;
        entry = index / q.heads, head = index - entry * q.heads, kv_head = head / (q.heads / k.heads);
        tokens = extents.entry(entry);
        if (!inside) tokens.queries = tokens.keys = 0;
    }
    __device__ __forceinline__ int64_t of_query(const Rows& rows) const { return rows.start(entry, head); }
    __device__ __forceinline__ int64_t of_key(const Rows& rows) const { return rows.start(entry, kv_head); }
    // Keys that a row of queries sees: none, where it is not there.
    __device__ __forceinline__ int limit(const Extents& extents, int row) const {
        return row < tokens.queries ? extents.limit(tokens, row) : 0;
    }
};

// A thread's share of the rows of a block's units: the same 8 channels of every `step`-th row of one unit. Neighbouring threads have
// neighbouring channels, and then the same row of the next unit: where units are heads of one token that is the next memory.
template <int D> struct Share {
    static constexpr int PER_ROW = D / PACK<bf16>;
    int column, local, row, step;

    __device__ __forceinline__ explicit Share(const Sizes& z) {
        int i = threadIdx.x / PER_ROW;
        column = threadIdx.x % PER_ROW * PACK<bf16>;
        local = i & (z.together - 1), row = i / z.together, step = z.warps * WARP / PER_ROW;
    }
    // Starts the copy to a tile of `height` rows. Rows from `count` on and channels that are not there become zero.
    __device__ __forceinline__ void copy(bf16* tile, int height, const bf16* x, const Rows& rows, int64_t start, int count) const {
        const bf16* from = x + start + column;
        if (column >= rows.channels) count = 0;
        for (int i = row; i < height; i += step) {
            bool there = i < count;
            cp_async_16(tile + i * STRIDE<bf16, D> + column, there ? from + i * rows.token : x, there);
        }
    }
    // tile = rotated(normed(tile)), rounded as the packing kernel does it. Whole warps take part, as heights are multiples of
    // the rows of a warp.
    __device__ __forceinline__ void change(bf16* tile, int height, const Rows& rows, const Change& change, int count) const {
        if (!change.weight && !change.cos) return;
        Lanes<bf16> lanes(D, rows.channels);
        Packs<bf16> w = {};
        if (change.weight) lanes.load(w, static_cast<const bf16*>(change.weight), true);
#pragma unroll 2
        for (int i = row; i < height; i += step) {
            bf16* at = tile + i * STRIDE<bf16, D>;
            Packs<bf16> v = {};
            if (i < count) load_pack(v[0], at + column);
            lanes.apply(v, w, change, i, i < count);
            if (i < count) store_pack(at + column, v[0]);
        }
    }
};

// Rounds a warp's 16 rows of sums, times a factor per row (0 gives zeros, whatever the sums), and stores the first `count` of them from
// `to` on, whole packs by way of 16 rows of shared memory that are the warp's own.
template <int D>
__device__ __forceinline__ void store_rows(const float (&acc)[D / 8][4], const float (&factor)[2], bf16* own, bf16* to,
                                           const Rows& rows, int count) {
    constexpr int ROW = STRIDE<bf16, D>, PER_ROW = D / PACK<bf16>;
    int lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int m = 0; m < D / 8; m++)
            *reinterpret_cast<uint32_t*>(own + (lane / 4 + 8 * r) * ROW + m * 8 + t2) =
                factor[r] == 0.0f ? 0 : narrow(acc[m][2 * r] * factor[r], acc[m][2 * r + 1] * factor[r]);
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < WARP_ROWS * PER_ROW; i += WARP) {
        int row = i / PER_ROW, column = i % PER_ROW * PACK<bf16>;
        if (row < count && column < rows.channels)
            *reinterpret_cast<uint4*>(to + row * rows.token + column) = *reinterpret_cast<const uint4*>(own + row * ROW + column);
    }
}

// out: through out_rows; lse: [unit][query], base-2 logarithm of the sum of 2^score.
template <int D, int KEYS>
__device__ void forward(const bf16* q, const bf16* k, const bf16* v, const Rows& q_rows, const Rows& k_rows, const Rows& v_rows,
                        const Rows& out_rows, const Change& q_change, const Change& k_change, const Extents& extents, bf16* out,
                        float* lse, const Sizes& z) {
    constexpr int N = KEYS / 8, ROW = STRIDE<bf16, D>;
    DYNAMIC_SHARED(bf16, shared);
    int keys_at = z.queries * ROW, values_at = keys_at + KEYS * ROW, size = values_at + KEYS * ROW;
    {
        Share<D> share(z);
        Unit unit(z, share.local, q_rows, k_rows, extents);
        bf16* tiles = shared + share.local * size;
        share.copy(tiles, z.queries, q, q_rows, unit.of_query(q_rows), unit.tokens.queries);
        share.copy(tiles + keys_at, KEYS, k, k_rows, unit.of_key(k_rows), unit.tokens.keys);
        cp_async_commit();
        share.copy(tiles + values_at, KEYS, v, v_rows, unit.of_key(v_rows), unit.tokens.keys);
        cp_async_commit();
        cp_async_wait<1>();
        share.change(tiles, z.queries, q_rows, q_change, unit.tokens.queries);
        share.change(tiles + keys_at, KEYS, k_rows, k_change, unit.tokens.keys);
    }
    __syncthreads();

    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
    int local = warp / z.warps, first = (warp - local * z.warps) * WARP_ROWS;
    Unit unit(z, local, q_rows, k_rows, extents);
    bf16 *tiles = shared + local * size, *own = tiles + first * ROW;
    int limits[2];
#pragma unroll
    for (int r = 0; r < 2; r++) limits[r] = unit.limit(extents, first + lane / 4 + 8 * r);
    float p[N][4] = {}, most[2], sum[2];
    rows_by_rows<N, D>(p, own, tiles + keys_at);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        // Maxima ignore NaN; the exponentials and with them the sums do not.
        most[r] = -INFINITY, sum[r] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; i++) {
                // Not contracted with the difference below: the largest score has weight 1 exactly.
                p[n][i] = n * 8 + t2 + i % 2 < limits[r] ? __fmul_rn(p[n][i], z.exponent) : -INFINITY;
                most[r] = fmaxf(most[r], p[n][i]);
            }
        most[r] = quad_max(most[r]);
        // Scores of minus infinity only: any finite reference gives them weight 0.
        float reference = most[r] == -INFINITY ? 0.0f : most[r];
#pragma unroll
        for (int n = 0; n < N; n++) {
            p[n][2 * r] = exp2f(p[n][2 * r] - reference);
            p[n][2 * r + 1] = exp2f(p[n][2 * r + 1] - reference);
            sum[r] += p[n][2 * r] + p[n][2 * r + 1];
        }
        sum[r] = quad_sum(sum[r]);
    }
    cp_async_wait<0>();
    __syncthreads();
    float acc[D / 8][4] = {};
    weights_by_rows<N, D>(acc, p, tiles + values_at, nullptr);

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = first + lane / 4 + 8 * r;
        if (lane % 4 == 0 && query < unit.tokens.queries) lse[int64_t(unit.index) * q_rows.tokens + query] = most[r] + log2f(sum[r]);
        inverse[r] = limits[r] > 0 ? 1.0f / sum[r] : 0.0f;
    }
    bf16* to = out + unit.of_query(out_rows) + first * out_rows.token;
    store_rows<D>(acc, inverse, own, to, out_rows, unit.tokens.queries - first);
}

// acc += P^T B: the columns of P from `p` on are the 16 rows of a warp, its rows and those of B are `height`, a multiple of 16.
template <int D, int PITCH>
__device__ __forceinline__ void columns_by_rows(float (&acc)[D / 8][4], const bf16* p, const bf16* b, int height) {
    int lane = threadIdx.x % WARP;
    p += (lane % 8 + lane / 16 * 8) * PITCH + lane / 8 % 2 * 8;
    b += lane % 16 * STRIDE<bf16, D> + lane / 16 * 8;
#pragma unroll 1
    for (int i = 0; i < height; i += 16) {
        uint32_t x[4], y[4];
        ldmatrix_x4_trans(x, p + i * PITCH);
#pragma unroll
        for (int m = 0; m < D / 8; m += 2) {
            ldmatrix_x4_trans(y, b + i * STRIDE<bf16, D> + m * 8);
            mma_m16n8k16_bf16(acc[m], x, y);
            mma_m16n8k16_bf16(acc[m + 1], x, y + 2);
        }
    }
}

// Takes the gradient of a warp's 16 changed rows, which is factor * acc, back through rotation and norm.
//  x: the operand; out: its gradient, or null; both from the unit's first row on
//  own: shared memory for 16 rows of STRIDE floats
//  first: the first row; rows from `count` on have no gradient, whatever their elements: it is zero
//  dw: the lane's sums of the gradient of the norm's weight
template <int D>
__device__ __forceinline__ void finish_rows(const float (&acc)[D / 8][4], float factor, float* own, const bf16* x, bf16* out,
                                            const Rows& rows, const Change& change, int first, int count, int tokens,
                                            Packs<bf16>& dw) {
    constexpr int ROW = STRIDE<bf16, D>;
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int m = 0; m < D / 8; m++)
            *reinterpret_cast<float2*>(own + (lane / 4 + 8 * r) * ROW + m * 8 + lane % 4 * 2) =
                make_float2(factor * acc[m][2 * r], factor * acc[m][2 * r + 1]);
    __syncwarp();
    Lanes<bf16> lanes(D, rows.channels);
    int column = lanes.column(0);
    Packs<bf16> w = {};
    if (change.weight) lanes.load(w, static_cast<const bf16*>(change.weight), true);
#pragma unroll 1
    for (int row = lane / lanes.count; row < WARP_ROWS; row += WARP / lanes.count) {
        int token = first + row;
        bool some = token < count;
        Packs<bf16> g = {}, v = {};
        if (some) {
            const float4* from = reinterpret_cast<const float4*>(own + row * ROW + column);
            float4 low = from[0], high = from[1];
            g[0][0] = low.x, g[0][1] = low.y, g[0][2] = low.z, g[0][3] = low.w;
            g[0][4] = high.x, g[0][5] = high.y, g[0][6] = high.z, g[0][7] = high.w;
        }
        if (change.weight) lanes.load(v, x + token * rows.token, some);
        lanes.take_back(g, dw, v, w, change, token, some);
        if (out && token < tokens && column < rows.channels) store_pack(out + token * rows.token + column, g[0]);
    }
}

// partial[blockIdx.x][channel] = the block's sum of dw, in the order of its threads.
template <int D>
__device__ __forceinline__ void store_partial(const Packs<bf16>& dw, float* sums, float* partial, int channels) {
    constexpr int PER_ROW = D / PACK<bf16>;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PACK<bf16>; i++)
        sums[threadIdx.x / PER_ROW * D + threadIdx.x % PER_ROW * PACK<bf16> + i] = dw[0][i];
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        float x = 0.0f;
        for (int i = 0; i < int(blockDim.x) / PER_ROW; i++) x += sums[i * D + c];
        partial[int64_t(blockIdx.x) * channels + c] = x;
    }
}

// The gradients, in five products of a unit's tiles. Queries are rows of a warp for the scores S = Q K^T, the gradients of the weights
// dP = G V^T and dQ = dS K; keys are for dV = P^T G and dK = dS^T Q.
//  grad: gradient of the output, through out_rows; lse: as the forward pass left it
//  d_q, d_k, d_v: through the layout of their operand, overwritten; null where not wanted
//  q_partial, k_partial: [block][channels], sums of the gradients of the norms' weights, or both null
template <int D, int KEYS>
__device__ void backward(const bf16* q, const bf16* k, const bf16* v, const bf16* grad, const Rows& q_rows, const Rows& k_rows,
                         const Rows& v_rows, const Rows& out_rows, const Change& q_change, const Change& k_change,
                         const Extents& extents, const float* lse, bf16* d_q, bf16* d_k, bf16* d_v, float* q_partial,
                         float* k_partial, const Sizes& z) {
    constexpr int N = KEYS / 8, ROW = STRIDE<bf16, D>, PITCH = KEYS + PACK<bf16>;
    DYNAMIC_SHARED(bf16, shared);
    // Queries and gradients of the output are side by side, as are keys and values: each pair has room for as many rows of floats.
    int grads_at = z.queries * ROW, keys_at = 2 * grads_at, values_at = keys_at + KEYS * ROW;
    int weights_at = values_at + KEYS * ROW, scores_at = weights_at + z.queries * PITCH, size = scores_at + z.queries * PITCH;
    {
        Share<D> share(z);
        Unit unit(z, share.local, q_rows, k_rows, extents);
        bf16* tiles = shared + share.local * size;
        share.copy(tiles, z.queries, q, q_rows, unit.of_query(q_rows), unit.tokens.queries);
        share.copy(tiles + keys_at, KEYS, k, k_rows, unit.of_key(k_rows), unit.tokens.keys);
        cp_async_commit();
        share.copy(tiles + grads_at, z.queries, grad, out_rows, unit.of_query(out_rows), unit.tokens.queries);
        share.copy(tiles + values_at, KEYS, v, v_rows, unit.of_key(v_rows), unit.tokens.keys);
        cp_async_commit();
        cp_async_wait<1>();
        share.change(tiles, z.queries, q_rows, q_change, unit.tokens.queries);
        share.change(tiles + keys_at, KEYS, k_rows, k_change, unit.tokens.keys);
    }
    cp_async_wait<0>();
    __syncthreads();

    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
    int local = warp / z.warps, first = (warp - local * z.warps) * WARP_ROWS;
    Unit unit(z, local, q_rows, k_rows, extents);
    bf16 *tiles = shared + local * size, *weights = tiles + weights_at, *scores = tiles + scores_at;
    // Tokens whose gradients are written.
    int keys = unit.tokens.queries > 0 ? k_rows.tokens : 0;
    float query_sum[D / 8][4] = {}, key_sum[D / 8][4] = {};
    if (first < unit.tokens.queries) {
        float p[N][4] = {}, d[N][4] = {};
        rows_by_rows<N, D>(p, tiles + first * ROW, tiles + keys_at);
        rows_by_rows<N, D>(d, tiles + grads_at + first * ROW, tiles + values_at);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first + lane / 4 + 8 * r;
            int limit = unit.limit(extents, row);
            float log_sum = limit > 0 ? lse[int64_t(unit.index) * q_rows.tokens + row] : 0.0f, delta = 0.0f;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    bool seen = n * 8 + t2 + i % 2 < limit;
                    p[n][i] = seen ? exp2f(__fmul_rn(p[n][i], z.exponent) - log_sum) : 0.0f;
                    if (!seen) d[n][i] = 0.0f;
                    delta += p[n][i] * d[n][i];
                }
            delta = quad_sum(delta);
#pragma unroll
            for (int n = 0; n < N; n++) {
                int at = row * PITCH + n * 8 + t2;
                d[n][2 * r] = p[n][2 * r] * (d[n][2 * r] - delta);
                d[n][2 * r + 1] = p[n][2 * r + 1] * (d[n][2 * r + 1] - delta);
                *reinterpret_cast<uint32_t*>(weights + at) = narrow(p[n][2 * r], p[n][2 * r + 1]);
                *reinterpret_cast<uint32_t*>(scores + at) = narrow(d[n][2 * r], d[n][2 * r + 1]);
            }
        }
        weights_by_rows<N, D>(query_sum, d, tiles + keys_at, nullptr);
    }
    __syncthreads();  // Nobody reads keys and values any more.
    if (first < keys) {
        if (d_v) {
            float value_sum[D / 8][4] = {}, there[2];
#pragma unroll
            for (int r = 0; r < 2; r++) there[r] = first + lane / 4 + 8 * r < unit.tokens.keys ? 1.0f : 0.0f;
            columns_by_rows<D, PITCH>(value_sum, weights + first, tiles + grads_at, z.queries);
            bf16* to = d_v + unit.of_key(v_rows) + first * v_rows.token;
            store_rows<D>(value_sum, there, tiles + values_at + first * ROW, to, v_rows, keys - first);
        }
        columns_by_rows<D, PITCH>(key_sum, scores + first, tiles, z.queries);
    }
    __syncthreads();  // Nor the others.
    Packs<bf16> q_dw = {}, k_dw = {};
    if (first < unit.tokens.queries && (d_q || q_partial)) {
        int64_t start = unit.of_query(q_rows);
        finish_rows<D>(query_sum, z.scale, reinterpret_cast<float*>(tiles) + first * ROW, q + start, d_q ? d_q + start : nullptr,
                       q_rows, q_change, first, unit.tokens.keys > 0 ? unit.tokens.queries : 0, unit.tokens.queries, q_dw);
    }
    if (first < keys && (d_k || k_partial)) {
        int64_t start = unit.of_key(k_rows);
        finish_rows<D>(key_sum, z.scale, reinterpret_cast<float*>(tiles + keys_at) + first * ROW, k + start,
                       d_k ? d_k + start : nullptr, k_rows, k_change, first, unit.tokens.keys, keys, k_dw);
    }
    if (!q_partial) return;
    store_partial<D>(q_dw, reinterpret_cast<float*>(shared), q_partial, q_rows.channels);
    store_partial<D>(k_dw, reinterpret_cast<float*>(shared), k_partial, k_rows.channels);
}

} // namespace few_keys
