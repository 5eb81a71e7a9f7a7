//! Sums, gated residuals, and cutting and joining along an axis.

use super::together;
use crate::{Error, Result, Tape, Tensor, Var};
use hywu_core::Dtype;

fn same(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    match a.shape() == b.shape() {
        true => together(op, &[a, b]),
        false => Err(Error::shape(op, "second operand", b.shape(), format!("{:?}", a.shape()))),
    }
}

/// a + b, same shape.
///
/// # Errors
/// Shapes that differ.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    same("add", a.value(), b.value())?;
    let sum = on_device!(a.value(), elementwise::add(a.value(), b.value()));
    let (a_, b_) = (a.clone(), b.clone());
    Ok(tape.push(sum, &[a, b], move |grad, grads| {
        grads.accumulate(&a_, grad.clone())?;
        grads.accumulate(&b_, grad.clone())
    }))
}

fn scaled(x: &Tensor, factor: f32) -> Result<Tensor> {
    Ok(on_device!(x, elementwise::scale(x, factor)))
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
    Ok(tape.push(scaled(x.value(), factor)?, &[x], move |grad, grads| {
        grads.accumulate(&x_, scaled(grad, factor)?)
    }))
}

/// a + rate * (b - a) of constants, same shape; in f32 the same bits on every device.
///
/// # Errors
/// Shapes that differ.
pub fn lerp(a: &Tensor, b: &Tensor, rate: f32) -> Result<Tensor> {
    same("lerp", a, b)?;
    Ok(on_device!(a, elementwise::lerp(a, b, rate)))
}

/// 0.5 * (a + b) of constants, same shape; in f32 the same bits on every device.
///
/// # Errors
/// Shapes that differ.
pub fn mean_of(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same("mean_of", a, b)?;
    scaled(&on_device!(a, elementwise::add(a, b)), 0.5)
}

