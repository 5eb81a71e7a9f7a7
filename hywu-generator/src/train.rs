//! End-to-end training: the generator learns from the loss of the frozen model that its adapters are put into.

use crate::{Generator, Result};
use hywu_kernels::{
    Downstream, Tape,
    optim::{Optimizer, StepStats},
};

/// What a training step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainStats {
    /// The loss before the step.
    pub loss: f32,
    /// Learning rate and gradient norm.
    pub step: StepStats,
}

/// One step: condition -> adapters -> loss of the downstream model -> gradients of the generator's weights -> update. The
/// downstream model is only read.
///
/// # Errors
/// Errors of the downstream model and of the ops; a gradient that is not finite (nothing is changed then).
pub fn train_step<D: Downstream>(
    generator: &mut Generator,
    downstream: &D,
    batch: &D::Batch,
    optimizer: &mut Optimizer,
) -> Result<TrainStats> {
    let condition = downstream.condition(batch)?;
    let tape = Tape::new();
    let bound = generator.params.bind(&tape, true)?;
    let adapters = generator.forward(&tape, &bound, &condition)?;
    let loss = downstream.loss(&tape, batch, &adapters)?;
    let value = loss.value().clone();
    let mut grads = tape.backward(&loss)?;
    let grads = bound.take_grads(&mut grads)?;
    drop((bound, adapters, loss));
    let step = optimizer.step(&mut generator.params, &grads)?;
    // Only now, when all has been launched: to read it waits for a device.
    Ok(TrainStats { loss: value.item()?, step })
}
