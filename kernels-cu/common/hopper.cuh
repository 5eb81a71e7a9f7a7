// Hopper's own instructions: bulk tensor copies (TMA), memory barriers that count their bytes, and products of a warpgroup (wgmma), by
// their PTX (ISA 8.0 and later, "Asynchronous Warpgroup Level Matrix Instructions"). For sm_90a alone.
//
// A barrier is a uint64_t in shared memory, aligned to 8. Its phase of parity p is over when all its arrivals and all its announced bytes
// have come; barrier_wait(b, p) returns from then on, until the next phase of that parity begins. Phases start with parity 0.
//
// Tiles in shared memory have lines of 128 bytes (64 bf16), and are written by the copy engine and read by wgmma with the 128-byte
// swizzle: the 16-byte chunk c of line i lies where chunk c ^ (i % 8) would. They start at multiples of 1024 bytes.
#pragma once

#include <stdint.h>

namespace hopper {

// A block gets no more registers than it starts with, all threads the same, in steps of 8. Do they suffice for a producer with `few` a
// thread and `consumers` warpgroups with `more`? If not, more_registers waits for ever.
constexpr bool registers_suffice(int consumers, int few, int more) {
    int warpgroups = consumers + 1, at_start = 65536 / (128 * warpgroups) / 8 * 8;
    return few + consumers * more <= warpgroups * at_start;
}

/// A side's descriptor `bytes` further on, a multiple of 16. The address is in the lower half, and no carry leaves it: the upper half stays
/// in its register for all steps of a product.
static __device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) {
    return (descriptor & 0xffffffff00000000ull) | (uint32_t(descriptor) + (bytes >> 4));
}

/// A place in a ring of STAGES tiles: a slot, and the parity of the phase in which it is filled and emptied.
template <int STAGES>
struct RingPlace {
    int slot = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

} // namespace hopper

#ifdef HYWU_EMULATOR
#include "emulator_hopper.h"
#else

#include <cuda.h>

// Is this a compilation for a device that has these?
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1
#endif

namespace hopper {

#define HYWU_PTX static __device__ __forceinline__

HYWU_PTX uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Barriers

HYWU_PTX void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
/// Makes initialised barriers visible to the copy engine and to the cluster; a barrier of the block or the cluster follows.
HYWU_PTX void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
HYWU_PTX void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// At the barrier in the same place of another block of the cluster.
HYWU_PTX void barrier_arrive_in(uint64_t* barrier, uint32_t block) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
}
/// An arrival that announces `bytes` of copies.
HYWU_PTX void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
HYWU_PTX bool barrier_passed(uint64_t* barrier, uint32_t parity) {
    uint32_t passed;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(passed)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return passed != 0;
}
HYWU_PTX void barrier_wait(uint64_t* barrier, uint32_t parity) {
    while (!barrier_passed(barrier, parity)) {}
}
/// A barrier of some whole warps of the block, numbered 1 to 15 (0 is __syncthreads).
HYWU_PTX void named_barrier(uint32_t number, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/// An arrival at such a barrier without a wait; who waits has seen what this thread wrote before.
HYWU_PTX void named_barrier_arrive(uint32_t number, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Clusters

/// The block's number in its cluster.
HYWU_PTX uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
/// A barrier of all threads of the cluster.
HYWU_PTX void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// The word in the same place of another block's shared memory; a barrier of the cluster came after it was written.
HYWU_PTX uint32_t word_in(const uint32_t* word, uint32_t block) {
    uint32_t value;
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.u32 %0, [remote];\n}"
                 : "=r"(value)
                 : "r"(shared_address(word)), "r"(block)
                 : "memory");
    return value;
}

// Copies: boxes of a tensor map, at coordinates that count its dimensions from the innermost. What lies outside the tensor is zero,
// and counts among the bytes.

