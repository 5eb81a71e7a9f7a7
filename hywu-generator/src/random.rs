//! Random weights of a trained generator's sizes, for trying size and speed without a checkpoint.

use crate::{Generator, GeneratorConfig, Result};
use half::bf16;
use hywu_core::{Dtype, Philox};
use hywu_kernels::{
    Device, ParamSet, Tape, Tensor, Var,
    ops::{
        elementwise::{add, scale},
        noise::noise_window,
    },
};
use rayon::prelude::*;

/// Normal numbers, rounded to bf16 as published weights are: number i of weight w is number i of stream w.
#[derive(Clone, Copy)]
struct Distribution {
    mean: f32,
    deviation: f32,
}

impl Distribution {
    /// Every linear layer keeps the size of what it gets, so activations stay near 1 and the residual stream grows like the root of
    /// the number of blocks.
    fn of(name: &str, shape: &[usize]) -> Self {
        let (mean, deviation) = match name {
            n if n.contains("norm") => (1.0, 0.1),
            n if n.ends_with(".bias") => (0.0, 0.02),
            n if n.contains("_pos") => (0.0, 1.0),
            _ => (0.0, (shape.last().copied().unwrap_or(1) as f32).powf(-0.5)),
        };
        Self { mean, deviation }
    }
    fn value(self, normal: f32) -> bf16 {
        let scaled = normal * self.deviation;
        // -0 stays what it is.
        bf16::from_f32(if self.mean == 0.0 { scaled } else { scaled + self.mean })
    }
}

/// The random weights of a config, in the order of [`GeneratorConfig::weights`].
pub(crate) struct RandomWeights {
    philox: Philox,
    seed: u64,
}

/// Numbers that a task draws.
const CHUNK: usize = 1 << 14;

impl RandomWeights {
    pub fn new(seed: u64) -> Self {
        Self { philox: Philox::new(seed), seed }
    }

    /// The numbers from `start` on of weight `index`.
    pub fn fill(&self, index: usize, name: &str, shape: &[usize], start: usize, out: &mut [bf16]) {
        let distribution = Distribution::of(name, shape);
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
            let mut normals = [0.0; CHUNK];
            let normals = &mut normals[..out.len()];
            self.philox.fill_normal(index as u64, (start + i * CHUNK) as u64, normals);
            out.iter_mut().zip(normals).for_each(|(o, n)| *o = distribution.value(*n));
        });
    }

    /// A whole weight on a device.
    fn tensor(
        &self,
        index: usize,
        name: &str,
        shape: &[usize],
        device: Device,
        dtype: Dtype,
    ) -> Result<Tensor> {
        let numel = shape.iter().product();
        if device == Device::Cpu {
            let mut values = vec![bf16::ZERO; numel];
            self.fill(index, name, shape, 0, &mut values);
            return Ok(Tensor::build(shape, |out| {
                out.par_iter_mut().zip(&values).for_each(|(o, v)| *o = v.to_f32());
            }));
        }
        let Distribution { mean, deviation } = Distribution::of(name, shape);
        let tape = Tape::inference();
        let normals = Var::constant(noise_window(device, self.seed, index, 0, 1, numel, 1)?);
        let mut values = scale(&tape, &normals, deviation)?;
        if mean != 0.0 {
            let mean = values.value().full_like(values.shape(), mean)?;
            values = add(&tape, &values, &Var::constant(mean))?;
        }
        Ok(values.value().cast(Dtype::Bf16)?.cast(dtype)?.reshape(shape)?)
    }
}

impl Generator {
    /// A generator with random weights of sane sizes, made where `device` is, without a file: on a CUDA device in `dtype`, on the CPU
    /// in f32. The same seed gives the same weights everywhere, rounded to bf16 whatever the dtype.
    ///
    /// Its adapters do something, unlike those of [`Generator::new`]; they mean nothing.
    ///
    /// # Errors
    /// A bad config; a device that can't be used, or has not enough memory.
    pub fn random(config: GeneratorConfig, seed: u64, device: Device, dtype: Dtype) -> Result<Self> {
        device.check()?;
        let (weights, random) = (config.weights()?, RandomWeights::new(seed));
        let mut params = if device == Device::Cpu { ParamSet::zeros(&weights)? } else { ParamSet::new() };
        for (index, (name, shape)) in weights.iter().enumerate() {
            params.insert(name, random.tensor(index, name, shape, device, dtype)?);
        }
        Self::with(config, params)
    }
}
