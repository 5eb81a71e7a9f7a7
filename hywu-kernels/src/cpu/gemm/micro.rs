//! The innermost part of the matrix product, for each instruction set: a tile of C in registers, a broadcast of A times vectors of B.

/// Part of the sums of a tile: element (i, p) of A is `a[i * row + p * column]`, wherever A is; B is a packed panel, k-major.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub depth: usize,
    pub a: *const f32,
    pub row: usize,
    pub column: usize,
    pub b: *const f32,
    /// Rows of A that are wanted next, and their stride: they are brought to the cache meanwhile.
    pub next: *const f32,
    pub next_row: usize,
}

/// Where a tile of C stands: its first element and elements from row to row.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub c: *mut f32,
    pub stride: usize,
    /// Add to what is there.
    pub add: bool,
}

/// Sums the steps for a tile.
///
/// # Safety
/// The processor has the instructions; each step's A holds the tile's rows and its B `depth` lines as wide as the tile; the place holds
/// the tile.
type Run = unsafe fn(steps: &[Step], place: Place);

/// The micro-kernels of an instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    name: &'static str,
    /// Floats in a vector.
    pub lanes: usize,
    /// By rows of the tile and by its vectors in a row, from one on.
    runs: &'static [[Run; VECTORS]],
}

/// Most vectors in a row of a tile.
pub(super) const VECTORS: usize = 2;
/// Elements of the largest tile.
pub(super) const MAX_TILE: usize = 14 * 32;

impl Kernel {
    /// Most rows of a tile.
    pub fn rows(&self) -> usize {
        self.runs.len()
    }
    /// Most columns of a tile.
    pub fn columns(&self) -> usize {
        VECTORS * self.lanes
    }
    /// What sums a tile of `rows` x `vectors`.
    pub fn run(&self, rows: usize, vectors: usize) -> Run {
        self.runs[rows - 1][vectors - 1]
    }
}

/// Tiles of so many rows, of one and of two vectors.
macro_rules! runs {
    ($run:ident, $($rows:literal)*) => {
        &[$([$run::<$rows, 1>, $run::<$rows, 2>]),*]
    };
}

/// Runs everywhere.
const PORTABLE: Kernel = Kernel { name: "portable", lanes: 4, runs: runs!(portable, 1 2 3 4) };

/// Two vectors of B and a broadcast beside twelve sums: sixteen registers.
#[cfg(target_arch = "x86_64")]
const AVX2: Kernel = Kernel { name: "AVX2", lanes: 8, runs: runs!(avx2, 1 2 3 4 5 6) };

/// Two vectors of B and a broadcast beside 28 sums, of 32 registers.
#[cfg(target_arch = "x86_64")]
const AVX512: Kernel =
    Kernel { name: "AVX-512", lanes: 16, runs: runs!(avx512, 1 2 3 4 5 6 7 8 9 10 11 12 13 14) };

/// What this processor can run, the fastest last.
pub(super) fn kernels() -> impl Iterator<Item = Kernel> {
    let mut all = [Some(PORTABLE), None, None];
    #[cfg(target_arch = "x86_64")]
    {
        let wide = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        all[1] = wide.then_some(AVX2);
        all[2] = is_x86_feature_detected!("avx512f").then_some(AVX512);
    }
    all.into_iter().flatten()
}

pub(super) fn kernel() -> Kernel {
    kernels().last().unwrap_or(PORTABLE)
}

/// The instruction set that the matrix product uses here.
pub(crate) fn simd_level() -> &'static str {
    kernel().name
}

/// Vectors of an instruction set.
///
/// # Safety
/// Every function needs a processor that has the instructions, and pointers valid for a vector.
trait Simd {
    type V: Copy;
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, x: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Brings what is there to the cache; nothing need be.
    #[inline(always)]
    fn prefetch(_at: *const f32) {}
    /// The same pointer, of which the compiler does not know what it was made of.
    #[inline(always)]
    fn opaque(p: *const f32) -> *const f32 {
        p
    }
}

/// Rows of A that share a pointer: the second and the third are one and two strides on, which an x86 address can say.
const SHARE: usize = 3;
/// Pointers for the rows of the highest tile.
const POINTERS: usize = 14usize.div_ceil(SHARE);
/// Steps that B is brought to the first-level cache ahead of.
const AHEAD: usize = 16;
/// Floats in a line of the cache.
const LINE: usize = 16;

