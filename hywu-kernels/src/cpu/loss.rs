//! Training losses.

use crate::Tensor;

/// mean over the batch of weight`[b]` * mean((pred`[b]` - target`[b]`)^2).
pub fn weighted_mse(pred: &Tensor, target: &Tensor, weight: &[f32]) -> Tensor {
    let each = pred.numel() / weight.len();
    let entries = pred.data().chunks(each).zip(target.data().chunks(each)).zip(weight);
    let sum: f64 = entries
        .map(|((p, t), &w)| {
            let square: f64 = p.iter().zip(t).map(|(p, t)| f64::from(p - t) * f64::from(p - t)).sum();
            f64::from(w) * square
        })
        .sum();
    Tensor::scalar((sum / pred.numel() as f64) as f32)
}

/// Its gradient for `pred`, times the scalar `grad`.
pub fn weighted_mse_gradient(pred: &Tensor, target: &Tensor, weight: &[f32], grad: &Tensor) -> Tensor {
    let each = pred.numel() / weight.len();
    let g = 2.0 * grad.data()[0] / pred.numel() as f32;
    Tensor::build(pred.shape(), |out| {
        let entries = out.chunks_mut(each).zip(pred.data().chunks(each)).zip(target.data().chunks(each));
        for (((out, p), t), &w) in entries.zip(weight) {
            out.iter_mut().zip(p).zip(t).for_each(|((o, p), t)| *o = g * w * (p - t));
        }
    })
}

/// sum(weights * x).
pub fn weighted_sum(x: &Tensor, weights: &Tensor) -> Tensor {
    let sum: f64 = x.data().iter().zip(weights.data()).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
    Tensor::scalar(sum as f32)
}

/// Its gradient for x, times the scalar `grad`.
pub fn weighted_sum_gradient(weights: &Tensor, grad: &Tensor) -> Tensor {
    let g = grad.data()[0];
    Tensor::build(weights.shape(), |out| {
        out.iter_mut().zip(weights.data()).for_each(|(o, w)| *o = g * w);
    })
}
