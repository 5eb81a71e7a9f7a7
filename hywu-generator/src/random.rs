//! Random weights of a trained generator's sizes, for trying size and speed without a checkpoint.

use crate::{Error, Generator, GeneratorConfig, Progress, Result};
use half::bf16;
use hywu_core::{Dtype, Philox, TensorFile, TensorWriter, create_folder_atomic, write_atomic};
use hywu_kernels::{
    Device, ParamSet, Tape, Tensor, Var,
    ops::{
        elementwise::{add, scale},
        noise::noise_window,
    },
};
use rayon::prelude::*;
use serde_json::json;
use std::{collections::BTreeMap, ops::ControlFlow, path::Path};

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

/// Numbers that are drawn before they are written.
const PIECE: usize = 1 << 22;
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
    /// in f32. The same seed gives the same weights everywhere, rounded to bf16 whatever the dtype: those that
    /// [`write_random_checkpoint`] writes.
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

/// What [`write_random_checkpoint`] writes.
#[derive(Clone, Copy, Debug)]
pub struct RandomCheckpoint<'a> {
    /// Sizes and map.
    pub config: &'a GeneratorConfig,
    /// The same seed gives the same files.
    pub seed: u64,
    /// Tokens of the condition that comes along.
    pub condition: usize,
    /// Most bytes of a shard, unless one tensor has more.
    pub shard: u64,
}

/// A shard in the making: the weights in it by their place in [`GeneratorConfig::weights`].
struct Shard {
    file: String,
    weights: Vec<usize>,
}

/// Writes a folder as published generators are: `config.json`, bf16 weights in `model.safetensors` or in shards with their index, and
/// beside them `condition.safetensors`, a random condition. The folder appears when all is written, or not at all. Weights come in the
/// order in which a pass uses them; `progress` counts bytes.
///
/// # Errors
/// A bad config; something other than an empty folder that stands at `folder`; a disk without room for it; [`Error::Interrupted`] when
/// `progress` breaks.
pub fn write_random_checkpoint(
    what: &RandomCheckpoint<'_>,
    folder: impl AsRef<Path>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<()> {
    let folder = folder.as_ref();
    let weights = what.config.weights()?;
    create_folder_atomic(folder, |made| {
        what.write(&weights, made, progress).map_err(|e| match e {
            Error::Core(hywu_core::Error::Io { path, cause }) => {
                let there = path.strip_prefix(made).map(|file| folder.join(file));
                hywu_core::Error::io(there.unwrap_or(path), cause).into()
            }
            other => other,
        })
    })
}

impl RandomCheckpoint<'_> {
    fn write(
        &self,
        weights: &[(String, Vec<usize>)],
        folder: &Path,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let numel = |index: usize| weights[index].1.iter().product::<usize>();
        let metadata: BTreeMap<_, _> = [("format".to_owned(), "pt".to_owned())].into();
        let shards = self.shards(weights);
        // All of them at once: if the disk has no room, that is known before any work is done.
        let mut files = Vec::new();
        for shard in &shards {
            let tensors =
                shard.weights.iter().map(|&i| (weights[i].0.clone(), Dtype::Bf16, weights[i].1.clone()));
            files.push(TensorFile::create(folder.join(&shard.file), tensors, &metadata)?);
        }
        let total: usize = (0..weights.len()).map(numel).sum();
        let (random, mut done) = (RandomWeights::new(self.seed), 0);
        let mut values = Vec::new();
        for (shard, mut file) in shards.iter().zip(files) {
            for &i in &shard.weights {
                let (name, shape) = &weights[i];
                for start in (0..numel(i)).step_by(PIECE) {
                    values.resize(PIECE.min(numel(i) - start), bf16::ZERO);
                    random.fill(i, name, shape, start, &mut values);
                    file.put_bf16(name, start, &values)?;
                    done += values.len();
                    let at = Progress { done: 2.0 * done as f64, total: 2.0 * total as f64 };
                    if progress(at).is_break() {
                        return Err(Error::Interrupted);
                    }
                }
            }
            file.finish()?;
        }
        if shards.len() > 1 {
            let pairs =
                shards.iter().flat_map(|s| s.weights.iter().map(|&i| (weights[i].0.clone(), s.file.clone())));
            let map: BTreeMap<_, _> = pairs.collect();
            let sizes = json!({"total_parameters": total, "total_size": 2 * total});
            write_json(
                &folder.join("model.safetensors.index.json"),
                &json!({"metadata": sizes, "weight_map": map}),
            )?;
        }
        let mut config =
            serde_json::to_value(self.config).map_err(|e| hywu_core::Error::Config(e.to_string()))?;
        config["model_type"] = "parameter_generator".into();
        config["dtype"] = "bfloat16".into();
        write_json(&folder.join("config.json"), &config)?;
        let shape = [1, 1, self.condition, self.config.input_dim];
        let mut condition = vec![0.0; shape.iter().product()];
        // A stream that no weight has.
        random.philox.fill_normal(u64::MAX, 0, &mut condition);
        let mut file = TensorWriter::new();
        file.add("condition", &shape, &condition, Dtype::F32);
        Ok(file.write(folder.join("condition.safetensors"))?)
    }

    /// Which weights go where: those outside of blocks, then one block after the other.
    fn shards(&self, weights: &[(String, Vec<usize>)]) -> Vec<Shard> {
        let block = |name: &str| -> Option<usize> {
            name.strip_prefix("model.blocks.")?.split('.').next()?.parse().ok()
        };
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by_key(|&i| block(&weights[i].0));
        let mut shards: Vec<Vec<usize>> = Vec::new();
        let mut room = 0;
        for i in order {
            let bytes = 2 * weights[i].1.iter().product::<usize>() as u64;
            if shards.is_empty() || bytes > room {
                shards.push(Vec::new());
                room = self.shard;
            }
            room = room.saturating_sub(bytes);
            if let Some(last) = shards.last_mut() {
                last.push(i);
            }
        }
        let count = shards.len();
        let file = |i: usize| match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        shards.into_iter().enumerate().map(|(i, weights)| Shard { file: file(i), weights }).collect()
    }
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    Ok(write_atomic(path, |w| w.write_all(format!("{value:#}\n").as_bytes()))?)
}
