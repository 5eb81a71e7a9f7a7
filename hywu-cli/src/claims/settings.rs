//! The TOML file of `hywu eval claims`.

use crate::train::{AdapterConfig, DataConfig, TrainConfig};
use anyhow::{Context, Result, anyhow, ensure};
use hywu_diffusion::{BatchShape, SampleOptions, skills::Skill};
use hywu_kernels::optim::Schedule;
use serde::{Deserialize, Serialize};
use std::path::Path;

use super::report::Method;

/// What is trained and measured; see `assets/configs/claims.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Pairs of skills that contradict each other, by name. All of them together are the skills that are trained and measured.
    pub pairs: Vec<[String; 2]>,
    /// Every method is trained once for each: the seed of its fresh weights, of its data and its noise.
    pub seeds: Vec<u64>,
    /// Steps of every training.
    pub steps: u64,
    /// Edits a step.
    pub instances: usize,
    /// Crops of each.
    pub crops: usize,
    /// Side of a crop in pixels.
    pub crop: usize,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// What the optimisers have in common.
    pub optimizer: Care,
    /// Learning rates to choose from.
    pub rates: Rates,
    /// Rank and alpha of the adapters, sizes of the generator.
    pub generator: AdapterConfig,
    /// How it is measured.
    pub measure: Measure,
    /// The backbone to train first and to freeze then (in the measurement's folder, resumed like the rest): one that does not know
    /// the skills of `pairs`. Without it a model's is taken.
    pub backbone: Option<TrainConfig>,
}

/// What the optimisers of all methods have in common. They warm up over a tenth of the steps, and fall along half a cosine to a
/// hundredth of their peak.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Care {
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Greatest gradient norm.
    pub clip: f64,
    /// Decay of the averaged weights, which are the ones that edit.
    pub ema: f32,
}

/// Peak learning rates that are tried. A method with a single one is not swept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Of the shared LoRA of equal rank.
    pub shared_lora: Sweep,
    /// Of the shared LoRA of equal parameters.
    pub wide_lora: Sweep,
    /// Of full fine-tuning.
    pub full: Sweep,
    /// Of the bank of LoRAs, a skill each.
    pub bank: Sweep,
    /// Of the generator.
    pub hywu: Sweep,
}

/// A search for one method's learning rate: each rate for so many steps, with the first seed; the lowest loss on the validation photos
/// wins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// Peak rates.
    pub peaks: Vec<f32>,
    /// Steps of each try.
    pub steps: u64,
}

/// How it is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// Test photos are cut square and scaled to this side, in pixels.
    pub side: usize,
    /// Steps of the sampler.
    pub steps: usize,
    /// Side of its tiles in pixels.
    pub tile: usize,
    /// Batches of the validation loss.
    pub validation_batches: u64,
    /// Batches behind each skill's gradient.
    pub conflict_batches: u64,
    /// Generated adapters that are kept of each skill.
    pub adapters: usize,
    /// Times that every test photo is damaged, to see what adapters tell of the damage.
    pub draws: usize,
    /// Test photos that the choice of the skill is judged on.
    pub routed_photos: usize,
    /// Steps for each group of skills where they arrive one after the other; 0 leaves that out.
    #[serde(default)]
    pub forgetting_steps: u64,
    /// Resamples behind every interval.
    pub resamples: usize,
}

impl Settings {
    /// The full measurement, about an hour on two cores.
    pub const FULL: &str = include_str!("../../../assets/configs/claims.toml");
    /// The one of about twelve minutes on two cores.
    pub const QUICK: &str = include_str!("../../../assets/configs/claims-quick.toml");

