use crate::{Error, Result};
use std::{
    collections::BTreeSet,
    io::{BufWriter, ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};
use tempfile::{NamedTempFile, TempDir};

/// A file that appears whole or not at all: it is written into a temporary file in the same folder, which [`AtomicFile::commit`] syncs and
/// renames. A symbolic link stays and the file that it points to is written. Dropped before, it leaves nothing.
pub struct AtomicFile {
    path: PathBuf,
    place: PathBuf,
    file: BufWriter<NamedTempFile>,
    _listed: Listed,
}

impl AtomicFile {
    /// An empty file that is to appear at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] with the path when something other than a regular file stands there (a folder, a device such as /dev/null), or
    /// when the folder is missing or not writable.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let fail = |e| Error::io(path, e);
        let place = place(path).map_err(fail)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY_PREFIX);
        // The temporary file's own mode is 0600; a new file should have the usual one, less the umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(parent_of(&place)).map_err(|e| fail(e.kind().into()))?;
        let listed = Listed::new(file.path());
        Ok(Self { path: path.to_owned(), place, file: BufWriter::new(file), _listed: listed })
    }
    /// Where it is to appear.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Takes so many bytes of the disk in advance, where the file system can do that: a long run should not find at its end that they
    /// are not there.
    ///
    /// # Errors
    /// [`Error::Io`] when the disk has not so many.
    pub fn reserve(&mut self, bytes: u64) -> Result<()> {
        match fs4::FileExt::allocate(self.file.get_ref().as_file(), bytes) {
            // Else running full is found when it happens.
            Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::FileTooLarge) => {
                Err(Error::io(&self.path, e))
            }
            _ => Ok(()),
        }
    }
    /// Lets it appear, instead of what stood there before.
    ///
    /// # Errors
    /// [`Error::Io`] with the path when the disk is full; what stood at `path` before is then untouched.
    pub fn commit(self) -> Result<()> {
        let fail = |e| Error::io(&self.path, e);
        let file = self.file.into_inner().map_err(|e| fail(e.into_error()))?;
        file.as_file().sync_all().map_err(fail)?;
        file.persist(&self.place).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.file.seek(to)
    }
}

/// Writes an [`AtomicFile`] whole.
///
/// # Errors
/// As [`AtomicFile::create`] and [`AtomicFile::commit`]; what stood at `path` before is then untouched.
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    write(&mut file).map_err(|e| Error::io(file.path(), e))?;
    file.commit()
}

/// Makes a folder whole or not at all: `fill` writes into a temporary folder beside it, which is then renamed. Whether it can take its
/// place is known before `fill` begins.
///
/// # Errors
/// Those of `fill`; [`Error::Io`] when something stands at `path` (other than an empty folder that can be replaced: not the current one
/// as `.`, not a link, not where a disk is mounted), or no folder can be made there. Nothing is left behind.
pub fn create_folder_atomic<T, E: From<Error>>(
    path: impl AsRef<Path>,
    fill: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let path = path.as_ref();
    let fail = |e| E::from(Error::io(path, e));
    let place = free_folder(path).map_err(fail)?;
    let folder = TemporaryFolder::beside(&place).map_err(fail)?;
    let done = fill(folder.path())?;
    // Renaming over an empty folder is not possible everywhere.
    if place.is_dir() {
        std::fs::remove_dir(&place).map_err(fail)?;
    }
    std::fs::rename(folder.path(), &place).map_err(fail)?;
    folder.keep();
    Ok(done)
}

/// The place of a new folder, without what a path may end with (`x/.`), when nothing is in the way.
fn free_folder(path: &Path) -> std::io::Result<PathBuf> {
    let place: PathBuf = path.components().collect();
    if place.file_name().is_none() {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "a new folder is expected, with a name"));
    }
    let there = match std::fs::symlink_metadata(&place) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(place),
        there => there?,
    };
    if !there.is_dir() || std::fs::read_dir(&place)?.next().is_some() {
        let what = "it is there already, and no empty folder; a new one is expected";
        return Err(std::io::Error::new(ErrorKind::AlreadyExists, what));
    }
    // Nothing but doing it tells whether an empty folder can be replaced: a disk may be mounted there, or its parent not be writable.
    std::fs::remove_dir(&place)?;
    std::fs::create_dir(&place)?;
    Ok(place)
}

/// As [`create_folder_atomic`], also instead of a folder that stands there, if that holds nothing but some of `parts`. A link to a folder
/// stays, and what it points to is replaced.
///
/// On Linux and macOS the two folders trade places in one step, where the file system can do that. Elsewhere there is a moment with
/// neither, and a process that is killed in it leaves the old one beside its place, as NAME.hywu-XXXXXX. Whoever opens the files of a
/// folder one by one meanwhile may find some of the old and some of the new, and must be able to tell.
///
/// # Errors
/// Those of `fill`; [`Error::Io`] when a folder at `path` holds something else, there is something other than a folder, or no folder can
/// be made there. What stood at `path` is then as it was.
pub fn replace_folder_atomic<T, E: From<Error>>(
    path: impl AsRef<Path>,
    parts: &[&str],
    fill: impl FnOnce(&Path) -> Result<T, E>,
) -> Result<T, E> {
    let path = path.as_ref();
    let fail = |e| E::from(Error::io(path, e));
    let place = match path.canonicalize() {
        Err(e) if e.kind() == ErrorKind::NotFound => path.components().collect(),
        place => place.map_err(fail)?,
    };
    check_parts(&place, parts).map_err(fail)?;
    let folder = TemporaryFolder::beside(&place).map_err(fail)?;
    let done = fill(folder.path())?;
    // It may have taken long.
    if check_parts(&place, parts).map_err(fail)? {
        if exchange(folder.path(), &place).is_err() {
            step_aside(folder.path(), &place).map_err(fail)?;
        }
    } else {
        std::fs::rename(folder.path(), &place).map_err(fail)?;
        folder.keep();
    }
    // The temporary folder, which may now be the old one, is removed as far as it can be.
    Ok(done)
}

