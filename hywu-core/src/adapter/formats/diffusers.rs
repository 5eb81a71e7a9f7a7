//! A file of diffusers.

use super::{
    Theirs,
    config::{LoraConfig, describe},
    no_component, one_of, pairs, peft,
};
use crate::{Dtype, Error, Result, TensorFile, parse_json, raw::RawFile};
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

/// The component that a name begins with; the empty one when it begins with none.
fn component(name: &str) -> &str {
    let first = name.split('.').next().unwrap_or("");
    COMPONENTS.iter().find(|c| **c == first).copied().unwrap_or("")
}

pub(super) fn read(file: &RawFile, wanted: Option<&str>) -> Result<Theirs> {
    let all: BTreeSet<&str> = file.tensors.iter().map(|(name, _)| component(name)).collect();
    // One that is not in the list may be meant too.
    let own = wanted.filter(|w| file.tensors.iter().any(|(name, _)| name.starts_with(&format!("{w}."))));
    let wanted = match own {
        Some(own) => own,
        None => one_of(file, &all, wanted)?,
    };
    let prefix = prefix(wanted);
    let stripped = |name: &str| {
        let own = !wanted.is_empty() || component(name).is_empty();
        name.strip_prefix(&prefix).filter(|_| own).map(str::to_owned)
    };
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
    let raw = pairs::read(file, |name| Ok(stripped(name)))?;
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
    let component = component.unwrap_or("transformer");
    if !component.is_empty() && !COMPONENTS.contains(&component) {
        return Err(no_component(component, &COMPONENTS));
    }
    let prefix = prefix(component);
    let config: Map<String, Value> =
        describe(theirs)?.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)).collect();
    let text = serde_json::to_string(&config).map_err(|e| Error::checkpoint(path, e.to_string()))?;
    let mut metadata = theirs.metadata.clone();
    metadata.insert(METADATA.into(), text);
    TensorFile::write_whole(path, peft::arrays(theirs, &prefix, dtype), &metadata)
}
