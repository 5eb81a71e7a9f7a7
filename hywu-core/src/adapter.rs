use crate::{AdapterSpec, Result};
use indexmap::IndexMap;
use ndarray::ArrayD;
use std::{collections::BTreeMap, path::Path};

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

impl Adapter {
    /// Number of instances (the leading axis of every tensor).
    pub fn batch(&self) -> usize {
        self.modules.values().next().map_or(0, |m| m.lora_a.shape()[0])
    }
    /// Checks that every module of `spec` is there with the right shape and nothing else is, and that all is finite.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] listing missing and unused modules, wrong shapes or the first non-finite value.
    pub fn check(&self, spec: &AdapterSpec) -> Result<()> {
        let _ = spec;
        todo!()
    }
    /// Reads a file written by [`Adapter::save`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let _ = path.as_ref();
        todo!()
    }
    /// Writes one safetensors file atomically, f32.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let _ = path.as_ref();
        todo!()
    }
}
