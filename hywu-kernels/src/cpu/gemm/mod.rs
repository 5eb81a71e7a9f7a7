//! f32 matrix product on packed panels, with a low-rank term per segment of rows as further steps of the same sum. Every element of
//! C is summed over k in one order that depends on k alone, so a row's result is the same wherever it stands, whatever the other
//! rows and the number of threads.

mod micro;

pub(crate) use micro::simd_level;

use crate::ops::low_rank_linear::{Format, Segment};
use micro::{Kernel, MAX_TILE, Place, Step, kernel};
use rayon::prelude::*;
use std::{cell::RefCell, ops::Range};

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
    /// Place of the last of so many rows and columns.
    fn last(&self, rows: usize, columns: usize) -> usize {
        (rows - 1) * self.row + (columns - 1) * self.column
    }
}

/// A matrix in eight bits, with a scale for each of its rows.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub format: Format,
    /// Row-major.
    pub codes: &'a [u8],
    pub scales: &'a [f32],
    /// The factor is the transpose.
    pub transposed: bool,
}

/// The right factor of a product, of which panels are packed. Floats are made of codes for a panel at a time, so the product is that of
/// the floats, bit for bit.
#[derive(Clone, Copy)]
pub(crate) enum Right<'a> {
    Floats(Matrix<'a>),
    Codes(Codes<'a>),
}

impl Right<'_> {
    /// Does it hold k x n elements?
    fn holds(&self, k: usize, n: usize) -> bool {
        match self {
            Self::Floats(b) => b.last(k, n) < b.data.len(),
            Self::Codes(c) => c.codes.len() >= k * n && c.scales.len() == if c.transposed { n } else { k },
        }
    }
    /// [`pack`] of `count` columns.
    fn pack(&self, panel: &mut [f32], width: usize, first: usize, count: usize, p0: usize) {
        let c = match *self {
            Self::Floats(Matrix { data, row, column }) => {
                return pack(panel, width, Matrix { data, row: column, column: row }, first, count, p0);
            }
            Self::Codes(c) => c,
        };
        let depth = panel.len() / width;
        let (lines, from, each) =
            if c.transposed { (first..first + count, p0, depth) } else { (p0..p0 + depth, first, count) };
        let mut floats = take(4, count * depth);
        for (out, line) in floats.chunks_mut(each).zip(lines) {
            let at = line * (c.codes.len() / c.scales.len()) + from;
            c.format.widen(&c.codes[at..at + each], c.scales[line], out);
        }
        let x = if c.transposed { Matrix::rows(&floats, each) } else { Matrix::transposed(&floats, each) };
        pack(panel, width, x, 0, count, 0);
        give(4, floats);
    }
}

/// Depth of a packed panel: a panel of A and one of B stay in the second-level cache, and C is passed over once for as much of k.
const DEPTH: usize = 512;
/// Multiply-adds below which a second thread costs more than it brings.
const PARALLEL: usize = 1 << 18;

/// Panels of A, of the low-rank term's left factor, of B, of the low-rank term's right factor; floats made of codes.
type Buffers = [Vec<f32>; 5];

thread_local! {
    static PACKED: RefCell<Buffers> = const { RefCell::new([const { Vec::new() }; 5]) };
}

/// Takes a buffer of this thread, with room for `n` elements; [`give`] brings it back.
fn take(buffer: usize, n: usize) -> Vec<f32> {
    let mut taken = PACKED.with_borrow_mut(|p| std::mem::take(&mut p[buffer]));
    taken.resize(n, 0.0);
    taken
}

fn give(buffer: usize, taken: Vec<f32>) {
    PACKED.with_borrow_mut(|p| p[buffer] = taken);
}

/// Side of the squares that [`pack`] turns.
const SQUARE: usize = 8;

/// `to[j * to_row + i] = from[i * from_row + j]` for i and j below [`SQUARE`].
fn transpose(from: &[f32], from_row: usize, to: &mut [f32], to_row: usize) {
    const LAST: usize = SQUARE - 1;
    assert!(from.len() > LAST * from_row + LAST && to.len() > LAST * to_row + LAST, "transpose: too short");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx") {
        // SAFETY: AVX is there, and the lengths are checked.
        unsafe { transpose_avx(from.as_ptr(), from_row, to.as_mut_ptr(), to_row) };
        return;
    }
    for (i, j) in (0..SQUARE).flat_map(|i| (0..SQUARE).map(move |j| (i, j))) {
        to[j * to_row + i] = from[i * from_row + j];
    }
}

