//! A model: frozen backbone, what writes its adapters, and where it all comes from.
//!
//! A model folder holds `model.json`, `backbone.safetensors` and, depending on how it was trained, `generator/` (config.json and
//! model.safetensors) or `lora.safetensors` (one adapter for everything). One that has grown also holds `generator-2/` and on, and
//! `gate.safetensors`. A folder appears whole, in place of an older one. Whoever reads it in that moment finds by the hash in
//! `model.json` that its files don't belong together.

use crate::{
    generators::{Generators, MOST},
    hash::{ContentHash, of_adapter, of_weights},
};
use anyhow::{Context, Result, bail, ensure};
use hywu_core::{Adapter, Checkpoint, Dtype, TensorWriter, replace_folder_atomic};
use hywu_diffusion::{Backbone, EditData, KnownSkill, TextEncoder, skills::Skill};
use hywu_generator::{Generator, GeneratorConfig};
use hywu_kernels::{Device, LoraVars, ParamSet, Tensor};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Name of the model in the binary.
const BUNDLED: &str = "bundled";
pub(crate) const INFO: &str = "model.json";
/// Longest `model.json`, in bytes.
const MAX_INFO: u64 = 1 << 20;
const BACKBONE: &str = "backbone.safetensors";
const GENERATOR: &str = "generator";
const GATE: &str = "gate.safetensors";
const LORA: &str = "lora.safetensors";

/// The model in the binary.
mod bundled {
    pub static INFO: &[u8] = include_bytes!("../../assets/bundled/model.json");
    pub static BACKBONE: &[u8] = include_bytes!("../../assets/bundled/backbone.safetensors");
    pub static GENERATOR_CONFIG: &[u8] = include_bytes!("../../assets/bundled/generator/config.json");
    pub static GENERATOR: &[u8] = include_bytes!("../../assets/bundled/generator/model.safetensors");
}

/// `model.json`: what a model is and comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Its name.
    pub name: String,
    /// Licence of the weights.
    pub licence: String,
    /// What it was trained on.
    pub data_sources: Vec<String>,
    /// How it was trained, a line per run, the first run first.
    #[serde(default)]
    pub training: Vec<String>,
    /// What it was taught. Models of before this was written down have none: they were taught the table, but for its arrivals.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skills: Vec<SkillInfo>,
}

/// A skill that a model was taught.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SkillInfo {
    /// Its name.
    pub name: String,
    /// Ways to ask for it; none for a skill of the table, which holds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instructions: Vec<String>,
    /// The generator that knows it, from 1 on.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    pub generator: usize,
}

fn first() -> usize {
    1
}

fn is_first(generator: &usize) -> bool {
    *generator == 1
}

impl ModelInfo {
    /// That of `bundled`, or of the model folder of this name.
    ///
    /// # Errors
    /// As [`ModelInfo::read`].
    pub fn named(name: impl AsRef<Path>) -> Result<Self> {
        if name.as_ref() != Path::new(BUNDLED) {
            return Self::read(name);
        }
        serde_json::from_slice(bundled::INFO).context("bundled model.json")
    }

    /// Reads `model.json` of a model folder.
    ///
    /// # Errors
    /// A file that is missing or not a model's.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        Ok(InfoFile::read(folder.as_ref())?.info)
    }

    /// What a model was taught, the table's skills by their numbers.
    ///
    /// # Errors
    /// A skill that is neither in the table nor has instructions.
    pub fn known_skills(&self) -> Result<Vec<KnownSkill>> {
        if self.skills.is_empty() {
            return Ok(EditData::skills(&[])?.into_iter().map(KnownSkill::Table).collect());
        }
        let known = |SkillInfo { name, instructions, .. }: &SkillInfo| match Skill::find(name) {
            _ if !instructions.is_empty() => {
                Ok(KnownSkill::Own { name: name.clone(), instructions: instructions.clone() })
            }
            Some(index) => Ok(KnownSkill::Table(index)),
            None => bail!(
                "model.json of {:?}: the skill {name:?} is not in the table and has no instructions",
                self.name
            ),
        };
        self.skills.iter().map(known).collect()
    }
}

/// The contents of `model.json`.
#[derive(Serialize, Deserialize)]
struct InfoFile {
    #[serde(flatten)]
    info: ModelInfo,
    /// [`Model::hash`] of the files beside it. Folders put together by hand may be without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
}

impl InfoFile {
    fn read(folder: &Path) -> Result<Self> {
        let file = folder.join(INFO);
        let text = hywu_core::read_small(&file, MAX_INFO)?;
        serde_json::from_slice(&text).with_context(|| format!("{}: not a model", file.display()))
    }
}

/// Where the adapters of a model come from.
pub enum Memory {
    /// Nowhere: the backbone works alone.
    None,
    /// One adapter for every instance (a plain LoRA).
    Static(Adapter),
    /// A generator writes one for each instance.
    Functional(Generators),
}

