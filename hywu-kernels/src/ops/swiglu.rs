//! SwiGLU (arXiv 2002.05202) and SiLU activations.

use crate::{Error, Result, Tape, Tensor, Var, cpu::math::exp};
use rayon::prelude::*;

/// Elements a parallel task works on.
const CHUNK: usize = 1 << 14;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x = [up | gate] over the last axis [.., 2h] -> up * silu(gate) [.., h].
///
/// # Errors
/// An odd or empty last axis.
pub fn swiglu(tape: &Tape, x: &Var) -> Result<Var> {
    let n = x.value().dim_back(1);
    if x.shape().is_empty() || n == 0 || !n.is_multiple_of(2) {
        return Err(Error::shape("swiglu", "x", x.shape(), "an even number of channels"));
    }
    let h = n / 2;
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = h;
    let out = Tensor::build(&shape, |out| {
        out.par_chunks_mut(h).with_min_len(CHUNK.div_ceil(n)).zip(x.value().data().par_chunks(n)).for_each(
            |(out, x)| {
                let (up, gate) = x.split_at(h);
                out.iter_mut().zip(up).zip(gate).for_each(|((o, u), &g)| *o = u * g * sigmoid(g));
            },
        );
    });
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        let dx = Tensor::build(x_.shape(), |out| {
            let rows =
                out.par_chunks_mut(n).with_min_len(CHUNK.div_ceil(n)).zip(x_.value().data().par_chunks(n));
            rows.zip(grad.data().par_chunks(h)).for_each(|((out, x), grad)| {
                let (up, gate) = x.split_at(h);
                let (dup, dgate) = out.split_at_mut(h);
                for i in 0..h {
                    let (g, s) = (gate[i], sigmoid(gate[i]));
                    dup[i] = grad[i] * g * s;
                    dgate[i] = grad[i] * up[i] * s * (1.0 + g * (1.0 - s));
                }
            });
        });
        grads.accumulate(&x_, dx)
    }))
}

/// x * sigmoid(x).
///
/// # Errors
/// None at present.
pub fn silu(tape: &Tape, x: &Var) -> Result<Var> {
    let out = Tensor::build(x.shape(), |out| {
        out.par_chunks_mut(CHUNK).zip(x.value().data().par_chunks(CHUNK)).for_each(|(out, x)| {
            out.iter_mut().zip(x).for_each(|(o, &x)| *o = x * sigmoid(x));
        });
    });
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        let dx = Tensor::build(x_.shape(), |out| {
            let chunks = out.par_chunks_mut(CHUNK).zip(x_.value().data().par_chunks(CHUNK));
            chunks.zip(grad.data().par_chunks(CHUNK)).for_each(|((out, x), grad)| {
                for ((o, &x), d) in out.iter_mut().zip(x).zip(grad) {
                    let s = sigmoid(x);
                    *o = d * s * (1.0 + x * (1.0 - s));
                }
            });
        });
        grads.accumulate(&x_, dx)
    }))
}
