// Rows of the operands in their strided tensors, and what happens to them on the way into the tiles and back: QK norm and rotation.
// A row is shared by a few lanes of a warp, 16 bytes each. Memory-bound.
#pragma once

#include "attention/extents.cuh"

constexpr float NORM_EPS = 1e-6f;
constexpr int WIDEST = 256;

// Where rows are: (batch0, batch1, token, head), `channels` contiguous elements each. An entry is (batch0, batch1). Where entries are
// ragged, `tokens` counts those of all.
struct Rows {
    int64_t offset, batch0, batch1, token, head;
    int size1, heads, tokens, channels;

    // Of token 0 of an entry's head, or the first of all tokens in a ragged tensor.
    __device__ __forceinline__ int64_t start(int entry, int head_index) const {
        int b0 = entry / size1, b1 = entry - b0 * size1;
        return offset + b0 * batch0 + b1 * batch1 + head_index * head;
    }
    // Row number `row` of [batch0, batch1, head, token], or of [batch1, head, token] in a ragged tensor.
    __device__ __forceinline__ int64_t row_start(uint32_t row) const {
        int unit = row / uint32_t(tokens), t = row - uint32_t(unit) * uint32_t(tokens), entry = unit / heads;
        return start(entry, unit - entry * heads) + t * token;
    }
    // The number of the row of an entry's head that token `first` of the tensor has.
    __device__ __forceinline__ int64_t number(const Extents& extents, int entry, int head_index, int first) const {
        int batch = extents.ragged ? entry % size1 : entry;
        return (int64_t(batch) * heads + head_index) * tokens + first;
    }
};

// What is done to a row x of queries or of keys: normalised with `weight`, rotated by the angles of its token. Null: not.
struct Change {
    const void* weight;
    const float *cos, *sin;
};

// Packs of 16 bytes that a lane holds of the widest row.
template <class T> constexpr int PACKS = WIDEST / PACK<T> / WARP;

template <class T> using Packs = float[PACKS<T>][PACK<T>];

__device__ __forceinline__ void load_pack(float (&v)[2], const float* p) {
    float2 q = *reinterpret_cast<const float2*>(p);
    v[0] = q.x, v[1] = q.y;
}

// What a pack's pairs have in a table; `there` of its elements are channels.
template <class T>
__device__ __forceinline__ void load_angles(float (&v)[PACK<T> / 2], const float* p, int there, bool aligned) {
    if (aligned) {
        if (there > 0) load_pack(v, p);
    } else {
#pragma unroll
        for (int i = 0; i < PACK<T> / 2; i++)
            if (2 * i < there) v[i] = p[i];
    }
}

// The lanes that share a row: a power of two of them, neighbours in a warp.
template <class T> struct Lanes {
    int count, lane, channels;

    __device__ Lanes(int width, int channels) : count(min(WARP, width / PACK<T>)), channels(channels) {
        lane = threadIdx.x & (count - 1);
    }
    // Rows that a block holds at a time, and which of them this thread shares.
    __device__ int groups() const { return BLOCK / count; }
    __device__ int group() const { return threadIdx.x / count; }
    __device__ int column(int pack) const { return (pack * count + lane) * PACK<T>; }
    // Elements of a pack that are channels; `some`: is there a row at all?
    __device__ int present(int pack, bool some) const {
        int rest = channels - column(pack);
        return !some || rest < 0 ? 0 : min(rest, PACK<T>);
    }
    __device__ void load(Packs<T>& v, const T* row, bool some) const {
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++) ::load(v[p], row + column(p), present(p, some));
    }
    // The whole warp calls it.
    __device__ float sum(float x) const {
        for (int offset = count / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }
    __device__ float dot(const Packs<T>& a, const Packs<T>& b) const {
        float x = 0.0f;
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++)
#pragma unroll
            for (int i = 0; i < PACK<T>; i++) x += a[p][i] * b[p][i];
        return sum(x);
    }
    // Turns the pairs of a row by the angles of its token, or by their negatives.
    __device__ void rotate(Packs<T>& v, const Change& change, int token, bool back, bool some) const {
        int64_t angles = int64_t(token) * (channels / 2);
        bool aligned = channels % PACK<T> == 0;
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++) {
            int there = present(p, some);
            int64_t at = angles + column(p) / 2;
            float c[PACK<T> / 2] = {}, s[PACK<T> / 2] = {};
            load_angles<T>(c, change.cos + at, there, aligned);
            load_angles<T>(s, change.sin + at, there, aligned);
#pragma unroll
            for (int i = 0; i < PACK<T>; i += 2) {
                if (i < there) {
                    float cosine = c[i / 2], sine = back ? -s[i / 2] : s[i / 2], x = v[p][i], y = v[p][i + 1];
                    v[p][i] = cosine * x - sine * y;
                    v[p][i + 1] = sine * x + cosine * y;
                }
            }
        }
    }
    __device__ float inverse_rms(const Packs<T>& x) const { return 1.0f / sqrtf(dot(x, x) / channels + NORM_EPS); }
    // v = rotated(normed(v)); `w`: the norm's weight.
    __device__ void apply(Packs<T>& v, const Packs<T>& w, const Change& change, int token, bool some) const {
        if (change.weight) {
            float factor = inverse_rms(v);
#pragma unroll
            for (int p = 0; p < PACKS<T>; p++)
#pragma unroll
                for (int i = 0; i < PACK<T>; i++) v[p][i] *= w[p][i] * factor;
        }
        if (change.cos) rotate(v, change, token, false, some);
    }
    // Turns g, the gradient of rotated(normed(x)), into that of x, and adds that of the norm's weight to dw. x is used where there is
    // a norm.
    __device__ void take_back(Packs<T>& g, Packs<T>& dw, const Packs<T>& x, const Packs<T>& w, const Change& change, int token,
                              bool some) const {
        if (change.cos) rotate(g, change, token, true, some);
        if (!change.weight) return;
        // y = x * inverse * w: with g the gradient of y, dw = x g inverse and dx = inverse (w g - x inverse^2 sum(x w g) / channels).
        float inverse = inverse_rms(x);
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++)
#pragma unroll
            for (int i = 0; i < PACK<T>; i++) {
                dw[p][i] += x[p][i] * g[p][i] * inverse;
                g[p][i] *= w[p][i];
            }
        float along = -inverse * inverse * dot(x, g) / channels;
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++)
#pragma unroll
            for (int i = 0; i < PACK<T>; i++) g[p][i] = (g[p][i] + x[p][i] * along) * inverse;
    }
};

