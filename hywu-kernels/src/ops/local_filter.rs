//! A filter per patch: the part of an edit that is the same function of colour and neighbourhood for every pixel of a patch.
//!
//! Each pixel of the source has fixed features: polynomials of its colour, its neighbourhood at three scales (the smooth levels of
//! an a trous wavelet transform with the B3 spline), the strength of edges, the patch's mean, and its place in the patch. A patch's
//! coefficients mix them to three channels. Blurring, sharpening or brightening is then a matter of a few coefficients.

use super::together;
use crate::{Error, Result, Tape, Tensor, Var};

/// Features of a pixel: [1, rgb, rgb^2, rg gb br, three smooth levels of rgb, edge, patch mean of rgb, x * (1, rgb), y * (1, rgb)],
/// x and y in -1..1 over the patch.
pub const FEATURES: usize = 31;
/// Width of the hidden layer.
pub const HIDDEN: usize = 32;
/// Coefficients of a patch: see [`local_filter`].
pub const COEFFICIENTS: usize = 3 * FEATURES + 3 * HIDDEN + HIDDEN;
/// Index of the pixel that mirror padding shows at place `i` of an axis of `n` >= 1 pixels: 0 1 2 1 0 1 2 .. for n = 3.
pub fn reflect(i: usize, n: usize) -> usize {
    if n < 2 {
        return 0;
    }
    let period = 2 * (n - 1);
    let i = i % period;
    i.min(period - i)
}

/// The features of `source` [batch, height, width, 3]: [batch, height, width, FEATURES], in the dtype of `source`; both sizes
/// multiples of the patch's side `p`. Borders are mirrored.
///
/// # Errors
/// Another shape, or sizes that p does not divide.
pub fn pixel_features(source: &Tensor, p: usize) -> Result<Tensor> {
    let &[_, h, w, 3] = source.shape() else {
        return Err(Error::shape("pixel_features", "source", source.shape(), "[batch, height, width, 3]"));
    };
    if p == 0 || h * w == 0 || !h.is_multiple_of(p) || !w.is_multiple_of(p) {
        let expected = format!("sides that are multiples of {p}");
        return Err(Error::shape("pixel_features", "source", source.shape(), expected));
    }
    Ok(on_device!(source, local_filter::pixel_features(source, p)))
}

/// y[patch, pixel, c] = sum_k linear[patch, c, k] * features[patch, pixel, k]
///                    + sum_j mix[patch, c, j] * relu(hidden[patch, pixel, j] + shift[patch, j]).
///
/// `coef` [batch, tokens, [`COEFFICIENTS`]]: of each patch linear [3, [`FEATURES`]], mix [3, [`HIDDEN`]] and shift [[`HIDDEN`]].
/// `features` [batch, tokens, pixels * FEATURES] (constant): those of [`pixel_features`], patchified. `hidden` [batch, tokens,
/// pixels * HIDDEN]: a projection of them that all patches share. -> [batch, tokens, pixels * 3].
///
/// # Errors
/// Shapes that don't agree.
pub fn local_filter(tape: &Tape, coef: &Var, features: &Tensor, hidden: &Var) -> Result<Var> {
    const OP: &str = "local_filter";
    let &[batch, tokens, n] = features.shape() else {
        return Err(Error::shape(OP, "features", features.shape(), "[batch, tokens, pixels * features]"));
    };
    if n == 0 || !n.is_multiple_of(FEATURES) {
        let expected = format!("[batch, tokens, pixels * {FEATURES}]");
        return Err(Error::shape(OP, "features", features.shape(), expected));
    }
    let pixels = n / FEATURES;
    for (what, var, each) in [("coef", coef, COEFFICIENTS), ("hidden", hidden, pixels * HIDDEN)] {
        if var.shape() != [batch, tokens, each] {
            let expected = format!("[{batch}, {tokens}, {each}]");
            return Err(Error::shape(OP, what, var.shape(), expected));
        }
    }
    together(OP, &[coef.value(), features, hidden.value()])?;
    let out = on_device!(features, local_filter::local_filter(coef.value(), features, hidden.value()));
    let (coef_, hidden_, features) = (coef.clone(), hidden.clone(), features.clone());
    Ok(tape.push(out, &[coef, hidden], move |grad, grads| {
        let (coef, hidden) = (coef_.value(), hidden_.value());
        let (dcoef, dhidden) =
            on_device!(grad, local_filter::local_filter_gradients(coef, &features, hidden, grad));
        grads.accumulate(&coef_, dcoef)?;
        grads.accumulate(&hidden_, dhidden)
    }))
}