HYWU_PTX void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
HYWU_PTX void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
        : "memory");
}
HYWU_PTX void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, int u, int v) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
            shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
        : "memory");
}
/// To the same place in every block of the cluster that `blocks` has a bit for, each with its own barrier.
HYWU_PTX void load_box_multicast(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "h"(blocks)
        : "memory");
}
/// Parts outside the tensor are not written.
HYWU_PTX void store_box(const CUtensorMap* map, const void* from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y)
                 : "memory");
}
HYWU_PTX void store_box(const CUtensorMap* map, const void* from, int x, int y, int z, int u, int v) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
                 : "memory");
}
/// `bytes` of neighbours, a multiple of 16 at multiples of 16.
HYWU_PTX void store_linear(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}
/// The same, added to what is there.
HYWU_PTX void add_linear(float* to, const void* from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
                 "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}
HYWU_PTX void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Waits until at most N of this thread's latest groups of stores still read shared memory.
template <int N>
HYWU_PTX void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
/// The same until they are done.
template <int N>
HYWU_PTX void store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
/// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and of wgmma; a barrier makes that hold
/// for other threads.
HYWU_PTX void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// The same for accesses to global memory.
HYWU_PTX void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Counters in global memory, by which blocks wait for each other: for those that have started before alone, or it may be for ever.

/// The counter before this call, which adds 1.
HYWU_PTX uint32_t counter_next(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
/// The same; who counts last has seen all that the others did before.
HYWU_PTX uint32_t counter_pass(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
/// Adds 1; who has waited for it sees what this thread did before, stores of the copy engine that it has waited for included.
HYWU_PTX void counter_add(uint32_t* counter) {
    asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
/// Until the counter is `value`.
HYWU_PTX void counter_wait(uint32_t* counter, uint32_t value) {
    uint32_t now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    while (now != value);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Products

/// What wgmma is told about a side in shared memory, of lines of 128 bytes with the 128-byte swizzle. A side along k has a line for each
/// row; eight rows are `stride` = 1024 bytes apart, `leading` is not used; k + 16 is start + 32 bytes. A side across k has a line for each
/// k, of 64 rows: eight k are `stride` = 1024 bytes apart, 64 rows `leading` bytes; k + 16 is start + 2048 bytes.
HYWU_PTX uint64_t descriptor(const void* start, uint32_t leading, uint32_t stride) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62;
    return SWIZZLE_128 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 | ((shared_address(start) & 0x3ffff) >> 4);
}
/// Before the first product, and after other accesses to its registers.
HYWU_PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HYWU_PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most N of the latest groups of products are under way.
template <int N>
HYWU_PTX void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define HYWU_D8(d, i)                                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HYWU_D16(d, i) HYWU_D8(d, i), HYWU_D8(d, i + 8)
#define HYWU_D32(d) HYWU_D16(d, 0), HYWU_D16(d, 16)
#define HYWU_D64(d) HYWU_D32(d), HYWU_D16(d, 32), HYWU_D16(d, 48)
#define HYWU_D88(d) HYWU_D64(d), HYWU_D16(d, 64), HYWU_D8(d, 80)
#define HYWU_D128(d) HYWU_D88(d), HYWU_D8(d, 88), HYWU_D16(d, 96), HYWU_D16(d, 112)
#define HYWU_R32                                                                                                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, "     \
    "%25, %26, %27, %28, %29, %30, %31"
#define HYWU_R64                                                                                                              \
    HYWU_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "    \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HYWU_R88                                                                                                              \
    HYWU_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "    \
    "%85, %86, %87"
#define HYWU_R128                                                                                                             \
    HYWU_R88 ", %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, "       \
    "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, "      \
    "%126, %127"

// A product whose accumulators are N / 2 registers; its other operands are numbered from there on. SS: A by a descriptor, RS: by registers.
#define HYWU_WGMMA(N, REGISTERS, ACCUMULATORS, ADD, SIDES, TRANSPOSED, ...)                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, " SIDES ", p, 1, 1, " TRANSPOSED  \
                 ";\n}"                                                                                                       \
                 : ACCUMULATORS                                                                                               \
                 : __VA_ARGS__)
#define HYWU_SS(N, H, A, B, ADD, TA, TB)                                                                                      \
    HYWU_WGMMA(N, HYWU_R##H, HYWU_D##H(d), "%" #ADD, "%" #A ", %" #B, "%" #TA ", %" #TB, "l"(a), "l"(b), "r"(int(add)),        \
               "n"(int(!A_ALONG_K)), "n"(int(!B_ALONG_K)))
#define HYWU_RS(N, H, A0, A1, A2, A3, B, ADD, TB)                                                                             \
    HYWU_WGMMA(N, HYWU_R##H, HYWU_D##H(d), "%" #ADD, "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B, "%" #TB, "r"(a[0]),     \
               "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(!B_ALONG_K)))

/// d = a b, or d += a b where `add`: 64 x 16 by 16 x N of bf16, sums in float, by the 128 threads of a warpgroup, asynchronously. Warp w
/// of the group has rows 16 w ..; with g == lane / 4 and t == lane % 4, d[4 j], d[4 j + 1] are row g, columns 8 j + 2 t, + 1, and
/// d[4 j + 2], d[4 j + 3] those of row g + 8.
template <int N, bool A_ALONG_K, bool B_ALONG_K>
HYWU_PTX void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    static_assert(N == 64 || N == 128 || N == 176 || N == 256, "these widths are used");
#ifdef HOPPER
    if constexpr (N == 64) HYWU_SS(64, 32, 32, 33, 34, 35, 36);
    else if constexpr (N == 128) HYWU_SS(128, 64, 64, 65, 66, 67, 68);
    else if constexpr (N == 176) HYWU_SS(176, 88, 88, 89, 90, 91, 92);
    else HYWU_SS(256, 128, 128, 129, 130, 131, 132);
#endif
}

/// The same with A from registers, two bf16 in each: a[0] is row g, k 2 t and 2 t + 1, a[1] the same of row g + 8, a[2] and a[3] those
/// rows' k 2 t + 8 and 2 t + 9. So d[8 i] .. d[8 i + 7] of a product, narrowed, are A of another's step i. They must stay as they are until
/// the product is waited for.
template <int N, bool B_ALONG_K>
HYWU_PTX void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    static_assert(N == 64 || N == 128, "these widths are used");
#ifdef HOPPER
    if constexpr (N == 64) HYWU_RS(64, 32, 32, 33, 34, 35, 36, 37, 38);
    else HYWU_RS(128, 64, 64, 65, 66, 67, 68, 69, 70);
#endif
}

#undef HYWU_D8
#undef HYWU_D16
#undef HYWU_D32
#undef HYWU_D64
#undef HYWU_D88
#undef HYWU_D128
#undef HYWU_R32
#undef HYWU_R64
#undef HYWU_R88
#undef HYWU_R128
#undef HYWU_WGMMA
#undef HYWU_SS
#undef HYWU_RS

/// What is done with these registers before and after is not moved across this: the waits above don't name them.
template <int N>
HYWU_PTX void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/// 2^x with a relative error of 2^-22 at most, zero where that is below the normal numbers: one instruction of the special function unit.
HYWU_PTX float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// The registers of a warpgroup's threads from here on; the kernel's launch bounds say how many they had.
template <int N>
HYWU_PTX void fewer_registers() {
#ifdef HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
HYWU_PTX void more_registers() {
#ifdef HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

#undef HYWU_PTX

} // namespace hopper

#endif
