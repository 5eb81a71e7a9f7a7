//! Optimiser over a whole parameter set: AdamW, gradient clipping, EMA.

use crate::{Error, ParamSet, Result, Tensor};
use hywu_core::{Checkpoint, Dtype, TensorWriter};
use rayon::prelude::*;

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
    /// One step. `grads` in the order of the set; each is multiplied by `grad_scale` (clipping) first.
    ///
    /// # Errors
    /// Gradients or state of another size than the weights; nothing is changed then.
    pub fn update(
        &mut self,
        params: &mut ParamSet,
        grads: &[Tensor],
        lr: f32,
        grad_scale: f32,
    ) -> Result<()> {
        const OP: &str = "adamw";
        let fits =
            grads.len() == params.len() && params.iter().zip(grads).all(|((_, p), g)| p.numel() == g.numel());
        if !fits || self.m.len() != params.numel() || self.v.len() != params.numel() {
            return Err(Error::invalid(OP, "gradients or moments have another size than the weights"));
        }
        self.step += 1;
        let correct = |beta: f32| (1.0 - f64::from(beta).powf(self.step as f64)) as f32;
        let (c1, c2) = (correct(self.beta1), correct(self.beta2));
        let (b1, b2, eps) = (self.beta1, self.beta2, self.eps);
        let (mut m, mut v) = (&mut self.m[..], &mut self.v[..]);
        for ((_, p), g) in params.iter_mut().zip(grads) {
            let decay = if p.shape().len() >= 2 { 1.0 - lr * self.weight_decay } else { 1.0 };
            let (m_here, m_rest) = m.split_at_mut(p.numel());
            let (v_here, v_rest) = v.split_at_mut(p.numel());
            (m, v) = (m_rest, v_rest);
            let chunks = p.data_mut().par_chunks_mut(CHUNK).zip(g.data().par_chunks(CHUNK));
            chunks.zip(m_here.par_chunks_mut(CHUNK).zip(v_here.par_chunks_mut(CHUNK))).for_each(
                |((p, g), (m, v))| {
                    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                        let g = g * grad_scale;
                        *m = b1 * *m + (1.0 - b1) * g;
                        *v = b2 * *v + (1.0 - b2) * g * g;
                        *p = *p * decay - lr * (*m / c1) / ((*v / c2).sqrt() + eps);
                    }
                },
            );
        }
        Ok(())
    }
}

/// Elements a parallel task works on.
const CHUNK: usize = 1 << 14;

/// Euclidean norm over all gradients (f64 accumulation, order fixed).
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

/// min(1, max_norm / norm): the factor that clips gradients of norm `norm`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if norm > max_norm { (max_norm / norm) as f32 } else { 1.0 }
}

/// ema += (1 - decay) * (params - ema).
///
/// # Errors
/// Sets of different weights.
pub fn ema_update(ema: &mut ParamSet, params: &ParamSet, decay: f32) -> Result<()> {
    if ema.len() != params.len()
        || !ema.iter().zip(params.iter()).all(|(a, b)| a.0 == b.0 && a.1.shape() == b.1.shape())
    {
        return Err(Error::invalid("ema", "the averaged weights are not those of the model"));
    }
    for ((_, e), (_, p)) in ema.iter_mut().zip(params.iter()) {
        e.data_mut().par_chunks_mut(CHUNK).zip(p.data().par_chunks(CHUNK)).for_each(|(e, p)| {
            e.iter_mut().zip(p).for_each(|(e, p)| *e += (1.0 - decay) * (p - *e));
        });
    }
    Ok(())
}

/// Learning rate: linear warm-up, then half a cosine down to a floor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Steps of warm-up.
    pub warmup: u64,
    /// All steps.
    pub total: u64,
    /// Highest rate.
    pub peak: f32,
    /// Rate at the end.
    pub floor: f32,
}

