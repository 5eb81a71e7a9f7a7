//! Y`[b]` = X`[b]` W^T + bias + scale * (X`[b]` A`[b]`^T) B`[b]`^T (LoRA, arXiv 2106.09685), an adapter per batch entry.

use crate::{
    Error, LoraVar, Result, Tape, Tensor, Var,
    cpu::gemm::{LowRank, Matrix, gemm, gemm_low_rank},
    ops::elementwise::column_sums,
};
use rayon::prelude::*;

const OP: &str = "low_rank_linear";
/// Elements that one parallel task copies.
const CHUNK: usize = 1 << 14;

/// The sizes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    /// All rows of x.
    rows: usize,
    inner: usize,
    outer: usize,
    /// (adapters, rank); the rows are split evenly over the adapters.
    lora: Option<(usize, usize)>,
}

impl Sizes {
    fn validate(x: &Var, weight: &Var, bias: Option<&Var>, lora: Option<&LoraVar>) -> Result<Self> {
        let [outer, inner] = *weight.shape() else {
            return Err(Error::shape(OP, "weight", weight.shape(), "[out, in]"));
        };
        let batch = x.shape().first().copied().unwrap_or(0);
        if x.shape().len() < 2 || x.value().dim_back(1) != inner || x.value().numel() == 0 || outer == 0 {
            return Err(Error::shape(OP, "x", x.shape(), format!("[batch, .., {inner}], not empty")));
        }
        if let Some(b) = bias
            && b.shape() != [outer]
        {
            return Err(Error::shape(OP, "bias", b.shape(), format!("[{outer}]")));
        }
        let mut sizes = Self { rows: x.value().numel() / inner, inner, outer, lora: None };
        if let Some(lora) = lora {
            let (adapters, rank) = match *lora.a.shape() {
                [n, r, i] if i == inner && n > 0 && r > 0 && batch % n == 0 => (n, r),
                ref other => {
                    let expected = format!("[a divisor of {batch}, rank >= 1, {inner}]");
                    return Err(Error::shape(OP, "lora_a", other, expected));
                }
            };
            if lora.b.shape() != [adapters, outer, rank] {
                return Err(Error::shape(
                    OP,
                    "lora_b",
                    lora.b.shape(),
                    format!("[{adapters}, {outer}, {rank}]"),
                ));
            }
            if !lora.scale.is_finite() {
                return Err(Error::invalid(OP, format!("scale {} is not finite", lora.scale)));
            }
            sizes.lora = Some((adapters, rank));
        }
        Ok(sizes)
    }
}

