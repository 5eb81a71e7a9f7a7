//! f32 matrix product on packed panels. Every element of C is summed over k in one order that depends on k alone, so a row's result
//! is the same wherever it stands, whatever the other rows and the number of threads.

use rayon::prelude::*;
use std::cell::RefCell;

/// A matrix in memory: element (i, j) is `data[i * row + j * column]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub data: &'a [f32],
    pub row: usize,
    pub column: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with `columns` columns.
    pub fn rows(data: &'a [f32], columns: usize) -> Self {
        Self { data, row: columns, column: 1 }
    }
    /// The transpose of a row-major matrix with `columns` columns.
    pub fn transposed(data: &'a [f32], columns: usize) -> Self {
        Self { data, row: 1, column: columns }
    }
}

/// Depth of a packed panel: a B panel of it stays in the first-level cache.
const DEPTH: usize = 256;
/// Multiply-adds below which a second thread costs more than it brings.
const PARALLEL: usize = 1 << 18;

/// A micro-kernel: `tile` += a panel of `mr` rows times one of `nr` columns; both packed, k-major.
#[derive(Clone, Copy)]
struct Kernel {
    mr: usize,
    nr: usize,
    run: unsafe fn(k: usize, a: *const f32, b: *const f32, tile: *mut f32),
}

/// Largest tile of all kernels.
const MAX_TILE: usize = 12 * 32;

fn kernel() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return Kernel { mr: 12, nr: 32, run: avx512 };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Kernel { mr: 6, nr: 16, run: avx2 };
        }
    }
    Kernel { mr: 4, nr: 8, run: portable }
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
/// `a` holds k * 4, `b` k * 8 and `tile` 32 elements.
unsafe fn portable(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
    let mut sum = [[0.0f32; 8]; 4];
    // SAFETY: the caller's contract gives the lengths.
    let (a, b) = unsafe { (std::slice::from_raw_parts(a, k * 4), std::slice::from_raw_parts(b, k * 8)) };
    for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(8)) {
        for i in 0..4 {
            for j in 0..8 {
                sum[i][j] += a[i] * b[j];
            }
        }
    }
    // SAFETY: as above.
    let tile = unsafe { std::slice::from_raw_parts_mut(tile, 32) };
    tile.iter_mut().zip(sum.as_flattened()).for_each(|(t, s)| *t = *s);
}

/// # Safety
/// AVX2 and FMA are there; `a` holds k * 6, `b` k * 16 and `tile` 96 elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    let mut sum = [[_mm256_setzero_ps(); 2]; 6];
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
    for (i, s) in sum.iter().enumerate() {
        // SAFETY: i < 6, and the tile holds 6 * 16 elements.
        unsafe {
            _mm256_storeu_ps(tile.add(i * 16), s[0]);
            _mm256_storeu_ps(tile.add(i * 16 + 8), s[1]);
        }
    }
}

/// # Safety
/// AVX-512F is there; `a` holds k * 12, `b` k * 32 and `tile` 384 elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
    use std::arch::x86_64::{
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };
    let mut sum = [[_mm512_setzero_ps(); 2]; 12];
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
    for (i, s) in sum.iter().enumerate() {
        // SAFETY: i < 12, and the tile holds 12 * 32 elements.
        unsafe {
            _mm512_storeu_ps(tile.add(i * 32), s[0]);
            _mm512_storeu_ps(tile.add(i * 32 + 16), s[1]);
        }
    }
}

