//! Sums, gated residuals, and cutting and joining along an axis.

use crate::Tensor;
use rayon::prelude::*;

/// Rows a parallel task works on; fixed, so that sums don't depend on the number of threads.
const ROWS: usize = 64;
/// Elements that a parallel task works on where there are no rows.
const CHUNK: usize = 1 << 14;

/// a + b.
pub fn add(a: &Tensor, b: &Tensor) -> Tensor {
    let mut sum = a.clone();
    add_assign(&mut sum, b);
    sum
}

/// sum += x.
pub fn add_assign(sum: &mut Tensor, x: &Tensor) {
    super::add_assign(sum.data_mut(), x.data());
}

/// factor * x.
pub fn scale(x: &Tensor, factor: f32) -> Tensor {
    Tensor::build(x.shape(), |out| out.iter_mut().zip(x.data()).for_each(|(o, x)| *o = factor * x))
}

/// a + rate * (b - a).
pub fn lerp(a: &Tensor, b: &Tensor, rate: f32) -> Tensor {
    Tensor::build(a.shape(), |out| {
        let chunks =
            out.par_chunks_mut(CHUNK).zip(a.data().par_chunks(CHUNK)).zip(b.data().par_chunks(CHUNK));
        chunks.for_each(|((out, a), b)| {
            out.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = a + rate * (b - a));
        });
    })
}

/// base + gate * y, or only gate * y; `gate` [batch, channels].
pub fn gated(base: Option<&Tensor>, y: &Tensor, gate: &Tensor) -> Tensor {
    let channels = gate.dim_back(1);
    let each = y.numel() / gate.shape()[0];
    let work = |out: &mut [f32], f: fn(&mut f32, f32)| {
        let entries = out.par_chunks_mut(each).zip(y.data().par_chunks(each));
        entries.zip(gate.data().par_chunks(channels)).for_each(|((out, y), gate)| {
            for (out, y) in out.chunks_mut(channels).zip(y.chunks(channels)) {
                out.iter_mut().zip(y).zip(gate).for_each(|((o, y), g)| f(o, g * y));
            }
        });
    };
    match base {
        None => Tensor::build(y.shape(), |out| work(out, |o, v| *o = v)),
        Some(base) => {
            let mut out = base.clone();
            work(out.data_mut(), |o, v| *o += v);
            out
        }
    }
}

/// Sum over the rows of each batch entry of grad * y: [batch, channels], as large as `gate`.
pub fn gate_gradient(grad: &Tensor, y: &Tensor, gate: &Tensor) -> Tensor {
    let channels = gate.dim_back(1);
    let each = y.numel() / gate.shape()[0];
    Tensor::build(gate.shape(), |out| {
        let work = out.par_chunks_mut(channels).zip(grad.data().par_chunks(each));
        work.zip(y.data().par_chunks(each)).for_each(|((out, grad), y)| {
            out.fill(0.0);
            for (grad, y) in grad.chunks(channels).zip(y.chunks(channels)) {
                out.iter_mut().zip(grad).zip(y).for_each(|((o, d), y)| *o += d * y);
            }
        });
    })
}

/// x + row, over every row.
pub fn add_row(x: &Tensor, row: &Tensor) -> Tensor {
    let n = row.numel();
    let mut out = x.clone();
    out.data_mut().par_chunks_mut(n * ROWS).for_each(|rows| {
        rows.chunks_mut(n).for_each(|r| super::add_assign(r, row.data()));
    });
    out
}

/// (x - mean) * scale, over every row.
pub fn standardise(x: &Tensor, mean: &Tensor, scale: &Tensor) -> Tensor {
    let n = mean.numel();
    let mut out = x.clone();
    out.data_mut().par_chunks_mut(n * ROWS).for_each(|rows| {
        for row in rows.chunks_mut(n) {
            let values = row.iter_mut().zip(mean.data()).zip(scale.data());
            values.for_each(|((v, m), s)| *v = (*v - m) * s);
        }
    });
    out
}

