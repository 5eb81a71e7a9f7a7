//! AdamW, gradient norm and EMA.

use crate::{
    ParamSet, Tensor,
    optim::{Rates, clip_factor},
};
use rayon::prelude::*;

/// Elements a parallel task works on.
const CHUNK: usize = 1 << 14;

/// Euclidean norm over all gradients: chunks first, then the chunks in order, in f64.
pub fn grad_norm(grads: &[Tensor]) -> f64 {
    let square = |g: &Tensor| -> f64 {
        let partial: Vec<f64> = g
            .data()
            .par_chunks(CHUNK)
            .map(|c| c.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
            .collect();
        partial.iter().sum()
    };
    grads.iter().map(square).sum::<f64>().sqrt()
}

/// One step of AdamW with clipping to the norm `clip`, and of the average: (averaged weights, share of the new). Returns the norm of
/// the gradients; when that is not finite nothing is changed.
pub fn step(
    params: &mut ParamSet,
    grads: &[Tensor],
    m: &mut Tensor,
    v: &mut Tensor,
    average: Option<(&mut ParamSet, f32)>,
    rates: Rates,
    clip: f64,
) -> f64 {
    let norm = grad_norm(grads);
    if !norm.is_finite() {
        return norm;
    }
    let factor = clip_factor(norm, clip);
    let Rates { lr, beta1, beta2, correct1, correct2, eps, decay } = rates;
    let (mut m, mut v) = (m.data_mut(), v.data_mut());
    let decaying = params.decaying();
    for (((_, p), g), decays) in params.iter_mut().zip(grads).zip(decaying) {
        let decay = if decays { decay } else { 1.0 };
        let (m_here, m_rest) = m.split_at_mut(p.numel());
        let (v_here, v_rest) = v.split_at_mut(p.numel());
        (m, v) = (m_rest, v_rest);
        let chunks = p.data_mut().par_chunks_mut(CHUNK).zip(g.data().par_chunks(CHUNK));
        chunks.zip(m_here.par_chunks_mut(CHUNK).zip(v_here.par_chunks_mut(CHUNK))).for_each(
            |((p, g), (m, v))| {
                for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                    let g = g * factor;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *p = *p * decay - lr * (*m / correct1) / ((*v / correct2).sqrt() + eps);
                }
            },
        );
    }
    if let Some((average, share)) = average {
        for ((_, e), (_, p)) in average.iter_mut().zip(params.iter()) {
            e.data_mut().par_chunks_mut(CHUNK).zip(p.data().par_chunks(CHUNK)).for_each(|(e, p)| {
                e.iter_mut().zip(p).for_each(|(e, p)| *e += share * (p - *e));
            });
        }
    }
    norm
}