/// Is there a folder? It may hold nothing but `parts`.
fn check_parts(folder: &Path, parts: &[&str]) -> std::io::Result<bool> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        if !parts.iter().any(|part| name == *part) {
            let what = format!("it holds {name:?}, which would be lost when the folder is replaced");
            return Err(std::io::Error::new(ErrorKind::AlreadyExists, what));
        }
    }
    Ok(true)
}

/// Two folders trade places.
#[cfg(any(target_os = "linux", target_vendor = "apple"))]
fn exchange(one: &Path, other: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// The same in three steps. One who is killed after the first leaves the old folder beside its place, where its owner will see it.
fn step_aside(new: &Path, place: &Path) -> std::io::Result<()> {
    let mut aside = place.as_os_str().to_owned();
    aside.push(new.file_name().unwrap_or_default());
    std::fs::rename(place, &aside)?;
    if let Err(e) = std::fs::rename(new, place) {
        std::fs::rename(&aside, place)?;
        return Err(e);
    }
    std::fs::rename(&aside, new)
}

/// A folder that removes itself, and is listed as long as it lives.
struct TemporaryFolder {
    folder: TempDir,
    _listed: Listed,
}

impl TemporaryFolder {
    /// In the folder that `place` is to appear in.
    fn beside(place: &Path) -> std::io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMPORARY_PREFIX);
        // Its own mode is 0700; a new folder should have the usual one, less the umask.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        // The error's kind alone: its text has a path that nobody asked for.
        let folder = builder.tempdir_in(parent_of(place)).map_err(|e| std::io::Error::from(e.kind()))?;
        let _listed = Listed::new(folder.path());
        Ok(Self { folder, _listed })
    }
    fn path(&self) -> &Path {
        self.folder.path()
    }
    /// It stands under its name now.
    fn keep(self) {
        let _ = self.folder.keep();
    }
}

/// The folder that holds `path`.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The file to replace: renaming acts on a link itself, and over a device it would succeed.
fn place(path: &Path) -> std::io::Result<PathBuf> {
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            let what = "there is something other than a regular file, which is not replaced";
            return Err(std::io::Error::new(ErrorKind::InvalidInput, what));
        }
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Link by link, as the last one may point to a file that is yet to be made. Circles were refused above.
    let mut place = path.to_owned();
    while let Ok(target) = std::fs::read_link(&place) {
        place = place.parent().unwrap_or(Path::new("")).join(target);
    }
    Ok(place)
}

/// Names of the temporary files and folders that become whole ones start so; a killed process may leave one behind.
pub const TEMPORARY_PREFIX: &str = ".hywu-";

/// Removes a temporary file or folder.
fn remove(path: &Path) -> std::io::Result<()> {
    if std::fs::symlink_metadata(path)?.is_dir() {
        std::fs::remove_dir_all(path)
    } else {
        std::fs::remove_file(path)
    }
}

/// Removes the temporary files and folders that killed processes left in a folder which nobody else writes to now.
///
/// # Errors
/// [`Error::Io`] when the folder can't be read, or something can't be removed.
pub fn remove_leftovers(folder: impl AsRef<Path>) -> Result<()> {
    let folder = folder.as_ref();
    for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
        let entry = entry.map_err(|e| Error::io(folder, e))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            let path = entry.path();
            remove(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// Temporary files and folders that this process has now.
static LISTED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn listed() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    // A set is never left half-changed.
    LISTED.lock().unwrap_or_else(|e| e.into_inner())
}

/// A path that is listed as long as this lives.
struct Listed(PathBuf);

impl Listed {
    fn new(path: &Path) -> Self {
        listed().insert(path.to_owned());
        Self(path.to_owned())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        listed().remove(&self.0);
    }
}

/// Removes what there is of this process's files and folders that have not appeared yet. For one that ends at once, as nothing else
/// would then.
pub fn remove_temporaries() {
    for path in listed().iter() {
        // Nobody is left to be told of errors.
        let _ = remove(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_trade_places_on_any_system() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (one, other) = (dir.path().join(".hywu-new"), dir.path().join("place"));
        for (folder, name) in [(&one, "new"), (&other, "old")] {
            std::fs::create_dir(folder).expect("writable");
            std::fs::write(folder.join(name), name).expect("writable");
        }
        step_aside(&one, &other).expect("both are there");
        assert!(other.join("new").exists() && one.join("old").exists());
        // Where the new one can't be moved the old one comes back.
        std::fs::remove_dir_all(&one).expect("writable");
        assert!(step_aside(&one, &other).is_err());
        assert!(other.join("new").exists());
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 1);
    }
}
