// softmax(Q K^T / sqrt(d)) V and its gradients: extents.cuh says which tokens there are and who sees whom, rows.cuh packs and unpacks
// rows, tiles.cuh multiplies tiles, forward.cuh and backward.cuh go over them; warpgroup.cuh and warpgroup_backward.cuh are the passes on
// Hopper, short.cuh is for few keys. Kernels of tiles end in the width of a row: head_dim, padded.
#ifndef Element
#include "attention/backward.cuh"
#include "attention/forward.cuh"
#include "attention/short.cuh"
#include "attention/warpgroup.cuh"
#include "attention/warpgroup_backward.cuh"

// D: the width of a row; KEYS: rows of a tile of keys.
#define FEW_KEYS(D, KEYS)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(few_keys::THREADS) attention_few_keys_##D##_##KEYS##_bf16(                     \
        const bf16* q, const bf16* k, const bf16* v, Rows q_rows, Rows k_rows, Rows v_rows, Rows out_rows, Change q_change,     \
        Change k_change, Extents extents, bf16* out, float* lse, few_keys::Sizes sizes) {                                       \
        few_keys::forward<D, KEYS>(q, k, v, q_rows, k_rows, v_rows, out_rows, q_change, k_change, extents, out, lse, sizes);    \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(few_keys::THREADS, 3) attention_few_keys_gradient_##D##_##KEYS##_bf16(            \
        const bf16* q, const bf16* k, const bf16* v, const bf16* grad, Rows q_rows, Rows k_rows, Rows v_rows, Rows out_rows,    \
        Change q_change, Change k_change, Extents extents, const float* lse, bf16* d_q, bf16* d_k, bf16* d_v,                   \
        float* q_partial, float* k_partial, few_keys::Sizes sizes) {                                                            \
        few_keys::backward<D, KEYS>(q, k, v, grad, q_rows, k_rows, v_rows, out_rows, q_change, k_change, extents, lse, d_q, d_k, \
                                    d_v, q_partial, k_partial, sizes);                                                          \
    }
FEW_KEYS(64, 32)
FEW_KEYS(64, 64)
FEW_KEYS(128, 32)
FEW_KEYS(128, 64)
#undef FEW_KEYS

// Hopper's, in bf16 alone; elsewhere they are empty, and not launched.
#ifdef HOPPER
#define WARPGROUP_FORWARD(...) warpgroup::forward<warpgroup::Config<__VA_ARGS__>>({q, k, v}, sizes)
#define WARPGROUP_GRADIENTS(WIDTH) warpgroup_backward::gradients<warpgroup_backward::Config<WIDTH>>(q, k, v, grad, sizes)
#else
#define WARPGROUP_FORWARD(...)
#define WARPGROUP_GRADIENTS(WIDTH)
#endif
#define WARPGROUP(NAME, ...)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(warpgroup::Config<__VA_ARGS__>::THREADS, 1)                                    \
        NAME(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v, \
             const __grid_constant__ warpgroup::Sizes sizes) {                                                                  \
        WARPGROUP_FORWARD(__VA_ARGS__);                                                                                         \
    }
WARPGROUP(warpgroup_64_128, 64, 128, 3, 4)
WARPGROUP(warpgroup_96_128, 96, 128, 2, 3)
WARPGROUP(warpgroup_96_176, 96, 176, 2, 2)
WARPGROUP(warpgroup_128_128, 128, 128, 2, 3)
WARPGROUP(warpgroup_128_176, 128, 176, 2, 2)
// Steps of the ladder (README.md): neither turns nor overlap, turns, both; overlap alone.
WARPGROUP(attention_ladder_2, 128, 128, 2, 2, false, false)
WARPGROUP(attention_ladder_3, 128, 128, 2, 2, true, false)
WARPGROUP(attention_ladder_4, 128, 128, 2, 2, true, true)
WARPGROUP(attention_ladder_6, 128, 176, 2, 2, false, true)
#undef WARPGROUP
#undef WARPGROUP_FORWARD

#define WARPGROUP_BACKWARD(WIDTH)                                                                                               \
    extern "C" __global__ void __launch_bounds__(warpgroup_backward::THREADS, 1) warpgroup_backward_##WIDTH(                    \
        const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,    \
        const __grid_constant__ CUtensorMap grad, const __grid_constant__ warpgroup_backward::Sizes sizes) {                    \
        WARPGROUP_GRADIENTS(WIDTH);                                                                                             \
    }
WARPGROUP_BACKWARD(64)
WARPGROUP_BACKWARD(128)
#undef WARPGROUP_BACKWARD
#undef WARPGROUP_GRADIENTS

#define KERNELS "attention/attention.cu"
#include "instantiate.cuh"

#else  // once per element type

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(attention_pack)(const Element* x, Rows rows, Change change, Extents extents, int keys, Element* out, int width,
                           uint32_t count) {
    pack_rows(x, rows, change, extents, keys != 0, out, width, count);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(attention_delta)(const Element* out, const Element* grad, Rows rows, float* delta, int width, uint32_t count) {
    dot_rows(out, grad, rows, delta, width, count);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    KERNEL(attention_unpack)(const Element* x, Rows rows, Change change, const float* grad, float factor, Element* out, float* sum,
                             float* partial, Extents extents, int keys, Walk walk, int width, int room,
                             int per_group) {
    unpack_rows(x, rows, change, grad, factor, out, sum, partial, extents, keys != 0, walk, width, room, per_group);
}

#define FORWARD(D)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(FORWARD_THREADS) KERNEL(attention_forward_##D)(                                \
        const Element* q, const Element* k, const Element* v, Rows q_rows, Rows k_rows, Rows v_rows, Rows out_rows,             \
        Extents extents, float factor, Element* out, float* lse, int tiles) {                                                   \
        forward<Element, D>(q, k, v, q_rows, k_rows, v_rows, out_rows, extents, factor, out, lse, tiles);                       \
    }
FORWARD(32)
FORWARD(64)
FORWARD(128)
FORWARD(256)
#undef FORWARD

#define GRADIENT(NAME, D, OWN_QUERIES, X, Y)                                                                                    \
    extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS<Element, D>) KERNEL(attention_##NAME##_##D)(                  \
        const Element* x, const Element* y, const Element* u, const Element* w, Rows x_rows, Rows y_rows, Rows u_rows,          \
        Rows w_rows, Extents extents, const int* firsts, float factor, const float* lse, const float* delta, float* d_x,        \
        float* d_y, int tiles) {                                                                                                \
        gradient<Element, D, OWN_QUERIES, X, Y>(x, y, u, w, x_rows, y_rows, u_rows, w_rows, extents, firsts, factor, lse, delta, \
                                                d_x, d_y, tiles);                                                               \
    }
GRADIENT(query_gradient, 32, true, true, false)
GRADIENT(query_gradient, 64, true, true, false)
GRADIENT(query_gradient, 128, true, true, false)
GRADIENT(query_gradient, 256, true, true, false)
GRADIENT(key_value_gradient, 32, false, true, true)
GRADIENT(key_value_gradient, 64, false, true, true)
GRADIENT(key_value_gradient, 128, false, true, true)
// The sums of both do not fit into the registers.
GRADIENT(key_gradient, 256, false, true, false)
GRADIENT(value_gradient, 256, false, false, true)
#undef GRADIENT

#endif
