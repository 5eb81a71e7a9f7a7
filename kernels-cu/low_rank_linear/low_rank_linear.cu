// Matrix products with an optional second term: linear layers with low-rank updates, and their gradients; see product.cuh. The products
// S = X A^T that feed that term, in bf16: see shrink.cuh.
#ifndef Element
#include "ladder.cuh"
#include "merge.cuh"
#include "placing.cuh"
#include "quantized.cuh"
#include "shrink.cuh"
#include "simt.cuh"
#include "tensor_core.cuh"
#include "warpgroup.cuh"

// Threads of a block, and blocks that share a multiprocessor.
template <class T, int TILE>
constexpr int PRODUCT_THREADS = 256;
template <>
constexpr int PRODUCT_THREADS<bf16, 64> = tensor_core::Shape<64>::THREADS;
template <class T, int TILE>
constexpr int PRODUCT_BLOCKS = TILE == 64 ? 3 : 2;

// The kernel of a layout and a tile: is k contiguous in A, and in B?
#define PRODUCT(name, A_ALONG_K, B_ALONG_K, TILE)                                                                       \
    extern "C" __global__ void __launch_bounds__((PRODUCT_THREADS<Element, TILE>), (PRODUCT_BLOCKS<Element, TILE>))       \
        KERNEL(name)(const Element* a, const Element* b, const Element* a2, const Element* b2, Element* out,            \
                     const Element* bias, float* partial, Sizes sizes) {                                                \
        ENGINE::product<A_ALONG_K, B_ALONG_K, TILE>(a, b, a2, b2, out, bias, partial, sizes);                           \
    }

// The kernel of a format and a shape of tiles; bf16 only.
#define QUANTIZED(name, Code, Shape, BLOCKS)                                                                            \
    extern "C" __global__ void __launch_bounds__(quantized::Shape::THREADS, BLOCKS)                                     \
        name(const bf16* x, const uint8_t* codes, const float* scales, const bf16* s, const bf16* b, bf16* out,         \
             const bf16* bias, Sizes sizes) {                                                                           \
        quantized::product<quantized::Code, quantized::Shape>(x, codes, scales, s, b, out, bias, sizes);                \
    }
QUANTIZED(quantized_int8_many_bf16, Int8, Many, 2)
QUANTIZED(quantized_int8_few_bf16, Int8, Few, 2)
QUANTIZED(quantized_fp8_many_bf16, Fp8, Many, 2)
QUANTIZED(quantized_fp8_few_bf16, Fp8, Few, 2)

#define DEQUANTIZE(name, Code)                                                                                          \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                                 \
        KERNEL(name)(const uint8_t* codes, const float* scales, Element* out, int inner, int groups) {                  \
        quantized::dequantize<quantized::Code>(codes, scales, out, inner, groups);                                      \
    }

// The kernels of Hopper; elsewhere they are empty, and not launched.
#ifdef HOPPER
#define WARPGROUP_PRODUCT(...) warpgroup::product<warpgroup::Config<__VA_ARGS__>>(a, b, a2, b2, out, sizes)
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define WARPGROUP_PRODUCT(...)
#define CLUSTER_OF(blocks)
#endif
#define WARPGROUP(name, cluster, ...)                                                                                          \
    extern "C" __global__ void cluster __launch_bounds__(warpgroup::THREADS, 1)                                                 \
        name(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap a2, \
             const __grid_constant__ CUtensorMap b2, const __grid_constant__ CUtensorMap out,                                    \
             const __grid_constant__ warpgroup::Sizes sizes) {                                                                  \
        WARPGROUP_PRODUCT(__VA_ARGS__);                                                                                        \
    }
