//! Training losses.

use crate::{Error, Result, Tape, Tensor, Var};

/// mean over the batch of weight`[b]` * mean((pred`[b]` - target`[b]`)^2), a scalar.
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
    let each = pred.value().numel() / batch;
    let sums =
        (pred.value().data().chunks(each)).zip(target.data().chunks(each)).zip(weight).map(|((p, t), &w)| {
            let square: f64 = p.iter().zip(t).map(|(p, t)| f64::from(p - t) * f64::from(p - t)).sum();
            f64::from(w) * square
        });
    let count = pred.value().numel() as f64;
    let loss = (sums.sum::<f64>() / count) as f32;
    let (p, t, w, x) = (pred.value().clone(), target.clone(), weight.to_vec(), pred.clone());
    Ok(tape.push(Tensor::scalar(loss), &[pred], move |grad, grads| {
        let g = 2.0 * grad.item()? / count as f32;
        let dx = Tensor::build(p.shape(), |out| {
            let rows = out.chunks_mut(each).zip(p.data().chunks(each)).zip(t.data().chunks(each)).zip(&w);
            for (((out, p), t), &w) in rows {
                out.iter_mut().zip(p).zip(t).for_each(|((o, p), t)| *o = g * w * (p - t));
            }
        });
        grads.accumulate(&x, dx)
    }))
}

/// sum(weights * x), a scalar: the gradient of `x` is `weights`.
///
/// # Errors
/// Shapes that differ.
pub fn weighted_sum(tape: &Tape, x: &Var, weights: &Tensor) -> Result<Var> {
    if x.shape() != weights.shape() {
        return Err(Error::shape("weighted_sum", "weights", weights.shape(), format!("{:?}", x.shape())));
    }
    let sum: f64 =
        x.value().data().iter().zip(weights.data()).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
    let (weights, x_) = (weights.clone(), x.clone());
    Ok(tape.push(Tensor::scalar(sum as f32), &[x], move |grad, grads| {
        let g = grad.item()?;
        let dx = Tensor::build(weights.shape(), |out| {
            out.iter_mut().zip(weights.data()).for_each(|(o, w)| *o = g * w);
        });
        grads.accumulate(&x_, dx)
    }))
}
