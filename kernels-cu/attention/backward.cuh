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
//  d_x = sum over others of d_score * u;  d_y = sum over others of weight * w;  null where not wanted, each [unit][row][D]
template <class T, int D, bool OWN_QUERIES, bool X, bool Y>
__device__ void gradient(const T* x, const T* y, const T* u, const T* w, const Rows& x_rows, const Rows& y_rows, const Rows& u_rows,
                         const Rows& w_rows, const int* lengths, const float* lse, const float* delta, float* d_x, float* d_y,
                         int tiles) {
    constexpr int ROWS = BACKWARD_ROWS<T, D>, THREADS = BACKWARD_THREADS<T, D>, OTHERS = BACKWARD_OTHERS<T, D>, N = OTHERS / 8;
    constexpr int ROW = STRIDE<T, D>, STAGES = BACKWARD_STAGES<T>, STAGE = 2 * OTHERS * ROW;
    DYNAMIC_SHARED(T, shared);
    T *own_x = shared, *own_y = own_x + ROWS * ROW, *stages = own_y + ROWS * ROW;
    // Per stage the logarithms and the deltas of the other rows, where those are queries.
    float* statistics = reinterpret_cast<float*>(stages + STAGES * STAGE);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t2 = lane % 4 * 2;
    float* scratch = statistics + STAGES * 2 * OTHERS + warp * WARP_ROWS * SCRATCH_STRIDE<N>;

    int unit = blockIdx.x / tiles, first_row = (blockIdx.x - unit * tiles) * ROWS;
    int keys = OWN_QUERIES ? u_rows.tokens : x_rows.tokens;
    if (lengths) keys = lengths[unit / x_rows.heads];
    int own = OWN_QUERIES ? x_rows.tokens : keys, others = OWN_QUERIES ? keys : u_rows.tokens;
    // Nothing reads the gradients of rows that have none.
    if (first_row >= own || others == 0) return;
    int64_t queries = int64_t(unit) * (OWN_QUERIES ? x_rows.tokens : u_rows.tokens);
    lse += queries, delta += queries;
    u += unit_start(u_rows, unit), w += unit_start(w_rows, unit);

    load_tile<T, D, ROWS, THREADS>(own_x, x + unit_start(x_rows, unit), x_rows.token, first_row, own, x_rows.channels);
    if (X) load_tile<T, D, ROWS, THREADS>(own_y, y + unit_start(y_rows, unit), y_rows.token, first_row, own, y_rows.channels);
    auto load_stage = [&](int stage, int first) {
        T* to = stages + stage * STAGE;
        load_tile<T, D, OTHERS, THREADS>(to, u, u_rows.token, first, others, u_rows.channels);
        load_tile<T, D, OTHERS, THREADS>(to + OTHERS * ROW, w, w_rows.token, first, others, w_rows.channels);
        if (!OWN_QUERIES) {
            float* to = statistics + stage * 2 * OTHERS;
            for (int i = threadIdx.x; i < OTHERS; i += THREADS) {
                bool there = first + i < others;
                to[i] = there ? lse[first + i] : 0.0f;
                to[OTHERS + i] = there ? delta[first + i] : 0.0f;
            }
        }
    };
    load_stage(0, 0);
    cp_async_commit();

    float own_lse[2] = {}, own_delta[2] = {};
    if (OWN_QUERIES) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first_row + warp * WARP_ROWS + lane / 4 + 8 * r;
            if (row < own) own_lse[r] = lse[row], own_delta[r] = delta[row];
        }
    }

    constexpr int X_SIZE = X ? D / 8 : 1, Y_SIZE = Y ? D / 8 : 1;
    float acc_x[X_SIZE][4] = {}, acc_y[Y_SIZE][4] = {};
    int stage = 0;
    for (int first = 0; first < others; first += OTHERS) {
        if (STAGES == 2) {
            if (first + OTHERS < others) load_stage(stage ^ 1, first + OTHERS);
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        const T *other_u = stages + stage * STAGE, *other_w = other_u + OTHERS * ROW;
        const float *other_lse = statistics + stage * 2 * OTHERS, *other_delta = other_lse + OTHERS;
        float p[N][4] = {};
        rows_by_rows<N, D>(p, own_x + warp * WARP_ROWS * ROW, other_u);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = n * 8 + t2 + i % 2;
                float log_sum = OWN_QUERIES ? own_lse[i / 2] : other_lse[column];
                p[n][i] = first + column < others ? exp2f(p[n][i] - log_sum) : 0.0f;
            }
        if constexpr (Y) weights_by_rows<N, D>(acc_y, p, other_w, scratch);
        if constexpr (X) {
            float d[N][4] = {};
            rows_by_rows<N, D>(d, own_y + warp * WARP_ROWS * ROW, other_w);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    d[n][i] = p[n][i] * (d[n][i] - (OWN_QUERIES ? own_delta[i / 2] : other_delta[n * 8 + t2 + i % 2]));
            weights_by_rows<N, D>(acc_x, d, other_u, scratch);
        }
        __syncthreads();  // Nobody reads this stage any more.
        if (STAGES == 2) {
            stage ^= 1;
        } else if (first + OTHERS < others) {
            load_stage(0, first + OTHERS);
            cp_async_commit();
        }
    }
    cp_async_wait<0>();
    auto write = [&](float* to, const float(&acc)[D / 8][4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first_row + warp * WARP_ROWS + lane / 4 + 8 * r;
            if (row >= own) continue;
            float* at = to + (int64_t(unit) * x_rows.tokens + row) * D + t2;
#pragma unroll
            for (int m = 0; m < D / 8; m++) *reinterpret_cast<float2*>(at + m * 8) = make_float2(acc[m][2 * r], acc[m][2 * r + 1]);
        }
    };
    if constexpr (X) write(d_x, acc_x);
    if constexpr (Y) write(d_y, acc_y);
}
