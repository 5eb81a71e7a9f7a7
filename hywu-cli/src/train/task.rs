//! What is trained: the backbone, a generator, one shared adapter, or everything.

use super::{
    bank::{chosen, fresh_loras, shared},
    config::{AdapterConfig, ExtensionConfig, TrainConfig},
    rehearsal::Rehearsal,
};
use crate::{
    generators::{Generators, MOST},
    hash::of_weights,
    model::{Memory, Model, ModelInfo},
};
use anyhow::{Context, Result, bail, ensure};
use hywu_core::{Adapter, Dtype};
use hywu_diffusion::{
    Backbone, EditBatch, EditData, MiniDownstream, TextEncoder, flow_loss, learn_instructions,
};
use hywu_generator::{Generator, TrainStats, train_step};
use hywu_kernels::{Bound, Device, Downstream, LoraVars, ParamSet, Tape, Tensor, Var, optim::Optimizer};
use std::ops::ControlFlow;

/// What `hywu train` trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A backbone from nothing.
    Backbone,
    /// A generator of adapters, through a frozen backbone.
    Generator,
    /// One adapter for everything, on a frozen backbone.
    Lora,
    /// All weights of a backbone, further.
    Full,
}

impl Kind {
    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Backbone => "backbone",
            Self::Generator => "generator",
            Self::Lora => "lora",
            Self::Full => "full",
        }
    }
}

/// A training run's model: trained weights, and the frozen ones around them.
pub enum Task {
    /// Backbone and full: every weight of the backbone.
    Backbone(Box<Backbone>),
    /// The generator, and the backbone that is only read.
    Generator(Box<Generator>, Box<MiniDownstream>),
    /// A generator that learns on, and the model's generators as they were, in the backbone that is only read.
    Extended(Box<Generator>, Box<Rehearsal>),
    /// `<module>.lora_A` and `.lora_B`, and the backbone that is only read.
    Lora(ParamSet, Box<MiniDownstream>),
    /// The same with an entry for each of these skills, by index: every instance of a batch is given its own skill's.
    Bank(ParamSet, Vec<usize>, Box<MiniDownstream>),
}

impl Task {
    /// The model as it stands before the first step.
    ///
    /// # Errors
    /// Sizes that can't work; a missing or damaged model to start from.
    pub fn new(kind: Kind, config: &TrainConfig) -> Result<Self> {
        if kind == Kind::Backbone {
            let mut backbone = Backbone::new(config.backbone.clone(), TextEncoder::table()?, config.seed)?;
            if config.freeze_text {
                backbone.params.freeze(Backbone::in_text_tower);
            }
            return Ok(Self::Backbone(Box::new(backbone)));
        }
        let from = config.start_from.as_ref().with_context(|| {
            format!("`start_from` is missing: {} training needs the folder of a trained model", kind.name())
        })?;
        let model = Model::named(from)?;
        let Some(extension) = config.extension else {
            return Self::on(kind, model.backbone, &config.generator, config.seed);
        };
        ensure!(kind == Kind::Generator, "`extension` is for generator, not for {}", kind.name());
        let Memory::Functional(generators) = model.memory else {
            bail!("{}: the model has no generator that could be extended", from.display())
        };
        Self::extend(model.backbone, generators, extension).with_context(|| from.display().to_string())
    }

    /// A copy of the newest of a backbone's generators, to learn on.
    ///
    /// # Errors
    /// A model that has as many generators as it may, and is to grow.
    pub fn extend(backbone: Backbone, teacher: Generators, extension: ExtensionConfig) -> Result<Self> {
        let known = teacher.all().len();
        ensure!(
            !extension.grow || known < MOST,
            "the model has {known} generators, the most that there may be; `grow = false` makes one of them all"
        );
        let learner = teacher.newest()?.to(Device::Cpu, Dtype::F32)?;
        let spec = learner.spec();
        let downstream = MiniDownstream::new(backbone, spec.rank, spec.alpha)?;
        Ok(Self::Extended(Box::new(learner), Box::new(Rehearsal { downstream, teacher, extension })))
    }

    /// As [`Task::new`], from a backbone at hand, which stays frozen but for [`Kind::Full`] and [`Kind::Backbone`].
    ///
    /// # Errors
    /// Sizes that can't work.
    pub fn on(kind: Kind, backbone: Backbone, sizes: &AdapterConfig, seed: u64) -> Result<Self> {
        Ok(match kind {
            Kind::Backbone | Kind::Full => Self::Backbone(Box::new(backbone)),
            Kind::Generator => {
                let generator = Generator::new(sizes.for_backbone(&backbone), seed)?;
                let downstream = MiniDownstream::new(backbone, sizes.rank, sizes.alpha)?;
                Self::Generator(Box::new(generator), Box::new(downstream))
            }
            Kind::Lora => {
                let downstream = MiniDownstream::new(backbone, sizes.rank, sizes.alpha)?;
                Self::Lora(fresh_loras(&downstream, 1, seed), Box::new(downstream))
            }
        })
    }

