// S = scale * X A^T in bf16, at the price of reading X once: the rows of each adapter times its `ranks` rows of A, into banded rows (see
// rows.cuh), whose bands and padding columns become zero.
//
// A block computes HEIGHT neighbouring rows of S. BAND is more than that, so they are of one instance at most, and zeros. Its warps share
// the sum: warp w takes the chunks w, w + 8, .. of 64 columns of X, and the eight sums are added in the order of the warps. So the order
// depends on k alone, and nothing of X or A passes through shared memory: tensor cores multiply in any order of k that is the same on
// both sides, so a lane's four columns of either side in two steps of 16 may be eight neighbours, 16 bytes from global memory.
//
// A sum may also be of each of gridDim.z parts of the columns, with the same columns of A, into columns of its own:
// S[:, part * ranks ..] = scale * X[:, part * k ..] A[:, part * k ..]^T.
#pragma once

#include "common.cuh"
#include "mma.cuh"
#include "rows.cuh"

#include <type_traits>

namespace shrink {

constexpr int WARPS = BLOCK / WARP;
constexpr int CHUNK = 64;
// What a lane's loads of one side cover: 8 rows of 32 columns.
constexpr int SPAN = 32;
// Of 8 * N ranks, the eights that are taken at a time.
template <int N>
constexpr int TILES = N < 4 ? N : 4;

// As the launcher passes it (no padding). `rows.count`: segments; `total`: rows of S; `k`: columns of a part.
struct Sizes {
    Rows rows;
    int total, k, ranks;
    float scale;
};

// The block's rows of S: those from `first` on, of which [begin, end) (counted from there) are of a segment; `row`: the row of X of the
// one at `first`, if it were of the segment.
struct Window {
    int first, begin, end, row, adapter;

    __device__ __forceinline__ bool inside(int i) const { return begin <= i && i < end; }
    __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// The window of this number.
template <int HEIGHT>
__device__ __forceinline__ Window window(const Sizes& z, int number) {
    static_assert(HEIGHT <= BAND, "a window has rows of one segment");
    int first = number * HEIGHT, last = first + HEIGHT, lane = threadIdx.x % WARP;
    // Segments that start before the window's end; all but the last of them end before the window.
    int before = 0;
    if (z.rows.segments) {
        for (int i = lane; i - lane < z.rows.count; i += WARP)
            before += __popc(__ballot_sync(0xffffffffu, i < z.rows.count && z.rows.segments[i].low < last));
    } else {
        before = min(z.rows.count, (last + z.rows.each - 1) / (z.rows.each + BAND));
    }
    if (before == 0) return {first, 0, 0, 0, 0};
    Segment s = segment(z.rows, before - 1);
    int low = s.low - first;
    return {first, max(0, low), min(HEIGHT, low + s.rows), s.row - low, s.adapter};
}

// The 8 neighbours at p, of which `rest` (at most 0: none) exist; zeros for the others.
template <bool ALIGNED>
__device__ __forceinline__ uint4 words(const bf16* p, int rest) {
    if (ALIGNED) return rest > 0 ? __ldg(reinterpret_cast<const uint4*>(p)) : make_uint4(0, 0, 0, 0);
    return pack_bits(p, rest);
}

// Rows of X as they are. An operand of `sums` gives the 8 neighbours from `column` on of the lane's i-th row, which is row lane / 4 + 8 i of
// the window, in two halves: what it loads, early, and what it makes of that.
template <int GROUPS, bool ALIGNED>
struct Plain {
    // Odd rows are read element by element where they are used: early they would fill the registers.
    struct Later {};
    typedef std::conditional_t<ALIGNED, uint4, Later> Loaded;
    const bf16* x; // the lane's first row
    int begin, height, k, step;

