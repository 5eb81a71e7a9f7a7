use crate::{Error, Result};
use std::{
    io::{BufWriter, ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;

/// A file that appears whole or not at all: it is written into a temporary file in the same folder, which [`AtomicFile::commit`] syncs and
/// renames. A symbolic link stays and the file that it points to is written. Dropped before, it leaves nothing.
pub struct AtomicFile {
    path: PathBuf,
    place: PathBuf,
    file: BufWriter<NamedTempFile>,
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
        Ok(Self { path: path.to_owned(), place, file: BufWriter::new(file) })
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

/// Makes a folder whole or not at all: `fill` writes into a temporary folder beside it, which is then renamed.
///
/// # Errors
/// Those of `fill`; [`Error::Io`] when something stands at `path` (other than an empty folder), or no folder can be made there.
/// Nothing is left behind.
pub fn create_folder_atomic<T>(path: impl AsRef<Path>, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let path = path.as_ref();
    let fail = |e| Error::io(path, e);
    let free = match std::fs::symlink_metadata(path) {
        Ok(there) => there.is_dir() && std::fs::read_dir(path).map_err(fail)?.next().is_none(),
        Err(e) if e.kind() == ErrorKind::NotFound => true,
        Err(e) => return Err(fail(e)),
    };
    if !free {
        let what = "it is there already; a new folder is expected";
        return Err(fail(std::io::Error::new(ErrorKind::AlreadyExists, what)));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY_PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let folder = builder.tempdir_in(parent_of(path)).map_err(|e| fail(e.kind().into()))?;
    let done = fill(folder.path())?;
    // Renaming over an empty folder is not possible everywhere.
    if path.is_dir() {
        std::fs::remove_dir(path).map_err(fail)?;
    }
    std::fs::rename(folder.path(), path).map_err(fail)?;
    Ok(done)
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
