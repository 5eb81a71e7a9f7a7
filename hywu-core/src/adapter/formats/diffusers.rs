//! A file of diffusers.

use super::{
    Theirs,
    config::{LoraConfig, describe},
    pairs,
    peft::write_pairs,
};
use crate::{Dtype, Error, Result, TensorWriter, adapter::matrices::some_of, parse_json, raw::RawFile};
use serde_json::{Map, Value};
use std::{collections::BTreeSet, path::Path};

/// The config as JSON, every field behind the component's name.
const METADATA: &str = "lora_adapter_metadata";
/// What a name may begin with; `diffusion_model` is ComfyUI's.
const COMPONENTS: [&str; 8] = [
    "transformer",
    "transformer_2",
    "unet",
    "diffusion_model",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
];

/// `component.`, or nothing for the empty one.
fn prefix(component: &str) -> String {
    if component.is_empty() { String::new() } else { format!("{component}.") }
}

/// The one component of a file; the empty one when names begin with none.
fn component(file: &RawFile) -> Result<&'static str> {
    let of = |(name, _): &(String, _)| {
        let first = name.split('.').next().unwrap_or("");
        COMPONENTS.iter().find(|c| **c == first).copied().unwrap_or("")
    };
    let all: BTreeSet<&str> = file.tensors.iter().map(of).collect();
    match all.iter().collect::<Vec<_>>()[..] {
        [one] => Ok(one),
        [] => Ok(""),
        _ => {
            let all: Vec<&str> =
                all.into_iter().map(|c| if c.is_empty() { "no component" } else { c }).collect();
            let what = format!("it has adapters for {}; say which component to take", some_of(&all));
            Err(Error::checkpoint(file.path(), what))
        }
    }
}

pub(super) fn read(file: &RawFile, wanted: Option<&str>) -> Result<Theirs> {
    let prefix = prefix(match wanted {
        Some(wanted) => wanted,
        None => component(file)?,
    });
    let bad = |what: String| Error::checkpoint(file.path(), what);
    let config = match file.metadata.get(METADATA) {
        Some(text) => {
            let fields: Map<String, Value> =
                parse_json(text.as_bytes()).map_err(|e| bad(format!("metadata `{METADATA}`: {e}")))?;
            let own = |(key, value): (&String, &Value)| {
                Some((key.strip_prefix(&prefix)?.to_owned(), value.clone()))
            };
            let own: Map<String, Value> = fields.iter().filter_map(own).collect();
            let config = LoraConfig::parse(&own).map_err(|e| bad(format!("metadata `{METADATA}`: {e}")))?;
            (!own.is_empty()).then_some(config)
        }
        None => None,
    };
    let raw = pairs::read(file, |name| Ok(name.strip_prefix(&prefix).map(str::to_owned)))?;
    let scaled = raw.into_iter().map(|(name, raw)| {
        let rank = raw.pair.rank();
        let scale = match (&config, raw.alpha) {
            (Some(config), _) => config.scale(&name, rank).map_err(bad)?,
            (None, Some(alpha)) => alpha / rank as f64,
            (None, None) => 1.0,
        };
        Ok((name, (raw.pair, scale)))
    });
    let mut metadata = file.metadata.clone();
    metadata.remove(METADATA);
    Ok(Theirs::with_scales(scaled.collect::<Result<_>>()?, metadata))
}

pub(super) fn write(theirs: &Theirs, path: &Path, component: Option<&str>, dtype: Dtype) -> Result<()> {
    let prefix = prefix(component.unwrap_or("transformer"));
    let config: Map<String, Value> =
        describe(theirs)?.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)).collect();
    let text = serde_json::to_string(&config).map_err(|e| Error::checkpoint(path, e.to_string()))?;
    let mut writer = TensorWriter::new();
    write_pairs(theirs, &prefix, dtype, &mut writer);
    writer.meta(METADATA, text);
    writer.write(path)
}
