//! A generator that learns on without forgetting: itself as it was is its teacher.

use anyhow::Result;
use hywu_core::{AdapterSpec, Dtype};
use hywu_diffusion::{EditBatch, Lesson, MiniDownstream};
use hywu_generator::Generator;
use hywu_kernels::{Device, Downstream, LoraVars, Tape, Tensor, Var};

/// The frozen backbone, and the generator before it learns more. What training takes is a batch whose rehearsed instances this
/// generator has answered.
pub struct Rehearsal {
    /// Never changed by training through it.
    pub downstream: MiniDownstream,
    /// Never changed either.
    pub teacher: Generator,
    /// Factor on the loss of what is rehearsed.
    pub weight: f32,
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
        if batch.rehearsed > 0 {
            let tape = Tape::inference();
            let bound = self.teacher.params.bind(&tape, false)?;
            let host = condition.to_host()?;
            let mut shape = condition.shape().to_vec();
            shape[0] = batch.rehearsed;
            let old = Tensor::new(&shape, host.data()[..shape.iter().product()].to_vec())?;
            adapters = self.teacher.forward(&tape, &bound, &old)?;
        }
        Ok(Taught { lesson: self.downstream.lesson(batch, &adapters, self.weight)?, condition })
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
            weight: self.weight,
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
