//! Adapters in the files of other programs. All of them hold a down and an up projection for each module, [r, in] and [out, r], and
//! compute W x + alpha / r * up(down(x)); they differ in names, in where alpha is, and in what else may be in the file.

mod config;
mod diffusers;
mod kohya;
mod pairs;
mod peft;

use super::{Adapter, Base, Names, matrices::Pair};
use crate::{ApplyResult, Dtype, Error, Header, Result, error::some_of, raw::RawFile, source::Source};
use indexmap::IndexMap;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// A program's way to write adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A folder with `adapter_config.json` and `adapter_model.safetensors`, names behind `base_model.model.`.
    Peft,
    /// One file, names with dots as underscores behind `lora_unet_`, alpha as a tensor beside each pair. Alpha is f32 there: a scale
    /// that is no such number over the rank comes back within one unit in the last place.
    Kohya,
    /// One file, names behind `transformer.`, the config in the metadata.
    Diffusers,
}

/// How to export.
#[derive(Clone, Debug)]
pub struct ExportOptions<'a> {
    /// Whose format.
    pub format: Format,
    /// What modules are called there.
    pub names: &'a Names,
    /// Which instance of a batch.
    pub instance: usize,
    /// The part of a pipeline that the adapter is for: `transformer` in diffusers' and `unet` in kohya's names if nothing is said,
    /// nothing in PEFT's, which have none.
    pub component: Option<&'a str>,
    /// Multiply the scale into lora_b, for readers that don't look for it: alpha is then the rank.
    pub fold_scale: bool,
    /// Type of the stored values; f32 loses nothing.
    pub dtype: Dtype,
}

/// How to import.
#[derive(Clone, Debug)]
pub struct ImportOptions<'a> {
    /// What modules are called there.
    pub names: &'a Names,
    /// Of a file with adapters for several parts of a pipeline, the one to take (`transformer`, `unet`, `te`, ..). If nothing is said
    /// there must be one only. A PEFT folder has none.
    pub component: Option<&'a str>,
    /// Names that flattened ones (kohya) may stand for: the modules of the backbone, as they are called there.
    pub known: &'a [String],
    /// The backbone, if what is missing and unused is to be told.
    pub base: Option<&'a Base>,
    /// Take an adapter that does not cover the backbone or has more than it, as long as something fits; entries whose flattened names
    /// can't be resolved are left out.
    pub partial: bool,
}

/// What was read.
#[derive(Clone, Debug)]
pub struct Imported {
    /// A batch of one.
    pub adapter: Adapter,
    /// How it and the backbone meet, under the names that modules have there.
    pub coverage: Option<ApplyResult>,
    /// Parts of fused modules, by the names there, that the file has nothing for (it was trained on q and v, say, and not on k): the
    /// whole does nothing in their rows, as the file did, and the operator is the same.
    pub absent: Vec<String>,
}

/// Writes an adapter in another program's format; returns the number of modules there. The provenance goes into the file's metadata.
///
/// # Errors
/// Those of [`Adapter::check_pairs`]; [`Error::Adapter`] for an instance that is not there, modules that [`Names`] can't tell, or that
/// would have the same name or be read back as another, values beyond the range of the type, or a component that the format has not;
/// [`Error::Io`] when something can't be written; a PEFT folder must not be there yet.
pub fn export(adapter: &Adapter, path: impl AsRef<Path>, options: &ExportOptions<'_>) -> Result<usize> {
    let mut theirs = Theirs {
        pairs: options.names.to_theirs(adapter, options.instance)?,
        scale: adapter.scale,
        metadata: adapter.metadata.clone(),
        unknown: Vec::new(),
    };
    if options.fold_scale {
        let scale = std::mem::replace(&mut theirs.scale, 1.0);
        theirs.pairs.values_mut().for_each(|pair| pair.b *= scale);
    }
    theirs.check_range(options.dtype)?;
    theirs.metadata.insert("format".into(), "pt".into());
    let (path, component) = (path.as_ref(), options.component);
    match options.format {
        Format::Peft => {
            peft_has_none(component)?;
            peft::write(&theirs, path, options.dtype)?
        }
        Format::Kohya => kohya::write(&theirs, path, component, options.dtype)?,
        Format::Diffusers => diffusers::write(&theirs, path, component, options.dtype)?,
    }
    Ok(theirs.pairs.len())
}

/// Reads an adapter that another program wrote: a batch of one. `format`: told by the names in the file if not given.
///
/// Where modules have different scales (rank_pattern, alpha_pattern, alpha tensors), the most frequent one becomes the adapter's and
/// the others are multiplied into lora_b. A part of a fused module may be absent ([`Imported::absent`]).
///
/// # Errors
/// [`Error::Checkpoint`] or [`Error::Adapter`] for a damaged file, tensors or options that change more than a low-rank pair says (DoRA,
/// bias, modules_to_save, layer replication, convolutions, ..; by name), shapes and ranks that don't fit each other or the config,
/// names that can't be resolved, a component that is not there; with a backbone, anything missing or unused.
pub fn import(
    path: impl AsRef<Path>,
    format: Option<Format>,
    options: &ImportOptions<'_>,
) -> Result<Imported> {
    let path = path.as_ref();
    let theirs = match format {
        Some(Format::Kohya) => kohya::read(&open(path)?, options)?,
        Some(Format::Diffusers) => diffusers::read(&open(path)?, options.component)?,
        None if !path.is_dir() => read_single(&open(path)?, options)?,
        Some(Format::Peft) | None => {
            peft_has_none(options.component)?;
            peft::read_folder(path)?
        }
    };
    finish(theirs, path, options)
}

