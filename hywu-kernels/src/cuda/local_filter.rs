//! Launchers of `kernels-cu/local_filter`; see `cpu/local_filter.rs` for what each computes.

use super::{Call, blocks};
use crate::{
    Result, Tensor,
    ops::local_filter::{FEATURES, HIDDEN},
};
use hywu_core::Dtype;

const OP: &str = "local_filter";
/// Threads of `pixel_features`, one a pixel.
const FEATURE_PIXELS: u32 = 128;
/// Threads of the filter, two for each of 64 pixels.
const FILTER_THREADS: u32 = 128;
/// Threads of a warp.
const WARP: usize = 32;

pub fn pixel_features(source: &Tensor, p: usize) -> Result<Tensor> {
    let &[batch, h, w, _] = source.shape() else { return Ok(source.clone()) };
    let smooth = |x: &Tensor, hole: usize| -> Result<Tensor> {
        let out = x.empty_as(x.shape(), Dtype::F32)?;
        let call = Call::new(OP, "smooth", x)?.tensor(x)?.tensor_as(&out, Dtype::F32)?;
        call.size(h)?.size(w)?.size(hole)?.over_rows(batch * h, 3 * w, 1)?;
        Ok(out)
    };
    let fine = smooth(source, 1)?;
    let middle = smooth(&fine, 2)?;
    let coarse = smooth(&middle, 4)?;
    let means = source.empty_as(&[batch, h / p, w / p, 3], Dtype::F32)?;
    let call = Call::new(OP, "patch_means", source)?.tensor(source)?.tensor_as(&means, Dtype::F32)?;
    call.size(w / p)?.size(p)?.over_rows(means.numel() / 3, WARP, 1)?;
    let out = source.empty_like(&[batch, h, w, FEATURES])?;
    let mut call = Call::new(OP, "pixel_features", source)?.tensor(source)?;
    for part in [&fine, &middle, &coarse, &means] {
        call = call.tensor_as(part, Dtype::F32)?;
    }
    let pixels = batch * h * w;
    // `smooth` has counted three times as many elements.
    let call = call.tensor(&out)?.size(h)?.size(w)?.size(p)?.long(pixels);
    call.launch([blocks(pixels, FEATURE_PIXELS as usize)?, 1, 1], FEATURE_PIXELS, 0)?;
    Ok(out)
}

pub fn local_filter(coef: &Tensor, features: &Tensor, hidden: &Tensor) -> Result<Tensor> {
    let (batch, tokens, pixels) = sizes(hidden);
    let out = coef.empty_like(&[batch, tokens, 3 * pixels])?;
    let call = Call::new(OP, "local_filter", coef)?.tensor(coef)?.tensor(features)?.tensor(hidden)?;
    let call = call.tensor(&out)?.size(pixels)?;
    call.launch([blocks(batch * tokens, 1)?, 1, 1], FILTER_THREADS, 0)?;
    Ok(out)
}

pub fn local_filter_gradients(
    coef: &Tensor,
    features: &Tensor,
    hidden: &Tensor,
    grad: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (batch, tokens, pixels) = sizes(hidden);
    let (dcoef, dhidden) = (coef.empty_like(coef.shape())?, hidden.empty_like(hidden.shape())?);
    let call = Call::new(OP, "local_filter_gradients", coef)?.tensor(coef)?.tensor(features)?;
    let call = call.tensor(hidden)?.tensor(grad)?.tensor(&dcoef)?.tensor(&dhidden)?.size(pixels)?;
    call.launch([blocks(batch * tokens, 1)?, 1, 1], super::call::BLOCK, 0)?;
    Ok((dcoef, dhidden))
}

/// Batch, tokens and pixels of [batch, tokens, pixels * HIDDEN].
fn sizes(hidden: &Tensor) -> (usize, usize, usize) {
    (hidden.shape()[0], hidden.shape()[1], hidden.shape()[2] / HIDDEN)
}