/// # Safety
/// AVX is there; both sides hold eight rows of eight elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_avx(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
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
fn pack(panel: &mut [f32], width: usize, x: Matrix<'_>, first: usize, count: usize, p0: usize) {
    let at = |i: usize, p: usize| (first + i) * x.row + (p0 + p) * x.column;
    if x.column == 1 && x.row != 1 {
        // Each vector lies in one piece: read along it, in squares.
        for (s, square) in panel.chunks_mut(SQUARE * width).enumerate() {
            let depth = square.len() / width;
            if count < width {
                square.fill(0.0);
            }
            let mut i = 0;
            while depth == SQUARE && i + SQUARE <= count {
                let start = at(i, s * SQUARE);
                transpose(
                    &x.data[start..start + (SQUARE - 1) * x.row + SQUARE],
                    x.row,
                    &mut square[i..],
                    width,
                );
                i += SQUARE;
            }
            for i in i..count {
                let start = at(i, s * SQUARE);
                let vector = &x.data[start..start + depth];
                square[i..].iter_mut().step_by(width).zip(vector).for_each(|(o, v)| *o = *v);
            }
        }
        return;
    }
    for (p, out) in panel.chunks_exact_mut(width).enumerate() {
        let (full, rest) = out.split_at_mut(count);
        let start = at(0, p);
        match x.row {
            1 => full.copy_from_slice(&x.data[start..start + count]),
            row => full.iter_mut().zip(x.data[start..].iter().step_by(row)).for_each(|(o, v)| *o = *v),
        }
        rest.fill(0.0);
    }
}

/// A low-rank term: a segment of the rows with adapter i gets S [rows, parts * rank] B_i^T; the columns of C are in `parts` equal parts,
/// part p has the ranks p * rank .. of S.
#[derive(Clone, Copy)]
pub(crate) struct LowRank<'a> {
    /// All rows.
    pub segments: &'a [Segment],
    pub parts: usize,
    pub rank: usize,
    /// [m, parts * rank], row-major.
    pub s: &'a [f32],
    /// [adapters, n, rank], row-major.
    pub b: &'a [f32],
}

/// C [m, n] (row-major) = A [m, k] B [k, n], or += when `accumulate`.
pub(crate) fn gemm(dims: [usize; 3], a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], accumulate: bool) {
    gemm_low_rank(dims, a, Right::Floats(b), None, c, accumulate);
}

/// [`gemm`] and a low-rank term, which is summed after the last of k while the tile of C is in registers.
pub(crate) fn gemm_low_rank(
    dims: [usize; 3],
    a: Matrix<'_>,
    b: Right<'_>,
    low_rank: Option<LowRank<'_>>,
    c: &mut [f32],
    accumulate: bool,
) {
    gemm_with(kernel(), dims, a, b, low_rank, c, accumulate);
}

fn gemm_with(
    kernel: Kernel,
    dims: [usize; 3],
    a: Matrix<'_>,
    b: Right<'_>,
    low_rank: Option<LowRank<'_>>,
    c: &mut [f32],
    accumulate: bool,
) {
    let [m, n, k] = dims;
    assert_eq!(c.len(), m * n, "gemm: C has another size than m x n");
    if m * n == 0 {
        return;
    }
    if k == 0 {
        assert!(low_rank.is_none(), "gemm: a low-rank term of nothing");
        if !accumulate {
            c.fill(0.0);
        }
        return;
    }
    assert!(a.last(m, k) < a.data.len() && b.holds(k, n), "gemm: an operand is too short");
    let all_rows = [Segment { rows: m, weight: 0, adapter: None }];
    let segments = low_rank.map_or(&all_rows[..], |l| l.segments);
    if let Some(l) = low_rank {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        let adapters = segments.iter().filter_map(|s| s.adapter).max().map_or(0, |i| i + 1);
        let fits = rows == m && l.rank > 0 && l.parts > 0 && n.is_multiple_of(l.parts);
        let lengths = fits && l.s.len() == m * l.ranks() && l.b.len() >= adapters * n * l.rank;
        assert!(lengths, "gemm: the low-rank term has other sizes");
    }
    let parallel = m.saturating_mul(n).saturating_mul(k) > PARALLEL && rayon::current_num_threads() > 1;
    // Whole panels of rows a task, several tasks a thread; none holds rows of two segments.
    let panels: usize = segments.iter().map(|s| s.rows.div_ceil(kernel.mr)).sum();
    let rows = kernel.mr * panels.div_ceil(4 * rayon::current_num_threads()).clamp(1, 8);
    let side = n.div_ceil(kernel.nr) * kernel.nr;
    let each_panel = |panels: &mut [f32], depth: usize, pack: &(dyn Fn(&mut [f32], usize, usize) + Sync)| {
        let one = |(j, panel): (usize, &mut [f32])| {
            let first = j * kernel.nr;
            pack(panel, first, kernel.nr.min(n - first));
        };
        match parallel {
            true => panels.par_chunks_mut(kernel.nr * depth).enumerate().for_each(one),
            false => panels.chunks_mut(kernel.nr * depth).enumerate().for_each(one),
        }
    };
    let mut packed = take(2, side * DEPTH.min(k));
    let adapters = || segments.iter().filter_map(|s| s.adapter);
    let low_side = low_rank.map_or(0, |l| side * l.ranks());
    let mut packed_low = take(3, adapters().count() * low_side);
    if let Some(l) = low_rank {
        packed_low.chunks_mut(low_side).zip(adapters()).for_each(|(panels, i)| {
            let b = &l.b[i * n * l.rank..][..n * l.rank];
            each_panel(panels, l.ranks(), &|panel, first, count| {
                l.pack(panel, kernel.nr, b, n, first, count)
            });
        });
    }
    for p0 in (0..k).step_by(DEPTH) {
        let depth = DEPTH.min(k - p0);
        packed.truncate(side * depth);
        each_panel(&mut packed, depth, &|panel, first, count| {
            b.pack(panel, kernel.nr, first, count, p0);
        });
        let whole = Whole { kernel, a, b: &packed, n, p0, depth, add: accumulate || p0 > 0 };
        let at_end = low_rank.filter(|_| p0 + depth == k);
        let (mut rest, mut first, mut low) = (&mut *c, 0, packed_low.chunks(low_side.max(1)));
        let mut tasks = Vec::new();
        for segment in segments {
            let term = at_end.zip(segment.adapter.and_then(|_| low.next()));
            let mine = rest.split_off_mut(..segment.rows * n).unwrap_or_default();
            tasks.extend(mine.chunks_mut(rows * n).enumerate().map(|(t, c)| (first + t * rows, term, c)));
            first += segment.rows;
        }
        let task = |(first, term, c)| block(whole, first, term, c);
        match parallel {
            true => tasks.into_par_iter().for_each(task),
            false => tasks.into_iter().for_each(task),
        }
    }
    give(2, packed);
    give(3, packed_low);
}

