//! The kernels that led to the forward pass in use, for benches: `kernels-cu/attention/README.md` has what each teaches.

use super::{Attention, Forward, OP};
use crate::{Error, Result, Tensor, cuda};

/// The steps, from the first on.
pub const LADDER: [&str; 6] = ["mma", "wgmma", "ping_pong", "overlap", "wide", "no_turns"];

/// [`forward`](super::forward) by step `step` (1 to 6): bf16 on a CUDA device, heads of 128 channels, no mask; from step 2 on it takes
/// compute capability 9.0.
///
/// # Errors
/// Those of [`forward`](super::forward); another step, device, dtype, head_dim, or a mask.
pub fn ladder_step(step: usize, args: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Forward> {
    args.validate([q, k, v], None)?;
    let some = args.queries > 0 && args.keys > 0 && args.heads > 0 && !args.batch.contains(&0);
    if args.head_dim != 128 || args.causal.is_some() || !some {
        let text = format!("the ladder takes some heads of 128 channels without a mask, not {args:?}");
        return Err(Error::invalid(OP, text));
    }
    cuda::attention::ladder_step(step, args, [q, k, v])
}
