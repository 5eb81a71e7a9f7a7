// Device functions: arithmetic with named rounding, bits, approximations, minima, loads, atomics.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define HYWU_F static inline

// Bits

template <class To, class From>
inline To hywu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
HYWU_F float __uint_as_float(unsigned v) { return hywu_bits<float>(v); }
HYWU_F float __int_as_float(int v) { return hywu_bits<float>(v); }
HYWU_F unsigned __float_as_uint(float v) { return hywu_bits<unsigned>(v); }
HYWU_F int __float_as_int(float v) { return hywu_bits<int>(v); }
HYWU_F double __longlong_as_double(long long v) { return hywu_bits<double>(v); }
HYWU_F long long __double_as_longlong(double v) { return hywu_bits<long long>(v); }

HYWU_F int __popc(unsigned v) { return __builtin_popcount(v); }
HYWU_F int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
HYWU_F int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
HYWU_F int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
HYWU_F int __ffs(int v) { return __builtin_ffs(v); }
HYWU_F int __ffsll(long long v) { return __builtin_ffsll(v); }
HYWU_F unsigned __brev(unsigned v) {
    v = (v >> 1 & 0x55555555u) | (v & 0x55555555u) << 1;
    v = (v >> 2 & 0x33333333u) | (v & 0x33333333u) << 2;
    v = (v >> 4 & 0x0f0f0f0fu) | (v & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(v);
}
HYWU_F unsigned long long __brevll(unsigned long long v) {
    return (unsigned long long)__brev(unsigned(v)) << 32 | __brev(unsigned(v >> 32));
}
HYWU_F unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
HYWU_F int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
HYWU_F unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
HYWU_F long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
HYWU_F unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
    return unsigned((((unsigned long long)hi << 32 | lo) << (n & 31)) >> 32);
}
HYWU_F unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
    return unsigned(((unsigned long long)hi << 32 | lo) >> (n & 31));
}
HYWU_F unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
    unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned s = select >> (4 * i) & 15, byte = unsigned(bytes >> (8 * (s & 7))) & 0xff;
        if (s & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}

// Arithmetic that the compiler may not contract

HYWU_F float __fadd_rn(float a, float b) { return a + b; }
HYWU_F float __fsub_rn(float a, float b) { return a - b; }
HYWU_F float __fmul_rn(float a, float b) { return a * b; }
HYWU_F float __fdiv_rn(float a, float b) { return a / b; }
HYWU_F float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
HYWU_F float __fsqrt_rn(float a) { return sqrtf(a); }
HYWU_F float __frcp_rn(float a) { return 1.0f / a; }
HYWU_F float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
HYWU_F double __dadd_rn(double a, double b) { return a + b; }
HYWU_F double __dsub_rn(double a, double b) { return a - b; }
HYWU_F double __dmul_rn(double a, double b) { return a * b; }
HYWU_F double __ddiv_rn(double a, double b) { return a / b; }
HYWU_F double __dsqrt_rn(double a) { return sqrt(a); }
HYWU_F double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// Approximations, here as exact as the host's

HYWU_F float rsqrtf(float a) { return float(1.0 / sqrt(double(a))); }
HYWU_F double rsqrt(double a) { return 1.0 / sqrt(a); }
HYWU_F float rcbrtf(float a) { return 1.0f / cbrtf(a); }
HYWU_F float hywu_expf(float a) { return expf(a); }
HYWU_F float hywu_exp10f(float a) { return float(pow(10.0, double(a))); }
HYWU_F float hywu_logf(float a) { return logf(a); }
HYWU_F float hywu_log2f(float a) { return log2f(a); }
HYWU_F float hywu_log10f(float a) { return log10f(a); }
HYWU_F float hywu_powf(float a, float b) { return powf(a, b); }
HYWU_F float hywu_sinf(float a) { return sinf(a); }
HYWU_F float hywu_cosf(float a) { return cosf(a); }
HYWU_F float hywu_tanf(float a) { return tanf(a); }
HYWU_F void hywu_sincosf(float a, float* s, float* c) { *s = sinf(a), *c = cosf(a); }
HYWU_F float hywu_tanhf(float a) { return tanhf(a); }
// The C library declares functions of these names for itself.
#define __expf hywu_expf
#define __exp10f hywu_exp10f
#define __logf hywu_logf
#define __log2f hywu_log2f
#define __log10f hywu_log10f
#define __powf hywu_powf
#define __sinf hywu_sinf
#define __cosf hywu_cosf
#define __tanf hywu_tanf
#define __sincosf hywu_sincosf
#define __tanhf hywu_tanhf
HYWU_F float __fdividef(float a, float b) { return a / b; }
HYWU_F float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
HYWU_F float sinpif(float a) { return float(sin(M_PI * double(a))); }
HYWU_F float cospif(float a) { return float(cos(M_PI * double(a))); }
HYWU_F float normcdff(float a) { return float(0.5 * erfc(-double(a) * M_SQRT1_2)); }
HYWU_F float fdividef(float a, float b) { return a / b; }

// Conversions saturate, and NaN gives 0; a plain cast of such a value does neither here