/// x + gate * y: `x`, `y` [batch, .., channels], `gate` [batch, channels].
///
/// # Errors
/// Shapes that don't agree.
pub fn gated_residual(tape: &Tape, x: &Var, y: &Var, gate: &Var) -> Result<Var> {
    const OP: &str = "gated_residual";
    same(OP, x.value(), y.value())?;
    let (batch, channels) = (x.shape().first().copied().unwrap_or(1), x.value().dim_back(1));
    if gate.shape() != [batch, channels] {
        return Err(Error::shape(OP, "gate", gate.shape(), format!("[{batch}, {channels}]")));
    }
    if x.value().numel() == 0 {
        return Ok(x.clone());
    }
    together(OP, &[x.value(), gate.value()])?;
    let out = on_device!(x.value(), elementwise::gated(Some(x.value()), y.value(), gate.value()));
    let (x_, y_, gate_) = (x.clone(), y.clone(), gate.clone());
    Ok(tape.push(out, &[x, y, gate], move |grad, grads| {
        let (y, gate) = (y_.value(), gate_.value());
        if grads.wants(&y_) {
            grads.accumulate(&y_, on_device!(grad, elementwise::gated(None, grad, gate)))?;
        }
        if grads.wants(&gate_) {
            grads.accumulate(&gate_, on_device!(grad, elementwise::gate_gradient(grad, y, gate)))?;
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
    together("add_row", &[x.value(), row.value()])?;
    let out = on_device!(x.value(), elementwise::add_row(x.value(), row.value()));
    let (x_, row_) = (x.clone(), row.clone());
    Ok(tape.push(out, &[x, row], move |grad, grads| {
        if grads.wants(&row_) {
            grads.accumulate(&row_, column_sums(grad, n)?)?;
        }
        grads.accumulate(&x_, grad.clone())
    }))
}

/// Sums over all rows of length n.
pub(crate) fn column_sums(x: &Tensor, n: usize) -> Result<Tensor> {
    Ok(on_device!(x, elementwise::column_sums(x, n)))
}

/// (x - mean) * scale per channel, of a constant: x [.., channels], `mean` and `scale` `[channels]`.
///
/// # Errors
/// Shapes that don't agree.
pub fn standardise(x: &Tensor, mean: &Tensor, scale: &Tensor) -> Result<Tensor> {
    const OP: &str = "standardise";
    let n = x.dim_back(1);
    for (what, t) in [("mean", mean), ("scale", scale)] {
        if t.shape() != [n] || n == 0 {
            return Err(Error::shape(OP, what, t.shape(), format!("[{n}], at least one channel")));
        }
    }
    together(OP, &[x, mean, scale])?;
    Ok(on_device!(x, elementwise::standardise(x, mean, scale)))
}

/// The same values in another dtype (nothing changes on the CPU); the gradient goes back in the dtype of x.
///
/// # Errors
/// f16; not enough memory on a device.
pub fn cast(tape: &Tape, x: &Var, dtype: Dtype) -> Result<Var> {
    let out = x.value().cast(dtype)?;
    if out.same_storage(x.value()) {
        return Ok(x.clone());
    }
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| grads.accumulate(&x_, grad.cast(x_.value().dtype())?)))
}

/// Views a tensor as [outer, middle, inner] around the token axis of [batch, T, channels].
fn token_axis(op: &'static str, x: &Var) -> Result<[usize; 3]> {
    match *x.shape() {
        [b, t, c] => Ok([b, t, c]),
        ref other => Err(Error::shape(op, "operand", other, "[batch, tokens, channels]")),
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
    let lengths: Vec<usize> = parts.iter().map(|part| part.shape()[1] * c).collect();
    join(tape, OP, parts, &[b, total, c], &lengths)
}

/// Concatenates along the last axis: [.., n_i] -> [.., sum of n_i].
///
/// # Errors
/// No part, or parts of different leading axes.
pub fn concat_channels(tape: &Tape, parts: &[&Var]) -> Result<Var> {
    const OP: &str = "concat_channels";
    let first = parts.first().ok_or_else(|| Error::invalid(OP, "there is nothing to concatenate"))?;
    let Some((_, leading)) = first.shape().split_last() else {
        return Err(Error::shape(OP, "part", first.shape(), "at least one axis"));
    };
    for part in parts {
        if part.shape().split_last().is_none_or(|(n, other)| *n == 0 || other != leading) {
            return Err(Error::shape(
                OP,
                "part",
                part.shape(),
                format!("{leading:?} and at least one channel"),
            ));
        }
    }
    let lengths: Vec<usize> = parts.iter().map(|part| part.value().dim_back(1)).collect();
    let shape: Vec<usize> = leading.iter().copied().chain([lengths.iter().sum()]).collect();
    join(tape, OP, parts, &shape, &lengths)
}

/// A block of `lengths[i]` elements of every part in turn.
fn join(tape: &Tape, op: &'static str, parts: &[&Var], shape: &[usize], lengths: &[usize]) -> Result<Var> {
    let values: Vec<&Tensor> = parts.iter().map(|part| part.value()).collect();
    together(op, &values)?;
    let all: usize = lengths.iter().sum();
    let mut out = values[0].empty_like(shape)?;
    let mut at = 0;
    let mut placed = Vec::new();
    for (part, &length) in parts.iter().zip(lengths) {
        on_device!(out, elementwise::copy_blocks(&mut out, (at, all), part.value(), (0, length), length));
        placed.push(((*part).clone(), at, length));
        at += length;
    }
    Ok(tape.push(out, parts, move |grad, grads| {
        for (part, at, length) in &placed {
            if grads.wants(part) {
                let mut cut = grad.empty_like(part.shape())?;
                on_device!(grad, elementwise::copy_blocks(&mut cut, (0, *length), grad, (*at, all), *length));
                grads.accumulate(part, cut)?;
            }
        }
        Ok(())
    }))
}

/// Cuts `length` of every `from` elements starting at `start`, into this shape.
pub(crate) fn cut(
    tape: &Tape,
    x: &Var,
    shape: &[usize],
    start: usize,
    from: usize,
    length: usize,
) -> Result<Var> {
    let mut out = x.value().empty_like(shape)?;
    on_device!(out, elementwise::copy_blocks(&mut out, (0, length), x.value(), (start, from), length));
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        // In place, so that many cuts of one tensor cost no more than the tensor.
        if let Some(sum) = grads.slot(&x_)? {
            on_device!(grad, elementwise::add_blocks(sum, (start, from), grad, length));
        }
        Ok(())
    }))
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
    cut(tape, x, &[b, len, c], start * c, t * c, len * c)
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
    cut(tape, x, &shape, start, n, len)
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
    let out = on_device!(x.value(), elementwise::repeat_each(x.value(), each, k, &shape));
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(grad, elementwise::sum_each(grad, each, k, x_.shape())))
    }))
}

/// The first `lengths[b]` tokens of every batch entry; the others become zero: [batch, tokens, channels].
///
/// # Errors
/// Another number of axes or of lengths.
pub fn mask_tokens(tape: &Tape, x: &Var, lengths: &[usize]) -> Result<Var> {
    let &[batch, _, _] = x.shape() else {
        return Err(Error::shape("mask_tokens", "x", x.shape(), "[batch, tokens, channels]"));
    };
    if lengths.len() != batch {
        return Err(Error::shape("mask_tokens", "lengths", &[lengths.len()], format!("[{batch}]")));
    }
    let out = on_device!(x.value(), elementwise::mask_tokens(x.value(), lengths));
    let (x_, lengths) = (x.clone(), lengths.to_vec());
    Ok(tape.push(out, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(grad, elementwise::mask_tokens(grad, &lengths)))
    }))
}

/// Mean over the tokens: [batch, tokens, channels] -> [batch, channels].
///
/// # Errors
/// Another number of axes, or no tokens.
pub fn mean_tokens(tape: &Tape, x: &Var) -> Result<Var> {
    let &[_, _, _] = x.shape() else {
        return Err(Error::shape("mean_tokens", "x", x.shape(), "[batch, tokens, channels]"));
    };
    if x.value().numel() == 0 {
        return Err(Error::invalid("mean_tokens", format!("{:?} has no mean", x.shape())));
    }
    let out = on_device!(x.value(), elementwise::mean_tokens(x.value()));
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(grad, elementwise::mean_tokens_gradient(grad, x_.shape())))
    }))
}
