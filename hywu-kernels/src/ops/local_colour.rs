//! A colour transform per patch: the part of an edit that is the same function of the colour for every pixel of a patch.

use crate::{Result, Tape, Var};

/// Features of a pixel (r, g, b): [1, r, g, b, r^2, g^2, b^2].
pub const FEATURES: usize = 7;

/// y[patch, pixel, c] = sum_k coef[patch, c, k] * feature_k(source[patch, pixel]).
///
/// `coef` [batch, tokens, 3 * FEATURES] (c-major), `source` [batch, tokens, pixels * 3] (a constant) -> like `source`.
pub fn local_colour(tape: &Tape, coef: &Var, source: &Var) -> Result<Var> {
    let _ = (tape, coef, source);
    todo!()
}
