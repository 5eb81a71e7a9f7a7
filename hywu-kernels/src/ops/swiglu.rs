//! SwiGLU (arXiv 2002.05202) and SiLU activations.

use super::low_rank_linear::{Shrink, Shrunk};
use crate::{Error, Result, Tape, Tensor, Var, cuda};

/// x = [up | gate] over the last axis [.., 2h] -> up * silu(gate) [.., h].
///
/// # Errors
/// An odd or empty last axis; not enough memory on a device.
pub fn swiglu(tape: &Tape, x: &Var) -> Result<Var> {
    validate(x)?;
    let out = on_device!(x.value(), swiglu::swiglu(x.value()));
    Ok(record(tape, out, x))
}

/// [`swiglu`], and scale y A^T of its result for the [`LowRankLinear`](super::low_rank_linear::LowRankLinear) that reads it. On a CUDA
/// device in bf16 one kernel computes both where it can, without reading y; y and the gradients are those of [`swiglu`] in every bit, and
/// what is computed ahead is that of [`Shrink::of`].
///
/// # Errors
/// As [`swiglu`] and [`Shrink::of`].
pub fn swiglu_shrink(tape: &Tape, x: &Var, shrink: &Shrink<'_>) -> Result<(Var, Shrunk)> {
    validate(x)?;
    shrink.validate(x.value(), x.value().dim_back(1) / 2)?;
    if x.value().is_cuda()
        && let Some((out, s)) = cuda::swiglu::swiglu_shrink(x.value(), shrink)?
    {
        let shrunk = shrink.shrunk(&out, s);
        return Ok((record(tape, out, x), shrunk));
    }
    let y = swiglu(tape, x)?;
    let shrunk = shrink.of(y.value())?;
    Ok((y, shrunk))
}

fn validate(x: &Var) -> Result<()> {
    let n = x.value().dim_back(1);
    if x.shape().is_empty() || n == 0 || !n.is_multiple_of(2) {
        return Err(Error::shape("swiglu", "x", x.shape(), "an even number of channels"));
    }
    Ok(())
}

/// Puts the result on the tape.
fn record(tape: &Tape, out: Tensor, x: &Var) -> Var {
    let x_ = x.clone();
    tape.push(out, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(grad, swiglu::swiglu_gradient(x_.value(), grad)))
    })
}

/// x * sigmoid(x).
///
/// # Errors
/// Not enough memory on a device.
pub fn silu(tape: &Tape, x: &Var) -> Result<Var> {
    let out = on_device!(x.value(), swiglu::silu(x.value()));
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(grad, swiglu::silu_gradient(x_.value(), grad)))
    }))
}
