//! Sinusoidal embedding of the timestep.

use crate::Tensor;

/// `t` in [0, 1] per batch entry -> [batch, width]: cos then sin of 1000 t / 10000^(i / (width / 2)).
pub fn timestep_embedding(t: &[f32], width: usize) -> Tensor {
    let _ = (t, width);
    todo!()
}
