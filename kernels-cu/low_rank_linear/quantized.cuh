// The product of bf16 rows with a weight in eight bits, and a low-rank update in bf16, on tensor cores:
//     out = scale_o * (X Q^T) + S B^T + bias,
// summed as in tensor_core.cuh: over k, then, multiplied by the column's scale in its registers, over the ranks. So the codes are
// exact factors, and the update knows nothing of the scale.
//
// Codes come through shared memory as they are and become bf16 in a lane's registers. A row of them is whole groups of 16, zeros at its
// end; in a group four bytes are for one lane, in the order that mma wants: those of k 2 t, 2 t + 1, 2 t + 8, 2 t + 9 for the lane with
// t == lane % 4.
#pragma once

#include "tensor_core.cuh"

namespace quantized {

using tensor_core::Stage;

constexpr int GROUP = 16;

__device__ __forceinline__ __nv_bfloat162 pair(uint32_t word) { return *reinterpret_cast<__nv_bfloat162*>(&word); }
__device__ __forceinline__ uint32_t word(__nv_bfloat162 pair) { return *reinterpret_cast<uint32_t*>(&pair); }

// Two's complement: the seven lower bits less 128 where the sign is set. As bf16, 128 + bits and 128 + sign are exact, and so is
// what lies between them.
struct Int8 {
    static __device__ __forceinline__ void widen(uint32_t (&b)[2], uint32_t codes) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t both = __byte_perm(codes, 0x43, i == 0 ? 0x4140 : 0x4342);  // 0x43 code: 0x4300 is 128
            b[i] = word(__hsub2(pair(both & 0xff7fff7fu), pair(both & 0xff80ff80u)));
        }
    }
};

// e4m3: exponent and mantissa lie where those of a bf16 end and start; the exponents count from 7 and from 127. Subnormals become normal
// in the product.
struct Fp8 {
    static __device__ __forceinline__ void widen(uint32_t (&b)[2], uint32_t codes) {
        constexpr uint32_t SHIFT = (127 + 127 - 7) << 7;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t both = __byte_perm(codes, 0, i == 0 ? 0x1404 : 0x3424);  // code 00
            b[i] = word(__hmul2(pair((both >> 4 & 0x07f007f0u) | (both & 0x80008000u)), pair(SHIFT << 16 | SHIFT)));
        }
    }
};

// A tile, and what a warp has of it: 16 x ROWS rows, 8 x COLUMNS columns; COLUMN_WARPS warps side by side.
// Many rows, bound by arithmetic: as the large tile of tensor_core.cuh.
struct Many {
    static constexpr int HEIGHT = 128, WIDTH = 128, DEPTH = 32, STAGES = 3, THREADS = 256;
    static constexpr int ROWS = 4, COLUMNS = 4, COLUMN_WARPS = 4;
    static constexpr bool SKIPS = false;
};
// Few rows, bound by reading the codes: narrow tiles for many blocks, many stages for many bytes on their way, each code made bf16 by
// one warp only. It skips sixteens of rows that there are not.
struct Few {
    static constexpr int HEIGHT = 64, WIDTH = 32, DEPTH = 64, STAGES = 8, THREADS = 128;
    static constexpr int ROWS = 4, COLUMNS = 1, COLUMN_WARPS = 4;
    static constexpr bool SKIPS = true;
};

// A stage of codes. Lines are an odd number of 16 bytes, so that the eight that ldmatrix reads at a time lie in different banks.
template <class Shape>
struct Codes {
    static constexpr int PITCH = Shape::DEPTH + 16, SIZE = Shape::WIDTH * PITCH;
    // Of a step.
    static constexpr int GROUPS = Shape::DEPTH / GROUP, WORDS = Shape::COLUMNS * GROUPS;

    // From `codes` on, lines of `pitch`, of which `lines` are there.
    static __device__ __forceinline__ void fill(uint8_t* stage, const uint8_t* codes, int pitch, int lines, int k0) {
        static_assert(Shape::WIDTH * GROUPS == Shape::THREADS, "a group each");
        int line = threadIdx.x / GROUPS, at = threadIdx.x % GROUPS * GROUP;
        bool inside = line < lines && k0 + at < pitch;
        cp_async_16(stage + line * PITCH + at, inside ? codes + int64_t(line) * pitch + k0 + at : codes, inside);
    }

    // A lane's codes of a step: word j * GROUPS + g is of column j of eights from `column` on, and of group g.
    static __device__ __forceinline__ void load(uint32_t (&words)[WORDS], const uint8_t* stage, int column) {
        int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            int word = i + lane / 8;
            const uint8_t* line = stage + (column + word / GROUPS * 8 + lane % 8) * PITCH + word % GROUPS * GROUP;
            uint32_t f[4];
            ldmatrix_x4(f, line);
#pragma unroll
            for (int j = 0; j < 4; j++) words[i + j] = f[j];
        }
    }
};

