use crate::Result;
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
    let _ = (path.as_ref(), write);
    todo!()
}
