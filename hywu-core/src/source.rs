use crate::{Error, Result};
use std::{
    borrow::Cow,
    fs::File,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

/// Reads a regular file of at most `most` bytes.
///
/// # Errors
/// [`Error::Io`] when it can't be read or is no regular file, [`Error::Checkpoint`] when it is larger.
pub fn read_small(path: impl AsRef<Path>, most: u64) -> Result<Vec<u8>> {
    let path = path.as_ref();
    let mut bytes = Vec::new();
    // One byte more than allowed, whatever length the system tells: the file may be growing.
    open_regular(path)?.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > most {
        return Err(Error::checkpoint(
            path,
            format!("larger than the {most} bytes that such a file may have"),
        ));
    }
    Ok(bytes)
}

/// The same for a file that must be text.
///
/// # Errors
/// As [`read_small`]; [`Error::Checkpoint`] when it is not UTF-8.
pub fn read_text(path: impl AsRef<Path>, most: u64) -> Result<String> {
    let bytes = read_small(&path, most)?;
    String::from_utf8(bytes).map_err(|e| Error::checkpoint(path, format!("not text: {}", e.utf8_error())))
}

/// Opens a regular file, or a link to one. A pipe would make the program wait, and a device such as /dev/zero has no end.
fn open_regular(path: &Path) -> Result<File> {
    let fail = |e| Error::io(path, e);
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(fail(std::io::Error::other("not a regular file")));
    }
    File::open(path).map_err(fail)
}

/// Bytes that are read in pieces: a file, or memory.
///
/// A file is read, not mapped. The system ends a program that touches a page of a mapped file which has shrunk meanwhile, or which its
/// disk or network can't deliver; a read fails with an error. Nor is it slower: a tensor is converted on its way in either case.
pub(crate) struct Source {
    /// The file, or what stands for it in errors.
    pub path: PathBuf,
    bytes: Bytes,
}

enum Bytes {
    File(File),
    Memory(Cow<'static, [u8]>),
}

impl Source {
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), bytes: Bytes::File(open_regular(path)?) })
    }

    pub fn memory(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Self {
        Self { path: name.into(), bytes: Bytes::Memory(bytes.into()) }
    }

    /// Its length in bytes, now.
    pub fn len(&self) -> Result<u64> {
        match &self.bytes {
            Bytes::File(file) => Ok(file.metadata().map_err(|e| Error::io(&self.path, e))?.len()),
            Bytes::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// Fills `out` with the bytes from `start` on.
    pub fn read_at(&self, start: u64, out: &mut [u8]) -> Result<()> {
        let done = match &self.bytes {
            Bytes::File(file) => read_exact_at(file, out, start),
            Bytes::Memory(bytes) => {
                let part = usize::try_from(start).ok().and_then(|s| bytes.get(s..)?.get(..out.len()));
                part.map(|part| out.copy_from_slice(part)).ok_or_else(|| ErrorKind::UnexpectedEof.into())
            }
        };
        done.map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => {
                Error::checkpoint(&self.path, "the file has shrunk since it was opened")
            }
            _ => Error::io(&self.path, e),
        })
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], start: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, start)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut start: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, start)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => (out, start) = (&mut out[n..], start + n as u64),
        }
    }
    Ok(())
}