// Columns of a tile and blocks of a cluster, for each layout.
#define WARPGROUP_KERNELS(layout, A_ALONG_K, B_ALONG_K)                              \
    WARPGROUP(warpgroup_##layout##_256_2, CLUSTER_OF(2), A_ALONG_K, B_ALONG_K, 256, 2) \
    WARPGROUP(warpgroup_##layout##_256_1, , A_ALONG_K, B_ALONG_K, 256, 1)              \
    WARPGROUP(warpgroup_##layout##_128_2, CLUSTER_OF(2), A_ALONG_K, B_ALONG_K, 128, 2) \
    WARPGROUP(warpgroup_##layout##_128_1, , A_ALONG_K, B_ALONG_K, 128, 1)              \
    WARPGROUP(warpgroup_##layout##_64_1, , A_ALONG_K, B_ALONG_K, 64, 1)

WARPGROUP_KERNELS(nt, true, true)
WARPGROUP_KERNELS(nn, true, false)
WARPGROUP_KERNELS(tn, false, false)

// The product that computes S too.
#ifdef HOPPER
#define WARPGROUP_WITH_S(...) warpgroup::product<warpgroup::Config<__VA_ARGS__>>(a, b, a2, b2, out, sizes, &work)
#else
#define WARPGROUP_WITH_S(...)
#endif
extern "C" __global__ void CLUSTER_OF(2) __launch_bounds__(warpgroup::THREADS, 1)
    warpgroup_nt_256_2_s(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                         const __grid_constant__ CUtensorMap a2, const __grid_constant__ CUtensorMap b2,
                         const __grid_constant__ CUtensorMap out, const __grid_constant__ warpgroup::Sizes sizes,
                         const __grid_constant__ within::Work work) {
    WARPGROUP_WITH_S(true, true, 256, 2, 4, true, true);
}

// A thread a pack.
extern "C" __global__ void __launch_bounds__(BLOCK) place_ranks(Placing placing) {
    int64_t i = thread_index();
    if (i < placing.packs()) placing.place(i);
}

// Steps of the ladder, see README.md.
WARPGROUP(ladder_3, , true, true, 128, 1, 1, false)
WARPGROUP(ladder_4, , true, true, 128, 1, 5, false)
WARPGROUP(ladder_5, , true, true, 256, 1, 4, false)

// S by blocks of HEIGHT rows and RANKS ranks, with so many blocks on a multiprocessor.
#define SHRINK(name, HEIGHT, RANKS, ALIGNED, BLOCKS)                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS)                                                         \
        name(const bf16* x, const bf16* a, bf16* s, shrink::Sizes sizes) {                                              \
        shrink::shrink<HEIGHT, RANKS, ALIGNED>(x, a, s, sizes);                                                         \
    }
SHRINK(shrink_16_16_bf16, 16, 16, true, 3)
SHRINK(shrink_16_32_bf16, 16, 32, true, 3)
SHRINK(shrink_32_16_bf16, 32, 16, true, 2)
SHRINK(shrink_32_32_bf16, 32, 32, true, 2)
// Rows that are not whole packs.
SHRINK(shrink_odd_bf16, 16, 16, false, 3)

// Adapters' B [n, ranks] -> [ranks, n].
extern "C" __global__ void __launch_bounds__(BLOCK)
    shrink_transpose_bf16(const bf16* __restrict__ b, bf16* __restrict__ out, int n, int ranks) {
    shrink::transpose(b, out, n, ranks);
}

#define Element float
#define KERNEL(name) name##_f32
#define ENGINE simt
#include "low_rank_linear/low_rank_linear.cu"
#undef Element
#undef KERNEL
#undef ENGINE

#define Element bf16
#define KERNEL(name) name##_bf16
#define ENGINE tensor_core
#include "low_rank_linear/low_rank_linear.cu"

#else  // once per element type
PRODUCT(product_nt_64, true, true, 64)
PRODUCT(product_nt_128, true, true, 128)
PRODUCT(product_nn_64, true, false, 64)
PRODUCT(product_nn_128, true, false, 128)
PRODUCT(product_tn_64, false, false, 64)
PRODUCT(product_tn_128, false, false, 128)

extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 3)
    KERNEL(merge)(const Element* weight, const Element* a, const Element* b, Element* out, MergeSizes sizes) {
    ENGINE::merge(weight, a, b, out, sizes);
}
DEQUANTIZE(dequantize_int8, Int8)
DEQUANTIZE(dequantize_fp8, Fp8)
#endif