template <class Code, class Shape>
__device__ void product(const bf16* x, const uint8_t* codes, const float* scales, const bf16* s, const bf16* b, bf16* out,
                        const bf16* bias, const Sizes& sizes) {
    constexpr int HEIGHT = Shape::HEIGHT, WIDTH = Shape::WIDTH, DEPTH = Shape::DEPTH, STAGES = Shape::STAGES;
    constexpr int THREADS = Shape::THREADS, ROWS = Shape::ROWS, COLUMNS = Shape::COLUMNS;
    using A = Stage<true, HEIGHT, DEPTH>;  // of x, then of S
    using B = Stage<true, WIDTH, DEPTH>;   // of lora_b; the codes need less
    using Q = Codes<Shape>;
    static_assert(Q::SIZE <= 2 * B::SIZE && HEIGHT * (WIDTH + 8) <= STAGES * (A::SIZE + B::SIZE), "they fit in the stages");
    DYNAMIC_SHARED(bf16, shared);
    Work<bf16, uint8_t> w;
    if (!work<true, true, HEIGHT, WIDTH, DEPTH>(w, x, codes, sizes)) return;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, steps = ceil_div(w.k, DEPTH);
    int warp_row = warp / Shape::COLUMN_WARPS * (16 * ROWS);
    int warp_column = warp % Shape::COLUMN_WARPS * (8 * COLUMNS);
    auto rows_of = [&](int slot) { return shared + slot * A::SIZE; };
    auto columns_of = [&](int slot) { return shared + STAGES * A::SIZE + slot * B::SIZE; };
    auto codes_of = [&](int slot) { return reinterpret_cast<uint8_t*>(columns_of(slot)); };

    auto fill = [&](int step, int slot) {
        if (step < steps) {
            A::template fill<THREADS>(rows_of(slot), first_source(w.a, sizes.a, w.height, w.k, step * DEPTH));
            Q::fill(codes_of(slot), w.b, sizes.b.pitch, w.width, step * DEPTH);
        } else if (step < w.last) {
            Source<bf16> from_a, from_b;
            second_sources<true, DEPTH>(from_a, from_b, w, s, b, sizes, step - steps);
            A::template fill<THREADS>(rows_of(slot), from_a);
            B::template fill<THREADS>(columns_of(slot), from_b);
        }
        // An empty group too, so that the number of groups tells which stage has come.
        cp_async_commit();
    };
    // The slot of a step that has come for every thread; that of the step before is filled again, as nobody reads it any more.
    auto next = [&](int step) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        fill(step + STAGES - 1, (step + STAGES - 1) % STAGES);
        return step % STAGES;
    };

    float sum[ROWS][COLUMNS][4] = {};
    auto multiply = [&](const bf16* stage, int k, const uint32_t (&fb)[COLUMNS][2]) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int row = warp_row + 16 * i;
            if (Shape::SKIPS && row >= w.height) continue;
            uint32_t fa[4];
            A::fragment(fa, stage, row, k, false);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) mma_m16n8k16_bf16(sum[i][j], fa, fb[j]);
        }
    };

#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) fill(i, i);
    for (int step = 0; step < steps; step++) {
        int slot = next(step);
        uint32_t words[Q::WORDS];
        Q::load(words, codes_of(slot), warp_column);
#pragma unroll
        for (int g = 0; g < Q::GROUPS; g++) {
            uint32_t fb[COLUMNS][2];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) Code::widen(fb[j], words[j * Q::GROUPS + g]);
            multiply(rows_of(slot), g * GROUP, fb);
        }
    }

    // A thread holds pairs of neighbours: (row, column), (row + 8, column) of every 16 x 8.
    int row = warp_row + lane / 4, column = warp_column + lane % 4 * 2;
    scales += w.index * sizes.bias + w.part * sizes.n + w.column;
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        int c = column + 8 * j;
        float low = c < w.width ? scales[c] : 0.0f, high = c + 1 < w.width ? scales[c + 1] : 0.0f;
#pragma unroll
        for (int i = 0; i < ROWS; i++) sum[i][j][0] *= low, sum[i][j][1] *= high, sum[i][j][2] *= low, sum[i][j][3] *= high;
    }

    for (int step = steps; step < w.last; step++) {
        int slot = next(step), left = sizes.k2 - (step - steps) % ceil_div(sizes.k2, DEPTH) * DEPTH;
        // In tiles of any depth the same: what reaches past the ranks is left out.
#pragma unroll 1
        for (int k = 0; k < min(DEPTH, left); k += 16) {
            uint32_t fb[COLUMNS][2];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
                ldmatrix_x2(fb[j], columns_of(slot) + (warp_column + 8 * j + lane % 8) * B::PITCH + k + lane / 8 % 2 * 8);
            multiply(rows_of(slot), k, fb);
        }
    }
    cp_async_wait<0>();
    tensor_core::write_tile<HEIGHT, WIDTH, THREADS>(shared, sum, row, column, w, out, bias, sizes);
}

// scale * code, rounded: a thread has a group of 16 codes of a row of `inner`. The gradient of x needs it, and products of f32.
template <class Code, class T>
__device__ void dequantize(const uint8_t* codes, const float* scales, T* out, int inner, int groups) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, across = ceil_div(inner, GROUP);
    if (i >= uint32_t(groups)) return;
    uint32_t row = i / across;
    int at = int(i % across) * GROUP;
    float scale = scales[row], v[GROUP / PACK<T>][PACK<T>];
    uint4 group = *reinterpret_cast<const uint4*>(codes + int64_t(i) * GROUP);
    uint32_t words[4] = {group.x, group.y, group.z, group.w};
#pragma unroll
    for (int t = 0; t < 4; t++) {
        uint32_t b[2];
        Code::widen(b, words[t]);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float low, high;
            ::widen(b[h], low, high);
            int k = 2 * t + 8 * h;
            v[k / PACK<T>][k % PACK<T>] = low * scale;
            v[(k + 1) / PACK<T>][(k + 1) % PACK<T>] = high * scale;
        }
    }
#pragma unroll
    for (int p = 0; p < GROUP / PACK<T>; p++) {
        int k = at + p * PACK<T>;
        if (k < inner) store(out + int64_t(row) * inner + k, v[p], min(PACK<T>, inner - k));
    }
}

} // namespace quantized
