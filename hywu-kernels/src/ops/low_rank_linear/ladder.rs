//! The kernels that led to the product in use, for benches: `kernels-cu/low_rank_linear/README.md` has what each teaches.

use super::{OP, Shrunk};
use crate::{Error, Result, Tensor, cuda::low_rank_linear::ladder};

/// The steps, from the first on.
pub const LADDER: [&str; 8] =
    ["naive", "mma", "wgmma", "ring", "wide", "persistent", "engine_stores", "clusters"];

/// X W^T + S B^T by step `step` (1 to 8): `x` [.., in], `weight` [out, in], `s` of adapters that divide the rows evenly, `b` [adapters, out,
/// r], all bf16 on a CUDA device; in and out multiples of 8. From step 3 on it takes compute capability 9.0.
///
/// # Errors
/// Another step, device, dtype or shape.
pub fn ladder_step(step: usize, x: &Tensor, weight: &Tensor, s: &Shrunk, b: &Tensor) -> Result<Tensor> {
    let shapes = (x.shape(), weight.shape(), b.shape());
    let (&[.., k], &[n, inner], &[adapters, outer, _]) = shapes else {
        return Err(Error::shape(
            OP,
            "x, weight or b",
            x.shape(),
            "x [.., in], weight [out, in], b [adapters, out, r]",
        ));
    };
    let rows = x.numel() / k.max(1);
    let fits = k == inner && n == outer && k > 0 && k.is_multiple_of(8) && n.is_multiple_of(8);
    if !fits
        || rows == 0
        || adapters == 0
        || !rows.is_multiple_of(adapters)
        || !s.is_for(rows, adapters, b.shape()[2])
    {
        let what =
            format!("the ladder takes x [rows, in], weight [out, in], an even division: not {shapes:?}");
        return Err(Error::invalid(OP, what));
    }
    ladder::step(step, x, weight, s.tensor(), b)
}
