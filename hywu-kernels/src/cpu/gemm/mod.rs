//! f32 matrix product, with a low-rank term per segment of rows as further steps of the same sum. Every element of C is summed over k
//! in one order that depends on k alone, so a row's result is the same wherever it stands, whatever the other rows and the number of
//! threads.
//!
//! A task has a rectangle of C and needs no other task. Piece by piece of k it packs its columns of B in panels as wide as a tile, and
//! takes all of these over one strip of rows of A after the other.

mod micro;
mod pack;

pub(crate) use micro::simd_level;

use crate::ops::low_rank_linear::{Format, Segment};
use micro::{Kernel, MAX_TILE, Place, Step, kernel};
use pack::pack;
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
}

/// Most of k that is summed at a time: so deep, a tile's rows of A and a panel of B stay in the first-level cache.
const DEPTH: usize = 256;
/// Most columns of B that are packed at a time: [`DEPTH`] deep, they stay in the second-level cache.
const COLUMNS: usize = 512;
/// Columns from which the rows of A are copied: so often read, they had better be close together.
const COPIED: usize = 256;
/// Floats between copied rows: neighbours don't fall to the same places of the cache.
const APART: usize = 16;
/// Multiply-adds below which a second thread costs more than it brings.
const PARALLEL: usize = 1 << 18;
/// Elements of C from which a thread gets two tasks, so that it can help another: every task packs for itself.
const SHARED: usize = 1 << 20;

/// What tasks pack into.
#[derive(Default)]
struct Buffers {
    a: Vec<f32>,
    b: Vec<f32>,
    /// The right factor of the low-rank term.
    low: Vec<f32>,
    /// Floats made of codes.
    floats: Vec<f32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// The first `n` elements of a buffer from the start of a line of the cache on.
fn aligned(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    const LINE: usize = 64;
    if buffer.len() < n + LINE / 4 {
        buffer.resize(n + LINE / 4, 0.0);
    }
    let start = buffer.as_ptr().align_offset(LINE).min(LINE / 4);
    &mut buffer[start..start + n]
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
    let rows: usize = segments.iter().map(|s| s.rows).sum();
    assert_eq!(rows, m, "gemm: the segments have other rows than C");
    if let Some(l) = low_rank {
        let adapters = segments.iter().filter_map(|s| s.adapter).max().map_or(0, |i| i + 1);
        let fits = l.rank > 0 && l.parts > 0 && n.is_multiple_of(l.parts);
        let lengths = fits && l.s.len() == m * l.ranks() && l.b.len() >= adapters * n * l.rank;
        assert!(lengths, "gemm: the low-rank term has other sizes");
    }
    let (strips, panels) = (strips(segments, kernel.rows()), panels(n, kernel));
    let product = Product { kernel, dims, a, b, low_rank, c: c.as_mut_ptr(), accumulate };
    let threads = rayon::current_num_threads();
    if m.saturating_mul(n).saturating_mul(k) <= PARALLEL || threads == 1 {
        // SAFETY: C is borrowed, and this is the only task.
        return unsafe { product.block(&strips, &panels) };
    }
    let tasks = threads * if m * n >= SHARED * threads { 2 } else { 1 };
    let [down, across] = grid(tasks, [m, n], [strips.len(), panels.len()]);
    (0..down * across).into_par_iter().with_max_len(1).for_each(|t| {
        let part = |i: usize, parts: usize, of: usize| i * of / parts..(i + 1) * of / parts;
        let strips = &strips[part(t / across, down, strips.len())];
        let panels = &panels[part(t % across, across, panels.len())];
        // SAFETY: C is borrowed, and no two tasks have the same strip and panel.
        unsafe { product.block(strips, panels) };
    });
}

/// Rows of C that one tile is high, all of one segment.
#[derive(Clone, Copy)]
struct Strip {
    first: usize,
    rows: usize,
    adapter: Option<usize>,
}

/// The rows of segments in strips of nearly the same height, at most `most`.
fn strips(segments: &[Segment], most: usize) -> Vec<Strip> {
    let mut strips = Vec::with_capacity(segments.iter().map(|s| s.rows.div_ceil(most)).sum());
    let mut first = 0;
    for segment in segments {
        let count = segment.rows.div_ceil(most);
        for i in 0..count {
            let rows = (segment.rows + i) / count;
            strips.push(Strip { first, rows, adapter: segment.adapter });
            first += rows;
        }
    }
    strips
}

/// Columns of C that one tile is wide.
#[derive(Clone, Copy)]
struct Panel {
    first: usize,
    count: usize,
    /// `count` in whole vectors.
    width: usize,
}

fn panels(n: usize, kernel: Kernel) -> Vec<Panel> {
    let panel = |first: usize| {
        let count = kernel.columns().min(n - first);
        Panel { first, count, width: count.next_multiple_of(kernel.lanes) }
    };
    (0..n).step_by(kernel.columns()).map(panel).collect()
}

/// Into how many parts the rows and the columns of C go for about so many tasks, with least to pack: every task packs A of its rows and
/// B of its columns. No more parts than there are `units`.
fn grid(tasks: usize, [m, n]: [usize; 2], units: [usize; 2]) -> [usize; 2] {
    let way = |down: usize| [down.min(units[0]), tasks.div_ceil(down).min(units[1])];
    let packed = |[down, across]: [usize; 2]| (tasks.saturating_sub(down * across), down * n + across * m);
    (1..=tasks)
        .filter(|down| tasks.is_multiple_of(*down))
        .map(way)
        .min_by_key(|w| packed(*w))
        .unwrap_or([1, 1])
}

impl LowRank<'_> {
    /// Columns of S.
    fn ranks(&self) -> usize {
        self.parts * self.rank
    }
    /// The columns of S that columns `first` .. `first + count` of `n` have to do with.
    fn ranks_of(&self, first: usize, count: usize, n: usize) -> Range<usize> {
        let part = n / self.parts;
        first / part * self.rank..((first + count - 1) / part + 1) * self.rank
    }
    /// Packs the rows of adapter `i` of B that belong to columns of C, in a panel that has their ranks; zeros beyond, and in the ranks of
    /// other parts.
    fn pack(&self, to: &mut [f32], i: usize, n: usize, Panel { first, count, width }: Panel) {
        let b = &self.b[i * n * self.rank..][..n * self.rank];
        let ranks = self.ranks_of(first, count, n);
        let to = &mut to[..ranks.len() * width];
        if ranks.len() == self.rank {
            return pack(to, width, Matrix::rows(b, self.rank), first, count, 0);
        }
        to.fill(0.0);
        for (j, row) in b.chunks(self.rank).enumerate().skip(first).take(count) {
            let line = self.ranks_of(j, 1, n).start - ranks.start;
            let to = to[line * width + j - first..].iter_mut().step_by(width);
            to.zip(row).for_each(|(o, v)| *o = *v);
        }
    }
}