// Rows that a group of lanes packs, whose loads are under way together.
constexpr int PACKED = 4;

// Packs all rows: out[row][width] = rotated(normed(x)), zeros beyond the channels. `keys`: of keys, not of queries.
template <class T>
__device__ void pack_rows(const T* x, const Rows& rows, const Change& change, const Extents& extents, bool keys, T* out, int width,
                          uint32_t count) {
    Lanes<T> lanes(width, rows.channels);
    Packs<T> v[PACKED], w = {};
    auto row = [&](int i) { return (blockIdx.x * PACKED + i) * lanes.groups() + lanes.group(); };
#pragma unroll
    for (int i = 0; i < PACKED; i++) {
        bool some = row(i) < count;
        lanes.load(v[i], x + rows.row_start(some ? row(i) : 0), some);
    }
    if (change.weight) lanes.load(w, static_cast<const T*>(change.weight), true);
#pragma unroll
    for (int i = 0; i < PACKED; i++) {
        bool some = row(i) < count;
        int token = (some ? row(i) : 0) % uint32_t(rows.tokens);
        if (extents.ragged) {
            Entry e = extents.find(token, 0, rows.size1, keys);
            token -= keys ? e.key : e.query;
        }
        lanes.apply(v[i], w, change, token, some);
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++)
            if (some && lanes.column(p) < width) store_pack(out + int64_t(row(i)) * width + lanes.column(p), v[i][p]);
    }
}

// delta[row] = dot product of the output's row and its gradient. `rows` finds both; a lane group per row.
template <class T>
__device__ void dot_rows(const T* a, const T* b, const Rows& rows, float* delta, int width, uint32_t count) {
    Lanes<T> lanes(width, rows.channels);
    uint32_t row = blockIdx.x * lanes.groups() + lanes.group();
    bool some = row < count;
    if (!some) row = 0;
    int64_t at = rows.row_start(row);
    Packs<T> x, y;
    lanes.load(x, a + at, some);
    lanes.load(y, b + at, some);
    float dot = lanes.dot(x, y);
    if (some && lanes.lane == 0) delta[row] = dot;
}

// Which rows a launch of unpack_rows takes, per axis (batch0, batch1, token, head): `parallel` rows at once, no two of which share
// an element, from `base` on; `loops` rows that are all the same element are added up by one group.
struct Walk {
    int parallel[4], loops[4], base[4];
};

// Gradients of queries that come in pieces (warpgroup_backward.cuh): a tile is of 8192 / width rows, and is [rows / 64][width / 64] pieces
// of 64 rows and 64 channels; row r of a piece has its groups of 8 channels in the order of their number ^ r % 8. An entry starts with
// a tile.
__device__ __forceinline__ int piece_rows(int width) { return 8192 / width; }

// The tile that an entry starts with, of those of a head: of ragged entries, one more may be begun than their queries fill.
__device__ __forceinline__ int first_tile(const Extents& extents, const Entry& e, int b0, int width) {
    return extents.ragged ? e.query / piece_rows(width) + b0 : 0;
}

// A row of gradients of packed rows: [row][width], or in pieces.
struct GradRow {
    const float* start;
    int piece, turn;

    __device__ GradRow(const float* grad, int64_t row, int width, bool pieces)
        : start(grad + (pieces ? row / 64 * 64 * width + row % 64 * 64 : row * width)), piece(pieces ? 64 * 64 : 64),
          turn(pieces ? int(row % 8) * 8 : 0) {}
    // Four channels.
    __device__ float4 load(int column) const {
        return *reinterpret_cast<const float4*>(start + column / 64 * piece + (column % 64 ^ turn));
    }
};

