//! The matrix products of linear layers with a low-rank update per batch entry. Rows are split evenly over the adapters.

use super::gemm::{LowRank, Matrix, gemm, gemm_low_rank};
use crate::Tensor;
use rayon::prelude::*;

/// Elements that one parallel task copies.
const CHUNK: usize = 1 << 14;

/// scale * X A^T of every adapter: x [.., inner], a [adapters, rank, inner] -> [rows, rank].
pub fn shrink(x: &Tensor, a: &Tensor, scale: f32) -> Tensor {
    let (adapters, rank, inner) = (a.shape()[0], a.shape()[1], a.shape()[2]);
    let rows = x.numel() / inner;
    let n = rows / adapters;
    Tensor::build(&[rows, rank], |shrunk| {
        let work = shrunk.par_chunks_mut(n * rank).zip(x.data().par_chunks(n * inner));
        work.zip(a.data().par_chunks(rank * inner)).for_each(|((shrunk, x), a)| {
            let (x, a) = (Matrix::rows(x, inner), Matrix::transposed(a, inner));
            gemm([n, rank, inner], x, a, shrunk, false);
            shrunk.iter_mut().for_each(|v| *v *= scale);
        });
    })
}

/// X W^T + bias + S B^T into `shape` [.., outer]; the term is (S [rows, rank], B [adapters, outer, rank]).
pub fn expand(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    low_rank: Option<(&Tensor, &Tensor)>,
    shape: &[usize],
) -> Tensor {
    let (outer, inner) = (weight.shape()[0], weight.shape()[1]);
    Tensor::build(shape, |out| {
        if let Some(bias) = bias {
            let rows = out.par_chunks_mut(outer).with_min_len(CHUNK.div_ceil(outer));
            rows.for_each(|row| row.copy_from_slice(bias.data()));
        }
        // [X | S] [W | B]^T: the update is a few more steps of the same sum.
        let term = low_rank.map(|(s, b)| LowRank {
            adapters: b.shape()[0],
            rank: b.shape()[2],
            s: s.data(),
            b: b.data(),
        });
        let (x_, w) = (Matrix::rows(x.data(), inner), Matrix::transposed(weight.data(), inner));
        gemm_low_rank([x.numel() / inner, outer, inner], x_, w, term, out, bias.is_some());
    })
}

/// scale * dY B of every adapter: grad [.., outer], b [adapters, outer, rank] -> [rows, rank].
pub fn shrink_gradient(grad: &Tensor, b: &Tensor, scale: f32) -> Tensor {
    let (adapters, outer, rank) = (b.shape()[0], b.shape()[1], b.shape()[2]);
    let rows = grad.numel() / outer;
    let n = rows / adapters;
    Tensor::build(&[rows, rank], |out| {
        let work = out.par_chunks_mut(n * rank).zip(grad.data().par_chunks(n * outer));
        work.zip(b.data().par_chunks(outer * rank)).for_each(|((out, dy), b)| {
            gemm([n, rank, outer], Matrix::rows(dy, outer), Matrix::rows(b, rank), out, false);
            out.iter_mut().for_each(|v| *v *= scale);
        });
    })
}

/// dY W + dS A into `shape` [.., inner]; the term is (dS [rows, rank], A [adapters, rank, inner]).
pub fn expand_gradient(
    grad: &Tensor,
    weight: &Tensor,
    low_rank: Option<(&Tensor, &Tensor)>,
    shape: &[usize],
) -> Tensor {
    let (outer, inner) = (weight.shape()[0], weight.shape()[1]);
    let rows = grad.numel() / outer;
    Tensor::build(shape, |out| {
        let (dy, w) = (Matrix::rows(grad.data(), outer), Matrix::rows(weight.data(), inner));
        gemm([rows, inner, outer], dy, w, out, false);
        if let Some((ds, a)) = low_rank {
            let (n, rank) = (rows / a.shape()[0], a.shape()[1]);
            let work = out.par_chunks_mut(n * inner).zip(ds.data().par_chunks(n * rank));
            work.zip(a.data().par_chunks(rank * inner)).for_each(|((dx, ds), a)| {
                gemm([n, inner, rank], Matrix::rows(ds, rank), Matrix::rows(a, inner), dx, true);
            });
        }
    })
}

/// L^T R, the gradient of a weight, into `shape` [.., m, n]: left [.., m], right [.., n], their rows split evenly over the
/// leading axes of `shape`.
pub fn row_products(left: &Tensor, right: &Tensor, shape: &[usize]) -> Tensor {
    let (m, n) = (shape[shape.len() - 2], shape[shape.len() - 1]);
    let each = left.numel() / m / shape[..shape.len() - 2].iter().product::<usize>();
    Tensor::build(shape, |out| {
        let work = out.par_chunks_mut(m * n).zip(left.data().par_chunks(each * m));
        work.zip(right.data().par_chunks(each * n)).for_each(|((out, left), right)| {
            gemm([m, n, each], Matrix::transposed(left, m), Matrix::rows(right, n), out, false);
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
