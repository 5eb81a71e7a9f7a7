use std::{
    fmt::Display,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with files, configs and adapters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint or safetensors file is damaged, or not what was asked for.
    #[error("{}: {what}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A configuration holds a value that can't work.
    #[error("config: {0}")]
    Config(String),
    /// An adapter does not fit, or holds bad values.
    #[error("adapter: {0}")]
    Adapter(String),
}

impl Error {
    /// An [`Error::Io`] on `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }
    /// An [`Error::Checkpoint`] on `path`.
    pub fn checkpoint(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().to_owned(), what: what.into() }
    }
}

/// Checks a number of a config; NaN is outside every range.
///
/// # Errors
/// [`Error::Config`] with the field, its value and the range.
pub fn check_range<T: PartialOrd + Display>(
    field: impl Display,
    value: T,
    range: RangeInclusive<T>,
) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(Error::Config(format!("{field} {value} must be from {} to {}", range.start(), range.end())))
}
