//! Sums, gated residuals, and cutting and joining along an axis.

use crate::{Error, Result, Tape, Tensor, Var};
use rayon::prelude::*;

/// Rows a parallel task works on; fixed, so that sums don't depend on the number of threads.
const ROWS: usize = 64;

fn same(op: &'static str, a: &Var, b: &Var) -> Result<()> {
    match a.shape() == b.shape() {
        true => Ok(()),
        false => Err(Error::shape(op, "second operand", b.shape(), format!("{:?}", a.shape()))),
    }
}

/// a + b, same shape.
///
/// # Errors
/// Shapes that differ.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    same("add", a, b)?;
    let mut sum = a.value().clone();
    crate::cpu::add_assign(sum.data_mut(), b.value().data());
    let (a_, b_) = (a.clone(), b.clone());
    Ok(tape.push(sum, &[a, b], move |grad, grads| {
        grads.accumulate(&a_, grad.clone())?;
        grads.accumulate(&b_, grad.clone())
    }))
}

fn scaled(x: &Tensor, factor: f32) -> Tensor {
    Tensor::build(x.shape(), |out| out.iter_mut().zip(x.data()).for_each(|(o, x)| *o = factor * x))
}

/// factor * x.
///
/// # Errors
/// A factor that is not finite.
pub fn scale(tape: &Tape, x: &Var, factor: f32) -> Result<Var> {
    if !factor.is_finite() {
        return Err(Error::invalid("scale", format!("factor {factor} is not finite")));
    }
    let x_ = x.clone();
    Ok(tape.push(scaled(x.value(), factor), &[x], move |grad, grads| {
        grads.accumulate(&x_, scaled(grad, factor))
    }))
}

/// x + gate * y: `x`, `y` [batch, .., channels], `gate` [batch, channels].
///
/// # Errors
/// Shapes that don't agree.
pub fn gated_residual(tape: &Tape, x: &Var, y: &Var, gate: &Var) -> Result<Var> {
    const OP: &str = "gated_residual";
    same(OP, x, y)?;
    let (batch, channels) = (x.shape().first().copied().unwrap_or(1), x.value().dim_back(1));
    if gate.shape() != [batch, channels] {
        return Err(Error::shape(OP, "gate", gate.shape(), format!("[{batch}, {channels}]")));
    }
    if x.value().numel() == 0 {
        return Ok(x.clone());
    }
    let each = x.value().numel() / batch;
    let mut out = x.value().clone();
    let work = out.data_mut().par_chunks_mut(each).zip(y.value().data().par_chunks(each));
    work.zip(gate.value().data().par_chunks(channels)).for_each(|((out, y), gate)| {
        for (out, y) in out.chunks_mut(channels).zip(y.chunks(channels)) {
            out.iter_mut().zip(y).zip(gate).for_each(|((o, y), g)| *o += g * y);
        }
    });
    let (x_, y_, gate_) = (x.clone(), y.clone(), gate.clone());
    Ok(tape.push(out, &[x, y, gate], move |grad, grads| {
        let (y, gate) = (y_.value(), gate_.value());
        if grads.wants(&y_) {
            let dy = Tensor::build(y.shape(), |out| {
                let work = out.par_chunks_mut(each).zip(grad.data().par_chunks(each));
                work.zip(gate.data().par_chunks(channels)).for_each(|((out, grad), gate)| {
                    for (out, grad) in out.chunks_mut(channels).zip(grad.chunks(channels)) {
                        out.iter_mut().zip(grad).zip(gate).for_each(|((o, d), g)| *o = g * d);
                    }
                });
            });
            grads.accumulate(&y_, dy)?;
        }
        if grads.wants(&gate_) {
            let dgate = Tensor::build(gate.shape(), |out| {
                let work = out.par_chunks_mut(channels).zip(grad.data().par_chunks(each));
                work.zip(y.data().par_chunks(each)).for_each(|((out, grad), y)| {
                    out.fill(0.0);
                    for (grad, y) in grad.chunks(channels).zip(y.chunks(channels)) {
                        out.iter_mut().zip(grad).zip(y).for_each(|((o, d), y)| *o += d * y);
                    }
                });
            });
            grads.accumulate(&gate_, dgate)?;
        }
        grads.accumulate(&x_, grad.clone())
    }))
}