impl Schedule {
    /// The rate of step 0, 1, ..
    pub fn lr(&self, step: u64) -> f32 {
        if step < self.warmup {
            return self.peak * (step + 1) as f32 / self.warmup as f32;
        }
        let length = self.total.saturating_sub(self.warmup).max(1) as f64;
        let part = ((step - self.warmup) as f64 / length).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * part).cos());
        self.floor + (self.peak - self.floor) * cosine as f32
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Learning rate used.
    pub lr: f32,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
}

/// AdamW with schedule, clipping and EMA: everything that a training run carries from step to step beside the weights.
#[derive(Clone)]
pub struct Optimizer {
    /// Moments and step count.
    pub adamw: AdamW,
    /// Averaged weights and their decay; the decay warms up as min(decay, (1 + n) / (10 + n)).
    pub ema: Option<(ParamSet, f32)>,
    /// Learning rate.
    pub schedule: Schedule,
    /// Greatest gradient norm.
    pub clip: f64,
}

impl Optimizer {
    /// Fresh state for `params`.
    pub fn new(
        params: &ParamSet,
        schedule: Schedule,
        weight_decay: f32,
        clip: f64,
        ema_decay: Option<f32>,
    ) -> Self {
        let adamw = AdamW::new(params.numel(), weight_decay);
        Self { adamw, ema: ema_decay.map(|d| (params.clone(), d)), schedule, clip }
    }

    /// One step.
    ///
    /// # Errors
    /// Gradients that are not finite, or of another size than the weights; nothing is changed then.
    pub fn step(&mut self, params: &mut ParamSet, grads: &[Tensor]) -> Result<StepStats> {
        let norm = grad_norm(grads);
        if !norm.is_finite() {
            let what = format!(
                "the gradient's norm is {norm} at step {}; the learning rate may be too high",
                self.adamw.step
            );
            return Err(Error::invalid("optimizer", what));
        }
        let lr = self.schedule.lr(self.adamw.step);
        self.adamw.update(params, grads, lr, clip_factor(norm, self.clip))?;
        if let Some((ema, decay)) = &mut self.ema {
            let n = self.adamw.step as f32;
            ema_update(ema, params, decay.min((1.0 + n) / (10.0 + n)))?;
        }
        Ok(StepStats { lr, grad_norm: norm })
    }

    /// The weights to use: the averaged ones where there are any.
    pub fn averaged<'a>(&'a self, params: &'a ParamSet) -> &'a ParamSet {
        self.ema.as_ref().map_or(params, |(ema, _)| ema)
    }

    /// Adds the whole state to a file: `optim.m`, `optim.v`, `ema.*`, and the step in the metadata.
    pub fn store(&self, writer: &mut TensorWriter) {
        for (name, x) in [("optim.m", &self.adamw.m), ("optim.v", &self.adamw.v)] {
            writer.add(name, &[x.len()], x, Dtype::F32);
        }
        if let Some((ema, _)) = &self.ema {
            ema.store(writer, "ema.", Dtype::F32);
        }
        writer.meta("optim.step", self.adamw.step.to_string());
    }

    /// Takes over the state that [`Optimizer::store`] wrote; a resumed run then goes on bit for bit.
    ///
    /// # Errors
    /// State that is missing, damaged, or of another size.
    pub fn load(&mut self, file: &Checkpoint) -> Result<()> {
        let bad = |what: &str| hywu_core::Error::checkpoint(file.path(), what);
        let step = file.metadata().get("optim.step").and_then(|s| s.parse().ok());
        let step = step.ok_or_else(|| bad("no `optim.step` in the metadata: not a training state"))?;
        let read = |name: &str, len: usize| -> Result<Vec<f32>> {
            Ok(file.read_shaped(name, &[len])?.into_iter().collect())
        };
        let (m, v) = (read("optim.m", self.adamw.m.len())?, read("optim.v", self.adamw.v.len())?);
        if let Some((ema, _)) = &mut self.ema {
            ema.load(file, "ema.")?;
        }
        (self.adamw.m, self.adamw.v, self.adamw.step) = (m, v, step);
        Ok(())
    }
}
