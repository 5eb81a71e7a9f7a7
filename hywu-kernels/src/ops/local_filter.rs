//! A filter per patch: the part of an edit that is the same function of colour and neighbourhood for every pixel of a patch.
//!
//! Each pixel of the source has fixed features: polynomials of its colour, its neighbourhood at three scales (the smooth levels of
//! an a trous wavelet transform with the B3 spline), the strength of edges, the patch's mean, and its place in the patch. A patch's
//! coefficients mix them to three channels. Blurring, sharpening or brightening is then a matter of a few coefficients.

use crate::{Error, Result, Tape, Tensor, Var};
use rayon::prelude::*;

/// Features of a pixel: [1, rgb, rgb^2, rg gb br, three smooth levels of rgb, edge, patch mean of rgb, x * (1, rgb), y * (1, rgb)],
/// x and y in -1..1 over the patch.
pub const FEATURES: usize = 31;
/// Coefficients of a patch.
pub const COEFFICIENTS: usize = 3 * FEATURES;
/// The B3 spline.
const SPLINE: [f32; 5] = [1.0 / 16.0, 4.0 / 16.0, 6.0 / 16.0, 4.0 / 16.0, 1.0 / 16.0];
/// Weights of R, G, B in luma (ITU-R BT.601).
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

/// Index of the pixel that mirror padding shows at place `i` of an axis of `n` >= 1 pixels: 0 1 2 1 0 1 2 .. for n = 3.
pub fn reflect(i: usize, n: usize) -> usize {
    if n < 2 {
        return 0;
    }
    let period = 2 * (n - 1);
    let i = i % period;
    i.min(period - i)
}

/// The features of `source` [batch, height, width, 3]: [batch, height, width, FEATURES]; both sizes multiples of the patch's side
/// `p`. Borders are mirrored.
///
/// # Errors
/// Another shape, or sizes that p does not divide.
pub fn pixel_features(source: &Tensor, p: usize) -> Result<Tensor> {
    let &[batch, h, w, 3] = source.shape() else {
        return Err(Error::shape("pixel_features", "source", source.shape(), "[batch, height, width, 3]"));
    };
    if p == 0 || h * w == 0 || !h.is_multiple_of(p) || !w.is_multiple_of(p) {
        let expected = format!("sides that are multiples of {p}");
        return Err(Error::shape("pixel_features", "source", source.shape(), expected));
    }
    Ok(Tensor::build(&[batch, h, w, FEATURES], |out| {
        out.par_chunks_mut(h * w * FEATURES)
            .zip(source.data().par_chunks(h * w * 3))
            .for_each(|(out, rgb)| picture_features(out, rgb, [h, w], p));
    }))
}

fn picture_features(out: &mut [f32], rgb: &[f32], [h, w]: [usize; 2], p: usize) {
    let fine = smooth(rgb, h, w, 1);
    let middle = smooth(&fine, h, w, 2);
    let coarse = smooth(&middle, h, w, 4);
    let edge = edges(&fine, h, w);
    let mean = patch_means(rgb, h, w, p);
    let place = |i: usize| (2 * (i % p) + 1) as f32 / p as f32 - 1.0;
    for (i, f) in out.chunks_exact_mut(FEATURES).enumerate() {
        let (y, x) = (i / w, i % w);
        let c = &rgb[3 * i..3 * i + 3];
        f[0] = 1.0;
        f[1..4].copy_from_slice(c);
        f[4..7].copy_from_slice(&[c[0] * c[0], c[1] * c[1], c[2] * c[2]]);
        f[7..10].copy_from_slice(&[c[0] * c[1], c[1] * c[2], c[2] * c[0]]);
        for (f, level) in f[10..19].chunks_exact_mut(3).zip([&fine, &middle, &coarse]) {
            f.copy_from_slice(&level[3 * i..3 * i + 3]);
        }
        f[19] = edge[i];
        let patch = (y / p * (w / p) + x / p) * 3;
        f[20..23].copy_from_slice(&mean[patch..patch + 3]);
        for (f, place) in f[23..].chunks_exact_mut(4).zip([place(x), place(y)]) {
            f.copy_from_slice(&[place, place * c[0], place * c[1], place * c[2]]);
        }
    }
}

/// One level of the a trous transform: the spline along both axes with `hole` pixels from tap to tap.
fn smooth(rgb: &[f32], h: usize, w: usize, hole: usize) -> Vec<f32> {
    let at = |i: usize, tap: usize, n: usize| {
        let (ahead, back) = (i + tap * hole, 2 * hole);
        reflect(ahead.abs_diff(back), n)
    };
    let mut across = vec![0.0; rgb.len()];
    for (out, row) in across.chunks_exact_mut(w * 3).zip(rgb.chunks_exact(w * 3)) {
        for (x, out) in out.chunks_exact_mut(3).enumerate() {
            for (tap, k) in SPLINE.iter().enumerate() {
                let from = at(x, tap, w) * 3;
                (0..3).for_each(|c| out[c] += k * row[from + c]);
            }
        }
    }
    let mut down = vec![0.0; rgb.len()];
    for (y, out) in down.chunks_exact_mut(w * 3).enumerate() {
        for (tap, k) in SPLINE.iter().enumerate() {
            let row = at(y, tap, h) * w * 3;
            out.iter_mut().zip(&across[row..row + w * 3]).for_each(|(o, v)| *o += k * v);
        }
    }
    down
}

