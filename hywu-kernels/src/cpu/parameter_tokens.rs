//! The initial grid of the generator's parameter tokens.

use crate::Tensor;

/// `hw` [places, c] + `layers` [N, c], every place of every layer, into this shape.
pub fn token_grid(hw: &Tensor, layers: &Tensor, shape: &[usize]) -> Tensor {
    let c = hw.dim_back(1);
    Tensor::build(shape, |out| {
        for (layer, position) in out.chunks_mut(hw.numel()).zip(layers.data().chunks(c)) {
            for (row, hw) in layer.chunks_mut(c).zip(hw.data().chunks(c)) {
                row.iter_mut().zip(hw).zip(position).for_each(|((o, h), p)| *o = h + p);
            }
        }
    })
}

/// The gradients of `hw` and of `layers`, which have these shapes.
pub fn token_grid_gradients(grad: &Tensor, hw: &[usize], layers: &[usize]) -> [Tensor; 2] {
    let (mut dhw, mut dlayer) = (Tensor::zeros(hw), Tensor::zeros(layers));
    let c = hw[1];
    for (grad, dlayer) in grad.data().chunks(hw[0] * c).zip(dlayer.data_mut().chunks_mut(c)) {
        super::add_assign(dhw.data_mut(), grad);
        grad.chunks(c).for_each(|row| super::add_assign(dlayer, row));
    }
    [dhw, dlayer]
}
