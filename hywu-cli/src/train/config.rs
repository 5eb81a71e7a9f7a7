//! The TOML file of a training run.

use anyhow::{Context, Result, ensure};
use hywu_core::{Dtype, Module, read_text};
use hywu_diffusion::{Backbone, BackboneConfig, BatchShape};
use hywu_generator::GeneratorConfig;
use hywu_kernels::optim::Schedule;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A training run; see `assets/configs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Name of the model that comes out.
    pub name: String,
    /// Model folder that the run starts from: needed for generator, lora and full; not used for backbone.
    pub start_from: Option<PathBuf>,
    /// Steps in all.
    pub steps: u64,
    /// Seed of weights, data and noise.
    pub seed: u64,
    /// A row of the log for so many steps.
    #[serde(default = "ten")]
    pub log_every: u64,
    /// Steps between checkpoints.
    #[serde(default = "hundred")]
    pub checkpoint_every: u64,
    /// Type of the weights in `model/`: f32, f16 or bf16. The run itself keeps f32.
    #[serde(default)]
    pub save_as: SaveAs,
    /// For backbone: steps in which the text tower alone learns to name what an instruction asks for, before the first step.
    #[serde(default)]
    pub text_steps: u64,
    /// For backbone: the text tower stays as these steps leave it. Else it forgets to tell instructions apart that `data.skills` do
    /// not ask for.
    #[serde(default)]
    pub freeze_text: bool,
    /// What a step sees.
    pub data: DataConfig,
    /// How it learns.
    pub optimizer: OptimizerConfig,
    /// Sizes, for backbone.
    #[serde(default)]
    pub backbone: BackboneConfig,
    /// Sizes, for generator; rank and alpha, for lora. Not used with `extension`.
    #[serde(default)]
    pub generator: AdapterConfig,
    /// For generator: the model of `start_from` learns on. Without it a new generator is trained.
    pub extension: Option<ExtensionConfig>,
    /// Skills of one's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skill: Vec<SkillConfig>,
}

/// How a model that learns more keeps what it knows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtensionConfig {
    /// A copy of the newest generator learns, and becomes a further one of the model ([`Generators`]); those that are there stay as
    /// they are, bit for bit. A skill of the table that is taught again moves to the new one. Without it the learner replaces them
    /// all, and only rehearsal keeps what they knew.
    ///
    /// [`Generators`]: crate::generators::Generators
    pub grow: bool,
    /// Share of a step's edits that rehearse what the model knew: the learner is held to what the model did; 0 only learns on. In a
    /// model that grows this matters only for what the gate sends to the wrong generator.
    pub share: f32,
    /// Factor on the loss of those.
    pub weight: f32,
}

impl Default for ExtensionConfig {
    fn default() -> Self {
        Self { grow: true, share: 0.0, weight: 1.0 }
    }
}

/// A skill of one's own: pictures before and after an edit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkillConfig {
    /// Its name.
    pub name: String,
    /// Folder of the pairs (see [`hywu_diffusion::OwnSkill::open`]), as seen from the folder that the run is started in.
    pub pairs: PathBuf,
    /// Ways to ask for it.
    pub instructions: Vec<String>,
}

impl SkillConfig {
    /// Reads a TOML file of `[[skill]]` entries.
    ///
    /// # Errors
    /// A file that can't be read, unknown or missing keys, no entry.
    pub fn read(file: &Path) -> Result<Vec<Self>> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Skills {
            skill: Vec<SkillConfig>,
        }
        let text = std::fs::read_to_string(file).map_err(|e| hywu_core::Error::io(file, e))?;
        let parsed: Result<Skills, _> = toml::from_str(&text);
        let skills = parsed.map_err(|e| anyhow::anyhow!("{}: {}", file.display(), e.message()))?.skill;
        ensure!(!skills.is_empty(), "{}: no [[skill]]", file.display());
        Ok(skills)
    }
}

/// Type of a model's stored weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveAs {
    /// As they were trained.
    #[default]
    F32,
    /// Half the size, 11 significant bits.
    F16,
    /// Half the size, 8 significant bits.
    Bf16,
}

impl From<SaveAs> for Dtype {
    fn from(save_as: SaveAs) -> Self {
        match save_as {
            SaveAs::F32 => Self::F32,
            SaveAs::F16 => Self::F16,
            SaveAs::Bf16 => Self::Bf16,
        }
    }
}

fn ten() -> u64 {
    10
}

fn hundred() -> u64 {
    100
}

/// What a step sees.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Edits a step.
    pub instances: usize,
    /// Crops of each.
    pub crops: usize,
    /// Side of a crop in pixels.
    pub crop: usize,
    /// Every so many steps the crops are twice as large and a quarter as many; 0 for never.
    #[serde(default)]
    pub large_every: u64,
    /// Skills by name; none means all but the arrivals or, where there are skills of one's own, those alone.
    #[serde(default)]
    pub skills: Vec<String>,
    /// Where the photos come from: goes into model.json.
    #[serde(default)]
    pub sources: Vec<String>,
}

impl DataConfig {
    /// The batch sizes of a step.
    pub fn shape(&self, step: u64) -> BatchShape {
        let Self { instances, crops, crop, .. } = *self;
        if self.large_every > 0 && step % self.large_every == self.large_every - 1 {
            let (fewer, crops) = if crops > 1 { (2, crops / 2) } else { (4, 1) };
            return BatchShape { instances: (instances / fewer).max(1), crops, crop: 2 * crop };
        }
        BatchShape { instances, crops, crop }
    }
}

/// How a run learns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Highest learning rate.
    pub peak_lr: f32,
    /// Learning rate of the last step.
    pub floor_lr: f32,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Decoupled weight decay.
    #[serde(default)]
    pub weight_decay: f32,
    /// Greatest gradient norm.
    pub clip: f64,
    /// Decay of the averaged weights; without it there are none.
    pub ema: Option<f32>,
}

/// Sizes of the adapters and of the generator that writes them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterConfig {
    /// Rank of the adapters.
    pub rank: usize,
    /// Their alpha; the scale is alpha / rank.
    pub alpha: f32,
    /// Width of a parameter token.
    pub token_dim: usize,
    /// Rank rows that share one position of the transformer.
    pub dim_accumulation: usize,
    /// Width of the transformer.
    pub d_model: usize,
    /// Width of an attention head.
    pub head_dim: usize,
    /// Blocks.
    pub blocks: usize,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            token_dim: 64,
            dim_accumulation: 8,
            d_model: 128,
            head_dim: 32,
            blocks: 3,
        }
    }
}

impl AdapterConfig {
    /// The config of a generator for this backbone.
    pub fn for_backbone(&self, backbone: &Backbone) -> GeneratorConfig {
        let spec = backbone.adapter_spec(self.rank, self.alpha);
        let entry = |m: &Module| {
            (m.path.clone(), serde_json::json!({"lora_A_dim": m.in_dim, "lora_B_dim": m.out_dim}))
        };
        GeneratorConfig {
            num_base_model_layers: spec.layers,
            rank: self.rank,
            alpha: self.alpha,
            token_dim: self.token_dim,
            output_dim: self.token_dim,
            dim_accumulation: self.dim_accumulation,
            d_model: self.d_model,
            head_dim: self.head_dim,
            num_pg_layers: self.blocks,
            input_dim: backbone.config.width,
            prefix: spec.prefix.clone(),
            pg_mapping: Some(spec.modules.iter().map(entry).collect()),
        }
    }
}

impl TrainConfig {
    /// Longest config, in bytes.
    pub const MAX_BYTES: u64 = 1 << 20;

    /// Reads and checks a config.
    ///
    /// # Errors
    /// A file that can't be read or is longer than [`TrainConfig::MAX_BYTES`], unknown or missing keys, numbers that can't work; each
    /// with its name.
    pub fn read(file: &Path) -> Result<Self> {
        Self::parse(&read_text(file, Self::MAX_BYTES)?).with_context(|| file.display().to_string())
    }

    /// As [`TrainConfig::read`], from text.
    ///
    /// # Errors
    /// As [`TrainConfig::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|e| anyhow::anyhow!(e.message().to_owned()))?;
        config.validate()?;
        Ok(config)
    }

    /// Can these numbers work?
    ///
    /// # Errors
    /// The first that can't, by name.
    pub fn validate(&self) -> Result<()> {
        let o = &self.optimizer;
        for (name, value) in [
            ("steps", self.steps),
            ("log_every", self.log_every),
            ("checkpoint_every", self.checkpoint_every),
        ] {
            ensure!(value >= 1, "{name} is 0; it must be at least 1");
        }
        for (name, value) in
            [("peak_lr", o.peak_lr), ("floor_lr", o.floor_lr), ("weight_decay", o.weight_decay)]
        {
            ensure!(value.is_finite() && value >= 0.0, "{name} is {value}; it must be a number from 0 up");
        }
        ensure!(o.clip > 0.0, "clip is {}; it must be above 0", o.clip);
        self.data.shape(0).validate()?;
        self.data.shape(self.data.large_every.saturating_sub(1)).validate()?;
        if let Some(ema) = o.ema {
            ensure!((0.0..1.0).contains(&ema), "ema is {ema}; it must be in 0..1");
        }
        if let Some(ExtensionConfig { share, weight, .. }) = self.extension {
            ensure!(
                (0.0..1.0).contains(&share),
                "share is {share}; it must be in 0..1, for new skills need the rest"
            );
            ensure!(weight.is_finite() && weight > 0.0, "weight is {weight}; it must be a number above 0");
        }
        Ok(())
    }

    /// The settings of `hywu train generator --extend` without `--config`.
    ///
    /// # Errors
    /// None in practice: the file is part of the binary.
    pub fn extend() -> Result<Self> {
        Self::parse(include_str!("../../../assets/configs/extend.toml")).context("the bundled extend.toml")
    }

    /// Learning rate over the run.
    pub fn schedule(&self) -> Schedule {
        let o = &self.optimizer;
        Schedule { warmup: o.warmup, total: self.steps, peak: o.peak_lr, floor: o.floor_lr }
    }
}