/// The sums of a tile of M rows of V vectors.
///
/// # Safety
/// That of [`Run`].
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize, const V: usize>(steps: &[Step], place: Place) {
    for i in 0..M {
        S::prefetch(place.c.wrapping_add(i * place.stride));
        S::prefetch(place.c.wrapping_add(i * place.stride + V * S::LANES - 1));
    }
    // SAFETY: the caller's contract gives instructions and lengths: rows i < M of A, p < depth; `wrapping_add` goes beyond at most for
    // pointers that aren't read through.
    unsafe {
        let mut sum = [[S::splat(0.0); V]; M];
        for &Step { depth, a, row, column, b, next, next_row } in steps {
            let mut rows: [*const f32; POINTERS] = std::array::from_fn(|g| a.wrapping_add(SHARE * g * row));
            let (mut b, mut next) = (b, next);
            for start in (0..depth).step_by(LINE) {
                // In as many steps as a line is long, a line of each row.
                let line = next;
                for _ in start..depth.min(start + LINE) {
                    let mut bs = [S::splat(0.0); V];
                    for (v, to) in bs.iter_mut().enumerate() {
                        *to = S::load(b.add(v * S::LANES));
                    }
                    for (g, p) in rows.iter_mut().enumerate() {
                        for i in 0..SHARE {
                            if let Some(sum) = sum.get_mut(SHARE * g + i) {
                                let x = S::splat(*p.add(i * row));
                                for (sum, b) in sum.iter_mut().zip(bs) {
                                    *sum = S::fma(x, b, *sum);
                                }
                            }
                        }
                        // Known for what they are, the addresses of all rows would be kept each, more than there are registers.
                        *p = S::opaque(p.wrapping_add(column));
                    }
                    for line in (0..V * S::LANES).step_by(LINE) {
                        S::prefetch(b.wrapping_add(AHEAD * V * S::LANES + line));
                    }
                    S::prefetch(next);
                    next = next.wrapping_add(next_row);
                    b = b.wrapping_add(V * S::LANES);
                }
                next = line.wrapping_add(LINE);
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (v, sum) in sum.iter().enumerate() {
                let c = place.c.add(i * place.stride + v * S::LANES);
                S::store(c, if place.add { S::add(S::load(c), *sum) } else { *sum });
            }
        }
    }
}

struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 4] {
        // SAFETY: the caller's contract.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: [f32; 4]) {
        // SAFETY: the caller's contract.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}

/// # Safety
/// That of [`Run`].
unsafe fn portable<const M: usize, const V: usize>(steps: &[Step], place: Place) {
    // SAFETY: the caller's contract.
    unsafe { tile::<Portable, M, V>(steps, place) }
}

/// [`Simd`] of vectors that the processor has, and the function that is compiled for them.
macro_rules! x86 {
    ($set:ident, $run:ident, $features:literal, $v:ident, $lanes:literal,
     $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident) => {
        #[cfg(target_arch = "x86_64")]
        struct $set;

        #[cfg(target_arch = "x86_64")]
        impl Simd for $set {
            type V = std::arch::x86_64::$v;
            const LANES: usize = $lanes;
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self::V {
                // SAFETY: the caller's contract.
                unsafe { std::arch::x86_64::$splat(x) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self::V {
                // SAFETY: the caller's contract.
                unsafe { std::arch::x86_64::$load(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, x: Self::V) {
                // SAFETY: the caller's contract.
                unsafe { std::arch::x86_64::$store(to, x) }
            }
            #[inline(always)]
            unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
                // SAFETY: the caller's contract.
                unsafe { std::arch::x86_64::$add(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                // SAFETY: the caller's contract.
                unsafe { std::arch::x86_64::$fma(a, b, c) }
            }
            #[inline(always)]
            fn prefetch(at: *const f32) {
                // SAFETY: a prefetch never faults.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()) }
            }
            #[inline(always)]
            fn opaque(mut p: *const f32) -> *const f32 {
                // SAFETY: no instruction at all.
                unsafe { std::arch::asm!("/* {} */", inout(reg) p, options(pure, readonly, nostack, preserves_flags)) };
                p
            }
        }

        /// # Safety
        /// That of [`Run`].
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        unsafe fn $run<const M: usize, const V: usize>(steps: &[Step], place: Place) {
            // SAFETY: the caller's contract.
            unsafe { tile::<$set, M, V>(steps, place) }
        }
    };
}

x86!(
    Avx2,
    avx2,
    "avx2,fma",
    __m256,
    8,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_add_ps,
    _mm256_fmadd_ps
);
x86!(
    Avx512,
    avx512,
    "avx512f",
    __m512,
    16,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_add_ps,
    _mm512_fmadd_ps
);