/// Sums over all rows of length n: blocks of rows first, then the blocks in order.
pub fn column_sums(x: &Tensor, n: usize) -> Tensor {
    let partial: Vec<Vec<f32>> = (x.data().par_chunks(n * ROWS))
        .map(|rows| {
            let mut sum = vec![0.0; n];
            rows.chunks(n).for_each(|r| super::add_assign(&mut sum, r));
            sum
        })
        .collect();
    Tensor::build(&[n], |out| {
        out.fill(0.0);
        partial.iter().for_each(|p| super::add_assign(out, p));
    })
}

/// Copies `length` of every `from` elements of x, from `start` on, to `at` of every `to` elements of `out`.
pub fn copy_blocks(
    out: &mut Tensor,
    (at, to): (usize, usize),
    x: &Tensor,
    (start, from): (usize, usize),
    length: usize,
) {
    for (out, x) in out.data_mut().chunks_mut(to).zip(x.data().chunks(from)) {
        out[at..at + length].copy_from_slice(&x[start..start + length]);
    }
}

/// Adds x, in blocks of `length`, to `at` of every `to` elements of `sum`.
pub fn add_blocks(sum: &mut Tensor, (at, to): (usize, usize), x: &Tensor, length: usize) {
    for (sum, x) in sum.data_mut().chunks_mut(to).zip(x.data().chunks(length)) {
        super::add_assign(&mut sum[at..at + length], x);
    }
}

/// Every block of `each` elements k times in a row, into this shape.
pub fn repeat_each(x: &Tensor, each: usize, k: usize, shape: &[usize]) -> Tensor {
    Tensor::build(shape, |out| {
        for (out, x) in out.chunks_mut(each * k).zip(x.data().chunks(each)) {
            out.chunks_mut(each).for_each(|o| o.copy_from_slice(x));
        }
    })
}

/// Sums of k blocks of `each` elements in a row, into this shape.
pub fn sum_each(x: &Tensor, each: usize, k: usize, shape: &[usize]) -> Tensor {
    Tensor::build(shape, |out| {
        out.fill(0.0);
        for (out, x) in out.chunks_mut(each).zip(x.data().chunks(each * k)) {
            x.chunks(each).for_each(|x| super::add_assign(out, x));
        }
    })
}

/// The first `lengths[b]` tokens of every batch entry, zeros after them: [batch, tokens, channels].
pub fn mask_tokens(x: &Tensor, lengths: &[usize]) -> Tensor {
    let (tokens, channels) = (x.shape()[1], x.shape()[2]);
    let mut out = x.clone();
    if channels > 0 && tokens > 0 {
        for (out, &length) in out.data_mut().chunks_mut(tokens * channels).zip(lengths) {
            out[length.min(tokens) * channels..].fill(0.0);
        }
    }
    out
}

/// Mean over the tokens: [batch, tokens, channels] -> [batch, channels].
pub fn mean_tokens(x: &Tensor) -> Tensor {
    let &[batch, tokens, channels] = x.shape() else { return x.clone() };
    let share = 1.0 / tokens as f32;
    Tensor::build(&[batch, channels], |out| {
        out.fill(0.0);
        for (out, x) in out.chunks_mut(channels).zip(x.data().chunks(tokens * channels)) {
            x.chunks(channels).for_each(|x| super::add_assign(out, x));
            out.iter_mut().for_each(|v| *v *= share);
        }
    })
}

/// grad / tokens for every token of `shape` = [batch, tokens, channels].
pub fn mean_tokens_gradient(grad: &Tensor, shape: &[usize]) -> Tensor {
    let (tokens, channels) = (shape[1], shape[2]);
    let share = 1.0 / tokens as f32;
    Tensor::build(shape, |out| {
        for (out, grad) in out.chunks_mut(tokens * channels).zip(grad.data().chunks(channels)) {
            out.chunks_mut(channels).for_each(|out| {
                out.iter_mut().zip(grad).for_each(|(o, g)| *o = share * g);
            });
        }
    })
}
