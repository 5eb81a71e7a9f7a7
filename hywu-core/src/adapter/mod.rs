//! Adapters: what they are (here), what can be told of them and done with them.
//!
//! * [`inspect()`], [`compare()`] and [`gram()`]: norms, effective ranks, cosines, inner products of many.
//! * [`average()`], [`Adapter::scaled`]: new adapters from old ones.
//! * [`export()`], [`import()`]: files of PEFT, kohya and diffusers, through [`Names`] that tell how their modules are called.
//! * [`merge()`]: a checkpoint with an adapter added to its weights. [`Base`]: what of a checkpoint an adapter meets.

use crate::{AdapterSpec, Checkpoint, Dtype, Error, Header, Result, TensorFile};
use indexmap::IndexMap;
use ndarray::{ArrayD, Axis, IxDyn, concatenate};
use std::{borrow::Cow, collections::BTreeMap, path::Path};

mod average;
mod base;
mod compare;
mod formats;
mod gram;
mod inspect;
mod layout;
mod low_rank;
mod matrices;
mod merge;
mod names;

pub use average::average;
pub use base::Base;
pub use compare::{Comparison, ModuleComparison, compare};
pub use formats::{ExportOptions, Format, ImportOptions, Imported, export, import, import_bytes};
pub use gram::gram;
pub use inspect::{InstanceReport, LayerReport, ModuleReport, inspect};
pub use matrices::Matrices;
pub use merge::{MergeOptions, MergeReport, merge};
pub use names::{MapEntry, ModuleMap, Names, OneOrMore};

/// The low-rank pair of one module.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// [batch, r, in] (or [batch, experts, r, in]).
    pub lora_a: ArrayD<f32>,
    /// [batch, out, r] (or [batch, experts, out, r]).
    pub lora_b: ArrayD<f32>,
}

/// The low-rank weight update of an instance (or of a batch of instances): the generator's output, as host data.
///
/// On disk: one safetensors file with `{module}.lora_A`, `{module}.lora_B` and the 0-d `scale`, the published names
/// (FORMAT.md section 4), provenance in the metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// Module name -> pair, in the generator's order.
    pub modules: IndexMap<String, Lora>,
    /// alpha / rank; not multiplied into lora_b.
    pub scale: f32,
    /// Provenance: instruction, seed, model hash and the like.
    pub metadata: BTreeMap<String, String>,
}

/// Name of the scale's tensor.
const SCALE: &str = "scale";

impl Adapter {
    /// Number of instances (the leading axis of every tensor).
    pub fn batch(&self) -> usize {
        self.modules.values().next().map_or(0, |m| m.lora_a.shape()[0])
    }

    /// Checks that every module of `spec` is there with the right shape and nothing else is, and that all is finite.
    ///
    /// # Errors
    /// Those of [`Adapter::cover`] and [`crate::ApplyResult::strict`].
    pub fn check(&self, spec: &AdapterSpec) -> Result<()> {
        self.cover(spec)?.strict()
    }

