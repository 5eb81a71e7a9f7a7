use crate::{Error, Result};
use std::{io::Write, path::Path};

/// Writes a file whole or not at all: into a temporary file in the same folder, synced, then renamed.
///
/// # Errors
/// [`Error::Io`] with the path when the folder is missing, not writable or the disk is full; what stood at
/// `path` before is then untouched.
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let fail = |e| Error::io(path, e);
    let folder = match path.parent() {
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
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}
