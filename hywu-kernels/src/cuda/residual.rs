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

/// The same rows in runs of no more elements than a kernel counts: long ones row by row.
fn countable(runs: Runs, channels: usize) -> Runs {
    let short = runs.length.saturating_mul(channels) <= i32::MAX as usize;
    match runs.neighbours() {
        Some(rows) if !short => Runs { first: rows.start, count: rows.len(), length: 1, pitch: 1 },
        _ => runs,
    }
}

pub fn add(x: &mut Tensor, runs: Runs, y: &Tensor) -> Result<()> {
    let c = x.dim_back(1);
    let runs = countable(runs, c);
    let call = Call::new(OP, "residual_add", y)?.tensor_as(x, Dtype::F32)?.tensor(y)?;
    let length = runs.length * c;
    let call = call.long(runs.first * c).long(runs.pitch * c).size(length)?;
    call.over_rows(runs.count, length, pack(y.dtype()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_any_size_are_counted() {
        // Three instances of the published generator.
        let rows = 3 * 176_512;
        let all = countable(Runs::of(5..rows), 4096);
        assert_eq!((all.first, all.rows(), all.end()), (5, rows - 5, Some(rows)));
        assert!(all.length * 4096 <= i32::MAX as usize && all.neighbours() == Some(5..rows));
        let one = Runs::of(0..176_512);
        assert_eq!(countable(one, 4096), one);
        let apart = Runs { first: 0, count: 32, length: 10, pitch: 5516 };
        assert_eq!(countable(apart, 4096), apart);
    }
}
