//! Y`[b]` = X`[b]` W^T + bias + scale * (X`[b]` A`[b]`^T) B`[b]`^T (LoRA, arXiv 2106.09685), an adapter per batch entry.
//!
//! On a CUDA device a row's result depends on that row and its adapter alone, bit for bit: not on the rest of the batch, nor on the number
//! of its rows. Gradients of bf16 tensors may come from cuBLASLt where it is installed; `HYWU_CUDA_BLAS=0` does without it, so that they
//! are the same bits on every machine of one kind, `HYWU_CUDA_BLAS=1` uses it in forward passes too, whose rows then may depend on their
//! number.

mod merge;

pub use merge::{Apply, Load, Prepared, merge, mergeable, merging_gain, merging_pays};

use super::together;
use crate::{Error, LoraVar, Result, Tape, Var, ops::elementwise::column_sums};

const OP: &str = "low_rank_linear";

/// Checks the arguments; the shape of the output.
fn validate(x: &Var, weight: &Var, bias: Option<&Var>, lora: Option<&LoraVar>) -> Result<Vec<usize>> {
    let [outer, inner] = *weight.shape() else {
        return Err(Error::shape(OP, "weight", weight.shape(), "[out, in]"));
    };
    let batch = x.shape().first().copied().unwrap_or(0);
    if x.shape().len() < 2 || x.value().dim_back(1) != inner || x.value().numel() == 0 || outer == 0 {
        return Err(Error::shape(OP, "x", x.shape(), format!("[batch, .., {inner}], not empty")));
    }
    if let Some(b) = bias
        && b.shape() != [outer]
    {
        return Err(Error::shape(OP, "bias", b.shape(), format!("[{outer}]")));
    }
    if let Some(lora) = lora {
        let (adapters, rank) = match *lora.a.shape() {
            [n, r, i] if i == inner && n > 0 && r > 0 && batch % n == 0 => (n, r),
            ref other => {
                let expected = format!("[a divisor of {batch}, rank >= 1, {inner}]");
                return Err(Error::shape(OP, "lora_a", other, expected));
            }
        };
        if lora.b.shape() != [adapters, outer, rank] {
            let expected = format!("[{adapters}, {outer}, {rank}]");
            return Err(Error::shape(OP, "lora_b", lora.b.shape(), expected));
        }
        if !lora.scale.is_finite() {
            return Err(Error::invalid(OP, format!("scale {} is not finite", lora.scale)));
        }
    }
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = outer;
    Ok(shape)
}

/// Linear layer with an optional low-rank update per batch entry.
///
/// `x` [batch, .., in], `weight` [out, in], `bias` `[out]`, `lora.a` [lora batch, r, in], `lora.b` [lora batch, out, r]
/// -> [batch, .., out]. The lora batch divides the batch: each pair serves batch / lora batch consecutive entries.
///
/// # Errors
/// Shapes that don't agree, an empty operand, a scale that is not finite.
pub fn low_rank_linear(
    tape: &Tape,
    x: &Var,
    weight: &Var,
    bias: Option<&Var>,
    lora: Option<&LoraVar>,
) -> Result<Var> {
    let shape = validate(x, weight, bias, lora)?;
    let inputs: Vec<&Var> =
        [x, weight].into_iter().chain(bias).chain(lora.iter().flat_map(|l| [&l.a, &l.b])).collect();
    together(OP, &inputs.iter().map(|v| v.value()).collect::<Vec<_>>())?;
    // scale * S = scale * X A^T, kept for the backward pass.
    let shrunk = match lora {
        Some(l) => Some(on_device!(x.value(), low_rank_linear::shrink(x.value(), l.a.value(), l.scale))),
        None => None,
    };
    let term = shrunk.as_ref().zip(lora).map(|(s, l)| (s, l.b.value()));
    let out = on_device!(
        x.value(),
        low_rank_linear::expand(x.value(), weight.value(), bias.map(Var::value), term, &shape)
    );
    let (x_, w_, b_, l_) = (x.clone(), weight.clone(), bias.cloned(), lora.cloned());
    Ok(tape.push(out, &inputs, move |grad, grads| {
        let (x, w) = (x_.value(), w_.value());
        if let Some(b) = b_.as_ref().filter(|b| b.requires_grad()) {
            grads.accumulate(b, column_sums(grad, b.value().numel())?)?;
        }
        if grads.wants(&w_) {
            grads.accumulate(&w_, on_device!(grad, low_rank_linear::row_products(grad, x, w_.shape())))?;
        }
        let mut term = None;
        if let (Some(lora), Some(shrunk)) = (&l_, &shrunk) {
            let (a, b) = (lora.a.value(), lora.b.value());
            if grads.wants(&lora.b) {
                // dB = dY^T (scale S)
                let db = on_device!(grad, low_rank_linear::row_products(grad, shrunk, b.shape()));
                grads.accumulate(&lora.b, db)?;
            }
            if grads.wants(&x_) || grads.wants(&lora.a) {
                // dS = scale dY B
                let ds = on_device!(grad, low_rank_linear::shrink_gradient(grad, b, lora.scale));
                if grads.wants(&lora.a) {
                    let da = on_device!(grad, low_rank_linear::row_products(&ds, x, a.shape()));
                    grads.accumulate(&lora.a, da)?;
                }
                term = Some((ds, a));
            }
        }
        if grads.wants(&x_) {
            let term = term.as_ref().map(|(ds, a)| (ds, *a));
            let dx = on_device!(grad, low_rank_linear::expand_gradient(grad, w, term, x_.shape()));
            grads.accumulate(&x_, dx)?;
        }
        Ok(())
    }))
}

/// [`low_rank_linear`] without an update.
///
/// # Errors
/// As [`low_rank_linear`].
pub fn linear(tape: &Tape, x: &Var, weight: &Var, bias: Option<&Var>) -> Result<Var> {
    low_rank_linear(tape, x, weight, bias, None)
}
