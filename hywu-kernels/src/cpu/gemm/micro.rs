//! The innermost part of the matrix product, for each instruction set.

/// Packed panels of A and B, k-major, and their depth.
pub(super) type Step = (usize, *const f32, *const f32);

/// Where a micro-kernel's tile of C stands: its first element, elements from row to row, and rows to write.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub c: *mut f32,
    pub stride: usize,
    pub rows: usize,
    /// Add to what is there.
    pub add: bool,
}

/// A micro-kernel: sums the steps for a tile of `mr` rows and `nr` columns.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub mr: usize,
    pub nr: usize,
    pub run: unsafe fn(steps: &[Step], place: Place),
}

/// Widest tile of all kernels.
pub(super) const MAX_TILE: usize = 12 * 32;

/// Runs everywhere.
const PORTABLE: Kernel = Kernel { mr: 4, nr: 8, run: portable };

/// What this processor can run, the fastest last.
pub(super) fn kernels() -> impl Iterator<Item = Kernel> {
    let mut all = [Some(PORTABLE), None, None];
    #[cfg(target_arch = "x86_64")]
    {
        let wide = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        all[1] = wide.then_some(Kernel { mr: 6, nr: 16, run: avx2 });
        all[2] = is_x86_feature_detected!("avx512f").then_some(Kernel { mr: 12, nr: 32, run: avx512 });
    }
    all.into_iter().flatten()
}

pub(super) fn kernel() -> Kernel {
    kernels().last().unwrap_or(PORTABLE)
}

/// The instruction set that the matrix product uses here.
pub(crate) fn simd_level() -> &'static str {
    match kernel().mr {
        12 => "AVX-512",
        6 => "AVX2",
        _ => "portable",
    }
}

/// # Safety
/// Every step's panels hold depth * 4 and depth * 8 elements; the place has `rows` <= 4 rows of 8 elements.
unsafe fn portable(steps: &[Step], place: Place) {
    let mut sum = [[0.0f32; 8]; 4];
    for &(k, a, b) in steps {
        // SAFETY: the caller's contract gives the lengths.
        let (a, b) = unsafe { (std::slice::from_raw_parts(a, k * 4), std::slice::from_raw_parts(b, k * 8)) };
        for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(8)) {
            for i in 0..4 {
                for j in 0..8 {
                    sum[i][j] += a[i] * b[j];
                }
            }
        }
    }
    for (i, sum) in sum.iter().take(place.rows).enumerate() {
        // SAFETY: as above.
        let c = unsafe { std::slice::from_raw_parts_mut(place.c.add(i * place.stride), 8) };
        match place.add {
            true => c.iter_mut().zip(sum).for_each(|(c, s)| *c += s),
            false => c.copy_from_slice(sum),
        }
    }
}

/// # Safety
/// AVX2 and FMA are there; every step's panels hold depth * 6 and depth * 16 elements; the place has `rows` <= 6 rows of 16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(steps: &[Step], place: Place) {
    use std::arch::x86_64::{
        _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    let mut sum = [[_mm256_setzero_ps(); 2]; 6];
    for &(k, a, b) in steps {
        for p in 0..k {
            // SAFETY: p < k, and the caller's contract gives the lengths.
            unsafe {
                let (b0, b1) = (_mm256_loadu_ps(b.add(p * 16)), _mm256_loadu_ps(b.add(p * 16 + 8)));
                for (i, s) in sum.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(p * 6 + i));
                    s[0] = _mm256_fmadd_ps(x, b0, s[0]);
                    s[1] = _mm256_fmadd_ps(x, b1, s[1]);
                }
            }
        }
    }
    for (i, s) in sum.iter().enumerate() {
        if i < place.rows {
            // SAFETY: row i of the place holds 16 elements.
            unsafe {
                let c = place.c.add(i * place.stride);
                for (j, s) in s.iter().enumerate() {
                    let c = c.add(j * 8);
                    let s = if place.add { _mm256_add_ps(_mm256_loadu_ps(c), *s) } else { *s };
                    _mm256_storeu_ps(c, s);
                }
            }
        }
    }
}

/// # Safety
/// AVX-512F is there; every step's panels hold depth * 12 and depth * 32 elements; the place has `rows` <= 12 rows of 32.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(steps: &[Step], place: Place) {
    use std::arch::x86_64::{
        _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    let mut sum = [[_mm512_setzero_ps(); 2]; 12];
    for &(k, a, b) in steps {
        for p in 0..k {
            // SAFETY: p < k, and the caller's contract gives the lengths.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(b.add(p * 32)), _mm512_loadu_ps(b.add(p * 32 + 16)));
                for (i, s) in sum.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(p * 12 + i));
                    s[0] = _mm512_fmadd_ps(x, b0, s[0]);
                    s[1] = _mm512_fmadd_ps(x, b1, s[1]);
                }
            }
        }
    }
    for (i, s) in sum.iter().enumerate() {
        if i < place.rows {
            // SAFETY: row i of the place holds 32 elements.
            unsafe {
                let c = place.c.add(i * place.stride);
                for (j, s) in s.iter().enumerate() {
                    let c = c.add(j * 16);
                    let s = if place.add { _mm512_add_ps(_mm512_loadu_ps(c), *s) } else { *s };
                    _mm512_storeu_ps(c, s);
                }
            }
        }
    }
}
