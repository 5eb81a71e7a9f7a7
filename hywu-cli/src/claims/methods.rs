//! What is compared: how each is trained, and how it edits.

use super::{report::Method, settings::Settings};
use crate::{
    model::{Memory, Model, ModelInfo},
    pipeline::{Edit, EditOptions, Editor},
    train::{AdapterConfig, Kind, Task},
};
use anyhow::{Context, Result};
use hywu_core::{Adapter, Dtype};
use hywu_diffusion::{
    Backbone, EditBatch, Picture, TextEncoder,
    skills::{HUES, SKILLS},
};
use hywu_generator::Generator;
use hywu_kernels::{Device, ParamSet, Tensor};
use std::ops::ControlFlow;

impl Method {
    /// All, in the report's order.
    pub const ALL: [Self; 7] =
        [Self::None, Self::SharedLora, Self::WideLora, Self::Full, Self::Oracle, Self::Routed, Self::Hywu];
    /// Those that are trained. The routed bank is the oracle's.
    pub const TRAINED: [Self; 5] = [Self::SharedLora, Self::WideLora, Self::Full, Self::Oracle, Self::Hywu];

    /// As in the names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::SharedLora => "shared-lora",
            Self::WideLora => "wide-lora",
            Self::Full => "full",
            Self::Oracle => "oracle",
            Self::Routed => "routed",
            Self::Hywu => "hywu",
        }
    }

    /// For people.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "no adaptation",
            Self::SharedLora => "shared LoRA, equal rank",
            Self::WideLora => "shared LoRA, equal parameters",
            Self::Full => "full fine-tuning",
            Self::Oracle => "a LoRA per skill, skill known",
            Self::Routed => "a LoRA per skill, routed",
            Self::Hywu => "HY-WU",
        }
    }

    /// The one whose training it uses.
    pub fn trained_as(self) -> Option<Self> {
        match self {
            Self::None => None,
            Self::Routed => Some(Self::Oracle),
            other => Some(other),
        }
    }
}

/// The sizes of a method's adapters; none for those without.
///
/// # Errors
/// Sizes of a generator that can't work.
pub fn sizes(method: Method, backbone: &Backbone, settings: &Settings) -> Result<Option<AdapterConfig>> {
    let equal = settings.generator.clone();
    Ok(match method {
        Method::None | Method::Full => None,
        Method::SharedLora | Method::Oracle | Method::Routed | Method::Hywu => Some(equal),
        Method::WideLora => {
            let generator = Generator::new(equal.for_backbone(backbone), 0)?.params.numel();
            let rank = nearest_rank(generator, backbone);
            // The same scale, so that both shared LoRAs start alike.
            let alpha = equal.alpha / equal.rank as f32 * rank as f32;
            Some(AdapterConfig { rank, alpha, ..equal })
        }
    })
}

/// The rank at which a LoRA has as nearly as it can so many parameters.
fn nearest_rank(parameters: usize, backbone: &Backbone) -> usize {
    let spec = backbone.adapter_spec(1, 1.0);
    let of_one: usize = spec.modules.iter().map(|m| m.in_dim + m.out_dim).sum::<usize>() * spec.layers;
    ((parameters as f64 / of_one as f64).round() as usize).clamp(1, hywu_core::AdapterSpec::MAX_RANK)
}

/// A method before its first step, on the CPU.
///
/// # Errors
/// Sizes that can't work; a method that is not trained.
pub fn fresh(
    method: Method,
    backbone: &Backbone,
    settings: &Settings,
    skills: &[usize],
    seed: u64,
) -> Result<Task> {
    let sizes = sizes(method, backbone, settings)?.unwrap_or_default();
    let on = |kind: Kind| Task::on(kind, backbone.clone(), &sizes, seed);
    match method {
        Method::SharedLora | Method::WideLora => on(Kind::Lora),
        Method::Full => on(Kind::Full),
        Method::Oracle => Task::bank(backbone.clone(), &sizes, skills.to_vec(), seed),
        Method::Hywu => on(Kind::Generator),
        Method::None | Method::Routed => anyhow::bail!("{} is not trained", method.label()),
    }
}

/// A method that edits.
pub struct Contender {
    editor: Editor,
    /// One for each skill; none for a method whose model needs none.
    bank: Vec<Adapter>,
    router: Option<Router>,
}

impl Contender {
    /// A method on a device, with these trained weights; [`Method::None`] needs none. `batch` is any that fits.
    ///
    /// # Errors
    /// A device that has not enough memory.
    pub fn new(
        method: Method,
        backbone: &Backbone,
        trained: Option<(&Task, &ParamSet)>,
        skills: &[usize],
        device: Device,
        batch: impl FnOnce() -> hywu_diffusion::Result<EditBatch>,
    ) -> Result<Self> {
        let alone = || Model::assemble(backbone.clone(), Memory::None, ModelInfo::default());
        let (model, bank) = match trained {
            None => (alone()?, Vec::new()),
            Some((task @ Task::Bank(..), params)) => (alone()?, task.adapters(params)?),
            Some((task, params)) => (task.model(params, ModelInfo::default(), batch)?, Vec::new()),
        };
        let router = (method == Method::Routed).then(|| Router::new(skills, model.backbone.config.text_len));
        let editor = Editor::new(model.to(device, Dtype::Bf16)?);
        Ok(Self { editor, bank, router: router.transpose()? })
    }

