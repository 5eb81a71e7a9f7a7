//! Forward passes without gradients, of any size: the residual stream lies in memory, in f32, and each sub-layer takes as many of its rows
//! at a time as the memory allows. Sub-layers are independent of each other's rows (FORMAT.md section 8), so no result depends on that
//! number.

mod memory;
mod output;
mod pass;
mod weights;

pub use memory::Limits;
pub use output::{LayerTokens, Progress};

use crate::{Generator, GeneratorConfig, Result, config::Shape, generator::open_folder, mixing::Tables};
use hywu_core::{AdapterSpec, Checkpoint, Dtype};
use hywu_kernels::{Device, Tape, Tensor};
use memory::{Memory, Plan};
use std::{cell::OnceCell, path::Path};
use weights::Weights;

/// A generator that writes adapters: [`Generator`]'s weights as they are now, or those of a checkpoint that need not fit into memory.
///
/// On a CUDA device it computes in the weights' dtype, with the residual stream and the norms in f32 as the published pipeline has them;
/// on the CPU all is f32.
pub struct Inference {
    config: GeneratorConfig,
    spec: AdapterSpec,
    shape: Shape,
    weights: Weights,
    limits: Limits,
    tables: Tables,
    /// The stream after what does not depend on the condition, [N * S, d] in f32; kept where that is wanted.
    start: Option<OnceCell<Tensor>>,
}

impl Generator {
    /// Its forward pass without gradients, with the weights as they are now, in the memory that is free now.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn inference(&self) -> Result<Inference> {
        let weights = Weights::resident(self.params.bind(&Tape::inference(), false)?);
        let inference = Inference::new(self.config.clone(), weights, Limits::default())?;
        // Weights count, though they are there already.
        let held = inference.planned(1, 1).weights(&self.config, None)?;
        let memory = inference.weights.device().available_memory()?.saturating_add(held);
        Ok(Inference { limits: Limits { memory: Some(memory), rows: None }, ..inference })
    }
}

impl Inference {
    /// Opens a checkpoint folder for batches of up to `batch` conditions of up to `length` tokens, to compute in `dtype` on `device` (the
    /// CPU computes in f32).
    ///
    /// Its weights are read from the files as they are used, and not kept, on the CPU always, on a CUDA device where they don't
    /// fit beside the rest: then those of the next sub-layer come while one is computed.
    ///
    /// # Errors
    /// Anything missing, damaged, unused or of the wrong shape; a device that can't be used; [`Memory`](crate::Error::Memory), with the least that is
    /// enough, when `limits` are below it.
    pub fn open(
        folder: impl AsRef<Path>,
        device: Device,
        dtype: Dtype,
        limits: Limits,
        (batch, length): (usize, usize),
    ) -> Result<Self> {
        let (config, checkpoint) = open_folder(folder.as_ref())?;
        Self::from_checkpoint(config, checkpoint, device, dtype, limits, (batch, length))
    }

    /// As [`Inference::open`], of a config and a checkpoint.
    ///
    /// # Errors
    /// As [`Inference::open`].
    pub fn from_checkpoint(
        config: GeneratorConfig,
        checkpoint: Checkpoint,
        device: Device,
        dtype: Dtype,
        limits: Limits,
        (batch, length): (usize, usize),
    ) -> Result<Self> {
        device.check()?;
        hywu_kernels::check_header(&config.weights()?, &checkpoint, "")?;
        let shape = config.sizes()?.1;
        let memory = |streamed| {
            Memory::new(&config, shape, &Plan { device, dtype, streamed, keeping: false, batch, length })
        };
        let available = device.available_memory()?;
        let budget = match (limits.memory, device) {
            // What is free changes all the time there, and more can be had by swapping.
            (Some(memory), Device::Cpu) => memory,
            (Some(memory), Device::Cuda(_)) => memory.min(available),
            (None, _) => available,
        };
        let weights = if device != Device::Cpu && memory(false)?.least() <= budget {
            Weights::load(&config, &checkpoint, device, dtype)?
        } else {
            memory(true)?.check(budget)?;
            Weights::streamed(&config, checkpoint, device, dtype)?
        };
        Self::new(config, weights, Limits { memory: Some(budget), ..limits })
    }

    fn new(config: GeneratorConfig, weights: Weights, limits: Limits) -> Result<Self> {
        let (spec, shape) = config.sizes()?;
        let tables = Tables::new(&config, shape, weights.device())?;
        Ok(Self { config, spec, shape, weights, limits, tables, start: None })
    }

    /// Keeps what the first two sub-layers make, which no condition changes: later passes leave them out. It takes the memory of a residual
    /// stream, 2.9 GB for the published generator, within the limits: a pass that does not fit beside it is an error.
    pub fn keeping_start(self) -> Self {
        Self { start: Some(OnceCell::new()), ..self }
    }

    /// A pass over a batch of conditions of so many tokens.
    fn planned(&self, batch: usize, length: usize) -> Plan {
        Plan {
            device: self.weights.device(),
            dtype: self.weights.dtype(),
            streamed: self.weights.is_streamed(),
            keeping: self.start.is_some(),
            batch,
            length,
        }
    }
    /// Rows at a time for every sub-layer of such a pass.
    ///
    /// # Errors
    /// [`Memory`](crate::Error::Memory) when it needs more than the limits.
    fn rows(&self, batch: usize, length: usize) -> Result<[usize; 4]> {
        Memory::new(&self.config, self.shape, &self.planned(batch, length))?.rows(self.limits)
    }

    /// Sizes and map.
    pub fn config(&self) -> &GeneratorConfig {
        &self.config
    }
    /// The modules that it writes an adapter for.
    pub fn spec(&self) -> &AdapterSpec {
        &self.spec
    }
    /// Are the weights read from their file as they are used?
    pub fn is_streamed(&self) -> bool {
        self.weights.is_streamed()
    }
}
