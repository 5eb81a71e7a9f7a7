//! A file as kohya's trainers write it.

use super::{ImportOptions, Theirs, no_component, one_of, pairs};
use crate::{Dtype, Error, Result, TensorFile, error::some_of, raw::RawFile};
use indexmap::IndexMap;
use ndarray::{ArrayD, IxDyn};
use std::{collections::BTreeSet, path::Path};

/// What stands between `lora_` and the name: the parts of a pipeline.
const COMPONENTS: [&str; 6] = ["unet", "transformer", "te", "te1", "te2", "te3"];

/// The component of a tensor, and what follows.
pub(super) fn component(tensor: &str) -> Option<(&'static str, &str)> {
    let rest = tensor.strip_prefix("lora_")?;
    COMPONENTS.iter().find_map(|c| Some((*c, rest.strip_prefix(c)?.strip_prefix('_')?)))
}

/// Dots become underscores, so that `a.b_c` and `a_b.c` are the same name: only a list of the real names tells them apart.
fn flat(name: &str) -> String {
    name.replace('.', "_")
}

pub(super) fn read(file: &RawFile, options: &ImportOptions<'_>) -> Result<Theirs> {
    let bad = |what: String| Error::checkpoint(file.path(), what);
    let all: BTreeSet<&str> = file.tensors.iter().filter_map(|(n, _)| Some(component(n)?.0)).collect();
    if all.is_empty() {
        return Err(bad("no tensor of it begins with lora_unet_ or lora_te_".into()));
    }
    let wanted = one_of(file, &all, options.component)?;
    let mut known = IndexMap::<String, Vec<&String>>::new();
    for name in options.known {
        known.entry(flat(name)).or_default().push(name);
    }
    let raw = pairs::read(file, |tensor| match component(tensor) {
        Some((c, name)) => Ok((c == wanted).then(|| name.to_owned())),
        None => Err(bad(format!("tensor `{tensor}` does not begin with lora_unet_ or lora_te_"))),
    })?;
    let mut pairs = IndexMap::new();
    let mut unknown = Vec::new();
    for (name, raw) in raw {
        let rank = raw.pair.rank() as f64;
        let scale = raw.alpha.unwrap_or(rank) / rank;
        let mut candidates: BTreeSet<String> =
            known.get(&name).into_iter().flatten().map(|n| (*n).clone()).collect();
        if candidates.is_empty() {
            candidates = options.names.unflattened(&name).into_iter().collect();
        }
        match candidates.iter().collect::<Vec<_>>()[..] {
            [one] => {
                pairs.insert(one.clone(), (raw.pair, scale));
            }
            [] => unknown.push(name),
            _ => {
                let all: Vec<String> = candidates.into_iter().collect();
                return Err(bad(format!("`{name}` may be {}: the file does not tell", some_of(&all))));
            }
        }
    }
    if !unknown.is_empty() && !options.partial {
        return Err(bad(format!(
            "no module is called {}; give the backbone whose modules they are, or a module map",
            some_of(&unknown)
        )));
    }
    Ok(Theirs { unknown, ..Theirs::with_scales(pairs, file.metadata.clone()) })
}

pub(super) fn write(theirs: &Theirs, path: &Path, component: Option<&str>, dtype: Dtype) -> Result<()> {
    let component = component.unwrap_or("unet");
    if !COMPONENTS.contains(&component) {
        return Err(no_component(component, &COMPONENTS));
    }
    let mut arrays = Vec::new();
    let mut names = IndexMap::new();
    for (name, pair) in &theirs.pairs {
        let key = format!("lora_{component}_{}", flat(name));
        if let Some(other) = names.insert(key.clone(), name) {
            let what = format!(
                "`{other}` and `{name}` are both {key} in kohya's names; rename one with a module map"
            );
            return Err(Error::Adapter(what));
        }
        for (side, matrix) in [("lora_down", &pair.a), ("lora_up", &pair.b)] {
            arrays.push((format!("{key}.{side}.weight"), dtype, matrix.view().into_dyn().into()));
        }
        // In f32 whatever the values' type: bf16 has three digits.
        let alpha = ArrayD::from_elem(IxDyn(&[]), theirs.alpha(pair.rank()) as f32);
        arrays.push((format!("{key}.alpha"), Dtype::F32, alpha.into()));
    }
    TensorFile::write_whole(path, arrays, &theirs.metadata)
}