/// x [batch, .., n] + row `[n]`, broadcast over every leading axis.
///
/// # Errors
/// A row of another length.
pub fn add_row(tape: &Tape, x: &Var, row: &Var) -> Result<Var> {
    let n = x.value().dim_back(1);
    if row.shape() != [n] || n == 0 {
        return Err(Error::shape("add_row", "row", row.shape(), format!("[{n}], at least one channel")));
    }
    let mut out = x.value().clone();
    out.data_mut().par_chunks_mut(n * ROWS).for_each(|rows| {
        rows.chunks_mut(n).for_each(|r| r.iter_mut().zip(row.value().data()).for_each(|(o, v)| *o += v));
    });
    let (x_, row_) = (x.clone(), row.clone());
    Ok(tape.push(out, &[x, row], move |grad, grads| {
        if grads.wants(&row_) {
            grads.accumulate(&row_, column_sums(grad, n))?;
        }
        grads.accumulate(&x_, grad.clone())
    }))
}

/// Sums over all rows of length n: blocks of rows first, then the blocks in order.
pub(crate) fn column_sums(x: &Tensor, n: usize) -> Tensor {
    let partial: Vec<Vec<f32>> = (x.data().par_chunks(n * ROWS))
        .map(|rows| {
            let mut sum = vec![0.0; n];
            rows.chunks(n).for_each(|r| crate::cpu::add_assign(&mut sum, r));
            sum
        })
        .collect();
    Tensor::build(&[n], |out| {
        out.fill(0.0);
        partial.iter().for_each(|p| crate::cpu::add_assign(out, p));
    })
}

/// Views a tensor as [outer, middle, inner] around the token axis of [batch, T, channels].
fn token_axis(op: &'static str, x: &Var) -> Result<[usize; 3]> {
    match *x.shape() {
        [b, t, c] => Ok([b, t, c]),
        ref other => Err(Error::shape(op, "operand", other, "[batch, tokens, channels]")),
    }
}

/// Copies `len` of every `from` elements, starting at `start`, to `at` of every `to` elements.
fn copy_strided(
    out: &mut [f32],
    (at, to): (usize, usize),
    x: &[f32],
    (start, from): (usize, usize),
    len: usize,
) {
    for (out, x) in out.chunks_mut(to).zip(x.chunks(from)) {
        out[at..at + len].copy_from_slice(&x[start..start + len]);
    }
}

/// Concatenates [batch, T_i, channels] along the token axis.
///
/// # Errors
/// No part, or parts of different batch or channels.
pub fn concat_tokens(tape: &Tape, parts: &[&Var]) -> Result<Var> {
    const OP: &str = "concat_tokens";
    let first = parts.first().ok_or_else(|| Error::invalid(OP, "there is nothing to concatenate"))?;
    let [b, _, c] = token_axis(OP, first)?;
    let mut total = 0;
    for part in parts {
        let [pb, t, pc] = token_axis(OP, part)?;
        if (pb, pc) != (b, c) || t * c == 0 {
            return Err(Error::shape(OP, "part", part.shape(), format!("[{b}, at least 1, {c}]")));
        }
        total += t;
    }
    let mut at = 0;
    let mut placed = Vec::new();
    let out = Tensor::build(&[b, total, c], |out| {
        for part in parts {
            let len = part.shape()[1] * c;
            copy_strided(out, (at, total * c), part.value().data(), (0, len), len);
            placed.push(((*part).clone(), at, len));
            at += len;
        }
    });
    Ok(tape.push(out, parts, move |grad, grads| {
        for (part, at, len) in &placed {
            if grads.wants(part) {
                let cut = Tensor::build(part.shape(), |out| {
                    copy_strided(out, (0, *len), grad.data(), (*at, total * c), *len);
                });
                grads.accumulate(part, cut)?;
            }
        }
        Ok(())
    }))
}

/// Cuts `len` of every `from` elements starting at `start`.
fn cut(tape: &Tape, x: &Var, shape: &[usize], start: usize, from: usize, len: usize) -> Var {
    let out = Tensor::build(shape, |out| copy_strided(out, (0, len), x.value().data(), (start, from), len));
    let x_ = x.clone();
    tape.push(out, &[x], move |grad, grads| {
        let dx = Tensor::build(x_.shape(), |out| {
            out.fill(0.0);
            copy_strided(out, (start, from), grad.data(), (0, len), len);
        });
        grads.accumulate(&x_, dx)
    })
}

/// x [batch, T, channels] -> tokens `start .. start + len`.
///
/// # Errors
/// Tokens outside of x.
pub fn slice_tokens(tape: &Tape, x: &Var, start: usize, len: usize) -> Result<Var> {
    const OP: &str = "slice_tokens";
    let [b, t, c] = token_axis(OP, x)?;
    if len == 0 || c == 0 || start.checked_add(len).is_none_or(|end| end > t) {
        return Err(Error::shape(
            OP,
            "x",
            x.shape(),
            format!("at least one token, and {start} + {len} of them"),
        ));
    }
    Ok(cut(tape, x, &[b, len, c], start * c, t * c, len * c))
}

