//! Sinusoidal embedding of the timestep.

use crate::Tensor;

/// `t` in [0, 1] per batch entry -> [batch, width]: cos then sin of 1000 t / 10000^(i / (width / 2)), width even
/// ("Attention Is All You Need", arXiv 1706.03762, section 3.5, with t scaled as diffusion models do). On the CPU, in f64 up to the
/// result, as it is a few rows in all: [`Tensor::to`] brings it to a device.
pub fn timestep_embedding(t: &[f32], width: usize) -> Tensor {
    let half = width / 2;
    Tensor::build(&[t.len(), width], |out| {
        out.fill(0.0);
        for (row, &t) in out.chunks_mut(width.max(1)).zip(t) {
            for i in 0..half {
                let angle = 1000.0 * f64::from(t) * 10_000f64.powf(-(i as f64) / half as f64);
                row[i] = angle.cos() as f32;
                row[half + i] = angle.sin() as f32;
            }
        }
    })
}
