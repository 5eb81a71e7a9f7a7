//! Which files a checkpoint consists of, whatever is then read of them.

use crate::{Error, Index, Result, index::shard_path, read_small};
use std::{collections::HashMap, path::Path};

/// The file of a folder that is not sharded.
pub(crate) const SINGLE: &str = "model.safetensors";
/// The index of one that is.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// An opened file, of which the names are known.
pub(crate) trait Named {
    fn path(&self) -> &Path;
    fn names(&self) -> impl Iterator<Item = &str>;
}

/// Opens the file, or all files of a folder, shards in the order of their names. Every tensor must then be in one file only, and in the
/// one that the index says.
pub(crate) fn open_all<F: Named>(path: &Path, open: impl Fn(&Path) -> Result<F>) -> Result<Vec<F>> {
    if !path.is_dir() {
        return Ok(vec![open(path)?]);
    }
    let (file, single) = (path.join(INDEX), path.join(SINGLE));
    if !file.is_file() {
        if single.is_file() {
            return Ok(vec![open(&single)?]);
        }
        return Err(Error::checkpoint(path, format!("the folder holds neither {SINGLE} nor {INDEX}")));
    }
    let index = Index::parse(&file, &read_small(&file, Index::MAX_BYTES)?)?;
    let shards = index.shards();
    let opened = |name: &&str| open(&shard_path(&file, path, name)?);
    let files = shards.keys().map(opened).collect::<Result<Vec<F>>>()?;
    let mut places = HashMap::<&str, &F>::new();
    for shard in &files {
        for name in shard.names() {
            if let Some(other) = places.insert(name, shard) {
                let what = format!("tensor `{name}` is also in {}", other.path().display());
                return Err(Error::checkpoint(shard.path(), what));
            }
        }
    }
    for ((shard, tensors), opened) in shards.iter().zip(&files) {
        let held = |t: &&&str| places.get(**t).is_some_and(|there| std::ptr::eq(*there, opened));
        if let Some(missing) = tensors.iter().find(|t| !held(t)) {
            let what = format!("tensor `{missing}` is not in its shard `{shard}`");
            return Err(Error::checkpoint(&file, what));
        }
        if let Some(extra) = opened.names().find(|name| !index.weight_map.contains_key(*name)) {
            return Err(Error::checkpoint(opened.path(), format!("tensor `{extra}` is not in the index")));
        }
    }
    Ok(files)
}
