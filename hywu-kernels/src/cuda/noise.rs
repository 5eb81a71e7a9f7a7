//! Launchers of `kernels-cu/noise`; see `cpu/noise.rs` for what each computes.

use super::{Call, pack};
use crate::{Result, Tensor};
use hywu_core::Dtype;

const OP: &str = "noise";
/// Numbers of one block of the generator.
const NUMBERS: usize = 4;

pub fn noise_window(out: &mut Tensor, seed: u64, first: usize, start: usize) -> Result<()> {
    let (height, length) = (out.shape()[0], out.dim_back(2) * out.dim_back(1));
    if out.numel() == 0 {
        return Ok(());
    }
    let call = Call::named(OP, "noise_window", out)?.bytes(&seed.to_le_bytes()).long(first).long(start);
    let call = call.tensor_as(out, Dtype::F32)?.size(length)?;
    call.over_rows(height, start % NUMBERS + length, NUMBERS)
}

pub fn noised(target: &Tensor, t: &[f32], seed: u64) -> Result<Tensor> {
    let each = target.numel() / t.len();
    let shares = Tensor::new(&[t.len()], t.to_vec())?.to(target.device(), Dtype::F32)?;
    let out = target.empty_like(target.shape())?;
    let call = Call::new(OP, "noised", target)?.tensor(target)?.tensor_as(&shares, Dtype::F32)?;
    let call = call.tensor(&out)?.bytes(&seed.to_le_bytes()).size(each)?;
    call.over_rows(t.len(), each, pack(target.dtype()))?;
    Ok(out)
}
