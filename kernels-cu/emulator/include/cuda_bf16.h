// bfloat16 as CUDA has it: conversions round to nearest even, arithmetic goes through float.
#pragma once

#include "emulator_types.h"

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16_raw {
    unsigned short x;
};

struct alignas(2) __nv_bfloat16 {
    unsigned short __x;

    __nv_bfloat16() = default;
    __nv_bfloat16(float v) : __x(round(v)) {}
    __nv_bfloat16(double v) : __x(round(float(v))) {}
    __nv_bfloat16(int v) : __x(round(float(v))) {}
    __nv_bfloat16(unsigned v) : __x(round(float(v))) {}
    constexpr __nv_bfloat16(__nv_bfloat16_raw v) : __x(v.x) {}
    operator __nv_bfloat16_raw() const { return {__x}; }
    operator float() const {
        uint32_t bits = uint32_t(__x) << 16;
        float v;
        memcpy(&v, &bits, sizeof v);
        return v;
    }

  private:
    static unsigned short round(float v) {
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        // The hardware's conversion knows one NaN.
        if (v != v) return 0x7fff;
        return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
    __nv_bfloat162() = default;
    __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

#define HYWU_F static inline

HYWU_F __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
HYWU_F __nv_bfloat16 __float2bfloat16(float v) { return v; }
HYWU_F __nv_bfloat16 __double2bfloat16(double v) { return float(v); }
HYWU_F __nv_bfloat16 __int2bfloat16_rn(int v) { return float(v); }
HYWU_F float __bfloat162float(__nv_bfloat16 v) { return v; }
HYWU_F unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.__x; }
HYWU_F short __bfloat16_as_short(__nv_bfloat16 v) { return short(v.__x); }
HYWU_F __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return __nv_bfloat16_raw{v}; }
HYWU_F __nv_bfloat16 __short_as_bfloat16(short v) { return __ushort_as_bfloat16((unsigned short)v); }

HYWU_F __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
HYWU_F __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
HYWU_F __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 v) { return {v, v}; }
HYWU_F __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
HYWU_F __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
HYWU_F __nv_bfloat162 __float2bfloat162_rn(float v) { return {v, v}; }
HYWU_F float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
HYWU_F __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
HYWU_F __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
HYWU_F float __low2float(__nv_bfloat162 v) { return v.x; }
HYWU_F float __high2float(__nv_bfloat162 v) { return v.y; }

#define HYWU_ARITHMETIC(OP, NAME)                                                                         \
    HYWU_F __nv_bfloat16 operator OP(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) OP float(b); }   \
    HYWU_F __nv_bfloat16& operator OP##=(__nv_bfloat16& a, __nv_bfloat16 b) { return a = a OP b; }        \
    HYWU_F __nv_bfloat16 NAME(__nv_bfloat16 a, __nv_bfloat16 b) { return a OP b; }                        \
    HYWU_F __nv_bfloat162 operator OP(__nv_bfloat162 a, __nv_bfloat162 b) {                               \
        return {a.x OP b.x, a.y OP b.y};                                                                  \
    }                                                                                                     \
    HYWU_F __nv_bfloat162 NAME##2(__nv_bfloat162 a, __nv_bfloat162 b) { return a OP b; }
HYWU_ARITHMETIC(+, __hadd)
HYWU_ARITHMETIC(-, __hsub)
HYWU_ARITHMETIC(*, __hmul)
HYWU_ARITHMETIC(/, __hdiv)
#undef HYWU_ARITHMETIC
HYWU_F __nv_bfloat16 operator-(__nv_bfloat16 a) {
    return __nv_bfloat16_raw{static_cast<unsigned short>(a.__x ^ 0x8000)};
}
HYWU_F __nv_bfloat16 __hneg(__nv_bfloat16 a) { return -a; }
HYWU_F __nv_bfloat16 __habs(__nv_bfloat16 a) {
    return __nv_bfloat16_raw{static_cast<unsigned short>(a.__x & 0x7fff)};
}
HYWU_F __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return fmaf(float(a), float(b), float(c));
}
HYWU_F __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return fmaxf(float(a), float(b)); }
HYWU_F __nv_bfloat16 __hmin(__nv_bfloat16 a, __nv_bfloat16 b) { return fminf(float(a), float(b)); }
HYWU_F bool __hisnan(__nv_bfloat16 a) { return (a.__x & 0x7fff) > 0x7f80; }
HYWU_F bool __heq(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) == float(b); }
HYWU_F bool __hlt(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) < float(b); }
HYWU_F bool __hgt(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) > float(b); }

#undef HYWU_F