/// Gradient magnitude of the luma (Sobel / 4).
fn edges(rgb: &[f32], h: usize, w: usize) -> Vec<f32> {
    let luma: Vec<f32> =
        rgb.chunks_exact(3).map(|c| LUMA[0] * c[0] + LUMA[1] * c[1] + LUMA[2] * c[2]).collect();
    let around = |i: usize, n: usize| [reflect(i.abs_diff(1), n), i, reflect(i + 1, n)];
    let mut out = Vec::with_capacity(luma.len());
    for y in 0..h {
        let rows = around(y, h).map(|y| &luma[y * w..(y + 1) * w]);
        for x in 0..w {
            let [l, m, r] = around(x, w);
            let gx = rows[0][r] + 2.0 * rows[1][r] + rows[2][r] - rows[0][l] - 2.0 * rows[1][l] - rows[2][l];
            let gy = rows[2][l] + 2.0 * rows[2][m] + rows[2][r] - rows[0][l] - 2.0 * rows[0][m] - rows[0][r];
            out.push(0.25 * (gx * gx + gy * gy).sqrt());
        }
    }
    out
}

/// Mean colour of every patch.
fn patch_means(rgb: &[f32], h: usize, w: usize, p: usize) -> Vec<f32> {
    let mut sums = vec![0.0; h / p * (w / p) * 3];
    for (i, c) in rgb.chunks_exact(3).enumerate() {
        let patch = (i / w / p * (w / p) + i % w / p) * 3;
        (0..3).for_each(|k| sums[patch + k] += c[k]);
    }
    sums.iter_mut().for_each(|v| *v /= (p * p) as f32);
    sums
}

/// y[patch, pixel, c] = sum_k coef[patch, c, k] * features[patch, pixel, k].
///
/// `coef` [batch, tokens, 3 * FEATURES] (c-major), `features` [batch, tokens, pixels * FEATURES] (constant): those of
/// [`pixel_features`], patchified -> [batch, tokens, pixels * 3].
///
/// # Errors
/// Shapes that don't agree.
pub fn local_filter(tape: &Tape, coef: &Var, features: &Tensor) -> Result<Var> {
    const OP: &str = "local_filter";
    let &[batch, tokens, n] = features.shape() else {
        return Err(Error::shape(OP, "features", features.shape(), "[batch, tokens, pixels * features]"));
    };
    if n == 0 || !n.is_multiple_of(FEATURES) {
        let expected = format!("[batch, tokens, pixels * {FEATURES}]");
        return Err(Error::shape(OP, "features", features.shape(), expected));
    }
    if coef.shape() != [batch, tokens, COEFFICIENTS] {
        let expected = format!("[{batch}, {tokens}, {COEFFICIENTS}]");
        return Err(Error::shape(OP, "coef", coef.shape(), expected));
    }
    let pixels = n / FEATURES;
    let out = Tensor::build(&[batch, tokens, 3 * pixels], |out| {
        let work = out.par_chunks_mut(3 * pixels).zip(features.data().par_chunks(n));
        work.zip(coef.value().data().par_chunks(COEFFICIENTS)).for_each(|((out, features), coef)| {
            for (o, f) in out.chunks_exact_mut(3).zip(features.chunks_exact(FEATURES)) {
                for (o, row) in o.iter_mut().zip(coef.chunks_exact(FEATURES)) {
                    *o = row.iter().zip(f).map(|(c, f)| c * f).sum();
                }
            }
        });
    });
    let (coef_, features) = (coef.clone(), features.clone());
    Ok(tape.push(out, &[coef], move |grad, grads| {
        let dcoef = Tensor::build(coef_.shape(), |out| {
            let work = out.par_chunks_mut(COEFFICIENTS).zip(features.data().par_chunks(n));
            work.zip(grad.data().par_chunks(3 * pixels)).for_each(|((out, features), grad)| {
                out.fill(0.0);
                for (d, f) in grad.chunks_exact(3).zip(features.chunks_exact(FEATURES)) {
                    for (row, d) in out.chunks_exact_mut(FEATURES).zip(d) {
                        row.iter_mut().zip(f).for_each(|(o, f)| *o += d * f);
                    }
                }
            });
        });
        grads.accumulate(&coef_, dcoef)
    }))
}
