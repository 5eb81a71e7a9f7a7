//! SwiGLU and SiLU activations.

use super::math::exp;
use crate::Tensor;
use rayon::prelude::*;

/// Elements a parallel task works on.
const CHUNK: usize = 1 << 14;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Rows [up | gate] -> up * silu(gate).
pub fn swiglu(x: &Tensor) -> Tensor {
    let n = x.dim_back(1);
    let h = n / 2;
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = h;
    Tensor::build(&shape, |out| {
        out.par_chunks_mut(h).with_min_len(CHUNK.div_ceil(n)).zip(x.data().par_chunks(n)).for_each(
            |(out, x)| {
                let (up, gate) = x.split_at(h);
                out.iter_mut().zip(up).zip(gate).for_each(|((o, u), &g)| *o = u * g * sigmoid(g));
            },
        );
    })
}

/// The gradient of x.
pub fn swiglu_gradient(x: &Tensor, grad: &Tensor) -> Tensor {
    let n = x.dim_back(1);
    let h = n / 2;
    Tensor::build(x.shape(), |out| {
        let rows = out.par_chunks_mut(n).with_min_len(CHUNK.div_ceil(n)).zip(x.data().par_chunks(n));
        rows.zip(grad.data().par_chunks(h)).for_each(|((out, x), grad)| {
            let (up, gate) = x.split_at(h);
            let (dup, dgate) = out.split_at_mut(h);
            for i in 0..h {
                let (g, s) = (gate[i], sigmoid(gate[i]));
                dup[i] = grad[i] * g * s;
                dgate[i] = grad[i] * up[i] * s * (1.0 + g * (1.0 - s));
            }
        });
    })
}

/// x * sigmoid(x).
pub fn silu(x: &Tensor) -> Tensor {
    Tensor::build(x.shape(), |out| {
        out.par_chunks_mut(CHUNK).zip(x.data().par_chunks(CHUNK)).for_each(|(out, x)| {
            out.iter_mut().zip(x).for_each(|(o, &x)| *o = x * sigmoid(x));
        });
    })
}

/// The gradient of x.
pub fn silu_gradient(x: &Tensor, grad: &Tensor) -> Tensor {
    Tensor::build(x.shape(), |out| {
        let chunks = out.par_chunks_mut(CHUNK).zip(x.data().par_chunks(CHUNK));
        chunks.zip(grad.data().par_chunks(CHUNK)).for_each(|((out, x), grad)| {
            for ((o, &x), d) in out.iter_mut().zip(x).zip(grad) {
                let s = sigmoid(x);
                *o = d * s * (1.0 + x * (1.0 - s));
            }
        });
    })
}
