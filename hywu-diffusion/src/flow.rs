//! Flow matching between noise (t = 0) and image (t = 1): x_t = t * x + (1 - t) * noise (rectified flow, arXiv 2209.03003).

use crate::{Backbone, EditBatch, Error, Result};
use hywu_core::{Dtype, Philox};
use hywu_kernels::{
    Bound, LoraVars, Tape, Tensor, Var,
    ops::{loss::weighted_mse, noise::noised},
};

/// t = sigmoid(N(mean, 1)) (logit-normal, arXiv 2403.03206 section 3.1), but 0 for a share of the batch: an edit is decided where
/// x_t tells nothing yet, while at greater t the noisy target gives it away and the instruction need not be read.
const LOGIT_MEAN: f32 = -0.8;
/// Share of t = 0.
const START_SHARE: f32 = 0.5;
/// The weight 1 / (1 - t)^2, which turns an error of x_hat into one of the velocity, is held down near the image.
const LEAST_REST: f32 = 0.5;
/// Stream of the timesteps; the noise of batch entry b is stream b + 1.
const TIMESTEPS: u64 = 0;
/// Where in that stream the draws for t = 0 stand.
const STARTS: u64 = 1 << 32;

/// Noisy targets of a training step.
#[derive(Clone, Debug)]
pub struct Noised {
    /// Like the target.
    pub x_t: Tensor,
    /// Timestep per batch entry.
    pub t: Vec<f32>,
    /// Loss weight per batch entry: 1 / max(1 - t, 0.5)^2.
    pub weight: Vec<f32>,
}

impl Noised {
    /// Draws timesteps and noise for `target` [batch, ..]; they depend on `seed` and the place in the batch alone.
    ///
    /// # Errors
    /// Not enough memory on a device.
    pub fn draw(target: &Tensor, seed: u64) -> Result<Self> {
        let philox = Philox::new(seed);
        let batch = target.shape().first().copied().unwrap_or(1);
        let timestep = |b: u64| match philox.uniform(TIMESTEPS, STARTS + b) < START_SHARE {
            true => 0.0,
            false => 1.0 / (1.0 + (-(philox.normal(TIMESTEPS, b) + LOGIT_MEAN)).exp()),
        };
        let t: Vec<f32> = (0..batch as u64).map(timestep).collect();
        let weight = t.iter().map(|t| (1.0 - t).max(LEAST_REST).powi(-2)).collect();
        Ok(Self { x_t: noised(target, &t, seed)?, t, weight })
    }

    /// As [`Noised::draw`] for a batch whose true edits are `target`, the weight divided by the size of the edit,
    /// sqrt(mean((source - target)^2) + 0.02): that keeps the drastic ones (a negative, a sketch) from drowning the subtle ones.
    ///
    /// # Errors
    /// As [`Noised::draw`]; a batch with the sizes of another number of edits than it has crops.
    pub fn edits(batch: &EditBatch, target: &Tensor) -> Result<Self> {
        let mut noised = Self::draw(target, batch.seed)?;
        let Self { weight, .. } = &mut noised;
        if batch.edits.len() != weight.len() {
            let what =
                format!("a batch of {} crops has the sizes of {} edits", weight.len(), batch.edits.len());
            return Err(Error::Invalid(what));
        }
        weight.iter_mut().zip(&batch.edits).for_each(|(weight, edit)| *weight /= (edit + LEAST_EDIT).sqrt());
        Ok(noised)
    }
}

/// Added to the size of an edit, so that keeping a picture is a finite goal.
const LEAST_EDIT: f32 = 0.02;

/// The training loss: mean over the batch of weight * mean((x_hat - target)^2), weighted as [`Noised::edits`] says.
///
/// `bound` decides whether the backbone's weights are trained; the adapters (none, or one per instance) bring their own
/// variables.
///
/// # Errors
/// A batch that does not fit the backbone, or adapters that don't cover it.
pub fn flow_loss(
    tape: &Tape,
    backbone: &Backbone,
    bound: &Bound,
    batch: &EditBatch,
    adapters: &LoraVars,
) -> Result<Var> {
    let target = batch.target.to(bound.device(), Dtype::F32)?;
    let noised = Noised::edits(batch, &target)?;
    flow_loss_towards(tape, backbone, bound, batch, adapters, &noised, &target)
}

/// As [`flow_loss`] where what is predicted from (`noised`) and what the prediction is held against (`goal`, like the target, on the
/// device) need not be one picture.
///
/// # Errors
/// As [`flow_loss`].
pub fn flow_loss_towards(
    tape: &Tape,
    backbone: &Backbone,
    bound: &Bound,
    batch: &EditBatch,
    adapters: &LoraVars,
    noised: &Noised,
    goal: &Tensor,
) -> Result<Var> {
    let Noised { x_t, t, weight } = noised;
    let text = backbone.text_tokens(tape, bound, &batch.text, batch.instances)?;
    let x_hat = backbone.predict(tape, bound, x_t, &batch.source, &batch.position, t, &text, adapters)?;
    Ok(weighted_mse(tape, &x_hat, goal, weight)?)
}