// Takes the gradient of packed rows, times `factor`, back through rotation and norm.
//  out: the operand's gradient, overwritten; or sum: the same in float, added to; both may be null
//  partial: [block][channels], sums of the gradients of the norm's weight over the block's rows; or null
//  room: rows that a unit of a gradient in pieces has room for; 0: it is not in pieces
// A row without a gradient counts as zero, whatever its elements: a key that may not be seen or has no query (`keys`: these are keys),
// a query without a key.
template <class T>
__device__ void unpack_rows(const T* x, const Rows& rows, const Change& change, const float* grad, float factor, T* out, float* sum,
                            float* partial, const Extents& extents, bool keys, const Walk& walk, int width, int room,
                            int per_group) {
    __shared__ float tile[BLOCK * PACKS<T> * PACK<T>];
    Lanes<T> lanes(width, rows.channels);
    Packs<T> w = {}, dw = {};
    if (change.weight) lanes.load(w, static_cast<const T*>(change.weight), true);
    uint32_t count = uint32_t(walk.parallel[0]) * walk.parallel[1] * walk.parallel[2] * walk.parallel[3];
    for (int step = 0; step < per_group; step++) {
        uint32_t row = (blockIdx.x * per_group + step) * lanes.groups() + lanes.group();
        bool inside = row < count;
        uint32_t rest = inside ? row : 0, next;
        int at[4];
        // Heads are the fastest, then tokens: the order of memory in the usual layouts.
        next = rest / uint32_t(walk.parallel[3]), at[3] = walk.base[3] + int(rest - next * walk.parallel[3]), rest = next;
        next = rest / uint32_t(walk.parallel[2]), at[2] = walk.base[2] + int(rest - next * walk.parallel[2]), rest = next;
        next = rest / uint32_t(walk.parallel[1]), at[1] = walk.base[1] + int(rest - next * walk.parallel[1]);
        at[0] = walk.base[0] + int(next);
        Packs<T> total = {};
        int64_t place = 0;
        int loops = walk.loops[0] * walk.loops[1] * walk.loops[2] * walk.loops[3];
        for (int i = 0; i < loops; i++) {
            int j = i;
            int head = at[3] + j % walk.loops[3];
            j /= walk.loops[3];
            int token = at[2] + j % walk.loops[2];
            j /= walk.loops[2];
            int b1 = at[1] + j % walk.loops[1], b0 = at[0] + j / walk.loops[1];
            int entry = b0 * rows.size1 + b1;
            place = rows.offset + b0 * rows.batch0 + b1 * rows.batch1 + token * rows.token + head * rows.head;
            int number = extents.ragged ? extents.place(token, b1, rows.size1, keys) : entry;
            Entry e = extents.entry(number);
            int own = token - (keys ? e.key : e.query);
            bool some = inside && (keys ? own < e.keys && e.queries > 0 : e.keys > 0);
            int64_t unit = int64_t(entry) * rows.heads + head;
            int first = room ? first_tile(extents, e, number / rows.size1, width) * piece_rows(width) : 0;
            GradRow g_row(grad, room ? unit * room + first + own : unit * rows.tokens + token, width, room > 0);
            Packs<T> g = {};
#pragma unroll
            for (int p = 0; p < PACKS<T>; p++) {
                if (lanes.present(p, some) > 0) {
#pragma unroll
                    for (int i = 0; i < PACK<T>; i += 4) {
                        float4 q = g_row.load(lanes.column(p) + i);
                        g[p][i] = factor * q.x, g[p][i + 1] = factor * q.y;
                        g[p][i + 2] = factor * q.z, g[p][i + 3] = factor * q.w;
                    }
                }
            }
            Packs<T> v = {};
            if (change.weight) lanes.load(v, x + place, some);
            lanes.take_back(g, dw, v, w, change, own, some);
#pragma unroll
            for (int p = 0; p < PACKS<T>; p++)
#pragma unroll
                for (int i = 0; i < PACK<T>; i++) total[p][i] += g[p][i];
        }
#pragma unroll
        for (int p = 0; p < PACKS<T>; p++) {
            int there = lanes.present(p, inside);
            if (there > 0 && out) store(out + place + lanes.column(p), total[p], there);
            if (there > 0 && sum) {
#pragma unroll
                for (int i = 0; i < PACK<T>; i++)
                    if (i < there) sum[place + lanes.column(p) + i] += total[p][i];
            }
        }
    }
    if (!partial) return;
    int padded = lanes.count * PACKS<T> * PACK<T>;
#pragma unroll
    for (int p = 0; p < PACKS<T>; p++)
#pragma unroll
        for (int i = 0; i < PACK<T>; i++) tile[lanes.group() * padded + lanes.column(p) + i] = dw[p][i];
    __syncthreads();
    for (int c = threadIdx.x; c < rows.channels; c += BLOCK) {
        float x = 0.0f;
        for (int group = 0; group < lanes.groups(); group++) x += tile[group * padded + c];
        partial[int64_t(blockIdx.x) * rows.channels + c] = x;
    }
}
