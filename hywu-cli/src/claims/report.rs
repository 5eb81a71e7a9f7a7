//! What `hywu eval claims` finds: the types of `report.json`.
//!
//! Every interval is a bootstrap one of 95 % over photos and seeds, drawn anew independently. Names of files are relative to the folder
//! of the report.

use super::{instance::HiddenAmount, settings::Settings, structure::Structure};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// Everything that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The numbers to quote.
    pub summary: Summary,
    /// What was measured, and with what.
    pub setup: Setup,
    /// What was compared, in this order everywhere.
    pub methods: Vec<MethodReport>,
    /// The search for learning rates.
    pub sweep: Vec<SweepRow>,
    /// Training losses.
    pub curves: Vec<Curve>,
    /// How close edits come to the true ones.
    pub quality: Quality,
    /// Do skills pull shared weights apart?
    pub conflict: Vec<Conflict>,
    /// HY-WU with conditions that are not the instance's.
    pub condition: Vec<Variant>,
    /// Edits at several strengths of the adapter.
    pub strength: Vec<StrengthRow>,
    /// Instructions that were never trained on and taken for the right skill, by skill.
    pub phrasing: Vec<PhrasingRow>,
    /// What a method costs.
    pub cost: Vec<Cost>,
    /// Skills that arrive one after the other; none where it was not measured.
    pub forgetting: Option<Forgetting>,
    /// Generated adapters that were kept, in the order of the entries of [`Setup::adapters`].
    pub adapters: Vec<AdapterLabel>,
    /// How these adapters lie; none where it was not measured.
    #[serde(default)]
    pub structure: Option<Structure>,
    /// What adapters tell of amounts that only the picture shows.
    #[serde(default)]
    pub hidden: Vec<HiddenAmount>,
    /// Edits to look at.
    pub pictures: Vec<PictureRow>,
}

/// A mean and the interval around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

/// The numbers to quote; null where something was not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// PSNR of HY-WU over that of the better of the two shared LoRAs, dB.
    pub hywu_vs_shared_lora_db: Option<Interval>,
    /// PSNR of HY-WU over that of full fine-tuning, dB.
    pub hywu_vs_full_db: Option<Interval>,
    /// Share of pairs in which HY-WU's PSNR is better by more than 0.1 dB, against both shared LoRAs and full fine-tuning together.
    pub hywu_win_rate: Option<Interval>,
    /// PSNR lost with the adapter of an instance of another skill, dB.
    pub shuffled_loss_db: Option<Interval>,
    /// PSNR lost with the mean adapter of all instances, dB.
    pub averaged_loss_db: Option<Interval>,
    /// Cosine of the gradients of conflicting pairs on the weights of full fine-tuning, after training.
    pub conflict_cosine: Option<Interval>,
    /// PSNR that HY-WU, growing, has lost on earlier skills after all groups, dB.
    pub forgetting_db: Option<Interval>,
    /// Share of held-out phrasings that HY-WU's model takes for the right skill.
    pub phrasing_accuracy: Option<Interval>,
}

/// What was measured, and with what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Name of the model whose backbone was frozen.
    pub model: String,
    /// Hash of its config and weights.
    pub hash: String,
    /// Where it was computed.
    pub device: String,
    /// The settings.
    pub settings: Settings,
    /// Skills that contradict each other.
    pub pairs: Vec<[String; 2]>,
    /// Photos that were trained on.
    pub trained_on: Vec<String>,
    /// Photos that chose the learning rates.
    pub validated_on: Vec<String>,
    /// Photos that measured.
    pub tested_on: Vec<String>,
    /// File of generated adapters, one entry of the batch for each of [`Report::adapters`].
    pub adapters: String,
}

/// What is compared. All start from one frozen backbone and see the same batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The backbone alone.
    None,
    /// One LoRA for everything, of the rank of the generated adapters.
    SharedLora,
    /// One LoRA for everything, of the rank that has as many parameters as the generator.
    WideLora,
    /// All weights of the backbone trained further.
    Full,
    /// A LoRA per skill, with the skill known.
    Oracle,
    /// The same LoRAs, chosen by the nearest instruction embedding.
    Routed,
    /// A generator writes an adapter for each instance.
    Hywu,
}

/// A method as it was trained.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MethodReport {
    /// Which.
    pub method: Method,
    /// Its name for people.
    pub label: String,
    /// Rank of its adapters, where it has any.
    pub rank: Option<usize>,
    /// Weights that were trained.
    pub parameters: usize,
    /// The chosen peak learning rate.
    pub lr: Option<f32>,
}

/// One try of the search for a learning rate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SweepRow {
    /// Whose. The routed bank is the oracle's.
    pub method: Method,
    /// Peak learning rate.
    pub lr: f32,
    /// Steps.
    pub steps: u64,
    /// Loss on the validation photos after them; null where it was not finite, or the training broke off.
    pub loss: Option<f64>,
    /// Was it taken?
    pub chosen: bool,
}

/// Training loss of a method.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Curve {
    /// Whose.
    pub method: Method,
    /// Seed of weights and data.
    pub seed: u64,
    /// (step, mean loss since the point before).
    pub points: Vec<(u64, f64)>,
    /// Loss on the validation photos at the end.
    pub validation: f64,
}

/// How close edits come to the true ones.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quality {
    /// By method and skill, and for all skills together.
    pub scores: Vec<ScoreRow>,
    /// HY-WU against each other method, pair by pair.
    pub wins: Vec<WinRow>,
    /// PSNR of HY-WU minus that of each other method, dB, by skill and for all skills together.
    pub gains: Vec<GainRow>,
}

