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
const COUNTS: &str = "examples_of_skills";

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
    /// No generator or more than [`MOST`]; several, and skills that are not in the table or whose generator is not there.
    pub fn new(all: Vec<Generator>, info: &ModelInfo, backbone: &Backbone) -> Result<Self> {
        let count = all.len();
        ensure!((1..=MOST).contains(&count), "{count} generators; a model has 1 to {MOST}");
        if count == 1 {
            return Ok(Self { all, gate: None });
        }
        let text = TextEncoder::bundled(backbone.config.text_len)?;
        let router = Router::new(&info.known_skills()?, backbone, &text)?;
        Self::gated(all, info, router)
    }

    /// Reads the folders of a model's generators, and the file of their gate where there are several.
    ///
    /// # Errors
    /// Files that are missing, damaged or don't belong together; as [`Generators::new`].
    pub fn load(folders: &[PathBuf], gate: &Path, info: &ModelInfo, backbone: &Backbone) -> Result<Self> {
        let all = folders.iter().map(|f| Ok(Generator::load(f)?)).collect::<Result<Vec<_>>>()?;
        if all.len() <= 1 {
            return Self::new(all, info, backbone);
        }
        let file = Checkpoint::open(gate)?;
        let counts =
            file.metadata().get(COUNTS).with_context(|| format!("{}: no `{COUNTS}`", gate.display()))?;
        let read = || -> Result<Router> {
            let counts: Vec<usize> = serde_json::from_str(counts)?;
            ensure!(
                counts.len() == info.skills.len(),
                "{} skills, {INFO} has {}",
                counts.len(),
                info.skills.len()
            );
            let examples = Tensor::from_array(&file.read(EXAMPLES)?);
            Ok(Router::from_examples(examples, counts, backbone)?)
        };
        Self::gated(all, info, read().with_context(|| gate.display().to_string())?)
    }

    fn gated(all: Vec<Generator>, info: &ModelInfo, router: Router) -> Result<Self> {
        let count = all.len();
        ensure!(!info.skills.is_empty(), "{count} generators, and {INFO} does not tell which knows what");
        for skill in &info.skills {
            let (name, of) = (&skill.name, skill.generator);
            ensure!((1..=count).contains(&of), "the skill {name:?} is in generator {of}; there are {count}");
        }
        let of = info.skills.iter().map(|skill| skill.generator - 1).collect();
        Ok(Self { all, gate: Some(Gate { router, of }) })
    }

    /// Writes the file of the gate, if there is one.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn save_gate(&self, file: &Path) -> Result<()> {
        if let Some(Gate { router, .. }) = &self.gate {
            let (mut writer, examples) = (TensorWriter::new(), router.examples());
            // Directions: more digits would tell nothing apart.
            writer.add(EXAMPLES, examples.shape(), examples.data(), Dtype::F16);
            writer.meta(COUNTS, serde_json::to_string(router.counts())?);
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

    /// The place of the generator that answers each instruction; `ids` [instructions * text_len].
    ///
    /// # Errors
    /// Ids that don't fit the backbone, which is that of the model; those of the device.
    pub fn choose(&self, backbone: &Backbone, ids: &[u32]) -> Result<Vec<usize>> {
        Ok(match &self.gate {
            None => vec![0; ids.len() / backbone.config.text_len],
            Some(Gate { router, of }) => {
                router.nearest(backbone, ids)?.into_iter().map(|skill| of[skill]).collect()
            }
        })
    }

    /// The adapters of a batch: `condition` [instances, 1, length, width] and `ids` [instances * text_len].
    ///
    /// # Errors
    /// As [`Generator::generate`] and [`Generators::choose`].
    pub fn generate(&self, backbone: &Backbone, condition: &Tensor, ids: &[u32]) -> Result<Adapter> {
        self.each(backbone, condition, ids, |generator, condition| Ok(generator.generate(condition)?))
    }

    /// The same with the arithmetic of training, so that a learner that has learnt nothing answers alike, bit for bit.
    ///
    /// # Errors
    /// As [`Generator::forward`] and [`Generators::choose`].
    pub fn teach(&self, backbone: &Backbone, condition: &Tensor, ids: &[u32]) -> Result<Adapter> {
        self.each(backbone, condition, ids, |generator, condition| {
            let tape = Tape::inference();
            let bound = generator.params.bind(&tape, false)?;
            Ok(generator.forward(&tape, &bound, condition)?.to_adapter(generator.spec().scale())?)
        })
    }

    /// What the chosen generator makes of each instance; all at once where it is one for all.
    fn each(
        &self,
        backbone: &Backbone,
        condition: &Tensor,
        ids: &[u32],
        make: impl Fn(&Generator, &Tensor) -> Result<Adapter>,
    ) -> Result<Adapter> {
        let chosen = self.choose(backbone, ids)?;
        if let Some(&first) = chosen.first()
            && chosen.iter().all(|of| *of == first)
        {
            return make(&self.all[first], condition);
        }
        let host = condition.to_host()?;
        let (mut shape, size) = (condition.shape().to_vec(), host.numel() / chosen.len().max(1));
        shape[0] = 1;
        let mut made = Vec::new();
        for (of, values) in chosen.into_iter().zip(host.data().chunks(size.max(1))) {
            made.push(make(&self.all[of], &Tensor::new(&shape, values.to_vec())?)?);
        }
        Ok(Adapter::stack(&made)?)
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