#define HYWU_CONVERSIONS(SUFFIX, ROUND)                                                                   \
    HYWU_F int __float2int_##SUFFIX(float a) {                                                            \
        if (a != a) return 0;                                                                             \
        double r = ROUND(double(a));                                                                      \
        return r >= 2147483647.0 ? 2147483647 : r <= -2147483648.0 ? -2147483647 - 1 : int(r);            \
    }                                                                                                     \
    HYWU_F unsigned __float2uint_##SUFFIX(float a) {                                                      \
        if (a != a) return 0;                                                                             \
        double r = ROUND(double(a));                                                                      \
        return r >= 4294967295.0 ? 4294967295u : r <= 0.0 ? 0u : unsigned(r);                             \
    }
HYWU_CONVERSIONS(rn, nearbyint)
HYWU_CONVERSIONS(rz, trunc)
HYWU_CONVERSIONS(rd, floor)
HYWU_CONVERSIONS(ru, ceil)
#undef HYWU_CONVERSIONS
HYWU_F float __int2float_rn(int a) { return float(a); }
HYWU_F float __uint2float_rn(unsigned a) { return float(a); }
HYWU_F float __ll2float_rn(long long a) { return float(a); }
HYWU_F float __ull2float_rn(unsigned long long a) { return float(a); }
HYWU_F float __double2float_rn(double a) { return float(a); }

// Minima and maxima: those of floats take the operand that is a number

#define HYWU_MINMAX(R, A, B)                                                                              \
    HYWU_F R min(A a, B b) {                                                                              \
        R x = a, y = b;                                                                                   \
        return x < y ? x : y;                                                                             \
    }                                                                                                     \
    HYWU_F R max(A a, B b) {                                                                              \
        R x = a, y = b;                                                                                   \
        return x > y ? x : y;                                                                             \
    }
HYWU_MINMAX(int, int, int)
HYWU_MINMAX(unsigned, unsigned, unsigned)
HYWU_MINMAX(unsigned, int, unsigned)
HYWU_MINMAX(unsigned, unsigned, int)
HYWU_MINMAX(long, long, long)
HYWU_MINMAX(unsigned long, unsigned long, unsigned long)
HYWU_MINMAX(unsigned long, long, unsigned long)
HYWU_MINMAX(unsigned long, unsigned long, long)
HYWU_MINMAX(long long, long long, long long)
HYWU_MINMAX(unsigned long long, unsigned long long, unsigned long long)
HYWU_MINMAX(unsigned long long, long long, unsigned long long)
HYWU_MINMAX(unsigned long long, unsigned long long, long long)
#undef HYWU_MINMAX
HYWU_F float min(float a, float b) { return fminf(a, b); }
HYWU_F float max(float a, float b) { return fmaxf(a, b); }
HYWU_F double min(double a, double b) { return fmin(a, b); }
HYWU_F double max(double a, double b) { return fmax(a, b); }
HYWU_F double min(float a, double b) { return fmin(double(a), b); }
HYWU_F double max(float a, double b) { return fmax(double(a), b); }
HYWU_F double min(double a, float b) { return fmin(a, double(b)); }
HYWU_F double max(double a, float b) { return fmax(a, double(b)); }

// Loads and stores with a cache hint

#define HYWU_LOAD(NAME)                                                                                   \
    template <class T>                                                                                    \
    inline T NAME(const T* p) {                                                                           \
        return *p;                                                                                        \
    }
HYWU_LOAD(__ldg)
HYWU_LOAD(__ldca)
HYWU_LOAD(__ldcg)
HYWU_LOAD(__ldcs)
HYWU_LOAD(__ldlu)
HYWU_LOAD(__ldcv)
#undef HYWU_LOAD
#define HYWU_STORE(NAME)                                                                                  \
    template <class T>                                                                                    \
    inline void NAME(T* p, T v) {                                                                         \
        *p = v;                                                                                           \
    }
HYWU_STORE(__stwb)
HYWU_STORE(__stcg)
HYWU_STORE(__stcs)
HYWU_STORE(__stwt)
#undef HYWU_STORE

// Atomics: blocks run on several threads of the host

template <class T, class F>
inline T hywu_atomic(T* p, F change) {
    T old, next;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    do next = change(old);
    while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}
// The second parameter takes part in no deduction, so that literals convert as with CUDA's overloads.
template <class T>
using HywuSame = std::common_type_t<T>;
template <class T>
inline T atomicAdd(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return T(old + v); }); }
template <class T>
inline T atomicSub(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return T(old - v); }); }
template <class T>
inline T atomicMin(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return v < old ? v : old; }); }
template <class T>
inline T atomicMax(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return v > old ? v : old; }); }
template <class T>
inline T atomicAnd(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return T(old & v); }); }
template <class T>
inline T atomicOr(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return T(old | v); }); }
template <class T>
inline T atomicXor(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T old) { return T(old ^ v); }); }
template <class T>
inline T atomicExch(T* p, HywuSame<T> v) { return hywu_atomic(p, [v](T) { return v; }); }
template <class T>
inline T atomicCAS(T* p, HywuSame<T> expected, HywuSame<T> v) {
    T old = expected;
    __atomic_compare_exchange(p, &old, &v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return old;
}
HYWU_F unsigned atomicInc(unsigned* p, unsigned top) {
    return hywu_atomic(p, [top](unsigned old) { return old >= top ? 0u : old + 1; });
}

#undef HYWU_F
