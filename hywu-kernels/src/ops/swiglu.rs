//! SwiGLU and SiLU activations.

use crate::{Result, Tape, Var};

/// x = [up | gate] over the last axis [.., 2h] -> up * silu(gate) [.., h].
pub fn swiglu(tape: &Tape, x: &Var) -> Result<Var> {
    let _ = (tape, x);
    todo!()
}

/// x * sigmoid(x).
pub fn silu(tape: &Tape, x: &Var) -> Result<Var> {
    let _ = (tape, x);
    todo!()
}