/// x [.., n] -> channels `start .. start + len` of the last axis.
///
/// # Errors
/// Channels outside of x.
pub fn slice_channels(tape: &Tape, x: &Var, start: usize, len: usize) -> Result<Var> {
    let n = x.value().dim_back(1);
    if len == 0 || x.shape().is_empty() || start.checked_add(len).is_none_or(|end| end > n) {
        return Err(Error::shape(
            "slice_channels",
            "x",
            x.shape(),
            format!("at least {start} + {len} channels"),
        ));
    }
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = len;
    Ok(cut(tape, x, &shape, start, n, len))
}

/// [I, ..] -> [I * k, ..]: every entry k times in a row. The gradient sums over the copies.
///
/// # Errors
/// k = 0, or a scalar.
pub fn repeat_each(tape: &Tape, x: &Var, k: usize) -> Result<Var> {
    let [count, rest @ ..] = x.shape() else {
        return Err(Error::shape("repeat_each", "x", x.shape(), "at least one axis"));
    };
    if k == 0 || x.value().numel() == 0 {
        return Err(Error::invalid("repeat_each", format!("{:?} can't be repeated {k} times", x.shape())));
    }
    let each = x.value().numel() / count;
    let shape: Vec<usize> = [count * k].into_iter().chain(rest.iter().copied()).collect();
    let out = Tensor::build(&shape, |out| {
        for (out, x) in out.chunks_mut(each * k).zip(x.value().data().chunks(each)) {
            out.chunks_mut(each).for_each(|o| o.copy_from_slice(x));
        }
    });
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        let dx = Tensor::build(x_.shape(), |out| {
            out.fill(0.0);
            for (out, grad) in out.chunks_mut(each).zip(grad.data().chunks(each * k)) {
                grad.chunks(each).for_each(|g| crate::cpu::add_assign(out, g));
            }
        });
        grads.accumulate(&x_, dx)
    }))
}

/// The first `lengths[b]` tokens of every batch entry; the others become zero: [batch, tokens, channels].
///
/// # Errors
/// Another number of axes or of lengths.
pub fn mask_tokens(tape: &Tape, x: &Var, lengths: &[usize]) -> Result<Var> {
    let &[batch, tokens, channels] = x.shape() else {
        return Err(Error::shape("mask_tokens", "x", x.shape(), "[batch, tokens, channels]"));
    };
    if lengths.len() != batch {
        return Err(Error::shape("mask_tokens", "lengths", &[lengths.len()], format!("[{batch}]")));
    }
    let lengths = lengths.to_vec();
    let masked = move |x: &Tensor| {
        Tensor::build(x.shape(), |out| {
            out.copy_from_slice(x.data());
            if channels > 0 && tokens > 0 {
                for (out, &length) in out.chunks_mut(tokens * channels).zip(&lengths) {
                    out[length.min(tokens) * channels..].fill(0.0);
                }
            }
        })
    };
    let out = masked(x.value());
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| grads.accumulate(&x_, masked(grad))))
}

/// Mean over the tokens: [batch, tokens, channels] -> [batch, channels].
///
/// # Errors
/// Another number of axes, or no tokens.
pub fn mean_tokens(tape: &Tape, x: &Var) -> Result<Var> {
    let &[batch, tokens, channels] = x.shape() else {
        return Err(Error::shape("mean_tokens", "x", x.shape(), "[batch, tokens, channels]"));
    };
    if x.value().numel() == 0 {
        return Err(Error::invalid("mean_tokens", format!("{:?} has no mean", x.shape())));
    }
    let share = 1.0 / tokens as f32;
    let out = Tensor::build(&[batch, channels], |out| {
        out.fill(0.0);
        for (out, x) in out.chunks_mut(channels).zip(x.value().data().chunks(tokens * channels)) {
            x.chunks(channels).for_each(|x| crate::cpu::add_assign(out, x));
            out.iter_mut().for_each(|v| *v *= share);
        }
    });
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        let dx = Tensor::build(x_.shape(), |out| {
            for (out, grad) in out.chunks_mut(tokens * channels).zip(grad.data().chunks(channels)) {
                out.chunks_mut(channels)
                    .for_each(|out| out.iter_mut().zip(grad).for_each(|(o, g)| *o = share * g));
            }
        });
        grads.accumulate(&x_, dx)
    }))
}
