//! Generated adapters kept on disk, so that a picture that is edited again needs no generator.

use crate::hash::{ContentHash, of_adapter};
use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use hywu_core::{Adapter, Error, TEMPORARY_PREFIX};
use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// What an entry is, and how its arithmetic goes: to be counted up when a generator would write something else into it.
const FORMAT: &str = "hywu adapter 1";
/// Metadata key of an entry's own checksum.
const CHECKSUM: &str = "cache_checksum";
/// Extension of an entry; its name is the key.
const EXTENSION: &str = "safetensors";
/// Age at which a temporary file must be one that a killed process left behind.
const STALE: Duration = Duration::from_secs(3600);

/// Names an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheKey(String);

impl CacheKey {
    /// Of everything that an adapter depends on.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut hash = ContentHash::new(FORMAT);
        parts.into_iter().for_each(|part| {
            hash.text(part);
        });
        Self(hash.finish())
    }
}

/// A folder of adapters, bounded in size: each an ordinary adapter file under the hash of what it depends on, the file's time the time
/// of its last use.
///
/// Any number of processes may use a folder at once, without a lock. Entries are renamed into place whole, equal keys hold equal
/// adapters, and those who make room at once remove the same files, the least recently used first. Only files that carry an entry's
/// name are ever removed.
#[derive(Clone, Debug)]
pub struct AdapterCache {
    folder: PathBuf,
    limit: u64,
}

impl AdapterCache {
    /// Bytes that a cache takes if nothing else is asked for.
    pub const LIMIT: u64 = 1_000_000_000;

    /// A cache of `limit` bytes in `folder`, which is made when there is something to keep.
    pub fn new(folder: impl Into<PathBuf>, limit: u64) -> Self {
        Self { folder: folder.into(), limit }
    }

    fn path(&self, key: &CacheKey) -> PathBuf {
        self.folder.join(&key.0).with_extension(EXTENSION)
    }

    /// The adapter under `key`, if there is one, which is now the most recently used.
    ///
    /// # Errors
    /// An entry that can't be read, or whose contents are not what was written; the next [`AdapterCache::put`] replaces it.
    pub fn get(&self, key: &CacheKey) -> Result<Option<Adapter>> {
        let path = self.path(key);
        let mut adapter = match Adapter::load(&path) {
            Err(Error::Io { cause, .. })
                if matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                return Ok(None);
            }
            loaded => loaded?,
        };
        let written = adapter.metadata.remove(CHECKSUM);
        ensure!(
            written.is_some_and(|sum| sum == checksum(key, &adapter)),
            "{}: the checksum is not that of the contents",
            path.display()
        );
        // A folder that can be read only still serves; its entries just don't get younger.
        let _ = touch(&path);
        Ok(Some(adapter))
    }

    /// Keeps an adapter under `key`, and removes the least recently used ones beyond the limit.
    ///
    /// # Errors
    /// A folder that can't be written, a full disk, an adapter larger than the limit. What is there stays whole.
    pub fn put(&self, key: &CacheKey, adapter: &Adapter) -> Result<()> {
        let path = self.path(key);
        let mut entry = adapter.clone();
        entry.metadata.insert(CHECKSUM.into(), checksum(key, adapter));
        // Before it would make room for nothing: one that is too large would be the next to go.
        let size = entry.saved_size(&path.to_string_lossy())?;
        ensure!(
            size <= self.limit,
            "an adapter of {} is larger than the limit of {}",
            ByteSize(size).display().si(),
            ByteSize(self.limit).display().si()
        );
        let failed = || format!("{}: it can't be kept", self.folder.display());
        fs::create_dir_all(&self.folder).with_context(failed)?;
        match entry.save(&path) {
            // It has the path of the entry, which says less than that of the folder.
            Err(Error::Io { cause, .. }) => Err(cause).with_context(failed)?,
            saved => saved?,
        }
        // The file system's own clock may be coarser than the one that later uses are told by.
        let _ = touch(&path);
        self.make_room().with_context(|| format!("{}: no room can be made", self.folder.display()))
    }

    /// Removes the least recently used entries beyond the limit, and what killed processes left. What others remove meanwhile is gone
    /// all the same.
    fn make_room(&self) -> io::Result<()> {
        let now = SystemTime::now();
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.folder)? {
            let file = file?;
            let Some((path, about)) = gone_is_none(file.metadata())?.map(|about| (file.path(), about)) else {
                continue;
            };
            let used = about.modified()?;
            if !about.is_file() {
                continue;
            }
            if is_entry(&path) {
                entries.push((used, path, about.len()));
            } else if file.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX)
                && now.duration_since(used).is_ok_and(|age| age > STALE)
            {
                // Of another user, perhaps: it takes room that is not counted.
                let _ = fs::remove_file(path);
            }
        }
        entries.sort();
        let mut failed = Ok(());
        let mut total: u64 = entries.iter().map(|(_, _, size)| size).sum();
        for (_, path, size) in entries {
            if total <= self.limit {
                break;
            }
            // What can't be removed does not keep the others.
            match gone_is_none(fs::remove_file(path)) {
                Ok(_) => total -= size,
                Err(e) => failed = Err(e),
            }
        }
        failed
    }
}

fn is_entry(path: &Path) -> bool {
    let key = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    key.len() == 64
        && key.bytes().all(|b| b.is_ascii_hexdigit())
        && path.extension().is_some_and(|e| e == EXTENSION)
}

/// Over the adapter, its metadata and the key: an entry under another's name is as bad as a damaged one.
fn checksum(key: &CacheKey, adapter: &Adapter) -> String {
    let mut hash = ContentHash::new("cache entry");
    hash.text(&key.0).text(&of_adapter(adapter));
    for (key, value) in &adapter.metadata {
        hash.text(key).text(value);
    }
    hash.finish()
}

fn touch(path: &Path) -> io::Result<()> {
    File::options().write(true).open(path)?.set_modified(SystemTime::now())
}

fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}
