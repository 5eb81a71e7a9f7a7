// Tensor-core products, matrix loads and asynchronous copies, with the fragment layouts of PTX. On the device
// the same names come from common/mma.cuh.
#pragma once

#include "emulator_core.h"

#include <cstdint>
#include <cstring>

namespace emu {

inline float low(uint32_t v) {
    v <<= 16;
    float f;
    memcpy(&f, &v, 4);
    return f;
}
inline float high(uint32_t v) {
    v &= 0xffff0000u;
    float f;
    memcpy(&f, &v, 4);
    return f;
}

struct Product {
    float* d;
    const uint32_t *a, *b;
    static void run(void* const operands[WARP]) {
        float a[16][16], b[16][8], d[16][8];
        for (unsigned i = 0; i < WARP; i++) {
            auto* p = static_cast<const Product*>(operands[i]);
            if (!p) fail("mma by a warp that is not whole");
            unsigned g = i / 4, t = 2 * (i % 4);
            for (unsigned r = 0; r < 4; r++) {
                float* to = &a[g + 8 * (r % 2)][t + 8 * (r / 2)];
                to[0] = low(p->a[r]), to[1] = high(p->a[r]);
                d[g + 8 * (r / 2)][t + r % 2] = p->d[r];
            }
            for (unsigned r = 0; r < 2; r++) {
                b[t + 8 * r][g] = low(p->b[r]);
                b[t + 8 * r + 1][g] = high(p->b[r]);
            }
        }
        for (unsigned m = 0; m < 16; m++) {
            for (unsigned k = 0; k < 16; k++) {
                for (unsigned n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
            }
        }
        for (unsigned i = 0; i < WARP; i++) {
            float* to = static_cast<const Product*>(operands[i])->d;
            for (unsigned r = 0; r < 4; r++) to[r] = d[i / 4 + 8 * (r / 2)][2 * (i % 4) + r % 2];
        }
    }
};

struct MatrixLoad {
    uint32_t* r;
    const void* row;
    template <unsigned COUNT, bool TRANSPOSED>
    static void run(void* const operands[WARP]) {
        uint16_t matrices[COUNT][8][8];
        for (unsigned i = 0; i < 8 * COUNT; i++) {
            auto* load = static_cast<const MatrixLoad*>(operands[i]);
            if (!load) fail("ldmatrix by a warp that is not whole");
            if (uintptr_t(load->row) % 16) fail("ldmatrix of a row not aligned to 16 bytes");
            if (!is_shared(load->row)) fail("ldmatrix of a row outside shared memory");
            memcpy(matrices[i / 8][i % 8], load->row, 16);
        }
        for (unsigned i = 0; i < WARP; i++) {
            auto* load = static_cast<const MatrixLoad*>(operands[i]);
            if (!load) fail("ldmatrix by a warp that is not whole");
            unsigned g = i / 4, t = 2 * (i % 4);
            for (unsigned n = 0; n < COUNT; n++) {
                auto& m = matrices[n];
                uint32_t first = TRANSPOSED ? m[t][g] : m[g][t];
                uint32_t second = TRANSPOSED ? m[t + 1][g] : m[g][t + 1];
                load->r[n] = first | second << 16;
            }
        }
    }
};

template <unsigned COUNT, bool TRANSPOSED>
void load_matrices(uint32_t* r, const void* row, const char* name) {
    MatrixLoad load{r, row};
    collective(0xffffffffu, &load, MatrixLoad::run<COUNT, TRANSPOSED>, name);
}

} // namespace emu

/// d += a b: 16 x 16 by 16 x 8 of bfloat16, sums in float.
static inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    emu::Product p{d, a, b};
    emu::collective(0xffffffffu, &p, emu::Product::run, "mma_m16n8k16_bf16");
}

static inline void ldmatrix_x4(uint32_t r[4], const void* row) {
    emu::load_matrices<4, false>(r, row, "ldmatrix_x4");
}
static inline void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    emu::load_matrices<4, true>(r, row, "ldmatrix_x4_trans");
}
static inline void ldmatrix_x2(uint32_t r[2], const void* row) {
    emu::load_matrices<2, false>(r, row, "ldmatrix_x2");
}
static inline void ldmatrix_x2_trans(uint32_t r[2], const void* row) {
    emu::load_matrices<2, true>(r, row, "ldmatrix_x2_trans");
}

/// 16 bytes from global to shared memory, or zeros. They arrive at the wait, so that a missing one shows.
static inline void cp_async_16(void* to, const void* from, bool valid) {
    if (uintptr_t(to) % 16) emu::fail("cp.async to an address not aligned to 16 bytes");
    if (valid && uintptr_t(from) % 16) emu::fail("cp.async from an address not aligned to 16 bytes");
    if (!emu::is_shared(to)) emu::fail("cp.async to an address outside shared memory");
    emu::Thread& t = emu::self();
    t.copies.push_back({to, from, valid, t.group});
}
static inline void cp_async_commit() { emu::self().group++; }
/// Waits until at most N of this thread's latest groups are under way.
template <int N>
inline void cp_async_wait() {
    emu::Thread& t = emu::self();
    size_t done = 0;
    for (; done < t.copies.size() && t.copies[done].group + N < t.group; done++) {
        const emu::Copy& c = t.copies[done];
        if (c.valid) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + std::ptrdiff_t(done));
}