/// Scores of a method.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScoreRow {
    /// Whose.
    pub method: Method,
    /// On which skill; none for all.
    pub skill: Option<String>,
    /// PSNR against the true edit, dB; 60 where it is more.
    pub psnr: Interval,
    /// SSIM against the true edit.
    pub ssim: Interval,
    /// Perceptual distance to the true edit, [`hywu_diffusion::metrics::gradient_distance`].
    pub distance: Interval,
}

/// What edits are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Within 0.1 dB is the same.
    Psnr,
    /// Within 0.002 is the same.
    Ssim,
    /// Within 0.002 is the same.
    Distance,
}

/// Shares of the pairs of edits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WinRow {
    /// Against whom.
    pub against: Method,
    /// By what.
    pub metric: Metric,
    /// HY-WU's edit is better.
    pub good: Interval,
    /// They are the same.
    pub same: Interval,
    /// HY-WU's edit is worse.
    pub bad: Interval,
}

/// PSNR of HY-WU minus that of another method.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GainRow {
    /// Against whom.
    pub against: Method,
    /// On which skill; none for all.
    pub skill: Option<String>,
    /// In dB.
    pub gain: Interval,
}

/// Cosines of the gradients that skills want on shared weights.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Conflict {
    /// On whose weights: full fine-tuning's or the shared LoRA's.
    pub method: Method,
    /// After training, or before.
    pub trained: bool,
    /// In the order of rows and columns.
    pub skills: Vec<String>,
    /// Mean over seeds.
    pub cosine: Vec<Vec<f64>>,
    /// Mean over the conflicting pairs.
    pub conflicting: Interval,
    /// Mean over all pairs of two skills.
    pub all: Interval,
}

/// What the generator is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// The instance's own: the reference.
    Own,
    /// The adapter of an instance of another skill.
    OtherSkill,
    /// The adapter of another photo with the same skill.
    OtherPhoto,
    /// The mean of all instances' updates.
    Mean,
    /// The generator sees the instruction and a gray picture.
    TextOnly,
    /// The generator sees the picture and a neutral instruction.
    ImageOnly,
}

/// HY-WU under another condition. The backbone always sees the true picture and instruction.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variant {
    /// Which.
    pub condition: Condition,
    /// PSNR against the true edit, dB.
    pub psnr: Interval,
    /// PSNR lost against [`Condition::Own`], dB.
    pub loss: Interval,
}

/// HY-WU with scaled adapters.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StrengthRow {
    /// Factor on the adapter.
    pub strength: f32,
    /// PSNR against the true edit, dB.
    pub psnr: Interval,
}

/// Choice of the skill.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PhrasingRow {
    /// The skill that was asked for.
    pub skill: String,
    /// Phrasings asked, over photos and seeds.
    pub asked: usize,
    /// Taken for this skill.
    pub right: usize,
    /// What the others were taken for, and how often.
    pub taken_for: IndexMap<String, usize>,
}

/// What a method costs, mean over the seeds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cost {
    /// Whose.
    pub method: Method,
    /// Weights that were trained.
    pub parameters: usize,
    /// Training in seconds, without making the batches; 0 for no training.
    pub training_seconds: f64,
    /// From text and picture to the adapter, milliseconds an edit.
    pub adapter_ms: f64,
    /// Sampling, milliseconds an edit.
    pub edit_ms: f64,
    /// Most memory that a training of one step takes, with its weights and the optimiser's state but without the frozen backbone, MB:
    /// of a CUDA device what its allocator took, else the process's resident set; null where the system does not tell.
    pub training_mb: Option<f64>,
    /// The same for an edit, beyond all weights.
    pub edit_mb: Option<f64>,
}

/// Skills that arrive in groups, one after the other, without the data of those before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Forgetting {
    /// The skills of each group; the first are those that were there from the start.
    pub groups: Vec<Vec<String>>,
    /// Every learner on every group after every stage.
    pub rows: Vec<ForgettingRow>,
    /// PSNR lost on all earlier groups (the first included) after the last stage, against the stage that taught them, by learner.
    pub lost: IndexMap<String, Interval>,
    /// PSNR over all groups, the first included, after the last stage, by learner: who learns nothing has nothing to lose.
    #[serde(default)]
    pub end: IndexMap<String, Interval>,
}

/// A learner on one group's skills.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForgettingRow {
    /// For people: "full fine-tuning", "shared LoRA", "HY-WU in sequence", "HY-WU with rehearsal", "HY-WU growing".
    pub learner: String,
    /// The group that was learnt last.
    pub stage: usize,
    /// The group that is measured.
    pub group: usize,
    /// Loss on photos that were never trained on.
    pub loss: f64,
    /// PSNR against the true edit, dB.
    pub psnr: Interval,
}

/// A generated adapter that was kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AdapterLabel {
    /// What was asked for.
    pub skill: String,
    /// Index into [`Setup::tested_on`].
    pub photo: usize,
    /// The instruction.
    pub instruction: String,
    /// What chance drew for the example and nobody was told: noise level, channel gains. Empty where a skill hides nothing.
    #[serde(default)]
    pub hidden: Vec<f32>,
}

/// One example, edited by every method.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PictureRow {
    /// What was asked for.
    pub skill: String,
    /// Index into [`Setup::tested_on`].
    pub photo: usize,
    /// The instruction.
    pub instruction: String,
    /// File of what was edited.
    pub source: String,
    /// File of the true edit.
    pub target: String,
    /// Files of the edits.
    pub edits: IndexMap<Method, String>,
    /// PSNR of the edits, dB.
    pub psnr: IndexMap<Method, f64>,
}
