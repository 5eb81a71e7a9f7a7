//! Sums, gated residuals and token-axis concatenation.

use crate::{Result, Tape, Var};

/// a + b, same shape.
pub fn add(tape: &Tape, a: &Var, b: &Var) -> Result<Var> {
    let _ = (tape, a, b);
    todo!()
}

/// factor * x.
pub fn scale(tape: &Tape, x: &Var, factor: f32) -> Result<Var> {
    let _ = (tape, x, factor);
    todo!()
}

/// x + gate * y: `x`, `y` [batch, .., channels], `gate` [batch, channels].
pub fn gated_residual(tape: &Tape, x: &Var, y: &Var, gate: &Var) -> Result<Var> {
    let _ = (tape, x, y, gate);
    todo!()
}

/// x [batch, .., n] + row [n], broadcast over every leading axis.
pub fn add_row(tape: &Tape, x: &Var, row: &Var) -> Result<Var> {
    let _ = (tape, x, row);
    todo!()
}

/// Concatenates [batch, T_i, channels] along the token axis.
pub fn concat_tokens(tape: &Tape, parts: &[&Var]) -> Result<Var> {
    let _ = (tape, parts);
    todo!()
}

/// x [batch, T, channels] -> tokens `start .. start + len`.
pub fn slice_tokens(tape: &Tape, x: &Var, start: usize, len: usize) -> Result<Var> {
    let _ = (tape, x, start, len);
    todo!()
}

/// x [.., n] -> channels `start .. start + len` of the last axis.
pub fn slice_channels(tape: &Tape, x: &Var, start: usize, len: usize) -> Result<Var> {
    let _ = (tape, x, start, len);
    todo!()
}
