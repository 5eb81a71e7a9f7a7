//! Launchers of `kernels-cu/rms_norm`; see `cpu/rms_norm.rs` for what each computes.

use super::{
    Call, blocks,
    call::BLOCK,
    elementwise::{RowParts, sum_parts},
    low_rank_linear::Beside,
    pack,
};
use crate::{
    Result, Tensor,
    ops::{low_rank_linear::Shrink, rms_norm::Sums},
};
use hywu_core::Dtype;

const OP: &str = "rms_norm";
/// Packs of a row that a thread takes before more threads share the row.
const PACKS: usize = 4;

/// Threads that share a row of c channels: part of a warp, or from one warp on so many that each has a few packs.
fn row_threads(c: usize, dtype: Dtype) -> usize {
    threads_of(c.div_ceil(pack(dtype)), PACKS)
}

/// Threads that share a row of so many packs, where a thread takes `each` before more threads do.
pub(super) fn threads_of(packs: usize, each: usize) -> usize {
    match packs {
        0..=32 => packs.next_power_of_two(),
        _ => packs.div_ceil(each).next_power_of_two().clamp(32, 1024),
    }
}

/// Rows of an entry: of those that have a modulation of their own.
fn entry(x: &Tensor) -> usize {
    x.numel() / x.dim_back(1) / x.shape().first().unwrap_or(&1)
}

impl Call {
    /// Adds the sizes and launches the threads of every row. A block is one row where that is more than a warp.
    fn over_norm_rows(self, x: &Tensor, eps: f32) -> Result<()> {
        let c = x.dim_back(1);
        let (rows, threads) = (x.numel() / c, row_threads(c, x.dtype()));
        let block = if threads > 32 { threads } else { BLOCK as usize };
        let call = self.size(rows)?.size(c)?.size(entry(x))?.size(threads)?.float(eps);
        call.launch([blocks(rows, block / threads)?, 1, 1], block as u32, 0)
    }
}

pub fn forward(
    x: &Tensor,
    w: Option<&Tensor>,
    modulation: Option<(&Tensor, &Tensor)>,
    eps: f32,
) -> Result<Tensor> {
    let out = x.empty_like(x.shape())?;
    let (scale, shift) = modulation.unzip();
    let call = Call::new(OP, "rms_norm", x)?.tensor(x)?.optional(w)?.optional(scale)?.optional(shift)?;
    call.tensor(&out)?.over_norm_rows(x, eps)?;
    Ok(out)
}

/// The same out, and S of it; None where they are to be computed one after the other.
pub fn forward_shrink(
    x: &Tensor,
    w: Option<&Tensor>,
    modulation: Option<(&Tensor, &Tensor)>,
    eps: f32,
    shrink: &Shrink<'_>,
) -> Result<Option<(Tensor, Tensor)>> {
    let rows = x.numel() / x.dim_back(1);
    let Some(beside) = Beside::new(x, rows, shrink)? else { return Ok(None) };
    let out = x.empty_like(x.shape())?;
    let (scale, shift) = modulation.unzip();
    let call = Call::new(OP, &format!("rms_norm_shrink_{}", beside.ranks()), x)?.tensor(x)?.optional(w)?;
    let call = beside.arguments(call.optional(scale)?.optional(shift)?.tensor(&out)?)?;
    let call = call.size(entry(x))?.size(row_threads(x.dim_back(1), x.dtype()))?.float(eps);
    Ok(Some((out, beside.launch(call)?)))
}

pub fn backward(
    x: &Tensor,
    w: Option<&Tensor>,
    scale: Option<&Tensor>,
    grad: &Tensor,
    eps: f32,
    sums: bool,
) -> Result<(Tensor, Option<Sums>)> {
    let dx = x.empty_like(x.shape())?;
    let rows = x.numel() / x.dim_back(1);
    let inverses = sums.then(|| x.empty_as(&[rows], Dtype::F32)).transpose()?;
    let call = Call::new(OP, "rms_norm_dx", x)?.tensor(x)?.tensor(grad)?.optional(w)?.optional(scale)?;
    let call = call.tensor(&dx)?.optional_as(inverses.as_ref(), Dtype::F32)?;
    call.over_norm_rows(x, eps)?;
    let sums = inverses.map(|inverses| row_sums(x, w, scale, grad, &inverses)).transpose()?;
    Ok((dx, sums))
}

/// Two sums are enough for all: of grad * x * inverse, and of grad. Those of each entry where it has factors of its own.
fn row_sums(
    x: &Tensor,
    w: Option<&Tensor>,
    scale: Option<&Tensor>,
    grad: &Tensor,
    inverses: &Tensor,
) -> Result<Sums> {
    let c = x.dim_back(1);
    let groups = scale.map_or(1, |scale| scale.shape()[0]);
    let rows = x.numel() / (c * groups);
    let RowParts { lanes, splits, grid } = RowParts::new(rows, c, groups, x.dtype())?;
    let parts = || x.empty_as(&[splits, groups, c], Dtype::F32);
    let (norms, shifts) = (parts()?, scale.map(|_| parts()).transpose()?);
    let call =
        Call::new(OP, "rms_norm_parts", x)?.tensor(x)?.tensor(grad)?.tensor_as(inverses, Dtype::F32)?;
    let call = call.tensor_as(&norms, Dtype::F32)?.optional_as(shifts.as_ref(), Dtype::F32)?;
    call.size(rows)?.size(c)?.size(lanes)?.launch(grid, BLOCK, 0)?;
    let (Some(scale), Some(shifts)) = (scale, shifts) else {
        let weight = w.map(|w| sum_parts(&norms, x, w.shape(), 1.0)).transpose()?;
        return Ok(Sums { weight, modulation: None });
    };
    let (dscale, dshift) = (x.empty_like(scale.shape())?, x.empty_like(scale.shape())?);
    let weights = w.map(|_| x.empty_as(scale.shape(), Dtype::F32)).transpose()?;
    let call = Call::new(OP, "rms_norm_finish", x)?.tensor_as(&norms, Dtype::F32)?;
    let call = call.tensor_as(&shifts, Dtype::F32)?.optional(w)?.tensor(scale)?.tensor(&dscale)?;
    let call = call.tensor(&dshift)?.optional_as(weights.as_ref(), Dtype::F32)?;
    call.size(groups * c)?.size(c)?.size(splits)?.over(groups * c, 1)?;
    let weight = weights.map(|parts| sum_parts(&parts, x, &[c], 1.0)).transpose()?;
    Ok(Sums { weight, modulation: Some([dscale, dshift]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_suit_the_row() {
        let threads = |c| [row_threads(c, Dtype::F32), row_threads(c, Dtype::Bf16)];
        assert_eq!(threads(1), [1, 1]);
        assert_eq!(threads(64), [16, 8]);
        assert_eq!(threads(192), [32, 32]);
        assert_eq!(threads(2048), [128, 64]);
        assert_eq!(threads(4096), [256, 128]);
        assert_eq!(threads(1 << 20), [1024, 1024]);
    }
}
