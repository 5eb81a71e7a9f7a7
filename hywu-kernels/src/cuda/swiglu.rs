//! Launchers of `kernels-cu/swiglu`; see `cpu/swiglu.rs` for what each computes.

use super::{Call, pack};
use crate::{Result, Tensor};

const OP: &str = "swiglu";

pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    let mut shape = x.shape().to_vec();
    let half = x.dim_back(1) / 2;
    shape[x.shape().len() - 1] = half;
    let out = x.empty_like(&shape)?;
    let call = Call::new(OP, "swiglu", x)?.tensor(x)?.tensor(&out)?.size(half)?;
    call.over_rows(out.numel() / half, half, pack(x.dtype()))?;
    Ok(out)
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
