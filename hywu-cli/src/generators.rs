//! The generators of a model, and which of them answers an instruction.

use crate::model::{INFO, ModelInfo};
use anyhow::{Context, Result, ensure};
use hywu_core::{Adapter, Checkpoint, Dtype, TensorWriter};
use hywu_diffusion::{Backbone, Router, TextEncoder};
use hywu_generator::Generator;
use hywu_kernels::{Device, Tape, Tensor};
use std::path::{Path, PathBuf};

/// Most generators that a model may have.
pub const MOST: usize = 64;
/// The tensor and the metadata in the file of a gate.
const EXAMPLES: &str = "examples";
const SKILLS: &str = "skills";

/// One generator or, where a model has grown, several: what was learnt later lies in generators of its own, so that nothing learnt
/// earlier can be lost. A gate sends each instruction to the generator that knows the nearest skill (Expert Gate, arXiv 1611.06194,
/// with [`Router`] for its autoencoders; the frozen columns are those of progressive networks, arXiv 1606.04671).
pub struct Generators {
    /// In the order in which they were trained; never none.
    all: Vec<Generator>,
    /// Among several.
    gate: Option<Gate>,
}

#[derive(Clone)]
struct Gate {
    router: Router,
    /// The generator of each of the router's skills.
    of: Vec<usize>,
}

impl From<Generator> for Generators {
    fn from(generator: Generator) -> Self {
        Self { all: vec![generator], gate: None }
    }
}

impl Generators {
    /// Generators for `backbone`, of which `info` tells who knows what.
    ///
    /// # Errors
    /// No generator or more than [`MOST`], a skill whose generator is not there; several, and skills that are not in the table.
    pub fn new(all: Vec<Generator>, info: &ModelInfo, backbone: &Backbone) -> Result<Self> {
        if all.len() == 1 {
            return Self::gated(all, info, None);
        }
        let text = TextEncoder::bundled(backbone.config.text_len)?;
        let router = Router::new(&info.known_skills()?, backbone, &text)?;
        Self::gated(all, info, Some(router))
    }

    /// Reads the folders of a model's generators, and the file of their gate where there are several.
    ///
    /// # Errors
    /// Files that are missing, damaged or don't belong together; as [`Generators::new`].
    pub fn load(folders: &[PathBuf], gate: &Path, info: &ModelInfo, backbone: &Backbone) -> Result<Self> {
        let all = folders.iter().map(|f| Ok(Generator::load(f)?)).collect::<Result<Vec<_>>>()?;
        if all.len() == 1 {
            ensure!(!gate.exists(), "{}: a gate, and one generator alone", gate.display());
            return Self::gated(all, info, None);
        }
        let file = Checkpoint::open(gate)?;
        let read = || -> Result<Router> {
            let skills =
                file.metadata().get(SKILLS).with_context(|| format!("no `{SKILLS}` in the metadata"))?;
            let skills: Vec<(String, usize)> =
                serde_json::from_str(skills).with_context(|| format!("`{SKILLS}` in the metadata"))?;
            let same = skills.iter().map(|(name, _)| name).eq(info.skills.iter().map(|skill| &skill.name));
            ensure!(same, "the gate tells other skills apart than {INFO} lists");
            let examples = Tensor::from_array(&file.read(EXAMPLES)?);
            let counts = skills.into_iter().map(|(_, count)| count).collect();
            Ok(Router::from_examples(&examples, counts, backbone)?)
        };
        Self::gated(all, info, Some(read().with_context(|| gate.display().to_string())?))
    }

    fn gated(all: Vec<Generator>, info: &ModelInfo, router: Option<Router>) -> Result<Self> {
        let count = all.len();
        ensure!((1..=MOST).contains(&count), "{count} generators; a model has 1 to {MOST}");
        ensure!(
            router.is_none() || !info.skills.is_empty(),
            "{count} generators, and {INFO} does not tell which knows what"
        );
        for skill in &info.skills {
            let (name, of) = (&skill.name, skill.generator);
            ensure!((1..=count).contains(&of), "the skill {name:?} is in generator {of}; there are {count}");
        }
        let of = info.skills.iter().map(|skill| skill.generator - 1).collect();
        Ok(Self { all, gate: router.map(|router| Gate { router, of }) })
    }