    /// Reads and checks a file.
    ///
    /// # Errors
    /// A file that can't be read, unknown or missing keys, numbers that can't work; each with its name.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(|e| hywu_core::Error::io(file, e))?;
        Self::parse(&text).with_context(|| file.display().to_string())
    }

    /// As [`Settings::read`], from text.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let settings: Self = toml::from_str(text).map_err(|e| anyhow!(e.message().to_owned()))?;
        settings.validate()?;
        Ok(settings)
    }

    fn validate(&self) -> Result<()> {
        ensure!(!self.pairs.is_empty(), "pairs is empty; at least one pair of skills is needed");
        for name in self.pairs.iter().flatten() {
            ensure!(Skill::find(name).is_some(), "pairs: no skill is called {name:?}");
        }
        for [a, b] in &self.pairs {
            ensure!(a != b, "pairs: {a:?} can't contradict itself");
        }
        ensure!(!self.seeds.is_empty(), "seeds is empty; at least one is needed");
        let m = &self.measure;
        for (name, value) in [
            ("steps", self.steps),
            ("checkpoint_every", self.checkpoint_every),
            ("measure.validation_batches", m.validation_batches),
            ("measure.conflict_batches", m.conflict_batches),
            ("measure.adapters", m.adapters as u64),
            ("measure.draws", m.draws as u64),
            ("measure.routed_photos", m.routed_photos as u64),
            ("measure.resamples", m.resamples as u64),
        ] {
            ensure!(value >= 1, "{name} is 0; it must be at least 1");
        }
        self.shape().validate()?;
        let c = &self.optimizer;
        ensure!(c.clip > 0.0, "optimizer.clip is {}; it must be above 0", c.clip);
        ensure!((0.0..1.0).contains(&c.ema), "optimizer.ema is {}; it must be in 0..1", c.ema);
        ensure!(
            c.weight_decay.is_finite() && c.weight_decay >= 0.0,
            "optimizer.weight_decay is {}; it must be a number from 0 up",
            c.weight_decay
        );
        let Rates { shared_lora, wide_lora, full, bank, hywu } = &self.rates;
        for sweep in [shared_lora, wide_lora, full, bank, hywu] {
            let fine = sweep.peaks.iter().all(|lr| lr.is_finite() && *lr > 0.0);
            ensure!(
                fine && !sweep.peaks.is_empty() && sweep.steps >= 1,
                "rates: peaks {:?} over {} steps; at least one number above 0, and one step, are needed",
                sweep.peaks,
                sweep.steps
            );
        }
        ensure!((64..=1024).contains(&m.side), "measure.side is {}, expected 64..=1024", m.side);
        self.sample().validate().context("measure")?;
        if let Some(backbone) = &self.backbone {
            backbone.validate().context("backbone")?;
        }
        Ok(())
    }

    /// The names of all skills, each once, in the order of the pairs.
    pub fn skills(&self) -> Vec<String> {
        let mut skills: Vec<String> = Vec::new();
        for name in self.pairs.iter().flatten() {
            if !skills.contains(name) {
                skills.push(name.clone());
            }
        }
        skills
    }

    /// The sizes of a batch.
    pub fn shape(&self) -> BatchShape {
        BatchShape { instances: self.instances, crops: self.crops, crop: self.crop }
    }

    /// The same for the training's batches.
    pub fn data(&self) -> DataConfig {
        let Self { instances, crops, crop, .. } = *self;
        DataConfig { instances, crops, crop, large_every: 0, skills: self.skills(), sources: Vec::new() }
    }

    /// How edits are sampled.
    pub fn sample(&self) -> SampleOptions {
        SampleOptions { steps: self.measure.steps, ..SampleOptions::default() }.with_tile(self.measure.tile)
    }

    /// The search for a trained method's rate.
    pub fn sweep(&self, method: Method) -> Option<&Sweep> {
        match method {
            Method::None => None,
            Method::SharedLora => Some(&self.rates.shared_lora),
            Method::WideLora => Some(&self.rates.wide_lora),
            Method::Full => Some(&self.rates.full),
            Method::Oracle | Method::Routed => Some(&self.rates.bank),
            Method::Hywu => Some(&self.rates.hywu),
        }
    }
}

/// The learning rate over `total` steps.
pub fn schedule(peak: f32, total: u64) -> Schedule {
    Schedule { warmup: total / 10, total, peak, floor: peak / 100.0 }
}
