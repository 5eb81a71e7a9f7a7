//! RMSNorm over the last axis, with an optional modulation per batch entry.

use crate::{Result, Tape, Var};

/// Per-batch-entry modulation: y = norm * (1 + scale) + shift.
pub struct Modulation<'a> {
    /// [batch, channels].
    pub scale: &'a Var,
    /// [batch, channels].
    pub shift: &'a Var,
}

/// y = x / sqrt(mean(x^2) + eps) * weight, then the modulation. `x` [batch, .., channels], `weight` [channels].
pub fn rms_norm(
    tape: &Tape,
    x: &Var,
    weight: Option<&Var>,
    eps: f32,
    modulation: Option<Modulation<'_>>,
) -> Result<Var> {
    let _ = (tape, x, weight, eps, modulation);
    todo!()
}
