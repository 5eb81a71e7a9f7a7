//! RMSNorm, a parallel task per batch entry.

use super::math::dot;
use crate::{Tensor, ops::rms_norm::Sums};
use rayon::prelude::*;

/// 1 / sqrt(mean(x^2) + eps), summed in eight lanes so that it vectorises.
fn inverse(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// A row's norm.
pub(super) fn normalise(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let r = inverse(x, eps);
    out.iter_mut().zip(x).zip(w).for_each(|((o, x), w)| *o = x * r * w);
}

/// Row b of a [batch, c] tensor.
fn row(t: &Tensor, b: usize, c: usize) -> &[f32] {
    &t.data()[b * c..(b + 1) * c]
}

/// The normalised x times the weight, then scale and shift.
pub fn forward(x: &Tensor, w: Option<&Tensor>, modulation: Option<(&Tensor, &Tensor)>, eps: f32) -> Tensor {
    let (each, c) = (x.numel() / x.shape().first().unwrap_or(&1), x.dim_back(1));
    let ones = vec![1.0; c];
    let w = w.map_or(&ones[..], Tensor::data);
    Tensor::build(x.shape(), |out| {
        out.par_chunks_mut(each).zip(x.data().par_chunks(each)).enumerate().for_each(|(b, (out, x))| {
            for (out, x) in out.chunks_mut(c).zip(x.chunks(c)) {
                normalise(x, w, eps, out);
                if let Some((scale, shift)) = modulation {
                    let factors = row(scale, b, c).iter().zip(row(shift, b, c));
                    out.iter_mut().zip(factors).for_each(|(o, (s, h))| *o = *o * (1.0 + s) + h);
                }
            }
        });
    })
}

/// Gradients of x and, where `sums` says that they are wanted, of the weight, of scale and of shift.
pub fn backward(
    x: &Tensor,
    w: Option<&Tensor>,
    scale: Option<&Tensor>,
    grad: &Tensor,
    eps: f32,
    sums: bool,
) -> (Tensor, Option<Sums>) {
    let (batch, c) = (*x.shape().first().unwrap_or(&1), x.dim_back(1));
    let each = x.numel() / batch;
    let ones = vec![1.0; c];
    let weight = w.map_or(&ones[..], Tensor::data);
    // The weight's gradient per batch entry at first.
    let [mut dx, mut dw, mut dscale, mut dshift] =
        [x.shape(), &[batch, c], &[batch, c], &[batch, c]].map(|s| Tensor::build(s, |out| out.fill(0.0)));
    let totals = (dw.data_mut().par_chunks_mut(c))
        .zip(dscale.data_mut().par_chunks_mut(c))
        .zip(dshift.data_mut().par_chunks_mut(c));
    let rows =
        (dx.data_mut().par_chunks_mut(each)).zip(x.data().par_chunks(each)).zip(grad.data().par_chunks(each));
    rows.zip(totals).enumerate().for_each(|(b, (((dx, x), grad), ((dw, dscale), dshift)))| {
        let gain: Vec<f32> = match scale {
            Some(scale) => row(scale, b, c).iter().map(|s| 1.0 + s).collect(),
            None => ones.clone(),
        };
        for ((dx, x), grad) in dx.chunks_mut(c).zip(x.chunks(c)).zip(grad.chunks(c)) {
            let r = inverse(x, eps);
            if sums {
                for i in 0..c {
                    let n = x[i] * r;
                    dshift[i] += grad[i];
                    dscale[i] += grad[i] * n * weight[i];
                    dw[i] += grad[i] * n * gain[i];
                    dx[i] = grad[i] * gain[i] * weight[i];
                }
            } else {
                let factors = gain.iter().zip(weight);
                dx.iter_mut().zip(grad).zip(factors).for_each(|((d, g), (gain, w))| *d = g * gain * w);
            }
            let mean = dot(dx, x) * r * r / c as f32;
            dx.iter_mut().zip(x).for_each(|(d, x)| *d = r * (*d - x * mean));
        }
    });
    let sums = sums.then(|| Sums {
        weight: w.map(|_| super::elementwise::column_sums(&dw, c)),
        modulation: scale.map(|_| [dscale, dshift]),
    });
    (dx, sums)
}