/// Linear layer with an optional low-rank update per batch entry.
///
/// `x` [batch, .., in], `weight` [out, in], `bias` `[out]`, `lora.a` [lora batch, r, in], `lora.b` [lora batch, out, r]
/// -> [batch, .., out]. The lora batch divides the batch: each pair serves batch / lora batch consecutive entries.
///
/// # Errors
/// Shapes that don't agree, an empty operand, a scale that is not finite.
pub fn low_rank_linear(
    tape: &Tape,
    x: &Var,
    weight: &Var,
    bias: Option<&Var>,
    lora: Option<&LoraVar>,
) -> Result<Var> {
    let s = Sizes::validate(x, weight, bias, lora)?;
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = s.outer;
    let (xd, wd) = (x.value().data(), weight.value().data());
    // scale * S = scale * X A^T, kept for the backward pass.
    let shrunk = lora.zip(s.lora).map(|(lora, (adapters, rank))| {
        let n = s.rows / adapters;
        Tensor::build(&[s.rows, rank], |shrunk| {
            let work = shrunk.par_chunks_mut(n * rank).zip(xd.par_chunks(n * s.inner));
            work.zip(lora.a.value().data().par_chunks(rank * s.inner)).for_each(|((shrunk, x), a)| {
                let (x, a) = (Matrix::rows(x, s.inner), Matrix::transposed(a, s.inner));
                gemm([n, rank, s.inner], x, a, shrunk, false);
                shrunk.iter_mut().for_each(|v| *v *= lora.scale);
            });
        })
    });
    let out =
        Tensor::build(&shape, |out| {
            if let Some(b) = bias {
                let rows = out.par_chunks_mut(s.outer).with_min_len(CHUNK.div_ceil(s.outer));
                rows.for_each(|row| row.copy_from_slice(b.value().data()));
            }
            // [X | S] [W | B]^T: the update is a few more steps of the same sum.
            let term = lora.zip(s.lora).zip(shrunk.as_ref()).map(|((lora, (adapters, rank)), shrunk)| {
                LowRank { adapters, rank, s: shrunk.data(), b: lora.b.value().data() }
            });
            let (x, w) = (Matrix::rows(xd, s.inner), Matrix::transposed(wd, s.inner));
            gemm_low_rank([s.rows, s.outer, s.inner], x, w, term, out, bias.is_some());
        });
    let inputs: Vec<&Var> =
        [x, weight].into_iter().chain(bias).chain(lora.iter().flat_map(|l| [&l.a, &l.b])).collect();
    let (x_, w_, b_, l_) = (x.clone(), weight.clone(), bias.cloned(), lora.cloned());
    Ok(tape.push(out, &inputs, move |grad, grads| {
        let (dy, xd) = (grad.data(), x_.value().data());
        if let Some(b) = b_.as_ref().filter(|b| b.requires_grad()) {
            grads.accumulate(b, column_sums(grad, s.outer)?)?;
        }
        if grads.wants(&w_) {
            let dw = Tensor::build(w_.shape(), |out| {
                let dims = [s.outer, s.inner, s.rows];
                gemm(dims, Matrix::transposed(dy, s.outer), Matrix::rows(xd, s.inner), out, false);
            });
            grads.accumulate(&w_, dw)?;
        }
        let mut dx = grads.wants(&x_).then(|| {
            Tensor::build(x_.shape(), |out| {
                let dims = [s.rows, s.inner, s.outer];
                gemm(dims, Matrix::rows(dy, s.outer), Matrix::rows(w_.value().data(), s.inner), out, false);
            })
        });
        if let (Some(lora), Some((adapters, rank)), Some(shrunk)) = (&l_, s.lora, &shrunk) {
            let n = s.rows / adapters;
            if grads.wants(&lora.b) {
                // dB = dY^T (scale S)
                let db = Tensor::build(lora.b.shape(), |out| {
                    let work = out.par_chunks_mut(s.outer * rank).zip(dy.par_chunks(n * s.outer));
                    work.zip(shrunk.data().par_chunks(n * rank)).for_each(|((out, dy), shrunk)| {
                        gemm(
                            [s.outer, rank, n],
                            Matrix::transposed(dy, s.outer),
                            Matrix::rows(shrunk, rank),
                            out,
                            false,
                        );
                    });
                });
                grads.accumulate(&lora.b, db)?;
            }
            if dx.is_some() || grads.wants(&lora.a) {
                // dS = scale dY B
                let ds = Tensor::build(&[s.rows, rank], |out| {
                    let work = out.par_chunks_mut(n * rank).zip(dy.par_chunks(n * s.outer));
                    work.zip(lora.b.value().data().par_chunks(s.outer * rank)).for_each(|((out, dy), b)| {
                        gemm(
                            [n, rank, s.outer],
                            Matrix::rows(dy, s.outer),
                            Matrix::rows(b, rank),
                            out,
                            false,
                        );
                        out.iter_mut().for_each(|v| *v *= lora.scale);
                    });
                });
                if let Some(dx) = &mut dx {
                    let work = dx.data_mut().par_chunks_mut(n * s.inner).zip(ds.data().par_chunks(n * rank));
                    work.zip(lora.a.value().data().par_chunks(rank * s.inner)).for_each(|((dx, ds), a)| {
                        gemm([n, s.inner, rank], Matrix::rows(ds, rank), Matrix::rows(a, s.inner), dx, true);
                    });
                }
                if grads.wants(&lora.a) {
                    let da = Tensor::build(lora.a.shape(), |out| {
                        let work = out.par_chunks_mut(rank * s.inner).zip(ds.data().par_chunks(n * rank));
                        work.zip(xd.par_chunks(n * s.inner)).for_each(|((out, ds), x)| {
                            gemm(
                                [rank, s.inner, n],
                                Matrix::transposed(ds, rank),
                                Matrix::rows(x, s.inner),
                                out,
                                false,
                            );
                        });
                    });
                    grads.accumulate(&lora.a, da)?;
                }
            }
        }
        match dx {
            Some(dx) => grads.accumulate(&x_, dx),
            None => Ok(()),
        }
    }))
}

/// [`low_rank_linear`] without an update.
///
/// # Errors
/// As [`low_rank_linear`].
pub fn linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    low_rank_linear(tape, x, weight, bias, None)
}