/// The same from the bytes of a file; `config` are those of a PEFT folder's other one, adapter_config.json, and none for the formats
/// that are one file, told apart by the names in it. `name` stands for the path in errors.
///
/// # Errors
/// As [`import`].
pub fn import_bytes(
    name: &str,
    tensors: impl Into<Cow<'static, [u8]>>,
    config: Option<&[u8]>,
    options: &ImportOptions<'_>,
) -> Result<Imported> {
    let tensors = || RawFile::parse(Source::memory(name, tensors), Header::MAX_ADAPTER);
    let theirs = match config {
        Some(config) => {
            peft_has_none(options.component)?;
            peft::read(&Path::new(name).join(peft::CONFIG), config, tensors)?
        }
        None => read_single(&tensors()?, options)?,
    };
    finish(theirs, Path::new(name), options)
}

/// A format that is one file, told by the names in it.
fn read_single(file: &RawFile, options: &ImportOptions<'_>) -> Result<Theirs> {
    let mut names = file.tensors.iter().map(|(name, _)| name);
    if names.clone().any(|n| n.starts_with(peft::PREFIX)) {
        let what = format!(
            "this is the tensor file of a PEFT adapter; give its folder, which has {} too",
            peft::CONFIG
        );
        return Err(Error::checkpoint(file.path(), what));
    }
    if names.any(|n| kohya::component(n).is_some()) {
        kohya::read(file, options)
    } else {
        diffusers::read(file, options.component)
    }
}

/// What was read, under our names.
fn finish(theirs: Theirs, path: &Path, options: &ImportOptions<'_>) -> Result<Imported> {
    if theirs.pairs.is_empty() {
        return Err(Error::checkpoint(path, "there is no adapter in it"));
    }
    let Theirs { pairs, scale, mut metadata, mut unknown } = theirs;
    metadata.remove("format");
    let (modules, absent) = options.names.to_ours(&pairs)?;
    let adapter = Adapter { modules, scale, metadata };
    adapter.check_pairs()?;
    let coverage = match options.base {
        Some(base) => {
            let mut found = base.cover(&pairs, Some(options.names))?;
            found.unused.append(&mut unknown);
            found.check(options.partial)?;
            Some(found)
        }
        None => None,
    };
    Ok(Imported { adapter, coverage, absent })
}

/// The component that is wanted, or the only one. The empty one stands for names without any.
fn one_of<'a>(file: &RawFile, all: &BTreeSet<&'a str>, wanted: Option<&str>) -> Result<&'a str> {
    let told =
        || some_of(&all.iter().map(|c| if c.is_empty() { "no component" } else { c }).collect::<Vec<_>>());
    let bad = |what: String| Err(Error::checkpoint(file.path(), what));
    match (wanted, all.first()) {
        (Some(wanted), _) => match all.get(wanted) {
            Some(own) => Ok(own),
            None => bad(format!("it has no adapter for `{wanted}`, only for {}", told())),
        },
        (None, Some(one)) if all.len() == 1 => Ok(one),
        (None, None) => Ok(""),
        _ => bad(format!("it has adapters for {}; say which component to take", told())),
    }
}

/// The error for a component that a format's names can't say.
fn no_component(component: &str, all: &[&str]) -> Error {
    Error::Adapter(format!("there is no component `{component}`; known are {}", all.join(", ")))
}

fn peft_has_none(component: Option<&str>) -> Result<()> {
    match component {
        Some(component) => Err(Error::Adapter(format!(
            "component `{component}`: a PEFT folder is an adapter for one model and names no component"
        ))),
        None => Ok(()),
    }
}

fn open(path: &Path) -> Result<RawFile> {
    RawFile::open(path, Header::MAX_ADAPTER)
}

/// An adapter as other programs see it.
struct Theirs {
    pairs: IndexMap<String, Pair>,
    scale: f32,
    metadata: BTreeMap<String, String>,
    /// Entries whose modules nobody knows.
    unknown: Vec<String>,
}

impl Theirs {
    /// Are all values finite as they will be stored?
    fn check_range(&self, dtype: Dtype) -> Result<()> {
        for (module, Pair { a, b }) in &self.pairs {
            if let Some(x) = dtype.first_not_finite(a.iter().chain(b)) {
                return Err(Error::Adapter(format!(
                    "module `{module}` holds {x}, which is beyond {dtype:?}"
                )));
            }
        }
        Ok(())
    }
    /// alpha of a module of this rank: exact in f64.
    fn alpha(&self, rank: usize) -> f64 {
        f64::from(self.scale) * rank as f64
    }
}