    /// A LoRA for each of these skills, by index into [`hywu_diffusion::skills::SKILLS`], on a frozen backbone.
    ///
    /// # Errors
    /// Sizes that can't work.
    pub fn bank(backbone: Backbone, sizes: &AdapterConfig, skills: Vec<usize>, seed: u64) -> Result<Self> {
        let downstream = MiniDownstream::new(backbone, sizes.rank, sizes.alpha)?;
        Ok(Self::Bank(fresh_loras(&downstream, skills.len(), seed), skills, Box::new(downstream)))
    }

    /// The same task on a device: trained weights are kept in f32 there and computed with in `dtype`.
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(&self, device: Device, dtype: Dtype) -> Result<Self> {
        Ok(match self {
            Self::Backbone(backbone) => Self::Backbone(Box::new(backbone.to(device, dtype)?)),
            Self::Generator(generator, downstream) => Self::Generator(
                Box::new(generator.to_mixed(device, dtype)?),
                Box::new(downstream.to(device, dtype)?),
            ),
            Self::Extended(generator, rehearsal) => Self::Extended(
                Box::new(generator.to_mixed(device, dtype)?),
                Box::new(rehearsal.to(device, dtype)?),
            ),
            Self::Lora(params, downstream) => {
                Self::Lora(params.to_mixed(device, dtype)?, Box::new(downstream.to(device, dtype)?))
            }
            Self::Bank(params, skills, downstream) => Self::Bank(
                params.to_mixed(device, dtype)?,
                skills.clone(),
                Box::new(downstream.to(device, dtype)?),
            ),
        })
    }

    /// What comes before the first step: a new backbone learns to read instructions. `progress(done, loss)` may stop it.
    ///
    /// # Errors
    /// An unknown skill; [`hywu_diffusion::Error::Interrupted`] when `progress` says so.
    pub fn prepare(
        &mut self,
        kind: Kind,
        config: &TrainConfig,
        progress: &mut dyn FnMut(u64, f32) -> ControlFlow<()>,
    ) -> Result<()> {
        if let (Kind::Backbone, Self::Backbone(backbone)) = (kind, self) {
            let encoder = TextEncoder::bundled(backbone.config.text_len)?;
            // All that a generator may be taught later can be told apart from the start.
            let skills = EditData::skills(&[])?;
            learn_instructions(backbone, &encoder, &skills, config.text_steps, config.seed, progress)?;
        }
        Ok(())
    }

    /// The number of the trained generator among those of the model that comes out, from 1 on.
    pub fn number(&self) -> usize {
        if let Self::Extended(_, rehearsal) = self { rehearsal.number() } else { 1 }
    }

    /// The weights that are trained.
    pub fn params(&self) -> &ParamSet {
        match self {
            Self::Backbone(backbone) => &backbone.params,
            Self::Generator(generator, _) | Self::Extended(generator, _) => &generator.params,
            Self::Lora(params, _) | Self::Bank(params, ..) => params,
        }
    }

    /// Tells the weights that the run starts from and those that stay frozen from others.
    ///
    /// # Errors
    /// Those of the device.
    pub fn fingerprint(&self) -> Result<String> {
        let frozen = match self {
            Self::Backbone(_) => Vec::new(),
            Self::Generator(_, d) | Self::Lora(_, d) | Self::Bank(_, _, d) => vec![&d.backbone.params],
            Self::Extended(_, rehearsal) => {
                let teachers = rehearsal.teacher.all().iter().map(|generator| &generator.params);
                [&rehearsal.downstream.backbone.params].into_iter().chain(teachers).collect()
            }
        };
        of_weights(frozen.into_iter().chain([self.params()]))
    }

    /// The weights that are trained, for writing.
    pub fn params_mut(&mut self) -> &mut ParamSet {
        match self {
            Self::Backbone(backbone) => &mut backbone.params,
            Self::Generator(generator, _) | Self::Extended(generator, _) => &mut generator.params,
            Self::Lora(params, _) | Self::Bank(params, ..) => params,
        }
    }

    /// Tokens that an instruction may have.
    pub fn text_len(&self) -> usize {
        match self {
            Self::Backbone(backbone) => backbone.config.text_len,
            Self::Generator(_, d) | Self::Lora(_, d) | Self::Bank(_, _, d) => d.backbone.config.text_len,
            Self::Extended(_, rehearsal) => rehearsal.downstream.backbone.config.text_len,
        }
    }

