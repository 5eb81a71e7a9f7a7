//! Launchers of `kernels-cu/patchify`; see `cpu/patchify.rs` for what each computes.

use super::{Call, pack};
use crate::{Result, Tensor, ops::patchify::Grid};

const OP: &str = "patchify";

pub fn to_patches(image: &Tensor, grid: Grid) -> Result<Tensor> {
    exchange(image, &grid.patches(), grid, (grid.columns, grid.p))
}

pub fn to_image(patches: &Tensor, grid: Grid) -> Result<Tensor> {
    exchange(patches, &grid.image(), grid, (grid.p, grid.columns))
}

/// [n, m] -> [m, n] runs for every row of patches.
fn exchange(x: &Tensor, shape: &[usize], grid: Grid, (m, n): (usize, usize)) -> Result<Tensor> {
    let Grid { batch, rows, columns, p, channels } = grid;
    let (run, out) = (p * channels, x.empty_like(shape)?);
    let call = Call::new(OP, "exchange_runs", x)?.tensor(x)?.tensor(&out)?.size(m)?.size(n)?.size(run)?;
    call.over_rows(batch * rows * columns * p, run, pack(x.dtype()))?;
    Ok(out)
}
