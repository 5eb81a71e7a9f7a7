//! Launchers of `kernels-cu/parameter_tokens`; see `cpu/parameter_tokens.rs` for what each computes.

use super::{Call, elementwise::sum_rows, pack};
use crate::{Result, Tensor};

const OP: &str = "parameter_tokens";

pub fn token_grid(hw: &Tensor, layers: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let out = hw.empty_like(shape)?;
    let (places, c) = (hw.shape()[0], hw.dim_back(1));
    let call = Call::new(OP, "token_grid", hw)?.tensor(hw)?.tensor(layers)?.tensor(&out)?;
    call.size(places)?.size(c)?.over_rows(layers.shape()[0] * places, c, pack(hw.dtype()))?;
    Ok(out)
}

pub fn token_grid_gradients(grad: &Tensor, hw: &[usize], layers: &[usize]) -> Result<[Tensor; 2]> {
    // Over the layers, then over the places of each layer.
    Ok([sum_rows(grad, None, 1, hw, 1.0)?, sum_rows(grad, None, layers[0], layers, 1.0)?])
}
