// CUDA's vector types with their alignment, and the constructors make_*.
#pragma once

#include <cstdint>

#define HYWU_VECTOR1(T, N, A)                                                                             \
    struct alignas(A) N##1 {                                                                              \
        T x;                                                                                              \
    };                                                                                                    \
    static inline N##1 make_##N##1(T x) { return {x}; }
#define HYWU_VECTOR2(T, N, A)                                                                             \
    struct alignas(A) N##2 {                                                                              \
        T x, y;                                                                                           \
    };                                                                                                    \
    static inline N##2 make_##N##2(T x, T y) { return {x, y}; }
#define HYWU_VECTOR3(T, N)                                                                                \
    struct N##3 {                                                                                         \
        T x, y, z;                                                                                        \
    };                                                                                                    \
    static inline N##3 make_##N##3(T x, T y, T z) { return {x, y, z}; }
#define HYWU_VECTOR4(T, N, A)                                                                             \
    struct alignas(A) N##4 {                                                                              \
        T x, y, z, w;                                                                                     \
    };                                                                                                    \
    static inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define HYWU_VECTORS(T, N, BYTES)                                                                         \
    HYWU_VECTOR1(T, N, BYTES)                                                                             \
    HYWU_VECTOR2(T, N, (2 * BYTES))                                                                       \
    HYWU_VECTOR3(T, N)                                                                                    \
    HYWU_VECTOR4(T, N, (BYTES < 4 ? 4 * BYTES : 16))

HYWU_VECTORS(signed char, char, 1)
HYWU_VECTORS(unsigned char, uchar, 1)
HYWU_VECTORS(short, short, 2)
HYWU_VECTORS(unsigned short, ushort, 2)
HYWU_VECTORS(int, int, 4)
HYWU_VECTORS(unsigned, uint, 4)
HYWU_VECTORS(float, float, 4)
HYWU_VECTORS(double, double, 8)
HYWU_VECTORS(long long, longlong, 8)
HYWU_VECTORS(unsigned long long, ulonglong, 8)

#undef HYWU_VECTORS
#undef HYWU_VECTOR1
#undef HYWU_VECTOR2
#undef HYWU_VECTOR3
#undef HYWU_VECTOR4

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return {x, y, z}; }
};
