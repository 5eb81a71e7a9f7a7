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
    builder.prefix(TEMPORARY_PREFIX);
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

/// Names of the temporary files of [`write_atomic`] start so; a killed process may leave one behind.
pub const TEMPORARY_PREFIX: &str = ".hywu-";