/// What all tasks share.
#[derive(Clone, Copy)]
struct Product<'a> {
    kernel: Kernel,
    dims: [usize; 3],
    a: Matrix<'a>,
    b: Right<'a>,
    low_rank: Option<LowRank<'a>>,
    c: *mut f32,
    accumulate: bool,
}

// SAFETY: C is written through `block` alone, whose contract has no element written by two threads.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Some strips of C and some panels of its columns.
    ///
    /// # Safety
    /// `c` holds m x n elements, of which nobody else uses those in these strips and panels.
    unsafe fn block(&self, strips: &[Strip], panels: &[Panel]) {
        BUFFERS.with_borrow_mut(|buffers| {
            let k = self.dims[2];
            let pieces = k.div_ceil(DEPTH);
            for panels in panels.chunks(COLUMNS / self.kernel.columns()) {
                for i in 0..pieces {
                    let part = i * k / pieces..(i + 1) * k / pieces;
                    // SAFETY: the caller's contract.
                    unsafe { self.piece(strips, panels, part, buffers) };
                }
            }
        });
    }

    /// One piece of k of a [`Product::block`].
    ///
    /// # Safety
    /// That of [`Product::block`].
    unsafe fn piece(&self, strips: &[Strip], panels: &[Panel], part: Range<usize>, buffers: &mut Buffers) {
        let n = self.dims[1];
        let Buffers { a, b, low, floats } = buffers;
        let depth = part.len();
        let columns: usize = panels.iter().map(|p| p.width).sum();
        // Where a panel starts, of those packed side by side.
        let before = |p: &Panel| p.first - panels[0].first;
        let packed = aligned(b, columns * depth);
        for p in panels {
            self.pack_right(&mut packed[before(p) * depth..][..p.width * depth], *p, part.start, floats);
        }
        let is_copied = columns >= COPIED;
        let low_rank = self.low_rank.filter(|_| part.end == self.dims[2]);
        let low = aligned(low, low_rank.map_or(0, |l| columns * l.ranks()));
        let mut packed_adapter = None;
        for (i, strip) in strips.iter().enumerate() {
            let next = strips.get(i + 1).unwrap_or(strip);
            let mut base = self.left(strip, next, &part, is_copied, a);
            let low_rank = low_rank.zip(strip.adapter);
            if let Some((l, adapter)) = low_rank
                && packed_adapter.replace(adapter) != Some(adapter)
            {
                panels.iter().for_each(|p| l.pack(&mut low[before(p) * l.ranks()..], adapter, n, *p));
            }
            for p in panels {
                base.b = packed[before(p) * depth..][..p.width * depth].as_ptr();
                let update = low_rank.map(|(l, _)| {
                    // Only the ranks of the panel's own parts: the others' would multiply zeros.
                    let ranks = l.ranks_of(p.first, p.count, n);
                    let s = &l.s[strip.first * l.ranks() + ranks.start..];
                    let s = s[..(strip.rows - 1) * l.ranks() + ranks.len()].as_ptr();
                    let b = low[before(p) * l.ranks()..][..p.width * ranks.len()].as_ptr();
                    Step { depth: ranks.len(), a: s, row: l.ranks(), column: 1, b, next: s, next_row: 0 }
                });
                let steps = [base, update.unwrap_or(base)];
                // SAFETY: the slices above hold the strip's rows of A and S and the panel's columns, as deep as the steps say; C is
                // as the caller says.
                unsafe { self.tile(&steps[..1 + usize::from(update.is_some())], strip, p, part.start > 0) };
                // The next strip has been fetched.
                (base.next, base.next_row) = (base.a, 0);
            }
        }
    }

    /// [`pack`] of a panel of B, as deep as it is long, from `p0` of k on.
    fn pack_right(&self, to: &mut [f32], p: Panel, p0: usize, floats: &mut Vec<f32>) {
        match self.b {
            Right::Floats(Matrix { data, row, column }) => {
                pack(to, p.width, Matrix { data, row: column, column: row }, p.first, p.count, p0);
            }
            Right::Codes(codes) => codes.pack(to, p.width, p.first, p.count, p0, floats),
        }
    }

    /// The step of a strip's rows of A, where they are or copied to `to`; its B is yet to be said.
    fn left(
        &self,
        strip: &Strip,
        next: &Strip,
        part: &Range<usize>,
        is_copied: bool,
        to: &mut Vec<f32>,
    ) -> Step {
        let (a, depth) = (self.a, part.len());
        let rows = |s: &Strip| {
            let at = s.first * a.row + part.start * a.column;
            &a.data[at..=at + (s.rows - 1) * a.row + (depth - 1) * a.column]
        };
        let from = rows(strip);
        let next = rows(next).as_ptr();
        let step =
            Step { depth, a: from.as_ptr(), row: a.row, column: 1, b: from.as_ptr(), next, next_row: a.row };
        if a.column != 1 {
            let panel = aligned(to, strip.rows * depth);
            pack(panel, strip.rows, a, strip.first, strip.rows, part.start);
            return Step { a: panel.as_ptr(), row: 1, column: strip.rows, ..step };
        }
        if !is_copied {
            return step;
        }
        let row = depth + APART;
        let copies = aligned(to, strip.rows * row);
        for (i, copy) in copies.chunks_exact_mut(row).enumerate() {
            copy[..depth].copy_from_slice(&from[i * a.row..][..depth]);
        }
        Step { a: copies.as_ptr(), row, ..step }
    }

    /// Sums the steps into a tile of C; with `again` on top of what earlier pieces of k have left there.
    ///
    /// # Safety
    /// The steps hold the strip's rows and the panel's columns; C is as [`Product::block`] has it.
    unsafe fn tile(&self, steps: &[Step], strip: &Strip, p: &Panel, again: bool) {
        let n = self.dims[1];
        let add = self.accumulate || again;
        let run = self.kernel.run(strip.rows, p.width / self.kernel.lanes);
        // SAFETY: the kernel was chosen for this processor, and the caller's contract gives the rest.
        unsafe {
            let c = self.c.add(strip.first * n + p.first);
            if p.count == p.width {
                return run(steps, Place { c, stride: n, add });
            }
            let mut whole = [0.0f32; MAX_TILE];
            run(steps, Place { c: whole.as_mut_ptr(), stride: p.width, add: false });
            for (r, line) in whole.chunks_exact(p.width).take(strip.rows).enumerate() {
                let c = std::slice::from_raw_parts_mut(c.add(r * n), p.count);
                match add {
                    true => c.iter_mut().zip(line).for_each(|(c, t)| *c += t),
                    false => c.copy_from_slice(&line[..p.count]),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{micro::kernels, *};
    use crate::testing::{assert_close, random, widen};

    /// Every micro-kernel against plain sums, from every order in memory, with and without a low-rank term.
    #[test]
    fn every_instruction_set_gives_the_product() {
        for (m, n, k) in [
            (1usize, 1, 1),
            (13, 33, 17),
            (24, 64, 8),
            (30, 31, DEPTH + 5),
            (1, COPIED + 1, 2),
            (17, COLUMNS + 18, 2 * DEPTH + 1),
        ] {
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
