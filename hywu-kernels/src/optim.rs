//! Optimiser over a whole parameter set: AdamW, gradient clipping, EMA.

use crate::{ParamSet, Result, Tensor};

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101). State is one flat buffer per moment.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay; applied to matrices only (tensors with two axes or more).
    pub weight_decay: f32,
    /// First moments, in the order of the set.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
    /// Steps taken.
    pub step: u64,
}

impl AdamW {
    /// Fresh state for `numel` scalars: betas 0.9 / 0.95, eps 1e-8.
    pub fn new(numel: usize, weight_decay: f32) -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay,
            m: vec![0.0; numel],
            v: vec![0.0; numel],
            step: 0,
        }
    }
    /// One step. `grads` in the order of the set, each already multiplied by nothing: `grad_scale` is applied here (clipping).
    pub fn update(&mut self, params: &mut ParamSet, grads: &[Tensor], lr: f32, grad_scale: f32) -> Result<()> {
        let _ = (params, grads, lr, grad_scale);
        todo!()
    }
}

/// Euclidean norm over all gradients (f64 accumulation, order fixed).
pub fn grad_norm(grads: &[Tensor]) -> f64 {
    let _ = grads;
    todo!()
}

/// min(1, max_norm / norm): the factor that clips gradients of norm `norm`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    let _ = (norm, max_norm);
    todo!()
}

/// ema += (1 - decay) * (params - ema).
pub fn ema_update(ema: &mut ParamSet, params: &ParamSet, decay: f32) -> Result<()> {
    let _ = (ema, params, decay);
    todo!()
}
