use crate::{Error, Result, parse_json};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

/// The index of a sharded checkpoint, `model.safetensors.index.json`: which shard holds which tensor.
#[derive(Debug, PartialEq, Deserialize)]
pub struct Index {
    /// Tensor name -> name of its shard, a file in the index's folder.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Longest index, in bytes.
    pub const MAX_BYTES: u64 = 100_000_000;

    /// Parses an index; `path` is for the errors.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for text that is no index, has a key twice or names no tensor, and for a shard name that is not a plain file
    /// name and so would leave the folder.
    pub fn parse(path: impl AsRef<Path>, text: &[u8]) -> Result<Self> {
        let bad = |what: String| Err(Error::checkpoint(path.as_ref(), what));
        let index: Self = match parse_json(text) {
            Ok(index) => index,
            Err(e) => return bad(format!("not a shard index: {e}")),
        };
        if index.weight_map.is_empty() {
            return bad("the index names no tensor".into());
        }
        for name in index.weight_map.values() {
            let plain = Path::new(name).components().collect::<Vec<_>>();
            if !matches!(plain[..], [Component::Normal(_)]) || name.contains(['/', '\\']) {
                return bad(format!("shard name `{name}` leaves the folder"));
            }
            if name.contains(char::is_control) {
                return bad(format!("shard name `{name}` holds control characters"));
            }
        }
        Ok(index)
    }

    /// The shards, each with the names of its tensors.
    pub fn shards(&self) -> BTreeMap<&str, Vec<&str>> {
        let mut shards = BTreeMap::<&str, Vec<&str>>::new();
        for (tensor, shard) in &self.weight_map {
            shards.entry(shard).or_default().push(tensor);
        }
        shards
    }
}

/// The file that a shard's name stands for. A link may not lead out of the folder, or the index could name any file by one; only a
/// Hugging Face cache is laid out so, with snapshots/REVISION/... full of links to blobs/ beside snapshots/.
pub(crate) fn shard_path(index: &Path, folder: &Path, name: &str) -> Result<PathBuf> {
    let (shard, bad) = (folder.join(name), |what| Error::checkpoint(index, what));
    let resolve = |path: &Path| path.canonicalize();
    let there = resolve(&shard).map_err(|e| bad(format!("its shard `{name}` can't be opened: {e}")))?;
    let home = resolve(folder).map_err(|e| Error::io(folder, e))?;
    let mut snapshots = home.ancestors().filter(|a| a.file_name().is_some_and(|n| n == "snapshots"));
    let cached = snapshots.any(|s| s.parent().is_some_and(|cache| there.starts_with(cache.join("blobs"))));
    if !cached && !there.starts_with(&home) {
        return Err(bad(format!(
            "its shard `{name}` is a link that leaves the folder, to {}",
            there.display()
        )));
    }
    Ok(shard)
}
