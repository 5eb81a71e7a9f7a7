//! What an adapter meets in a checkpoint.

use super::{Names, matrices::Pair};
use crate::{ApplyResult, Error, Result, raw::RawFile};
use indexmap::IndexMap;
use std::{collections::HashSet, path::Path};

/// The modules of a checkpoint: every tensor `m.weight` is the weight [out, in] of a module `m`. Names and shapes are all that is read,
/// so that tensors may be of any type.
#[derive(Clone, Debug)]
pub struct Base {
    modules: IndexMap<String, Vec<usize>>,
}

impl Base {
    /// Reads the headers of a file or a folder.
    ///
    /// # Errors
    /// As [`crate::Checkpoint::open`], but for the types of tensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::of(&RawFile::open_all(path.as_ref())?))
    }

    pub(super) fn of(files: &[RawFile]) -> Self {
        let tensors = files.iter().flat_map(|file| &file.tensors);
        let module = |(name, info): &(String, safetensors::tensor::TensorInfo)| {
            Some((name.strip_suffix(".weight")?.to_owned(), info.shape.clone()))
        };
        Self { modules: tensors.filter_map(module).collect() }
    }

    /// Their names.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.modules.keys().map(String::as_str)
    }

    /// How pairs and modules meet. What meets must fit. A checkpoint does not say which of its weights are for adapters; the adapter
    /// does: what it has for one layer or expert it should have for all, so a module is missing if its name is that of an entry but for
    /// the numbers in it.
    ///
    /// `names` says what a fused module's parts may be called in the adapter; without them a module goes by its own name only.
    pub(super) fn cover(
        &self,
        entries: &IndexMap<String, Pair>,
        names: Option<&Names>,
    ) -> Result<ApplyResult> {
        let kinds: HashSet<String> = entries.keys().map(|name| kind(name)).collect();
        let mut modules = Vec::new();
        for (own, shape) in &self.modules {
            let known = entries.contains_key(own);
            let called = match names {
                Some(names) if !known => names.called(own, shape),
                _ => vec![(own.clone(), Some(shape.clone()))],
            };
            for (name, shape) in called {
                match (entries.get(&name), shape) {
                    (Some(Pair { a, b }), Some(shape)) if shape != [b.nrows(), a.ncols()] => {
                        return Err(Error::Adapter(format!(
                            "the weight of `{name}` has shape {shape:?}, the adapter's is {:?}",
                            [b.nrows(), a.ncols()]
                        )));
                    }
                    (None, _) if !kinds.contains(&kind(&name)) => {}
                    _ => modules.push(name),
                }
            }
        }
        Ok(ApplyResult::of(modules, entries.keys().map(String::as_str), |_| false))
    }
}

/// A name with its numbers left open: `model.layers.{}.q_proj`.
fn kind(name: &str) -> String {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let parts: Vec<&str> = name.split('.').map(|part| if number(part) { "{}" } else { part }).collect();
    parts.join(".")
}
