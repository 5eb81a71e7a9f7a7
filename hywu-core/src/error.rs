use std::{
    fmt::{Display, Write},
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
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said. Part of the message, and so no source of it: a chain of errors would tell it twice.
        cause: std::io::Error,
    },
    /// A checkpoint or safetensors file is damaged, or not what was asked for.
    #[error("{}: {}", path.display(), Plain(what))]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A configuration holds a value that can't work.
    #[error("config: {}", Plain(.0))]
    Config(String),
    /// An adapter does not fit, or holds bad values.
    #[error("adapter: {}", Plain(.0))]
    Adapter(String),
    /// Whoever watches the work has ended it.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An [`Error::Io`] on `path`.
    pub fn io(path: impl AsRef<Path>, cause: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), cause }
    }
    /// An [`Error::Checkpoint`] on `path`.
    pub fn checkpoint(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.as_ref().to_owned(), what: what.into() }
    }
}

/// Shows text that may come from a file: in one line, no control character reaches a terminal, and not without end.
#[derive(Clone, Copy, Debug)]
pub struct Plain<'a>(pub &'a str);

impl Display for Plain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 4096;
        for c in self.0.chars().take(SHOWN) {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        if self.0.chars().nth(SHOWN).is_some() { f.write_str(" ...") } else { Ok(()) }
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

/// Up to ten names, for a message, and how many more there are.
pub fn some_of<S: AsRef<str>>(names: &[S]) -> String {
    const TOLD: usize = 10;
    let told: Vec<String> = names.iter().take(TOLD).map(|n| format!("`{}`", n.as_ref())).collect();
    let more = names.len().saturating_sub(TOLD);
    told.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
}