    // `columns` from the `first` on of rows of `pitch`.
    __device__ __forceinline__ Plain(const bf16* x, const Window& w, int columns, int pitch, int first) {
        int row = int(threadIdx.x) % WARP / 4;
        this->x = x + int64_t(w.row + row) * pitch + first;
        begin = w.begin - row, height = w.end - w.begin, k = columns, step = 8 * pitch;
    }
    // The row's columns from `column` on: none outside of the segment.
    __device__ __forceinline__ int rest(int i, int column) const {
        return uint32_t(8 * i - begin) < uint32_t(height) ? k - column : 0;
    }
    __device__ __forceinline__ Loaded load(int i, int column) const {
        if constexpr (ALIGNED) return words<true>(x + (i * step + column), rest(i, column));
        else return {};
    }
    __device__ __forceinline__ uint4 take(const Loaded& v, int i, int column) const {
        if constexpr (ALIGNED) return v;
        else return words<false>(x + (i * step + column), rest(i, column));
    }
};

// The span of a warp's chunks behind this one.
__device__ __forceinline__ int next_span(int at) { return at + (at % CHUNK == 0 ? SPAN : WARPS * CHUNK - SPAN); }

// sum += 16 rows by 8 ranks, over 32 columns: of each side the 8 neighbours of the lane's columns.
__device__ __forceinline__ void multiply(float (&sum)[4], const uint4& upper, const uint4& lower, const uint4& b) {
    uint32_t a0[4] = {upper.x, lower.x, upper.y, lower.y}, b0[2] = {b.x, b.y};
    uint32_t a1[4] = {upper.z, lower.z, upper.w, lower.w}, b1[2] = {b.z, b.w};
    mma_m16n8k16_bf16(sum, a0, b0);
    mma_m16n8k16_bf16(sum, a1, b1);
}

// A warp's part of the sums of 16 * GROUPS rows and 8 * N ranks, from rank blockIdx.y * 8 * N on.
template <int GROUPS, int N, bool ALIGNED, class Operand>
__device__ __forceinline__ void sums(float (&sum)[GROUPS][N][4], const Operand& x, const bf16* a, const Window& w, const Sizes& z) {
    // Many sums leave registers for half a chunk at a time. The order is the same.
    constexpr int SPANS = GROUPS * N > 4 ? 1 : CHUNK / SPAN;
    int lane = threadIdx.x % WARP, rank = int(blockIdx.y) * 8 * N + lane / 4, within = lane % 4 * 8, k = z.k;
    int pitch = k * int(gridDim.z);
    a += (int64_t(w.adapter) * z.ranks + rank) * pitch + int(blockIdx.z) * k + within;

    auto next = [](int at) { return SPANS == 2 ? at + WARPS * CHUNK : next_span(at); };
    typename Operand::Loaded loaded[SPANS][2 * GROUPS], now[SPANS][2 * GROUPS];
    auto fetch = [&](int at) {
#pragma unroll
        for (int h = 0; h < SPANS; h++)
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) loaded[h][i] = x.load(i, at + h * SPAN + within);
    };
    int at = threadIdx.x / WARP * CHUNK;
    fetch(at);
    while (at < k) {
#pragma unroll
        for (int h = 0; h < SPANS; h++)
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) now[h][i] = loaded[h][i];
        int following = next(at);
        fetch(following);
#pragma unroll
        for (int h = 0; h < SPANS; h++) {
            int start = at + h * SPAN, column = start + within;
            if (start >= k) break;
            uint4 f[2 * GROUPS];
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) f[i] = x.take(now[h][i], i, column);
#pragma unroll
            for (int j0 = 0; j0 < N; j0 += TILES<N>) {
                uint4 b[TILES<N>];
#pragma unroll
                for (int j = 0; j < TILES<N>; j++)
                    b[j] = words<ALIGNED>(a + (8 * (j0 + j) * pitch + start), rank + 8 * (j0 + j) < z.ranks ? k - column : 0);
#pragma unroll
                for (int j = 0; j < TILES<N>; j++)
#pragma unroll
                    for (int i = 0; i < GROUPS; i++) multiply(sum[i][j0 + j], f[2 * i], f[2 * i + 1], b[j]);
            }
        }
        at = following;
    }
}

// What a line of the sums of those takes: the pairs that half a warp writes lie in different banks.
template <int N>
constexpr int PITCH = 8 * TILES<N> + 8;
// Floats of the sums of all warps.
template <int GROUPS, int N>
constexpr int PARTS = WARPS * 16 * GROUPS * PITCH<N>;

// The warp's sums of the eights of ranks from j0 on, where all warps' lie.
template <int GROUPS, int N>
__device__ __forceinline__ void put_sums(const float (&sum)[GROUPS][N][4], float* parts, int j0) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 2 * GROUPS; i++)
#pragma unroll
        for (int j = 0; j < TILES<N>; j++) {
            const float* v = sum[i / 2][j0 + j] + i % 2 * 2;
            float* to = parts + (warp * 16 * GROUPS + 8 * i + lane / 4) * PITCH<N> + 8 * j + lane % 4 * 2;
            *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
        }
}

