// Tensor-core products, matrix loads and asynchronous copies by their PTX instructions, with the fragments of
// the PTX manual. With g == lane / 4 and t == lane % 4, two bfloat16 in a register:
//   a[0]: row g, columns 2t, 2t+1; a[1]: row g+8, the same; a[2], a[3]: those rows, columns 2t+8, 2t+9
//   b[0]: rows 2t, 2t+1 of column g; b[1]: rows 2t+8, 2t+9
//   d[0], d[1]: row g, columns 2t, 2t+1; d[2], d[3]: row g+8
#pragma once

#ifdef HYWU_EMULATOR
#include "emulator_mma.h"
#else

#include <stdint.h>

#define HYWU_PTX static __device__ __forceinline__

/// d += a b: 16 x 16 by 16 x 8 of bfloat16, sums in float.
HYWU_PTX void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// 8 x 8 matrices of 16-bit elements from shared memory. Lanes 0 to 7 give the rows of the first matrix, and
/// so on; rows are 16 bytes, aligned. Register i is of matrix i: row g, columns 2t, 2t+1.
HYWU_PTX void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}
/// The same of the transposed matrices: rows 2t, 2t+1 of column g.
HYWU_PTX void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}
/// Two matrices: their rows are given by lanes 0 to 15.
HYWU_PTX void ldmatrix_x2(uint32_t r[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}
HYWU_PTX void ldmatrix_x2_trans(uint32_t r[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

/// 16 bytes from global to shared memory, both aligned, or zeros where not `valid`.
HYWU_PTX void cp_async_16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
                 : "memory");
}
HYWU_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most N of this thread's latest groups are under way.
template <int N>
HYWU_PTX void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#undef HYWU_PTX

#endif
