//! SwiGLU (arXiv 2002.05202) and SiLU activations.

use crate::{Error, Result, Tape, Var};

/// x = [up | gate] over the last axis [.., 2h] -> up * silu(gate) [.., h].
///
/// # Errors
/// An odd or empty last axis; not enough memory on a device.
pub fn swiglu(tape: &Tape, x: &Var) -> Result<Var> {
    let n = x.value().dim_back(1);
    if x.shape().is_empty() || n == 0 || !n.is_multiple_of(2) {
        return Err(Error::shape("swiglu", "x", x.shape(), "an even number of channels"));
    }
    let out = on_device!(x.value(), swiglu::swiglu(x.value()));
    let x_ = x.clone();
    Ok(tape.push(out, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(grad, swiglu::swiglu_gradient(x_.value(), grad)))
    }))
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
