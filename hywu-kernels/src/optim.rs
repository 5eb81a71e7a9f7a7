//! Optimiser over a whole parameter set: AdamW, gradient clipping, EMA.

use crate::{
    Device, Error, ParamSet, Result, Tensor, cpu, cuda,
    ops::{on_device, together},
};
use hywu_core::{Checkpoint, Dtype, TensorWriter};

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
    /// First moments, in the order of the set (on a device as [`ParamSet`] lays its weights out).
    m: Tensor,
    /// Second moments.
    v: Tensor,
    /// Steps taken.
    pub step: u64,
}

impl AdamW {
    /// Fresh state for these weights, where they are: betas 0.9 / 0.95, eps 1e-8.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn new(params: &ParamSet, weight_decay: f32) -> Result<Self> {
        let zeros = || params.pack(&vec![0.0; params.numel()]);
        Ok(Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, m: zeros()?, v: zeros()?, step: 0 })
    }
    /// First and second moments, one number per weight in the order of the set.
    ///
    /// # Errors
    /// Those of a device.
    pub fn moments(&self, params: &ParamSet) -> Result<[Vec<f32>; 2]> {
        Ok([params.unpack(&self.m)?, params.unpack(&self.v)?])
    }
    /// The numbers of the next step.
    fn rates(&self, lr: f32) -> Rates {
        let correct = |beta: f32| (1.0 - f64::from(beta).powf(self.step as f64 + 1.0)) as f32;
        Rates {
            lr,
            beta1: self.beta1,
            beta2: self.beta2,
            correct1: correct(self.beta1),
            correct2: correct(self.beta2),
            eps: self.eps,
            decay: 1.0 - lr * self.weight_decay,
        }
    }
}

/// The numbers of one step of [`AdamW`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rates {
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    /// 1 - beta1^step.
    pub correct1: f32,
    /// 1 - beta2^step.
    pub correct2: f32,
    pub eps: f32,
    /// Factor on matrices.
    pub decay: f32,
}

/// Euclidean norm over all gradients (f64 accumulation, order fixed).
///
/// # Errors
/// Gradients that are not on one device and of one dtype; those of a device.
pub fn grad_norm(grads: &[Tensor]) -> Result<f64> {
    match grads.first() {
        None => Ok(0.0),
        Some(first) => {
            together("grad_norm", &grads.iter().collect::<Vec<_>>())?;
            Ok(on_device!(first, optim::grad_norm(grads)))
        }
    }
}

/// min(1, max_norm / norm): the factor that clips gradients of norm `norm`.
pub fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    if norm > max_norm { (max_norm / norm) as f32 } else { 1.0 }
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
    /// Fresh state for `params`, where they are.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn new(
        params: &ParamSet,
        schedule: Schedule,
        weight_decay: f32,
        clip: f64,
        ema_decay: Option<f32>,
    ) -> Result<Self> {
        let adamw = AdamW::new(params, weight_decay)?;
        Ok(Self { adamw, ema: ema_decay.map(|d| (params.clone(), d)), schedule, clip })
    }

    /// One step: the gradients (in the order of the set) are clipped to the greatest norm, the weights and their average move.
    ///
    /// # Errors
    /// Gradients that are not finite, of another size than the weights or elsewhere; weights that this is not the state of; not enough
    /// memory on a device. Nothing is changed then.
    pub fn step(&mut self, params: &mut ParamSet, grads: &[Tensor]) -> Result<StepStats> {
        const OP: &str = "optimizer";
        let fits =
            grads.len() == params.len() && params.iter().zip(grads).all(|((_, p), g)| p.numel() == g.numel());
        if !fits {
            return Err(Error::invalid(OP, "the gradients have other sizes than the weights"));
        }
        let device = params.device();
        if let Some(grad) = grads.iter().find(|grad| grad.device() != device) {
            let what = format!("a gradient is on {}, the weights are on {device}", grad.device());
            return Err(Error::invalid(OP, what));
        }
        let (m, length) = (&self.adamw.m, params.packed_len());
        if m.device() != device || m.numel() != length {
            let what = format!(
                "its state is of {} numbers on {}, these weights need {length} on {device}",
                m.numel(),
                m.device()
            );
            return Err(Error::invalid(OP, what));
        }
        let lr = self.schedule.lr(self.adamw.step);
        let rates = self.adamw.rates(lr);
        let average = match &mut self.ema {
            None => None,
            Some((ema, decay)) => {
                let alike =
                    |(a, b): ((&str, &Tensor), (&str, &Tensor))| a.0 == b.0 && a.1.shape() == b.1.shape();
                if ema.len() != params.len() || !ema.iter().zip(params.iter()).all(alike) {
                    return Err(Error::invalid(OP, "the averaged weights are not those of the model"));
                }
                let n = self.adamw.step as f32 + 1.0;
                Some((ema, 1.0 - decay.min((1.0 + n) / (10.0 + n))))
            }
        };
        let (m, v) = (&mut self.adamw.m, &mut self.adamw.v);
        let norm = match device {
            Device::Cpu => cpu::optim::step(params, grads, m, v, average, rates, self.clip),
            Device::Cuda(_) => cuda::optim::step(params, grads, m, v, average, rates, self.clip)?,
        };
        if !norm.is_finite() {
            let what = format!(
                "the gradient's norm is {norm} at step {}; the learning rate may be too high",
                self.adamw.step
            );
            return Err(Error::invalid(OP, what));
        }
        self.adamw.step += 1;
        Ok(StepStats { lr, grad_norm: norm })
    }

    /// The weights to use: the averaged ones where there are any.
    pub fn averaged<'a>(&'a self, params: &'a ParamSet) -> &'a ParamSet {
        self.ema.as_ref().map_or(params, |(ema, _)| ema)
    }

    /// Adds the whole state to a file: `optim.m`, `optim.v`, `ema.*`, and the step in the metadata. `params` are the weights that it
    /// is the state of.
    ///
    /// # Errors
    /// Those of a device.
    pub fn store(&self, params: &ParamSet, writer: &mut TensorWriter) -> Result<()> {
        for (name, numbers) in ["optim.m", "optim.v"].into_iter().zip(self.adamw.moments(params)?) {
            writer.add(name, &[numbers.len()], &numbers, Dtype::F32);
        }
        if let Some((ema, _)) = &self.ema {
            ema.store(writer, "ema.", Dtype::F32)?;
        }
        writer.meta("optim.step", self.adamw.step.to_string());
        Ok(())
    }

    /// Takes over the state that [`Optimizer::store`] wrote; a resumed run then goes on bit for bit.
    ///
    /// # Errors
    /// State that is missing, damaged, or of another size.
    pub fn load(&mut self, params: &ParamSet, file: &Checkpoint) -> Result<()> {
        let bad = |what: &str| hywu_core::Error::checkpoint(file.path(), what);
        let step = file.metadata().get("optim.step").and_then(|s| s.parse().ok());
        let step = step.ok_or_else(|| bad("no `optim.step` in the metadata: not a training state"))?;
        let read = |name: &str| -> Result<Tensor> {
            let numbers: Vec<f32> = file.read_shaped(name, &[params.numel()])?.into_iter().collect();
            params.pack(&numbers)
        };
        let (m, v) = (read("optim.m")?, read("optim.v")?);
        if let Some((ema, _)) = &mut self.ema {
            ema.load(file, "ema.")?;
        }
        (self.adamw.m, self.adamw.v, self.adamw.step) = (m, v, step);
        Ok(())
    }
}
