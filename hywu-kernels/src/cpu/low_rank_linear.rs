//! The matrix products of linear layers with low-rank updates, over the rows of segments. S and dS are [rows, P r], zero in rows
//! without an adapter.

use super::gemm::{Codes, LowRank, Matrix, Right, gemm, gemm_low_rank};
use crate::{
    Tensor,
    ops::low_rank_linear::{Segment, Segments, Shrink, Weight, matrix},
};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that one parallel task copies.
const CHUNK: usize = 1 << 14;

impl<'a> Weight<'a> {
    /// Weight i, or its transpose, as the right factor of a product.
    fn right(self, i: usize, transposed: bool) -> Right<'a> {
        let [outer, inner] = matrix(self.shape());
        match self {
            Self::Dense(w) => {
                let data = &w.value().data()[i * outer * inner..][..outer * inner];
                Right::Floats(if transposed {
                    Matrix::transposed(data, inner)
                } else {
                    Matrix::rows(data, inner)
                })
            }
            Self::Quantized(w) => Right::Codes(Codes {
                format: w.format(),
                codes: &w.codes()[i * outer * inner..][..outer * inner],
                scales: &w.scales().data()[i * outer..][..outer],
                transposed,
            }),
        }
    }
}

/// A segment with the first of its rows, and what it has of rows of `width`.
type Share<'a> = (usize, Segment, &'a mut [f32]);

/// The rows of every segment of `out`.
fn shares<'a>(mut out: &'a mut [f32], width: usize, segments: &Segments) -> Vec<Share<'a>> {
    let take = |(first, segment): (usize, Segment)| {
        (first, segment, out.split_off_mut(..segment.rows * width).unwrap_or_default())
    };
    segments.placed().map(take).collect()
}

/// scale * X A^T of every segment: x [.., inner], a [adapters, ranks, inner] -> [rows, ranks].
pub fn shrink(x: &Tensor, a: &Tensor, scale: f32, segments: Option<&Segments>) -> Tensor {
    let [ranks, inner] = matrix(a.shape());
    let rows = x.numel() / inner;
    let segments = Segments::cover(segments, rows, a.shape()[0]);
    Tensor::build(&[rows, ranks], |shrunk| {
        shares(shrunk, ranks, &segments).into_par_iter().for_each(|(first, segment, shrunk)| {
            let Some(i) = segment.adapter else { return shrunk.fill(0.0) };
            let x = Matrix::rows(&x.data()[first * inner..][..segment.rows * inner], inner);
            let a = Matrix::transposed(&a.data()[i * ranks * inner..][..ranks * inner], inner);
            gemm([segment.rows, ranks, inner], x, a, shrunk, false);
            shrunk.iter_mut().for_each(|v| *v *= scale);
        });
    })
}