/// A loaded model.
pub struct Model {
    /// The frozen backbone.
    pub backbone: Backbone,
    /// Where its adapters come from.
    pub memory: Memory,
    /// Instructions to token ids.
    pub text: TextEncoder,
    /// What it is and comes from.
    pub info: ModelInfo,
    /// Hash of configs and weights, for provenance.
    pub hash: String,
}

impl Model {
    /// The model in the binary.
    ///
    /// # Errors
    /// None in practice: the files are part of the binary.
    pub fn bundled() -> Result<Self> {
        let info = ModelInfo::named(BUNDLED)?;
        let backbone = Checkpoint::from_static("bundled backbone", bundled::BACKBONE)?;
        let generator = Checkpoint::from_static("bundled generator", bundled::GENERATOR)?;
        let config = GeneratorConfig::from_json(bundled::GENERATOR_CONFIG)?;
        let memory = Memory::Functional(Generator::from_checkpoint(config, &generator)?.into());
        Self::assemble(Backbone::load(&backbone, TextEncoder::table()?)?, memory, info)
    }

    /// `bundled`, or the model folder of this name.
    ///
    /// # Errors
    /// A folder that is not there or not a model; files that are damaged or don't belong together, also because the folder was replaced
    /// while it was read.
    pub fn named(name: impl AsRef<Path>) -> Result<Self> {
        if name.as_ref() == Path::new(BUNDLED) { Self::bundled() } else { Self::load(name) }
    }

