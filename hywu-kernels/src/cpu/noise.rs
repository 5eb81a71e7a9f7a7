//! CPU code of the op `noise`.

use crate::Tensor;
use hywu_core::Philox;
use rayon::prelude::*;

/// Fills row r of `out` [height, width, channels] with the numbers from `start` on of stream `first` + r.
pub fn noise_window(out: &mut Tensor, seed: u64, first: usize, start: usize) {
    let (philox, length) = (Philox::new(seed), out.dim_back(2) * out.dim_back(1));
    out.data_mut().par_chunks_mut(length.max(1)).enumerate().for_each(|(r, row)| {
        philox.fill_normal((first + r) as u64, start as u64, row);
    });
}

/// t * target + (1 - t) * noise, for every batch entry.
pub fn noised(target: &Tensor, t: &[f32], seed: u64) -> Tensor {
    let (philox, size) = (Philox::new(seed), target.numel() / t.len());
    Tensor::build(target.shape(), |out| {
        let entries = out.par_chunks_mut(size).zip(target.data().par_chunks(size)).zip(t).enumerate();
        entries.for_each(|(b, ((out, x), t))| {
            philox.fill_normal(b as u64 + 1, 0, out);
            out.iter_mut().zip(x).for_each(|(n, x)| *n = t * x + (1.0 - t) * *n);
        });
    })
}
