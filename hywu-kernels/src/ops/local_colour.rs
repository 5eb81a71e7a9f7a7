//! A colour transform per patch: the part of an edit that is the same function of the colour for every pixel of a patch.

use crate::{Error, Result, Tape, Tensor, Var};
use rayon::prelude::*;

/// Features of a pixel (r, g, b): [1, r, g, b, r^2, g^2, b^2].
pub const FEATURES: usize = 7;
/// Coefficients of a patch.
const COEFFICIENTS: usize = 3 * FEATURES;

fn features(p: &[f32]) -> [f32; FEATURES] {
    [1.0, p[0], p[1], p[2], p[0] * p[0], p[1] * p[1], p[2] * p[2]]
}

/// y[patch, pixel, c] = sum_k coef[patch, c, k] * feature_k(source[patch, pixel]).
///
/// `coef` [batch, tokens, 3 * FEATURES] (c-major), `source` [batch, tokens, pixels * 3] (a constant) -> like `source`.
///
/// # Errors
/// Shapes that don't agree, a source that requires a gradient.
pub fn local_colour(tape: &Tape, coef: &Var, source: &Var) -> Result<Var> {
    const OP: &str = "local_colour";
    let n = source.value().dim_back(1);
    let patches = source.value().numel().checked_div(n).unwrap_or(0);
    if n == 0 || !n.is_multiple_of(3) {
        return Err(Error::shape(OP, "source", source.shape(), "[batch, tokens, pixels * 3]"));
    }
    if coef.value().dim_back(1) != COEFFICIENTS || coef.value().numel() != patches * COEFFICIENTS {
        return Err(Error::shape(
            OP,
            "coef",
            coef.shape(),
            format!("[batch, tokens, {COEFFICIENTS}] for {patches} patches"),
        ));
    }
    if source.requires_grad() {
        return Err(Error::invalid(OP, "the source is a constant; no gradient flows to it"));
    }
    let out = Tensor::build(source.shape(), |out| {
        let work = out.par_chunks_mut(n).zip(source.value().data().par_chunks(n));
        work.zip(coef.value().data().par_chunks(COEFFICIENTS)).for_each(|((out, source), coef)| {
            for (o, pixel) in out.chunks_mut(3).zip(source.chunks(3)) {
                let f = features(pixel);
                for (o, row) in o.iter_mut().zip(coef.chunks(FEATURES)) {
                    *o = row.iter().zip(&f).map(|(c, f)| c * f).sum();
                }
            }
        });
    });
    let (coef_, source_) = (coef.clone(), source.clone());
    Ok(tape.push(out, &[coef], move |grad, grads| {
        let dcoef = Tensor::build(coef_.shape(), |out| {
            let work = out.par_chunks_mut(COEFFICIENTS).zip(source_.value().data().par_chunks(n));
            work.zip(grad.data().par_chunks(n)).for_each(|((out, source), grad)| {
                out.fill(0.0);
                for (d, pixel) in grad.chunks(3).zip(source.chunks(3)) {
                    let f = features(pixel);
                    for (row, d) in out.chunks_mut(FEATURES).zip(d) {
                        row.iter_mut().zip(&f).for_each(|(o, f)| *o += d * f);
                    }
                }
            });
        });
        grads.accumulate(&coef_, dcoef)
    }))
}
