/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in an op.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// What would be right.
        expected: String,
    },
    /// An argument's value can't work.
    #[error("{op}: {what}")]
    Invalid {
        /// The op.
        op: &'static str,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A CUDA device was asked of a build without CUDA kernels.
    #[error("this build has no CUDA kernels; use the device `cpu`, or rebuild with CUDA")]
    NotBuiltWithCuda,
    /// An error of files, configs or adapters.
    #[error(transparent)]
    Core(#[from] hywu_core::Error),
}

impl Error {
    /// An [`Error::Shape`].
    pub fn shape(op: &'static str, what: &'static str, got: &[usize], expected: impl Into<String>) -> Self {
        Self::Shape { op, what, got: got.to_vec(), expected: expected.into() }
    }
    /// An [`Error::Invalid`].
    pub fn invalid(op: &'static str, what: impl Into<String>) -> Self {
        Self::Invalid { op, what: what.into() }
    }
}
