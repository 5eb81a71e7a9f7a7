//! Table lookup.

use crate::Tensor;

/// Row `id` of the table for every id, into this shape.
pub fn lookup(table: &Tensor, ids: &[u32], shape: &[usize]) -> Tensor {
    let (width, data) = (table.dim_back(1), table.data());
    Tensor::build(shape, |out| {
        // max(1): a table of width 0 has nothing to copy.
        out.chunks_mut(width.max(1)).zip(ids).for_each(|(o, &id)| {
            o.copy_from_slice(&data[id as usize * width..][..width]);
        });
    })
}

/// The gradient of a table of this shape: the sum of the rows of each id, zero for the others.
pub fn gradient(grad: &Tensor, ids: &[u32], shape: &[usize]) -> Tensor {
    let width = shape[1];
    let mut sum = Tensor::zeros(shape);
    let data = sum.data_mut();
    for (grad, &id) in grad.data().chunks(width.max(1)).zip(ids) {
        super::add_assign(&mut data[id as usize * width..][..width], grad);
    }
    sum
}
