use crate::{Error, Result};
use std::{
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

/// Writes a file whole or not at all: into a temporary file in the same folder, synced, then renamed. A symbolic link stays and
/// the file that it points to is written.
///
/// # Errors
/// [`Error::Io`] with the path when something other than a regular file stands there (a folder, a device such as /dev/null), when
/// the folder is missing, not writable or the disk is full; what stood at `path` before is then untouched.
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let fail = |e| Error::io(path, e);
    let place = place(path).map_err(fail)?;
    let folder = match place.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".hywu-");
    // The temporary file's own mode is 0600; a new file should have the usual one, less the umask.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let file = builder.tempfile_in(folder).map_err(|e| fail(e.kind().into()))?;
    let mut buffered = std::io::BufWriter::new(file);
    write(&mut buffered).map_err(fail)?;
    let file = buffered.into_inner().map_err(|e| fail(e.into_error()))?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(&place).map_err(|e| fail(e.error))?;
    Ok(())
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
    let parent = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".hywu-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let folder = builder.tempdir_in(parent).map_err(|e| fail(e.kind().into()))?;
    let done = fill(folder.path())?;
    // Renaming over an empty folder is not possible everywhere.
    if path.is_dir() {
        std::fs::remove_dir(path).map_err(fail)?;
    }
    std::fs::rename(folder.path(), path).map_err(fail)?;
    Ok(done)
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
