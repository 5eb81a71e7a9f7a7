//! Launchers of `kernels-cu/swiglu`; see `cpu/swiglu.rs` for what each computes.

use super::{Call, low_rank_linear::Beside, pack};
use crate::{Result, Tensor, ops::low_rank_linear::Shrink};

const OP: &str = "swiglu";

/// For the result of a row [up | gate].
fn halved(x: &Tensor) -> Result<Tensor> {
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = x.dim_back(1) / 2;
    x.empty_like(&shape)
}

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let (out, half) = (halved(x)?, x.dim_back(1) / 2);
    let call = Call::new(OP, "swiglu", x)?.tensor(x)?.tensor(&out)?.size(half)?;
    call.over_rows(out.numel() / half, half, pack(x.dtype()))?;
    Ok(out)
}

/// The same, and S of it; None where they are to be computed one after the other.
pub fn swiglu_shrink(x: &Tensor, shrink: &Shrink<'_>) -> Result<Option<(Tensor, Tensor)>> {
    let rows = x.numel() / x.dim_back(1);
    let Some(beside) = Beside::new(x, rows, shrink)? else { return Ok(None) };
    let out = halved(x)?;
    let call = Call::new(OP, &format!("swiglu_shrink_{}", beside.ranks()), x)?.tensor(x)?.tensor(&out)?;
    let call = beside.arguments(call)?;
    Ok(Some((out, beside.launch(call)?)))
}

pub fn swiglu_gradient(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let half = x.dim_back(1) / 2;
    let dx = x.empty_like(x.shape())?;
    let call = Call::new(OP, "swiglu_gradient", x)?.tensor(x)?.tensor(grad)?.tensor(&dx)?.size(half)?;
    call.over_rows(grad.numel() / half, half, pack(x.dtype()))?;
    Ok(dx)
}

pub fn silu(x: &Tensor) -> Result<Tensor> {
    let out = x.empty_like(x.shape())?;
    let call = Call::new(OP, "silu", x)?.tensor(x)?.tensor(&out)?;
    call.long(x.numel()).over(x.numel(), pack(x.dtype()))?;
    Ok(out)
}

pub fn silu_gradient(x: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let dx = x.empty_like(x.shape())?;
    let call = Call::new(OP, "silu_gradient", x)?.tensor(x)?.tensor(grad)?.tensor(&dx)?;
    call.long(x.numel()).over(x.numel(), pack(x.dtype()))?;
    Ok(dx)
}
