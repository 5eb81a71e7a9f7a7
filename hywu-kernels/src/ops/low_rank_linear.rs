//! Y[b] = X[b] W^T + bias + scale * (X[b] A[b]^T) B[b]^T.

use crate::{LoraVar, Result, Tape, Var};

/// Linear layer with an optional low-rank update per batch entry.
///
/// `x` [batch, .., in], `weight` [out, in], `bias` [out], `lora.a` [lora batch, r, in], `lora.b` [lora batch, out, r]
/// -> [batch, .., out]. The lora batch divides the batch: each pair serves batch / lora batch consecutive entries.
pub fn low_rank_linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>, lora: Option<&LoraVar>) -> Result<Var> {
    let _ = (tape, x, weight, bias, lora);
    todo!()
}

/// [`low_rank_linear`] without an update.
pub fn linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    low_rank_linear(tape, x, weight, bias, None)
}
