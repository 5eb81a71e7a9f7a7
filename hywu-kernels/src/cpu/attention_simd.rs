//! The vector code of attention: one trait over the instruction sets, and on it the base-2 exponential, the register-tiled
//! matrix product and the block transpose that forward and backward are made of.

#![allow(
    clippy::needless_range_loop,
    reason = "indices count registers and address memory through pointers alike"
)]

/// A set of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// The best that this processor has.
    pub(super) fn detect() -> Self {
        Self::available()[0]
    }
    /// All that this processor has, best first.
    pub(super) fn available() -> Vec<Self> {
        let mut all = Vec::with_capacity(3);
        #[cfg(target_arch = "x86_64")]
        {
            let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if fma && is_x86_feature_detected!("avx512f") {
                all.push(Self::Avx512);
            }
            if fma {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }
}

/// Vectors of an instruction set.
///
/// # Safety
/// Every function needs a processor that has the instructions, and pointers valid for what its name says.
pub(super) trait Simd: Copy {
    /// `LANES` floats.
    type V: Copy;
    /// Floats in a vector; divides 16.
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// The first `n` <= LANES floats, then zeros.
    unsafe fn load_first(from: *const f32, n: usize) -> Self::V;
    unsafe fn store(to: *mut f32, x: Self::V);
    /// The first `n` <= LANES floats.
    unsafe fn store_first(to: *mut f32, x: Self::V, n: usize);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` when either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Exchanges channels 2i and 2i + 1.
    unsafe fn swap_pairs(x: Self::V) -> Self::V;
    /// x * 2^n, with n in -126..=127 in the low bits of `biased` = n + [`ROUND`] + 127; zero where t < `least`.
    unsafe fn scale_exponent(x: Self::V, biased: Self::V, t: Self::V, least: Self::V) -> Self::V;
    /// A LANES x LANES block: to[c * to_step + r] = from[r * from_step + c].
    unsafe fn transpose(from: *const f32, from_step: usize, to: *mut f32, to_step: usize);
    /// [`product_body`] compiled for the instruction set.
    unsafe fn product(p: &Product);
    /// Sum of the lanes, in one fixed order.
    #[inline(always)]
    unsafe fn sum(x: Self::V) -> f32 {
        // SAFETY: the array holds the largest vector.
        unsafe { Self::fold(x, |a, b| a + b) }
    }
    /// Largest lane.
    #[inline(always)]
    unsafe fn largest(x: Self::V) -> f32 {
        // SAFETY: as above.
        unsafe { Self::fold(x, |a, b| if a > b { a } else { b }) }
    }
    /// Halves the vector until one lane is left.
    #[inline(always)]
    unsafe fn fold(x: Self::V, f: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; 16];
        // SAFETY: LANES <= 16.
        unsafe { Self::store(lanes.as_mut_ptr(), x) };
        let mut n = Self::LANES / 2;
        while n > 0 {
            for i in 0..n {
                lanes[i] = f(lanes[i], lanes[i + n]);
            }
            n /= 2;
        }
        lanes[0]
    }
}

/// Adding it rounds a float of magnitude < 2^22 to an integer, which then sits in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// 2^t for t <= 127; relative error 1e-7, 0 below 2^-126, NaN stays NaN.
///
/// t = n + r with n integer, |r| <= 1/2; 2^r is the minimax polynomial of degree 6 with constant term 1 (relative error 4e-9).
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(t: S::V) -> S::V {
    const C: [f32; 6] =
        [0.693_147_24, 0.240_226_5, 0.055_502_973, 0.009_618_031, 0.001_341, 0.000_154_697_32];
    // SAFETY: the caller's.
    unsafe {
        let least = S::splat(-126.0);
        // NaN passes: `max` gives its second argument then.
        let x = S::max(least, t);
        let shifted = S::add(x, S::splat(ROUND));
        let r = S::sub(x, S::sub(shifted, S::splat(ROUND)));
        let mut p = S::splat(C[5]);
        for c in C[..5].iter().rev() {
            p = S::fma(p, r, S::splat(*c));
        }
        p = S::fma(p, r, S::splat(1.0));
        S::scale_exponent(p, S::add(shifted, S::splat(127.0)), t, least)
    }
}

/// The operands of a matrix product: c[i]`[j]` (+)= sum over k of a[i]`[k]` * b[k]`[j]`.
pub(super) struct Product {
    /// Rows of a and c.
    pub rows: usize,
    /// Columns of b and c, in vectors.
    pub vecs: usize,
    /// Terms of a sum; they are added in order, so a row's result does not depend on the tiling.
    pub depth: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_step: usize,
    pub b: *const f32,
    /// From one vector of columns to the next.
    pub b_vec: usize,
    /// From one k to the next.
    pub b_step: usize,
    pub c: *mut f32,
    pub c_row: usize,
    /// Add to c instead of overwriting it.
    pub add: bool,
}

/// # Safety
/// The pointers reach what the sizes and strides say; `c` overlaps neither `a` nor `b`; the processor has the instructions.
#[inline(always)]
unsafe fn product_body<S: Simd, const MR: usize, const NV: usize>(p: &Product) {
    let mut v = 0;
    while v < p.vecs {
        let wide = (p.vecs - v).min(NV);
        let mut i = 0;
        while i < p.rows {
            let tall = p.rows - i >= MR;
            // SAFETY: rows i.. and vectors v.. of the operands, as many as the tile takes, are inside.
            unsafe {
                match (tall, wide) {
                    (true, 1) => tile::<S, MR, 1>(p, i, v),
                    (true, 2) => tile::<S, MR, 2>(p, i, v),
                    (true, 3) => tile::<S, MR, 3>(p, i, v),
                    (true, _) => tile::<S, MR, NV>(p, i, v),
                    (false, 1) => tile::<S, 1, 1>(p, i, v),
                    (false, 2) => tile::<S, 1, 2>(p, i, v),
                    (false, 3) => tile::<S, 1, 3>(p, i, v),
                    (false, _) => tile::<S, 1, NV>(p, i, v),
                }
            }
            i += if tall { MR } else { 1 };
        }
        v += wide;
    }
}

/// MR rows by NV vectors of a product, accumulated in registers.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(p: &Product, row: usize, vec: usize) {
    // SAFETY: the caller's.
    unsafe {
        let c = p.c.add(row * p.c_row + vec * S::LANES);
        let mut acc = [[S::splat(0.0); NV]; MR];
        if p.add {
            for i in 0..MR {
                for v in 0..NV {
                    acc[i][v] = S::load(c.add(i * p.c_row + v * S::LANES));
                }
            }
        }
        let mut a = p.a.add(row * p.a_row);
        let mut b = p.b.add(vec * p.b_vec);
        for _ in 0..p.depth {
            let mut columns = [S::splat(0.0); NV];
            for v in 0..NV {
                columns[v] = S::load(b.add(v * p.b_vec));
            }
            for i in 0..MR {
                let x = S::splat(*a.add(i * p.a_row));
                for v in 0..NV {
                    acc[i][v] = S::fma(x, columns[v], acc[i][v]);
                }
            }
            a = a.wrapping_add(p.a_step);
            b = b.wrapping_add(p.b_step);
        }
        for i in 0..MR {
            for v in 0..NV {
                S::store(c.add(i * p.c_row + v * S::LANES), acc[i][v]);
            }
        }
    }
}

/// Four floats at a time without any intrinsic.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn lanes(f: impl Fn(usize) -> f32) -> [f32; 4] {
    [f(0), f(1), f(2), f(3)]
}

// SAFETY (of every function below): the pointers are the caller's.
impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller's pointer.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self::V {
        // SAFETY: only the first n are read.
        lanes(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Self::V) {
        // SAFETY: the caller's pointer.
        unsafe { to.cast::<Self::V>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, x: Self::V, n: usize) {
        for (i, x) in x.into_iter().enumerate().take(n) {
            // SAFETY: only the first n are written.
            unsafe { *to.add(i) = x };
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Where the instruction is missing, `mul_add` would be a slow library call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            lanes(|i| a[i].mul_add(b[i], c[i]))
        } else {
            lanes(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn swap_pairs(x: Self::V) -> Self::V {
        [x[1], x[0], x[3], x[2]]
    }
    #[inline(always)]
    unsafe fn scale_exponent(x: Self::V, biased: Self::V, t: Self::V, least: Self::V) -> Self::V {
        lanes(|i| if t[i] < least[i] { 0.0 } else { x[i] * f32::from_bits(biased[i].to_bits() << 23) })
    }
    #[inline(always)]
    unsafe fn transpose(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
        for r in 0..4 {
            for c in 0..4 {
                // SAFETY: inside the caller's two blocks.
                unsafe { *to.add(c * to_step + r) = *from.add(r * from_step + c) };
            }
        }
    }
    unsafe fn product(p: &Product) {
        // SAFETY: the caller's.
        unsafe { product_body::<Self, 6, 2>(p) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Product, Simd, product_body};
    use std::arch::x86_64::*;

    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx2;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn product_avx2(p: &Product) {
        // SAFETY: the caller's.
        unsafe { product_body::<Avx2, 6, 2>(p) }
    }

    /// -1 in the first n lanes.
    #[inline(always)]
    unsafe fn first(n: usize) -> __m256i {
        // SAFETY: AVX2 is the caller's promise.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    // SAFETY (of every function below): instructions and pointers are the caller's promise.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> __m256 {
            unsafe { _mm256_maskload_ps(from, first(n)) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: __m256) {
            unsafe { _mm256_storeu_ps(to, x) }
        }
        #[inline(always)]
        unsafe fn store_first(to: *mut f32, x: __m256, n: usize) {
            unsafe { _mm256_maskstore_ps(to, first(n), x) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn swap_pairs(x: __m256) -> __m256 {
            unsafe { _mm256_permute_ps::<0b10_11_00_01>(x) }
        }
        #[inline(always)]
        unsafe fn scale_exponent(x: __m256, biased: __m256, t: __m256, least: __m256) -> __m256 {
            unsafe {
                let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(biased)));
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(t, least), _mm256_mul_ps(x, power))
            }
        }
        #[inline(always)]
        unsafe fn transpose(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
            unsafe {
                let mut r = [_mm256_setzero_ps(); 8];
                for i in 0..8 {
                    r[i] = _mm256_loadu_ps(from.add(i * from_step));
                }
                // Pairs of rows, then quadruples, then the two halves.
                let mut s = r;
                for i in 0..4 {
                    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                for q in 0..2 {
                    let (a, b, c, d) = (s[4 * q], s[4 * q + 1], s[4 * q + 2], s[4 * q + 3]);
                    r[4 * q] = _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
                    r[4 * q + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
                    r[4 * q + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(b, d);
                    r[4 * q + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(b, d);
                }
                for i in 0..4 {
                    _mm256_storeu_ps(to.add(i * to_step), _mm256_permute2f128_ps::<0x20>(r[i], r[i + 4]));
                    _mm256_storeu_ps(
                        to.add((i + 4) * to_step),
                        _mm256_permute2f128_ps::<0x31>(r[i], r[i + 4]),
                    );
                }
            }
        }
        #[inline(always)]
        unsafe fn product(p: &Product) {
            unsafe { product_avx2(p) }
        }
    }

    /// AVX-512F.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Avx512;

    #[target_feature(enable = "avx512f,avx2,fma")]
    unsafe fn product_avx512(p: &Product) {
        // SAFETY: the caller's.
        unsafe { product_body::<Avx512, 6, 4>(p) }
    }

    // SAFETY (of every function below): instructions and pointers are the caller's promise.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_first(from: *const f32, n: usize) -> __m512 {
            unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, from) }
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, x: __m512) {
            unsafe { _mm512_storeu_ps(to, x) }
        }
        #[inline(always)]
        unsafe fn store_first(to: *mut f32, x: __m512, n: usize) {
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << n) - 1) as __mmask16, x) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn swap_pairs(x: __m512) -> __m512 {
            unsafe { _mm512_permute_ps::<0b10_11_00_01>(x) }
        }
        #[inline(always)]
        unsafe fn scale_exponent(x: __m512, biased: __m512, t: __m512, least: __m512) -> __m512 {
            unsafe {
                let power = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(biased)));
                _mm512_maskz_mul_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(t, least), x, power)
            }
        }
        #[inline(always)]
        unsafe fn transpose(from: *const f32, from_step: usize, to: *mut f32, to_step: usize) {
            unsafe {
                let mut r = [_mm512_setzero_ps(); 16];
                for i in 0..16 {
                    r[i] = _mm512_loadu_ps(from.add(i * from_step));
                }
                // Pairs of rows, then quadruples, then 128-bit quarters.
                let mut s = r;
                for i in 0..8 {
                    s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                for q in 0..4 {
                    let (a, b, c, d) = (s[4 * q], s[4 * q + 1], s[4 * q + 2], s[4 * q + 3]);
                    r[4 * q] = _mm512_shuffle_ps::<0b01_00_01_00>(a, c);
                    r[4 * q + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(a, c);
                    r[4 * q + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(b, d);
                    r[4 * q + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(b, d);
                }
                // r[4q + i] holds, in quarter k, column 4k + i of rows 4q..4q + 4.
                for i in 0..4 {
                    let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(r[i], r[4 + i]);
                    let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(r[i], r[4 + i]);
                    let low2 = _mm512_shuffle_f32x4::<0b10_00_10_00>(r[8 + i], r[12 + i]);
                    let high2 = _mm512_shuffle_f32x4::<0b11_01_11_01>(r[8 + i], r[12 + i]);
                    _mm512_storeu_ps(to.add(i * to_step), _mm512_shuffle_f32x4::<0b10_00_10_00>(low, low2));
                    _mm512_storeu_ps(
                        to.add((4 + i) * to_step),
                        _mm512_shuffle_f32x4::<0b10_00_10_00>(high, high2),
                    );
                    _mm512_storeu_ps(
                        to.add((8 + i) * to_step),
                        _mm512_shuffle_f32x4::<0b11_01_11_01>(low, low2),
                    );
                    _mm512_storeu_ps(
                        to.add((12 + i) * to_step),
                        _mm512_shuffle_f32x4::<0b11_01_11_01>(high, high2),
                    );
                }
            }
        }
        #[inline(always)]
        unsafe fn product(p: &Product) {
            unsafe { product_avx512(p) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exp2_of<S: Simd>(t: f32) -> f32 {
        // SAFETY: the caller has checked that the processor has the instructions.
        unsafe { S::largest(exp2::<S>(S::splat(t))) }
    }

    #[test]
    fn exp2_is_accurate_and_keeps_the_special_values() {
        for isa in Isa::available() {
            let f = match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => exp2_of::<Avx512>,
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => exp2_of::<Avx2>,
                Isa::Portable => exp2_of::<Portable>,
            };
            for i in -125_999..=100_000 {
                let t = i as f32 * 1e-3;
                let expected = f64::from(t).exp2();
                let error = (f64::from(f(t)) - expected).abs() / expected;
                assert!(error < 2e-7, "{isa:?}: 2^{t}, relative error {error}");
            }
            assert_eq!([f(0.0), f(-1.0), f(-126.0)], [1.0, 0.5, f32::MIN_POSITIVE]);
            assert_eq!([f(-126.5), f(-1e30), f(f32::NEG_INFINITY)], [0.0; 3]);
            assert!(f(f32::NAN).is_nan());
        }
    }
}
