use crate::{Error, Result};
use hywu_core::Dtype;
use hywu_kernels::{Device, Tensor};
use rayon::prelude::*;

/// What one training step works on: `instances` edits of `crops` crops each. Every crop of an instance shares its instruction, its
/// views and so its adapter; crops of one instance are consecutive.
#[derive(Clone, Debug)]
pub struct EditBatch {
    /// Number of instances I.
    pub instances: usize,
    /// Crops per instance K.
    pub crops: usize,
    /// The whole source picture, [I, 64, 64, 3].
    pub thumbnail: Tensor,
    /// A crop of the source at native resolution, [I, 64, 64, 3].
    pub detail: Tensor,
    /// Token ids, I * TEXT_LEN.
    pub text: Vec<u32>,
    /// Source crops, [I * K, c, c, 3].
    pub source: Tensor,
    /// The same crops of the true edit, [I * K, c, c, 3].
    pub target: Tensor,
    /// [`sizes_of_edits`] of these crops.
    pub edits: Vec<f32>,
    /// (y, x) of every pixel in the whole picture, -1..1: [I * K, c, c, 2].
    pub position: Tensor,
    /// Index of each instance's skill: in the table; the table's length for a combination of two (and for an own skill that is
    /// rehearsed); one more and on for the skills of the user's own.
    pub skills: Vec<usize>,
    /// The first so many instances rehearse what was learnt before: their target is only a placeholder, their source.
    pub rehearsed: usize,
    /// Seed of the step's noise.
    pub seed: u64,
}

/// How much each edit changes: mean((source - target)^2) of every crop, for `source` and `target` [crops, ..] on the CPU.
pub fn sizes_of_edits(source: &Tensor, target: &Tensor) -> Vec<f32> {
    let crops = source.shape().first().copied().unwrap_or(1);
    let size = (source.numel() / crops.max(1)).max(1);
    let mean = |(source, target): (&[f32], &[f32])| {
        let sum: f32 = source.iter().zip(target).map(|(s, t)| (s - t) * (s - t)).sum();
        sum / size as f32
    };
    source.data().par_chunks(size).zip(target.data().par_chunks(size)).map(mean).collect()
}

impl EditBatch {
    /// The same batch with its pictures on a device, in f32 there.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(self, device: Device) -> Result<Self> {
        let place = |x: &Tensor| x.to(device, Dtype::F32);
        Ok(Self {
            thumbnail: place(&self.thumbnail)?,
            detail: place(&self.detail)?,
            source: place(&self.source)?,
            target: place(&self.target)?,
            position: place(&self.position)?,
            ..self
        })
    }
    /// The first `count` views of [`crate::Backbone::condition`].
    pub fn views(&self, count: usize) -> Vec<&Tensor> {
        [&self.thumbnail, &self.detail].into_iter().take(count).collect()
    }

    /// The first `instances` of them alone, on the host.
    ///
    /// # Errors
    /// More than there are; those of a device that the batch lies on.
    pub fn first(&self, instances: usize) -> Result<Self> {
        if instances > self.instances {
            return Err(Error::Invalid(format!("{instances} of {} instances", self.instances)));
        }
        let entries = instances * self.crops;
        Ok(Self {
            instances,
            crops: self.crops,
            thumbnail: first(&self.thumbnail, instances)?,
            detail: first(&self.detail, instances)?,
            text: self.text[..self.text.len() / self.instances.max(1) * instances].to_vec(),
            source: first(&self.source, entries)?,
            target: first(&self.target, entries)?,
            edits: self.edits[..entries].to_vec(),
            position: first(&self.position, entries)?,
            skills: self.skills[..instances].to_vec(),
            rehearsed: self.rehearsed.min(instances),
            seed: self.seed,
        })
    }
}

/// The first `count` entries of a tensor [batch, ..], on the host.
pub(crate) fn first(x: &Tensor, count: usize) -> Result<Tensor> {
    let host = x.to_host()?;
    let mut shape = x.shape().to_vec();
    let entry: usize = shape.iter().skip(1).product();
    if let Some(batch) = shape.first_mut() {
        *batch = count;
    }
    Ok(Tensor::new(&shape, host.data()[..count * entry].to_vec())?)
}
