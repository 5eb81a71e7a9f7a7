//! The edit pipeline: photo + instruction -> condition -> adapter -> edited photo.

use crate::{
    cache::{AdapterCache, CacheKey},
    hash::of_picture,
    model::{Memory, Model},
    provenance::{GENERATOR, PROGRAM, stamp},
};
use anyhow::{Result, ensure};
use hywu_core::{Adapter, ApplyResult};
use hywu_diffusion::{Picture, SampleOptions, condition_of, edit_picture};
use hywu_generator::{Generator, Inference};
use hywu_kernels::{Device, LoraVars};
use rayon::prelude::*;
use std::{
    cell::OnceCell,
    fmt,
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
    /// Apply what fits of an adapter that does not cover the backbone, or is for more than it has ([`LoraVars::fit`]).
    pub partial: bool,
    /// Seed, steps, sampler and tiles.
    pub sample: SampleOptions,
}

impl Default for EditOptions {
    fn default() -> Self {
        Self { strength: 1.0, partial: false, sample: SampleOptions::default() }
    }
}

/// How an adapter came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The caller had it.
    Given,
    /// It is the model's one adapter for everything.
    Shared,
    /// The generator wrote it just now.
    Generated,
    /// The generator wrote it earlier, and the cache kept it.
    Cached,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given => "given",
            Self::Shared => "shared",
            Self::Generated => "generated",
            Self::Cached => "cached",
        })
    }
}

/// An adapter for an instance.
#[derive(Clone, Debug)]
pub struct Recalled {
    /// With its provenance in the metadata, if it was generated.
    pub adapter: Adapter,
    /// How it came about.
    pub origin: Origin,
    /// Where the cache failed, which costs time but no result.
    pub warnings: Vec<String>,
}

impl From<Adapter> for Recalled {
    /// The caller's own.
    fn from(adapter: Adapter) -> Self {
        Self { adapter, origin: Origin::Given, warnings: Vec::new() }
    }
}

/// A finished edit.
#[derive(Debug)]
pub struct Edit {
    /// The edited picture, as large as the source.
    pub picture: Picture,
    /// The adapter that made it; none at strength 0 and for a backbone only.
    pub adapter: Option<Recalled>,
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
    /// The model's generators at work, each from its first instance on: what it does for every condition alike is done once.
    inference: Vec<OnceCell<Inference>>,
    cache: Option<AdapterCache>,
}

impl Editor {
    /// Takes a loaded model.
    pub fn new(model: Model) -> Self {
        let generators = match &model.memory {
            Memory::Functional(generators) => generators.all().len(),
            Memory::None | Memory::Static(_) => 0,
        };
        Self { model, inference: (0..generators).map(|_| OnceCell::new()).collect(), cache: None }
    }

    /// Looks for adapters in a cache before it generates them, and keeps them there.
    pub fn with_cache(self, cache: AdapterCache) -> Self {
        Self { cache: Some(cache), ..self }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The model's adapter for this picture and instruction; none if the model is a backbone only. `seed` is that of the edit that it
    /// is for: provenance alone.
    ///
    /// # Errors
    /// An empty instruction, or one that is too long; an empty picture; those of the device.
    pub fn recall(&self, picture: &Picture, instruction: &str, seed: u64) -> Result<Option<Recalled>> {
        let generators = match &self.model.memory {
            Memory::None => return Ok(None),
            Memory::Static(adapter) => {
                let adapter = adapter.clone();
                return Ok(Some(Recalled { adapter, origin: Origin::Shared, warnings: Vec::new() }));
            }
            Memory::Functional(generators) => generators,
        };
        let ids = self.model.text.encode(instruction)?;
        let (chosen, generator) = generators.answering(&self.model.backbone, &ids)?;
        let source = of_picture(picture);
        let mut warnings = Vec::new();
        let kept = match &self.cache {
            Some(cache) => Some((cache, self.key(&source, &ids)?)),
            None => None,
        };
        let found = kept.as_ref().and_then(|(cache, key)| {
            cache.get(key).unwrap_or_else(|e| {
                warnings.push(format!("an adapter in the cache can't be used and is generated again: {e:#}"));
                None
            })
        });
        // Other words of the same tokens find the same entry, so what was asked is told anew.
        let stamp = |adapter: &mut Adapter| {
            stamp(adapter, &self.model, instruction, &source, seed);
            if generators.all().len() > 1 {
                adapter.metadata.insert(GENERATOR.into(), (chosen + 1).to_string());
            }
        };
        if let Some(mut adapter) = found {
            stamp(&mut adapter);
            return Ok(Some(Recalled { adapter, origin: Origin::Cached, warnings }));
        }
        let condition = condition_of(&self.model.backbone, picture, &ids)?;
        let mut adapter = self.inference(chosen, generator)?.generate(&condition)?;
        stamp(&mut adapter);
        if let Some((cache, key)) = kept
            && let Err(e) = cache.put(&key, &adapter)
        {
            warnings.push(format!("the adapter is not kept in the cache: {e:#}"));
        }
        Ok(Some(Recalled { adapter, origin: Origin::Generated, warnings }))
    }

    /// The model does not change while it is the editor's, so one of each generator, told by its place, serves all calls.
    fn inference(&self, place: usize, generator: &Generator) -> Result<&Inference> {
        if let Some(made) = self.inference[place].get() {
            return Ok(made);
        }
        let made = generator.inference()?.keeping_start();
        Ok(self.inference[place].get_or_init(|| made))
    }

    /// Of all that a generated adapter depends on, the arithmetic of the machine too, so that a hit has the bits of a fresh one.
    fn key(&self, source: &str, ids: &[u32]) -> Result<CacheKey> {
        let params = &self.model.backbone.params;
        let device = match params.device().properties()? {
            None => format!("cpu {}", hywu_kernels::simd_level()),
            Some(p) => format!("{} {:?} {:?}", p.name, p.capability, params.dtype()),
        };
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        Ok(CacheKey::of([PROGRAM, &self.model.hash, &device, source, &ids.join(" ")]))
    }

    /// Edits a picture with `adapter`, or with one generated for it. `progress(step, steps)` may stop the edit.
    ///
    /// # Errors
    /// An empty instruction, an adapter that does not fit the backbone ([`fit`]), a strength that is not finite;
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
            Some(given) => Some(Recalled::from(given.clone())),
            None if options.strength == 0.0 => None,
            None => self.recall(picture, instruction, options.sample.seed)?,
        };
        let mut loras = LoraVars::none();
        if let Some(Recalled { adapter, .. }) = &adapter {
            (loras, _) = fit(adapter, &self.model, options)?;
        }
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

/// The adapter of one instance as a model's backbone takes it, and how the two meet.
///
/// # Errors
/// An adapter of several instances; those of [`LoraVars::fit`].
pub fn fit(adapter: &Adapter, model: &Model, options: &EditOptions) -> Result<(LoraVars, ApplyResult)> {
    let instances = adapter.batch();
    ensure!(instances == 1, "the adapter holds {instances} instances; one is needed");
    let spec = model.backbone.adapter_spec(1, 1.0);
    Ok(LoraVars::fit(adapter, &spec, options.strength, options.partial)?)
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
