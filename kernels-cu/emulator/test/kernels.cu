// Kernels for the test of the emulator; plain CUDA, so that nvcc takes them too.

#include "mma.cuh"

#include <cuda_bf16.h>
#include <stdint.h>

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name)                                                                        \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];                                       \
    type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

struct Scale {
    float factor;
    int64_t n;
};

extern "C" __global__ void __launch_bounds__(256)
    test_add(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ out, int64_t n) {
    int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __fadd_rn(__ldg(a + i), b[i]);
}

#define SCALE(name, T)                                                                                    \
    extern "C" __global__ void name(T* x, const Scale scale) {                                            \
        int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;                                       \
        if (i < scale.n) x[i] = T(float(x[i]) * scale.factor);                                            \
    }
SCALE(test_scale_f32, float)
SCALE(test_scale_bf16, __nv_bfloat16)

// The sum of a block by halving; `missing`: without the barrier that it needs.
template <bool MISSING>
static __device__ void block_sum(const float* x, float* out) {
    __shared__ float part[256];
    part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
        if (!MISSING) __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}
extern "C" __global__ void test_block_sum(const float* x, float* out) { block_sum<false>(x, out); }
extern "C" __global__ void test_missing_barrier(const float* x, float* out) { block_sum<true>(x, out); }

extern "C" __global__ void test_warp_sum(const float* x, float* out, int64_t* sums, unsigned* ballots) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
    float sum = x[i];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    int64_t scan = i;
    for (int step = 1; step < 32; step *= 2) {
        int64_t before = __shfl_up_sync(0xffffffffu, scan, step);
        if (lane >= step) scan += before;
    }
    unsigned ballot = __ballot_sync(0xffffffffu, lane % 3 == 0);
    // Half of a warp at a time, with its own mask.
    unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
    int first = __shfl_sync(half, lane, 0, 16);
    if (!__all_sync(half, first == lane / 16 * 16)) ballot = 0;
    out[i] = sum;
    sums[i] = scan;
    ballots[i] = ballot;
}

// c (16 x 8) = a (16 x k) b (k x 8), row by row, bfloat16; one warp; a and b come by cp.async.
extern "C" __global__ void test_mma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k,
                                    int wait) {
    DYNAMIC_SHARED(__nv_bfloat16, shared);
    __nv_bfloat16 *tile_a = shared, *tile_b = shared + 16 * 16;
    int lane = threadIdx.x;
    float d[4] = {0, 0, 0, 0};
    for (int start = 0; start < k; start += 16) {
        int row = lane / 2, column = start + lane % 2 * 8;
        cp_async_16(tile_a + lane * 8, a + row * k + column, true);
        if (lane < 16) cp_async_16(tile_b + lane * 8, b + (start + lane) * 8, start + lane < k);
        cp_async_commit();
        if (wait) cp_async_wait<0>();
        __syncthreads();
        uint32_t fa[4], fb[2];
        ldmatrix_x4(fa, tile_a + lane % 16 * 16 + lane / 16 * 8);
        ldmatrix_x2_trans(fb, tile_b + lane % 16 * 8);
        mma_m16n8k16_bf16(d, fa, fb);
        __syncthreads();
    }
    int g = lane / 4, t = lane % 4 * 2;
    c[g * 8 + t] = d[0];
    c[g * 8 + t + 1] = d[1];
    c[(g + 8) * 8 + t] = d[2];
    c[(g + 8) * 8 + t + 1] = d[3];
}

// Every thread's register i, from plain and transposed loads of four matrices.
extern "C" __global__ void test_ldmatrix(const uint16_t* x, uint32_t* plain, uint32_t* transposed) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    uint16_t* tile = reinterpret_cast<uint16_t*>(dynamic_shared);
    for (int i = 0; i < 8; i++) tile[threadIdx.x * 8 + i] = x[threadIdx.x * 8 + i];
    __syncwarp();
    ldmatrix_x4(plain + threadIdx.x * 4, tile + threadIdx.x * 8);
    ldmatrix_x4_trans(transposed + threadIdx.x * 4, tile + threadIdx.x * 8);
}

extern "C" __global__ void test_poison(float* out) {
    __shared__ float fixed[8];
    DYNAMIC_SHARED(float, dynamic);
    out[blockIdx.x * 2] = fixed[threadIdx.x];
    out[blockIdx.x * 2 + 1] = dynamic[threadIdx.x];
    fixed[threadIdx.x] = 1;
    dynamic[threadIdx.x] = 1;
}

// Blocks of a cluster have their own, which the emulator has not.
extern "C" __global__ void __cluster_dims__(2, 1, 1) test_cluster_shared(float* out) {
    __shared__ float x[32];
    x[threadIdx.x] = float(blockIdx.x);
    __syncthreads();
    out[blockIdx.x * 32 + threadIdx.x] = x[31 - threadIdx.x];
}
// The indices of the blocks in their order in the grid.
extern "C" __global__ void __launch_bounds__(64) __cluster_dims__(2, 2, 1) test_cluster_index(unsigned* out) {
    DYNAMIC_SHARED(unsigned, own);
    own[threadIdx.x] = blockIdx.x + 100 * blockIdx.y;
    __syncthreads();
    out[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = own[63 - threadIdx.x];
}

extern "C" __global__ void test_count(unsigned* counter, int* out) {
    atomicAdd(counter, 1u);
    // Threads that have exited are not waited for.
    if (threadIdx.x >= 70) return;
    int odd = __syncthreads_count(threadIdx.x % 2), any = __syncthreads_or(threadIdx.x == 69);
    int all = __syncthreads_and(threadIdx.x < 69);
    if (threadIdx.x == 0) out[0] = odd, out[1] = any, out[2] = all;
}

extern "C" __global__ void test_deadlock() {
    if (threadIdx.x < 16) __syncthreads();
    else __syncwarp();
}

extern "C" __global__ void test_trap(int when) {
    if (when) __trap();
}

extern "C" __global__ void test_misaligned(float* x, int at) {
    *reinterpret_cast<float4*>(x + at) = make_float4(1, 2, 3, 4);
}

extern "C" __global__ void test_outside(float* x, int64_t at) { x[at] = 1; }

extern "C" __global__ void test_outside_shared(float* out, int at) {
    DYNAMIC_SHARED(float, shared);
    shared[at] = 1;
    out[0] = shared[at];
}
