//! RMSNorm over the last axis (arXiv 1910.07467), with an optional modulation per batch entry (adaLN, arXiv 2212.09748).

use super::{
    low_rank_linear::{Shrink, Shrunk},
    together,
};
use crate::{Error, Result, Tape, Tensor, Var, cuda};

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
    validate(x, weight, eps, modulation.as_ref())?;
    let out = on_device!(
        x.value(),
        rms_norm::forward(x.value(), weight.map(Var::value), factors(&modulation), eps)
    );
    Ok(record(tape, out, x, weight, eps, modulation))
}

/// [`rms_norm`], and scale y A^T of its result for the [`LowRankLinear`](super::low_rank_linear::LowRankLinear) that reads it. On a CUDA
/// device in bf16 one kernel computes both where it can, without reading y; y and the gradients are those of [`rms_norm`] in every bit,
/// and what is computed ahead is that of [`Shrink::of`].
///
/// # Errors
/// As [`rms_norm`] and [`Shrink::of`].
pub fn rms_norm_shrink(
    tape: &Tape,
    x: &Var,
    weight: Option<&Var>,
    eps: f32,
    modulation: Option<Modulation<'_>>,
    shrink: &Shrink<'_>,
) -> Result<(Var, Shrunk)> {
    validate(x, weight, eps, modulation.as_ref())?;
    shrink.validate(x.value(), x.value().dim_back(1))?;
    if x.value().is_cuda()
        && let Some((out, s)) = cuda::rms_norm::forward_shrink(
            x.value(),
            weight.map(Var::value),
            factors(&modulation),
            eps,
            shrink,
        )?
    {
        let shrunk = shrink.shrunk(&out, s);
        return Ok((record(tape, out, x, weight, eps, modulation), shrunk));
    }
    let y = rms_norm(tape, x, weight, eps, modulation)?;
    let shrunk = shrink.of(y.value())?;
    Ok((y, shrunk))
}

fn factors<'a>(modulation: &Option<Modulation<'a>>) -> Option<(&'a Tensor, &'a Tensor)> {
    modulation.as_ref().map(|m| (m.scale.value(), m.shift.value()))
}

fn inputs<'a>(x: &'a Var, weight: Option<&'a Var>, modulation: Option<&Modulation<'a>>) -> Vec<&'a Var> {
    let modulation = modulation.into_iter().flat_map(|m| [m.scale, m.shift]);
    [x].into_iter().chain(weight).chain(modulation).collect()
}

/// Checks the arguments.
fn validate(x: &Var, weight: Option<&Var>, eps: f32, modulation: Option<&Modulation<'_>>) -> Result<()> {
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
    for m in modulation.into_iter().flat_map(|m| [m.scale, m.shift]) {
        if m.shape() != [batch, c] {
            return Err(Error::shape(OP, "modulation", m.shape(), format!("[{batch}, {c}]")));
        }
    }
    let operands = inputs(x, weight, modulation);
    together(OP, &operands.iter().map(|v| v.value()).collect::<Vec<_>>())
}

/// Puts the result on the tape.
fn record(
    tape: &Tape,
    out: Tensor,
    x: &Var,
    weight: Option<&Var>,
    eps: f32,
    modulation: Option<Modulation<'_>>,
) -> Var {
    let inputs = inputs(x, weight, modulation.as_ref());
    let (x_, w_) = (x.clone(), weight.cloned());
    let m_ = modulation.as_ref().map(|m| [m.scale.clone(), m.shift.clone()]);
    tape.push(out, &inputs, move |grad, grads| {
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
    })
}
