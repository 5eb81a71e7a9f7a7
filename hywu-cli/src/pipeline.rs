//! The edit pipeline: photo + instruction -> condition -> adapter -> edited photo.

use crate::model::{Memory, Model, fnv1a};
use anyhow::{Context, Result, bail, ensure};
use hywu_core::Adapter;
use hywu_diffusion::{Picture, SampleOptions, condition_of, edit_picture};
use hywu_kernels::{Device, LoraVars};
use rayon::prelude::*;
use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

/// A device has more to do at once than the CPU: so many times the tiles of a batch.
const DEVICE_BATCH: usize = 16;

/// How an edit is made.
#[derive(Clone, Debug)]
pub struct EditOptions {
    /// Factor on the adapter's scale; 0 gives the backbone's own output bit for bit.
    pub strength: f32,
    /// Seed, steps, sampler and tiles.
    pub sample: SampleOptions,
}

impl Default for EditOptions {
    fn default() -> Self {
        Self { strength: 1.0, sample: SampleOptions::default() }
    }
}

/// A finished edit.
#[derive(Debug)]
pub struct Edit {
    /// The edited picture, as large as the source.
    pub picture: Picture,
    /// The adapter that made it; none at strength 0 and for a backbone only.
    pub adapter: Option<Adapter>,
    /// Time for text, condition and generator.
    pub generating: Duration,
    /// Time for sampling.
    pub sampling: Duration,
    /// Mean absolute change of a channel value, in 8-bit steps (0..=255): near 0 means that the edit did nothing.
    pub change: f64,
}

/// Edits pictures with one model.
pub struct Editor {
    model: Model,
}

impl Editor {
    /// Takes a loaded model.
    pub fn new(model: Model) -> Self {
        Self { model }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The adapter for this picture and instruction; a generated one has its provenance in the metadata.
    ///
    /// # Errors
    /// An empty instruction, or a model that is a backbone only.
    pub fn adapter(&self, picture: &Picture, instruction: &str) -> Result<Adapter> {
        let ids = self.model.text.encode(instruction)?;
        let adapter = self.remember(picture, instruction, &ids)?;
        adapter.context("this model has no adapters: it is a backbone only")
    }

    fn remember(&self, picture: &Picture, instruction: &str, ids: &[u32]) -> Result<Option<Adapter>> {
        let generator = match &self.model.memory {
            Memory::None => return Ok(None),
            Memory::Static(adapter) => return Ok(Some(adapter.clone())),
            Memory::Functional(generator) => generator,
        };
        let condition = condition_of(&self.model.backbone, picture, ids)?;
        let mut adapter = generator.generate(&condition)?;
        adapter.metadata.extend([
            ("instruction".into(), instruction.into()),
            ("model".into(), self.model.info.name.clone()),
            ("model_hash".into(), self.model.hash.clone()),
            ("source_hash".into(), source_hash(picture)),
            ("program".into(), format!("hywu {}", env!("CARGO_PKG_VERSION"))),
        ]);
        Ok(Some(adapter))
    }

    /// Edits a picture with `adapter`, or with one generated for it. `progress(step, steps)` may stop the edit.
    ///
    /// # Errors
    /// An empty instruction, an adapter that does not fit the backbone, a strength that is not finite;
    /// [`hywu_diffusion::Error::Interrupted`] when `progress` says so.
    pub fn edit(
        &self,
        picture: &Picture,
        instruction: &str,
        adapter: Option<&Adapter>,
        options: &EditOptions,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Edit> {
        ensure!(options.strength.is_finite(), "strength {} is not a finite number", options.strength);
        let start = Instant::now();
        let ids = self.model.text.encode(instruction)?;
        let adapter = match adapter {
            Some(given) => Some(given.clone()),
            None if options.strength == 0.0 => None,
            None => self.remember(picture, instruction, &ids)?,
        };
        if let Some(adapter) = &adapter
            && adapter.batch() != 1
        {
            bail!("the adapter holds {} instances; one is needed", adapter.batch());
        }
        let loras =
            adapter.as_ref().map_or_else(LoraVars::none, |a| LoraVars::from_adapter(a, options.strength));
        let params = &self.model.backbone.params;
        let loras = loras.to(params.device(), params.dtype())?;
        let generating = start.elapsed();
        let start = Instant::now();
        let mut sample = options.sample.clone();
        if params.device() != Device::Cpu {
            sample.batch = sample.batch.saturating_mul(DEVICE_BATCH);
        }
        let edited = edit_picture(&self.model.backbone, picture, &ids, &loras, &sample, progress)?;
        let change = distance(&edited.rgb, &picture.rgb) * 127.5 / picture.rgb.len().max(1) as f64;
        Ok(Edit { picture: edited, adapter, generating, sampling: start.elapsed(), change })
    }
}

/// Values that a parallel task works on; fixed, so that sums don't depend on the number of threads.
const CHUNK: usize = 1 << 16;

/// Sum of the absolute differences.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let part =
        |(a, b): (&[f32], &[f32])| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).sum() };
    let parts: Vec<f64> = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).map(part).collect();
    parts.iter().sum()
}

/// FNV-1a over those of the picture's parts: tells pictures apart in an adapter's provenance, no more.
fn source_hash(picture: &Picture) -> String {
    let part = |values: &[f32]| fnv1a(values.iter().map(|v| v.to_bits()));
    let parts: Vec<u64> = picture.rgb.par_chunks(CHUNK).map(part).collect();
    format!("{:016x}", fnv1a(parts.into_iter().flat_map(|h| [h as u32, (h >> 32) as u32])))
}
