//! Training losses.

use super::together;
use crate::{Error, Result, Tape, Tensor, Var};

/// mean over the batch of weight`[b]` * mean((pred`[b]` - target`[b]`)^2), a scalar: f32 whatever the dtype of `pred`.
///
/// # Errors
/// Shapes that differ, or another number of weights than batch entries.
pub fn weighted_mse(tape: &Tape, pred: &Var, target: &Tensor, weight: &[f32]) -> Result<Var> {
    const OP: &str = "weighted_mse";
    if pred.shape() != target.shape() {
        return Err(Error::shape(OP, "target", target.shape(), format!("{:?}", pred.shape())));
    }
    let batch = pred.shape().first().copied().unwrap_or(1);
    if weight.len() != batch || pred.value().numel() == 0 {
        return Err(Error::shape(OP, "weight", &[weight.len()], format!("[{batch}], one per batch entry")));
    }
    together(OP, &[pred.value(), target])?;
    let loss = on_device!(target, loss::weighted_mse(pred.value(), target, weight));
    let (x, target, weight) = (pred.clone(), target.clone(), weight.to_vec());
    Ok(tape.push(loss, &[pred], move |grad, grads| {
        let dx = on_device!(target, loss::weighted_mse_gradient(x.value(), &target, &weight, grad));
        grads.accumulate(&x, dx)
    }))
}

/// sum(weights * x), a scalar as in [`weighted_mse`]: the gradient of `x` is `weights`.
///
/// # Errors
/// Shapes that differ.
pub fn weighted_sum(tape: &Tape, x: &Var, weights: &Tensor) -> Result<Var> {
    const OP: &str = "weighted_sum";
    if x.shape() != weights.shape() {
        return Err(Error::shape(OP, "weights", weights.shape(), format!("{:?}", x.shape())));
    }
    together(OP, &[x.value(), weights])?;
    let sum = on_device!(weights, loss::weighted_sum(x.value(), weights));
    let (weights, x_) = (weights.clone(), x.clone());
    Ok(tape.push(sum, &[x], move |grad, grads| {
        grads.accumulate(&x_, on_device!(weights, loss::weighted_sum_gradient(&weights, grad)))
    }))
}
