use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with pictures, text and the backbone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A picture can't be read or written.
    #[error("{}: {what}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// An argument's value can't work.
    #[error("{0}")]
    Invalid(String),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// An error of the kernels.
    #[error(transparent)]
    Kernel(#[from] hywu_kernels::Error),
    /// An error of files, configs or adapters.
    #[error(transparent)]
    Core(#[from] hywu_core::Error),
}
