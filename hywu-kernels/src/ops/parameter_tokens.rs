//! The generator's parameter tokens: initial grid and detokenisation (FORMAT.md sections 3 and 4).

use crate::{LoraVars, Result, Tape, Var};
use hywu_core::AdapterSpec;

/// x0[n, s, j*c + i] = hw_pos[s*a + j, i] + layer_pos[n, i]: `hw_pos` [S * a, c], `layer_pos` [N, c] -> [1, N, S, a * c].
pub fn token_grid(tape: &Tape, hw_pos: &Var, layer_pos: &Var, a: usize) -> Result<Var> {
    let _ = (tape, hw_pos, layer_pos, a);
    todo!()
}

/// Repeats [1, ..] `batch` times along the first axis.
pub fn repeat_batch(tape: &Tape, x: &Var, batch: usize) -> Result<Var> {
    let _ = (tape, x, batch);
    todo!()
}

/// Splits the token axis: `rows` [b, N, T, r, c] -> the first `count` tokens [b, N, count, r, c] and the rest.
pub fn split_tokens(tape: &Tape, rows: &Var, count: usize) -> Result<(Var, Var)> {
    let _ = (tape, rows, count);
    todo!()
}

/// Cuts generated tokens into parameters: `tokens_a` [b, N, A, r, t], `tokens_b` [b, N, Bt, r, t] -> one pair per module and layer,
/// lora_a [b, (E,) r, in], lora_b [b, (E,) out, r], under their published names.
pub fn detokenise(tape: &Tape, spec: &AdapterSpec, tokens_a: &Var, tokens_b: &Var) -> Result<LoraVars> {
    let _ = (tape, spec, tokens_a, tokens_b);
    todo!()
}
