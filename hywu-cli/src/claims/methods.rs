//! What is compared: how each is trained, and how it edits.

use super::{report::Method, settings::Settings};
use crate::{
    model::{Memory, Model, ModelInfo},
    pipeline::{Edit, EditOptions, Editor},
    train::{AdapterConfig, Kind, Task},
};
use anyhow::{Context, Result};
use hywu_core::{Adapter, Dtype};
use hywu_diffusion::{Backbone, EditBatch, KnownSkill, Picture, Router};
use hywu_generator::Generator;
use hywu_kernels::{Device, ParamSet};
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
        let known: Vec<KnownSkill> = skills.iter().copied().map(KnownSkill::Table).collect();
        let router = (method == Method::Routed)
            .then(|| Router::new(&known, &model.backbone, &model.text))
            .transpose()?;
        let editor = Editor::new(model.to(device, Dtype::Bf16)?);
        Ok(Self { editor, bank, router })
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
        let mut place = skill;
        if let Some(router) = &self.router {
            let model = self.editor.model();
            let nearest = router.nearest(&model.backbone, &model.text.encode(instruction)?)?;
            place = nearest.first().copied().context("no instruction")?;
        }
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
