//! One module per op: a function of the op's own name over [`Var`](crate::Var)s, which records it on a [`Tape`](crate::Tape), or over
//! [`Tensor`]s where it needs no gradient.
//!
//! An op checks its arguments once, for every device; the arithmetic is in `cpu/<op>.rs` and `cuda/<op>.rs`.

use crate::{Error, Result, Tensor};

/// `cpu::<op>::<f>(..)` or, when the first operand is on a CUDA device, `cuda::<op>::<f>(..)?`: both take the same arguments.
macro_rules! on_device {
    ($tensor:expr, $op:ident::$f:ident($($argument:expr),* $(,)?)) => {
        if $tensor.is_cuda() {
            crate::cuda::$op::$f($($argument),*)?
        } else {
            crate::cpu::$op::$f($($argument),*)
        }
    };
}
pub(crate) use on_device;

/// Are all operands on one device and of one dtype?
pub(crate) fn together(op: &'static str, operands: &[&Tensor]) -> Result<()> {
    let place = |t: &Tensor| (t.device(), t.dtype());
    let Some(first) = operands.first() else { return Ok(()) };
    match operands.iter().find(|t| place(t) != place(first)) {
        None => Ok(()),
        Some(other) => {
            let ((device, dtype), (other_device, other_dtype)) = (place(first), place(other));
            let what = format!(
                "operands are {dtype:?} on {device} and {other_dtype:?} on {other_device}; bring them together with Tensor::to"
            );
            Err(Error::invalid(op, what))
        }
    }
}

pub mod attention;
pub mod elementwise;
pub mod embedding;
pub mod local_filter;
pub mod loss;
pub mod low_rank_linear;
pub mod noise;
pub mod parameter_tokens;
pub mod patchify;
pub mod residual;
pub mod rms_norm;
pub mod swiglu;
pub mod tile_blend;
pub mod timestep;