impl LowRank<'_> {
    /// Columns of S.
    fn ranks(&self) -> usize {
        self.parts * self.rank
    }
    /// The parts that columns `first` .. `first + count` of `n` are in.
    fn parts_of(&self, first: usize, count: usize, n: usize) -> Range<usize> {
        let part = n / self.parts;
        first / part..(first + count - 1) / part + 1
    }
    /// Packs `count` rows of `b` [n, rank] from `first` on, in a panel of `width` that has the ranks of all parts; zeros beyond, and in
    /// the ranks of other parts.
    fn pack(&self, panel: &mut [f32], width: usize, b: &[f32], n: usize, first: usize, count: usize) {
        if self.parts == 1 {
            return pack(panel, width, Matrix::rows(b, self.rank), first, count, 0);
        }
        panel.fill(0.0);
        for (j, row) in b.chunks(self.rank).enumerate().skip(first).take(count) {
            let line = self.parts_of(j, 1, n).start * self.rank;
            let to = panel[line * width + j - first..].iter_mut().step_by(width);
            to.zip(row).for_each(|(o, v)| *o = *v);
        }
    }
}

/// What all tasks of a pass over k share.
#[derive(Clone, Copy)]
struct Whole<'a> {
    kernel: Kernel,
    a: Matrix<'a>,
    /// Packed panels of `depth` of k from `p0` on.
    b: &'a [f32],
    n: usize,
    p0: usize,
    depth: usize,
    add: bool,
}