// Adds up what all warps have put there, in their order, and writes it: the ranks from `rank` on of a part, whose columns of S begin at
// `start` and end at `end`. By BLOCK threads.
template <int GROUPS, int N>
__device__ __forceinline__ void add_sums(const float* parts, bf16* s, const Window& w, const Sizes& z, int rank, int start, int end) {
    constexpr int HEIGHT = 16 * GROUPS;
    for (int i = threadIdx.x; i < HEIGHT * TILES<N>; i += BLOCK) {
        int row = i / TILES<N>, at = i % TILES<N> * 8, r = rank + at, column = start + r, count = min(8, end - column);
        if (w.first + row >= z.total || count <= 0) continue;
        float v[8] = {};
        for (int from = 0; from < WARPS; from++) {
            const float4* p = reinterpret_cast<const float4*>(parts + (from * HEIGHT + row) * PITCH<N> + at);
            float4 low = p[0], high = p[1];
            v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
            v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
        }
        // Zeros by choice, not by product: A may hold what times zero is none.
#pragma unroll
        for (int c = 0; c < 8; c++) v[c] = w.inside(row) && r + c < z.ranks ? z.scale * v[c] : 0.0f;
        store(s + int64_t(w.first + row) * z.rows.pitch + column, v, count);
    }
}

// Adds the warps' sums up and writes the block's part of S. The last part's columns reach to the end of a row of S.
template <int GROUPS, int N>
__device__ __forceinline__ void store_sums(const float (&sum)[GROUPS][N][4], bf16* s, const Window& w, const Sizes& z) {
    __shared__ __align__(16) float parts[PARTS<GROUPS, N>];
    int part = blockIdx.z, end = part + 1 == int(gridDim.z) ? z.rows.pitch : (part + 1) * z.ranks;
#pragma unroll
    for (int j0 = 0; j0 < N; j0 += TILES<N>) {
        if (j0 > 0) __syncthreads();
        put_sums(sum, parts, j0);
        __syncthreads();
        add_sums<GROUPS, N>(parts, s, w, z, (int(blockIdx.y) * N + j0) * 8, part * z.ranks, end);
    }
}

// A block's HEIGHT rows and RANKS ranks. `ALIGNED`: k is a multiple of 8, so rows are whole packs.
template <int HEIGHT, int RANKS, bool ALIGNED>
__device__ __forceinline__ void shrink(const bf16* x, const bf16* a, bf16* s, const Sizes& z) {
    constexpr int GROUPS = HEIGHT / 16, N = RANKS / 8;
    Window w = window<HEIGHT>(z, blockIdx.x);
    float sum[GROUPS][N][4] = {};
    if (!w.empty()) {
        Plain<GROUPS, ALIGNED> plain(x, w, z.k, z.k * int(gridDim.z), int(blockIdx.z) * z.k);
        sums<GROUPS, N, ALIGNED>(sum, plain, a, w, z);
    }
    store_sums(sum, s, w, z);
}

// B [adapters, n, ranks] -> [adapters, ranks, n]; grid (n / 64, ranks / 32, adapters).
__device__ __forceinline__ void transpose(const bf16* b, bf16* out, int n, int ranks) {
    constexpr int LINES = 64, COLUMNS = 32;
    __shared__ bf16 tile[COLUMNS][LINES + 2];
    int line = int(blockIdx.x) * LINES, column = int(blockIdx.y) * COLUMNS;
    int64_t entry = int64_t(blockIdx.z) * n * ranks;
    for (int i = threadIdx.x; i < LINES * COLUMNS; i += BLOCK) {
        int l = i / COLUMNS, c = i % COLUMNS;
        if (line + l < n && column + c < ranks) tile[c][l] = b[entry + int64_t(line + l) * ranks + column + c];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < LINES * COLUMNS; i += BLOCK) {
        int c = i / LINES, l = i % LINES;
        if (line + l < n && column + c < ranks) out[entry + int64_t(column + c) * n + line + l] = tile[c][l];
    }
}

} // namespace shrink