    /// Its editor; that of a bank knows the backbone alone.
    pub fn editor(&self) -> &Editor {
        &self.editor
    }

    /// Edits a picture; `skill` is the place of the true skill in the list, which a bank that is not routed is told.
    ///
    /// # Errors
    /// As [`Editor::edit`].
    pub fn edit(
        &self,
        picture: &Picture,
        instruction: &str,
        skill: usize,
        options: &EditOptions,
        stop: &dyn Fn() -> bool,
    ) -> Result<Edit> {
        let place = match &self.router {
            Some(router) => router.nearest(instruction)?,
            None => skill,
        };
        edit(&self.editor, picture, instruction, self.bank.get(place), options, stop)
    }
}

/// [`Editor::edit`] that asks `stop` at every step.
///
/// # Errors
/// As [`Editor::edit`].
pub fn edit(
    editor: &Editor,
    picture: &Picture,
    instruction: &str,
    adapter: Option<&Adapter>,
    options: &EditOptions,
    stop: &dyn Fn() -> bool,
) -> Result<Edit> {
    let mut go = |_: usize, _: usize| if stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    editor.edit(picture, instruction, adapter, options, &mut go)
}

/// Tells skills by the words of an instruction: the mean of its tokens' rows in the frozen text table, against the centroids of the
/// training phrasings. Nothing is trained.
pub struct Router {
    text: TextEncoder,
    table: Tensor,
    /// Of unit length, one a skill.
    centroids: Vec<Vec<f32>>,
}

impl Router {
    /// For these skills, by index.
    ///
    /// # Errors
    /// None in practice: text table and phrasings are part of the binary.
    pub fn new(skills: &[usize], text_len: usize) -> Result<Self> {
        let (text, table) = (TextEncoder::bundled(text_len)?, TextEncoder::table()?);
        let mut router = Self { text, table, centroids: Vec::new() };
        for &skill in skills {
            let mut sum = vec![0.0; router.table.dim_back(1)];
            for phrase in SKILLS[skill].train {
                // One with a colour in it stands for all colours.
                let hues = if phrase.contains('{') { &HUES[..] } else { &HUES[..1] };
                for (hue, _) in hues {
                    let words = phrase.replace("{from}", hue).replace("{to}", hue);
                    let share = 1.0 / hues.len() as f32;
                    let embedded = router.embed(&words)?;
                    sum.iter_mut().zip(embedded).for_each(|(s, v)| *s += v * share);
                }
            }
            router.centroids.push(unit(sum));
        }
        Ok(router)
    }

    /// The place of the skill whose centroid has the greatest cosine with an instruction.
    ///
    /// # Errors
    /// An empty instruction, or one that is too long.
    pub fn nearest(&self, instruction: &str) -> Result<usize> {
        let embedded = self.embed(instruction)?;
        let cosine = |centroid: &Vec<f32>| centroid.iter().zip(&embedded).map(|(a, b)| a * b).sum::<f32>();
        let best = self.centroids.iter().enumerate().max_by(|a, b| cosine(a.1).total_cmp(&cosine(b.1)));
        best.map(|(place, _)| place).context("a router without skills")
    }

    /// Of unit length.
    fn embed(&self, instruction: &str) -> Result<Vec<f32>> {
        let width = self.table.dim_back(1);
        let mut sum = vec![0.0; width];
        // Padding is id 0.
        for id in self.text.encode(instruction)?.into_iter().filter(|id| *id != 0) {
            let row = self.table.data().chunks_exact(width).nth(id as usize);
            sum.iter_mut().zip(row.into_iter().flatten()).for_each(|(s, v)| *s += v);
        }
        Ok(unit(sum))
    }
}

/// Brought to length 1; zero stays.
fn unit(mut v: Vec<f32>) -> Vec<f32> {
    let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
    v.iter_mut().for_each(|x| *x /= norm.max(f32::MIN_POSITIVE));
    v
}

#[cfg(test)]
mod tests {
    use super::*;
    use hywu_diffusion::skills::Skill;

    #[test]
    fn the_router_knows_its_own_phrasings_and_most_others() {
        let names = ["invert", "sketch", "fog", "night", "tint"];
        let skills: Vec<usize> = names.iter().filter_map(|n| Skill::find(n)).collect();
        assert_eq!(skills.len(), names.len());
        let router = Router::new(&skills, 20).expect("bundled");
        let right = |phrases: fn(&'static Skill) -> &'static [&'static str]| {
            let asked = skills.iter().enumerate().flat_map(|(place, &skill)| {
                phrases(&SKILLS[skill]).iter().map(move |p| (place, p.replace("{to}", "green")))
            });
            let told: Vec<bool> =
                asked.map(|(place, words)| router.nearest(&words).expect("words") == place).collect();
            told.iter().filter(|right| **right).count() as f64 / told.len() as f64
        };
        assert!(right(|s| s.train) > 0.9);
        assert!(right(|s| s.held_out) > 0.7);
        // Another order of the skills is another order of the answers.
        let turned: Vec<usize> = skills.iter().rev().copied().collect();
        let turned = Router::new(&turned, 20).expect("bundled");
        assert_eq!(router.nearest("make it foggy").expect("words"), 2);
        assert_eq!(turned.nearest("make it a pencil sketch").expect("words"), 3);
    }
}
