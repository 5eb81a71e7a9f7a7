// The backward pass, without atomics: the gradient of a row is computed by one warp, which goes over all rows of the other kind. Scores
// are computed again, with the saved logarithms of the row sums.
#pragma once

#include "attention/tiles.cuh"

// Own rows of a block, rows of a tile of the other kind, tiles that are in shared memory at a time: what fits into 163 KB and into
// the registers. The launcher counts by the same numbers.
template <class T, int D> constexpr int BACKWARD_ROWS = sizeof(T) * D > 512 ? 32 : 64;
template <class T, int D> constexpr int BACKWARD_THREADS = BACKWARD_ROWS<T, D> / WARP_ROWS * WARP;
template <class T, int D> constexpr int BACKWARD_OTHERS = D > 64 ? 32 : 64;
template <class T> constexpr int BACKWARD_STAGES = sizeof(T) == 2 ? 2 : 1;

// Own rows have the operands x and y, the others u and w: scores are x u^T, gradients of weights y w^T. With queries as own rows, x, y,
// u, w are queries, gradients of the output, keys, values; with keys as own rows they are keys, values, queries, gradients.
// A head of keys sums over the query heads that read it, one after the other.
//  d_x = sum over others of d_score * u;  d_y = sum over others of weight * w;  null where not wanted, each [row][D]
//  firsts: for every entry (one for all, where they are alike) and tile of own keys the first query that sees any; null: 0
template <class T, int D, bool OWN_QUERIES, bool X, bool Y>
__device__ void gradient(const T* x, const T* y, const T* u, const T* w, const Rows& x_rows, const Rows& y_rows, const Rows& u_rows,
                         const Rows& w_rows, const Extents& extents, const int* firsts, float factor, const float* lse,
                         const float* delta, float* d_x, float* d_y, int tiles) {
    constexpr int ROWS = BACKWARD_ROWS<T, D>, THREADS = BACKWARD_THREADS<T, D>, OTHERS = BACKWARD_OTHERS<T, D>, N = OTHERS / 8;
    constexpr int ROW = STRIDE<T, D>, STAGES = BACKWARD_STAGES<T>, STAGE = 2 * OTHERS * ROW;
    DYNAMIC_SHARED(T, shared);
    T *own_x = shared, *own_y = own_x + ROWS * ROW, *stages = own_y + ROWS * ROW;
    // Per stage the logarithms, the deltas and the limits of the other rows, where those are queries.
    float* statistics = reinterpret_cast<float*>(stages + STAGES * STAGE);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
    float* scratch = statistics + STAGES * 3 * OTHERS + warp * WARP_ROWS * SCRATCH_STRIDE<N>;

    int unit = blockIdx.x / tiles, tile = blockIdx.x - unit * tiles;
    // What sees most starts first: the last queries, the first keys.
    if (OWN_QUERIES) tile = tiles - 1 - tile;
    int index = unit / x_rows.heads, head = unit - index * x_rows.heads, first_row = tile * ROWS;
    Entry entry = extents.entry(index);
    int own = OWN_QUERIES ? entry.queries : entry.keys, own_start = OWN_QUERIES ? entry.query : entry.key;
    int other_start = OWN_QUERIES ? entry.key : entry.query;
    // Nothing reads the gradients of rows that have none.
    if (first_row >= own) return;
    int end_row = min(first_row + ROWS, own);
    // Others from `start` to `others`, and the keys that all own queries see.
    int start = 0, others = OWN_QUERIES ? extents.limit(entry, end_row - 1) : entry.queries;
    int by_all = OWN_QUERIES ? extents.limit(entry, first_row) : 0;
    if (!OWN_QUERIES && firsts) start = firsts[(extents.entries ? index * tiles : 0) + tile];
    if (start >= others) return;

    int other_heads = OWN_QUERIES ? 1 : u_rows.heads / x_rows.heads;
    int other_head = OWN_QUERIES ? head / (x_rows.heads / u_rows.heads) : head * other_heads;
    x += x_rows.start(index, head) + own_start * x_rows.token;
    y += y_rows.start(index, head) + own_start * y_rows.token;
    u += u_rows.start(index, other_head) + other_start * u_rows.token;
    w += w_rows.start(index, other_head) + other_start * w_rows.token;
    int64_t queries = OWN_QUERIES ? x_rows.number(extents, index, head, entry.query)
                                  : u_rows.number(extents, index, other_head, entry.query);
    lse += queries, delta += queries;

    load_tile<T, D, ROWS, THREADS>(own_x, x, x_rows.token, first_row, own, x_rows.channels);
    if (X) load_tile<T, D, ROWS, THREADS>(own_y, y, y_rows.token, first_row, own, y_rows.channels);
    // The next tile to load, of which head.
    int next = start, next_head = 0;
    auto load_stage = [&](int stage) {
        T* to = stages + stage * STAGE;
        load_tile<T, D, OTHERS, THREADS>(to, u + next_head * u_rows.head, u_rows.token, next, others, u_rows.channels);
        load_tile<T, D, OTHERS, THREADS>(to + OTHERS * ROW, w + next_head * w_rows.head, w_rows.token, next, others, w_rows.channels);
        if (!OWN_QUERIES) {
            float* to = statistics + stage * 3 * OTHERS;
            int64_t at = int64_t(next_head) * u_rows.tokens + next;
            for (int i = threadIdx.x; i < OTHERS; i += THREADS) {
                bool there = next + i < others;
                to[i] = there ? lse[at + i] : 0.0f;
                to[OTHERS + i] = there ? delta[at + i] : 0.0f;
                to[2 * OTHERS + i] = __int_as_float(there ? extents.limit(entry, next + i) : 0);
            }
        }
        next += OTHERS;
        if (!OWN_QUERIES && next >= others) next = start, next_head++;
    };
    load_stage(0);
    cp_async_commit();

    float own_lse[2] = {}, own_delta[2] = {};
    int own_row[2], own_limit[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = own_row[r] = first_row + warp * WARP_ROWS + lane / 4 + 8 * r;
        if (OWN_QUERIES && row < own) own_lse[r] = lse[row], own_delta[r] = delta[row], own_limit[r] = extents.limit(entry, row);
    }

    constexpr int X_SIZE = X ? D / 8 : 1, Y_SIZE = Y ? D / 8 : 1;
    float acc_x[X_SIZE][4] = {}, acc_y[Y_SIZE][4] = {};
    int stage = 0, first = start;
    for (int left = other_heads * ((others - start + OTHERS - 1) / OTHERS); left > 0; left--) {
        if (STAGES == 2) {
            if (left > 1) load_stage(stage ^ 1);
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        const T *other_u = stages + stage * STAGE, *other_w = other_u + OTHERS * ROW;
        const float *other_lse = statistics + stage * 3 * OTHERS, *other_delta = other_lse + OTHERS, *other_limit = other_delta + OTHERS;
        // Does every query of the tiles see every key of them?
        bool all = OWN_QUERIES ? first + OTHERS <= by_all
                               : first + OTHERS <= others && __float_as_int(other_limit[0]) >= end_row;
        auto mask = [&](float(&x)[N][4]) {
            if (all) return;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = n * 8 + t2 + i % 2;
                    if (OWN_QUERIES ? first + column >= own_limit[i / 2] : own_row[i / 2] >= __float_as_int(other_limit[column]))
                        x[n][i] = 0.0f;
                }
        };
        float p[N][4] = {};
        rows_by_rows<N, D>(p, own_x + warp * WARP_ROWS * ROW, other_u);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float log_sum = OWN_QUERIES ? own_lse[i / 2] : other_lse[n * 8 + t2 + i % 2];
                p[n][i] = exp2f(fmaf(p[n][i], factor, -log_sum));
            }
        mask(p);
        if constexpr (Y) weights_by_rows<N, D>(acc_y, p, other_w, scratch);
        if constexpr (X) {
            float d[N][4] = {};
            rows_by_rows<N, D>(d, own_y + warp * WARP_ROWS * ROW, other_w);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    d[n][i] = p[n][i] * (d[n][i] - (OWN_QUERIES ? own_delta[i / 2] : other_delta[n * 8 + t2 + i % 2]));
            mask(d);  // Not 0 times whatever an unseen row makes of it.
            weights_by_rows<N, D>(acc_x, d, other_u, scratch);
        }
        __syncthreads();  // Nobody reads this stage any more.
        if (STAGES == 2) {
            stage ^= 1;
        } else if (left > 1) {
            load_stage(0);
            cp_async_commit();
        }
        first = first + OTHERS < others ? first + OTHERS : start;
    }
    cp_async_wait<0>();
    auto write = [&](float* to, const float(&acc)[D / 8][4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (own_row[r] >= own) continue;
            float* at = to + (x_rows.number(extents, index, head, own_start) + own_row[r]) * D + t2;
#pragma unroll
            for (int m = 0; m < D / 8; m++) *reinterpret_cast<float2*>(at + m * 8) = make_float2(acc[m][2 * r], acc[m][2 * r + 1]);
        }
    };
    if constexpr (X) write(d_x, acc_x);
    if constexpr (Y) write(d_y, acc_y);
}
