//! Launcher of `kernels-cu/low_rank_linear/merge.cuh`.

use super::{OP, int};
use crate::{
    Error, Result, Tensor,
    cuda::{Call, blocks, call::in_grid, pack},
};
use hywu_core::Dtype;

/// Threads of a block.
const THREADS: usize = 256;
/// Rows and columns of a block's tile in bf16.
const TILE: [usize; 2] = [64, 128];

/// The grid for parts of so many rows: tiles in bf16, a thread per 16 bytes in f32.
fn grid(dtype: Dtype, parts: usize, rows: usize, columns: usize) -> Result<[u32; 3]> {
    let parts = in_grid(OP, parts, "parts of a weight")?;
    if dtype == Dtype::Bf16 {
        let rows = in_grid(OP, rows.div_ceil(TILE[0]), "rows of tiles")?;
        return Ok([blocks(columns, TILE[1])?, rows, parts]);
    }
    let packs = rows.saturating_mul(columns.div_ceil(pack(dtype)));
    // The kernel counts them in 32 bits.
    if u32::try_from(packs).is_err() {
        return Err(Error::invalid(
            OP,
            format!("a weight of {rows} x {columns} is more than a launch takes"),
        ));
    }
    Ok([blocks(packs, THREADS)?, 1, parts])
}

pub fn merge(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f32, parts: usize) -> Result<Tensor> {
    let (rows, columns) = (weight.shape()[0] / parts, weight.shape()[1]);
    let out = weight.empty_like(weight.shape())?;
    let mut sizes = Vec::new();
    for size in [rows, columns, b.dim_back(1)] {
        sizes.extend(int(size)?.to_le_bytes());
    }
    sizes.extend(scale.to_le_bytes());
    let call = Call::new(OP, "merge", weight)?.tensor(weight)?.tensor(a)?.tensor(b)?.tensor(&out)?;
    call.bytes(&sizes).launch(grid(weight.dtype(), parts, rows, columns)?, THREADS as u32, 0)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_covers_the_weight() {
        let grid = |dtype, parts, rows, columns| grid(dtype, parts, rows, columns).expect("it fits");
        assert_eq!(grid(Dtype::Bf16, 1, 4096, 4096), [32, 64, 1]);
        assert_eq!(grid(Dtype::Bf16, 2, 65, 129), [2, 2, 2]);
        assert_eq!(grid(Dtype::F32, 2, 3, 5), [1, 1, 2]);
        assert_eq!(grid(Dtype::F32, 1, 1024, 1024), [1024, 1, 1]);
        assert!(super::grid(Dtype::F32, 1, 1 << 20, 1 << 20).is_err());
    }
}
