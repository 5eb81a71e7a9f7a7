//! A filter per patch: the part of an edit that is the same function of colour and neighbourhood for every pixel of a patch.
//!
//! Each pixel of the source has fixed features: polynomials of its colour, its neighbourhood at three scales (the smooth levels of
//! an a trous wavelet transform with the B3 spline), the strength of edges, the patch's mean, and its place in the patch. A patch's
//! coefficients mix them to three channels. Blurring, sharpening or brightening is then a matter of a few coefficients.

use crate::{Error, Result, Tape, Tensor, Var, cpu::math::dot};
use rayon::prelude::*;

/// Features of a pixel: [1, rgb, rgb^2, rg gb br, three smooth levels of rgb, edge, patch mean of rgb, x * (1, rgb), y * (1, rgb)],
/// x and y in -1..1 over the patch.
pub const FEATURES: usize = 31;
/// Width of the hidden layer.
pub const HIDDEN: usize = 32;
/// Coefficients of a patch: see [`local_filter`].
pub const COEFFICIENTS: usize = 3 * FEATURES + 3 * HIDDEN + HIDDEN;
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
    let out = Tensor::build(&[batch, tokens, 3 * pixels], |out| {
        let work = out.par_chunks_mut(3 * pixels).zip(features.data().par_chunks(n));
        let patches = coef
            .value()
            .data()
            .par_chunks(COEFFICIENTS)
            .zip(hidden.value().data().par_chunks(pixels * HIDDEN));
        work.zip(patches).for_each(|((out, features), (coef, hidden))| {
            let Coefficients { linear, mix, shift } = Coefficients::of(coef);
            let inputs = features.chunks_exact(FEATURES).zip(hidden.chunks_exact(HIDDEN));
            for (out, (features, hidden)) in out.chunks_exact_mut(3).zip(inputs) {
                let mut active = [0.0; HIDDEN];
                (active.iter_mut().zip(hidden).zip(shift)).for_each(|((a, h), s)| *a = (h + s).max(0.0));
                let rows = linear.chunks_exact(FEATURES).zip(mix.chunks_exact(HIDDEN));
                for (out, (linear, mix)) in out.iter_mut().zip(rows) {
                    *out = dot(linear, features) + dot(mix, &active);
                }
            }
        });
    });
    let (coef_, hidden_, features) = (coef.clone(), hidden.clone(), features.clone());
    Ok(tape.push(out, &[coef, hidden], move |grad, grads| {
        let mut dhidden = Tensor::zeros(hidden_.shape());
        let dcoef = Tensor::build(coef_.shape(), |dcoef| {
            let out =
                dcoef.par_chunks_mut(COEFFICIENTS).zip(dhidden.data_mut().par_chunks_mut(pixels * HIDDEN));
            let given = coef_.value().data().par_chunks(COEFFICIENTS).zip(features.data().par_chunks(n));
            let patches = given.zip(hidden_.value().data().par_chunks(pixels * HIDDEN));
            out.zip(patches).zip(grad.data().par_chunks(3 * pixels)).for_each(
                |(((dcoef, dhidden), ((coef, features), hidden)), grad)| {
                    let Coefficients { mix, shift, .. } = Coefficients::of(coef);
                    dcoef.fill(0.0);
                    let (dlinear, rest) = dcoef.split_at_mut(3 * FEATURES);
                    let (dmix, dshift) = rest.split_at_mut(3 * HIDDEN);
                    let inputs = features.chunks_exact(FEATURES).zip(hidden.chunks_exact(HIDDEN));
                    let pixels = dhidden.chunks_exact_mut(HIDDEN).zip(inputs);
                    for (d, (dhidden, (features, hidden))) in grad.chunks_exact(3).zip(pixels) {
                        let mut active = [0.0; HIDDEN];
                        (active.iter_mut().zip(hidden).zip(shift))
                            .for_each(|((a, h), s)| *a = (h + s).max(0.0));
                        for (c, d) in d.iter().enumerate() {
                            add_scaled(&mut dlinear[c * FEATURES..][..FEATURES], *d, features);
                            add_scaled(&mut dmix[c * HIDDEN..][..HIDDEN], *d, &active);
                            add_scaled(dhidden, *d, &mix[c * HIDDEN..][..HIDDEN]);
                        }
                        for ((dhidden, active), dshift) in dhidden.iter_mut().zip(active).zip(&mut *dshift) {
                            *dhidden = if active > 0.0 { *dhidden } else { 0.0 };
                            *dshift += *dhidden;
                        }
                    }
                },
            );
        });
        grads.accumulate(&coef_, dcoef)?;
        grads.accumulate(&hidden_, dhidden)
    }))
}

/// The parts of a patch's coefficients.
struct Coefficients<'a> {
    linear: &'a [f32],
    mix: &'a [f32],
    shift: &'a [f32],
}

impl<'a> Coefficients<'a> {
    fn of(coef: &'a [f32]) -> Self {
        let (linear, rest) = coef.split_at(3 * FEATURES);
        let (mix, shift) = rest.split_at(3 * HIDDEN);
        Self { linear, mix, shift }
    }
}

/// y += k * x.
fn add_scaled(y: &mut [f32], k: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += k * x);
}