thread_local! {
    static PACKED: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Packs `count` vectors from `first` on, `depth` elements each from `p0` on, k-major in a panel of `width`; zeros beyond.
fn pack(panel: &mut [f32], width: usize, x: Matrix<'_>, first: usize, count: usize, p0: usize) {
    for (p, out) in panel.chunks_exact_mut(width).enumerate() {
        let start = first * x.row + (p0 + p) * x.column;
        let (full, rest) = out.split_at_mut(count);
        for (i, o) in full.iter_mut().enumerate() {
            *o = x.data[start + i * x.row];
        }
        rest.fill(0.0);
    }
}

/// C [m, n] (row-major) = A [m, k] B [k, n], or += when `accumulate`.
pub(crate) fn gemm(dims: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], accumulate: bool) {
    let [m, n, k] = dims;
    assert_eq!(c.len(), m * n, "gemm: C has another size than m x n");
    if m * n == 0 {
        return;
    }
    if !accumulate {
        c.fill(0.0);
    }
    if k == 0 {
        return;
    }
    let last = |x: Matrix<'_>, rows: usize, columns: usize| (rows - 1) * x.row + (columns - 1) * x.column;
    assert!(last(a, m, k) < a.data.len() && last(b, k, n) < b.data.len(), "gemm: an operand is too short");
    let kernel = kernel();
    let columns = Matrix { data: b.data, row: b.column, column: b.row };
    let parallel = m.saturating_mul(n).saturating_mul(k) > PARALLEL && rayon::current_num_threads() > 1;
    // Whole panels of rows a task, several tasks a thread.
    let panels = m.div_ceil(kernel.mr);
    let rows = kernel.mr * panels.div_ceil(4 * rayon::current_num_threads()).clamp(1, 8);
    let mut packed = PACKED.with_borrow_mut(|p| std::mem::take(&mut p[1]));
    for p0 in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - p0);
        let size = kernel.nr * depth;
        packed.resize(n.div_ceil(kernel.nr) * size, 0.0);
        let pack_b = |(j, panel): (usize, &mut [f32])| {
            let first = j * kernel.nr;
            pack(panel, kernel.nr, columns, first, kernel.nr.min(n - first), p0);
        };
        match parallel {
            true => packed.par_chunks_mut(size).enumerate().for_each(pack_b),
            false => packed.chunks_mut(size).enumerate().for_each(pack_b),
        }
        let task = |(t, c): (usize, &mut [f32])| block(kernel, a, t * rows, &packed, c, n, p0, depth);
        match parallel {
            true => c.par_chunks_mut(rows * n).enumerate().for_each(task),
            false => c.chunks_mut(rows * n).enumerate().for_each(task),
        }
    }
    PACKED.with_borrow_mut(|p| p[1] = packed);
}

/// Rows of C from `first` on, all columns, `depth` of k from `p0` on.
#[allow(clippy::too_many_arguments)]
fn block(
    kernel: Kernel,
    a: Matrix<'_>,
    first: usize,
    b: &[f32],
    c: &mut [f32],
    n: usize,
    p0: usize,
    depth: usize,
) {
    let Kernel { mr, nr, run } = kernel;
    let m = c.len() / n;
    let mut packed = PACKED.with_borrow_mut(|p| std::mem::take(&mut p[0]));
    packed.resize(m.div_ceil(mr) * mr * depth, 0.0);
    for (i, panel) in packed.chunks_mut(mr * depth).enumerate() {
        pack(panel, mr, a, first + i * mr, mr.min(m - i * mr), p0);
    }
    let mut tile = [0.0f32; MAX_TILE];
    for (j, b) in b.chunks_exact(nr * depth).enumerate() {
        let wide = nr.min(n - j * nr);
        for (i, a) in packed.chunks_exact(mr * depth).enumerate() {
            // SAFETY: the kernel was chosen for this processor; the panels hold depth * mr and depth * nr elements, the tile
            // at least mr * nr.
            unsafe { run(depth, a.as_ptr(), b.as_ptr(), tile.as_mut_ptr()) };
            for (r, line) in tile.chunks_exact(nr).take(mr.min(m - i * mr)).enumerate() {
                let at = (i * mr + r) * n + j * nr;
                c[at..at + wide].iter_mut().zip(line).for_each(|(c, t)| *c += t);
            }
        }
    }
    PACKED.with_borrow_mut(|p| p[0] = packed);
}
