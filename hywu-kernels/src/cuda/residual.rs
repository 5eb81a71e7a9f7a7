//! Launchers of `kernels-cu/residual`; see `cpu/residual.rs` for what each computes.

use super::{Call, blocks, call::BLOCK, pack, rms_norm::threads_of};
use crate::{Result, Tensor, ops::residual::Runs};
use hywu_core::Dtype;

const OP: &str = "residual";
/// Packs of a row that a thread keeps: `KEPT` of residual.cu.
const KEPT: usize = 2;

pub fn read(x: &mut Tensor, runs: Runs, late: Option<&Tensor>, w: &Tensor, eps: f32) -> Result<Tensor> {
    let (rows, c) = (runs.rows(), x.dim_back(1));
    let out = w.empty_like(&[rows, c])?;
    let threads = threads_of(c.div_ceil(pack(w.dtype())), KEPT);
    let block = if threads > 32 { threads } else { BLOCK as usize };
    let call = Call::new(OP, "residual_read", w)?.tensor_as(x, Dtype::F32)?.optional(late)?;
    let call = call
        .tensor(w)?
        .tensor(&out)?
        .long(runs.first)
        .long(runs.pitch)
        .size(runs.length)?
        .size(rows)?
        .size(c)?;
    call.size(threads)?.float(eps).launch([blocks(rows, block / threads)?, 1, 1], block as u32, 0)?;
    Ok(out)
}

pub fn add(x: &mut Tensor, runs: Runs, y: &Tensor) -> Result<()> {
    let c = x.dim_back(1);
    let call = Call::new(OP, "residual_add", y)?.tensor_as(x, Dtype::F32)?.tensor(y)?;
    let length = runs.length * c;
    let call = call.long(runs.first * c).long(runs.pitch * c).size(length)?;
    call.over_rows(runs.count, length, pack(y.dtype()))
}
