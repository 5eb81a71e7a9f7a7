//! Launcher of the ladder's steps, see `kernels-cu/low_rank_linear/README.md`.

use super::{
    Layout, OP,
    product::Operand,
    rows::Rows,
    warpgroup::{LowRank, Product},
};
use crate::{
    Error, Result, Tensor,
    cuda::{Call, blocks, call::on_gpu, hopper},
};
use hywu_core::Dtype;

/// Step `step` of [`LADDER`](crate::ops::low_rank_linear::LADDER), whose conditions hold but for device and dtype.
///
/// # Errors
/// No such step, an operand on the host or not bf16, a device that does not have it.
pub fn step(step: usize, x: &Tensor, weight: &Tensor, s: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (n, k) = (weight.shape()[0], weight.shape()[1]);
    let (adapters, ranks, m) = (b.shape()[0], b.shape()[2], x.numel() / k);
    if x.dtype() != Dtype::Bf16 {
        return Err(Error::invalid(OP, format!("the ladder's kernels are for bf16, x is {:?}", x.dtype())));
    }
    let mut shape = x.shape().to_vec();
    shape[x.shape().len() - 1] = n;
    match step {
        1 => {
            let out = x.empty_like(&shape)?;
            let rows = Rows::new(x, None, m, adapters, 16)?.bytes(s.dim_back(1))?;
            let call = Call::named(OP, "ladder_1", x)?.tensor(x)?.tensor(weight)?.tensor(s)?.tensor(b)?;
            let call = call.tensor(&out)?.bytes(&rows).size(n)?.size(k)?.size(ranks)?;
            call.launch([blocks(n, 16)?, blocks(m, 16)?, 1], 256, 0)?;
            return Ok(out);
        }
        2 => {
            return super::expand_product(x, Operand::matrices(weight), n, None, Some((s, b, 1)), None)
                .run(&shape);
        }
        3..=8 => {}
        _ => return Err(Error::invalid(OP, format!("there is no step {step} of the ladder"))),
    }
    if !hopper::there(on_gpu(OP, x)?.gpu()) {
        return Err(Error::invalid(OP, format!("step {step} of the ladder needs compute capability 9.0")));
    }
    let low_rank = Some(LowRank { s, b, adapters, ranks, parts: 1 });
    let product = Product {
        layout: Layout::Nt,
        dims: [m, n, k],
        a: x,
        b: weight,
        low_rank,
        bias: None,
        segments: None,
    };
    product.run_step(step, &shape)
}
