//! RMSNorm over the last axis (arXiv 1910.07467), with an optional modulation per batch entry (adaLN, arXiv 2212.09748).

use super::together;
use crate::{Error, Result, Tape, Tensor, Var};

/// Per-batch-entry modulation: y = norm * (1 + scale) + shift.
pub struct Modulation<'a> {
    /// [batch, channels].
    pub scale: &'a Var,
    /// [batch, channels].
    pub shift: &'a Var,
}

/// Gradients that are sums over rows, of the operands that there are.
pub(crate) struct Sums {
    /// `[channels]`.
    pub weight: Option<Tensor>,
    /// Of scale and of shift, [batch, channels].
    pub modulation: Option<[Tensor; 2]>,
}

/// y = x / sqrt(mean(x^2) + eps) * weight, then the modulation. `x` [batch, .., channels], `weight` `[channels]`.
///
/// # Errors
/// Shapes that don't agree, no elements, eps that is not positive.
pub fn rms_norm(
    tape: &Tape,
    x: &Var,
    weight: Option<&Var>,
    eps: f32,
    modulation: Option<Modulation<'_>>,
) -> Result<Var> {
    const OP: &str = "rms_norm";
    let (batch, c) = (x.shape().first().copied().unwrap_or(1), x.value().dim_back(1));
    if x.value().numel() == 0 {
        return Err(Error::shape(OP, "x", x.shape(), "at least one row of at least one channel"));
    }
    if eps.is_nan() || eps <= 0.0 {
        return Err(Error::invalid(OP, format!("eps {eps} is not positive")));
    }
    if let Some(w) = weight
        && w.shape() != [c]
    {
        return Err(Error::shape(OP, "weight", w.shape(), format!("[{c}]")));
    }
    for m in modulation.iter().flat_map(|m| [m.scale, m.shift]) {
        if m.shape() != [batch, c] {
            return Err(Error::shape(OP, "modulation", m.shape(), format!("[{batch}, {c}]")));
        }
    }
    let inputs: Vec<&Var> =
        [x].into_iter().chain(weight).chain(modulation.iter().flat_map(|m| [m.scale, m.shift])).collect();
    together(OP, &inputs.iter().map(|v| v.value()).collect::<Vec<_>>())?;
    let factors = modulation.as_ref().map(|m| (m.scale.value(), m.shift.value()));
    let out = on_device!(x.value(), rms_norm::forward(x.value(), weight.map(Var::value), factors, eps));
    let (x_, w_) = (x.clone(), weight.cloned());
    let m_ = modulation.as_ref().map(|m| [m.scale.clone(), m.shift.clone()]);
    Ok(tape.push(out, &inputs, move |grad, grads| {
        let (x, w) = (x_.value(), w_.as_ref().map(Var::value));
        let scale = m_.as_ref().map(|[scale, _]| scale.value());
        let wanted = w_.iter().chain(m_.iter().flatten()).any(|v| grads.wants(v));
        let (dx, sums) = on_device!(x, rms_norm::backward(x, w, scale, grad, eps, wanted));
        grads.accumulate(&x_, dx)?;
        let Some(sums) = sums else { return Ok(()) };
        for (var, sum) in m_.iter().flatten().zip(sums.modulation.into_iter().flatten()) {
            grads.accumulate(var, sum)?;
        }
        match (&w_, sums.weight) {
            (Some(w), Some(sum)) => grads.accumulate(w, sum),
            _ => Ok(()),
        }
    }))
}
