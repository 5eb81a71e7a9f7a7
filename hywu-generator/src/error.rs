/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with a generator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The condition does not fit the generator.
    #[error("condition: {0}")]
    Condition(String),
    /// An error of the kernels.
    #[error(transparent)]
    Kernel(#[from] hywu_kernels::Error),
    /// An error of files, configs or adapters.
    #[error(transparent)]
    Core(#[from] hywu_core::Error),
}