    /// Reads a model folder.
    ///
    /// # Errors
    /// As [`Model::named`].
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        if !folder.is_dir() {
            bail!("{}: no such model folder (there is also the model \"bundled\")", folder.display());
        }
        let InfoFile { info, hash } = InfoFile::read(folder)?;
        let model = Self::read(folder, info)?;
        if let Some(hash) = hash.filter(|hash| *hash != model.hash) {
            bail!(
                "{}: its files are not those that {INFO} was written with: it names the model {hash}, they are {}; if the folder is \
                 being written now, try again; if its files were changed on purpose, remove \"hash\" from {INFO}",
                folder.display(),
                model.hash
            );
        }
        Ok(model)
    }

    /// What lies beside `model.json`.
    fn read(folder: &Path, info: ModelInfo) -> Result<Self> {
        let backbone = Backbone::load(&Checkpoint::open(folder.join(BACKBONE))?, TextEncoder::table()?)?;
        let is_there = |name: &String| folder.join(name).is_dir();
        let folders: Vec<PathBuf> =
            generator_names().filter(is_there).map(|name| folder.join(name)).collect();
        if let Some(missing) = generator_names().take(folders.len()).find(|name| !is_there(name)) {
            bail!("{}: there are {} generators, but no {missing}/", folder.display(), folders.len());
        }
        let lora = folder.join(LORA);
        let memory = match (folders.is_empty(), lora.is_file()) {
            (false, true) => bail!("{}: both {GENERATOR}/ and {LORA}; one is expected", folder.display()),
            (false, false) => {
                let generators = Generators::load(&folders, &folder.join(GATE), &info, &backbone);
                Memory::Functional(generators.with_context(|| folder.display().to_string())?)
            }
            (true, true) => Memory::Static(Adapter::load(lora)?),
            (true, false) => Memory::None,
        };
        Self::assemble(backbone, memory, info)
    }

    /// Puts a model together from parts that fit.
    ///
    /// # Errors
    /// A generator that is made for another backbone.
    pub fn assemble(backbone: Backbone, memory: Memory, info: ModelInfo) -> Result<Self> {
        let generators = match &memory {
            Memory::Functional(generators) => generators.all(),
            Memory::None | Memory::Static(_) => &[],
        };
        for generator in generators {
            let spec = generator.spec();
            let wanted = backbone.adapter_spec(spec.rank, spec.alpha);
            ensure!(
                *spec == wanted,
                "the generator writes adapters for another backbone: {:?} in {} layers, expected {:?} in {}",
                spec.modules.iter().map(|m| (&m.path, m.in_dim, m.out_dim)).collect::<Vec<_>>(),
                spec.layers,
                wanted.modules.iter().map(|m| (&m.path, m.in_dim, m.out_dim)).collect::<Vec<_>>(),
                wanted.layers
            );
            let (reads, has) = (generator.config.input_dim, backbone.config.width);
            ensure!(
                reads == has,
                "the generator reads conditions of width {reads}; the backbone's have {has}"
            );
        }
        if let Memory::Static(adapter) = &memory {
            let instances = adapter.batch();
            ensure!(instances == 1, "the shared adapter holds {instances} instances; one is needed");
            adapter.check(&backbone.adapter_spec(1, 1.0)).context("the shared adapter")?;
        }
        let text = TextEncoder::bundled(backbone.config.text_len)?;
        let mut hash = ContentHash::new("model");
        hash.text(&serde_json::to_string(&backbone.config)?).text(&of_weights([&backbone.params])?);
        match &memory {
            Memory::None => {}
            Memory::Static(adapter) => {
                hash.text(LORA).text(&of_adapter(adapter));
            }
            Memory::Functional(generators) => {
                for generator in generators.all() {
                    let config = serde_json::to_string(&generator.config)?;
                    hash.text(GENERATOR).text(&config).text(&of_weights([&generator.params])?);
                }
                if let Some((of, router)) = generators.gate() {
                    let places =
                        of.iter().zip(router.counts()).flat_map(|(of, count)| [*of as u32, *count as u32]);
                    hash.text(GATE).words(places).array(router.examples().shape(), router.examples().data());
                }
            }
        }
        let hash = hash.finish();
        Ok(Self { backbone, memory, text, info, hash })
    }

    /// The same model on a device, computing in `dtype` there (on the CPU in f32).
    ///
    /// # Errors
    /// A device that can't be used, or has not enough memory.
    pub fn to(self, device: Device, dtype: Dtype) -> Result<Self> {
        let backbone = self.backbone.to(device, dtype)?;
        let memory = match self.memory {
            Memory::Functional(generators) => Memory::Functional(generators.to(device, dtype)?),
            other => other,
        };
        Ok(Self { backbone, memory, ..self })
    }

    /// The adapters of a batch, where the backbone is: `views` [instances, height, width, 3] as [`Backbone::condition`] reads them, `ids`
    /// [instances * text_len]. None at strength 0.
    ///
    /// # Errors
    /// As [`Backbone::condition`] and [`Generators::generate`].
    pub fn adapters(&self, views: &[&Tensor], ids: &[u32], strength: f32) -> Result<LoraVars> {
        let backbone = &self.backbone;
        let adapters = match &self.memory {
            _ if strength == 0.0 => LoraVars::none(),
            Memory::None => LoraVars::none(),
            Memory::Static(adapter) => LoraVars::from_adapter(adapter, strength),
            Memory::Functional(generators) => {
                let adapter = generators.generate(backbone, &backbone.condition(views, ids)?, ids)?;
                LoraVars::from_adapter(&adapter, strength)
            }
        };
        Ok(adapters.to(backbone.params.device(), backbone.params.dtype())?)
    }

    /// Writes a model folder that [`Model::load`] reads; weights in `dtype`, but those of a grown model's backbone and older generators
    /// in f32 where `dtype` would change them. It appears whole, in place of an older model if there is one.
    ///
    /// # Errors
    /// A folder that can't be written, or that holds something other than a model; it is then as it was.
    pub fn save(&self, folder: impl AsRef<Path>, dtype: Dtype) -> Result<()> {
        let generators: Vec<String> = generator_names().collect();
        let parts = [INFO, BACKBONE, LORA, GATE].into_iter().chain(generators.iter().map(String::as_str));
        replace_folder_atomic(folder, &parts.collect::<Vec<_>>(), |folder| self.write(folder, dtype))
    }

    /// The files of a model.
    fn write(&self, folder: &Path, dtype: Dtype) -> Result<()> {
        // What a model knew before it grew stays as it is to the bit, also where that takes more room.
        let grown = matches!(&self.memory, Memory::Functional(generators) if generators.all().len() > 1);
        let exact = |params: &ParamSet| -> Result<Dtype> {
            Ok(if grown && !survives(params, dtype)? { Dtype::F32 } else { dtype })
        };
        let mut writer = TensorWriter::new();
        self.backbone.store(&mut writer, exact(&self.backbone.params)?)?;
        writer.write(folder.join(BACKBONE))?;
        match &self.memory {
            Memory::None => {}
            Memory::Static(adapter) => adapter.save(folder.join(LORA))?,
            Memory::Functional(generators) => {
                for (name, generator) in generator_names().zip(generators.all()) {
                    let newest = std::ptr::eq(generator, generators.newest()?);
                    let dtype = if newest { dtype } else { exact(&generator.params)? };
                    generator.save(folder.join(name), dtype)?;
                }
                generators.save_gate(&folder.join(GATE), &self.info)?;
            }
        }
        // The hash of what a reader will find: `dtype` may have rounded the weights.
        let hash = Some(Self::read(folder, self.info.clone())?.hash);
        let mut text = serde_json::to_vec_pretty(&InfoFile { info: self.info.clone(), hash })?;
        text.push(b'\n');
        hywu_core::write_atomic(folder.join(INFO), |w| w.write_all(&text))?;
        Ok(())
    }
}

/// Are all these weights the same in `dtype`?
fn survives(params: &ParamSet, dtype: Dtype) -> Result<bool> {
    let host = params.to(Device::Cpu, Dtype::F32)?;
    Ok(host.iter().all(|(_, tensor)| tensor.data().iter().all(|&v| dtype.round(v) == v)))
}

/// Folders of a model's generators, in the order in which they were trained.
fn generator_names() -> impl Iterator<Item = String> {
    (1..=MOST).map(|place| match place {
        1 => GENERATOR.to_owned(),
        _ => format!("{GENERATOR}-{place}"),
    })
}
