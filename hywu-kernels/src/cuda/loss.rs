//! Launchers of `kernels-cu/loss`; see `cpu/loss.rs` for what each computes. A loss is a float on the device whatever the operands.

use super::{Call, blocks, pack};
use crate::{Result, Tensor};
use hywu_core::Dtype;

const OP: &str = "loss";
/// Packs that a block adds up: 256 threads, 4 each.
const BLOCK_PACKS: usize = 256 * 4;

/// Finishes what `fill` starts: a partial sum from every block.
fn sum(x: &Tensor, factor: f64, fill: impl FnOnce(&Tensor, [u32; 3]) -> Result<()>) -> Result<Tensor> {
    let parts = blocks(x.numel(), BLOCK_PACKS * pack(x.dtype()))?;
    let partial = x.empty_as(&[parts as usize], Dtype::F32)?;
    fill(&partial, [parts, 1, 1])?;
    let out = x.empty_as(&[], Dtype::F32)?;
    let call =
        Call::named(OP, "finish_loss", x)?.tensor_as(&partial, Dtype::F32)?.tensor_as(&out, Dtype::F32)?;
    call.size(parts as usize)?.float(factor as f32).launch([1, 1, 1], 256, 0)?;
    Ok(out)
}

pub fn weighted_mse(pred: &Tensor, target: &Tensor, weight: &[f32]) -> Result<Tensor> {
    let each = pred.numel() / weight.len();
    let weight = Tensor::new(&[weight.len()], weight.to_vec())?.to(pred.device(), Dtype::F32)?;
    sum(pred, 1.0 / pred.numel() as f64, |partial, grid| {
        let call = Call::new(OP, "squares", pred)?.tensor(pred)?.tensor(target)?;
        let call = call.tensor_as(&weight, Dtype::F32)?.tensor_as(partial, Dtype::F32)?;
        call.long(pred.numel()).long(each).launch(grid, 256, 0)
    })
}

pub fn weighted_mse_gradient(
    pred: &Tensor,
    target: &Tensor,
    weight: &[f32],
    grad: &Tensor,
) -> Result<Tensor> {
    let (n, each) = (pred.numel(), pred.numel() / weight.len());
    let weight = Tensor::new(&[weight.len()], weight.to_vec())?.to(pred.device(), Dtype::F32)?;
    let out = pred.empty_like(pred.shape())?;
    let call = Call::new(OP, "squares_gradient", pred)?.tensor(pred)?.tensor(target)?;
    let call = call.tensor_as(&weight, Dtype::F32)?.tensor_as(grad, Dtype::F32)?.tensor(&out)?;
    call.long(n).long(each).float(2.0 / n as f32).over(n, pack(pred.dtype()))?;
    Ok(out)
}

pub fn weighted_sum(x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    sum(x, 1.0, |partial, grid| {
        let call =
            Call::new(OP, "products", x)?.tensor(x)?.tensor(weights)?.tensor_as(partial, Dtype::F32)?;
        call.long(x.numel()).launch(grid, 256, 0)
    })
}

pub fn weighted_sum_gradient(weights: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let out = weights.empty_like(weights.shape())?;
    let call = Call::new(OP, "products_gradient", weights)?.tensor(weights)?.tensor_as(grad, Dtype::F32)?;
    call.tensor(&out)?.long(out.numel()).over(out.numel(), pack(out.dtype()))?;
    Ok(out)
}
