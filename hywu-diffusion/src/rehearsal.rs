//! Rehearsal: new adapters are held to what old adapters did.
//!
//! The examples that the old ones were learnt from are gone; what they make of a condition is not. So a teacher's adapters edit
//! whatever pictures there are, and the new ones must do the same there, as functions: the predictions x_hat of the adapted
//! backbone are compared, on equal noisy inputs, not the weights (the idea of deep generative replay, arXiv 1705.08690, with
//! the answers of distillation, arXiv 1606.09282).

use crate::{
    EditBatch, Error, MiniDownstream, Noised, Result,
    batch::{first, sizes_of_edits},
    flow_loss_towards,
    mini::kernel_error,
};
use hywu_core::Dtype;
use hywu_kernels::{LoraVars, Tape, Tensor, Var, ops::noise::noised};

/// A batch with the answers of a teacher.
pub struct Lesson {
    /// The batch; where it rehearses, the target is the teacher's edit.
    pub batch: EditBatch,
    noised: Noised,
    goal: Tensor,
}

impl MiniDownstream {
    /// Fills a batch's rehearsed instances with what `teacher`, the adapters of these instances, makes of them: from pure noise it
    /// predicts the edit, in one step; with that edit made noisy again as for any example, it predicts x_hat, which the learner's has
    /// to equal. `weight` is the factor on the loss there.
    ///
    /// # Errors
    /// Adapters that don't fit; a prediction that is not finite.
    pub fn lesson(&self, batch: &EditBatch, teacher: &LoraVars, weight: f32) -> Result<Lesson> {
        let (device, mut batch) = (self.backbone.params.device(), batch.clone());
        let old = batch.first(batch.rehearsed)?;
        let entries = old.instances * old.crops;
        if entries > 0 {
            let target = old.target.to(device, Dtype::F32)?;
            let start = vec![0.0; entries];
            let edit = self.predicted(&old, &noised(&target, &start, batch.seed)?, &start, teacher)?;
            batch.edits[..entries].copy_from_slice(&sizes_of_edits(&old.source, &edit));
            batch.target = overwritten(&batch.target, &edit)?;
        }
        let target = batch.target.to(device, Dtype::F32)?;
        let mut noised = Noised::edits(&batch, &target)?;
        if entries == 0 {
            return Ok(Lesson { batch, noised, goal: target });
        }
        noised.weight[..entries].iter_mut().for_each(|w| *w *= weight);
        let x_t = first(&noised.x_t, entries)?;
        let x_hat = self.predicted(&old, &x_t, &noised.t[..entries], teacher)?;
        let goal = overwritten(&batch.target, &x_hat)?.to(device, Dtype::F32)?;
        Ok(Lesson { batch, noised, goal })
    }

    /// The loss of adapters for all of a lesson's instances: that of training where it teaches something new, elsewhere weight *
    /// mean((x_hat - the teacher's x_hat)^2).
    ///
    /// # Errors
    /// Adapters that don't fit.
    pub fn lesson_loss(
        &self,
        tape: &Tape,
        lesson: &Lesson,
        adapters: &LoraVars,
    ) -> hywu_kernels::Result<Var> {
        let frozen = self.backbone.params.bind(tape, false)?;
        let Lesson { batch, noised, goal } = lesson;
        flow_loss_towards(tape, &self.backbone, &frozen, batch, adapters, noised, goal).map_err(kernel_error)
    }

    /// x_hat, without gradients, on the host.
    fn predicted(&self, batch: &EditBatch, x_t: &Tensor, t: &[f32], adapters: &LoraVars) -> Result<Tensor> {
        let tape = Tape::inference();
        let bound = self.backbone.params.bind(&tape, false)?;
        let text = self.backbone.text_tokens(&tape, &bound, &batch.text, batch.instances)?;
        let EditBatch { source, position, .. } = batch;
        let x_hat = self.backbone.predict(&tape, &bound, x_t, source, position, t, &text, adapters)?;
        let x_hat = x_hat.value().to_host()?;
        if x_hat.data().iter().any(|v| !v.is_finite()) {
            return Err(Error::Invalid(
                "the model that is rehearsed predicts values that are not finite".into(),
            ));
        }
        Ok(x_hat)
    }
}

/// A tensor [batch, ..] on the host, its first entries replaced by those of `part`.
fn overwritten(x: &Tensor, part: &Tensor) -> Result<Tensor> {
    let mut data = x.to_host()?.data().to_vec();
    data[..part.numel()].copy_from_slice(part.data());
    Ok(Tensor::new(x.shape(), data)?)
}