    /// The loss of a batch, with the trained weights as `bound` on the tape.
    ///
    /// # Errors
    /// A batch that does not fit; for a bank, an instance of a skill that it has no entry for.
    pub fn loss(&self, tape: &Tape, bound: &Bound, batch: &EditBatch) -> Result<Var> {
        Ok(match self {
            Self::Backbone(backbone) => flow_loss(tape, backbone, bound, batch, &LoraVars::none())?,
            Self::Generator(generator, downstream) => {
                let condition = downstream.condition(batch)?;
                downstream.loss(tape, batch, &generator.forward(tape, bound, &condition)?)?
            }
            Self::Extended(generator, rehearsal) => {
                let lesson = rehearsal.lesson(batch)?;
                let condition = rehearsal.condition(&lesson)?;
                rehearsal.loss(tape, &lesson, &generator.forward(tape, bound, &condition)?)?
            }
            Self::Lora(_, downstream) => downstream.loss(tape, batch, &shared(bound, downstream)?)?,
            Self::Bank(_, skills, downstream) => {
                downstream.loss(tape, batch, &chosen(tape, bound, downstream, skills, batch)?)?
            }
        })
    }

    /// The loss of a batch and its gradients, in the order of the trained weights.
    ///
    /// # Errors
    /// As [`Task::loss`].
    pub fn gradients(&self, batch: &EditBatch) -> Result<(Tensor, Vec<Tensor>)> {
        let tape = Tape::new();
        let bound = self.params().bind(&tape, true)?;
        let loss = self.loss(&tape, &bound, batch)?;
        let value = loss.value().clone();
        let mut grads = tape.backward(&loss)?;
        Ok((value, bound.take_grads(&mut grads)?))
    }

    /// One step.
    ///
    /// # Errors
    /// A gradient that is not finite; nothing is changed then.
    pub fn step(&mut self, batch: &EditBatch, optimizer: &mut Optimizer) -> Result<TrainStats> {
        if let Self::Generator(generator, downstream) = self {
            return Ok(train_step(generator, downstream.as_ref(), batch, optimizer)?);
        }
        if let Self::Extended(generator, rehearsal) = self {
            let lesson = rehearsal.lesson(batch)?;
            return Ok(train_step(generator, rehearsal.as_ref(), &lesson, optimizer)?);
        }
        let (loss, grads) = self.gradients(batch)?;
        let step = optimizer.step(self.params_mut(), &grads)?;
        // Only now, when all has been launched: to read it waits for a device.
        Ok(TrainStats { loss: loss.item()?, step })
    }

    /// The adapters of these trained weights, one for each skill of a bank or the shared one; none where there are no such.
    ///
    /// # Errors
    /// Those of the device.
    pub fn adapters(&self, params: &ParamSet) -> Result<Vec<Adapter>> {
        let (Self::Lora(_, downstream) | Self::Bank(_, _, downstream)) = self else { return Ok(Vec::new()) };
        // Not as they are computed with, but as they are kept.
        let params = params.to(Device::Cpu, Dtype::F32)?;
        let all = shared(&params.bind(&Tape::inference(), false)?, downstream)?;
        let all = all.to_adapter(downstream.adapter_spec().scale())?;
        Ok((0..all.batch()).filter_map(|i| all.entry(i)).collect())
    }

    /// The model with these trained weights, on the CPU; a trained backbone's condition is calibrated on `examples`,
    /// which are drawn for it alone.
    ///
    /// # Errors
    /// A bank: a model does not choose among adapters. None else in practice: the weights are the task's own.
    pub fn model(
        &self,
        params: &ParamSet,
        info: ModelInfo,
        examples: impl FnOnce() -> hywu_diffusion::Result<EditBatch>,
    ) -> Result<Model> {
        let params = params.to(Device::Cpu, Dtype::F32)?;
        let (backbone, memory) = match self {
            Self::Backbone(backbone) => {
                let mut trained = backbone.to(Device::Cpu, Dtype::F32)?;
                trained.params = params;
                let examples = examples()?;
                trained.calibrate(&examples.views(trained.config.views()), &examples.text)?;
                (trained, Memory::None)
            }
            Self::Generator(generator, downstream) => {
                let backbone = downstream.backbone.to(Device::Cpu, Dtype::F32)?;
                (backbone, Memory::Functional(with(generator, params)?.into()))
            }
            Self::Extended(generator, rehearsal) => {
                let mut backbone = rehearsal.downstream.backbone.to(Device::Cpu, Dtype::F32)?;
                // The gate is made with it, and a device may have rounded it.
                backbone.text_table = TextEncoder::table()?;
                let generators = rehearsal.outcome(with(generator, params)?, &info, &backbone)?;
                (backbone, Memory::Functional(generators))
            }
            Self::Lora(_, downstream) => {
                let Some(adapter) = self.adapters(&params)?.pop() else { bail!("there is no adapter") };
                (downstream.backbone.to(Device::Cpu, Dtype::F32)?, Memory::Static(adapter))
            }
            Self::Bank(..) => bail!("a bank of adapters is not a model"),
        };
        Model::assemble(backbone, memory, info)
    }
}

/// A generator like this one with these weights.
fn with(generator: &Generator, params: ParamSet) -> Result<Generator> {
    let mut trained = Generator::new(generator.config.clone(), 0)?;
    trained.params = params;
    Ok(trained)
}
