//! Packed panels: so many vectors of a matrix, k-major, as the micro-kernels read them.

use super::{Codes, Matrix};

/// Side of the squares that are turned at once.
const SQUARE: usize = 8;

/// `to[j * to_row + i] = from[i * from_row + j]` for i < `rows` and j < `columns`, both at least [`SQUARE`].
fn transpose(from: &[f32], from_row: usize, rows: usize, columns: usize, to: &mut [f32], to_row: usize) {
    let short = from.len() < (rows - 1) * from_row + columns || to.len() < (columns - 1) * to_row + rows;
    assert!(rows >= SQUARE && columns >= SQUARE && !short, "transpose: too short");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        // SAFETY: AVX is there, and the lengths are checked.
        unsafe { transpose_avx(from.as_ptr(), from_row, rows, columns, to.as_mut_ptr(), to_row) };
        return;
    }
    for i in 0..rows {
        let line = &from[i * from_row..][..columns];
        to[i..].iter_mut().step_by(to_row).zip(line).for_each(|(o, v)| *o = *v);
    }
}

/// # Safety
/// AVX is there; both sides hold what [`transpose`] says.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_avx(
    from: *const f32,
    from_row: usize,
    rows: usize,
    columns: usize,
    to: *mut f32,
    to_row: usize,
) {
    // The last square of a side may stand on the one before: the same values once more.
    let mut i = 0;
    loop {
        let mut j = 0;
        loop {
            // SAFETY: the square is within both.
            unsafe { square_avx(from.add(i * from_row + j), from_row, to.add(j * to_row + i), to_row) };
            if j + SQUARE == columns {
                break;
            }
            j = (j + SQUARE).min(columns - SQUARE);
        }
        if i + SQUARE == rows {
            break;
        }
        i = (i + SQUARE).min(rows - SQUARE);
    }
}

/// # Safety
/// AVX is there; both sides hold eight rows of eight elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
#[inline]
unsafe fn square_avx(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
    use std::arch::x86_64::{
        __m256, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps,
        _mm256_storeu_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    let mut rows = [_mm256_setzero_ps(); 8];
    for (i, row) in rows.iter_mut().enumerate() {
        // SAFETY: i < 8, and the caller's contract gives the lengths.
        *row = unsafe { _mm256_loadu_ps(from.add(i * from_row)) };
    }
    // Pairs of rows, then fours, then all eight.
    let mut pairs = [_mm256_setzero_ps(); 8];
    for i in (0..8).step_by(2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    let four = |a: __m256, b: __m256| [_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b)];
    let upper = [four(pairs[0], pairs[2]), four(pairs[1], pairs[3])];
    let lower = [four(pairs[4], pairs[6]), four(pairs[5], pairs[7])];
    for j in 0..4 {
        let (a, b) = (upper[j / 2][j % 2], lower[j / 2][j % 2]);
        // SAFETY: j + 4 < 8, and the caller's contract gives the lengths.
        unsafe {
            _mm256_storeu_ps(to.add(j * to_row), _mm256_permute2f128_ps::<0x20>(a, b));
            _mm256_storeu_ps(to.add((j + 4) * to_row), _mm256_permute2f128_ps::<0x31>(a, b));
        }
    }
}

/// Packs `count` vectors from `first` on, elements from `p0` on, k-major in a panel of `width`; zeros beyond.
pub(super) fn pack(panel: &mut [f32], width: usize, x: Matrix<'_>, first: usize, count: usize, p0: usize) {
    let depth = panel.len() / width;
    let x_at = &x.data[first * x.row + p0 * x.column..];
    if x.column == 1 && x.row != 1 {
        // Each vector lies in one piece: read along it.
        if count < width {
            panel.fill(0.0);
        }
        if count >= SQUARE && depth >= SQUARE {
            return transpose(x_at, x.row, count, depth, panel, width);
        }
        for i in 0..count {
            let vector = &x_at[i * x.row..][..depth];
            panel[i..].iter_mut().step_by(width).zip(vector).for_each(|(o, v)| *o = *v);
        }
        return;
    }
    for (p, out) in panel.chunks_exact_mut(width).enumerate() {
        let (full, rest) = out.split_at_mut(count);
        let line = &x_at[p * x.column..];
        match x.row {
            1 => full.copy_from_slice(&line[..count]),
            row => full.iter_mut().zip(line.iter().step_by(row)).for_each(|(o, v)| *o = *v),
        }
        rest.fill(0.0);
    }
}

impl Codes<'_> {
    /// [`pack`] of columns of the factor, made floats in `floats`.
    pub(super) fn pack(
        &self,
        panel: &mut [f32],
        width: usize,
        first: usize,
        count: usize,
        p0: usize,
        floats: &mut Vec<f32>,
    ) {
        let depth = panel.len() / width;
        let (lines, from, each) =
            if self.transposed { (first..first + count, p0, depth) } else { (p0..p0 + depth, first, count) };
        floats.resize(count * depth, 0.0);
        for (out, line) in floats.chunks_mut(each).zip(lines) {
            let at = line * (self.codes.len() / self.scales.len()) + from;
            self.format.widen(&self.codes[at..at + each], self.scales[line], out);
        }
        let x = if self.transposed { Matrix::rows(floats, each) } else { Matrix::transposed(floats, each) };
        pack(panel, width, x, 0, count, 0);
    }
}
