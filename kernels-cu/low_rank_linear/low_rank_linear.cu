// Matrix products with an optional second term: linear layers with low-rank updates, and their gradients; see product.cuh.
#ifndef Element
#include "merge.cuh"
#include "simt.cuh"
#include "tensor_core.cuh"

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
#endif