/// X W^T + bias + S B^T into `shape` [.., outer]; the term is (S [rows, parts * rank], B [adapters, outer, rank], parts).
pub fn expand(
    x: &Tensor,
    weight: Weight<'_>,
    bias: Option<&Tensor>,
    low_rank: Option<(&Tensor, &Tensor, usize)>,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Tensor {
    let [outer, inner] = matrix(weight.shape());
    let adapters = low_rank.map_or(0, |(_, b, _)| b.shape()[0]);
    let segments = Segments::cover(segments, x.numel() / inner, adapters);
    Tensor::build(shape, |out| {
        runs(out, outer, &segments).into_par_iter().for_each(|(w, rows, run, out)| {
            if let Some(bias) = bias {
                let bias = &bias.data()[w * outer..][..outer];
                let rows = out.par_chunks_mut(outer).with_min_len(CHUNK.div_ceil(outer));
                rows.for_each(|row| row.copy_from_slice(bias));
            }
            // [X | S] [W | B]^T: the update is a few more steps of the same sum.
            let term = low_rank.map(|(s, b, parts)| {
                let rank = b.shape()[2];
                let s = &s.data()[rows.start * parts * rank..rows.end * parts * rank];
                LowRank { segments: run, parts, rank, s, b: b.data() }
            });
            let x = Matrix::rows(&x.data()[rows.start * inner..rows.end * inner], inner);
            let w = weight.right(w, true);
            gemm_low_rank([rows.len(), outer, inner], x, w, term, out, bias.is_some());
        });
    })
}

/// A weight with its rows and segments, and what it has of rows of `width`.
type Run<'a, 's> = (usize, Range<usize>, &'s [Segment], &'a mut [f32]);

/// The rows of every weight of `out`.
fn runs<'a, 's>(mut out: &'a mut [f32], width: usize, segments: &'s Segments) -> Vec<Run<'a, 's>> {
    let take = |(weight, rows, run): (usize, Range<usize>, &'s [Segment])| {
        let mine = out.split_off_mut(..rows.len() * width).unwrap_or_default();
        (weight, rows, run, mine)
    };
    segments.runs().map(take).collect()
}

/// [`shrink`], then [`expand`]: S and Y.
pub fn shrink_expand(
    x: &Tensor,
    weight: Weight<'_>,
    bias: Option<&Tensor>,
    by: Shrink<'_>,
    (b, parts): (&Tensor, usize),
    shape: &[usize],
) -> (Tensor, Tensor) {
    let s = shrink(x, by.a, by.scale, by.segments);
    let out = expand(x, weight, bias, Some((&s, b, parts)), by.segments, shape);
    (s, out)
}

/// scale * dY B of every segment: grad [.., outer], b [adapters, outer, rank] -> [rows, parts * rank].
pub fn shrink_gradient(
    grad: &Tensor,
    b: &Tensor,
    scale: f32,
    parts: usize,
    segments: Option<&Segments>,
) -> Tensor {
    let [outer, rank] = matrix(b.shape());
    let (rows, ranks, part) = (grad.numel() / outer, parts * rank, outer / parts);
    let segments = Segments::cover(segments, rows, b.shape()[0]);
    Tensor::build(&[rows, ranks], |out| {
        shares(out, ranks, &segments).into_par_iter().for_each(|(first, segment, out)| {
            let Some(i) = segment.adapter else { return out.fill(0.0) };
            let dy = &grad.data()[first * outer..][..segment.rows * outer];
            let b = &b.data()[i * outer * rank..][..outer * rank];
            let product = |p: usize, out: &mut [f32]| {
                let dy = Matrix { data: &dy[p * part..], row: outer, column: 1 };
                let b = Matrix::rows(&b[p * part * rank..][..part * rank], rank);
                gemm([segment.rows, rank, part], dy, b, out, false);
            };
            if parts == 1 {
                product(0, out);
            } else {
                let mut columns = vec![0.0; segment.rows * rank];
                for p in 0..parts {
                    product(p, &mut columns);
                    let lines = out.chunks_mut(ranks).zip(columns.chunks(rank));
                    lines.for_each(|(out, line)| out[p * rank..][..rank].copy_from_slice(line));
                }
            }
            out.iter_mut().for_each(|v| *v *= scale);
        });
    })
}

/// dY W + dS A into `shape` [.., inner]; the term is (dS [rows, ranks], A [adapters, ranks, inner]).
pub fn expand_gradient(
    grad: &Tensor,
    weight: Weight<'_>,
    low_rank: Option<(&Tensor, &Tensor)>,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Tensor {
    let [outer, inner] = matrix(weight.shape());
    let adapters = low_rank.map_or(0, |(_, a)| a.shape()[0]);
    let segments = Segments::cover(segments, grad.numel() / outer, adapters);
    Tensor::build(shape, |out| {
        runs(out, inner, &segments).into_par_iter().for_each(|(w, rows, _, out)| {
            let dy = Matrix::rows(&grad.data()[rows.start * outer..rows.end * outer], outer);
            gemm_low_rank([rows.len(), inner, outer], dy, weight.right(w, false), None, out, false);
        });
        let Some((ds, a)) = low_rank else { return };
        let ranks = a.shape()[1];
        shares(out, inner, &segments).into_par_iter().for_each(|(first, segment, dx)| {
            let Some(i) = segment.adapter else { return };
            let ds = Matrix::rows(&ds.data()[first * ranks..][..segment.rows * ranks], ranks);
            let a = Matrix::rows(&a.data()[i * ranks * inner..][..ranks * inner], inner);
            gemm([segment.rows, inner, ranks], ds, a, dx, true);
        });
    })
}

/// L^T R over the rows of each weight, its gradient, into `shape` [.., m, n]: left [.., m], right [.., n].
pub fn weight_gradient(
    left: &Tensor,
    right: &Tensor,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Tensor {
    let segments = Segments::cover(segments, left.numel() / matrix(shape)[0], 0);
    row_products(left, right, 1, segments.runs().map(|(w, rows, _)| (w, rows)), shape)
}

/// dS^T X over the rows of each adapter, into `shape` [adapters, ranks, inner]: ds [rows, ranks], x [.., inner].
pub fn a_gradient(ds: &Tensor, x: &Tensor, segments: Option<&Segments>, shape: &[usize]) -> Tensor {
    let segments = Segments::cover(segments, ds.shape()[0], shape[0]);
    row_products(ds, x, 1, adapted(&segments), shape)
}

/// dY^T S over the rows of each adapter, into `shape` [adapters, outer, rank]: grad [.., outer], s [rows, parts * rank].
pub fn b_gradient(
    grad: &Tensor,
    s: &Tensor,
    parts: usize,
    segments: Option<&Segments>,
    shape: &[usize],
) -> Tensor {
    let segments = Segments::cover(segments, s.shape()[0], shape[0]);
    row_products(grad, s, parts, adapted(&segments), shape)
}

/// The adapters that have rows, and these.
fn adapted(segments: &Segments) -> impl Iterator<Item = (usize, Range<usize>)> {
    segments.placed().filter_map(|(first, s)| Some((s.adapter?, first..first + s.rows)))
}

/// L^T R over each of some runs of rows, into its matrix of `shape` [.., m, n], zeros into the others. Part p of m goes with part p of
/// the columns of R.
fn row_products(
    left: &Tensor,
    right: &Tensor,
    parts: usize,
    runs: impl Iterator<Item = (usize, Range<usize>)>,
    shape: &[usize],
) -> Tensor {
    let [m, n] = matrix(shape);
    let mut rows = vec![0..0; shape[..shape.len() - 2].iter().product()];
    runs.for_each(|(i, run)| rows[i] = run);
    let (part, width) = (m / parts, parts * n);
    Tensor::build(shape, |out| {
        out.par_chunks_mut(part * n).enumerate().for_each(|(i, out)| {
            let (rows, p) = (&rows[i / parts], i % parts);
            if rows.is_empty() {
                return out.fill(0.0);
            }
            let left = Matrix { data: &left.data()[rows.start * m + p * part..], row: 1, column: m };
            let right = Matrix { data: &right.data()[rows.start * width + p * n..], row: width, column: 1 };
            gemm([part, n, rows.len()], left, right, out, false);
        });
    })
}

/// W + scale * B A: weight [outer, inner], a [parts * rank, inner], b [outer, rank]; part p of the rows uses ranks p * rank .. of A.
pub fn merge(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f32, parts: usize) -> Tensor {
    /// Rows of a task: few enough that they stay in the cache between the product and the sum.
    const ROWS: usize = 48;
    let (outer, inner, rank) = (weight.shape()[0], weight.shape()[1], b.dim_back(1));
    let each = outer / parts;
    Tensor::build(weight.shape(), |out| {
        let work = out.par_chunks_mut(each * inner).zip(weight.data().par_chunks(each * inner));
        let work = work.zip(a.data().par_chunks(rank * inner).zip(b.data().par_chunks(each * rank)));
        work.for_each(|((out, weight), (a, b))| {
            let rows = out.par_chunks_mut(ROWS * inner).zip(weight.par_chunks(ROWS * inner));
            rows.zip(b.par_chunks(ROWS * rank)).for_each(|((out, weight), b)| {
                let dims = [b.len() / rank, inner, rank];
                gemm(dims, Matrix::rows(b, rank), Matrix::rows(a, inner), out, false);
                // Where the update is zero, the weight keeps its bits, -0 too.
                let add = |(sum, w): (&mut f32, &f32)| {
                    let update = scale * *sum;
                    *sum = if update == 0.0 { *w } else { *w + update };
                };
                out.iter_mut().zip(weight).for_each(add);
            });
        });
    })
}