    /// Reads a file written by [`Adapter::save`].
    ///
    /// # Errors
    /// A damaged file or one with a header of more than [`Header::MAX_ADAPTER`] bytes, NaN or infinity, a tensor that is neither `scale`
    /// nor a lora_A / lora_B, or one of a pair without the other.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::open_within(path, Header::MAX_ADAPTER)?)
    }

    /// The same from the bytes of such a file; `name` stands for the path in errors.
    ///
    /// # Errors
    /// As [`Adapter::load`].
    pub fn from_bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::from_bytes(name, bytes, Header::MAX_ADAPTER)?)
    }

    fn from_checkpoint(file: &Checkpoint) -> Result<Self> {
        let bad = |what: String| Error::checkpoint(file.path(), what);
        let scale = file.read_shaped(SCALE, &[])?;
        let mut modules = IndexMap::new();
        for name in file.names() {
            if let Some(module) = name.strip_suffix(".lora_A") {
                let (lora_a, lora_b) = (file.read(name)?, file.read(&format!("{module}.lora_B"))?);
                if lora_a.ndim() < 3 || lora_b.ndim() != lora_a.ndim() {
                    let (a, b) = (lora_a.shape(), lora_b.shape());
                    return Err(bad(format!(
                        "`{module}` has lora_A {a:?} and lora_B {b:?}, expected [batch, r, in] and [batch, out, r]"
                    )));
                }
                modules.insert(module.to_owned(), Lora { lora_a, lora_b });
            } else if let Some(module) = name.strip_suffix(".lora_B") {
                if !file.contains(&format!("{module}.lora_A")) {
                    return Err(bad(format!("`{module}` has a lora_B but no lora_A")));
                }
            } else if name != SCALE {
                return Err(bad(format!("tensor `{name}` is not part of an adapter")));
            }
        }
        if modules.is_empty() {
            return Err(bad("there is no adapter in it".into()));
        }
        let scale = scale.first().copied().unwrap_or(f32::NAN);
        Ok(Self { modules, scale, metadata: file.metadata().clone() })
    }

    /// Writes one safetensors file atomically, f32.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when the file can't be written, [`crate::Error::Checkpoint`] when a name holds control characters.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let scale = ArrayD::from_elem(IxDyn(&[]), self.scale);
        let mut arrays = vec![(SCALE.to_owned(), Dtype::F32, scale.into())];
        arrays.extend(self.arrays().map(|(name, array)| (name, Dtype::F32, array.view().into())));
        TensorFile::write_whole(path.as_ref(), arrays, &self.metadata)
    }

    /// Bytes of the file that [`Adapter::save`] writes.
    ///
    /// # Errors
    /// As there, but for those of writing; `name` stands for the path.
    pub fn saved_size(&self, name: &str) -> Result<u64> {
        let scale = (SCALE.to_owned(), Dtype::F32, Vec::new());
        let tensors = self.arrays().map(|(name, array)| (name, Dtype::F32, array.shape().to_vec()));
        TensorFile::size(Path::new(name), tensors.chain([scale]), &self.metadata)
    }

    /// Every array under its name in a file.
    fn arrays(&self) -> impl Iterator<Item = (String, &ArrayD<f32>)> {
        self.modules.iter().flat_map(|(name, lora)| {
            [("lora_A", &lora.lora_a), ("lora_B", &lora.lora_b)]
                .map(|(kind, array)| (format!("{name}.{kind}"), array))
        })
    }

    /// One instance of a batch, as a batch of one; `None` when there are not that many.
    pub fn entry(&self, index: usize) -> Option<Self> {
        let cut = |a: &ArrayD<f32>| {
            let i = isize::try_from(index).ok()?;
            (index < a.shape()[0]).then(|| a.slice_axis(Axis(0), (i..i + 1).into()).to_owned())
        };
        let mut modules = IndexMap::new();
        for (name, lora) in &self.modules {
            modules.insert(name.clone(), Lora { lora_a: cut(&lora.lora_a)?, lora_b: cut(&lora.lora_b)? });
        }
        Some(Self { modules, scale: self.scale, metadata: self.metadata.clone() })
    }

    /// One batch of all the instances, in their order, with the scale of the first and no metadata; what [`Adapter::entry`] takes apart.
    ///
    /// # Errors
    /// None given, or adapters of different modules, sizes or scales.
    pub fn stack(adapters: &[Self]) -> Result<Self> {
        let first = adapters.first().ok_or_else(|| Error::Adapter("no adapters to stack".into()))?;
        if adapters.iter().any(|a| a.scale != first.scale || !a.modules.keys().eq(first.modules.keys())) {
            return Err(Error::Adapter("adapters of different modules or scales can't be stacked".into()));
        }
        let mut modules = IndexMap::new();
        for name in first.modules.keys() {
            let of = |part: fn(&Lora) -> &ArrayD<f32>| {
                let parts: Vec<_> =
                    adapters.iter().filter_map(|a| a.modules.get(name)).map(|l| part(l).view()).collect();
                concatenate(Axis(0), &parts).map_err(|e| Error::Adapter(format!("`{name}`: {e}")))
            };
            modules.insert(name.clone(), Lora { lora_a: of(|l| &l.lora_a)?, lora_b: of(|l| &l.lora_b)? });
        }
        Ok(Self { modules, scale: first.scale, metadata: BTreeMap::new() })
    }
}