/// Rows of C from `first` on, all columns; a low-rank term comes with its packed right factor.
fn block(whole: Whole<'_>, first: usize, low_rank: Option<(LowRank<'_>, &[f32])>, c: &mut [f32]) {
    let Whole { kernel: Kernel { mr, nr, run }, a, b, n, p0, depth, add } = whole;
    let m = c.len() / n;
    let pack_rows = |panels: &mut [f32], depth: usize, x: Matrix<'_>, p0: usize| {
        for (i, panel) in panels.chunks_mut(mr * depth).enumerate() {
            pack(panel, mr, x, first + i * mr, mr.min(m - i * mr), p0);
        }
    };
    let side = m.div_ceil(mr) * mr;
    let mut packed = take(0, side * depth);
    pack_rows(&mut packed, depth, a, p0);
    let ranks = low_rank.map_or(0, |(l, _)| l.ranks());
    let mut packed_low = take(1, side * ranks);
    if let Some((l, _)) = low_rank {
        pack_rows(&mut packed_low, ranks, Matrix::rows(l.s, ranks), 0);
    }
    let mut tile = [0.0f32; MAX_TILE];
    for j in 0..n.div_ceil(nr) {
        let wide = nr.min(n - j * nr);
        // Only the ranks of the panel's own parts: the others' would multiply zeros.
        let low = low_rank.map(|(l, low_b)| {
            let parts = l.parts_of(j * nr, wide, n);
            (low_b, parts.start * l.rank..parts.end * l.rank)
        });
        for i in 0..side / mr {
            let rows = mr.min(m - i * mr);
            // A part of the depth of panel i of A and panel j of B.
            let panel = |a: &[f32], b: &[f32], depth: usize, part: Range<usize>| -> Step {
                (
                    part.len(),
                    a[(i * depth + part.start) * mr..][..part.len() * mr].as_ptr(),
                    b[(j * depth + part.start) * nr..][..part.len() * nr].as_ptr(),
                )
            };
            let base = panel(&packed, b, depth, 0..depth);
            let update = low.clone().map(|(low_b, part)| panel(&packed_low, low_b, ranks, part));
            let steps = [base, update.unwrap_or(base)];
            let steps = &steps[..1 + usize::from(update.is_some())];
            let at = i * mr * n + j * nr;
            if wide == nr {
                let c = &mut c[at..at + (rows - 1) * n + nr];
                let place = Place { c: c.as_mut_ptr(), stride: n, rows, add };
                // SAFETY: the kernel was chosen for this processor; `panel` has checked the panels' lengths, and `c` holds
                // `rows` rows of nr elements, n apart.
                unsafe { run(steps, place) };
                continue;
            }
            let place = Place { c: tile.as_mut_ptr(), stride: nr, rows, add: false };
            // SAFETY: as above; the tile holds at least mr * nr elements.
            unsafe { run(steps, place) };
            for (r, line) in tile.chunks_exact(nr).take(rows).enumerate() {
                let c = &mut c[at + r * n..][..wide];
                match add {
                    true => c.iter_mut().zip(line).for_each(|(c, t)| *c += t),
                    false => c.copy_from_slice(&line[..wide]),
                }
            }
        }
    }
    give(0, packed);
    give(1, packed_low);
}

#[cfg(test)]
mod tests {
    use super::{micro::kernels, *};
    use crate::testing::{assert_close, random, widen};

    /// Every micro-kernel against plain sums, from every order in memory, with and without a low-rank term.
    #[test]
    fn every_instruction_set_gives_the_product() {
        for (m, n, k) in [(1usize, 1, 1), (13, 33, 17), (24, 64, 8), (30, 31, DEPTH + 5)] {
            // Columns in two parts where they divide, the second half of the rows with the other adapter, or with none.
            let (parts, half, rank) = (1 + (n + 1) % 2, m.div_ceil(2), 3);
            let adapters = [Some(1), (m % 2 == 0).then_some(0)];
            let [a, b, c] = [&[m, k], &[k, n], &[m, n]].map(|shape| random(m as u64, shape));
            let (s, low) = (random(5, &[m, parts * rank]), random(6, &[2, n, rank]));
            let lengths = [half, m - half];
            let segments: Vec<Segment> = (lengths.into_iter().zip(adapters))
                .map(|(rows, adapter)| Segment { rows, weight: 0, adapter })
                .collect();
            let [wa, wb, wc, ws, wlow] = [&a, &b, &c, &s, &low].map(widen);
            let expected = |i: usize, j: usize, with: bool| {
                let full: f64 = (0..k).map(|p| wa[i * k + p] * wb[p * n + j]).sum();
                let part = j / (n / parts) * rank;
                let update = |adapter: usize| -> f64 {
                    let s = &ws[i * parts * rank + part..];
                    (0..rank).map(|p| s[p] * wlow[(adapter * n + j) * rank + p]).sum()
                };
                let adapter = adapters[i / half].filter(|_| with);
                wc[i * n + j] + full + adapter.map_or(0.0, update)
            };
            let turned = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            let (at, bt) = (turned(a.data(), m, k), turned(b.data(), k, n));
            let orders = [
                (Matrix::rows(a.data(), k), Matrix::rows(b.data(), n)),
                (Matrix::transposed(&at, m), Matrix::transposed(&bt, k)),
            ];
            for (kernel, (a, b)) in kernels().flat_map(|kernel| orders.map(|order| (kernel, order))) {
                for with in [false, true] {
                    let term = LowRank { segments: &segments, parts, rank, s: s.data(), b: low.data() };
                    let mut got = c.data().to_vec();
                    gemm_with(kernel, [m, n, k], a, Right::Floats(b), with.then_some(term), &mut got, true);
                    let all: Vec<f64> = (0..m * n).map(|i| expected(i / n, i % n, with)).collect();
                    assert_close(&got, &all, 1e-5);
                }
            }
        }
    }
}
