//! CPU code of the op `local_filter`.

use super::math::dot;
use crate::{
    Tensor,
    ops::local_filter::{COEFFICIENTS, FEATURES, HIDDEN, reflect},
};
use rayon::prelude::*;

/// The B3 spline.
const SPLINE: [f32; 5] = [1.0 / 16.0, 4.0 / 16.0, 6.0 / 16.0, 4.0 / 16.0, 1.0 / 16.0];
/// Weights of R, G, B in luma (ITU-R BT.601).
const LUMA: [f32; 3] = [0.299, 0.587, 0.114];

/// The features of `source` [batch, height, width, 3], patches of p x p pixels.
pub fn pixel_features(source: &Tensor, p: usize) -> Tensor {
    let &[batch, h, w, _] = source.shape() else { return source.clone() };
    Tensor::build(&[batch, h, w, FEATURES], |out| {
        out.par_chunks_mut(h * w * FEATURES)
            .zip(source.data().par_chunks(h * w * 3))
            .for_each(|(out, rgb)| picture_features(out, rgb, [h, w], p));
    })
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

/// The filter's output [batch, tokens, pixels * 3].
pub fn local_filter(coef: &Tensor, features: &Tensor, hidden: &Tensor) -> Tensor {
    let &[batch, tokens, n] = features.shape() else { return features.clone() };
    let pixels = n / FEATURES;
    Tensor::build(&[batch, tokens, 3 * pixels], |out| {
        let work = out.par_chunks_mut(3 * pixels).zip(features.data().par_chunks(n));
        let patches = coef.data().par_chunks(COEFFICIENTS).zip(hidden.data().par_chunks(pixels * HIDDEN));
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
    })
}

/// Gradients of coef and hidden.
pub fn local_filter_gradients(
    coef: &Tensor,
    features: &Tensor,
    hidden: &Tensor,
    grad: &Tensor,
) -> (Tensor, Tensor) {
    let n = features.dim_back(1);
    let pixels = n / FEATURES;
    let mut dhidden = Tensor::zeros(hidden.shape());
    let dcoef = Tensor::build(coef.shape(), |dcoef| {
        let out = dcoef.par_chunks_mut(COEFFICIENTS).zip(dhidden.data_mut().par_chunks_mut(pixels * HIDDEN));
        let given = coef.data().par_chunks(COEFFICIENTS).zip(features.data().par_chunks(n));
        let patches = given.zip(hidden.data().par_chunks(pixels * HIDDEN));
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
                    (active.iter_mut().zip(hidden).zip(shift)).for_each(|((a, h), s)| *a = (h + s).max(0.0));
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
    (dcoef, dhidden)
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
