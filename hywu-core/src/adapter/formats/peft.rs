//! A PEFT folder.

use super::{
    Pair, Theirs,
    config::{LoraConfig, describe},
    pairs,
};
use crate::{
    Dtype, Error, Result, TensorFile, create_folder_atomic, parse_json, raw::RawFile, read_small,
    write_atomic,
};
use ndarray::{CowArray, IxDyn};
use serde_json::{Map, Value};
use std::path::Path;

pub(super) const CONFIG: &str = "adapter_config.json";
/// Longest config, in bytes: one that names every expert has a few hundred thousand.
const MAX_CONFIG: u64 = 8_000_000;
const TENSORS: &str = "adapter_model.safetensors";
pub(super) const PREFIX: &str = "base_model.model.";

/// The two files of a folder.
pub(super) fn read_folder(folder: &Path) -> Result<Theirs> {
    let path = folder.join(CONFIG);
    read(&path, &read_small(&path, MAX_CONFIG)?, || super::open(&folder.join(TENSORS)))
}

/// `path` is the config's, for the errors; the tensors are asked for when it is a good one.
pub(super) fn read(path: &Path, config: &[u8], tensors: impl FnOnce() -> Result<RawFile>) -> Result<Theirs> {
    let fields: Map<String, Value> =
        parse_json(config).map_err(|e| Error::checkpoint(path, format!("not a config: {e}")))?;
    let config = LoraConfig::parse(&fields).map_err(|e| Error::checkpoint(path, e))?;
    let file = tensors()?;
    let bad = |what: String| Error::checkpoint(file.path(), what);
    let raw = pairs::read(&file, |name| match name.strip_prefix(PREFIX) {
        Some(name) => Ok(Some(name.to_owned())),
        None => Err(bad(format!("tensor `{name}` does not begin with {PREFIX}"))),
    })?;
    let scaled = raw.into_iter().map(|(name, raw)| {
        let scale = config.scale(&name, raw.pair.rank()).map_err(bad)?;
        Ok((name, (raw.pair, scale)))
    });
    Ok(Theirs::with_scales(scaled.collect::<Result<_>>()?, file.metadata.clone()))
}

pub(super) fn write(theirs: &Theirs, folder: &Path, dtype: Dtype) -> Result<()> {
    let config = describe(theirs)?;
    create_folder_atomic(folder, |folder| {
        TensorFile::write_whole(&folder.join(TENSORS), arrays(theirs, PREFIX, dtype), &theirs.metadata)?;
        let path = folder.join(CONFIG);
        let text = serde_json::to_vec_pretty(&config).map_err(|e| Error::checkpoint(&path, e.to_string()))?;
        write_atomic(&path, |w| w.write_all(&text))
    })
}

/// The pairs, with names as PEFT and diffusers have them.
pub(super) fn arrays<'a>(
    theirs: &'a Theirs,
    prefix: &str,
    dtype: Dtype,
) -> Vec<(String, Dtype, CowArray<'a, f32, IxDyn>)> {
    let sides = |(name, pair): (&String, &'a Pair)| {
        [("lora_A", &pair.a), ("lora_B", &pair.b)].map(|(side, matrix)| {
            (format!("{prefix}{name}.{side}.weight"), dtype, matrix.view().into_dyn().into())
        })
    };
    theirs.pairs.iter().flat_map(sides).collect()
}
