//! A generator that learns on: the model as it was keeps its place, or is its teacher, or both.

use super::config::ExtensionConfig;
use crate::{generators::Generators, model::ModelInfo};
use anyhow::Result;
use hywu_core::{AdapterSpec, Dtype};
use hywu_diffusion::{Backbone, EditBatch, Lesson, MiniDownstream};
use hywu_generator::Generator;
use hywu_kernels::{Device, Downstream, LoraVars, Tape, Tensor, Var};

/// The frozen backbone, and the model's generators before it learns more. What training takes is a batch whose rehearsed instances
/// these have answered.
pub struct Rehearsal {
    /// Never changed by training through it.
    pub downstream: MiniDownstream,
    /// Never changed either.
    pub teacher: Generators,
    /// What of them is kept.
    pub extension: ExtensionConfig,
}

/// A [`Lesson`] with the condition of its instances, which teacher and learner share.
pub struct Taught {
    lesson: Lesson,
    condition: Tensor,
}

impl Rehearsal {
    /// The batch with the teacher's answers; nothing here leaves a gradient.
    ///
    /// # Errors
    /// A batch that does not fit the backbone; those of the device.
    pub fn lesson(&self, batch: &EditBatch) -> Result<Taught> {
        let condition = self.downstream.condition(batch)?;
        let mut adapters = LoraVars::none();
        let backbone = &self.downstream.backbone;
        if batch.rehearsed > 0 {
            let host = condition.to_host()?;
            let mut shape = condition.shape().to_vec();
            shape[0] = batch.rehearsed;
            let old = Tensor::new(&shape, host.data()[..shape.iter().product()].to_vec())?;
            let ids = &batch.text[..batch.rehearsed * backbone.config.text_len];
            let answer = self.teacher.answer(backbone, &old, ids)?;
            adapters =
                LoraVars::from_adapter(&answer, 1.0).to(backbone.params.device(), backbone.params.dtype())?;
        }
        Ok(Taught { lesson: self.downstream.lesson(batch, &adapters, self.extension.weight)?, condition })
    }

    /// The number that the learner has among the generators of the model that comes out, from 1 on.
    pub fn number(&self) -> usize {
        if self.extension.grow { self.teacher.all().len() + 1 } else { 1 }
    }

    /// The generators of the model that comes out, on the CPU; `info` tells who knows what.
    ///
    /// # Errors
    /// As [`Generators::new`]; those of the device.
    pub fn outcome(&self, learner: Generator, info: &ModelInfo, backbone: &Backbone) -> Result<Generators> {
        let mut all = Vec::new();
        if self.extension.grow {
            for generator in self.teacher.all() {
                all.push(generator.to(Device::Cpu, Dtype::F32)?);
            }
        }
        all.push(learner);
        Generators::new(all, info, backbone)
    }

    /// The same on a device, computing in `dtype` there.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        Ok(Self {
            downstream: self.downstream.to(device, dtype)?,
            // As the learner's: were it rounded otherwise, a learner that has learnt nothing would differ.
            teacher: self.teacher.to_mixed(device, dtype)?,
            extension: self.extension,
        })
    }
}

impl Downstream for Rehearsal {
    type Batch = Taught;

    fn adapter_spec(&self) -> &AdapterSpec {
        self.downstream.adapter_spec()
    }

    fn condition(&self, batch: &Taught) -> hywu_kernels::Result<Tensor> {
        Ok(batch.condition.clone())
    }

    fn loss(&self, tape: &Tape, batch: &Taught, adapters: &LoraVars) -> hywu_kernels::Result<Var> {
        self.downstream.lesson_loss(tape, &batch.lesson, adapters)
    }
}