    /// Writes the file of the gate, if there is one, for a model with this `info`.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn save_gate(&self, file: &Path, info: &ModelInfo) -> Result<()> {
        if let Some(Gate { router, .. }) = &self.gate {
            let skills: Vec<_> = info.skills.iter().map(|skill| &skill.name).zip(router.counts()).collect();
            let (mut writer, examples) = (TensorWriter::new(), router.examples());
            writer.add(EXAMPLES, examples.shape(), examples.data(), Dtype::F16);
            writer.meta(SKILLS, serde_json::to_string(&skills)?);
            writer.write(file)?;
        }
        Ok(())
    }

    /// What the gate decides by, if there is one: the generator of each skill, and what tells the skills apart.
    pub fn gate(&self) -> Option<(&[usize], &Router)> {
        self.gate.as_ref().map(|Gate { router, of }| (&of[..], router))
    }

    /// All, in the order in which they were trained.
    pub fn all(&self) -> &[Generator] {
        &self.all
    }

    /// The one that was trained last.
    ///
    /// # Errors
    /// None in practice: there is always one.
    pub fn newest(&self) -> Result<&Generator> {
        self.all.last().context("a model without a generator")
    }

    /// Which generator answers each instruction, by its place in [`Generators::all`]; `ids` [instructions * text_len].
    ///
    /// # Errors
    /// Ids that don't fit the backbone, which is that of the model; those of the device.
    pub fn choose(&self, backbone: &Backbone, ids: &[u32]) -> Result<Vec<usize>> {
        let length = backbone.config.text_len;
        ensure!(ids.len().is_multiple_of(length), "{} token ids, expected a multiple of {length}", ids.len());
        Ok(match &self.gate {
            None => vec![0; ids.len() / length],
            Some(Gate { router, of }) => {
                router.nearest(backbone, ids)?.into_iter().map(|skill| of[skill]).collect()
            }
        })
    }

    /// The generator that answers one instruction, and its place in [`Generators::all`]; `ids` of one instruction.
    ///
    /// # Errors
    /// As [`Generators::choose`]; no instruction.
    pub fn answering(&self, backbone: &Backbone, ids: &[u32]) -> Result<(usize, &Generator)> {
        let chosen = self.choose(backbone, ids)?.first().copied();
        chosen.and_then(|place| Some((place, self.all.get(place)?))).context("no instruction")
    }

    /// The adapters of a batch: `condition` [instances, 1, length, width] and `ids` [instances * text_len].
    ///
    /// # Errors
    /// As [`Generator::generate`] and [`Generators::choose`]; another number of conditions than of instructions.
    pub fn generate(&self, backbone: &Backbone, condition: &Tensor, ids: &[u32]) -> Result<Adapter> {
        self.each(backbone, condition, ids, |generator, condition| Ok(generator.generate(condition)?))
    }

    /// The same with the arithmetic of training, so that a learner that has learnt nothing answers like its teacher.
    ///
    /// # Errors
    /// As [`Generators::generate`].
    pub fn answer(&self, backbone: &Backbone, condition: &Tensor, ids: &[u32]) -> Result<Adapter> {
        self.each(backbone, condition, ids, |generator, condition| {
            let tape = Tape::inference();
            let bound = generator.params.bind(&tape, false)?;
            Ok(generator.forward(&tape, &bound, condition)?.to_adapter(generator.spec().scale())?)
        })
    }

    /// What the generators make of a batch, each of all the instances that are its own at once.
    fn each(
        &self,
        backbone: &Backbone,
        condition: &Tensor,
        ids: &[u32],
        make: impl Fn(&Generator, &Tensor) -> Result<Adapter>,
    ) -> Result<Adapter> {
        let chosen = self.choose(backbone, ids)?;
        let (mut shape, instances) = (condition.shape().to_vec(), chosen.len());
        ensure!(
            instances > 0 && shape.first() == Some(&instances),
            "a condition of {shape:?} for {instances} instructions"
        );
        if let Some(one) = self.all.get(chosen[0]).filter(|_| chosen.iter().all(|of| *of == chosen[0])) {
            return make(one, condition);
        }
        let host = condition.to_host()?;
        let values = |i: &usize| host.data().chunks(host.numel() / instances).nth(*i).unwrap_or_default();
        let mut made: Vec<Option<Adapter>> = vec![None; instances];
        for (place, generator) in self.all.iter().enumerate() {
            let own: Vec<usize> = (0..instances).filter(|i| chosen[*i] == place).collect();
            if own.is_empty() {
                continue;
            }
            shape[0] = own.len();
            let condition = Tensor::new(&shape, own.iter().map(values).collect::<Vec<_>>().concat())?;
            let adapters = make(generator, &condition)?;
            own.into_iter().enumerate().for_each(|(entry, i)| made[i] = adapters.entry(entry));
        }
        Ok(Adapter::stack(&made.into_iter().flatten().collect::<Vec<_>>())?)
    }

    /// The same on a device, computing in `dtype` there (on the CPU f32).
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(self, device: Device, dtype: Dtype) -> Result<Self> {
        let all = self.all.iter().map(|g| Ok(g.to(device, dtype)?)).collect::<Result<_>>()?;
        Ok(Self { all, ..self })
    }

    /// The same on a device with weights kept in f32, as those of a learner are ([`Generator::to_mixed`]).
    ///
    /// # Errors
    /// As [`Generators::to`].
    pub fn to_mixed(&self, device: Device, dtype: Dtype) -> Result<Self> {
        let all = self.all.iter().map(|g| Ok(g.to_mixed(device, dtype)?)).collect::<Result<_>>()?;
        Ok(Self { all, gate: self.gate.clone() })
    }
}
